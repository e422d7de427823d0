//! What is kept of a policy beside its weights: what it is, and where it came from.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use engine::checkpoint::atomic;
use engine::{Error, Result};
use serde::{Deserialize, Serialize};

/// Where a policy came from, back to the base model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Provenance {
    /// The policy's name; `base` for the base model.
    pub(crate) policy: String,
    /// The hash of its weights; of a mixture, of what is mixed.
    pub(crate) model: String,
    #[serde(flatten)]
    pub(crate) made: Made,
    /// The policies that it was made from: start and reference of a training, the two ends of a merge or mixture.
    pub(crate) from: Vec<Provenance>,
}

impl Provenance {
    /// Fails unless weights with this hash, which were read from `path`, are the policy's.
    pub(super) fn check(&self, path: &Path, hash: &str) -> Result<()> {
        if hash == self.model {
            return Ok(());
        }
        if matches!(self.made, Made::Given { .. }) {
            return Err(Error::input(format!(
                "The base model {} has changed since the run began. Put it back, and run the same command again.",
                path.display()
            )));
        }
        Err(Error::input(format!(
            "The weights in {} are not those of the policy `{}` that was made there. Put them back, or delete the folder above \
             to make the policy again.",
            path.display(),
            self.policy
        )))
    }
}

/// How a policy was made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "made_by", rename_all = "snake_case")]
pub(crate) enum Made {
    /// The base model.
    Given {
        path: PathBuf,
        /// The commit that an address on the Hub meant.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        commit: Option<String>,
    },
    /// By a step.
    Training {
        step: String,
        metric: String,
        objective: String,
        /// β if it started from the base model, else β/λ.
        temperature: f64,
        data: PathBuf,
        /// The commit that an address of data on the Hub meant.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        data_commit: Option<String>,
        /// The hash of the tokens and labels that were trained on.
        data_hash: String,
        pairs: usize,
        /// The weights of the metrics by which labels or margins were made, if they were.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        label_weights: BTreeMap<String, f64>,
        seed: u64,
    },
    Merge {
        method: String,
        q: f64,
        density: Option<f64>,
        seed: u64,
    },
    Mix {
        q: f64,
    },
}

/// An adapter that was trained.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct KeptAdapter {
    /// The model that it belongs to.
    pub(super) base: PathBuf,
    /// [`engine::Adapter::hash`] of it.
    pub(super) hash: String,
}

/// `policy.json`, written last: the policy is complete.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct PolicyRecord {
    /// Names everything that the policy depends on.
    pub(super) key: String,
    /// The hash of the model that it started from, or of those that were merged.
    pub(super) reference: String,
    /// The adapter beside the checkpoint; nothing if all weights were trained.
    pub(super) adapter: Option<KeptAdapter>,
    /// The version of the program.
    pub(super) version: String,
    /// Seconds that making it took.
    pub(super) seconds: f64,
    #[serde(flatten)]
    pub(super) provenance: Provenance,
}

impl PolicyRecord {
    /// The record in a policy's folder, if the policy is complete.
    pub(super) fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join("policy.json");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("read", &path)(error)),
        };
        serde_json::from_str(&text).map(Some).map_err(|error| {
            Error::input(format!(
                "{} is damaged ({error}). Delete its folder to make the policy again.",
                path.display()
            ))
        })
    }

    /// The record in a policy's folder if the policy is complete and has this key.
    ///
    /// # Errors
    /// A policy that depends on something else than this recipe says.
    pub(super) fn finished(folder: &Path, key: &str, reference: &str) -> Result<Option<Self>> {
        let Some(record) = Self::read(folder)? else { return Ok(None) };
        if record.key == key {
            return Ok(Some(record));
        }
        let what = if record.reference == reference {
            "was made with other data or options than this recipe says"
        } else {
            "was made from another model: the base model, or a policy in between, is not what it was then"
        };
        Err(Error::input(format!(
            "The policy in {} {what}. Choose another output folder (run.out, or --out), or delete that folder to make the \
             policy again.",
            folder.display()
        )))
    }

    /// Writes the provenance into the policy's checkpoint, and then the record, which makes the policy complete.
    pub(super) fn write(&self, folder: &Path, checkpoint: &Path) -> Result<()> {
        write_json(&checkpoint.join("provenance.json"), &self.provenance)?;
        write_json(&folder.join("policy.json"), self)
    }
}

/// Writes a value as JSON for people and programs, atomically.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    atomic::write_file(path, |out| {
        serde_json::to_writer_pretty(&mut *out, value)?;
        out.write_all(b"\n")
    })
}
