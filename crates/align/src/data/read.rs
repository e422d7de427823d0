//! Pairs, labelled responses, prompts and records of files.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use engine::{Error, Result};

use super::schema::{BadRow, Columns, Format, RowResult, Schema, prompt_of};
use super::source::{Kinds, Places, visit_rows};
use super::{CategorisedPrompt, DataFile, LabelledExample, PreferencePair, Prompt, Record};

/// A kind of row that training takes.
pub(super) trait Usable: Sized {
    /// What a row is called in messages.
    const NAME: &'static str;

    /// The schema of a file, from its first row and what the user asked for.
    fn schema(first: &Columns, path: &Path, format: Option<Format>, metric: &str) -> Result<Schema>;

    /// What one row of a file holds.
    fn read(schema: &Schema, columns: &Columns, row: usize) -> RowResult<Vec<Self>>;
}

impl Usable for PreferencePair {
    const NAME: &'static str = "preference pair";

    fn schema(first: &Columns, path: &Path, format: Option<Format>, metric: &str) -> Result<Schema> {
        Schema::find(first, path, format, metric)
    }

    fn read(schema: &Schema, columns: &Columns, row: usize) -> RowResult<Vec<Self>> {
        schema.pair(columns).map(|content| vec![Self { row, ..content }])
    }
}

impl Usable for LabelledExample {
    const NAME: &'static str = "labelled response";

    fn schema(first: &Columns, path: &Path, format: Option<Format>, metric: &str) -> Result<Schema> {
        Schema::find_labelled(first, path, format, metric)
    }

    fn read(schema: &Schema, columns: &Columns, row: usize) -> RowResult<Vec<Self>> {
        schema.examples(columns, row)
    }
}

/// Which files hold the rows of a data set, and how they are read.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// A file, or several files as [`files`](super::files) finds them.
    pub path: &'a Path,
    /// The schema of the rows. Nothing: the first row tells.
    pub format: Option<Format>,
    /// Picks the label of rows that carry several (PKU-SafeRLHF): `helpfulness`, or `harmlessness` (also `safety`).
    pub metric: &'a str,
    /// Whether a row that is not usable is left out and counted, instead of being an error.
    pub skip_bad_rows: bool,
}

/// A row of a file, as a training takes it or with what is wrong with it, as a sentence that names it.
pub(super) type Found<T> = std::result::Result<T, String>;

/// Takes rows and where those so far stand, until it breaks off.
pub(super) type Visit<'a, T> = &'a mut dyn FnMut(Found<T>, &Places) -> Result<ControlFlow<()>>;

