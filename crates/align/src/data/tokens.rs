//! Tokens in memory, and rows of tokens in a file that is mapped into it.
//!
//! The file holds the tokens of all rows one after the other, as 32-bit integers, and behind them a record of 32 bytes for
//! each row: three lengths and flags of 32 bits, the row's number and the margin of 64. All numbers are little-endian.

use std::fmt;
use std::fs::File;
use std::io::Write;
use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;

use engine::checkpoint::Mapped;
use engine::{Error, Result};

use super::{TokenizedExample, TokenizedPair};

// tokens are read from the file without a conversion
const _: () = assert!(cfg!(target_endian = "little"), "sacpo needs a little-endian processor");

/// Token ids, in memory of their own or in a mapped file. Those in a file are cheap to clone.
#[derive(Clone)]
pub struct Tokens(Place);

#[derive(Clone)]
enum Place {
    Memory(Box<[u32]>),
    File {
        file: Arc<Mapped>,
        /// The first token, counted from the start of the file.
        start: usize,
        len: usize,
    },
}

impl Deref for Tokens {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        match &self.0 {
            Place::Memory(tokens) => tokens,
            Place::File { file, start, len } => bytemuck::cast_slice(&file[4 * start..4 * (start + len)]),
        }
    }
}

impl From<Vec<u32>> for Tokens {
    fn from(tokens: Vec<u32>) -> Self {
        Self(Place::Memory(tokens.into()))
    }
}

impl<const N: usize> From<[u32; N]> for Tokens {
    fn from(tokens: [u32; N]) -> Self {
        Self(Place::Memory(tokens.into()))
    }
}

impl PartialEq for Tokens {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Tokens {}

impl PartialEq<[u32]> for Tokens {
    fn eq(&self, other: &[u32]) -> bool {
        **self == *other
    }
}

impl<const N: usize> PartialEq<[u32; N]> for Tokens {
    fn eq(&self, other: &[u32; N]) -> bool {
        **self == *other
    }
}

impl PartialEq<Vec<u32>> for Tokens {
    fn eq(&self, other: &Vec<u32>) -> bool {
        **self == **other
    }
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

/// A row that a file of tokens can hold.
pub(super) trait Stored: Sized {
    /// Its tokens, prompt first; what is not used is empty.
    fn tokens(&self) -> [&[u32]; 3];

    /// What it has beside its tokens.
    fn facts(&self) -> Facts;

    /// The row of these tokens and facts.
    fn restored(tokens: [Tokens; 3], facts: Facts) -> Self;
}

/// What a row has beside its tokens.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Facts {
    pub(super) row: usize,
    pub(super) is_unsafe: Option<[bool; 2]>,
    pub(super) margin: Option<f64>,
    pub(super) desirable: bool,
}

impl Stored for TokenizedPair {
    fn tokens(&self) -> [&[u32]; 3] {
        [&self.prompt, &self.chosen, &self.rejected]
    }

    fn facts(&self) -> Facts {
        Facts { row: self.row, is_unsafe: self.is_unsafe, margin: self.margin, desirable: false }
    }

    fn restored([prompt, chosen, rejected]: [Tokens; 3], Facts { row, is_unsafe, margin, .. }: Facts) -> Self {
        Self { prompt, chosen, rejected, is_unsafe, margin, row }
    }
}

impl Stored for TokenizedExample {
    fn tokens(&self) -> [&[u32]; 3] {
        [&self.prompt, &self.response, &[]]
    }

    fn facts(&self) -> Facts {
        Facts { row: self.row, desirable: self.desirable, ..Facts::default() }
    }

    fn restored([prompt, response, _]: [Tokens; 3], Facts { row, desirable, .. }: Facts) -> Self {
        Self { prompt, response, desirable, row }
    }
}

const RECORD: usize = 32;

/// Flags of a record. Of the two responses, the chosen one's comes first.
const HELD_OUT: u32 = 1;
const DESIRABLE: u32 = 2;
const HAS_MARGIN: u32 = 4;
const HAS_SAFETY: u32 = 8;
const UNSAFE: [u32; 2] = [16, 32];

/// Writes rows into a file of tokens, one by one.
pub(super) struct Writer<'a> {
    /// The file, for messages.
    path: &'a Path,
    out: &'a mut (dyn Write + Send),
    /// Of everything so far.
    hasher: blake3::Hasher,
    /// The records of the rows so far.
    records: Vec<u8>,
    /// Rows to train on, and rows that are held out.
    pub(super) rows: [usize; 2],
}

