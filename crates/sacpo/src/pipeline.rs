//! From a recipe to policies: the stages of a run, each done once.
//!
//! ```text
//! OUT/recipe.toml            the recipe with all defaults
//! OUT/steps/NAME/            metrics.jsonl, checkpoint/, policy.json (written last: the policy is complete)
//! OUT/cache/                 log-probabilities that no later run needs to compute again
//! ```

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

use align::data::{self, RenderOptions, TokenizedPair};
use align::objective::Objective;
use align::reference::pair_logps;
use align::step::{self, PreferenceReport};
use align::trainer::TrainOptions;
use engine::checkpoint::{Checkpoint, atomic};
use engine::{Error, Model, Result};
use serde::{Deserialize, Serialize};

use crate::ui;
use sacpo::recipe::{PlannedStep, Recipe, Step};

/// A policy of a run: the base model, or what a step made.
pub(crate) struct Policy {
    /// `base`, or the planned step's name.
    pub(crate) name: String,
    /// The step's name; nothing for the base model.
    pub(crate) step: Option<String>,
    pub(crate) beta_over_lambda: Option<f64>,
    /// Where the model is.
    pub(crate) path: PathBuf,
    /// Ranking of each step's held-out pairs, in the order of the steps.
    pub(crate) validation: Vec<PreferenceReport>,
    /// Seconds of training; 0 for the base model.
    pub(crate) seconds: f64,
}

/// The pairs of one step, as tokens.
pub(crate) struct StepData {
    pub(crate) train: Vec<TokenizedPair>,
    pub(crate) validation: Vec<TokenizedPair>,
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
    version: String,
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
        lock.try_lock().map_err(|_| {
            Error::input(format!(
                "Another sacpo process is working in {}. Wait for it to end, or choose another output folder.",
                path.display()
            ))
        })?;
        Ok(Self { path: path.to_path_buf(), _lock: lock })
    }

    /// Writes a text file of the run, atomically.
    pub(crate) fn write(&self, name: &str, text: &str) -> Result<()> {
        atomic::write_file(&self.path.join(name), |out| out.write_all(text.as_bytes()))
    }
}

/// Runs all steps of a recipe, and ranks every policy on the held-out pairs of every step.
///
/// # Errors
/// Bad input, files that cannot be read or written, diverged training, or [`Error::Interrupted`].
pub(crate) fn run(recipe: &Recipe, folder: &RunFolder) -> Result<Outcome> {
    folder.write("recipe.toml", &recipe.to_toml()?)?;
    let base = Checkpoint::load(&recipe.model.base)?;
    ui::say(format!("Base model {}: {} parameters.", recipe.model.base.display(), base.model.layout.len));
    let data = recipe.steps.iter().map(|step| load_data(step, &base, recipe.run.seed)).collect::<Result<Vec<_>>>()?;

    let plan = recipe.plan();
    let mut policies = vec![Policy {
        name: "base".into(),
        step: None,
        beta_over_lambda: None,
        path: recipe.model.base.clone(),
        validation: Vec::new(),
        seconds: 0.0,
    }];
    for planned in &plan {
        let parent = planned.parent.map_or(0, |index| index + 1);
        let start = if parent == 0 { base.model.clone() } else { Checkpoint::load(&policies[parent].path)?.model };
        let step = &recipe.steps[planned.step];
        let stage = Stage { recipe, step, planned, start, data: &data[planned.step].train };
        let record = stage.complete(folder, &base)?;
        policies.push(Policy {
            name: planned.name.clone(),
            step: Some(step.name.clone()),
            beta_over_lambda: planned.beta_over_lambda(),
            path: stage.folder(folder).join("checkpoint"),
            validation: Vec::new(),
            seconds: record.seconds,
        });
    }
    rank(&mut policies, &base.model, recipe, &data, folder)?;
    Ok(Outcome { policies, data })
}

