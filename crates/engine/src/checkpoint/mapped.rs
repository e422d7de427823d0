//! A file as bytes in memory, read from the disk as they are used.

use std::fs::File;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A read-only mapping of a file, and its path for messages. Its start is aligned to a page.
#[derive(Debug)]
pub struct Mapped {
    path: PathBuf,
    bytes: memmap2::Mmap,
}

impl Mapped {
    /// Maps a file, which nobody may change as long as this lives.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be opened or mapped.
    #[allow(unsafe_code)]
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("read", path))?;
        // SAFETY: the mapping is sound as long as nobody changes the file, as for every program that maps its models; sacpo
        // itself replaces files and never writes into them. What the bytes are does not matter: they are only read as
        // integers and floats of any bit pattern, lengths and offsets in them are checked before use, and text is checked
        // to be UTF-8.
        let bytes = unsafe { memmap2::Mmap::map(&file) }.map_err(Error::io("read", path))?;
        Ok(Self { path: path.to_owned(), bytes })
    }

    /// Gives back the memory of a part of the bytes that was used. It can be used again, and is then read again.
    ///
    /// # Panics
    /// If it is not a part of these bytes.
    #[allow(unsafe_code)]
    pub fn release(&self, part: &[u8]) {
        let (own, part_of_them) = (self.bytes.as_ptr_range(), part.as_ptr_range());
        assert!(own.start <= part_of_them.start && part_of_them.end <= own.end, "the bytes are not of {:?}", self.path);
        #[cfg(unix)]
        let start = part_of_them.start as usize - own.start as usize;
        #[cfg(unix)]
        // SAFETY: the range lies within the mapping (above). Pages of a read-only mapping that are given up hold what the file holds when they are used again. What
        // comes of the advice does not matter: without, the pages stay until the system takes them back.
        let _ = unsafe { self.bytes.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, part.len()) };
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}
