//! From a recipe to policies: the stages of a run, each done once.
//!
//! [`prepare`] reads and checks all that goes in before [`run`] writes anything.
//!
//! ```text
//! OUT/recipe.toml            the recipe with all defaults
//! OUT/steps/NAME/            metrics.jsonl, checkpoint/, policy.json (written last: the policy is complete);
//!                            adapter/ where an adapter was trained, which is folded into the checkpoint
//! OUT/cache/                 log-probabilities that no later run needs to compute again
//! ```

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use align::log::read_metric;
use align::objective::Objective;
use align::reference;
use align::step::{self, Aligned, Alignment, PreferenceReport};
use align::trainer::TrainOptions;
use engine::checkpoint::{Checkpoint, atomic, describe};
use engine::{Adapter, Error, LoraOptions, Model, ModelConfig, Result};
use serde::{Deserialize, Serialize};

use crate::load::{StepData, load_data, warn_of_objectives};
use crate::ui;
use sacpo::recipe::{PlannedStep, PreviousAdapter, Recipe, Step};

/// The folder of a policy's adapter, beside its checkpoint.
const ADAPTER: &str = "adapter";

/// A policy of a run: the base model, or what a step made.
pub(crate) struct Policy {
    /// `base`, or the planned step's name.
    pub(crate) name: String,
    /// The step's name; nothing for the base model.
    pub(crate) step: Option<String>,
    pub(crate) beta_over_lambda: Option<f64>,
    /// The temperature of its objective, and the index of the policy that it started from; nothing for the base model.
    pub(crate) origin: Option<(f64, usize)>,
    /// Where the model is.
    pub(crate) path: PathBuf,
    /// The hash of its weights.
    model: String,
    /// The model that its adapter belongs to, if one was trained.
    adapter_base: Option<PathBuf>,
    /// Ranking of each step's held-out pairs, in the order of the steps.
    pub(crate) validation: Vec<PreferenceReport>,
    /// Seconds of training, also of the calls before this one; 0 for the base model.
    pub(crate) seconds: f64,
}

/// What goes into a run.
pub(crate) struct Inputs {
    /// The base model.
    pub(crate) base: Checkpoint,
    data: Vec<StepData>,
}

/// What a run has made.
pub(crate) struct Outcome {
    /// The base model first, then the plan's policies.
    pub(crate) policies: Vec<Policy>,
    pub(crate) data: Vec<StepData>,
}

/// `policy.json`: what a policy is and where it came from.
#[derive(Debug, Serialize, Deserialize)]
struct PolicyRecord {
    name: String,
    /// Names everything that the policy depends on.
    key: String,
    /// The hash of the policy's weights.
    model: String,
    /// The hash of the weights that it started from and was referenced to.
    reference: String,
    metric: String,
    objective: String,
    /// β in the first step, β/λ in a later one.
    temperature: f64,
    data: PathBuf,
    pairs: usize,
    seed: u64,
    /// The model that the adapter beside the checkpoint belongs to; nothing if all weights were trained.
    #[serde(default)]
    adapter_base: Option<PathBuf>,
    version: String,
    /// Seconds of all optimizer steps.
    seconds: f64,
}

/// The run directory, locked against a second process for as long as this lives.
pub(crate) struct RunFolder {
    pub(crate) path: PathBuf,
    _lock: File,
}

impl RunFolder {
    /// Creates the folder if need be, and locks it.
    ///
    /// # Errors
    /// If it cannot be created, or another process works in it.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        std::fs::create_dir_all(path).map_err(Error::io("create", path))?;
        let file = path.join(".lock");
        let lock = File::create(&file).map_err(Error::io("create", &file))?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => Error::input(format!(
                "Another sacpo process is working in {}. Wait for it to end, or choose another output folder.",
                path.display()
            )),
            TryLockError::Error(source) => Error::io("lock", &file)(source),
        })?;
        remove_leftovers(path)?;
        Ok(Self { path: path.to_path_buf(), _lock: lock })
    }

    /// Writes a text file of the run, atomically.
    pub(crate) fn write(&self, name: &str, text: &str) -> Result<()> {
        atomic::write_file(&self.path.join(name), |out| out.write_all(text.as_bytes()))
    }
}

/// Deletes what a killed process left half-written in a run directory.
fn remove_leftovers(run: &Path) -> Result<()> {
    let steps = run.join("steps");
    for folder in [run, &run.join("cache"), &run.join("pretraining"), &steps] {
        atomic::remove_leftovers(folder)?;
    }
    // no entries where there is no such folder yet
    let policies = std::fs::read_dir(&steps).into_iter().flatten().flatten();
    policies.filter(|entry| entry.path().is_dir()).try_for_each(|entry| atomic::remove_leftovers(&entry.path()))
}

