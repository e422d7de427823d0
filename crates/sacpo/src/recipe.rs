//! The recipe: one TOML file that is a whole experiment.
//!
//! [`Recipe::load`] reads a file and checks every key, so that what comes out can be run as it is. All
//! defaults are filled in. [`Recipe::plan`] expands the steps into the policies to train. The keys are
//! described for users in `docs/recipes.md`.

mod section;
mod tree;

use std::ops::Bound::{self, Excluded, Unbounded};
use std::path::{Path, PathBuf};

use align::data::{Format, LongPrompts, TemplateTail};
use align::objective::{self, Objective};
use engine::optim::{OptimizerKind, Schedule};
use engine::{Error, LoraOptions, Projection, Result};
use section::Section;
use serde::Serialize;

/// Sweeps multiply along the chain; a recipe that asks for more policies than this is a mistake.
const MAX_POLICIES: usize = 1000;

/// Greater than 0.
const POSITIVE: (Bound<f64>, Bound<f64>) = (Excluded(0.0), Unbounded);

const ROOT_KEYS: &[&str] = &["model", "run", "data", "train", "step", "evaluate"];
const MODEL_KEYS: &[&str] = &["base"];
const RUN_KEYS: &[&str] = &["out", "seed", "threads", "memory_gib"];
const DATA_KEYS: &[&str] = &[
    "max_length",
    "validation_fraction",
    "max_pairs",
    "max_validation_pairs",
    "long_prompts",
    "skip_bad_rows",
    "template_tail",
];
const TRAIN_KEYS: &[&str] = &[
    "optimizer",
    "learning_rate",
    "epochs",
    "batch_size",
    "schedule",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "micro_batch_tokens",
    "save_every",
    "validate_every",
    "patience",
    "ema_decay",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "lora_targets",
    "lora_rank_stabilized",
    "lora_dora",
    "lora_previous",
];
/// The keys of a step beside those of `[data]` and `[train]`, which a step may override.
const STEP_KEYS: &[&str] = &[
    "name",
    "metric",
    "objective",
    "label_smoothing",
    "sum_logps",
    "desirable_weight",
    "undesirable_weight",
    "gamma",
    "alpha",
    "delta",
    "weight",
    "beta",
    "beta_over_lambda",
    "data",
    "format",
];
const EVALUATE_KEYS: &[&str] = &["prompts", "max_new_tokens"];
const SECTIONS: &[(&str, &[&str])] = &[
    ("[model]", MODEL_KEYS),
    ("[run]", RUN_KEYS),
    ("[data]", DATA_KEYS),
    ("[train]", TRAIN_KEYS),
    ("[[step]]", STEP_KEYS),
    ("[evaluate]", EVALUATE_KEYS),
];

/// A whole experiment, checked and with all defaults filled in.
///
/// Paths are as the recipe gives them: relative ones start at the current directory.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Recipe {
    /// The model that the first step starts from.
    pub model: BaseModel,
    /// Where and how to run.
    pub run: Run,
    /// The alignment steps in their order, at least one. Each holds its own `[data]` and `[train]` options.
    #[serde(rename = "step")]
    pub steps: Vec<Step>,
    /// What to ask every policy when training is done.
    pub evaluate: Evaluate,
}

/// `[model]`: the model that the first step starts from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BaseModel {
    /// A folder in Hugging Face's layout, or a `.gguf` file.
    pub base: PathBuf,
}

/// `[run]`: where and how to run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Run {
    /// The run directory. Default: `runs/` and the recipe's file name without its ending.
    pub out: PathBuf,
    /// Seed of all randomness: the split, the order of the pairs. Default 0.
    pub seed: u64,
    /// Number of threads, ≥ 1. Default: as many as the machine has physical cores.
    pub threads: Option<usize>,
    /// The memory that training may take, in GiB, > 0. Default: what the machine has.
    pub memory_gib: Option<f64>,
}

/// `[data]`: how preference pairs are turned into tokens and divided.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DataOptions {
    /// The longest prompt and response together, in tokens, ≥ 2; responses beyond it are cut. Default 512.
    pub max_length: usize,
    /// The share of pairs held out for validation, 0 ≤ share < 1. Default 0.1.
    pub validation_fraction: f64,
    /// The number of pairs to train on at most, ≥ 1: the first of the file that are not held out or
    /// dropped. Default: all.
    pub max_pairs: Option<usize>,
    /// The number of held-out pairs to rank at most, ≥ 1: the first of the file. Default: all.
    pub max_validation_pairs: Option<usize>,
    /// What to do with a prompt that leaves no room for a response. Default: an error.
    pub long_prompts: LongPrompts,
    /// Whether a row that cannot be read is counted and left out, instead of being an error. Default: no.
    pub skip_bad_rows: bool,
    /// What happens to the text that a chat template writes after the end of a response. Default: dropped.
    pub template_tail: TemplateTail,
}

