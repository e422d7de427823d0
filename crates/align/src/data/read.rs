//! Rows of JSON, JSON lines and plain text files, gzip-compressed or not.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::path::Path;

use engine::{Error, Result};
use flate2::read::MultiGzDecoder;
use serde_json::Value;

use super::schema::{BadRow, Columns, Format, RowResult, Schema, prompt_of};
use super::{DataFile, LabelledExample, PreferencePair, Prompt, Record};

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Reads preference pairs from JSON lines or a JSON array, plain or gzip-compressed.
///
/// The first row tells the schema unless `format` gives it. `metric` picks the label of rows that
/// carry several (PKU-SafeRLHF): `helpfulness`, or `harmlessness` (also `safety`). A row that is not a
/// usable pair is an error that names file, row, column and remedy; with `skip_bad_rows` such rows are
/// left out and counted. A file of an unknown schema, without the metric's column, or without any
/// usable pair is always an error.
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
/// Rows with `prompt`, `completion` and `label` are taken as they are. Of a row that holds a pair, the chosen response
/// is desirable and the rejected one is not; but where a PKU-SafeRLHF row says of each response whether it is safe,
/// those flags are the labels of the metric `harmlessness`.
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
    visit_rows(path, |row| {
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
                first_skipped.get_or_insert_with(|| bad.describe(path, row.unit, row.number));
            }
            Err(bad) => {
                return Err(Error::input(format!(
                    "{} Correct or remove the row, or let a recipe leave such rows out and count them with \
                     data.skip_bad_rows = true.",
                    bad.describe(path, row.unit, row.number)
                )));
            }
        }
        Ok(())
    })?;
    match schema {
        Some(schema) if !rows.is_empty() => {
            Ok(DataFile { path: path.to_path_buf(), format: schema.format(), rows, skipped, first_skipped })
        }
        _ => Err(nothing_usable(path, what, skipped, first_skipped)),
    }
}

/// Reads prompts for generation.
///
/// A `.txt` file (or `.txt.gz`) holds one prompt a line, blank lines left out. Every other file is JSON
/// lines or a JSON array with a column `prompt`, a string or a list of messages; other columns are
/// ignored. A bad row is an error that names file, row, column and remedy.
pub fn read_prompts(path: &Path) -> Result<Vec<Prompt>> {
    let mut prompts = Vec::new();
    if is_plain_text(path) {
        visit_lines(&mut Input::open(path)?, |number, line| {
            let line = std::str::from_utf8(line).map_err(|error| {
                Error::input(format!(
                    "Line {number} of {} is not UTF-8 text (byte {}). Save the file as UTF-8.",
                    path.display(),
                    error.valid_up_to() + 1
                ))
            })?;
            prompts.push(Prompt::Text(line.trim_end_matches(['\r', '\n']).to_owned()));
            Ok(())
        })?;
    } else {
        visit_rows(path, |row| {
            let prompt = row.columns.and_then(|columns| prompt_of(&columns)).map_err(|bad| {
                let what = bad.describe(path, row.unit, row.number);
                Error::input(format!("{what} Correct or remove the row."))
            })?;
            prompts.push(prompt);
            Ok(())
        })?;
    }
    if prompts.is_empty() {
        return Err(nothing_usable(path, "prompt", 0, None));
    }
    Ok(prompts)
}