/// Reads the base model and the data of all steps.
///
/// # Errors
/// Bad input, or files that cannot be read.
pub(crate) fn prepare(recipe: &Recipe) -> Result<Inputs> {
    let base = Checkpoint::load(&recipe.model.base)?;
    ui::say(format!("Base model {}: {} parameters.", recipe.model.base.display(), base.model.layout.len));
    check_adapters(recipe, &base.model.config)?;
    warn_of_objectives(recipe)?;
    let data = recipe.steps.iter().map(|step| load_data(step, &base, recipe.run.seed)).collect::<Result<Vec<_>>>()?;
    Ok(Inputs { base, data })
}

/// Checks that the adapters of all steps, each with what it is stacked on, suit the model.
fn check_adapters(recipe: &Recipe, config: &ModelConfig) -> Result<()> {
    let base = &recipe.model.base;
    if recipe.steps.first().is_some_and(|step| step.train.lora().is_some()) && describe(base)?.adapter.is_some() {
        return Err(Error::input(format!(
            "The base model {0} is an adapter, and an adapter on an adapter cannot be loaded. Write the model that it makes \
             by `sacpo model convert {0} OUT` and give that as model.base.",
            base.display()
        )));
    }
    let mut below = 0;
    for step in &recipe.steps {
        below = match step.train.lora() {
            Some(lora) => {
                let stacked = if step.train.lora_previous == PreviousAdapter::Stack { below } else { 0 };
                let rank = lora.rank.saturating_add(stacked);
                LoraOptions { rank, ..lora }
                    .validate(config)
                    .map_err(|error| Error::input(format!("In the step `{}`: {error}", step.name)))?;
                rank
            }
            None => 0,
        };
    }
    Ok(())
}

/// Runs all steps of a recipe, and ranks every policy on the held-out pairs of every step.
///
/// # Errors
/// A folder that holds policies of another recipe, which stays as it is; files that cannot be read or written,
/// diverged training, or [`Error::Interrupted`].
pub(crate) fn run(recipe: &Recipe, inputs: Inputs, folder: &RunFolder) -> Result<Outcome> {
    let Inputs { base, data } = inputs;
    let plan = recipe.plan();
    let stages: Vec<Stage> = plan.iter().map(|planned| Stage::new(recipe, planned, &data, folder)).collect();
    let base_hash = base.model.hash();
    refuse_other_policies(&stages, &base_hash)?;
    folder.write("recipe.toml", &recipe.to_toml()?)?;

    let mut policies = vec![Policy {
        name: "base".into(),
        step: None,
        beta_over_lambda: None,
        origin: None,
        path: recipe.model.base.clone(),
        model: base_hash,
        adapter_base: None,
        validation: Vec::new(),
        seconds: 0.0,
    }];
    for stage in &stages {
        let planned = stage.planned;
        let origin = planned.parent.map_or(0, |index| index + 1);
        let parent = &policies[origin];
        let record = match stage.finished(&parent.model)? {
            Some(record) => {
                ui::say(format!("Policy {}: complete.", planned.name));
                record
            }
            None => stage.train(parent, &base, &folder.path.join("cache"))?,
        };
        // a killed process may have left it beside a finished policy
        align::trainer::discard_state(&stage.folder)?;
        policies.push(Policy {
            name: planned.name.clone(),
            step: Some(stage.step.name.clone()),
            beta_over_lambda: planned.beta_over_lambda(),
            origin: Some((planned.beta, origin)),
            path: stage.checkpoint(),
            model: record.model,
            adapter_base: record.adapter_base,
            validation: Vec::new(),
            seconds: record.seconds,
        });
    }
    rank(&mut policies, &base.model, recipe, &data, folder)?;
    Ok(Outcome { policies, data })
}

/// Fails if a finished policy is not the one that the recipe asks for. A policy whose parent is still to be trained
/// cannot be judged yet.
fn refuse_other_policies(stages: &[Stage<'_>], base_hash: &str) -> Result<()> {
    let mut models: Vec<Option<String>> = Vec::with_capacity(stages.len());
    for stage in stages {
        let reference = stage.planned.parent.map_or(Some(base_hash), |index| models[index].as_deref());
        let record = reference.map(|reference| stage.finished(reference)).transpose()?.flatten();
        models.push(record.map(|record| record.model));
    }
    Ok(())
}

/// The training of one policy.
struct Stage<'a> {
    recipe: &'a Recipe,
    step: &'a Step,
    planned: &'a PlannedStep,
    data: &'a StepData,
    folder: PathBuf,
}

