//! Rows into files: JSON lines, JSON arrays, Parquet.

mod parquet;

use std::io::{self, Write};
use std::path::Path;

use engine::{Error, Result};
use flate2::Compression;
use flate2::write::GzEncoder;

use super::schema::{Columns, RowResult};

/// A kind of file.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Lines(Codec),
    Array(Codec),
    Parquet,
}

/// How the bytes of a file of text are compressed.
#[derive(Debug, Clone, Copy)]
pub(super) enum Codec {
    None,
    Gzip,
    Zstd,
}

impl Kind {
    /// The kind that the name of a file asks for.
    pub(super) fn of(path: &Path) -> Result<Self> {
        let name = path.to_string_lossy().to_ascii_lowercase();
        let (name, codec) = match name.rsplit_once('.') {
            Some((name, "gz")) => (name, Codec::Gzip),
            Some((name, "zst")) => (name, Codec::Zstd),
            _ => (name.as_str(), Codec::None),
        };
        match (name.rsplit_once('.'), codec) {
            (Some((_, "jsonl")), _) => Ok(Self::Lines(codec)),
            (Some((_, "json")), _) => Ok(Self::Array(codec)),
            (Some((_, "parquet")), Codec::None) => Ok(Self::Parquet),
            _ => Err(Error::input(format!(
                "The name of {} does not tell what kind of file to write. It must end in .jsonl or .json, perhaps with .gz or \
                 .zst behind, or in .parquet.",
                path.display()
            ))),
        }
    }
}

/// Where the bytes of a file go.
type Out<'a> = &'a mut (dyn Write + Send);

/// Writes rows, one after the other.
pub(super) enum Writer<'a> {
    Lines(Compressed<Out<'a>>),
    /// And whether a row is written.
    Array(Compressed<Out<'a>>, bool),
    Parquet(parquet::Writer<'a>),
}

impl<'a> Writer<'a> {
    pub(super) fn new(kind: Kind, out: Out<'a>) -> io::Result<Self> {
        Ok(match kind {
            Kind::Lines(codec) => Self::Lines(Compressed::new(codec, out)?),
            Kind::Array(codec) => Self::Array(Compressed::new(codec, out)?, false),
            Kind::Parquet => Self::Parquet(parquet::Writer::new(out)),
        })
    }

    /// Adds a row. What a kind of file cannot hold is a bad row.
    pub(super) fn push(&mut self, columns: Columns) -> io::Result<RowResult<()>> {
        match self {
            Self::Lines(out) => {
                serde_json::to_writer(&mut *out, &columns)?;
                out.write_all(b"\n")?;
                Ok(Ok(()))
            }
            Self::Array(out, has_rows) => {
                out.write_all(if std::mem::replace(has_rows, true) { b",\n" } else { b"[\n" })?;
                serde_json::to_writer(out, &columns)?;
                Ok(Ok(()))
            }
            Self::Parquet(out) => out.push(columns),
        }
    }

    /// Ends a file that has a row.
    pub(super) fn finish(self) -> io::Result<()> {
        match self {
            Self::Lines(out) => out.finish(),
            Self::Array(mut out, _) => {
                out.write_all(b"\n]\n")?;
                out.finish()
            }
            Self::Parquet(out) => out.finish(),
        }
    }
}

/// Text that is compressed on its way.
pub(super) enum Compressed<W: Write> {
    None(W),
    Gzip(GzEncoder<W>),
    Zstd(zstd::Encoder<'static, W>),
}

impl<W: Write> Compressed<W> {
    fn new(codec: Codec, out: W) -> io::Result<Self> {
        Ok(match codec {
            Codec::None => Self::None(out),
            Codec::Gzip => Self::Gzip(GzEncoder::new(out, Compression::default())),
            Codec::Zstd => Self::Zstd(zstd::Encoder::new(out, zstd::DEFAULT_COMPRESSION_LEVEL)?),
        })
    }

    fn finish(self) -> io::Result<()> {
        match self {
            Self::None(_) => Ok(()),
            Self::Gzip(encoder) => encoder.finish().map(drop),
            Self::Zstd(encoder) => encoder.finish().map(drop),
        }
    }
}

impl<W: Write> Write for Compressed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::None(out) => out.write(bytes),
            Self::Gzip(encoder) => encoder.write(bytes),
            Self::Zstd(encoder) => encoder.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::None(out) => out.flush(),
            Self::Gzip(encoder) => encoder.flush(),
            Self::Zstd(encoder) => encoder.flush(),
        }
    }
}
