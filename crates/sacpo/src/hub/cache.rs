//! The cache of the Hub's files on disk, in the layout that it shares with the Python package huggingface_hub:
//!
//! ```text
//! CACHE/datasets--OWNER--NAME/blobs/HASH               contents, by their hash; HASH.incomplete until they are whole
//! CACHE/datasets--OWNER--NAME/snapshots/COMMIT/PATH    links to them: the files at a commit
//! CACHE/datasets--OWNER--NAME/refs/REVISION            the commit of a branch or tag when it was last looked up
//! CACHE/datasets--OWNER--NAME/trees/COMMIT.json        the list of all files at a commit
//! CACHE/.locks/datasets--OWNER--NAME/HASH.lock         held by the process that fetches a content
//! ```

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use engine::checkpoint::atomic;
use engine::{Error, Result};

use super::address::{Repo, is_commit};
use super::tree::{self, Tree};
use crate::interrupt;

/// Between two looks at a lock that another process holds.
const LOCK_WAIT: Duration = Duration::from_millis(200);

/// What the cache holds of one repository.
pub(super) struct Cache {
    folder: PathBuf,
    locks: PathBuf,
}

impl Cache {
    /// The part of the cache `root` for a repository.
    pub(super) fn of(repo: &Repo, root: &Path) -> Self {
        let name = format!("{}--{}", repo.kind.plural(), repo.id.replace('/', "--"));
        Self { folder: root.join(&name), locks: root.join(".locks").join(name) }
    }

    /// The commit that a revision was when it was last looked up.
    pub(super) fn commit_of(&self, revision: &str) -> Option<String> {
        let text = fs::read_to_string(self.folder.join("refs").join(revision)).ok()?;
        Some(text.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    /// Keeps which commit a revision is.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(super) fn keep_commit(&self, revision: &str, commit: &str) -> Result<()> {
        if revision == commit || self.commit_of(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        write(&self.folder.join("refs").join(revision), commit.as_bytes())
    }

    /// Keeps the list of all files at a commit.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(super) fn keep_tree(&self, commit: &str, tree: &Tree) -> Result<()> {
        let json =
            tree::to_kept(tree).map_err(|error| Error::Failed(format!("A list of files is no JSON: {error}.")))?;
        write(&self.tree_path(commit), &json)
    }

    /// All files at a commit, if they were listed before.
    pub(super) fn tree(&self, commit: &str) -> Option<Tree> {
        tree::from_kept(&fs::read(self.tree_path(commit)).ok()?)
    }

    fn tree_path(&self, commit: &str) -> PathBuf {
        self.folder.join("trees").join(format!("{commit}.json"))
    }

    /// The folder of the files at a commit.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// The paths of the files that are there of a commit.
    pub(super) fn present(&self, commit: &str) -> Vec<String> {
        fn visit(folder: &Path, before: &str, paths: &mut Vec<String>) {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let Ok(name) = entry.file_name().into_string() else { continue };
                let (file, path) = (entry.path(), format!("{before}{name}"));
                if file.is_dir() {
                    visit(&file, &format!("{path}/"), paths);
                } else if file.is_file() {
                    paths.push(path);
                }
            }
        }
        let mut paths = Vec::new();
        visit(&self.snapshot(commit), "", &mut paths);
        paths
    }

    /// Where a content is when it is whole.
    pub(super) fn blob(&self, hash: &str) -> PathBuf {
        self.folder.join("blobs").join(hash)
    }

    /// Where a content is before.
    pub(super) fn incomplete(&self, hash: &str) -> PathBuf {
        self.folder.join("blobs").join(format!("{hash}.incomplete"))
    }

    /// Waits until no other process fetches a content, and keeps others waiting for as long as the lock lives; `say` is told of
    /// the wait. A file system without locks gives none; then only the check of each content keeps two processes apart.
    ///
    /// # Errors
    /// If the lock cannot be made, or [`Error::Interrupted`].
    pub(super) fn lock(&self, hash: &str, say: &dyn Fn(&str)) -> Result<Option<File>> {
        fs::create_dir_all(&self.locks).map_err(Error::io("create", &self.locks))?;
        let blobs = self.folder.join("blobs");
        fs::create_dir_all(&blobs).map_err(Error::io("create", &blobs))?;
        let path = self.locks.join(format!("{hash}.lock"));
        let file =
            File::options().create(true).truncate(false).write(true).open(&path).map_err(Error::io("create", &path))?;
        let mut said = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Some(file)),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => return Ok(None),
                Err(TryLockError::Error(error)) => return Err(Error::io("lock", &path)(error)),
            }
            if !said {
                say("  Another process is fetching the same file; waiting for it.");
                said = true;
            }
            interrupt::check()?;
            sleep(LOCK_WAIT);
        }
    }

    /// Gives a whole content its path at a commit.
    ///
    /// # Errors
    /// If the link cannot be made.
    pub(super) fn link(&self, commit: &str, path: &str, hash: &str) -> Result<()> {
        let link = self.snapshot(commit).join(path);
        if let Some(folder) = link.parent() {
            fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        }
        match fs::remove_file(&link) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(Error::io("replace", &link)(error)),
            _ => {}
        }
        let made = link_to(&self.blob(hash), &link, path.split('/').count());
        match made {
            // another process was faster
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            made => made.map_err(Error::io("create", &link)),
        }
    }
}

/// Links to a blob from so many levels below a commit's folder; relative, so that the cache can be moved.
#[cfg(unix)]
fn link_to(blob: &Path, link: &Path, levels: usize) -> std::io::Result<()> {
    let name = blob.file_name().unwrap_or_default();
    std::os::unix::fs::symlink(Path::new(&"../".repeat(levels + 1)).join("blobs").join(name), link)
}

/// Elsewhere symbolic links are for administrators.
#[cfg(not(unix))]
fn link_to(blob: &Path, link: &Path, _levels: usize) -> std::io::Result<()> {
    fs::hard_link(blob, link)
}

/// Writes a small file, and the folders above it.
fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    }
    atomic::write_file(path, |out| out.write_all(bytes))
}
