//! A repository at one commit: what it has, and what of it is on this machine.

use std::path::PathBuf;

use align::data::shard;
use engine::{Error, Result};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;

use super::address::{Repo, is_commit};
use super::cache::Cache;
use super::client::{Client, Subject};
use super::download::{download, is_whole};
use super::settings::Settings;
use super::tree::{Tree, add_page};
use crate::{interrupt, ui};

/// What may stand in a part of an address as it is.
const PART: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// The same of a path.
const PATH: &AsciiSet = &PART.remove(b'/');

/// A repository at one commit.
pub(super) struct Snapshot {
    pub(super) repo: Repo,
    pub(super) commit: String,
    /// All its files; nothing if they were never listed, and only the cache may be used.
    tree: Option<Tree>,
    cache: Cache,
    /// Nothing if only the cache may be used.
    client: Option<Client>,
}

/// What the Hub's interface says of a revision.
#[derive(Deserialize)]
struct Revision {
    sha: String,
}

impl Snapshot {
    /// Looks up the commit of a revision and the list of its files: at the Hub, unless the cache knows both for certain.
    ///
    /// # Errors
    /// What the Hub refuses; offline, what the cache does not know.
    pub(super) fn open(repo: &Repo, settings: &Settings) -> Result<Self> {
        let cache = Cache::of(repo, &settings.cache);
        let repo = repo.clone();
        if settings.offline {
            let known = repo.pinned().map(str::to_owned).or_else(|| cache.commit_of(&repo.revision));
            let commit = known.filter(|commit| cache.snapshot(commit).is_dir()).ok_or_else(|| {
                Error::input(format!(
                    "{repo} is not in the cache {}, and HF_HUB_OFFLINE forbids to fetch it. Run the command once without it, or set \
                     HF_HOME to the cache that has it.",
                    settings.cache.display()
                ))
            })?;
            let tree = cache.tree(&commit);
            return Ok(Self { repo, commit, tree, cache, client: None });
        }
        let client = Client::new(settings);
        if let Some(commit) = repo.pinned().map(str::to_owned)
            && let Some(tree) = cache.tree(&commit)
        {
            return Ok(Self { repo, commit, tree: Some(tree), cache, client: Some(client) });
        }
        let commit = commit_of(&repo, &client)?;
        if repo.pinned().is_none() {
            ui::say(format!("{repo} is at commit {commit}."));
        }
        // a cache that cannot be written to can still be read
        let _kept = cache.keep_commit(&repo.revision, &commit);
        let tree = match cache.tree(&commit) {
            Some(tree) => tree,
            None => {
                let tree = list(&repo, &commit, &client)?;
                let _kept = cache.keep_tree(&commit, &tree);
                tree
            }
        };
        Ok(Self { repo, commit, tree: Some(tree), cache, client: Some(client) })
    }

    /// The paths of its files.
    pub(super) fn paths(&self) -> Vec<String> {
        match &self.tree {
            Some(tree) => tree.keys().cloned().collect(),
            None => self.cache.present(&self.commit),
        }
    }

    /// Where a file or folder is on this machine when it is fetched.
    pub(super) fn local(&self, path: &str) -> PathBuf {
        match path {
            "" => self.cache.snapshot(&self.commit),
            path => self.cache.snapshot(&self.commit).join(path),
        }
    }

    /// Fetches those of these files that are not here yet.
    ///
    /// # Errors
    /// What does not come, or comes as something else than the list says; offline, what is not here.
    pub(super) fn fetch(&self, paths: &[String]) -> Result<()> {
        let missing: Vec<&String> = paths.iter().filter(|path| !self.is_here(path)).collect();
        let (Some(client), Some(tree)) = (&self.client, &self.tree) else {
            return match missing.first() {
                None => self.check_shards(paths),
                Some(first) => Err(Error::input(format!(
                    "{} of the files of {} that are needed are not in the cache, {first} among them, and HF_HUB_OFFLINE forbids \
                     to fetch them. Run the command once without it.",
                    missing.len(),
                    self.repo
                ))),
            };
        };
        if missing.is_empty() {
            return Ok(());
        }
        let bytes = missing.iter().map(|path| tree[*path].size).sum();
        let mut bar = ui::TransferBar::new(&self.repo.to_string(), missing.len(), bytes);
        for path in missing {
            let entry = &tree[path];
            let url = client.url(&format!(
                "{}/resolve/{}/{}",
                self.repo.page(),
                self.commit,
                utf8_percent_encode(path, PATH)
            ));
            let subject = Subject { repo: &self.repo, file: Some(path) };
            download(client, &self.cache, &url, entry, subject, &mut bar)?;
            self.cache.link(&self.commit, path, entry.identity().hash())?;
            bar.completed(entry.size);
        }
        Ok(())
    }

    /// Whether a file is on this machine, in the size that the list says.
    fn is_here(&self, path: &str) -> bool {
        let local = self.local(path);
        self.tree.as_ref().map_or_else(|| local.is_file(), |tree| is_whole(&local, tree[path].size))
    }

    /// Checks that parts which are numbered are all here, as far as no list of files tells.
    fn check_shards(&self, paths: &[String]) -> Result<()> {
        if self.tree.is_some() {
            return Ok(());
        }
        for part in paths.iter().filter_map(|path| shard(path)) {
            let there = paths.iter().filter(|path| shard(path).is_some_and(|other| other == part)).count();
            if there != part.count {
                return Err(Error::input(format!(
                    "Of the {} parts of {} of {}, {there} are in the cache, and HF_HUB_OFFLINE forbids to fetch the others. Run the \
                     command once without it.",
                    part.count, part.of, self.repo
                )));
            }
        }
        Ok(())
    }
}

/// The commit that a revision is now.
fn commit_of(repo: &Repo, client: &Client) -> Result<String> {
    let revision = utf8_percent_encode(&repo.revision, PART);
    let url = client.url(&format!("api/{}/{}/revision/{revision}", repo.kind.plural(), repo.id));
    let (text, _) = client.page(&url, Subject { repo, file: None })?;
    let found: Option<Revision> = serde_json::from_str(&text).ok();
    found.map(|found| found.sha).filter(|sha| is_commit(sha)).ok_or_else(|| {
        Error::Failed(format!(
            "{url} does not answer as a Hub does. Check HF_ENDPOINT, and whether a proxy stands in between."
        ))
    })
}

/// All files at a commit.
fn list(repo: &Repo, commit: &str, client: &Client) -> Result<Tree> {
    let mut tree = Tree::new();
    let mut url = Some(client.url(&format!("api/{}/{}/tree/{commit}?recursive=true", repo.kind.plural(), repo.id)));
    while let Some(page) = url {
        interrupt::check()?;
        let (text, next) = client.page(&page, Subject { repo, file: None })?;
        add_page(&mut tree, &text)?;
        url = next;
    }
    Ok(tree)
}