impl Source<'_> {
    /// Calls `visit` with each row, until it breaks off, and returns the schema. `read` counts the bytes of the files.
    ///
    /// # Errors
    /// As [`read_pairs`]; those of `visit`.
    pub(super) fn visit<T: Usable>(&self, read: &Arc<AtomicU64>, visit: Visit<'_, T>) -> Result<(Format, Places)> {
        let mut schema: Option<Schema> = None;
        let (mut usable, mut skipped, mut first_skipped) = (false, 0, None);
        let mut broken_off = false;
        let places = visit_rows(self.path, Kinds::Records, read, |row, places| {
            let content = match row.columns {
                Err(bad) => Err(bad),
                Ok(columns) => {
                    let schema = match schema {
                        Some(schema) => schema,
                        None => *schema.insert(T::schema(&columns, self.path, self.format, self.metric)?),
                    };
                    T::read(&schema, &columns, row.number)
                }
            };
            let found = match content {
                Ok(content) => content.into_iter().map(Ok).collect(),
                Err(bad) => {
                    let described = bad.describe(&places.of(row.number));
                    if !self.skip_bad_rows {
                        return Err(Error::input(format!(
                            "{described} Correct or remove the row, or let a recipe leave such rows out and count them with \
                             data.skip_bad_rows = true."
                        )));
                    }
                    skipped += 1;
                    first_skipped.get_or_insert_with(|| described.clone());
                    vec![Err(described)]
                }
            };
            for found in found {
                usable |= found.is_ok();
                if visit(found, places)?.is_break() {
                    broken_off = true;
                    return Ok(ControlFlow::Break(()));
                }
            }
            Ok(ControlFlow::Continue(()))
        })?;
        match schema {
            Some(schema) if usable || broken_off => Ok((schema.format(), places)),
            _ => Err(nothing_usable(self.path, T::NAME, skipped, first_skipped)),
        }
    }

    /// The usable rows, all in memory.
    fn rows<T: Usable>(&self) -> Result<DataFile<T>> {
        let mut rows = Vec::new();
        let (mut skipped, mut first_skipped) = (0, None);
        let (format, places) = self.visit(&Arc::default(), &mut |found, _| {
            match found {
                Ok(row) => rows.push(row),
                Err(described) => {
                    skipped += 1;
                    first_skipped.get_or_insert(described);
                }
            }
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(DataFile { places, format, rows, skipped, first_skipped })
    }
}

/// Reads preference pairs from JSON lines, a JSON array or Parquet.
///
/// `path` is a file, or several files as [`files`](super::files) finds them. JSON may be compressed by gzip or zstd. The first
/// row tells the schema unless `format` gives it. `metric` picks the label of rows that carry several (PKU-SafeRLHF):
/// `helpfulness`, or `harmlessness` (also `safety`). A row that is not a usable pair is an error that names file, row, column
/// and remedy; with `skip_bad_rows` such rows are left out and counted. Files that are damaged, of an unknown schema, without
/// the metric's column, or without any usable pair are always an error.
pub fn read_pairs(
    path: &Path,
    format: Option<Format>,
    metric: &str,
    skip_bad_rows: bool,
) -> Result<DataFile<PreferencePair>> {
    Source { path, format, metric, skip_bad_rows }.rows()
}

/// Reads labelled responses, as [`read_pairs`] reads pairs.
///
/// Rows with `prompt`, `completion` and `label` are taken as they are; without labels, or as `messages`, every response is
/// desirable. Of a row that holds a pair, the chosen response is desirable and the rejected one is not; but where a
/// PKU-SafeRLHF row says of each response whether it is safe, those flags are the labels of the metric `harmlessness`.
pub fn read_examples(
    path: &Path,
    format: Option<Format>,
    metric: &str,
    skip_bad_rows: bool,
) -> Result<DataFile<LabelledExample>> {
    Source { path, format, metric, skip_bad_rows }.rows()
}

/// Reads prompts for generation, from the files that [`read_pairs`] takes and two kinds more.
///
/// A `.txt` file holds one prompt a line, blank lines left out. Every other file, and `.csv` too, has a column `prompt`, a
/// string or a list of messages; other columns are ignored. A bad row is an error that names file, row, column and remedy.
pub fn read_prompts(path: &Path) -> Result<Vec<Prompt>> {
    Ok(read_categorised_prompts(path)?.into_iter().map(|row| row.prompt).collect())
}

/// Reads prompts as [`read_prompts`] does, each with its `category` (or `dataset`) where the row has that column, a text.
pub fn read_categorised_prompts(path: &Path) -> Result<Vec<CategorisedPrompt>> {
    let mut prompts = Vec::new();
    visit_rows(path, Kinds::Prompts, &Arc::default(), |row, places| {
        let read = |columns: Columns| {
            let category = category_of(&columns).map(str::to_owned);
            prompt_of(&columns).map(|prompt| CategorisedPrompt { prompt, category })
        };
        let prompt = row.columns.and_then(read);
        prompts.push(prompt.map_err(|bad| bad_row(&bad, &places.of(row.number)))?);
        Ok(ControlFlow::Continue(()))
    })?;
    if prompts.is_empty() { Err(nothing_usable(path, "prompt", 0, None)) } else { Ok(prompts) }
}

/// The kind of prompt that a row is about: its column `category`, or `dataset` as alpaca_eval has it.
pub fn category_of(columns: &Columns) -> Option<&str> {
    ["category", "dataset"].iter().find_map(|column| columns.get(*column)?.as_str())
}

/// Reads the rows of the files that [`read_pairs`] takes, with all their columns.
///
/// A row without named columns is an error that names it, and so is a file without rows.
pub fn read_records(path: &Path) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    visit_rows(path, Kinds::Records, &Arc::default(), |row, places| {
        let place = places.of(row.number);
        let columns = row.columns.map_err(|bad| bad_row(&bad, &place))?;
        records.push(Record { columns, row: row.number, place });
        Ok(ControlFlow::Continue(()))
    })?;
    if records.is_empty() { Err(nothing_usable(path, "row", 0, None)) } else { Ok(records) }
}

fn bad_row(bad: &BadRow, place: &str) -> Error {
    Error::input(format!("{} Correct or remove the row.", bad.describe(place)))
}

pub(super) fn nothing_usable(path: &Path, what: &str, skipped: usize, first_skipped: Option<String>) -> Error {
    let reason = match first_skipped {
        Some(first) => format!("all its {skipped} rows are bad. {first} Correct the file, or give the right format."),
        None => "it has no rows. Check that it is the file you mean and that it was written completely.".to_owned(),
    };
    Error::input(format!("{} holds no usable {what}: {reason}", path.display()))
}