/// Reads, divides and tokenises the pairs of a step, and says what came of them.
fn load_data(step: &Step, base: &Checkpoint, seed: u64) -> Result<StepData> {
    let options = &step.data_options;
    let file = data::read_pairs(&step.data, step.format, &step.metric, options.skip_bad_rows)?;
    let (skipped, first_skipped) = (file.skipped, file.first_skipped);
    let (train, validation) = data::split(file.pairs, options.validation_fraction, seed);
    let context = base.model.config.max_position_embeddings;
    if options.max_length > context {
        return Err(Error::input(format!(
            "The step `{}` asks for sequences of {} tokens, but the model's context is {context} tokens. Lower \
             data.max_length.",
            step.name, options.max_length
        )));
    }
    let render = RenderOptions {
        max_length: options.max_length,
        template_tail: options.template_tail,
        long_prompts: options.long_prompts,
    };
    let mut train = data::tokenize_pairs(&train, &step.data, &base.tokenizer, &render)?;
    let validation = data::tokenize_pairs(&validation, &step.data, &base.tokenizer, &render)?;
    train.pairs.truncate(options.max_pairs.unwrap_or(usize::MAX));
    ui::say(format!(
        "Step {}: {} pairs to train on, {} held out, from {} ({} rows).",
        step.name,
        train.pairs.len(),
        validation.pairs.len(),
        step.data.display(),
        file.format.name(),
    ));
    let dropped = train.dropped_prompts + validation.dropped_prompts;
    let truncated = train.truncated_responses + validation.truncated_responses;
    for (count, what) in [
        (dropped, "pairs left out, since their prompt leaves no room for a response"),
        (truncated, "responses cut to the longest length"),
        (skipped, "bad rows left out"),
    ] {
        if count > 0 {
            ui::say(format!("  {count} {what}."));
        }
    }
    if let Some(first) = first_skipped {
        ui::say(format!("  The first: {first}"));
    }
    if train.pairs.is_empty() {
        return Err(Error::input(format!(
            "No pair of {} is left to train on. Raise data.max_length, or lower data.validation_fraction.",
            step.data.display()
        )));
    }
    Ok(StepData { train: train.pairs, validation: validation.pairs })
}

/// The training of one policy.
struct Stage<'a> {
    recipe: &'a Recipe,
    step: &'a Step,
    planned: &'a PlannedStep,
    start: Model,
    data: &'a [TokenizedPair],
}

impl Stage<'_> {
    fn folder(&self, run: &RunFolder) -> PathBuf {
        run.path.join("steps").join(&self.planned.name)
    }

    fn options(&self) -> TrainOptions {
        let train = &self.step.train;
        TrainOptions {
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
        }
    }

    /// Trains the policy unless it is complete.
    fn complete(&self, run: &RunFolder, base: &Checkpoint) -> Result<PolicyRecord> {
        let folder = self.folder(run);
        let objective = Objective::dpo(self.planned.beta, self.step.label_smoothing)?;
        let options = self.options();
        let reference = self.start.hash();
        let key = self.key(&reference, &objective, &options);
        if let Some(record) = read_record(&folder)? {
            if record.key == key {
                ui::say(format!("Policy {}: complete.", self.planned.name));
                return Ok(record);
            }
            return Err(Error::input(format!(
                "{} holds a policy of another model, data or options than this recipe says. Choose another run.out, or \
                 delete that folder to train it again.",
                folder.display()
            )));
        }
        ui::say(format!("Policy {}: {} at temperature {}.", self.planned.name, objective.name(), self.planned.beta));
        let start = Instant::now();
        let (policy, _) = step::align(
            &self.start,
            self.data,
            &objective,
            &options,
            &folder,
            &run.path.join("cache"),
            &mut ui::TrainingBar::new("training"),
        )?;
        let record = PolicyRecord {
            name: self.planned.name.clone(),
            key,
            model: policy.hash(),
            reference,
            metric: self.step.metric.clone(),
            objective: objective.name().into(),
            temperature: self.planned.beta,
            data: self.step.data.clone(),
            pairs: self.data.len(),
            seed: self.recipe.run.seed,
            version: env!("CARGO_PKG_VERSION").into(),
            seconds: start.elapsed().as_secs_f64(),
        };
        let checkpoint =
            Checkpoint { model: policy, tokenizer: base.tokenizer.clone(), generation: base.generation.clone() };
        checkpoint.save(&folder.join("checkpoint"))?;
        atomic::write_file(&folder.join("policy.json"), |out| Ok(serde_json::to_writer_pretty(out, &record)?))?;
        align::trainer::discard_state(&folder)?;
        Ok(record)
    }

    /// Names everything that the policy depends on.
    fn key(&self, reference: &str, objective: &Objective, options: &TrainOptions) -> String {
        let parts =
            [reference, &format!("{objective:?}"), &options.course(), &align::reference::fingerprint(self.data)];
        blake3::hash(parts.join("\n").as_bytes()).to_hex().to_string()
    }
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
    let mut base_logps: Vec<Vec<[f64; 2]>> = Vec::new();
    for (index, policy) in policies.iter_mut().enumerate() {
        let trained;
        let model = if index == 0 {
            base
        } else {
            trained = Checkpoint::load(&policy.path)?.model;
            &trained
        };
        for (number, (step, data)) in recipe.steps.iter().zip(data).enumerate() {
            let bar = ui::bar(data.validation.len() as u64, &format!("{} on {}", policy.name, step.name));
            let tokens = step.train.micro_batch_tokens;
            let logps = pair_logps(model, &data.validation, tokens, Some(&cache), &mut ui::advance(&bar))?;
            bar.finish_and_clear();
            policy.validation.push(step::rank(&logps, base_logps.get(number).unwrap_or(&logps)));
            if index == 0 {
                base_logps.push(logps);
            }
        }
    }
    Ok(())
}
