//! The list of a repository's files at a commit.

use std::collections::BTreeMap;

use engine::{Error, Result};
use serde::{Deserialize, Serialize};

use super::address::{is_hash, is_path};

/// The version of the form in which huggingface_hub keeps lists.
const VERSION: u32 = 1;

/// All files of a repository at a commit, by path.
pub(super) type Tree = BTreeMap<String, Entry>;

/// A file of a repository, in the form of huggingface_hub's `trees/COMMIT.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    /// Its bytes.
    pub(super) size: u64,
    /// What git calls it: the SHA-1 of the text `blob SIZE`, a zero byte and the content; of a large file, of a pointer to it.
    blob_id: String,
    /// Of a large file, the SHA-256 of its content.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lfs_sha256: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lfs_size: Option<u64>,
    /// Of a large file, what the Hub's own protocol, which is not spoken here, calls it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    xet_hash: Option<String>,
}

/// How the content of a file is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Identity<'a> {
    /// By the SHA-1 of git.
    Git(&'a str),
    /// By its SHA-256.
    Sha256(&'a str),
}

impl<'a> Identity<'a> {
    /// The hash, which names the content in the cache.
    pub(super) fn hash(self) -> &'a str {
        match self {
            Self::Git(hash) | Self::Sha256(hash) => hash,
        }
    }
}

impl Entry {
    pub(super) fn identity(&self) -> Identity<'_> {
        self.lfs_sha256.as_deref().map_or(Identity::Git(&self.blob_id), Identity::Sha256)
    }

    /// Whether the hashes are hashes, and so can name files.
    fn is_valid(&self) -> bool {
        is_hash(&self.blob_id, 40) && self.lfs_sha256.as_ref().is_none_or(|hash| is_hash(hash, 64))
    }
}

/// A kept list.
#[derive(Serialize, Deserialize)]
struct Kept {
    format_version: u32,
    files: Tree,
}

/// The list in a kept file; nothing if it is damaged or of another version.
pub(super) fn from_kept(json: &[u8]) -> Option<Tree> {
    let kept: Kept = serde_json::from_slice(json).ok()?;
    (kept.format_version == VERSION && check(&kept.files).is_none()).then_some(kept.files)
}

/// The list as a file to keep.
pub(super) fn to_kept(tree: &Tree) -> serde_json::Result<Vec<u8>> {
    serde_json::to_vec_pretty(&Kept { format_version: VERSION, files: tree.clone() })
}

/// A file or a folder as the Hub's interface lists it.
#[derive(Deserialize)]
struct Listed {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    #[serde(default)]
    size: u64,
    oid: String,
    lfs: Option<Large>,
    #[serde(rename = "xetHash")]
    xet_hash: Option<String>,
}

#[derive(Deserialize)]
struct Large {
    oid: String,
    size: u64,
}

/// Adds the files of a page of the Hub's interface.
///
/// # Errors
/// What is no such page, or names a file outside the repository.
pub(super) fn add_page(tree: &mut Tree, json: &str) -> Result<()> {
    let wrong = |what: String| Error::Failed(format!("The Hub's list of files is not what it should be: {what}."));
    let page: Vec<Listed> = serde_json::from_str(json).map_err(|error| wrong(error.to_string()))?;
    tree.extend(page.into_iter().filter(|listed| listed.kind == "file").map(|listed| {
        let (lfs_sha256, lfs_size) = listed.lfs.map(|lfs| (lfs.oid, lfs.size)).unzip();
        let size = lfs_size.unwrap_or(listed.size);
        (listed.path, Entry { size, blob_id: listed.oid, lfs_sha256, lfs_size, xet_hash: listed.xet_hash })
    }));
    check(tree).map_or(Ok(()), |path| Err(wrong(format!("{path:?} has no path in the repository or no hash"))))
}

/// The path of a file that cannot be kept under its path and hash.
fn check(tree: &Tree) -> Option<&str> {
    tree.iter().find(|(path, entry)| !is_path(path) || !entry.is_valid()).map(|(path, _)| &**path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_read_kept_and_read_again() {
        let (git, sha) = ("a".repeat(40), "b".repeat(64));
        let page = format!(
            r#"[{{"type":"directory","oid":"x","size":0,"path":"data"}},
                {{"type":"file","oid":"{git}","size":3,"path":"config.json"}},
                {{"type":"file","oid":"{git}","size":9,"path":"data/a.parquet","lfs":{{"oid":"{sha}","size":9,"pointerSize":1}},"xetHash":"{sha}"}}]"#
        );
        let mut tree = Tree::new();
        add_page(&mut tree, &page).unwrap();
        assert_eq!(tree.keys().collect::<Vec<_>>(), ["config.json", "data/a.parquet"]);
        assert_eq!(tree["config.json"].identity(), Identity::Git(&git));
        assert_eq!((tree["data/a.parquet"].identity(), tree["data/a.parquet"].size), (Identity::Sha256(&sha), 9));
        assert_eq!(from_kept(&to_kept(&tree).unwrap()).unwrap(), tree);
        assert_eq!(from_kept(b"{\"format_version\": 2, \"files\": {}}"), None);
        assert_eq!(from_kept(b"{\"format_ver"), None);
    }

    #[test]
    fn a_list_leads_nowhere_else() {
        let entry = |path: &str, oid: &str| format!(r#"[{{"type":"file","oid":"{oid}","size":3,"path":"{path}"}}]"#);
        let good = "a".repeat(40);
        for page in [
            entry("../x", &good),
            entry("/etc/x", &good),
            entry("a/./b", &good),
            entry("a", "../../x"),
            entry("a", "A"),
            "<html>".into(),
        ] {
            let error = add_page(&mut Tree::new(), &page).unwrap_err().to_string();
            assert!(error.contains("list of files"), "{error}");
        }
    }
}
