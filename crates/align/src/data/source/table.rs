//! Prompts of plain text and CSV files.

use std::ops::ControlFlow;
use std::path::Path;

use csv::{ByteRecord, ReaderBuilder};
use engine::{Error, Result};
use serde_json::Value;

use super::super::schema::{BadRow, Columns, RowResult};
use super::bytes::Input;
use super::{LINE, Visit, text};

/// Calls `visit` with each line of a text file as the column `prompt`.
pub(super) fn visit_text(input: &mut Input<'_>, visit: Visit<'_>) -> Result<ControlFlow<()>> {
    input.visit_lines(|number, line| {
        let columns = text(line)
            .map(|line| Columns::from_iter([("prompt".to_owned(), Value::from(line.trim_end_matches(['\r', '\n'])))]));
        visit(LINE, number, columns)
    })
}

/// Calls `visit` with each row of a CSV file (RFC 4180: commas, quotation marks, a first row of names), whose values
/// are strings. A row has the number of the line where it begins.
pub(super) fn visit_csv(path: &Path, input: &mut Input<'_>, visit: Visit<'_>) -> Result<ControlFlow<()>> {
    let bytes = input.rest()?;
    let failed = |error| Error::input(format!("{} cannot be read as CSV: {error}.", path.display()));
    let mut reader = ReaderBuilder::new().flexible(true).from_reader(&*bytes);
    let names = reader.byte_headers().map_err(failed)?.clone();
    let names: Vec<&str> = names
        .iter()
        .map(text)
        .collect::<RowResult<_>>()
        .map_err(|bad| Error::input(format!("{} Correct it.", bad.describe(&super::place(path, LINE, 1)))))?;
    let mut record = ByteRecord::new();
    while reader.read_byte_record(&mut record).map_err(failed)? {
        let (line, start) = record.position().map_or((1, 0), |at| (at.line() as usize, at.byte() as usize));
        // a quotation mark that is never closed takes the rest of the file for one value
        let last = reader.position().byte() as usize == bytes.len();
        let open = last && bytes[start..].iter().filter(|&&byte| byte == b'"').count() % 2 == 1;
        let columns = if open {
            Err(BadRow::whole("a quotation mark is not closed; one inside a quoted value must be written twice."))
        } else if record.len() != names.len() {
            Err(BadRow::whole(format!("the row has {} values, but the first row names {}.", record.len(), names.len())))
        } else {
            let values = names.iter().zip(&record);
            values.map(|(name, value)| Ok(((*name).to_owned(), Value::from(text(value)?)))).collect()
        };
        if visit(LINE, line, columns)?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}
