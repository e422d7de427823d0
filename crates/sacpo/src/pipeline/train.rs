//! The training of one policy, and its reuse when it is complete.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::PathBuf;

use align::data::{Dataset, relabel, set_margins};
use align::log::read_metric;
use align::step::{Aligned, Alignment};
use align::trainer::TrainOptions;
use engine::checkpoint::Checkpoint;
use engine::{Adapter, Error, ModelConfig, Result};

use super::record::{KeptAdapter, Made, PolicyRecord, Provenance};
use super::{Policy, Run, begun, judge};
use crate::policy::PolicyName;
use crate::tracking::{About, tracked};
use crate::ui;
use sacpo::recipe::{PreviousAdapter, Step};

/// The folder of a policy's adapter, beside its checkpoint.
const ADAPTER: &str = "adapter";

/// A policy to train.
pub(super) struct Training {
    /// The policy's name.
    pub(super) name: String,
    /// The index of its step in the recipe.
    pub(super) step: usize,
    /// The index among the run's policies of its start and reference.
    pub(super) parent: usize,
    /// The temperature of its objective.
    pub(super) beta: f64,
    /// Weights of judged metrics from which labels are drawn anew.
    pub(super) relabel: Option<BTreeMap<String, f64>>,
}

impl Training {
    fn step<'r>(&self, run: &'r Run<'_>) -> &'r Step {
        &run.recipe.steps[self.step]
    }

    pub(super) fn folder(&self, run: &Run<'_>) -> PathBuf {
        run.folder.path.join("steps").join(&self.name)
    }

    fn options(&self, run: &Run<'_>) -> TrainOptions {
        options(self.step(run), run.recipe.run.seed, run.recipe.run.memory_gib)
    }

    /// The weights by which labels or margins are made.
    fn label_weights<'a>(&'a self, step: &'a Step) -> Option<&'a BTreeMap<String, f64>> {
        self.relabel.as_ref().or(step.margin.as_ref())
    }

    /// Names everything that the policy depends on; `hash` gives those of policies by their index, as far as they are known.
    fn key(&self, run: &Run<'_>, hash: &dyn Fn(usize) -> Option<String>) -> Result<Option<String>> {
        let step = self.step(run);
        let data = &run.data[self.step];
        let Some(reference) = hash(self.parent) else { return Ok(None) };
        let (objective, course) = (format!("{:?}", step.objective_at(self.beta)?), self.options(run).course());
        let held_out = match step.train.validate_every {
            Some(_) => data.validation.fingerprint(),
            None => String::new(),
        };
        let stacked = if self.stacks(run) { "stacked" } else { "" };
        let mut labels = String::new();
        for (metric, weight) in self.label_weights(step).into_iter().flatten() {
            let Some(judge) = judge::identity(run, metric, hash) else { return Ok(None) };
            let made = if self.relabel.is_some() { "labels" } else { "margins" };
            labels += &format!("{made} {weight} {judge} ");
        }
        let parts = [&*reference, &objective, &course, &data.train.fingerprint(), &held_out, stacked, &labels];
        Ok(Some(blake3::hash(parts.join("\n").as_bytes()).to_hex().to_string()))
    }

    /// The record of the policy if it is complete and all that it depends on is known.
    ///
    /// # Errors
    /// A policy, or the state of a training, that depends on something else.
    pub(super) fn finished(
        &self,
        run: &Run<'_>,
        hash: &dyn Fn(usize) -> Option<String>,
    ) -> Result<Option<PolicyRecord>> {
        let (Some(key), Some(reference)) = (self.key(run, hash)?, hash(self.parent)) else { return Ok(None) };
        let record = PolicyRecord::finished(&self.folder(run), &key, &reference)?;
        if record.is_none() {
            begun::check(&run.folder.cache(), &self.folder(run), &key)?;
        }
        Ok(record)
    }

    /// The policy, trained unless it is complete.
    pub(super) fn policy(&self, run: &Run<'_>) -> Result<Policy> {
        let record = match self.finished(run, &|index| run.hash(index))? {
            Some(record) => {
                ui::say(format!("Policy {}: complete.", self.name));
                record
            }
            None => self.train(run)?,
        };
        Ok(Policy {
            step: Some(self.step(run).name.clone()),
            beta_over_lambda: (self.parent != 0).then_some(self.beta),
            q: None,
            origin: Some((self.beta, self.parent)),
            source: PolicyName::Model(self.folder(run).join("checkpoint")),
            adapter: record.adapter,
            validation: Vec::new(),
            seconds: record.seconds,
            provenance: record.provenance,
        })
    }