/// `[train]`: how a step trains.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainOptions {
    /// The optimizer. Default: AdamW.
    pub optimizer: OptimizerKind,
    /// The peak learning rate, > 0. Default 5e-6.
    pub learning_rate: f64,
    /// Passes over the training pairs, ≥ 1. Default 1.
    pub epochs: usize,
    /// Pairs per optimizer step, ≥ 1. Default 16.
    pub batch_size: usize,
    /// The course of the learning rate after warm-up. Default: cosine.
    pub schedule: Schedule,
    /// The share of all optimizer steps in which the learning rate rises from 0, 0 to 1. Default 0.1.
    pub warmup_ratio: f64,
    /// Decoupled weight decay of matrices, ≥ 0. Default 0.
    pub weight_decay: f64,
    /// The global gradient norm above which gradients are scaled down, > 0. Default 1.
    pub max_grad_norm: f64,
    /// Tokens per forward and backward pass, ≥ 1; a longer pair passes alone. It changes memory and speed,
    /// not the result. Default 2048.
    pub micro_batch_tokens: usize,
    /// Optimizer steps between the states that a killed run continues from, ≥ 1. Default 20.
    pub save_every: usize,
    /// Optimizer steps between validations on the held-out rows, ≥ 1. Default: none.
    pub validate_every: Option<usize>,
    /// Validations without a lower loss after which training stops and goes back to the best weights, ≥ 1; needs
    /// `validate_every`. Default: never.
    pub patience: Option<usize>,
    /// The decay per step of an exponential moving average of the weights, which becomes the policy, 0 < decay < 1.
    /// Default: none.
    pub ema_decay: Option<f64>,
    /// The rank of an adapter that is trained instead of all weights, ≥ 1. Default: none, all weights are trained.
    pub lora_rank: Option<usize>,
    /// The numerator of the adapter's scale, > 0. Default: the rank.
    pub lora_alpha: Option<f64>,
    /// The dropout of the adapter's input, 0 ≤ p < 1. Default 0.
    pub lora_dropout: f64,
    /// The matrices that are adapted. Default: all of the blocks.
    pub lora_targets: Vec<Projection>,
    /// Whether the scale is alpha/√rank instead of alpha/rank. Default: no.
    pub lora_rank_stabilized: bool,
    /// Whether the rows' lengths are learned by themselves (DoRA). Default: no.
    pub lora_dora: bool,
    /// What becomes of the adapter of the step before. Default: it is folded.
    pub lora_previous: PreviousAdapter,
}

/// What becomes of the adapter of the step before in the adapter that a step writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PreviousAdapter {
    /// It is folded into the policy that this step starts from; the new adapter belongs to that policy.
    Fold,
    /// It is stacked: the new adapter holds both, and belongs to the model below the first of them.
    Stack,
}

/// `[[step]]`: one preference alignment, which starts from and is referenced to the policy before it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Step {
    /// The name of the step and, with the value of a sweep, of its policies. Default: the metric.
    pub name: String,
    /// The metric that the data's preferences are about, such as `helpfulness` or `harmlessness`.
    pub metric: String,
    /// The name of the loss. Default: `dpo`.
    pub objective: &'static str,
    /// The parameters of the loss beside its temperature.
    #[serde(flatten)]
    pub parameters: objective::Options,
    /// `beta` or `beta_over_lambda`.
    #[serde(flatten)]
    pub temperature: Temperature,
    /// The file of preference pairs.
    pub data: PathBuf,
    /// The schema of the file. Default: found from its first row.
    pub format: Option<Format>,
    /// The `[data]` options of this step.
    #[serde(flatten)]
    pub data_options: DataOptions,
    /// The `[train]` options of this step.
    #[serde(flatten)]
    pub train: TrainOptions,
}

/// The temperature of a step's objective: how strongly it is held to its reference.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Temperature {
    /// The first step's β, > 0.
    Beta(f64),
    /// A later step's β/λ, each > 0: one policy for each value.
    BetaOverLambda(Vec<f64>),
}

