//! A file as bytes in memory, read from the disk as they are used.

use std::fs::File;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A read-only mapping of a file, and its path for messages.
pub(super) struct Mapped {
    path: PathBuf,
    bytes: memmap2::Mmap,
}

impl Mapped {
    /// Maps a file.
    #[allow(unsafe_code)]
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("read", path))?;
        // SAFETY: the bytes of the mapping may change if another process writes to the file meanwhile. Nobody relies
        // on them staying the same: they are only ever read as integers and floats of any bit pattern, lengths and
        // offsets are checked when they are copied out, and text is checked where it is borrowed and copied before
        // the load returns. The mapping lives no longer than the load.
        let bytes = unsafe { memmap2::Mmap::map(&file) }.map_err(Error::io("read", path))?;
        Ok(Self { path: path.to_owned(), bytes })
    }

    /// The file's path.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}
