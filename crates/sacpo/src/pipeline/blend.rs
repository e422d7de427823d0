//! Policies between two others: merged weights, or logits mixed at decode time.

use std::path::Path;
use std::time::Instant;

use align::merge::{self, Method, Options};
use engine::Result;
use engine::checkpoint::load_model;

use super::record::{Made, PolicyRecord, Provenance};
use super::{Policy, Run};
use crate::policy::PolicyName;
use crate::ui;
use sacpo::recipe::Merging;

/// A policy between two others.
pub(super) struct Between {
    /// The policy's name.
    pub(super) name: String,
    /// The indices among the run's policies of those at q = 0 and q = 1. Both have weights of their own.
    pub(super) ends: [usize; 2],
    /// The share of the second.
    pub(super) q: f64,
    /// Whether q may lie outside 0 to 1.
    pub(super) extrapolate: bool,
}

impl Between {
    /// The policy whose logits are mixed. Nothing is written.
    pub(super) fn mixed(&self, run: &Run<'_>) -> Policy {
        let [a, b] = self.ends.map(|end| &run.policies[end]);
        let path = |policy: &Policy| policy.path().cloned().unwrap_or_default();
        let source = PolicyName::Mix { a: path(a), b: path(b), q: self.q };
        let model = hash(&["mix", a.hash(), b.hash(), &self.q.to_string()]);
        self.policy(run, source, model, Made::Mix { q: self.q }, 0.0)
    }

    /// The policy whose weights are merged, and kept, unless it is there already.
    pub(super) fn merged(&self, run: &Run<'_>, merging: Merging) -> Result<Policy> {
        let folder = run.folder.path.join("merges").join(&self.name);
        let checkpoint = folder.join("checkpoint");
        let [a, b] = self.ends.map(|end| &run.policies[end]);
        let base = &run.policies[0];
        let method = merging.method;
        let seed = run.recipe.run.seed;
        let reference = reference_of(method, [a.hash(), b.hash()], base.hash());
        let key = hash(&[&reference, &format!("{method:?} {:?} {} {seed}", merging.density, self.q)]);
        let made = Made::Merge { method: method.name().into(), q: self.q, density: merging.density, seed };
        if let Some(record) = PolicyRecord::finished(&folder, &key, &reference)? {
            ui::say(format!("Policy {}: complete.", self.name));
            let Provenance { model, .. } = record.provenance;
            return Ok(self.policy(run, PolicyName::Model(checkpoint), model, made, record.seconds));
        }
        ui::say(format!("Policy {}: {} and {} merged by {}.", self.name, a.name(), b.name(), method.name()));
        let start = Instant::now();
        let options = Options {
            method,
            weights: vec![1.0 - self.q, self.q],
            normalise: method.normalises(),
            density: merging.density.unwrap_or(1.0),
            seed,
            extrapolate: self.extrapolate,
        };
        let ends = [a, b].map(|policy| policy.path().cloned().unwrap_or_default());
        let below = base.path().filter(|_| method.needs_base()).map(Path::new);
        let bar = ui::bar(0, "weights");
        merge::merge(&ends, below, &options, &checkpoint, &mut |done, total| {
            bar.set_length(total as u64);
            ui::advance(&bar)(done)
        })?;
        bar.finish_and_clear();
        let seconds = start.elapsed().as_secs_f64();
        let model = load_model(&checkpoint)?.hash();
        let policy = self.policy(run, PolicyName::Model(checkpoint.clone()), model, made, seconds);
        let record = PolicyRecord {
            key,
            reference,
            adapter_base: None,
            version: env!("CARGO_PKG_VERSION").into(),
            seconds,
            provenance: policy.provenance.clone(),
        };
        record.write(&folder, &checkpoint)?;
        Ok(policy)
    }

    fn policy(&self, run: &Run<'_>, source: PolicyName, model: String, made: Made, seconds: f64) -> Policy {
        let from = self.ends.map(|end| run.policies[end].provenance.clone()).to_vec();
        Policy {
            step: None,
            beta_over_lambda: None,
            q: Some(self.q),
            origin: None,
            source,
            adapter_base: None,
            validation: Vec::new(),
            seconds,
            provenance: Provenance { policy: self.name.clone(), model, made, from },
        }
    }
}

/// Names what is merged, by the hashes of the ends and the base model.
pub(super) fn reference_of(method: Method, [a, b]: [&str; 2], base: &str) -> String {
    hash(&[a, b, if method.needs_base() { base } else { "" }])
}

fn hash(parts: &[&str]) -> String {
    blake3::hash(parts.join("\n").as_bytes()).to_hex().to_string()
}