/// `[evaluate]`: what to ask every policy when training is done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Evaluate {
    /// Prompts that the base model and every policy answer, side by side. Default: none.
    pub prompts: Vec<String>,
    /// The length of an answer at most, in tokens, ≥ 1. Default 64.
    pub max_new_tokens: usize,
}

/// One policy to train.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PlannedStep {
    /// The policy's name, unique in the plan and fit for a folder's name.
    pub name: String,
    /// The index of its step in [`Recipe::steps`].
    pub step: usize,
    /// The index in the plan of the policy that it starts from and is referenced to; `None`: the base model.
    pub parent: Option<usize>,
    /// The temperature that its objective is given: β in the first step, β/λ in a later one.
    pub beta: f64,
}

impl PlannedStep {
    /// β/λ of a policy of a later step; `None` in the first step, which has no λ.
    pub fn beta_over_lambda(&self) -> Option<f64> {
        self.parent.map(|_| self.beta)
    }
}

impl Recipe {
    /// Reads a recipe from a file; see [`Recipe::parse`].
    ///
    /// # Errors
    /// If the file cannot be read or is not UTF-8, or as [`Recipe::parse`].
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
        let text = std::str::from_utf8(&bytes).map_err(|error| {
            let line = 1 + bytes[..error.valid_up_to()].iter().filter(|byte| **byte == b'\n').count();
            Error::input(format!(
                "The recipe {}:{line} holds bytes that are not UTF-8 text. Save the file as UTF-8, or check that it is \
                 the recipe.",
                path.display()
            ))
        })?;
        Self::parse(text, path, overrides)
    }

    /// Reads a recipe from its text.
    ///
    /// `path` is the name of the file for messages and for the default of `run.out`. Each override is
    /// `KEY=VALUE` with a key such as `train.epochs` or `step.1.beta`, steps counted from 1; a value that is
    /// no TOML is taken as text.
    ///
    /// # Errors
    /// Text that is not TOML; an unknown, missing or misplaced key; a value of the wrong type or out of its
    /// range; an override without a place; names that are not unique. Each names the key and its line.
    pub fn parse(text: &str, path: &Path, overrides: &[String]) -> Result<Self> {
        let name = path.display().to_string();
        let mut document = tree::parse(text, &name)?;
        for setting in overrides {
            tree::apply_override(&mut document, setting)?;
        }
        let root = Section::root(&document, &name);
        root.only(ROOT_KEYS, SECTIONS)?;
        let data = DataOptions::read(&known(root.section("data")?, DATA_KEYS)?, &DataOptions::default())?;
        let train = TrainOptions::read(&known(root.section("train")?, TRAIN_KEYS)?, &TrainOptions::default())?;
        let steps = root.sections("step")?;
        let step_keys = [STEP_KEYS, DATA_KEYS, TRAIN_KEYS].concat();
        let recipe = Self {
            model: BaseModel::read(&known(root.section("model")?, MODEL_KEYS)?)?,
            run: Run::read(&known(root.section("run")?, RUN_KEYS)?, path)?,
            steps: steps
                .iter()
                .enumerate()
                .map(|(i, step)| {
                    step.only(&step_keys, SECTIONS)?;
                    Step::read(step, i == 0, &data, &train)
                })
                .collect::<Result<_>>()?,
            evaluate: Evaluate::read(&known(root.section("evaluate")?, EVALUATE_KEYS)?)?,
        };
        recipe.check_plan(&steps, &name)?;
        Ok(recipe)
    }

    /// The recipe as TOML with all defaults and overrides written out; parsing it gives the same recipe.
    ///
    /// # Errors
    /// If a path is not UTF-8, which no parsed recipe has.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|error| Error::Failed(format!("Could not write the recipe as TOML: {error}.")))
    }

    /// The policies to train, every parent before its children.
    ///
    /// A step makes one policy from each policy of the step before it, and one for each value of its sweep.
    /// Names are the step's name; with the value in later steps (`harmlessness-0.05`); and behind the
    /// parent's name if the step before made several policies (`harmlessness-0.05-honesty-0.1`).
    pub fn plan(&self) -> Vec<PlannedStep> {
        let mut plan: Vec<PlannedStep> = Vec::new();
        let mut parents: Vec<Option<usize>> = vec![None];
        for (step, options) in self.steps.iter().enumerate() {
            let start = plan.len();
            for &parent in &parents {
                let prefix = match parent {
                    Some(parent) if parents.len() > 1 => format!("{}-", plan[parent].name),
                    _ => String::new(),
                };
                for &beta in options.temperature.values() {
                    let value = match options.temperature {
                        Temperature::Beta(_) => String::new(),
                        Temperature::BetaOverLambda(_) => format!("-{}", short(beta)),
                    };
                    let name = format!("{prefix}{}{value}", options.name);
                    plan.push(PlannedStep { name, step, parent, beta });
                }
            }
            parents = (start..plan.len()).map(Some).collect();
        }
        plan
    }

    /// Checks what concerns several steps at once: that there is one, the number of policies, their names.
    fn check_plan(&self, sections: &[Section<'_>], file: &str) -> Result<()> {
        if self.steps.is_empty() {
            return Err(Error::input(format!(
                "The recipe {file} has no step, so there is nothing to train. Add a `[[step]]` with `metric`, `beta` \
                 and `data`."
            )));
        }
        let mut policies_of_step = 1;
        for (step, section) in self.steps.iter().zip(sections) {
            policies_of_step *= step.temperature.values().len();
            if policies_of_step > MAX_POLICIES {
                return Err(section.error(&format!(
                    "The sweeps up to this step multiply to {policies_of_step} policies. Shorten the lists of \
                     `beta_over_lambda`, so that there are at most {MAX_POLICIES}."
                )));
            }
        }
        for (number, step) in self.steps.iter().enumerate() {
            let stacks = step.train.lora_rank.is_some() && step.train.lora_previous == PreviousAdapter::Stack;
            let below = number.checked_sub(1).and_then(|before| self.steps[before].train.lora());
            if stacks && (below.is_none_or(|below| below.dora) || step.train.lora_dora) {
                return Err(sections[number].error(
                    "`lora_previous = \"stack\"` puts the step's adapter on top of that of the step before, but there is \
                     none, or one of the two has DoRA, which cannot be stacked. Write `lora_previous = \"fold\"`.",
                ));
            }
        }
        let plan = self.plan();
        for (i, policy) in plan.iter().enumerate() {
            let step = &sections[policy.step];
            if policy.name == "base" {
                return Err(step.error("The name `base` is taken by the untrained model. Set another `name`."));
            }
            if plan[..i].iter().any(|other| other.name == policy.name) {
                return Err(step.error(&format!(
                    "Two policies would be called `{}`. Give the step a `name` of its own.",
                    policy.name
                )));
            }
        }
        Ok(())
    }
}

