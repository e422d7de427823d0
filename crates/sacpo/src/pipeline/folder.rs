//! The run directory.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use engine::checkpoint::atomic;
use engine::{Error, Result};

use super::begun;

/// Folders that hold one folder for each policy.
const OF_POLICIES: [&str; 2] = ["steps", "merges"];

/// The run directory, locked against a second process for as long as this lives, unless it is only looked at.
pub(crate) struct RunFolder {
    pub(crate) path: PathBuf,
    /// Nothing if the folder is only looked at.
    _lock: Option<File>,
    /// Whether there was no such folder before.
    is_new: bool,
}

impl RunFolder {
    /// Creates the folder if need be, and locks it.
    ///
    /// # Errors
    /// If it cannot be created, or another process works in it.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let is_new = !path.exists();
        std::fs::create_dir_all(path).map_err(Error::io("create", path))?;
        let file = path.join(".lock");
        let lock = File::create(&file).map_err(Error::io("create", &file))?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => Error::input(format!(
                "Another sacpo process is working in {}. Wait for it to end, or choose another output folder.",
                path.display()
            )),
            TryLockError::Error(source) => Error::io("lock", &file)(source),
        })?;
        remove_leftovers(path)?;
        Ok(Self { path: path.to_path_buf(), _lock: Some(lock), is_new })
    }

    /// Checks that the folder can be written to, or made where there is none. Nothing is left behind.
    ///
    /// # Errors
    /// If it cannot.
    pub(crate) fn check_writable(path: &Path) -> Result<()> {
        let path = std::path::absolute(path).map_err(Error::io("find", path))?;
        let nearest = path.ancestors().find(|folder| folder.exists()).unwrap_or(&path);
        tempfile::tempfile_in(nearest).map_err(Error::io("write in", nearest)).map(drop)
    }

    /// The folder to look at: it is neither created nor locked, and nothing may be written.
    pub(super) fn unlocked(path: &Path) -> Self {
        Self { path: path.to_path_buf(), _lock: None, is_new: false }
    }

    /// Takes a folder away that was made for work which cannot be done. One that was there before stays, and so does one that
    /// holds more than tokens, which are made anew.
    pub(crate) fn discard_if_new(self) {
        let others = |entry: std::io::Result<std::fs::DirEntry>| {
            entry.is_ok_and(|entry| entry.file_name() != ".lock" && entry.file_name() != "cache")
        };
        if self.is_new && std::fs::read_dir(&self.path).is_ok_and(|mut entries| !entries.any(others)) {
            // what stays does no harm
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }

    /// Writes a text file of the run, atomically.
    pub(crate) fn write(&self, name: &str, text: &str) -> Result<()> {
        atomic::write_file(&self.path.join(name), |out| out.write_all(text.as_bytes()))
    }

    /// Removes a file of the run, if it is there.
    pub(super) fn remove(&self, name: &str) -> Result<()> {
        remove_file(&self.path.join(name))
    }

    /// Removes answers, verdicts and ratings, which are written anew of what is kept, so that none of another evaluation stay.
    pub(super) fn remove_evaluation(&self) -> Result<()> {
        for name in ["answers", "verdicts"] {
            let path = self.path.join(name);
            match std::fs::remove_dir_all(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::io("remove", &path)(error));
                }
                _ => {}
            }
        }
        self.remove("ratings.json")
    }

    /// Where log-probabilities and answers are kept.
    pub(crate) fn cache(&self) -> PathBuf {
        self.path.join("cache")
    }
}

/// Removes a file, if it is there.
pub(super) fn remove_file(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Deletes what a killed process left half-written in a run directory.
fn remove_leftovers(run: &Path) -> Result<()> {
    for folder in ["", "cache", "pretraining"].into_iter().chain(OF_POLICIES) {
        atomic::remove_leftovers(&run.join(folder))?;
    }
    for folder in OF_POLICIES {
        // no entries where there is no such folder yet
        let policies = std::fs::read_dir(run.join(folder)).into_iter().flatten().flatten();
        let folders = policies.map(|entry| entry.path()).filter(|path| path.is_dir());
        for path in folders {
            atomic::remove_leftovers(&path)?;
            if path.join("policy.json").exists() {
                begun::discard(&run.join("cache"), &path)?;
            }
        }
    }
    Ok(())
}
