//! The recipe: one TOML file that is a whole experiment.
//!
//! [`Recipe::load`] reads a file and checks every key, so that what comes out can be run as it is. All
//! defaults are filled in. [`Recipe::plan`] expands the steps into the policies to train. The keys are
//! described for users in `docs/recipes.md`.

mod blend;
mod constraint;
mod evaluation;
mod judge;
mod location;
mod options;
mod plan;
mod section;
mod step;
mod tree;

use std::ops::Bound::{self, Excluded, Unbounded};
use std::path::{Path, PathBuf};

pub use blend::{Blend, Merging, PolicyRef};
use blend::{MERGE_KEYS, MIX_KEYS};
use constraint::CONSTRAINT_KEYS;
pub use constraint::{ChoiceOptions, Constraint, Realise, StepRef};
use engine::{Error, Result};
pub use evaluation::{AnswerJudge, ChatJudge, Evaluate, External, ExternalSource, PromptSet, PromptSource};
use evaluation::{EVALUATE_KEYS, Known};
use judge::JUDGE_KEYS;
pub use judge::{Judge, JudgeSource};
pub use location::{Fetched, Location};
use options::{DATA_KEYS, TRAIN_KEYS};
pub use options::{DataOptions, PreviousAdapter, TrainOptions};
use plan::Sweep;
pub use plan::{Plan, PlannedBlend, PlannedStep, short};
use section::Section;
use serde::Serialize;
use step::STEP_KEYS;
pub use step::{BASE, Origin, Step, Temperature};

/// Sweeps multiply along the chain; a recipe that asks for more policies than this is a mistake.
const MAX_POLICIES: usize = 1000;

/// Greater than 0.
const POSITIVE: (Bound<f64>, Bound<f64>) = (Excluded(0.0), Unbounded);

const ROOT_KEYS: &[&str] =
    &["model", "run", "data", "train", "step", "merge", "mix", "judge", "constraint", "evaluate"];
const MODEL_KEYS: &[&str] = &["base"];
const RUN_KEYS: &[&str] = &["out", "seed", "threads", "memory_gib"];
const SECTIONS: &[(&str, &[&str])] = &[
    ("[model]", MODEL_KEYS),
    ("[run]", RUN_KEYS),
    ("[data]", DATA_KEYS),
    ("[train]", TRAIN_KEYS),
    ("[[step]]", STEP_KEYS),
    ("[merge]", MERGE_KEYS),
    ("[mix]", MIX_KEYS),
    ("[[judge]]", JUDGE_KEYS),
    ("[constraint]", CONSTRAINT_KEYS),
    ("[evaluate]", EVALUATE_KEYS),
    ("[[evaluate.prompts]]", evaluation::PROMPTS_KEYS),
    ("[[evaluate.policy]]", evaluation::POLICY_KEYS),
    ("[[evaluate.judge]]", evaluation::JUDGE_KEYS),
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
    /// Merges of policies, P-SACPO and others.
    #[serde(rename = "merge", skip_serializing_if = "Vec::is_empty")]
    pub merges: Vec<Blend>,
    /// Mixtures of policies at decode time.
    #[serde(rename = "mix", skip_serializing_if = "Vec::is_empty")]
    pub mixes: Vec<Blend>,
    /// Who scores answers and pairs, at most one for each metric.
    #[serde(rename = "judge", skip_serializing_if = "Vec::is_empty")]
    pub judges: Vec<Judge>,
    /// What a policy must meet, in the order of the steps that see to it.
    #[serde(rename = "constraint", skip_serializing_if = "Vec::is_empty")]
    pub constraints: Vec<Constraint>,
    /// What to ask every policy when training is done.
    pub evaluate: Evaluate,
}

