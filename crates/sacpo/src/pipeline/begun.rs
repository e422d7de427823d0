//! What a training that is not complete leaves: the trainer's state in the folder of its policy, and in the run's cache the
//! arithmetic that it began with, and what names everything else that it depends on.

use std::path::{Path, PathBuf};

use align::trainer::{discard_state, has_state};
use engine::checkpoint::atomic;
use engine::{Error, Result};

use super::folder::remove_file;

/// Where the key of the training in a policy's folder is noted.
fn key_file(cache: &Path, folder: &Path) -> PathBuf {
    let name = folder.file_name().unwrap_or_default();
    cache.join(format!("training-{}.key", name.display()))
}

/// Notes what the training that begins depends on. Of one that goes on it is known already, or the trainer has to find out.
///
/// # Errors
/// If it cannot be written.
pub(super) fn note(cache: &Path, folder: &Path, key: &str) -> Result<()> {
    if has_state(folder) {
        return Ok(());
    }
    std::fs::create_dir_all(cache).map_err(Error::io("create", cache))?;
    let noted = format!("{}\n{key}", engine::arithmetic());
    atomic::write_file(&key_file(cache, folder), |out| out.write_all(noted.as_bytes()))
}

/// Checks that a training which was stopped, if there is one, is that of this key and began with this arithmetic. The trainer finds
/// out too, but only once the run is at work, and not which of the two differs.
///
/// # Errors
/// A training that depends on something else.
pub(super) fn check(cache: &Path, folder: &Path, key: &str) -> Result<()> {
    if !has_state(folder) {
        return Ok(());
    }
    let Ok(noted) = std::fs::read_to_string(key_file(cache, folder)) else { return Ok(()) };
    // earlier versions noted the key alone
    let (arithmetic, noted) = noted.split_once('\n').unwrap_or(("an earlier version", &noted));
    let now = engine::arithmetic();
    let why = if noted != key {
        "belongs to another training: the model, the data or the options have changed. Put them back as they were"
            .to_owned()
    } else if arithmetic != now {
        format!(
            "is of a training that began with another version of sacpo or on another kind of processor ({arithmetic}, here \
             {now}), where sums are rounded otherwise. Continue it there"
        )
    } else {
        return Ok(());
    };
    Err(Error::input(format!(
        "What is saved in {} {why}, choose another output folder (run.out, or --out), or delete that folder to train from \
         the start.",
        folder.display()
    )))
}

/// Removes all of it once the policy is complete.
///
/// # Errors
/// If it is there and cannot be removed.
pub(super) fn discard(cache: &Path, folder: &Path) -> Result<()> {
    discard_state(folder)?;
    remove_file(&key_file(cache, folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_training_of_another_key_is_refused_and_one_that_goes_on_is_not_noted_anew() {
        let out = tempfile::tempdir().unwrap();
        let (cache, folder) = (out.path().join("cache"), out.path().join("steps/helpfulness"));
        std::fs::create_dir_all(&folder).unwrap();
        note(&cache, &folder, "one").unwrap();
        check(&cache, &folder, "other").unwrap();
        std::fs::write(folder.join("training-state.safetensors"), "").unwrap();
        assert!(check(&cache, &folder, "other").unwrap_err().to_string().contains("another training"));
        note(&cache, &folder, "other").unwrap();
        check(&cache, &folder, "one").unwrap();
        let noted = key_file(&cache, &folder);
        for (kept, shown) in [("v0 portable\none", "v0 portable, here v"), ("one", "an earlier version, here v")] {
            std::fs::write(&noted, kept).unwrap();
            assert!(check(&cache, &folder, "one").unwrap_err().to_string().contains(shown));
        }
        assert!(check(&cache, &folder, "other").unwrap_err().to_string().contains("another training"));
        // of a state whose key is not known the trainer finds out
        std::fs::remove_dir_all(&cache).unwrap();
        note(&cache, &folder, "other").unwrap();
        check(&cache, &folder, "one").unwrap();
    }
}
