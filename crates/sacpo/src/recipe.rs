//! The recipe: one TOML file that is a whole experiment.
//!
//! [`Recipe::load`] reads a file and checks every key, so that what comes out can be run as it is. All
//! defaults are filled in. [`Recipe::plan`] expands the steps into the policies to train. The keys are
//! described for users in `docs/recipes.md`.

mod options;
mod section;
mod tree;

use std::ops::Bound::{self, Excluded, Unbounded};
use std::path::{Path, PathBuf};

use align::data::Format;
use align::objective::{self, Objective};
use engine::{Error, Result};
use options::{DATA_KEYS, TRAIN_KEYS};
pub use options::{DataOptions, PreviousAdapter, TrainOptions};
use section::Section;
use serde::Serialize;

/// Sweeps multiply along the chain; a recipe that asks for more policies than this is a mistake.
const MAX_POLICIES: usize = 1000;

/// Greater than 0.
const POSITIVE: (Bound<f64>, Bound<f64>) = (Excluded(0.0), Unbounded);

const ROOT_KEYS: &[&str] = &["model", "run", "data", "train", "step", "evaluate"];
const MODEL_KEYS: &[&str] = &["base"];
const RUN_KEYS: &[&str] = &["out", "seed", "threads", "memory_gib"];
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
        // the first step has nothing below it, so that there its adapter is the stack
        for (pair, section) in self.steps.windows(2).zip(&sections[1..]) {
            let [before, step] = [&pair[0].train, &pair[1].train];
            let stacks = step.lora_rank.is_some() && step.lora_previous == PreviousAdapter::Stack;
            if stacks && (before.lora().is_none_or(|below| below.dora) || step.lora_dora) {
                return Err(section.error(
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