impl<'a> Stage<'a> {
    fn new(recipe: &'a Recipe, planned: &'a PlannedStep, data: &'a [StepData], run: &RunFolder) -> Self {
        let folder = run.path.join("steps").join(&planned.name);
        Self { recipe, step: &recipe.steps[planned.step], planned, data: &data[planned.step], folder }
    }

    fn checkpoint(&self) -> PathBuf {
        self.folder.join("checkpoint")
    }

    fn objective(&self) -> Result<Objective> {
        self.step.objective_at(self.planned.beta)
    }

    fn options(&self) -> TrainOptions {
        let train = &self.step.train;
        TrainOptions {
            lora: train.lora(),
            optimizer: train.optimizer,
            learning_rate: train.learning_rate,
            schedule: train.schedule,
            warmup_ratio: train.warmup_ratio,
            epochs: train.epochs,
            batch_size: train.batch_size,
            micro_batch_tokens: train.micro_batch_tokens,
            memory_bytes: self.recipe.run.memory_gib.map(|gib| (gib * (1u64 << 30) as f64) as usize),
            max_grad_norm: train.max_grad_norm,
            weight_decay: train.weight_decay,
            seed: self.recipe.run.seed,
            save_every: train.save_every as u64,
            validate_every: train.validate_every.unwrap_or(0) as u64,
            patience: train.patience.map(|patience| patience as u64),
            ema_decay: train.ema_decay,
        }
    }

    /// Names everything that the policy depends on; `reference` is the hash of the model that it starts from.
    fn key(&self, reference: &str) -> Result<String> {
        let (objective, course) = (format!("{:?}", self.objective()?), self.options().course());
        let held_out = match self.step.train.validate_every {
            Some(_) => self.data.validation.fingerprint(),
            None => String::new(),
        };
        let stacked = if self.stacks() { "stacked" } else { "" };
        let parts = [reference, &objective, &course, &self.data.train.fingerprint(), &held_out, stacked];
        Ok(blake3::hash(parts.join("\n").as_bytes()).to_hex().to_string())
    }

    /// Whether the adapter goes on top of that of the policy before.
    fn stacks(&self) -> bool {
        self.planned.parent.is_some() && self.step.train.lora_previous == PreviousAdapter::Stack
    }

    /// The model that this policy's adapter belongs to, as a path that holds from any folder.
    fn adapter_base(&self, parent: &Policy) -> Result<PathBuf> {
        let below = parent.adapter_base.as_ref().filter(|_| self.stacks()).unwrap_or(&parent.path);
        std::path::absolute(below).map_err(Error::io("find", below))
    }

    /// The adapter of the policy before, if this policy's own is to be stacked on it.
    fn adapter_below(&self, parent: &Policy, config: &ModelConfig) -> Result<Option<Adapter>> {
        if !self.stacks() {
            return Ok(None);
        }
        let adapter = Adapter::load(&parent.path.with_file_name(ADAPTER), config);
        adapter.map(Some).map_err(|error| {
            Error::input(format!(
                "The adapter of the policy `{}`, on which the next is to be stacked, is not usable. {error} Put it back, or \
                 delete the folder above to train the policy again.",
                parent.name
            ))
        })
    }

    /// The record of the policy if it is complete.
    fn finished(&self, reference: &str) -> Result<Option<PolicyRecord>> {
        let Some(record) = read_record(&self.folder)? else { return Ok(None) };
        if record.key == self.key(reference)? {
            return Ok(Some(record));
        }
        Err(Error::input(format!(
            "{} holds a policy of another model, data or options than this recipe says. Choose another output folder \
             (run.out, or --out), or delete that folder to train the policy again.",
            self.folder.display()
        )))
    }

