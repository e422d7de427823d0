//! Where the model, data and prompts of a recipe are.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};

/// A path, or an address on the Hugging Face Hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// As the recipe gives it.
    pub given: PathBuf,
    /// What an address was fetched to. Default: nothing, as of every path.
    pub fetched: Option<Fetched>,
}

/// What an address leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// Where it is on this machine.
    pub path: PathBuf,
    /// The commit that the address means, 40 hexadecimal digits.
    pub commit: String,
}

impl Location {
    /// Where it is on this machine.
    pub fn path(&self) -> &Path {
        self.fetched.as_ref().map_or(&self.given, |fetched| &fetched.path)
    }

    /// The commit that an address means, if it was fetched.
    pub fn commit(&self) -> Option<String> {
        self.fetched.as_ref().map(|fetched| fetched.commit.clone())
    }
}

impl<P: Into<PathBuf>> From<P> for Location {
    fn from(path: P) -> Self {
        Self { given: path.into(), fetched: None }
    }
}

/// As the recipe gives it.
impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.given.display().fmt(f)
    }
}

impl Serialize for Location {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.given.serialize(serializer)
    }
}
