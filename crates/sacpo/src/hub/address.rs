//! Addresses of what is on the Hub, written as the Python packages huggingface_hub and fsspec write them.

use std::fmt;

use engine::{Error, Result};
use percent_encoding::percent_decode_str;

/// What every address starts with.
pub(super) const SCHEME: &str = "hf://";

/// The branch that an address without a revision means.
const MAIN: &str = "main";

/// What a repository holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Model,
    Dataset,
}

impl Kind {
    /// As the Hub's interface and cache call it.
    pub(super) fn plural(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }
}

/// A repository at a revision.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Repo {
    pub(super) kind: Kind,
    /// `OWNER/NAME`.
    pub(super) id: String,
    /// A branch, a tag, or a commit.
    pub(super) revision: String,
}

/// A place in a repository: `hf://datasets/OWNER/NAME@REVISION/PATH`, of a model without `datasets/`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) repo: Repo,
    /// A file, a folder, or a pattern; empty for the root.
    pub(super) path: String,
}

impl Repo {
    /// The revision, if it is a commit and therefore never means anything else.
    pub(super) fn pinned(&self) -> Option<&str> {
        is_commit(&self.revision).then_some(&*self.revision)
    }

    /// The repository's page, below the Hub's own.
    pub(super) fn page(&self) -> String {
        match self.kind {
            Kind::Model => self.id.clone(),
            Kind::Dataset => format!("datasets/{}", self.id),
        }
    }
}

impl fmt::Display for Repo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}", self.page())?;
        match &*self.revision {
            MAIN => Ok(()),
            revision if special_revision(revision) == Some(revision.len()) => write!(f, "@{revision}"),
            revision => write!(f, "@{}", revision.replace('/', "%2F")),
        }
    }
}

impl Address {
    /// Reads an address; nothing if it does not start as one.
    ///
    /// # Errors
    /// An address of something else than a model or a data set, or that lacks a part.
    pub(super) fn parse(text: &str) -> Result<Option<Self>> {
        let Some(body) = text.strip_prefix(SCHEME) else { return Ok(None) };
        let wrong = |what: &str| {
            Error::input(format!(
                "The address {text} {what}. Write hf://datasets/OWNER/NAME/PATH for data and hf://OWNER/NAME for a model, with \
                 @REVISION after NAME for another branch, tag or commit than main."
            ))
        };
        let (kind, place) = match body.split_once('/') {
            Some(("datasets", place)) => (Kind::Dataset, place),
            Some(("models", place)) => (Kind::Model, place),
            Some((other @ ("spaces" | "kernels" | "buckets"), _)) => {
                return Err(wrong(&format!("is in {other}, which hold neither models nor data sets")));
            }
            _ => (Kind::Model, body),
        };
        let is_name = |name: &str| {
            !name.is_empty()
                && !name.starts_with(['.', '-'])
                && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
                && !name.contains("--")
                && !name.contains("..")
        };
        let (owner, rest) = place.split_once('/').ok_or_else(|| wrong("does not name owner and repository"))?;
        let (name, rest) = rest.split_at(rest.find(['@', '/']).unwrap_or(rest.len()));
        if !is_name(owner) || !is_name(name) {
            return Err(wrong("does not name owner and repository"));
        }
        let (revision, path) = match rest.strip_prefix('@') {
            None => (MAIN, rest),
            Some(rest) => rest.split_at(special_revision(rest).or_else(|| rest.find('/')).unwrap_or(rest.len())),
        };
        let revision = percent_decode_str(revision).decode_utf8_lossy().into_owned();
        let part = |part: &str| !matches!(part, "" | "." | "..");
        if !revision.split('/').all(part) || revision.contains(['\\', '?', '#']) {
            return Err(wrong("has a revision that is none"));
        }
        let path = path.trim_matches('/');
        if !path.is_empty() && !is_path(path) {
            return Err(wrong("has a path that leads nowhere"));
        }
        if path.rsplit_once('/').is_some_and(|(folder, _)| folder.contains('*')) {
            return Err(wrong("has a `*` in a folder's name, but only the name of a file may have one"));
        }
        let repo = Repo { kind, id: format!("{owner}/{name}"), revision };
        Ok(Some(Self { repo, path: path.to_owned() }))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.path {
            "" => self.repo.fmt(f),
            path => write!(f, "{}/{path}", self.repo),
        }
    }
}