/// `[model]`: the model that the first step starts from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BaseModel {
    /// A folder in Hugging Face's layout, or a `.gguf` file.
    pub base: Location,
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
        let sections = root.sections("step")?;
        let step_keys = [STEP_KEYS, DATA_KEYS, TRAIN_KEYS].concat();
        let mut steps: Vec<Step> = Vec::new();
        for section in &sections {
            section.only(&step_keys, SECTIONS)?;
            steps.push(Step::read(section, &steps, &data, &train)?);
        }
        let model = BaseModel::read(&known(root.section("model")?, MODEL_KEYS)?)?;
        check_steps(&steps, &sections, &name)?;
        let constraint_sections = several(&root, "constraint", CONSTRAINT_KEYS)?;
        let mut constraints: Vec<Constraint> = Vec::new();
        for section in &constraint_sections {
            constraints.push(Constraint::read(section, &constraints, &steps)?);
        }
        let plan = plan::expand(&steps, &constraints);
        let trained = Sweep { steps: &steps, plan: &plan };
        let blends = |key, keys: &[&str], merges| -> Result<Vec<(Blend, Section<'_>)>> {
            let read = |section| Ok((Blend::read(&section, merges, &trained)?, section));
            several(&root, key, keys)?.into_iter().map(read).collect()
        };
        let (merges, mixes) = (blends("merge", MERGE_KEYS, true)?, blends("mix", MIX_KEYS, false)?);
        let judge_sections = several(&root, "judge", JUDGE_KEYS)?;
        let mut judges: Vec<Judge> = Vec::new();
        for section in &judge_sections {
            judges.push(Judge::read(section, &judges, &trained)?);
        }
        for (constraint, section) in constraints.iter().zip(&constraint_sections).take(1) {
            constraint.check_start(section, &steps, &plan)?;
        }
        let (blended, blend_sections): (Vec<Blend>, Vec<Section<'_>>) = merges.into_iter().chain(mixes).unzip();
        let (mixes, merges): (Vec<Blend>, _) = blended.into_iter().partition(|blend| blend.merging.is_none());
        let blends = plan::between(&merges).chain(plan::between(&mixes)).map(|blend| blend.name);
        let policies: Vec<String> =
            std::iter::once(BASE.into()).chain(plan.iter().map(|policy| policy.name.clone())).chain(blends).collect();
        let known_before = Known { policies: &policies, judges: &judges };
        let evaluate = Evaluate::read(&known(root.section("evaluate")?, EVALUATE_KEYS)?, &known_before)?;
        let recipe = Self {
            model,
            run: Run::read(&known(root.section("run")?, RUN_KEYS)?, path)?,
            steps,
            merges,
            mixes,
            judges,
            constraints,
            evaluate,
        };
        recipe.check_values(&sections)?;
        recipe.check_judges(&sections, &constraint_sections)?;
        recipe.check_names(&sections, &blend_sections)?;
        Ok(recipe)
    }

    /// The recipe as TOML with all defaults and overrides written out; parsing it gives the same recipe.
    ///
    /// # Errors
    /// If a path is not UTF-8, which no parsed recipe has.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|error| Error::Failed(format!("Could not write the recipe as TOML: {error}.")))
    }

    /// The policies that are known before anything is trained.
    pub fn plan(&self) -> Plan {
        let blends = plan::between(&self.merges).chain(plan::between(&self.mixes)).collect();
        Plan { steps: plan::expand(&self.steps, &self.constraints), blends }
    }

    /// Where the models are that it starts from and is judged by.
    pub fn model_locations(&mut self) -> impl Iterator<Item = &mut Location> {
        let judges = self.judges.iter_mut().filter_map(|judge| match &mut judge.source {
            JudgeSource::Model(model, _) => Some(model),
            JudgeSource::Policy(_) | JudgeSource::Quickstart(_) => None,
        });
        std::iter::once(&mut self.model.base).chain(judges)
    }

    /// Where its data and prompts are.
    pub fn data_locations(&mut self) -> impl Iterator<Item = &mut Location> {
        let of_steps = self.steps.iter_mut().flat_map(|step| {
            std::iter::once(&mut step.data)
                .chain(&mut step.validation_data)
                .chain(&mut step.data_options.exclude_prompts)
        });
        let choices = self.constraints.iter_mut().filter_map(|constraint| constraint.choice.as_mut());
        let of_choices = choices.flat_map(|choice| [&mut choice.prompts, &mut choice.held_out_prompts]).flatten();
        let of_sets = self.evaluate.prompts.iter_mut().filter_map(|set| match &mut set.source {
            PromptSource::File(file) => Some(file),
            PromptSource::Texts(_) => None,
        });
        let of_policies = self.evaluate.policies.iter_mut().filter_map(|policy| match &mut policy.source {
            ExternalSource::Answers(file) => Some(file),
            ExternalSource::Model { .. } => None,
        });
        of_steps.chain(of_choices).chain(of_sets).chain(of_policies)
    }

    /// The judge of a metric.
    pub fn judge(&self, metric: &str) -> Option<&Judge> {
        self.judges.iter().find(|judge| judge.metric == metric)
    }

    /// Checks that every step has a temperature, or is given one by a constraint, and something to start from.
    fn check_values(&self, sections: &[Section<'_>]) -> Result<()> {
        let chosen = |step: usize| self.constraints.iter().any(|constraint| constraint.step.index == step);
        for (number, (step, section)) in self.steps.iter().zip(sections).enumerate() {
            if step.temperature.is_open() && !chosen(number) {
                section.required::<()>("beta_over_lambda", None, "beta_over_lambda = 0.1")?;
            }
            let made = |origin: usize| self.plan().steps.iter().any(|policy| policy.step == origin);
            if chosen(number) && !step.temperature.is_open() && step.from.step.is_some_and(|origin| !made(origin)) {
                return Err(section.error(&format!(
                    "It starts from the step `{}`, of which there is no policy before its λ is chosen, so its own \
                     `beta_over_lambda` makes none. Remove it: a constraint gives the value.",
                    step.from.name
                )));
            }
            let unknown = |origin: usize| {
                let open = self.steps[origin].temperature.is_open();
                open || self.constraints.iter().any(|c| c.step.index == origin && c.weighs_labels(&self.steps))
            };
            if step.from.step.is_some_and(unknown) && !chosen(number) {
                return Err(section.error(&format!(
                    "It starts from the step `{}`, of which there is no policy before its λ is chosen. Give that step \
                     `beta_over_lambda`, or start from another one.",
                    step.from.name
                )));
            }
        }
        Ok(())
    }

    /// Checks that every metric that needs a judge has one, which is trained before it is asked.
    fn check_judges(&self, steps: &[Section<'_>], constraints: &[Section<'_>]) -> Result<()> {
        let plan = self.plan().steps;
        let check = |metric: &str, section: &Section<'_>, before: usize| {
            match self.judge(metric) {
            None => Err(section.error(&format!(
                "The metric `{metric}` has no judge. Add a `[[judge]]` with `metric = \"{metric}\"` and `policy`, \
                 `reward_model`, `cost_model` or `quickstart`."
            ))),
            Some(Judge { source: JudgeSource::Policy(PolicyRef { name, planned: Some(index) }), .. })
                if plan[*index].step >= before =>
            {
                Err(section.error(&format!(
                    "The judge of `{metric}` is the policy `{name}`, which is not trained before this step. Let a policy \
                     of a step above judge it."
                )))
            }
            Some(_) => Ok(()),
        }
        };
        for (number, (step, section)) in self.steps.iter().zip(steps).enumerate() {
            for metric in step.relabel.iter().chain(&step.margin).flat_map(|weights| weights.keys()) {
                check(metric, section, number)?;
            }
        }
        for (constraint, section) in self.constraints.iter().zip(constraints) {
            // a policy that takes part in the choice can judge nothing of it, but those of its step that are there before can
            check(&constraint.metric, section, self.steps.len())?;
        }
        Ok(())
    }

    /// Checks that all policies have names of their own.
    fn check_names(&self, steps: &[Section<'_>], blends: &[Section<'_>]) -> Result<()> {
        let of_blends = |blends: &[Blend]| -> Vec<usize> { blends.iter().map(|blend| blend.q.len()).collect() };
        let counts = [of_blends(&self.merges), of_blends(&self.mixes)].concat();
        let blend_of = counts.iter().zip(blends).flat_map(|(count, section)| std::iter::repeat_n(section, *count));
        let Plan { steps: trained, blends } = self.plan();
        let names = trained.iter().map(|policy| (&policy.name, &steps[policy.step]));
        let names: Vec<_> = names.chain(blends.iter().map(|policy| &policy.name).zip(blend_of)).collect();
        for (i, (name, section)) in names.iter().enumerate() {
            if names[..i].iter().any(|(other, _)| other == name) {
                return Err(section.error(&format!("Two policies would be called `{name}`. Set a `name` of its own.")));
            }
        }
        Ok(())
    }
}

