//! The GGUF container: a header, named values, and named tensors.
//!
//! Nothing in the file is trusted: every length and offset is checked against the file before it is used.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use crate::checkpoint::encoding::Encoding;
use crate::checkpoint::mapped::Mapped;
use crate::error::{Error, Result};

/// The header of a GGUF file and access to its tensors.
pub(super) struct Container {
    file: Mapped,
    version: u32,
    values: BTreeMap<String, Value>,
    tensors: BTreeMap<String, Tensor>,
}

/// A tensor in the file.
pub(super) struct Tensor {
    /// The shape with rows first, as in Hugging Face's files; GGUF stores it the other way round.
    pub(super) shape: Vec<usize>,
    pub(super) encoding: Encoding,
    pub(super) bytes: Range<usize>,
}

/// A named value. Lists stay in the file until someone asks for them.
#[derive(Debug)]
enum Value {
    Integer(i128),
    Float(f64),
    Flag(bool),
    Text(String),
    List { kind: u32, len: u64, bytes: Range<usize> },
}

// The numbers that GGUF gives to the types of values.
const U8: u32 = 0;
const I8: u32 = 1;
const U16: u32 = 2;
const I16: u32 = 3;
const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const BOOL: u32 = 7;
const TEXT: u32 = 8;
const LIST: u32 = 9;
const U64: u32 = 10;
const I64: u32 = 11;
const F64: u32 = 12;