/// The section, if all its keys are among `keys`.
fn known<'a>(section: Section<'a>, keys: &[&str]) -> Result<Section<'a>> {
    section.only(keys, SECTIONS)?;
    Ok(section)
}

/// A number as short as it reads exactly, without an exponent where people write none.
fn short(value: f64) -> String {
    if (1e-5..1e7).contains(&value) { format!("{value}") } else { format!("{value:e}") }
}

impl BaseModel {
    fn read(section: &Section<'_>) -> Result<Self> {
        let base = section.required("base", section.text("base")?, "base = \"models/SmolLM2-135M-Instruct\"")?;
        Ok(Self { base: base.into() })
    }
}

impl Run {
    fn read(section: &Section<'_>, recipe: &Path) -> Result<Self> {
        let out = match section.text("out")? {
            Some(out) => out.into(),
            None => Path::new("runs").join(recipe.file_stem().unwrap_or("run".as_ref())),
        };
        Ok(Self {
            out,
            seed: section.seed("seed")?.unwrap_or(0),
            threads: section.count("threads", 1)?,
            memory_gib: section.number("memory_gib", POSITIVE)?,
        })
    }
}

impl Default for DataOptions {
    fn default() -> Self {
        Self {
            max_length: 512,
            validation_fraction: 0.1,
            max_pairs: None,
            max_validation_pairs: None,
            long_prompts: LongPrompts::Error,
            skip_bad_rows: false,
            template_tail: TemplateTail::Drop,
        }
    }
}

