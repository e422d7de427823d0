//! Files and folders that appear whole or not at all.
//!
//! Everything is written under a temporary name beside the target, flushed to the disk, and renamed.
//! Whatever goes wrong on the way (a full disk, an error, a kill), the target is what it was before.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use crate::error::{Error, Result};

/// What the names of unfinished files and folders start and end with.
const PREFIX: &str = ".sacpo-";
const SUFFIX: &str = ".partial";

/// Writes a file through `write`, replacing the one at `path` only when the new one is complete and on the disk.
///
/// # Errors
/// [`Error::Io`] when the folder of `path` does not exist, or when `write` or the disk fails; the target is then
/// untouched and the temporary file is gone.
pub fn write_file(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    try_write_file(path, |out| write(out).map_err(Error::io("write", path)))
}

/// As [`write_file`], for a `write` that can fail in other ways too.
///
/// # Errors
/// What `write` returns, and those of [`write_file`].
pub fn try_write_file(path: &Path, write: impl FnOnce(&mut (dyn Write + Send)) -> Result<()>) -> Result<()> {
    let parent = parent_of(path)?;
    let mut file = temporary(0o666).tempfile_in(parent).map_err(Error::io("create a temporary file beside", path))?;
    let mut writer = BufWriter::with_capacity(1 << 20, file.as_file_mut());
    write(&mut writer)?;
    writer.flush().map_err(Error::io("write", path))?;
    drop(writer);
    file.as_file().sync_all().map_err(Error::io("write", path))?;
    file.persist(path).map_err(|e| Error::io("replace", path)(e.error))?;
    sync_folder(parent)
}

/// Fills a folder through `fill`, which gets the path of a temporary folder beside `folder`. The folder takes its
/// name, replacing whatever had it, only when `fill` has returned and every file is on the disk. Missing parents
/// are created.
///
/// # Errors
/// What `fill` returns, or [`Error::Io`]; the target is then untouched and the temporary folder is gone.
pub fn write_folder(folder: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let parent = parent_of(folder)?;
    fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
    let new = temporary(0o777).tempdir_in(parent).map_err(Error::io("create a temporary folder beside", folder))?;
    fill(new.path())?;
    sync_tree(new.path())?;

    // A folder that is not empty cannot be renamed over, so the old one steps aside first, and comes back if the
    // new one cannot take its place.
    let aside = match fs::symlink_metadata(folder) {
        Err(_) => None,
        Ok(_) => {
            let aside = temporary(0o777).tempdir_in(parent).map_err(Error::io("replace", folder))?;
            fs::rename(folder, aside.path().join("old")).map_err(Error::io("replace", folder))?;
            Some(aside)
        }
    };
    if let Err(source) = fs::rename(new.path(), folder) {
        if let Some(aside) = aside
            && fs::rename(aside.path().join("old"), folder).is_err()
        {
            let _kept_rather_than_deleted = aside.keep();
        }
        return Err(Error::io("create", folder)(source));
    }
    let _renamed_so_nothing_to_delete = new.keep();
    sync_folder(parent)
}

/// Deletes what a killed process left half-written directly in `folder`. Nobody else may be writing there.
///
/// # Errors
/// [`Error::Io`] when something cannot be deleted. A folder that does not exist holds nothing.
pub fn remove_leftovers(folder: &Path) -> Result<()> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(Error::io("read", folder)(source)),
    };
    for entry in entries {
        let entry = entry.map_err(Error::io("read", folder))?;
        let name = entry.file_name();
        if !name.to_str().is_some_and(|name| name.starts_with(PREFIX) && name.ends_with(SUFFIX)) {
            continue;
        }
        let path = entry.path();
        let is_folder = entry.file_type().map_err(Error::io("read", &path))?.is_dir();
        let removed = if is_folder { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.map_err(Error::io("remove", &path))?;
    }
    Ok(())
}