impl Container {
    /// Reads the header of a GGUF file of version 2 or 3.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = Mapped::open(path)?;
        let mut cursor = Cursor { path, bytes: &file, at: 0 };
        if cursor.array::<4>("the magic number")? != *b"GGUF" {
            return Err(Error::input(format!("{} is not a GGUF file: it does not start with GGUF.", path.display())));
        }
        let version = cursor.u32("the version")?;
        if !(2..=3).contains(&version) {
            return Err(Error::input(format!(
                "{} is a GGUF file of version {version}{}, but only versions 2 and 3 in little-endian order can be read. \
                 Convert the model again with a current llama.cpp.",
                path.display(),
                if version.swap_bytes() <= 3 { " in big-endian order" } else { "" }
            )));
        }
        let tensor_count = cursor.u64("the number of tensors")?;
        let value_count = cursor.u64("the number of values")?;
        let mut values = BTreeMap::new();
        for _ in 0..value_count {
            let key = cursor.text("the name of a value")?.to_owned();
            let kind = cursor.u32("the type of a value")?;
            let value = cursor.value(kind, &key)?;
            if values.insert(key.clone(), value).is_some() {
                return Err(cursor.broken(&format!("the value {key} is there twice")));
            }
        }
        let mut found = Vec::new();
        for _ in 0..tensor_count {
            found.push(cursor.tensor()?);
        }
        let alignment = match values.get("general.alignment") {
            None => 32,
            Some(&Value::Integer(n @ 1..=65536)) if (n as usize).is_power_of_two() => n as usize,
            Some(_) => return Err(cursor.broken("general.alignment is not a power of two up to 65536")),
        };
        let data = cursor.at.next_multiple_of(alignment);
        let mut tensors = BTreeMap::new();
        for (name, shape, encoding, offset) in found {
            let bytes = encoding.bytes(&shape);
            let start = usize::try_from(offset).ok().and_then(|offset| data.checked_add(offset));
            let range = start.zip(bytes).and_then(|(start, bytes)| Some(start..start.checked_add(bytes)?));
            let Some(bytes) = range.filter(|range| range.end <= file.len()) else {
                let what = format!(
                    "the tensor {name} ({} of shape {shape:?} at offset {offset}) does not fit into the file's {} bytes",
                    encoding.name(),
                    file.len()
                );
                return Err(cursor.broken(&what));
            };
            if tensors.insert(name.clone(), Tensor { shape, encoding, bytes }).is_some() {
                return Err(cursor.broken(&format!("the tensor {name} is there twice")));
            }
        }
        Ok(Self { version, values, tensors, file })
    }

    /// The file's path.
    pub(super) fn path(&self) -> &Path {
        self.file.path()
    }

    /// The version of the format.
    pub(super) fn version(&self) -> u32 {
        self.version
    }

    /// Size of the file in bytes.
    pub(super) fn len(&self) -> usize {
        self.file.len()
    }

    /// The names of all values.
    pub(super) fn keys(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    /// All tensors by name.
    pub(super) fn tensors(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// A tensor.
    pub(super) fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// Widens a tensor into `out`, which has its number of elements.
    pub(super) fn widen(&self, tensor: &Tensor, out: &mut [f32]) {
        let bytes = &self.file[tensor.bytes.clone()];
        tensor.encoding.widen(bytes, out);
        self.file.release(bytes);
    }

    /// A whole number ≥ 0, if there is one of that name.
    pub(super) fn size(&self, key: &str) -> Result<Option<usize>> {
        self.get(key, "a whole number", |value| match value {
            Value::Integer(n) => usize::try_from(*n).ok(),
            _ => None,
        })
    }

    /// A finite number.
    pub(super) fn number(&self, key: &str) -> Result<Option<f64>> {
        self.get(key, "a number", |value| match value {
            Value::Float(x) => Some(*x).filter(|x| x.is_finite()),
            Value::Integer(n) => Some(*n as f64),
            _ => None,
        })
    }

    /// True or false.
    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.get(key, "true or false", |value| if let Value::Flag(flag) = value { Some(*flag) } else { None })
    }

    /// A text.
    pub(super) fn text(&self, key: &str) -> Result<Option<&str>> {
        self.get(key, "a text", |value| if let Value::Text(text) = value { Some(text.as_str()) } else { None })
    }

    /// A list of texts.
    pub(super) fn texts(&self, key: &str) -> Result<Option<Vec<&str>>> {
        let Some((kind, len, bytes)) = self.list(key)? else { return Ok(None) };
        let mut cursor = Cursor { path: self.path(), bytes: &self.file[..bytes.end], at: bytes.start };
        match kind {
            TEXT => (0..len).map(|_| cursor.text(key)).collect::<Result<_>>().map(Some),
            _ => Err(self.wrong(key, "a list of texts")),
        }
    }

    /// A list of numbers.
    pub(super) fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>> {
        let Some((kind, len, bytes)) = self.list(key)? else { return Ok(None) };
        let mut cursor = Cursor { path: self.path(), bytes: &self.file[..bytes.end], at: bytes.start };
        let number = |_| match cursor.value(kind, key)? {
            Value::Integer(n) => Ok(n as f64),
            Value::Float(x) => Ok(x),
            _ => Err(self.wrong(key, "a list of numbers")),
        };
        (0..len).map(number).collect::<Result<_>>().map(Some)
    }

    fn list(&self, key: &str) -> Result<Option<(u32, u64, Range<usize>)>> {
        self.get(key, "a list", |value| match value {
            Value::List { kind, len, bytes } => Some((*kind, *len, bytes.clone())),
            _ => None,
        })
    }

    fn get<'a, T>(&'a self, key: &str, needs: &str, convert: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        match self.values.get(key) {
            None => Ok(None),
            Some(value) => convert(value).map(Some).ok_or_else(|| self.wrong(key, needs)),
        }
    }

    /// The error for a value of the wrong type or range.
    fn wrong(&self, key: &str, needs: &str) -> Error {
        let value = match self.values.get(key) {
            Some(Value::Integer(n)) => n.to_string(),
            Some(Value::Float(x)) => x.to_string(),
            Some(Value::Flag(flag)) => flag.to_string(),
            Some(Value::Text(_)) => "a text".to_owned(),
            Some(Value::List { len, .. }) => format!("a list of {len}"),
            None => "missing".to_owned(),
        };
        Error::input(format!(
            "In {} the value {key} is {value}, but must be {needs}. The file is damaged, or the model is of a kind that \
             is not supported.",
            self.path().display()
        ))
    }
}