/// Reads the rows of JSON lines or of a JSON array, plain or gzip-compressed, with all their columns.
///
/// A row that is not a JSON object is an error that names it, and so is a file without rows.
pub fn read_records(path: &Path) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    visit_rows(path, |row| {
        let columns = row.columns.map_err(|bad| {
            Error::input(format!("{} Correct or remove the row.", bad.describe(path, row.unit, row.number)))
        })?;
        let place = format!("{} {} of {}", row.unit, row.number, path.display());
        records.push(Record { columns, row: row.number, place });
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

fn is_plain_text(path: &Path) -> bool {
    let name = path.to_string_lossy().to_ascii_lowercase();
    name.strip_suffix(".gz").unwrap_or(&name).ends_with(".txt")
}

/// One row of a file.
struct Row {
    /// What `number` counts: "Line", or "Row" in a JSON array.
    unit: &'static str,
    /// 1-based.
    number: usize,
    columns: RowResult<Columns>,
}

/// Calls `visit` with each row of a JSON lines or JSON array file, in order.
fn visit_rows(path: &Path, mut visit: impl FnMut(Row) -> Result<()>) -> Result<()> {
    let mut input = Input::open(path)?;
    if input.starts_with_bracket()? {
        let mut text = Vec::new();
        input.reader.read_to_end(&mut text).map_err(read_error(input.path))?;
        let rows: Vec<Value> = serde_json::from_slice(&text).map_err(|error| {
            Error::input(format!(
                "{} is not a valid JSON array: {error}. Correct it there; if the file was cut off, fetch or write it again.",
                path.display()
            ))
        })?;
        for (index, value) in rows.into_iter().enumerate() {
            visit(Row { unit: "Row", number: index + 1, columns: object(value) })?;
        }
        return Ok(());
    }
    visit_lines(&mut input, |number, line| {
        let columns = serde_json::from_slice(line).map_err(|error| invalid_json(&error)).and_then(object);
        visit(Row { unit: "Line", number, columns })
    })
}

fn object(value: Value) -> RowResult<Columns> {
    match value {
        Value::Object(columns) => Ok(columns),
        _ => Err(BadRow::whole("the row is not a JSON object with named columns.")),
    }
}

fn invalid_json(error: &serde_json::Error) -> BadRow {
    // The parser saw one line only, so its own "at line 1 column …" would mislead.
    let text = error.to_string();
    let reason = text.rsplit_once(" at line ").map_or(text.as_str(), |(reason, _)| reason);
    BadRow::whole(format!("the line is not one valid JSON object: {reason}, at character {}.", error.column()))
}

/// Calls `visit` with the 1-based number and the bytes of each line that is not blank.
fn visit_lines(input: &mut Input<'_>, mut visit: impl FnMut(usize, &[u8]) -> Result<()>) -> Result<()> {
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        if input.reader.read_until(b'\n', &mut line).map_err(read_error(input.path))? == 0 {
            break;
        }
        if !line.trim_ascii().is_empty() {
            visit(number, &line)?;
        }
    }
    Ok(())
}

/// The decompressed bytes of a file, without a byte order mark.
struct Input<'a> {
    path: &'a Path,
    reader: Box<dyn BufRead>,
}

impl<'a> Input<'a> {
    fn open(path: &'a Path) -> Result<Self> {
        let mut file = BufReader::new(File::open(path).map_err(Error::io("read", path))?);
        let compressed = file.fill_buf().map_err(Error::io("read", path))?.starts_with(&GZIP_MAGIC);
        let reader: Box<dyn BufRead> =
            if compressed { Box::new(BufReader::new(MultiGzDecoder::new(file))) } else { Box::new(file) };
        let mut input = Self { path, reader };
        if input.peek()?.starts_with(BYTE_ORDER_MARK) {
            input.reader.consume(BYTE_ORDER_MARK.len());
        }
        Ok(input)
    }

    /// Whether the first character that is not white space opens a JSON array.
    fn starts_with_bracket(&mut self) -> Result<bool> {
        Ok(self.peek()?.trim_ascii_start().first() == Some(&b'['))
    }

    /// The bytes that come next, without consuming them.
    fn peek(&mut self) -> Result<&[u8]> {
        self.reader.fill_buf().map_err(read_error(self.path))
    }
}

fn read_error(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    move |error| match error.kind() {
        // The kinds that the decompressor gives; reading a file gives none of them.
        ErrorKind::UnexpectedEof | ErrorKind::InvalidInput | ErrorKind::InvalidData => Error::input(format!(
            "{} is damaged: its gzip data end too early or are not valid ({error}). Fetch or write the file again.",
            path.display()
        )),
        _ => Error::io("read", path)(error),
    }
}
