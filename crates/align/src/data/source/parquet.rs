//! Rows of Parquet files.

use std::fs::File;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use engine::{Error, Result};
use parquet::basic::Compression;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::schema::types::{Type, TypePtr};
use serde_json::Value;

use super::super::schema::Columns;
use super::{ROW, Visit, place};

/// The first bytes of a Parquet file.
pub(super) const MAGIC: &[u8] = b"PAR1";

/// Calls `visit` with each row. In memory is a page of each column. The bytes that `read` counts grow with the rows.
pub(super) fn visit(path: &Path, read: &AtomicU64, visit: Visit<'_>) -> Result<ControlFlow<()>> {
    let damaged = |what: String| {
        move |reason: String| Error::input(format!("{what} cannot be read: {reason}. Fetch or write the file again."))
    };
    let whole = || path.display().to_string();
    let file = File::open(path).map_err(Error::io("read", path))?;
    let bytes = file.metadata().map_err(Error::io("read", path))?.len();
    let before = read.load(Ordering::Relaxed);
    let reader = guarded(|| SerializedFileReader::new(file)).map_err(damaged(whole()))?;
    check_codecs(path, &reader)?;
    let count = reader.metadata().file_metadata().num_rows().max(1) as f64;
    let mut rows = guarded(|| reader.get_row_iter(None)).map_err(damaged(whole()))?;
    for number in 1.. {
        let row = guarded(|| rows.next().transpose()).map_err(|reason| {
            let column = damaged_column(&reader, number).map(|name| format!(", column `{name}`,")).unwrap_or_default();
            damaged(place(path, ROW, number) + &column)(reason)
        })?;
        let Some(row) = row else { break };
        read.store(before + (bytes as f64 * (number as f64 / count).min(1.0)) as u64, Ordering::Relaxed);
        if visit(ROW, number, Ok(columns(row)))?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}

/// The first column that cannot be read up to a row, by reading each alone, since errors do not name it.
fn damaged_column(reader: &dyn FileReader, row: usize) -> Option<String> {
    let schema = reader.metadata().file_metadata().schema();
    let is_damaged = |column: &&TypePtr| {
        guarded(|| {
            let alone = Type::group_type_builder(schema.name()).with_fields(vec![(*column).clone()]).build()?;
            reader.get_row_iter(Some(alone))?.take(row).try_for_each(|row| row.map(drop))
        })
        .is_err()
    };
    schema.get_fields().iter().find(is_damaged).map(|column| column.name().to_owned())
}

/// What a step of the `parquet` crate gives, or the start of its reason (some hold all bytes of a value). The crate
/// panics at some damaged pages, and at types that it cannot read yet; what panicked is not used again.
fn guarded<T>(step: impl FnOnce() -> parquet::errors::Result<T>) -> std::result::Result<T, String> {
    let reason = match catch_unwind(AssertUnwindSafe(step)) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) => error.to_string(),
        Err(panic) => match panic.downcast::<String>() {
            Ok(reason) => *reason,
            Err(_) => "its decoder failed".to_owned(),
        },
    };
    Err(reason.chars().take(120).collect())
}

fn check_codecs(path: &Path, reader: &dyn FileReader) -> Result<()> {
    for column in reader.metadata().row_groups().iter().flat_map(|group| group.columns()) {
        let compression = column.compression();
        if !matches!(
            compression,
            Compression::UNCOMPRESSED | Compression::SNAPPY | Compression::GZIP(_) | Compression::ZSTD(_)
        ) {
            return Err(Error::input(format!(
                "{}, column `{}`: the compression is {compression}. Write the file again with snappy, gzip, zstd or none.",
                path.display(),
                column.column_path().string()
            )));
        }
    }
    Ok(())
}

fn columns(row: parquet::record::Row) -> Columns {
    row.into_columns().into_iter().map(|(name, field)| (name, value(field))).collect()
}

/// A value as JSON; nothing is `null`, and so is what JSON cannot hold: numbers that are not finite, by which pandas
/// marks what is missing, decimals, and binary data that are not UTF-8. Dates and times are numbers as stored.
fn value(field: Field) -> Value {
    match field {
        Field::Null | Field::Decimal(_) => Value::Null,
        Field::Bool(flag) => flag.into(),
        Field::Byte(number) => number.into(),
        Field::Short(number) => number.into(),
        Field::Int(number) | Field::Date(number) | Field::TimeMillis(number) => number.into(),
        Field::Long(number)
        | Field::TimeMicros(number)
        | Field::TimestampMillis(number)
        | Field::TimestampMicros(number) => number.into(),
        Field::UByte(number) => number.into(),
        Field::UShort(number) => number.into(),
        Field::UInt(number) => number.into(),
        Field::ULong(number) => number.into(),
        Field::Float16(number) => number.to_f64().into(),
        Field::Float(number) => number.into(),
        Field::Double(number) => number.into(),
        Field::Str(text) => text.into(),
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).map_or(Value::Null, Value::from),
        Field::Group(row) => Value::Object(columns(row)),
        Field::ListInternal(list) => list.elements().iter().cloned().map(value).collect(),
        Field::MapInternal(map) => {
            map.entries().iter().cloned().map(|(key, of_key)| Value::from(vec![value(key), value(of_key)])).collect()
        }
    }
}