impl DataOptions {
    fn read(section: &Section<'_>, defaults: &Self) -> Result<Self> {
        let long_prompts = &[("error", LongPrompts::Error), ("drop", LongPrompts::Drop)];
        let template_tail = &[("drop", TemplateTail::Drop), ("keep", TemplateTail::Keep)];
        Ok(Self {
            max_length: section.count("max_length", 2)?.unwrap_or(defaults.max_length),
            validation_fraction: section
                .number("validation_fraction", 0.0..1.0)?
                .unwrap_or(defaults.validation_fraction),
            max_pairs: section.count("max_pairs", 1)?.or(defaults.max_pairs),
            max_validation_pairs: section.count("max_validation_pairs", 1)?.or(defaults.max_validation_pairs),
            long_prompts: section.choice("long_prompts", long_prompts)?.unwrap_or(defaults.long_prompts),
            skip_bad_rows: section.flag("skip_bad_rows")?.unwrap_or(defaults.skip_bad_rows),
            template_tail: section.choice("template_tail", template_tail)?.unwrap_or(defaults.template_tail),
        })
    }
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self {
            optimizer: OptimizerKind::AdamW,
            learning_rate: 5e-6,
            epochs: 1,
            batch_size: 16,
            schedule: Schedule::Cosine,
            warmup_ratio: 0.1,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            micro_batch_tokens: 2048,
            save_every: 20,
            validate_every: None,
            patience: None,
            ema_decay: None,
            lora_rank: None,
            lora_alpha: None,
            lora_dropout: 0.0,
            lora_targets: Projection::ALL.to_vec(),
            lora_rank_stabilized: false,
            lora_dora: false,
            lora_previous: PreviousAdapter::Fold,
        }
    }
}

impl TrainOptions {
    fn read(section: &Section<'_>, defaults: &Self) -> Result<Self> {
        let schedule = &[("cosine", Schedule::Cosine), ("linear", Schedule::Linear), ("constant", Schedule::Constant)];
        let optimizers = OptimizerKind::ALL.map(|kind| (kind.name(), kind));
        let previous = &[("fold", PreviousAdapter::Fold), ("stack", PreviousAdapter::Stack)];
        let train = Self {
            optimizer: section.choice("optimizer", &optimizers)?.unwrap_or(defaults.optimizer),
            learning_rate: section.number("learning_rate", POSITIVE)?.unwrap_or(defaults.learning_rate),
            epochs: section.count("epochs", 1)?.unwrap_or(defaults.epochs),
            batch_size: section.count("batch_size", 1)?.unwrap_or(defaults.batch_size),
            schedule: section.choice("schedule", schedule)?.unwrap_or(defaults.schedule),
            warmup_ratio: section.number("warmup_ratio", 0.0..=1.0)?.unwrap_or(defaults.warmup_ratio),
            weight_decay: section.number("weight_decay", 0.0..)?.unwrap_or(defaults.weight_decay),
            max_grad_norm: section.number("max_grad_norm", POSITIVE)?.unwrap_or(defaults.max_grad_norm),
            micro_batch_tokens: section.count("micro_batch_tokens", 1)?.unwrap_or(defaults.micro_batch_tokens),
            save_every: section.count("save_every", 1)?.unwrap_or(defaults.save_every),
            validate_every: section.count("validate_every", 1)?.or(defaults.validate_every),
            patience: section.count("patience", 1)?.or(defaults.patience),
            ema_decay: section.number("ema_decay", (Excluded(0.0), Excluded(1.0)))?.or(defaults.ema_decay),
            lora_rank: section.count("lora_rank", 1)?.or(defaults.lora_rank),
            lora_alpha: section.number("lora_alpha", POSITIVE)?.or(defaults.lora_alpha),
            lora_dropout: section.number("lora_dropout", 0.0..1.0)?.unwrap_or(defaults.lora_dropout),
            lora_targets: targets(section)?.unwrap_or_else(|| defaults.lora_targets.clone()),
            lora_rank_stabilized: section.flag("lora_rank_stabilized")?.unwrap_or(defaults.lora_rank_stabilized),
            lora_dora: section.flag("lora_dora")?.unwrap_or(defaults.lora_dora),
            lora_previous: section.choice("lora_previous", previous)?.unwrap_or(defaults.lora_previous),
        };
        if let Some(options) = train.lora() {
            options.check_trainable().map_err(|error| section.error(&error.to_string()))?;
        }
        if train.patience.is_some() && train.validate_every.is_none() {
            return Err(section.error(
                "`patience` counts validations, but there are none. Set `validate_every` to a number of optimizer steps.",
            ));
        }
        Ok(train)
    }

    /// The adapter to train; nothing if all weights are trained.
    pub fn lora(&self) -> Option<LoraOptions> {
        self.lora_rank.map(|rank| LoraOptions {
            rank,
            alpha: self.lora_alpha.unwrap_or(rank as f64),
            dropout: self.lora_dropout,
            targets: self.lora_targets.clone(),
            rank_stabilized: self.lora_rank_stabilized,
            dora: self.lora_dora,
        })
    }
}

