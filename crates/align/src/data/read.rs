//! Pairs, labelled responses, prompts and records of files.

use std::path::Path;

use engine::{Error, Result};

use super::schema::{Columns, Format, RowResult, Schema, prompt_of};
use super::source::{Kinds, visit_rows};
use super::{DataFile, LabelledExample, PreferencePair, Prompt, Record};

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
    let find = |first: &Columns| Schema::find(first, path, format, metric);
    read_rows(path, find, skip_bad_rows, "preference pair", |schema, columns, row| {
        schema.pair(columns).map(|content| vec![PreferencePair { row, ..content }])
    })
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
    let find = |first: &Columns| Schema::find_labelled(first, path, format, metric);
    read_rows(path, find, skip_bad_rows, "labelled response", |schema, columns, row| schema.examples(columns, row))
}

/// Reads rows under the schema that `find` finds in the first of them; `convert` gives what one row holds.
fn read_rows<T>(
    path: &Path,
    find: impl Fn(&Columns) -> Result<Schema>,
    skip_bad_rows: bool,
    what: &str,
    convert: impl Fn(&Schema, &Columns, usize) -> RowResult<Vec<T>>,
) -> Result<DataFile<T>> {
    let mut schema: Option<Schema> = None;
    let mut rows = Vec::new();
    let (mut skipped, mut first_skipped) = (0, None);
    let places = visit_rows(path, Kinds::Records, |row| {
        let content = match row.columns {
            Err(bad) => Err(bad),
            Ok(columns) => {
                let schema = match schema {
                    Some(schema) => schema,
                    None => *schema.insert(find(&columns)?),
                };
                convert(&schema, &columns, row.number)
            }
        };
        match content {
            Ok(mut content) => rows.append(&mut content),
            Err(bad) if skip_bad_rows => {
                skipped += 1;
                first_skipped.get_or_insert_with(|| bad.describe(&row.place));
            }
            Err(bad) => {
                return Err(Error::input(format!(
                    "{} Correct or remove the row, or let a recipe leave such rows out and count them with \
                     data.skip_bad_rows = true.",
                    bad.describe(&row.place)
                )));
            }
        }
        Ok(())
    })?;
    match schema {
        Some(schema) if !rows.is_empty() => {
            Ok(DataFile { places, format: schema.format(), rows, skipped, first_skipped })
        }
        _ => Err(nothing_usable(path, what, skipped, first_skipped)),
    }
}

/// Reads prompts for generation, from the files that [`read_pairs`] takes and two kinds more.
///
/// A `.txt` file holds one prompt a line, blank lines left out. Every other file, and `.csv` too, has a column `prompt`, a
/// string or a list of messages; other columns are ignored. A bad row is an error that names file, row, column and remedy.
pub fn read_prompts(path: &Path) -> Result<Vec<Prompt>> {
    let mut prompts = Vec::new();
    visit_rows(path, Kinds::Prompts, |row| {
        let prompt = row
            .columns
            .and_then(|columns| prompt_of(&columns))
            .map_err(|bad| Error::input(format!("{} Correct or remove the row.", bad.describe(&row.place))))?;
        prompts.push(prompt);
        Ok(())
    })?;
    if prompts.is_empty() { Err(nothing_usable(path, "prompt", 0, None)) } else { Ok(prompts) }
}

/// Reads the rows of the files that [`read_pairs`] takes, with all their columns.
///
/// A row without named columns is an error that names it, and so is a file without rows.
pub fn read_records(path: &Path) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    visit_rows(path, Kinds::Records, |row| {
        let columns = row
            .columns
            .map_err(|bad| Error::input(format!("{} Correct or remove the row.", bad.describe(&row.place))))?;
        records.push(Record { columns, row: row.number, place: row.place });
        Ok(())
    })?;
    if records.is_empty() { Err(nothing_usable(path, "row", 0, None)) } else { Ok(records) }
}

fn nothing_usable(path: &Path, what: &str, skipped: usize, first_skipped: Option<String>) -> Error {
    let reason = match first_skipped {
        Some(first) => format!("all its {skipped} rows are bad. {first} Correct the file, or give the right format."),
        None => "it has no rows. Check that it is the file you mean and that it was written completely.".to_owned(),
    };
    Error::input(format!("{} holds no usable {what}: {reason}", path.display()))
}