    /// Whether the adapter goes on top of that of the policy before.
    fn stacks(&self, run: &Run<'_>) -> bool {
        self.parent != 0 && self.step(run).train.lora_previous == PreviousAdapter::Stack
    }

    /// The model that this policy's adapter belongs to, as a path that holds from any folder.
    fn adapter_base(&self, run: &Run<'_>) -> Result<PathBuf> {
        let parent = &run.policies[self.parent];
        let below = parent.adapter.as_ref().map(|adapter| &adapter.base).filter(|_| self.stacks(run));
        let below = below.or(parent.path()).map(PathBuf::as_path).unwrap_or(run.recipe.model.base.path());
        std::path::absolute(below).map_err(Error::io("find", below))
    }

    /// The adapter of the policy before, if this policy's own is to be stacked on it.
    fn adapter_below(&self, run: &Run<'_>, config: &ModelConfig) -> Result<Option<Adapter>> {
        let parent = &run.policies[self.parent];
        let Some(path) = parent.path().filter(|_| self.stacks(run)) else { return Ok(None) };
        let known = parent.adapter.as_ref().map(|adapter| &adapter.hash);
        let adapter = Adapter::load(&path.with_file_name(ADAPTER), config).and_then(|adapter| {
            if known == Some(&adapter.hash()) {
                Ok(adapter)
            } else {
                Err(Error::input("It is not the one that was trained."))
            }
        });
        adapter.map(Some).map_err(|error| {
            Error::input(format!(
                "The adapter of the policy `{}`, on which the next is to be stacked, is not usable. {error} Put it back, or \
                 delete the folder above to train the policy again.",
                parent.name()
            ))
        })
    }