/// Whether a text is the name of a commit in full.
pub(super) fn is_commit(text: &str) -> bool {
    is_hash(text, 40)
}

/// Whether a text is a hash of so many hexadecimal digits.
pub(super) fn is_hash(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Whether a path stays below the folder that it starts from, on every system.
pub(super) fn is_path(path: &str) -> bool {
    path.split('/').all(|part| !matches!(part, "" | "." | "..")) && !path.contains(['\\', '\0'])
}

/// The length of a revision at the start of a text that may hold slashes: `refs/pr/1`, `refs/convert/parquet`.
fn special_revision(text: &str) -> Option<usize> {
    let rest = text.strip_prefix("refs/convert/").or_else(|| text.strip_prefix("refs/pr/"))?;
    let end = text.len() - rest.len() + rest.find('/').unwrap_or(rest.len());
    Some(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written() {
        let commit = "0123456789abcdef0123456789abcdef01234567";
        for (text, kind, id, revision, path) in [
            ("hf://datasets/o/n", Kind::Dataset, "o/n", "main", ""),
            ("hf://datasets/o/n/data/train-*.parquet", Kind::Dataset, "o/n", "main", "data/train-*.parquet"),
            (
                "hf://datasets/o/n@refs/convert/parquet/default/train/0000.parquet",
                Kind::Dataset,
                "o/n",
                "refs/convert/parquet",
                "default/train/0000.parquet",
            ),
            ("hf://datasets/o/n@refs/pr/3", Kind::Dataset, "o/n", "refs/pr/3", ""),
            ("hf://datasets/o/n@my%2Fbranch/a@b.json", Kind::Dataset, "o/n", "my/branch", "a@b.json"),
            ("hf://o/n.v-1_2", Kind::Model, "o/n.v-1_2", "main", ""),
            (&format!("hf://o/n@{commit}/q.gguf"), Kind::Model, "o/n", commit, "q.gguf"),
        ] {
            let address = Address::parse(text).unwrap().unwrap();
            let repo = Repo { kind, id: id.into(), revision: revision.into() };
            assert_eq!(address, Address { repo, path: path.into() });
            assert_eq!(address.to_string(), text);
            assert_eq!(address.repo.pinned().is_some(), revision == commit);
        }
        let same = |a: &str, b: &str| assert_eq!(Address::parse(a).unwrap(), Address::parse(b).unwrap(), "{a}");
        same("hf://models/o/n/", "hf://o/n@main");
        assert_eq!(Address::parse("data/hf://o/n").unwrap(), None);
    }

    #[test]
    fn what_is_no_address_is_said() {
        for (text, reason) in [
            ("hf://", "owner and repository"),
            ("hf://gpt2", "owner and repository"),
            ("hf://datasets/squad", "owner and repository"),
            ("hf://o/", "owner and repository"),
            ("hf:///n", "owner and repository"),
            ("hf://o/n--m", "owner and repository"),
            ("hf://../n", "owner and repository"),
            ("hf://o/n o/x", "owner and repository"),
            ("hf://spaces/o/n", "spaces"),
            ("hf://buckets/o/n/x", "buckets"),
            ("hf://o/n@", "revision"),
            ("hf://o/n@..%2F..%2Fx", "revision"),
            ("hf://o/n@a%3Fb", "revision"),
            ("hf://datasets/o/n/a/../../b", "leads nowhere"),
            ("hf://datasets/o/n/a//b", "leads nowhere"),
            ("hf://datasets/o/n/*/train.jsonl", "only the name of a file"),
        ] {
            let error = Address::parse(text).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            let error = error.to_string();
            assert!(
                error.contains(text) && error.contains(reason) && error.contains("hf://datasets/OWNER/NAME"),
                "{error}"
            );
        }
    }
}
