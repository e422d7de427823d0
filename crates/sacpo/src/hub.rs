//! Models and data from the Hugging Face Hub.
//!
//! An address such as `hf://datasets/OWNER/NAME/data/train-*.parquet` becomes a path on this machine before anything else
//! looks at it. What is fetched is kept in the cache of the Python package huggingface_hub ([`cache`]), and shared with it.
//!
//! Three requests of the Hub's interface are needed: which commit a revision is, which files it has with their sizes and
//! hashes, and the content of a file. The crate `hf-hub` makes them too, but up to version 0.5 sends the token to the servers
//! that files are redirected to, does not check what it receives, and does not know `HF_TOKEN`, `HF_HUB_CACHE` or
//! `HF_HUB_OFFLINE`; from version 1 on it needs an asynchronous runtime and the libraries of the Hub's own protocol.

mod address;
mod cache;
mod choice;
mod client;
mod download;
mod settings;
mod snapshot;
mod tree;

use std::cell::LazyCell;
use std::path::Path;

use engine::{Error, Result};
use sacpo::recipe::{ExternalSource, Fetched, Recipe};

use self::address::{Address, Kind, SCHEME};
use self::cache::Cache;
use self::settings::Settings;
use self::snapshot::Snapshot;

/// What an address is to lead to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// Pairs, labelled responses or prompts.
    Data,
    /// A model or an adapter.
    Model,
    /// What of a model is beside its weights.
    Tokenizer,
}

/// The Hub as one command sees it: each revision is looked up once, so that all addresses mean the same commit.
pub(crate) struct Hub {
    settings: LazyCell<Settings>,
    snapshots: Vec<Snapshot>,
}

impl Hub {
    /// The Hub that the environment names.
    pub(crate) fn new() -> Self {
        Self { settings: LazyCell::new(Settings::from_environment), snapshots: Vec::new() }
    }

    /// Fetches what an address leads to, as far as it is not in the cache. Any other path is left alone: nothing is returned.
    ///
    /// # Errors
    /// An address that is none, or leads to nothing that can be read; what the Hub refuses or does not bring whole;
    /// [`Error::Interrupted`].
    pub(crate) fn fetch(&mut self, path: &Path, content: Content) -> Result<Option<Fetched>> {
        let Some(address) = path.to_str().map(Address::parse).transpose()?.flatten() else {
            return check_local(path, content).map(|()| None);
        };
        if content != Content::Data && address.repo.kind == Kind::Dataset {
            return Err(Error::input(format!(
                "{address} is a data set, but a model is needed here. Write hf://OWNER/NAME."
            )));
        }
        if let Some(found) = self.pinned_file(&address) {
            return Ok(Some(found));
        }
        let snapshot = self.snapshot(&address)?;
        let paths = snapshot.paths();
        if content == Content::Data {
            snapshot.fetch(&choice::data(&address, &paths)?)?;
        } else {
            let files = choice::model(&address, &paths)?;
            snapshot.fetch(&files)?;
            if content == Content::Model && files != [&*address.path] {
                let read = |path: &str| {
                    let path = snapshot.local(path);
                    std::fs::read(&path).map_err(Error::io("read", &path))
                };
                snapshot.fetch(&choice::weights(&address, &paths, read)?)?;
            }
        }
        Ok(Some(Fetched { path: snapshot.local(&address.path), commit: snapshot.commit.clone() }))
    }

    /// Fetches all that a recipe needs.
    ///
    /// # Errors
    /// As [`Hub::fetch`].
    pub(crate) fn fetch_recipe(&mut self, recipe: &mut Recipe) -> Result<()> {
        for location in recipe.model_locations() {
            location.fetched = self.fetch(&location.given, Content::Model)?;
        }
        for location in recipe.data_locations() {
            location.fetched = self.fetch(&location.given, Content::Data)?;
        }
        for policy in &mut recipe.evaluate.policies {
            let ExternalSource::Model { given, fetched } = &mut policy.source else { continue };
            let mut here = given.clone();
            for path in here.models_mut() {
                if let Some(found) = self.fetch(path, Content::Model)? {
                    *path = found.path;
                }
            }
            *fetched = (here != *given).then_some(here);
        }
        Ok(())
    }

    /// A file at a commit that is in the cache: nothing need be looked up.
    fn pinned_file(&self, address: &Address) -> Option<Fetched> {
        let commit = address.repo.pinned().filter(|_| !address.path.is_empty())?;
        let cache = Cache::of(&address.repo, &self.settings.cache);
        let path = cache.snapshot(commit).join(&address.path);
        // where the list of files is known, sizes are compared
        (cache.tree(commit).is_none() && path.is_file()).then(|| Fetched { path, commit: commit.to_owned() })
    }

    fn snapshot(&mut self, address: &Address) -> Result<&Snapshot> {
        let known = self.snapshots.iter().position(|snapshot| snapshot.repo == address.repo);
        let index = match known {
            Some(index) => index,
            None => {
                self.snapshots.push(Snapshot::open(&address.repo, &self.settings)?);
                self.snapshots.len() - 1
            }
        };
        Ok(&self.snapshots[index])
    }
}

/// Fails where a model's name on the Hub is given like a path.
fn check_local(path: &Path, content: Content) -> Result<()> {
    if content == Content::Data || path.exists() {
        return Ok(());
    }
    match path.to_str().map(|name| Address::parse(&format!("{SCHEME}{name}"))) {
        Some(Ok(Some(Address { path: below, .. }))) if below.is_empty() => Err(Error::input(format!(
            "There is no model at {0}. Check the path; the model of that name on the Hugging Face Hub is written hf://{0}.",
            path.display()
        ))),
        _ => Ok(()),
    }
}
