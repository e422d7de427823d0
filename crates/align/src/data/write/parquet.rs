//! Rows into Parquet files.

use std::io;
use std::sync::Arc;

use parquet::basic::{Compression, ZstdLevel};
use parquet::data_type::{BoolType, ByteArray, ByteArrayType, DataType, DoubleType, Int64Type};
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;
use serde_json::Value;

use super::super::schema::{BadRow, Columns, RowResult};
use super::Out;

/// Bytes of text in a row group: what is in memory.
const GROUP_BYTES: usize = 16 << 20;

/// Writes rows in groups. The columns are those of the first group's rows.
pub(in super::super) struct Writer<'a> {
    file: File<'a>,
    columns: Vec<Column>,
    /// The group that is to be written next.
    rows: Vec<Columns>,
    /// Bytes of it.
    bytes: usize,
    /// Bytes of a group that is complete.
    group_bytes: usize,
}

enum File<'a> {
    /// Nothing is written, as the columns are not known.
    New(Option<Out<'a>>),
    Open(Box<SerializedFileWriter<Out<'a>>>),
}

struct Column {
    name: String,
    kind: Kind,
}

/// What a column holds, or null.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Flag,
    Whole,
    Number,
    /// Lists of `role` and `content`.
    Messages,
}

impl<'a> Writer<'a> {
    pub(super) fn new(out: Out<'a>) -> Self {
        Self { file: File::New(Some(out)), columns: Vec::new(), rows: Vec::new(), bytes: 0, group_bytes: GROUP_BYTES }
    }

    pub(super) fn push(&mut self, row: Columns) -> io::Result<RowResult<()>> {
        for (name, value) in &row {
            let kind = Kind::of(value);
            match self.columns.iter().find(|column| column.name == *name) {
                Some(column) if column.kind == kind => {}
                Some(column) => {
                    return Ok(Err(BadRow::whole(format!(
                        "`{name}` is {} here and {} in rows before, but a column of Parquet holds one kind. Write JSON lines.",
                        kind.describe(),
                        column.kind.describe()
                    ))));
                }
                None if matches!(self.file, File::Open(_)) => {
                    return Ok(Err(BadRow::whole(format!(
                        "the row has `{name}`, which the rows before do not have, and the columns of a Parquet file are written \
                         before they are all read. Write JSON lines, or move such a row to the beginning."
                    ))));
                }
                None => self.columns.push(Column { name: name.clone(), kind }),
            }
            self.bytes += size(value);
        }
        self.rows.push(row);
        if self.bytes >= self.group_bytes { self.write_group().map(Ok) } else { Ok(Ok(())) }
    }

    pub(super) fn finish(mut self) -> io::Result<()> {
        self.write_group()?;
        match self.file {
            File::Open(file) => file.close().map(drop).map_err(io_error),
            File::New(_) => Ok(()),
        }
    }

    fn write_group(&mut self) -> io::Result<()> {
        if self.rows.is_empty() {
            return Ok(());
        }
        if let File::New(out) = &mut self.file
            && let Some(out) = out.take()
        {
            self.file = File::Open(Box::new(open(&self.columns, out).map_err(io_error)?));
        }
        if let File::Open(file) = &mut self.file {
            let mut group = file.next_row_group().map_err(io_error)?;
            for Column { name, kind } in &self.columns {
                let values: Vec<Option<&Value>> = self.rows.iter().map(|row| row.get(name)).collect();
                kind.write(&values, &mut group).map_err(io_error)?;
            }
            group.close().map_err(io_error)?;
        }
        self.rows.clear();
        self.bytes = 0;
        Ok(())
    }
}

fn open<'a>(columns: &[Column], out: Out<'a>) -> parquet::errors::Result<SerializedFileWriter<Out<'a>>> {
    let fields: String = columns.iter().map(|Column { name, kind }| kind.field(name)).collect();
    let schema = parse_message_type(&format!("message schema {{ {fields} }}"))?;
    let properties = WriterProperties::builder().set_compression(Compression::ZSTD(ZstdLevel::default())).build();
    SerializedFileWriter::new(out, Arc::new(schema), Arc::new(properties))
}

/// What the operating system said, where the error is its.
fn io_error(error: ParquetError) -> io::Error {
    match error {
        ParquetError::External(source) => match source.downcast::<io::Error>() {
            Ok(source) => *source,
            Err(source) => io::Error::other(source),
        },
        error => io::Error::other(error),
    }
}

impl Kind {
    fn of(value: &Value) -> Self {
        match value {
            Value::Bool(_) => Self::Flag,
            Value::Number(number) if number.is_f64() => Self::Number,
            Value::Number(_) => Self::Whole,
            Value::Array(_) => Self::Messages,
            _ => Self::Text,
        }
    }

    fn describe(self) -> &'static str {
        match self {
            Self::Text => "a text",
            Self::Flag => "true or false",
            Self::Whole | Self::Number => "a number",
            Self::Messages => "a list of messages",
        }
    }

    fn field(self, name: &str) -> String {
        match self {
            Self::Text => format!("optional binary {name} (STRING);"),
            Self::Flag => format!("optional boolean {name};"),
            Self::Whole => format!("optional int64 {name};"),
            Self::Number => format!("optional double {name};"),
            Self::Messages => format!(
                "optional group {name} (LIST) {{ repeated group list {{ optional group element {{ \
                 optional binary role (STRING); optional binary content (STRING); }} }} }}"
            ),
        }
    }

    fn write(self, values: &[Option<&Value>], group: &mut Group<'_, '_>) -> parquet::errors::Result<()> {
        match self {
            Self::Text => column::<ByteArrayType>(group, values, |value| value.as_str().map(ByteArray::from)),
            Self::Flag => column::<BoolType>(group, values, Value::as_bool),
            Self::Whole => column::<Int64Type>(group, values, Value::as_i64),
            Self::Number => column::<DoubleType>(group, values, Value::as_f64),
            Self::Messages => ["role", "content"].iter().try_for_each(|key| messages(group, values, key)),
        }
    }
}