/// A hidden temporary name whose permissions are `mode` less the user's mask, as any new file or folder has them.
fn temporary(mode: u32) -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(PREFIX).suffix(SUFFIX);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(mode));
    #[cfg(not(unix))]
    let _ = mode;
    builder
}

/// The folder that holds `path`, which must end in a name.
fn parent_of(path: &Path) -> Result<&Path> {
    if path.file_name().is_none() {
        let message = format!("{} does not end in a name that can be written to. Give another path.", path.display());
        return Err(Error::input(message));
    }
    Ok(path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")))
}

/// Flushes every file below a folder, and the folder itself, to the disk.
fn sync_tree(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let path = entry.map_err(Error::io("read", folder))?.path();
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            File::open(&path).and_then(|file| file.sync_all()).map_err(Error::io("write", &path))?;
        }
    }
    sync_folder(folder)
}

/// Flushes the names in a folder to the disk, where the system lets a folder be opened.
fn sync_folder(folder: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(folder).and_then(|file| file.sync_all()).map_err(Error::io("write", folder))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_full_disk_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.json");
        write_file(&path, |out| out.write_all(b"old")).unwrap();
        let error = write_file(&path, |out| {
            out.write_all(&[b'x'; 3 << 20])?;
            Err(io::ErrorKind::StorageFull.into())
        })
        .unwrap_err();
        assert!(error.to_string().contains("metrics.json") && error.to_string().contains("disk is full"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(folder.path()), ["metrics.json"]);
    }

    #[test]
    fn a_folder_is_replaced_only_when_the_new_one_is_complete() {
        let parent = tempfile::tempdir().unwrap();
        let target = parent.path().join("runs").join("step1");
        write_folder(&target, |new| {
            assert!(!target.exists());
            fs::write(new.join("a"), "1").map_err(Error::io("write", new))
        })
        .unwrap();

        let failed = write_folder(&target, |new| {
            fs::write(new.join("b"), "half").unwrap();
            Err(Error::Failed("stopped".into()))
        });
        assert!(failed.is_err());
        assert_eq!(names(&target), ["a"]);

        write_folder(&target, |new| {
            assert_eq!(names(&target), ["a"]);
            fs::create_dir(new.join("sub")).unwrap();
            fs::write(new.join("sub").join("c"), "3").map_err(Error::io("write", new))
        })
        .unwrap();
        assert_eq!(names(&target), ["sub"]);
        assert_eq!(names(&parent.path().join("runs")), ["step1"]);
    }

    #[test]
    fn leftovers_are_removed_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let kept = write_folder(&folder.path().join("killed"), |new| {
            // as if the process ended here
            let copy = folder.path().join(".sacpo-abc.partial");
            fs::create_dir(&copy).unwrap();
            fs::write(copy.join("model.safetensors"), "half").unwrap();
            assert!(new.file_name().unwrap().to_str().unwrap().starts_with(PREFIX));
            Err(Error::Failed("killed".into()))
        });
        assert!(kept.is_err());
        for name in [".sacpo-def.partial", ".other.partial", "notes.partial", ".sacpo-notes"] {
            fs::write(folder.path().join(name), "x").unwrap();
        }
        remove_leftovers(folder.path()).unwrap();
        assert_eq!(names(folder.path()), [".other.partial", ".sacpo-notes", "notes.partial"]);
        remove_leftovers(&folder.path().join("nowhere")).unwrap();
    }

    #[cfg(unix)]
    #[test]
    fn new_files_have_the_permissions_of_ordinary_new_files() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("plain"), "").unwrap();
        write_file(&folder.path().join("ours"), |_| Ok(())).unwrap();
        let mode = |name: &str| fs::metadata(folder.path().join(name)).unwrap().permissions();
        assert_eq!(mode("plain"), mode("ours"));
    }

    #[test]
    fn a_path_without_a_name_is_refused() {
        assert!(write_file(Path::new(".."), |_| Ok(())).is_err());
        assert!(write_folder(Path::new("/"), |_| Ok(())).is_err());
    }
}
