//! Rows of files, whatever their kind: JSON lines, JSON arrays, Parquet, and plain text and CSV for prompts.

mod bytes;
mod files;
mod json;
mod parquet;
mod table;

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use engine::{Error, Result};

pub(super) use files::all_bytes;
pub use files::{Places, Shard, choose, files, is_about_data, patterns_of_splits, shard};

use self::bytes::Input;
use self::files::place;
use super::schema::{BadRow, Columns, RowResult};

/// What is counted in files of text, and in those that have no lines to look up.
const LINE: &str = "Line";
const ROW: &str = "Row";

/// Takes what is counted, the 1-based number in the file, and the columns of a row; breaks off when it needs no more rows.
type Visit<'a> = &'a mut dyn FnMut(&'static str, usize, RowResult<Columns>) -> Result<ControlFlow<()>>;

/// One row of a data set.
pub(super) struct Row {
    /// The 1-based number in the data set: in its file, and after all numbers of the files before.
    pub(super) number: usize,
    pub(super) columns: RowResult<Columns>,
}

/// Which files are allowed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kinds {
    /// JSON and Parquet.
    Records,
    /// Those, and text and CSV.
    Prompts,
}

/// Bytes of a file as text.
fn text(bytes: &[u8]) -> RowResult<&str> {
    std::str::from_utf8(bytes).map_err(|error| {
        BadRow::whole(format!("the text is not UTF-8 (byte {}). Save the file as UTF-8.", error.valid_up_to() + 1))
    })
}

/// Calls `visit` with each row of each file that `path` names, in order, and where the rows so far stand, until it breaks off.
/// `read` counts the bytes of the files.
pub(super) fn visit_rows(
    path: &Path,
    kinds: Kinds,
    read: &Arc<AtomicU64>,
    mut visit: impl FnMut(Row, &Places) -> Result<ControlFlow<()>>,
) -> Result<Places> {
    let mut places = Places::default();
    let mut last = 0;
    for file in files(path)? {
        let before = last;
        let mut first = true;
        let flow = visit_file(&file, kinds, read, &mut |unit, number, columns| {
            if std::mem::take(&mut first) {
                places.push(&file, unit, before);
            }
            last = before + number;
            visit(Row { number: last, columns }, &places)
        })?;
        if flow.is_break() {
            break;
        }
    }
    Ok(places)
}

fn visit_file(path: &Path, kinds: Kinds, read: &Arc<AtomicU64>, visit: Visit<'_>) -> Result<ControlFlow<()>> {
    let name = path.to_string_lossy().to_ascii_lowercase();
    let name = [".gz", ".zst"].iter().find_map(|ending| name.strip_suffix(ending)).unwrap_or(&name);
    let mut input = Input::open(path, read.clone())?;
    if kinds == Kinds::Prompts && name.ends_with(".txt") {
        return table::visit_text(&mut input, visit);
    }
    if name.ends_with(".csv") {
        return match kinds {
            Kinds::Prompts => table::visit_csv(path, &mut input, visit),
            Kinds::Records => Err(Error::input(format!(
                "{} is a CSV file, which can hold a list of prompts only. Save the rows as JSON lines or Parquet.",
                path.display()
            ))),
        };
    }
    if !input.peek()?.starts_with(parquet::MAGIC) {
        return json::visit(path, &mut input, visit);
    }
    match input.compression {
        None => parquet::visit(path, read, visit),
        Some(compression) => Err(Error::input(format!(
            "{} is a Parquet file inside {compression}. Decompress it; the columns of a Parquet file are compressed already.",
            path.display()
        ))),
    }
}
