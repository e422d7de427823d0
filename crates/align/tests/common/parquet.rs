//! Parquet files made of JSON rows.

use std::sync::Arc;

use parquet::basic::Compression;
use parquet::data_type::{BoolType, ByteArray, ByteArrayType, DoubleType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;
use serde_json::Value;

/// Rows as a Parquet file of row groups of `group` rows. The first row tells the columns and their types, which are those that
/// Hugging Face's `datasets` gives them: strings, numbers, flags and lists of messages, all of which may be null.
pub(crate) fn parquet(rows: &[Value], group: usize, compression: Compression) -> Vec<u8> {
    let columns: Vec<(&String, &Value)> = rows[0].as_object().unwrap().iter().collect();
    let fields: String = columns.iter().map(|(name, first)| field(name, first)).collect();
    let schema = Arc::new(parse_message_type(&format!("message schema {{ {fields} }}")).unwrap());
    let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
    let mut bytes = Vec::new();
    let mut writer = SerializedFileWriter::new(&mut bytes, schema, properties).unwrap();
    for rows in rows.chunks(group) {
        let mut into = writer.next_row_group().unwrap();
        for (name, first) in &columns {
            let values: Vec<&Value> = rows.iter().map(|row| &row[*name]).collect();
            write(&mut into, first, &values);
        }
        into.close().unwrap();
    }
    writer.close().unwrap();
    bytes
}

fn field(name: &str, first: &Value) -> String {
    match first {
        Value::String(_) => format!("optional binary {name} (UTF8);"),
        Value::Bool(_) => format!("optional boolean {name};"),
        Value::Number(number) if number.is_f64() => format!("optional double {name};"),
        Value::Number(_) => format!("optional int64 {name};"),
        Value::Array(_) => format!(
            "optional group {name} (LIST) {{ repeated group list {{ optional group element {{ \
             optional binary content (UTF8); optional binary role (UTF8); }} }} }}"
        ),
        other => panic!("no column for {other}"),
    }
}

/// Writes the values of a column that are there, and the levels that say where.
macro_rules! column {
    ($into:expr, $type:ty, $values:expr, $levels:expr, $repeated:expr) => {{
        let mut column = $into.next_column().unwrap().unwrap();
        column.typed::<$type>().write_batch(&$values, Some(&$levels), $repeated).unwrap();
        column.close().unwrap();
    }};
}

fn write(into: &mut SerializedRowGroupWriter<'_, &mut Vec<u8>>, first: &Value, values: &[&Value]) {
    let levels: Vec<i16> = values.iter().map(|value| i16::from(!value.is_null())).collect();
    let there = || values.iter().filter(|value| !value.is_null());
    let text = |value: &Value| ByteArray::from(value.as_str().unwrap());
    match first {
        Value::String(_) => {
            column!(into, ByteArrayType, there().map(|value| text(value)).collect::<Vec<_>>(), levels, None);
        }
        Value::Bool(_) => {
            column!(into, BoolType, there().map(|value| value.as_bool().unwrap()).collect::<Vec<_>>(), levels, None);
        }
        Value::Number(number) if number.is_f64() => {
            let number = |value: &&Value| value.as_f64().unwrap_or(f64::NAN);
            column!(into, DoubleType, values.iter().map(number).collect::<Vec<_>>(), vec![1; values.len()], None);
        }
        Value::Number(_) => {
            column!(into, Int64Type, there().map(|value| value.as_i64().unwrap()).collect::<Vec<_>>(), levels, None);
        }
        _ => {
            for key in ["content", "role"] {
                let (mut texts, mut levels, mut repeated) = (Vec::new(), Vec::new(), Vec::new());
                for value in values {
                    let messages = value.as_array().map_or(&[][..], Vec::as_slice);
                    for (index, message) in messages.iter().enumerate() {
                        texts.push(text(&message[key]));
                        levels.push(4);
                        repeated.push(i16::from(index > 0));
                    }
                    if messages.is_empty() {
                        levels.push(i16::from(value.is_array()));
                        repeated.push(0);
                    }
                }
                column!(into, ByteArrayType, texts, levels, Some(&repeated));
            }
        }
    }
}
