//! What a training that is not complete leaves: the trainer's state in the folder of its policy, and in the run's cache what names
//! everything that it depends on.

use std::path::{Path, PathBuf};

use align::trainer::discard_state;
use engine::checkpoint::atomic;
use engine::{Error, Result};

use super::folder::remove_file;

/// The trainer's state.
const STATE: &str = "training-state.safetensors";

/// Whether a training was stopped and can go on.
pub(super) fn has_state(folder: &Path) -> bool {
    folder.join(STATE).exists()
}

/// Where the key of the training in a policy's folder is noted.
fn key_file(cache: &Path, folder: &Path) -> PathBuf {
    let name = folder.file_name().unwrap_or_default();
    cache.join(format!("training-{}.key", name.display()))
}

/// Notes what the training that begins or goes on depends on.
///
/// # Errors
/// If it cannot be written.
pub(super) fn note(cache: &Path, folder: &Path, key: &str) -> Result<()> {
    std::fs::create_dir_all(cache).map_err(Error::io("create", cache))?;
    atomic::write_file(&key_file(cache, folder), |out| out.write_all(key.as_bytes()))
}

/// Checks that a training which was stopped, if there is one, is that of this key. The trainer would find out too, but only once the
/// run is at work.
///
/// # Errors
/// A training that depends on something else.
pub(super) fn check(cache: &Path, folder: &Path, key: &str) -> Result<()> {
    let noted = std::fs::read_to_string(key_file(cache, folder));
    if has_state(folder) && noted.is_ok_and(|noted| noted != key) {
        return Err(Error::input(format!(
            "What is saved in {} belongs to another training: the model, the data or the options have changed. Put them back as \
             they were, choose another output folder (run.out, or --out), or delete that folder to train from the start.",
            folder.display()
        )));
    }
    Ok(())
}

/// Removes all of it once the policy is complete.
///
/// # Errors
/// If it is there and cannot be removed.
pub(super) fn discard(cache: &Path, folder: &Path) -> Result<()> {
    discard_state(folder)?;
    remove_file(&key_file(cache, folder))
}