impl Step {
    fn read(section: &Section<'_>, first: bool, data: &DataOptions, train: &TrainOptions) -> Result<Self> {
        let metric = section.required("metric", section.text("metric")?, "metric = \"helpfulness\"")?;
        let name = section.text("name")?.unwrap_or_else(|| metric.clone());
        if !is_folder_name(&name) {
            return Err(section.error(&format!(
                "The step's name {name:?} cannot name a folder. Set a `name` of at most 64 letters, digits, `-`, `_` \
                 and `.` that starts with a letter or digit."
            )));
        }
        let formats = Format::ALL.map(|format| (format.name(), format));
        let path = section.required("data", section.text("data")?, "data = \"data/pairs.jsonl.gz\"")?;
        let names: Vec<(&str, &'static str)> = objective::NAMES.iter().map(|name| (*name, *name)).collect();
        let step = Self {
            name,
            metric,
            objective: section.choice("objective", &names)?.unwrap_or("dpo"),
            parameters: objective::Options {
                label_smoothing: section.number("label_smoothing", 0.0..0.5)?,
                sum_logps: section.flag("sum_logps")?,
                desirable_weight: section.number("desirable_weight", POSITIVE)?,
                undesirable_weight: section.number("undesirable_weight", POSITIVE)?,
                gamma: section.number("gamma", 0.0..)?,
                alpha: section.number("alpha", 0.0..)?,
                delta: section.number("delta", 0.0..)?,
                weight: section.number("weight", POSITIVE)?,
            },
            temperature: Temperature::read(section, first)?,
            data: path.into(),
            format: section.choice("format", &formats)?,
            data_options: DataOptions::read(section, data)?,
            train: TrainOptions::read(section, train)?,
        };
        for &temperature in step.temperature.values() {
            step.objective_at(temperature).map_err(|error| section.error(&error.to_string()))?;
        }
        Ok(step)
    }

    /// The loss at a temperature of the step.
    ///
    /// # Errors
    /// A parameter that the objective does not have; not for the temperatures of a parsed recipe.
    pub fn objective_at(&self, temperature: f64) -> Result<Objective> {
        self.parameters.build(self.objective, temperature)
    }
}

/// The matrices that an adapter is for.
fn targets(section: &Section<'_>) -> Result<Option<Vec<Projection>>> {
    let Some(names) = section.texts("lora_targets")? else { return Ok(None) };
    let targets = names.iter().map(|name| name.parse()).collect::<Result<Vec<_>>>();
    targets.map(Some).map_err(|error| section.error(&format!("In `lora_targets`: {error}")))
}

/// Whether a name is safe as a folder's name on every system.
fn is_folder_name(name: &str) -> bool {
    name.len() <= 64
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}

impl Temperature {
    fn read(section: &Section<'_>, first: bool) -> Result<Self> {
        if first {
            section.forbid(
                "beta_over_lambda",
                "The first step has no λ: it takes `beta`, the weight β of the KL term. Write for example `beta = 0.1`.",
            )?;
            let beta = section.number("beta", POSITIVE)?;
            Ok(Self::Beta(section.required("beta", beta, "beta = 0.1")?))
        } else {
            section.forbid(
                "beta",
                "Only the first step takes `beta`. A later step starts from the policy before it and takes \
                 `beta_over_lambda`, the ratio β/λ of the first step's β to the weight λ of the step's own metric: the \
                 smaller it is, the more the metric counts. Write for example `beta_over_lambda = 0.1`, or a list to \
                 train one policy for each value.",
            )?;
            let ratios = section.sweep("beta_over_lambda", POSITIVE)?;
            Ok(Self::BetaOverLambda(section.required("beta_over_lambda", ratios, "beta_over_lambda = 0.1")?))
        }
    }

    /// The values, one for each policy that the step makes of each policy before it.
    pub fn values(&self) -> &[f64] {
        match self {
            Self::Beta(beta) => std::slice::from_ref(beta),
            Self::BetaOverLambda(ratios) => ratios,
        }
    }
}

impl Evaluate {
    fn read(section: &Section<'_>) -> Result<Self> {
        Ok(Self {
            prompts: section.texts("prompts")?.unwrap_or_default(),
            max_new_tokens: section.count("max_new_tokens", 1)?.unwrap_or(64),
        })
    }
}
