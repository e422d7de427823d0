//! Where the policies of a run came from: `manifest.json`, and until that is written the record in each policy's folder.

use std::path::Path;

use evaluate::report::{Fact, Policy};
use serde::Deserialize;

use super::results::Results;
use super::{entries, fact, read_json};
use crate::pipeline::{Made, Provenance};

/// What is known of a run's making.
#[derive(Debug, Default)]
pub(super) struct Origins {
    records: Vec<Record>,
    /// Version, seed, machine and the like.
    pub(super) facts: Vec<Fact>,
}

#[derive(Debug, Deserialize)]
struct Record {
    seconds: Option<f64>,
    #[serde(flatten)]
    provenance: Provenance,
}

#[derive(Debug, Deserialize)]
struct Manifest {
    version: String,
    seed: u64,
    machine: Machine,
    policies: Vec<Record>,
}

#[derive(Debug, Deserialize)]
struct Machine {
    system: String,
    architecture: String,
    instruction_set: String,
    threads: usize,
}

impl Origins {
    pub(super) fn read(run: &Path, missing: &mut Vec<String>) -> Self {
        let mut origins = Self::default();
        origins.facts.push(fact("Run folder", run.display().to_string()));
        let manifest: Option<Manifest> = read_json(&run.join("manifest.json"), missing);
        if let Some(Manifest { version, seed, machine, policies }) = manifest {
            let Machine { system, architecture, instruction_set, threads } = machine;
            origins.facts.push(fact("Made by", format!("sacpo {version}")));
            origins.facts.push(fact("Seed", seed.to_string()));
            origins
                .facts
                .push(fact("Machine", format!("{system} {architecture}, {instruction_set}, {threads} threads")));
            origins.records = policies;
        }
        for folder in ["steps", "merges"] {
            for path in entries(&run.join(folder)) {
                if let Some(record) = read_json::<Record>(&path.join("policy.json"), missing) {
                    origins.add(record);
                }
            }
        }
        origins
    }

    /// Adds a policy and those that it came from, unless they are there.
    fn add(&mut self, record: Record) {
        for from in &record.provenance.from {
            self.add(Record { seconds: None, provenance: from.clone() });
        }
        match self.records.iter_mut().find(|known| known.provenance.policy == record.provenance.policy) {
            Some(known) => known.seconds = known.seconds.or(record.seconds),
            None => self.records.push(record),
        }
    }

    /// The step that trained a policy.
    pub(super) fn step_of(&self, name: &str) -> Option<&str> {
        match &self.records.iter().find(|record| record.provenance.policy == name)?.provenance.made {
            Made::Training { step, .. } => Some(step),
            _ => None,
        }
    }

    /// Seconds of training and merging.
    pub(super) fn seconds(&self) -> f64 {
        self.records.iter().filter_map(|record| record.seconds).sum()
    }

    /// The policies in the order of the run.
    pub(super) fn policies(&self, results: &Results) -> Vec<Policy> {
        let mut records: Vec<&Record> = self.records.iter().collect();
        records.sort_by_key(|record| results.place(&record.provenance.policy));
        records.into_iter().map(Record::policy).collect()
    }
}

impl Record {
    fn policy(&self) -> Policy {
        let Provenance { policy, model, made, .. } = &self.provenance;
        let plain = Policy {
            name: policy.clone(),
            chain: chain(&self.provenance),
            made: String::new(),
            parameter: None,
            data: None,
            data_hash: None,
            weights: model.clone(),
            seconds: self.seconds.filter(|seconds| *seconds > 0.0),
        };
        match made {
            Made::Given { path, commit } => {
                let commit = commit.as_ref().map(|commit| format!(" at {commit}")).unwrap_or_default();
                Policy { made: format!("given: {}{commit}", path.display()), ..plain }
            }
            Made::Training { objective, metric, temperature, data, data_commit, data_hash, pairs, seed, .. } => {
                // a later step's temperature is β/λ
                let first = self.provenance.from.iter().all(|from| matches!(from.made, Made::Given { .. }));
                let commit = data_commit.as_ref().map(|commit| format!(" at {commit}")).unwrap_or_default();
                Policy {
                    made: format!("{objective} on {metric}, {pairs} rows, seed {seed}"),
                    parameter: Some(format!("{} = {temperature}", if first { "β" } else { "β/λ" })),
                    data: Some(format!("{}{commit}", data.display())),
                    data_hash: Some(data_hash.clone()),
                    ..plain
                }
            }
            Made::Merge { method, q, .. } => {
                Policy { made: format!("weights merged, {method}"), parameter: Some(format!("q = {q}")), ..plain }
            }
            Made::Mix { q } => Policy { made: "logits mixed".into(), parameter: Some(format!("q = {q}")), ..plain },
        }
    }
}

/// The way to a policy from the base model.
fn chain(provenance: &Provenance) -> String {
    match provenance.from.as_slice() {
        [] => provenance.policy.clone(),
        [one] => format!("{} → {}", chain(one), provenance.policy),
        several => {
            let names: Vec<&str> = several.iter().map(|from| from.policy.as_str()).collect();
            format!("({}) → {}", names.join(", "), provenance.policy)
        }
    }
}
