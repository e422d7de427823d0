//! Data sets written again, in another format or kind of file.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use engine::checkpoint::atomic;
use engine::{Error, Result};
use serde::Serialize;
use serde_json::Value;

use super::layout::{Target, example_columns, pair_columns, prompt_columns};
use super::prepare::Progress;
use super::read::{Source, nothing_usable};
use super::schema::{Columns, Format, RowResult, Schema, pku_label, prompt_of};
use super::source::{Kinds, all_bytes, visit_rows};
use super::write::{Kind, Writer};
use super::{LabelledExample, PreferencePair, Prompt};

/// Rows between two reports of progress.
const REPORT_EVERY: usize = 256;

/// A data set that is to be written again.
#[derive(Debug, Clone, Copy)]
pub struct Conversion<'a> {
    /// The rows. The metric is that of the label in `pku` too, and what the target cannot hold is a bad row.
    pub source: Source<'a>,
    /// What the rows are written as. Nothing: pairs as `trl`, all others as what they are.
    pub to: Option<Target>,
}

/// What became of a data set that was written again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Converted {
    /// The schema that was read; nothing for a list of prompts.
    pub from: Option<Format>,
    /// What was written.
    pub to: Target,
    /// How many rows were written.
    pub rows: usize,
    /// How many rows were left out, since they are not usable or the target cannot hold them.
    pub bad_rows: usize,
    /// What is wrong with the first of these, as a sentence that names it.
    pub first_bad_row: Option<String>,
    /// How many responses were left out since they are not to be learned from (`sft`), or how many prompts since they are
    /// there already (`prompts`).
    pub left_out: usize,
    /// Columns of the first row that the target has no place for.
    pub lost_columns: Vec<String>,
}

impl Conversion<'_> {
    /// Reads the data set and writes it to `out`, whose name tells the kind of file: `.jsonl` or `.json`, perhaps with `.gz`
    /// or `.zst` behind, or `.parquet`. In memory is a row, or of Parquet a group of rows. `progress` may stop the work.
    ///
    /// # Errors
    /// As [`read_pairs`](super::read_pairs); a name of another kind; rows from which the target cannot be made; a disk that
    /// cannot be written; those of `progress`. There is no file at `out` then, or the one that was there before.
    pub fn write(&self, out: &Path, progress: &mut dyn FnMut(Progress) -> Result<()>) -> Result<Converted> {
        let kind = Kind::of(out)?;
        let Source { path, format, skip_bad_rows, .. } = self.source;
        let first = first_row(path, Kinds::Records).ok().flatten();
        let format = format.or_else(|| first.as_ref().and_then(Format::of_row));
        let to = self.target(format)?;
        let mut converted = Converted {
            from: format,
            to,
            rows: 0,
            bad_rows: 0,
            first_bad_row: None,
            left_out: 0,
            lost_columns: first.map_or_else(Vec::new, |first| self.lost(&first, to)),
        };
        atomic::try_write_file(out, |file| {
            let writer = Writer::new(kind, file).map_err(Error::io("write", out))?;
            let all_bytes = all_bytes(path)?;
            let mut output = Output { writer, out, skip_bad_rows, all_bytes, converted: &mut converted, progress };
            self.visit(format, &mut output)?;
            let Output { writer, progress, converted, .. } = output;
            progress(Progress { rows: converted.rows, bytes: all_bytes, all_bytes })?;
            if converted.rows == 0 {
                let what = format!("row for `{}`", to.name());
                return Err(nothing_usable(path, &what, converted.bad_rows, converted.first_bad_row.clone()));
            }
            writer.finish().map_err(Error::io("write", out))
        })?;
        Ok(converted)
    }

    /// What the rows are written as, where it can be made from them.
    fn target(&self, format: Option<Format>) -> Result<Target> {
        let impossible = |reason: &str| Err(Error::input(format!("{} {reason}", self.source.path.display())));
        match (self.to, format) {
            (Some(Target::Trl | Target::Hh | Target::Pku), Some(Format::Unpaired | Format::Sft)) => impossible(
                "holds single responses, from which no pairs can be made: nothing says which of two responses to one prompt is \
                 better. Convert it to `unpaired`, `sft` or `prompts`.",
            ),
            (Some(Target::Unpaired), Some(Format::Sft)) => impossible(
                "holds responses without labels, and labels cannot be made up. Convert it to `sft` or `prompts`, or add a \
                 column `label` that is true or false.",
            ),
            (Some(to), _) => Ok(to),
            (None, Some(Format::Unpaired)) => Ok(Target::Unpaired),
            (None, Some(Format::Sft)) => Ok(Target::Sft),
            (None, None)
                if first_row(self.source.path, Kinds::Prompts)?.is_some_and(|row| row.contains_key("prompt")) =>
            {
                Ok(Target::Prompts)
            }
            (None, _) => Ok(Target::Trl),
        }
    }

    /// The column of the label in `pku`.
    fn label(&self) -> Result<&'static str> {
        pku_label(self.source.metric).ok_or_else(|| {
            Error::input(format!(
                "`pku` has no label for the metric `{}`, only for `helpfulness` and `harmlessness`. Give one of these.",
                self.source.metric
            ))
        })
    }

    /// The columns of the first row that nothing is written of. A list of prompts is meant to lose all others.
    fn lost(&self, first: &Columns, to: Target) -> Vec<String> {
        let find = if to.is_pairs() { Schema::find } else { Schema::find_labelled };
        let Source { path, format, metric, .. } = self.source;
        match find(first, path, format, metric) {
            Ok(schema) if to != Target::Prompts => {
                let kept = schema.columns(to.is_pairs());
                first.keys().filter(|name| !kept.contains(&name.as_str())).cloned().collect()
            }
            _ => Vec::new(),
        }
    }

    /// Gives each row to `output`.
    fn visit(&self, format: Option<Format>, output: &mut Output<'_, '_>) -> Result<()> {
        let to = output.converted.to;
        let read = Arc::new(AtomicU64::new(0));
        let mut unseen = unseen();
        if to == Target::Prompts && format.is_none() {
            return visit_rows(self.source.path, Kinds::Prompts, &read, |row, places| {
                let prompt = row.columns.and_then(|columns| prompt_of(&columns));
                output.row(prompt.map(|prompt| unseen(&prompt)), &|| places.of(row.number))?;
                output.report(&read)
            })
            .map(drop);
        }
        // bad rows are seen, and are then for the output to count
        let source = Source { skip_bad_rows: true, ..self.source };
        if to.is_pairs() {
            let label = if to == Target::Pku { self.label()? } else { "" };
            return source
                .visit::<PreferencePair>(&read, &mut |found, places| {
                    match found {
                        Ok(pair) => output.row(pair_columns(&pair, to, label).map(Some), &|| places.of(pair.row))?,
                        Err(described) => output.bad(described)?,
                    }
                    output.report(&read)
                })
                .map(drop);
        }
        let mut last = 0;
        source
            .visit::<LabelledExample>(&read, &mut |found, places| {
                match found {
                    // a row may hold two responses to its prompt
                    Ok(example) if to == Target::Prompts && example.row == last => {}
                    Ok(example) => {
                        last = example.row;
                        let columns = match to {
                            Target::Prompts => unseen(&example.prompt),
                            Target::Sft if !example.desirable => None,
                            _ => Some(example_columns(&example, to)),
                        };
                        output.row(Ok(columns), &|| places.of(example.row))?;
                    }
                    Err(described) => output.bad(described)?,
                }
                output.report(&read)
            })
            .map(drop)
    }
}

