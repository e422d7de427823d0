//! Policies between two others: merged weights, or logits mixed at decode time.

use std::path::{Path, PathBuf};
use std::time::Instant;

use align::merge::{self, Options};
use engine::Result;
use engine::checkpoint::load_model;

use super::record::{Made, PolicyRecord, Provenance};
use super::{Policy, Run, index_of};
use crate::policy::PolicyName;
use crate::ui;
use sacpo::recipe::{Merging, PlannedBlend};

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

impl From<&PlannedBlend> for Between {
    /// The plan's trained policies are the run's, after the base model.
    fn from(planned: &PlannedBlend) -> Self {
        Self {
            name: planned.name.clone(),
            ends: planned.ends.map(index_of),
            q: planned.q,
            extrapolate: planned.extrapolate,
        }
    }
}

impl Between {
    /// How it is made.
    pub(super) fn made(&self, run: &Run<'_>, merging: Option<Merging>) -> Made {
        match merging {
            Some(Merging { method, density }) => {
                Made::Merge { method: method.name().into(), q: self.q, density, seed: run.recipe.run.seed }
            }
            None => Made::Mix { q: self.q },
        }
    }

    /// The policy whose logits are mixed. Nothing is written.
    pub(super) fn mixed(&self, run: &Run<'_>) -> Policy {
        let [a, b] = self.ends.map(|end| &run.policies[end]);
        let path = |policy: &Policy| policy.path().cloned().unwrap_or_default();
        let source = PolicyName::Mix { a: path(a), b: path(b), q: self.q };
        let model = self.mixed_hash(&|index| run.hash(index)).unwrap_or_default();
        self.policy(run, source, model, self.made(run, None), 0.0)
    }

    /// The hash of the policy whose logits are mixed, if both ends are known; `hash` gives those of policies by their index.
    pub(super) fn mixed_hash(&self, hash: &dyn Fn(usize) -> Option<String>) -> Option<String> {
        let [a, b] = self.ends.map(hash);
        Some(hash_of(&["mix", &a?, &b?, &self.q.to_string()]))
    }

    /// The policy whose weights are merged, and kept, unless it is there already.
    pub(super) fn merged(&self, run: &Run<'_>, merging: Merging) -> Result<Policy> {
        let folder = self.folder(run);
        let checkpoint = folder.join("checkpoint");
        let [a, b] = self.ends.map(|end| &run.policies[end]);
        let base = &run.policies[0];
        let method = merging.method;
        let seed = run.recipe.run.seed;
        let made = self.made(run, Some(merging));
        if let Some(record) = self.finished(run, merging, &|index| run.hash(index))? {
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
        let merged = merge::merge(&ends, below, &options, &checkpoint, &mut |done, total| {
            bar.set_length(total as u64);
            ui::advance(&bar)(done)
        })?;
        bar.finish_and_clear();
        // what was merged is what is written down, or the merge never becomes complete
        for (input, policy) in merged.models.iter().zip([a, b]).chain(merged.base.iter().zip([base])) {
            policy.provenance.check(&input.path, &input.hash)?;
        }
        let seconds = start.elapsed().as_secs_f64();
        let model = load_model(&checkpoint)?.hash();
        let policy = self.policy(run, PolicyName::Model(checkpoint.clone()), model, made, seconds);
        let [key, reference] = self.keys(run, merging, [a.hash(), b.hash()]);
        let record = PolicyRecord {
            key,
            reference,
            adapter: None,
            version: env!("CARGO_PKG_VERSION").into(),
            seconds,
            provenance: policy.provenance.clone(),
        };
        record.write(&folder, &checkpoint)?;
        Ok(policy)
    }

    fn folder(&self, run: &Run<'_>) -> PathBuf {
        run.folder.path.join("merges").join(&self.name)
    }

    /// Names everything that the merged policy depends on, and what is merged, by the hashes of the ends.
    fn keys(&self, run: &Run<'_>, merging: Merging, [a, b]: [&str; 2]) -> [String; 2] {
        let Merging { method, density } = merging;
        let base = if method.needs_base() { run.policies[0].hash() } else { "" };
        let reference = hash_of(&[a, b, base]);
        let key = hash_of(&[&reference, &format!("{method:?} {density:?} {} {}", self.q, run.recipe.run.seed)]);
        [key, reference]
    }

    /// The record of the merged policy if it is complete and the ends are known; `hash` gives those of policies by their
    /// index, as far as they are.
    ///
    /// # Errors
    /// A policy that depends on something else.
    pub(super) fn finished(
        &self,
        run: &Run<'_>,
        merging: Merging,
        hash: &dyn Fn(usize) -> Option<String>,
    ) -> Result<Option<PolicyRecord>> {
        let [Some(a), Some(b)] = self.ends.map(hash) else { return Ok(None) };
        let [key, reference] = self.keys(run, merging, [&a, &b]);
        PolicyRecord::finished(&self.folder(run), &key, &reference)
    }

    fn policy(&self, run: &Run<'_>, source: PolicyName, model: String, made: Made, seconds: f64) -> Policy {
        let from = self.ends.map(|end| run.policies[end].provenance.clone()).to_vec();
        Policy {
            step: None,
            beta_over_lambda: None,
            q: Some(self.q),
            origin: None,
            source,
            adapter: None,
            validation: Vec::new(),
            seconds,
            provenance: Provenance { policy: self.name.clone(), model, made, from },
        }
    }
}

fn hash_of(parts: &[&str]) -> String {
    blake3::hash(parts.join("\n").as_bytes()).to_hex().to_string()
}