    /// Trains the policy from its parent, and keeps it.
    fn train(&self, parent: &Policy, base: &Checkpoint, cache: &Path) -> Result<PolicyRecord> {
        let objective = self.objective()?;
        let name = &self.planned.name;
        ui::say(format!("Policy {name}: {} at temperature {}.", objective.name(), self.planned.beta));
        let loaded = self.planned.parent.map(|_| load_policy(parent)).transpose()?;
        let config = &base.model.config;
        let adapter_below = self.adapter_below(parent, config)?;
        let alignment = Alignment {
            start: loaded.as_ref().unwrap_or(&base.model),
            data: &self.data.train,
            validation: &self.data.validation,
            objective: &objective,
            options: &self.options(),
            folder: &self.folder,
            cache,
        };
        let Aligned { policy, adapter, records } = alignment.run(&mut ui::TrainingBar::new("training"))?;
        let seconds = read_metric(&self.folder.join("metrics.jsonl"), "seconds")?.into_iter().map(|(_, s)| s).sum();
        let record = PolicyRecord {
            name: name.clone(),
            key: self.key(&parent.model)?,
            model: policy.hash(),
            reference: parent.model.clone(),
            metric: self.step.metric.clone(),
            objective: objective.name().into(),
            temperature: self.planned.beta,
            data: self.step.data.clone(),
            pairs: self.data.train.len(),
            seed: self.recipe.run.seed,
            adapter_base: adapter.as_ref().map(|_| self.adapter_base(parent)).transpose()?,
            version: env!("CARGO_PKG_VERSION").into(),
            seconds,
        };
        let checkpoint =
            Checkpoint { model: policy, tokenizer: base.tokenizer.clone(), generation: base.generation.clone() };
        checkpoint.save(&self.checkpoint())?;
        if let (Some(mut adapter), Some(model_below)) = (adapter, &record.adapter_base) {
            if let Some(below) = adapter_below {
                adapter = Adapter::stack(config, &[&below, &adapter])?;
            }
            adapter.save(model_below, &self.folder.join(ADAPTER))?;
        }
        let path = self.folder.join("policy.json");
        atomic::write_file(&path, |out| Ok(serde_json::to_writer_pretty(out, &record)?))?;
        if let Some(last) = records.last() {
            ui::say(format!("  {} steps in {seconds:.0} s; the last batch's loss was {:.4}.", last.step, last.loss));
        }
        if self.step.train.patience.is_some() {
            let losses = read_metric(&self.folder.join("metrics.jsonl"), "eval_loss")?;
            if let Some((step, loss)) = losses.into_iter().min_by(|(_, a), (_, b)| a.total_cmp(b)) {
                ui::say(format!("  Kept are the weights after step {step}, of the lowest validation loss: {loss:.4}."));
            }
        }
        Ok(record)
    }
}

/// The model of a trained policy, which must be the one that was trained.
fn load_policy(policy: &Policy) -> Result<Model> {
    let loaded = Checkpoint::load(&policy.path).map_err(|error| {
        Error::input(format!(
            "The policy `{}` was trained, but cannot be read. {error} Put it back, or delete the folder above {} to train it \
             again.",
            policy.name,
            policy.path.display()
        ))
    });
    let model = loaded?.model;
    if model.hash() == policy.model {
        return Ok(model);
    }
    Err(Error::input(format!(
        "The weights in {} are not those of the policy `{}` that was trained there. Put them back, or delete the folder \
         above to train the policy again.",
        policy.path.display(),
        policy.name
    )))
}

fn read_record(folder: &Path) -> Result<Option<PolicyRecord>> {
    let path = folder.join("policy.json");
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("read", &path)(error)),
    };
    serde_json::from_str(&text).map(Some).map_err(|error| {
        Error::input(format!("{} is damaged ({error}). Delete its folder to train the policy again.", path.display()))
    })
}

/// Fills in how every policy ranks the held-out pairs of every step, relative to the base model.
fn rank(policies: &mut [Policy], base: &Model, recipe: &Recipe, data: &[StepData], folder: &RunFolder) -> Result<()> {
    let cache = folder.path.join("cache");
    let mut base_logps: Vec<Vec<f64>> = Vec::new();
    for (index, policy) in policies.iter_mut().enumerate() {
        let trained;
        let model = if index == 0 {
            base
        } else {
            trained = load_policy(policy)?;
            &trained
        };
        for (number, (step, data)) in recipe.steps.iter().zip(data).enumerate() {
            let held_out = &data.validation;
            let bar = ui::bar(held_out.len() as u64, &format!("{} on {}", policy.name, step.name));
            let tokens = step.train.micro_batch_tokens;
            let logps = reference::logps(model, &held_out.sequences(), tokens, Some(&cache), &mut ui::advance(&bar))?;
            bar.finish_and_clear();
            policy.validation.push(step::rank(held_out, &logps, base_logps.get(number).unwrap_or(&logps)));
            if index == 0 {
                base_logps.push(logps);
            }
        }
    }
    Ok(())
}
