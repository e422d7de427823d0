//! Rows of JSON lines and JSON arrays.

use std::ops::ControlFlow;
use std::path::Path;

use engine::{Error, Result};
use serde_json::Value;

use super::super::schema::{BadRow, Columns, RowResult};
use super::bytes::Input;
use super::{LINE, ROW, Visit, text};

/// Calls `visit` with each row.
pub(super) fn visit(path: &Path, input: &mut Input<'_>, visit: Visit<'_>) -> Result<ControlFlow<()>> {
    if input.peek()?.trim_ascii_start().first() != Some(&b'[') {
        return input.visit_lines(|number, line| {
            let value = text(line).and_then(|line| serde_json::from_str(line).map_err(|error| invalid(&error)));
            visit(LINE, number, value.and_then(object))
        });
    }
    let rest = input.rest()?;
    let rest = std::str::from_utf8(&rest).map_err(|error| {
        Error::input(format!(
            "{} is not UTF-8 text from byte {} on. Save it as UTF-8.",
            path.display(),
            error.valid_up_to() + 1
        ))
    })?;
    let rows: Vec<Value> = serde_json::from_str(rest).map_err(|error| {
        Error::input(format!(
            "{} is not a valid JSON array: {error}. Correct it there; if the file was cut off, fetch or write it again.",
            path.display()
        ))
    })?;
    for (number, value) in (1..).zip(rows) {
        if visit(ROW, number, object(value))?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}

fn object(value: Value) -> RowResult<Columns> {
    match value {
        Value::Object(columns) => Ok(columns),
        _ => Err(BadRow::whole("the row is not a JSON object with named columns.")),
    }
}

fn invalid(error: &serde_json::Error) -> BadRow {
    // The parser saw one line only, so its own "at line 1 column …" would mislead.
    let text = error.to_string();
    let reason = text.rsplit_once(" at line ").map_or(text.as_str(), |(reason, _)| reason);
    BadRow::whole(format!("the line is not one valid JSON object: {reason}, at character {}.", error.column()))
}