    /// The data with the labels and margins that the step asks for.
    fn labelled<'r>(&self, run: &'r Run<'_>, data: &'r Dataset) -> Result<Cow<'r, Dataset>> {
        let step = self.step(run);
        let (Some(weights), Dataset::Pairs(pairs)) = (self.label_weights(step), data) else {
            return Ok(Cow::Borrowed(data));
        };
        let margins = judge::margins(run, weights, pairs, step.train.micro_batch_tokens)?;
        let mut pairs = pairs.clone();
        if self.relabel.is_some() {
            let swapped = relabel(&mut pairs, &margins, run.recipe.run.seed);
            ui::say(format!("  {swapped} of {} labels are other ones than in the data.", pairs.len()));
        } else {
            set_margins(&mut pairs, &margins);
        }
        Ok(Cow::Owned(Dataset::Pairs(pairs)))
    }

    /// What tracking servers are told of the training.
    fn about(&self, run: &Run<'_>, objective: &str, examples: usize) -> About {
        let step = self.step(run);
        let base = run.recipe.model.base.to_string();
        let mut parameters = parameters(step, &self.options(run), base, examples);
        parameters.extend([
            ("step", step.name.clone()),
            ("objective", objective.to_owned()),
            ("temperature", self.beta.to_string()),
            ("start", run.policies[self.parent].name().to_owned()),
        ]);
        About { name: self.name.clone(), parameters }
    }

    /// Trains the policy from its parent, and keeps it.
    fn train(&self, run: &Run<'_>) -> Result<PolicyRecord> {
        let step = self.step(run);
        let objective = step.objective_at(self.beta)?;
        ui::say(format!("Policy {}: {} at temperature {}.", self.name, objective.name(), self.beta));
        let parent = &run.policies[self.parent];
        let base = run.base;
        let config = &base.config;
        let [data, validation] =
            [&run.data[self.step].train, &run.data[self.step].validation].map(|data| self.labelled(run, data));
        let (data, validation) = (data?, validation?);
        let adapter_below = self.adapter_below(run, config)?;
        let folder = self.folder(run);
        let alignment = Alignment {
            start: parent.load()?.first.model,
            data: &data,
            validation: &validation,
            objective: &objective,
            options: &self.options(run),
            folder: &folder,
            cache: &run.folder.cache(),
        };
        let key = self.key(run, &|index| run.hash(index))?.unwrap_or_default();
        begun::note(&run.folder.cache(), &folder, &key)?;
        let about = self.about(run, objective.name(), data.len());
        let Aligned { policy, adapter, records } = tracked(&folder, &about, |monitor| alignment.run(monitor))?;
        let adapter = match (adapter, &adapter_below) {
            (Some(adapter), Some(below)) => Some(Adapter::stack(config, &[below, &adapter])?),
            (adapter, _) => adapter,
        };
        let kept = |adapter: &Adapter| Ok(KeptAdapter { base: self.adapter_base(run)?, hash: adapter.hash() });
        let seconds = read_metric(&folder.join("metrics.jsonl"), "seconds")?.into_iter().map(|(_, s)| s).sum();
        let record = PolicyRecord {
            key,
            reference: parent.hash().to_owned(),
            adapter: adapter.as_ref().map(kept).transpose()?,
            version: env!("CARGO_PKG_VERSION").into(),
            seconds,
            provenance: Provenance {
                policy: self.name.clone(),
                model: policy.hash(),
                made: Made::Training {
                    step: step.name.clone(),
                    metric: step.metric.clone(),
                    objective: objective.name().into(),
                    temperature: self.beta,
                    data: step.data.given.clone(),
                    data_commit: step.data.commit(),
                    data_hash: data.fingerprint(),
                    pairs: data.len(),
                    label_weights: self.label_weights(step).cloned().unwrap_or_default(),
                    seed: run.recipe.run.seed,
                },
                from: vec![parent.provenance.clone()],
            },
        };
        let checkpoint =
            Checkpoint { model: policy, tokenizer: base.tokenizer.clone(), generation: base.generation.clone() };
        checkpoint.save(&folder.join("checkpoint"))?;
        if let (Some(adapter), Some(kept)) = (adapter, &record.adapter) {
            adapter.save(&kept.base, &folder.join(ADAPTER))?;
        }
        record.write(&folder, &folder.join("checkpoint"))?;
        begun::discard(&run.folder.cache(), &folder)?;
        if let Some(last) = records.last() {
            ui::say(format!("  {} steps in {seconds:.0} s; the last batch's loss was {:.4}.", last.step, last.loss));
        }
        if step.train.patience.is_some() {
            let losses = read_metric(&folder.join("metrics.jsonl"), "eval_loss")?;
            if let Some((step, loss)) = losses.into_iter().min_by(|(_, a), (_, b)| a.total_cmp(b)) {
                ui::say(format!("  Kept are the weights after step {step}, of the lowest validation loss: {loss:.4}."));
            }
        }
        Ok(record)
    }
}

/// How a step trains, as the trainer takes it.
pub(crate) fn options(step: &Step, seed: u64, memory_gib: Option<f64>) -> TrainOptions {
    let train = &step.train;
    TrainOptions {
        lora: train.lora(),
        dtype: train.dtype,
        optimizer: train.optimizer,
        learning_rate: train.learning_rate,
        schedule: train.schedule,
        warmup_ratio: train.warmup_ratio,
        epochs: train.epochs,
        batch_size: train.batch_size,
        micro_batch_tokens: train.micro_batch_tokens,
        memory_bytes: memory_gib.map(|gib| (gib * (1u64 << 30) as f64) as usize),
        max_grad_norm: train.max_grad_norm,
        weight_decay: train.weight_decay,
        seed,
        save_every: train.save_every as u64,
        validate_every: train.validate_every.unwrap_or(0) as u64,
        patience: train.patience.map(|patience| patience as u64),
        ema_decay: train.ema_decay,
    }
}

/// What decides the result of any training, for tracking servers.
pub(crate) fn parameters(
    step: &Step,
    options: &TrainOptions,
    base: String,
    examples: usize,
) -> Vec<(&'static str, String)> {
    let lora_rank = options.lora.as_ref().map_or_else(|| "none".into(), |lora| lora.rank.to_string());
    vec![
        ("base", base),
        ("metric", step.metric.clone()),
        ("data", step.data.to_string()),
        ("examples", examples.to_string()),
        ("optimizer", options.optimizer.name().to_owned()),
        ("learning_rate", options.learning_rate.to_string()),
        ("epochs", options.epochs.to_string()),
        ("batch_size", options.batch_size.to_string()),
        ("lora_rank", lora_rank),
        ("seed", options.seed.to_string()),
    ]
}