impl<'a> Writer<'a> {
    pub(super) fn new(path: &'a Path, out: &'a mut (dyn Write + Send)) -> Self {
        Self { path, out, hasher: blake3::Hasher::new(), records: Vec::new(), rows: [0; 2] }
    }

    pub(super) fn push<T: Stored>(&mut self, row: &T, held_out: bool) -> Result<()> {
        let tokens = row.tokens();
        let Facts { row: number, is_unsafe, margin, desirable } = row.facts();
        for tokens in tokens {
            self.write(bytemuck::cast_slice(tokens))?;
        }
        let [chosen_unsafe, rejected_unsafe] = is_unsafe.unwrap_or_default();
        let flags = [
            (held_out, HELD_OUT),
            (desirable, DESIRABLE),
            (margin.is_some(), HAS_MARGIN),
            (is_unsafe.is_some(), HAS_SAFETY),
            (chosen_unsafe, UNSAFE[0]),
            (rejected_unsafe, UNSAFE[1]),
        ];
        let flags = flags.iter().filter(|(set, _)| *set).fold(0, |all, (_, flag)| all | flag);
        for number in tokens.map(|tokens| tokens.len() as u32).into_iter().chain([flags]) {
            self.records.extend(number.to_le_bytes());
        }
        self.records.extend((number as u64).to_le_bytes());
        self.records.extend(margin.unwrap_or_default().to_le_bytes());
        self.rows[usize::from(held_out)] += 1;
        Ok(())
    }

    /// Writes the records, and returns the hash of the whole file: 64 hexadecimal digits.
    pub(super) fn finish(&mut self) -> Result<String> {
        let records = std::mem::take(&mut self.records);
        self.write(&records)?;
        Ok(self.hasher.finalize().to_hex().to_string())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.hasher.update(bytes);
        self.out.write_all(bytes).map_err(Error::io("write", self.path))
    }
}

/// Fails unless a file has this hash. It is read, not mapped, so that memory does not grow with it.
///
/// # Errors
/// If it has another one, or cannot be read.
pub(super) fn check(path: &Path, hash: &str) -> Result<()> {
    let mut hasher = blake3::Hasher::new();
    let file = File::open(path).map_err(Error::io("read", path))?;
    hasher.update_reader(file).map_err(Error::io("read", path))?;
    if hasher.finalize().to_hex().as_str() == hash { Ok(()) } else { Err(damaged(path)) }
}

fn damaged(path: &Path) -> Error {
    Error::input(format!("{} is damaged. Delete it; the tokens are then made again from the data.", path.display()))
}

/// The rows of a file of tokens, those to train on and those that are held out.
///
/// # Errors
/// If the file does not have these numbers of rows.
pub(super) fn read<T: Stored>(path: &Path, rows: [usize; 2]) -> Result<[Vec<T>; 2]> {
    let damaged = || damaged(path);
    let file = Arc::new(Mapped::open(path)?);
    let records = (rows[0] + rows[1]) * RECORD;
    let mut start = 0;
    let end = file.len().checked_sub(records).ok_or_else(damaged)?;
    let mut sides = rows.map(Vec::with_capacity);
    for record in file[end..].chunks_exact(RECORD) {
        let word = |at: usize| u32::from_le_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]]);
        let wide = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let tokens = [word(0), word(4), word(8)].map(|len| {
            let tokens = Tokens(Place::File { file: file.clone(), start, len: len as usize });
            start += len as usize;
            tokens
        });
        let has = |flag: u32| word(12) & flag != 0;
        let facts = Facts {
            row: wide(16) as usize,
            is_unsafe: has(HAS_SAFETY).then(|| UNSAFE.map(has)),
            margin: has(HAS_MARGIN).then(|| f64::from_bits(wide(24))),
            desirable: has(DESIRABLE),
        };
        if 4 * start > end {
            return Err(damaged());
        }
        sides[usize::from(has(HELD_OUT))].push(T::restored(tokens, facts));
    }
    Ok(sides)
}
