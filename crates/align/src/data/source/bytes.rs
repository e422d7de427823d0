//! The bytes of a file, decompressed.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use engine::{Error, Result};
use flate2::bufread::MultiGzDecoder;

const GZIP_MAGIC: &[u8] = &[0x1f, 0x8b];
const ZSTD_MAGIC: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
const BUFFER: usize = 1 << 16;
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The bytes of a file without a byte order mark; gzip and zstd are known by their first bytes and decompressed.
pub(super) struct Input<'a> {
    path: &'a Path,
    /// The compression of the file.
    pub(super) compression: Option<&'static str>,
    reader: Box<dyn BufRead>,
}

impl<'a> Input<'a> {
    /// Opens a file; `read` counts its bytes.
    pub(super) fn open(path: &'a Path, read: Arc<AtomicU64>) -> Result<Self> {
        let error = || Error::io("read", path);
        let file = File::open(path).map_err(error())?;
        let mut file = BufReader::with_capacity(BUFFER, Counted { file, read });
        let start = file.fill_buf().map_err(error())?;
        let (compression, reader): (_, Box<dyn BufRead>) = if start.starts_with(GZIP_MAGIC) {
            (Some("gzip"), decompressed("gzip", MultiGzDecoder::new(file)))
        } else if start.starts_with(ZSTD_MAGIC) {
            (Some("zstd"), decompressed("zstd", zstd::Decoder::with_buffer(file).map_err(error())?))
        } else {
            (None, Box::new(file))
        };
        let mut input = Self { path, compression, reader };
        if input.peek()?.starts_with(BYTE_ORDER_MARK) {
            input.reader.consume(BYTE_ORDER_MARK.len());
        }
        Ok(input)
    }

    /// The bytes that come next, without consuming them.
    pub(super) fn peek(&mut self) -> Result<&[u8]> {
        self.reader.fill_buf().map_err(read_error(self.path))
    }

    /// All bytes that are left.
    pub(super) fn rest(&mut self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.reader.read_to_end(&mut bytes).map_err(read_error(self.path))?;
        Ok(bytes)
    }

    /// Calls `visit` with the 1-based number and the bytes of each line that is not blank.
    pub(super) fn visit_lines(
        &mut self,
        mut visit: impl FnMut(usize, &[u8]) -> Result<ControlFlow<()>>,
    ) -> Result<ControlFlow<()>> {
        let mut line = Vec::new();
        for number in 1.. {
            line.clear();
            if self.reader.read_until(b'\n', &mut line).map_err(read_error(self.path))? == 0 {
                break;
            }
            if !line.trim_ascii().is_empty() && visit(number, &line)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }
}

fn decompressed(compression: &'static str, decoder: impl Read + 'static) -> Box<dyn BufRead> {
    Box::new(BufReader::with_capacity(BUFFER, Decompressed { compression, decoder, bytes: 0 }))
}

/// A file whose bytes are counted as they are read.
struct Counted {
    file: File,
    read: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.read.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

/// A decoder whose errors say where they are.
struct Decompressed<R> {
    compression: &'static str,
    decoder: R,
    bytes: u64,
}

impl<R: Read> Read for Decompressed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.decoder.read(buffer).map_err(|error| {
            if from_system(&error) {
                return error;
            }
            let Self { compression, bytes, .. } = self;
            io::Error::other(format!(
                "its {compression} data end too early or are not valid after {bytes} decompressed bytes ({error})"
            ))
        })?;
        self.bytes += count as u64;
        Ok(count)
    }
}

/// Whether the operating system gave the error, and not a decoder.
fn from_system(error: &io::Error) -> bool {
    error.raw_os_error().is_some()
}

fn read_error(path: &Path) -> impl FnOnce(io::Error) -> Error {
    move |error| {
        if from_system(&error) {
            Error::io("read", path)(error)
        } else {
            Error::input(format!("{} is damaged: {error}. Fetch or write the file again.", path.display()))
        }
    }
}
