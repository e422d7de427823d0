//! The one error type of the workspace.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Shorthand for a result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, as a paragraph that says what, where, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Something that the user gave is wrong: a file, a row, a field, an option.
    #[error("{0}")]
    Input(String),
    /// The operating system refused to read or write a file.
    #[error("Could not {action} {}: {source}.{}", path.display(), hint(source))]
    Io {
        /// What was tried: "read", "write", "create", …
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// The work itself failed, for example a loss that became infinite.
    #[error("{0}")]
    Failed(String),
    /// The user asked to stop (Ctrl-C); everything up to here is saved.
    #[error("{0}")]
    Interrupted(String),
}

impl Error {
    /// An error in what the user gave.
    pub fn input(message: impl Into<String>) -> Self {
        Self::Input(message.into())
    }

    /// An input or output error, for use with `map_err`.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { action, path, source }
    }

    /// The process exit code that this error maps to: 2 for bad input, 1 otherwise.
    ///
    /// A path that leads nowhere, or to a folder instead of a file, counts as bad input, since the user named it.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Input(_) => 2,
            Self::Io { source, .. }
                if matches!(
                    source.kind(),
                    ErrorKind::NotFound | ErrorKind::IsADirectory | ErrorKind::NotADirectory
                ) =>
            {
                2
            }
            _ => 1,
        }
    }
}

/// Advice for the input and output errors that people meet.
fn hint(source: &std::io::Error) -> &'static str {
    match source.kind() {
        ErrorKind::NotFound => " Check the path.",
        ErrorKind::IsADirectory => " Give a file instead of a folder.",
        ErrorKind::NotADirectory | ErrorKind::AlreadyExists => {
            " There is a file where a folder is needed: choose another path."
        }
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            " Check the permissions, or choose another path."
        }
        ErrorKind::StorageFull => {
            " The disk is full: free some space, or choose another output folder, and run the same command again."
        }
        ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            " Your disk quota or file size limit is reached: raise it, or choose another output folder, and run the same \
             command again."
        }
        _ => "",
    }
}