/// Checks what concerns several steps at once: that there is one, the number of policies, adapters on adapters.
fn check_steps(steps: &[Step], sections: &[Section<'_>], file: &str) -> Result<()> {
    if steps.is_empty() {
        return Err(Error::input(format!(
            "The recipe {file} has no step, so there is nothing to train. Add a `[[step]]` with `metric`, `beta` and `data`."
        )));
    }
    let mut policies: Vec<usize> = Vec::new();
    for (step, section) in steps.iter().zip(sections) {
        let starts = step.from.step.map_or(1, |origin| policies[origin]);
        policies.push(starts * step.temperature.values().len());
        let total: usize = policies.iter().sum();
        if total > MAX_POLICIES {
            return Err(section.error(&format!(
                "The sweeps up to this step multiply to {total} policies. Shorten the lists of temperatures, so that there are \
                 at most {MAX_POLICIES}."
            )));
        }
        // a step from the base model has nothing below it, so that its adapter is the stack
        let Some(before) = step.from.step.map(|origin| &steps[origin].train) else { continue };
        let stacks = step.train.lora_rank.is_some() && step.train.lora_previous == PreviousAdapter::Stack;
        if stacks && (before.lora().is_none_or(|below| below.dora) || step.train.lora_dora) {
            return Err(section.error(
                "`lora_previous = \"stack\"` puts the step's adapter on top of that of the step that it starts from, but there is \
                 none, or one of the two has DoRA, which cannot be stacked. Write `lora_previous = \"fold\"`.",
            ));
        }
    }
    Ok(())
}

/// The tables under a key, if all their keys are among `keys`.
fn several<'a>(root: &Section<'a>, key: &str, keys: &[&str]) -> Result<Vec<Section<'a>>> {
    root.one_or_more(key)?.into_iter().map(|section| known(section, keys)).collect()
}

/// The section, if all its keys are among `keys`.
fn known<'a>(section: Section<'a>, keys: &[&str]) -> Result<Section<'a>> {
    section.only(keys, SECTIONS)?;
    Ok(section)
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

#[cfg(test)]
mod tests {
    use super::SECTIONS;

    #[test]
    fn every_key_is_documented() {
        let docs = include_str!("../../../docs/recipes.md");
        for key in SECTIONS.iter().flat_map(|(_, keys)| *keys) {
            assert!(docs.contains(&format!("| `{key}` |")), "docs/recipes.md says nothing of `{key}`");
        }
    }
}