/// Gives the columns of a prompt the first time that it is there.
fn unseen() -> impl FnMut(&Prompt) -> Option<Columns> {
    let mut seen = HashSet::new();
    move |prompt| {
        let columns = prompt_columns(prompt);
        seen.insert(blake3::hash(Value::from(columns.clone()).to_string().as_bytes())).then_some(columns)
    }
}

/// Where rows go.
struct Output<'a, 'c> {
    writer: Writer<'a>,
    out: &'c Path,
    skip_bad_rows: bool,
    /// Bytes of the files that are read.
    all_bytes: u64,
    converted: &'c mut Converted,
    progress: &'c mut dyn FnMut(Progress) -> Result<()>,
}

impl Output<'_, '_> {
    /// Takes a row, or nothing of one that is left out.
    fn row(&mut self, columns: RowResult<Option<Columns>>, place: &dyn Fn() -> String) -> Result<()> {
        let pushed = match columns {
            Ok(Some(columns)) => self.writer.push(columns).map_err(Error::io("write", self.out))?,
            Ok(None) => {
                self.converted.left_out += 1;
                return Ok(());
            }
            Err(bad) => Err(bad),
        };
        match pushed {
            Ok(()) => {
                self.converted.rows += 1;
                Ok(())
            }
            Err(bad) => self.bad(bad.describe(&place())),
        }
    }

    /// Counts a row that cannot be written, if that is allowed.
    fn bad(&mut self, described: String) -> Result<()> {
        if !self.skip_bad_rows {
            return Err(Error::input(format!(
                "{described} Correct or remove the row, or leave such rows out and count them with --skip-bad-rows."
            )));
        }
        self.converted.bad_rows += 1;
        self.converted.first_bad_row.get_or_insert(described);
        Ok(())
    }

    /// Says now and then how far the work is, and goes on.
    fn report(&mut self, read: &AtomicU64) -> Result<ControlFlow<()>> {
        let Converted { rows, bad_rows, left_out, .. } = &*self.converted;
        if (*rows + bad_rows + left_out).is_multiple_of(REPORT_EVERY) {
            (self.progress)(Progress { rows: *rows, bytes: read.load(Ordering::Relaxed), all_bytes: self.all_bytes })?;
        }
        Ok(ControlFlow::Continue(()))
    }
}

/// The first row that has columns.
fn first_row(path: &Path, kinds: Kinds) -> Result<Option<Columns>> {
    let mut first = None;
    visit_rows(path, kinds, &Arc::default(), |row, _| {
        first = row.columns.ok();
        Ok(if first.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    })?;
    Ok(first)
}
