//! Compiled kernels on disk, so that a machine compiles them once.

use std::path::{Path, PathBuf};

use crate::checkpoint::atomic;
use crate::error::Result;

/// A folder of compiled kernels. Files in it can be deleted at any time.
#[derive(Debug, Clone)]
pub(super) struct Cache {
    /// Nothing where the user has no folder for caches.
    folder: Option<PathBuf>,
}

/// Bytes of the hash that comes before the contents of a file.
const HASH: usize = 32;

impl Cache {
    /// The user's: `sacpo/kernels` in XDG_CACHE_HOME, or in `.cache` of the home folder.
    pub(super) fn of_user() -> Self {
        let folder = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|folder| folder.is_absolute());
        let folder = folder.or_else(|| Some(std::env::home_dir()?.join(".cache")));
        Self { folder: folder.map(|folder| folder.join("sacpo").join("kernels")) }
    }

    /// What was compiled from `input` (all that decides the outcome), now or before. Where the file is damaged it is compiled
    /// again; where none can be written it is compiled each time.
    ///
    /// # Errors
    /// Those of `compile`.
    pub(super) fn get(&self, input: &str, compile: impl FnOnce() -> Result<Vec<u8>>) -> Result<Vec<u8>> {
        let Some(folder) = &self.folder else { return compile() };
        let path = folder.join(blake3::hash(input.as_bytes()).to_hex().as_str());
        if let Some(compiled) = read(&path) {
            return Ok(compiled);
        }
        let compiled = compile()?;
        if std::fs::create_dir_all(folder).is_ok() {
            let hash = blake3::hash(&compiled);
            // a cache that cannot be written costs time and nothing else
            let _ = atomic::write_file(&path, |out| {
                out.write_all(hash.as_bytes())?;
                out.write_all(&compiled)
            });
        }
        Ok(compiled)
    }
}

/// The contents of a file that is there and whole.
fn read(path: &Path) -> Option<Vec<u8>> {
    let file = std::fs::read(path).ok()?;
    let (hash, contents) = file.split_at_checked(HASH)?;
    (blake3::hash(contents).as_bytes()[..] == *hash).then(|| contents.to_vec())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::fs;

    use super::*;
    use crate::error::Error;

    #[test]
    fn an_input_is_compiled_once_and_again_where_its_file_is_damaged() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("sacpo").join("kernels");
        let cache = Cache { folder: Some(folder.clone()) };
        let compiled = Cell::new(0);
        let get = |input: &str| {
            let compile = || {
                compiled.set(compiled.get() + 1);
                Ok(format!("compiled {input}").into_bytes())
            };
            assert_eq!(cache.get(input, compile).unwrap(), format!("compiled {input}").into_bytes());
            compiled.get()
        };
        assert_eq!((get("a"), get("a"), get("b"), get("a")), (1, 1, 2, 2));
        let files = || fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
        assert_eq!(files().count(), 2);
        for damage in [|bytes: &mut Vec<u8>| bytes[40] ^= 1, |bytes: &mut Vec<u8>| bytes.truncate(12), Vec::clear] {
            let before = compiled.get();
            for path in files() {
                let mut bytes = fs::read(&path).unwrap();
                damage(&mut bytes);
                fs::write(path, bytes).unwrap();
            }
            assert_eq!((get("a"), get("b"), get("a")), (before + 1, before + 2, before + 2));
        }
    }

    #[test]
    fn without_a_place_to_write_to_it_is_compiled_each_time() {
        let parent = tempfile::tempdir().unwrap();
        let file = parent.path().join("file");
        fs::write(&file, "").unwrap();
        for folder in [None, Some(file.join("kernels"))] {
            let cache = Cache { folder };
            assert_eq!(cache.get("a", || Ok(vec![1])).unwrap(), [1]);
            assert_eq!(cache.get("a", || Ok(vec![2])).unwrap(), [2]);
            assert!(cache.get("a", || Err(Error::Failed("wrong".into()))).is_err());
        }
    }
}