type Group<'g, 'a> = SerializedRowGroupWriter<'g, Out<'a>>;

/// Writes a column of single values: those that are there, and for each row whether it is.
fn column<T: DataType>(
    group: &mut Group<'_, '_>,
    values: &[Option<&Value>],
    convert: impl Fn(&Value) -> Option<T::T>,
) -> parquet::errors::Result<()> {
    let values: Vec<Option<T::T>> = values.iter().map(|value| value.and_then(&convert)).collect();
    let levels: Vec<i16> = values.iter().map(|value| i16::from(value.is_some())).collect();
    write::<T>(group, &values.into_iter().flatten().collect::<Vec<_>>(), &levels, None)
}

/// Writes what the messages of each row have as `key`. The level of a text is 4: list, element, message and text are there;
/// 1 is a list without elements, 0 none. A repetition level of 1 goes on with the row's list.
fn messages(group: &mut Group<'_, '_>, values: &[Option<&Value>], key: &str) -> parquet::errors::Result<()> {
    let (mut texts, mut levels, mut repetitions) = (Vec::new(), Vec::new(), Vec::new());
    for value in values {
        let list = value.and_then(Value::as_array);
        let of_row: Vec<&str> = list.into_iter().flatten().filter_map(|message| message[key].as_str()).collect();
        if of_row.is_empty() {
            levels.push(i16::from(list.is_some()));
            repetitions.push(0);
        }
        for (index, text) in of_row.into_iter().enumerate() {
            texts.push(ByteArray::from(text));
            levels.push(4);
            repetitions.push(i16::from(index > 0));
        }
    }
    write::<ByteArrayType>(group, &texts, &levels, Some(&repetitions))
}

fn write<T: DataType>(
    group: &mut Group<'_, '_>,
    values: &[T::T],
    levels: &[i16],
    repetitions: Option<&[i16]>,
) -> parquet::errors::Result<()> {
    // one column of the schema after the other
    let mut column = group.next_column()?.ok_or_else(|| ParquetError::General("there are too few columns".into()))?;
    column.typed::<T>().write_batch(values, Some(levels), repetitions)?;
    column.close()
}

/// Bytes that a value takes in memory, nearly.
fn size(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(list) => list.iter().map(size).sum(),
        Value::Object(fields) => fields.values().map(size).sum(),
        _ => 8,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::data::read_records;

    /// The rows of a file of groups of this size, and what is said of those that it does not take.
    fn written(rows: &[Value], group_bytes: usize) -> (Vec<Value>, Vec<String>) {
        let mut bytes = Vec::new();
        let mut writer = Writer { group_bytes, ..Writer::new(&mut bytes) };
        let mut bad = Vec::new();
        for row in rows {
            if let Err(refused) = writer.push(row.as_object().unwrap().clone()).unwrap() {
                bad.push(refused.describe(""));
            }
        }
        writer.finish().unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        let records = read_records(file.path()).unwrap();
        (records.into_iter().map(|record| record.columns.into()).collect(), bad)
    }

    #[test]
    fn rows_are_the_same_whatever_the_groups() {
        let message = |role: &str, content: &str| json!({"role": role, "content": content});
        let chat = json!([message("user", "é\n\"…\u{1F600}"), message("assistant", "")]);
        let row = |text: &str, list: &Value, number: f64| json!({"text": text, "list": list, "flag": number < 0.5, "whole": -7, "number": number});
        let rows = [row("", &chat, 0.1), row("a\0b", &json!([]), -1e300), row(&"long ".repeat(999), &chat, 1.0)];
        for group_bytes in [1, 40, 5_000, GROUP_BYTES] {
            assert_eq!(written(&rows, group_bytes), (rows.to_vec(), Vec::new()), "{group_bytes}");
        }
    }

    #[test]
    fn columns_have_one_kind_and_may_be_missing() {
        let rows = [json!({"a": "x"}), json!({"a": "y", "b": true}), json!({"a": [], "b": false}), json!({"c": 1.5})];
        let (read, bad) = written(&rows, GROUP_BYTES);
        let row = |a: Value, b: Value, c: Value| json!({"a": a, "b": b, "c": c});
        let null = Value::Null;
        let first = row("x".into(), null.clone(), null.clone());
        assert_eq!(
            read,
            [first.clone(), row("y".into(), true.into(), null.clone()), row(null.clone(), null.clone(), 1.5.into())]
        );
        assert!(
            bad.len() == 1 && bad[0].contains("`a` is a list of messages here and a text in rows before"),
            "{bad:?}"
        );

        // a row a group: what is there already cannot get a column
        let (read, bad) = written(&rows, 1);
        assert_eq!(read, [json!({"a": "x"})]);
        assert!(bad.len() == 3 && bad[0].contains("the row has `b`, which the rows before do not have"), "{bad:?}");
    }
}