/// A place in the header.
struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn broken(&self, what: &str) -> Error {
        Error::input(format!(
            "{} is not a valid GGUF file: {what} (at byte {}). It is probably truncated or damaged; fetch it again.",
            self.path.display(),
            self.at
        ))
    }

    fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let taken = usize::try_from(len).ok().and_then(|len| rest.get(..len));
        let taken = taken.ok_or_else(|| self.broken(&format!("{what} goes beyond the end of the file")))?;
        self.at += taken.len();
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64, what)?);
        Ok(array)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn text(&mut self, what: &str) -> Result<&'a str> {
        let len = self.u64(what)?;
        let bytes = self.take(len, what)?;
        std::str::from_utf8(bytes).map_err(|_| self.broken(&format!("{what} is not UTF-8")))
    }

    fn value(&mut self, kind: u32, key: &str) -> Result<Value> {
        Ok(match kind {
            U8 => Value::Integer(u8::from_le_bytes(self.array(key)?).into()),
            I8 => Value::Integer(i8::from_le_bytes(self.array(key)?).into()),
            U16 => Value::Integer(u16::from_le_bytes(self.array(key)?).into()),
            I16 => Value::Integer(i16::from_le_bytes(self.array(key)?).into()),
            U32 => Value::Integer(self.u32(key)?.into()),
            I32 => Value::Integer(i32::from_le_bytes(self.array(key)?).into()),
            U64 => Value::Integer(self.u64(key)?.into()),
            I64 => Value::Integer(i64::from_le_bytes(self.array(key)?).into()),
            F32 => Value::Float(as_written(f32::from_le_bytes(self.array(key)?))),
            F64 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            BOOL => Value::Flag(self.array::<1>(key)? != [0]),
            TEXT => Value::Text(self.text(key)?.to_owned()),
            LIST => {
                let (kind, len) = (self.u32(key)?, self.u64(key)?);
                let start = self.at;
                self.skip_list(kind, len, key)?;
                Value::List { kind, len, bytes: start..self.at }
            }
            other => return Err(self.broken(&format!("the value {key} has the unknown type {other}"))),
        })
    }

    /// Passes over a list, checking that all of it is there.
    fn skip_list(&mut self, kind: u32, len: u64, key: &str) -> Result<()> {
        let width = match kind {
            U8 | I8 | BOOL => 1,
            U16 | I16 => 2,
            U32 | I32 | F32 => 4,
            U64 | I64 | F64 => 8,
            TEXT => {
                for _ in 0..len {
                    self.text(key)?;
                }
                return Ok(());
            }
            other => return Err(self.broken(&format!("the list {key} has elements of the unknown type {other}"))),
        };
        let bytes = len.checked_mul(width).ok_or_else(|| self.broken(&format!("the list {key} is too long")))?;
        self.take(bytes, key).map(|_| ())
    }

    /// A tensor's name, shape (rows first), type, and offset in the data.
    fn tensor(&mut self) -> Result<(String, Vec<usize>, Encoding, u64)> {
        let name = self.text("the name of a tensor")?.to_owned();
        let dimensions = self.u32(&name)?;
        if dimensions > 4 {
            return Err(self.broken(&format!("the tensor {name} has {dimensions} dimensions")));
        }
        let mut shape = Vec::with_capacity(4);
        for _ in 0..dimensions {
            let size = self.u64(&name)?;
            let too_large = |_| self.broken(&format!("the tensor {name} has a dimension of {size}"));
            shape.push(usize::try_from(size).map_err(too_large)?);
        }
        shape.reverse();
        let id = self.u32(&name)?;
        let encoding = encoding(id).ok_or_else(|| {
            Error::input(format!(
                "In {} the tensor {name} of shape {shape:?} is stored as {}, but only F32, F16, BF16, Q8_0, Q4_0 and \
                 Q4_1 can be read. Take one of these files of the model, or convert it to Q8_0 or F16 with llama.cpp.",
                self.path.display(),
                encoding_name(id)
            ))
        })?;
        Ok((name, shape, encoding, self.u64("the offset of a tensor")?))
    }
}

/// An f32 as the decimal number that its writer had in mind: 1e-5, not 9.999999747378752e-6.
fn as_written(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}

fn encoding(id: u32) -> Option<Encoding> {
    Some(match id {
        0 => Encoding::F32,
        1 => Encoding::F16,
        2 => Encoding::Q4_0,
        3 => Encoding::Q4_1,
        8 => Encoding::Q8_0,
        30 => Encoding::Bf16,
        _ => return None,
    })
}

/// The name of a type that cannot be read.
fn encoding_name(id: u32) -> String {
    let name = match id {
        6 => "Q5_0",
        7 => "Q5_1",
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        12 => "Q4_K",
        13 => "Q5_K",
        14 => "Q6_K",
        15 => "Q8_K",
        16..=23 | 29 => "an IQ type",
        24..=28 => "integers or F64",
        34 | 35 => "a ternary type",
        39 => "MXFP4",
        _ => return format!("the unknown type {id}"),
    };
    name.to_owned()
}
