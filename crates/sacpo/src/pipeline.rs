//! From a recipe to policies: the stages of a run, each done once.
//!
//! [`prepare`] reads and checks all that goes in before [`run`] writes anything.
//!
//! ```text
//! OUT/recipe.toml            the recipe with all defaults
//! OUT/steps/NAME/            metrics.jsonl, checkpoint/, policy.json (written last: the policy is complete);
//!                            adapter/ where an adapter was trained, which is folded into the checkpoint
//! OUT/merges/NAME/           checkpoint/, policy.json
//! OUT/cache/                 log-probabilities and answers that no later run needs to compute again
//! OUT/answers/, verdicts/    what policies answer, and what judges say of it
//! ```

mod begun;
mod blend;
mod constraint;
mod data;
mod drawing;
pub(crate) mod dry_run;
mod evaluation;
mod folder;
mod judge;
pub(crate) mod manifest;
mod record;
mod sample;
mod train;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use align::reference;
use align::step::{self, PreferenceReport};
use align::trainer::MemoryPlan;
use blend::Between;
pub(crate) use constraint::Outcome as ConstraintOutcome;
pub(crate) use data::StepData;
pub(crate) use data::load_scored_pairs;
use data::{load_data, warn_of_objectives};
use engine::checkpoint::{Checkpoint, GenerationConfig, StreamedModel, describe};
use engine::{Error, LoraOptions, ModelConfig, Result, Tokenizer};
pub(crate) use evaluation::{AnsweredSet, Evaluation, Lengths};
pub(crate) use folder::RunFolder;
use record::KeptAdapter;
pub(crate) use record::{Made, Provenance, write_json};
use train::Training;
pub(crate) use train::{options as train_options, parameters};

use crate::policy::{self, PolicyName};
use crate::ui;
use sacpo::recipe::{BASE, Merging, Plan, PlannedBlend, PlannedStep, PreviousAdapter, Recipe, Step};

/// A policy of a run.
pub(crate) struct Policy {
    /// The name of the step that trained it; nothing for the base model and policies between others.
    pub(crate) step: Option<String>,
    pub(crate) beta_over_lambda: Option<f64>,
    /// The share of the second of the two policies that it lies between.
    pub(crate) q: Option<f64>,
    /// Of a trained policy the temperature of its objective, and the index of the policy that it started from.
    pub(crate) origin: Option<(f64, usize)>,
    /// Where its weights are, or those of the policies that are mixed.
    pub(crate) source: PolicyName,
    /// Its adapter, if one was trained.
    adapter: Option<KeptAdapter>,
    /// Ranking of each step's held-out pairs, in the order of the steps.
    pub(crate) validation: Vec<PreferenceReport>,
    /// Seconds of training or merging, also of the calls before this one.
    pub(crate) seconds: f64,
    pub(crate) provenance: Provenance,
}

impl Policy {
    /// Its name: `base`, or unique in the run.
    pub(crate) fn name(&self) -> &str {
        &self.provenance.policy
    }

    /// The hash of its weights.
    fn hash(&self) -> &str {
        &self.provenance.model
    }

    /// Where its weights are; nothing for a mixture.
    pub(crate) fn path(&self) -> Option<&PathBuf> {
        match &self.source {
            PolicyName::Model(path) => Some(path),
            PolicyName::Mix { .. } => None,
        }
    }

    /// Loads it, and checks that weights of its own are those that were made.
    pub(crate) fn load(&self) -> Result<policy::Policy> {
        // q was checked in the recipe
        let extrapolate = matches!(self.source, PolicyName::Mix { .. });
        let loaded = policy::Policy::load(&self.source, extrapolate).map_err(|error| {
            if matches!(self.provenance.made, Made::Given { .. }) {
                return error;
            }
            Error::input(format!(
                "The policy `{}` was made, but cannot be read. {error} Put it back, or delete the folder above its checkpoint to \
                 make it again.",
                self.name()
            ))
        })?;
        match (&self.source, self.provenance.from.as_slice()) {
            (PolicyName::Model(path), _) => self.provenance.check(path, &loaded.first.model.hash())?,
            (PolicyName::Mix { a, b, .. }, [first, second]) => {
                // both ends have weights of their own
                if let Some(model) = loaded.second() {
                    first.check(a, &loaded.first.model.hash())?;
                    second.check(b, &model.hash())?;
                }
            }
            _ => {}
        }
        Ok(loaded)
    }
}

/// The base model without its weights, which are read where they are needed and leave their memory to trainings.
pub(crate) struct Base {
    pub(crate) config: ModelConfig,
    /// The hash of shape and weights.
    pub(crate) hash: String,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) generation: GenerationConfig,
}

impl From<Checkpoint> for Base {
    fn from(Checkpoint { model, tokenizer, generation }: Checkpoint) -> Self {
        Self { hash: model.hash(), config: model.config, tokenizer, generation }
    }
}

/// What goes into a run.
pub(crate) struct Inputs {
    pub(crate) base: Base,
    data: Vec<StepData>,
    /// The hashes of the reward and cost models that judge, by metric.
    scorers: BTreeMap<String, String>,
    evaluation: evaluation::Inputs,
}

/// What a run has made.
pub(crate) struct Outcome {
    /// The base model first, then the plan's trained policies, those between them, and those that constraints asked for.
    pub(crate) policies: Vec<Policy>,
    pub(crate) data: Vec<StepData>,
    /// What came of the constraints, if there are any.
    pub(crate) constraint: Option<ConstraintOutcome>,
    /// The answers of all policies, and their ratings.
    pub(crate) evaluation: Evaluation,
}

/// The index among a run's policies of one that is planned, or of the base model.
fn index_of(planned: Option<usize>) -> usize {
    planned.map_or(0, |planned| planned + 1)
}

/// A run in progress.
struct Run<'r> {
    recipe: &'r Recipe,
    plan: Plan,
    base: &'r Base,
    data: &'r [StepData],
    scorers: &'r BTreeMap<String, String>,
    evaluation: &'r evaluation::Inputs,
    folder: &'r RunFolder,
    /// The base model, the plan's trained policies as far as they are made, then all others.
    policies: Vec<Policy>,
}

/// Loads the base model of a recipe, and checks what can be checked without the data.
///
/// # Errors
/// Bad input, or files that cannot be read.
pub(crate) fn load_base(recipe: &Recipe) -> Result<Checkpoint> {
    let base = Checkpoint::load(recipe.model.base.path())?;
    ui::say(format!("Base model {}: {} parameters.", recipe.model.base, base.model.layout.len));
    check_adapters(recipe, &base.model.config)?;
    check_merges(recipe)?;
    warn_of_objectives(recipe)?;
    Ok(base)
}

/// Loads the data of a recipe and what its evaluation needs; the data's tokens are files of the folder `cache` as long as they are used.
///
/// # Errors
/// Bad input, or files that cannot be read or written.
pub(crate) fn load_inputs(recipe: &Recipe, base: Checkpoint, cache: &Path) -> Result<Inputs> {
    let scorers = judge::scorers(recipe, &base)?;
    let evaluation = evaluation::Inputs::load(recipe, &base)?;
    let load = |step| load_data(step, &base, recipe.run.seed, cache);
    let data = recipe.steps.iter().map(load).collect::<Result<Vec<_>>>()?;
    Ok(Inputs { base: base.into(), data, scorers, evaluation })
}

/// Checks that the adapters of all steps, each with what it is stacked on, suit the model.
fn check_adapters(recipe: &Recipe, config: &ModelConfig) -> Result<()> {
    let base = recipe.model.base.path();
    let adapts_base = |step: &Step| step.from.step.is_none() && step.train.lora().is_some();
    if recipe.steps.iter().any(adapts_base) && describe(base)?.adapter.is_some() {
        return Err(Error::input(format!(
            "The base model {0} is an adapter, and an adapter on an adapter cannot be loaded. Write the model that it makes \
             by `sacpo model convert {0} OUT` and give that as model.base.",
            base.display()
        )));
    }
    // of each step the rank of what its adapter may be stacked with
    let mut ranks: Vec<usize> = Vec::new();
    for step in &recipe.steps {
        let below = step.from.step.map_or(0, |origin| ranks[origin]);
        ranks.push(match step.train.lora() {
            Some(lora) => {
                let stacked = if step.train.lora_previous == PreviousAdapter::Stack { below } else { 0 };
                let rank = lora.rank.saturating_add(stacked);
                LoraOptions { rank, ..lora }
                    .validate(config)
                    .map_err(|error| Error::input(format!("In the step `{}`: {error}", step.name)))?;
                rank
            }
            None => 0,
        });
    }
    Ok(())
}

/// Checks that the base model can be merged, if it is to be.
fn check_merges(recipe: &Recipe) -> Result<()> {
    let reads_base = |blend: &PlannedBlend| {
        blend.merging.is_some_and(|merging| merging.method.needs_base() || blend.ends.contains(&None))
    };
    if recipe.plan().blends.iter().any(reads_base) {
        StreamedModel::open(recipe.model.base.path())?;
    }
    Ok(())
}

/// Makes all policies of a recipe, and ranks them on the held-out pairs of every step.
///
/// # Errors
/// A folder that holds policies of another recipe, which stays as it is; files that cannot be read or written,
/// diverged training, or [`Error::Interrupted`].
pub(crate) fn run(recipe: &Recipe, inputs: Inputs, folder: &RunFolder) -> Result<Outcome> {
    let mut run = Run::new(recipe, &inputs, folder);
    // all is checked now rather than after hours of training
    run.plan_memory(&run.complete()?)?;
    let prompts = constraint::prompts(&run)?;
    // from here on the folder is this recipe's, and no other one's that was finished in it
    folder.remove("manifest.json")?;
    folder.write("recipe.toml", &recipe.to_toml()?)?;
    for number in 0..run.plan.steps.len() {
        let training = run.training(&run.plan.steps[number]);
        run.make(training)?;
    }
    for planned in run.plan.blends.clone() {
        run.add_between(Between::from(&planned), planned.merging)?;
    }
    let constraint = constraint::meet(&mut run, prompts)?;
    run.rank()?;
    let evaluation = evaluation::carry_out(&run)?;
    let policies = run.policies;
    Ok(Outcome { policies, data: inputs.data, constraint, evaluation })
}

impl<'r> Run<'r> {
    /// A run of which only the base model is there.
    fn new(recipe: &'r Recipe, inputs: &'r Inputs, folder: &'r RunFolder) -> Self {
        let location = &recipe.model.base;
        let base = Policy {
            step: None,
            beta_over_lambda: None,
            q: None,
            origin: None,
            source: PolicyName::Model(location.path().to_owned()),
            adapter: None,
            validation: Vec::new(),
            seconds: 0.0,
            provenance: Provenance {
                policy: BASE.into(),
                model: inputs.base.hash.clone(),
                made: Made::Given { path: location.given.clone(), commit: location.commit() },
                from: Vec::new(),
            },
        };
        Self {
            recipe,
            plan: recipe.plan(),
            base: &inputs.base,
            data: &inputs.data,
            scorers: &inputs.scorers,
            evaluation: &inputs.evaluation,
            folder,
            policies: vec![base],
        }
    }

    /// The training of a planned policy. The plan's policies are the run's, after the base model.
    fn training(&self, planned: &PlannedStep) -> Training {
        Training {
            name: planned.name.clone(),
            step: planned.step,
            parent: index_of(planned.parent),
            beta: planned.beta,
            relabel: self.recipe.steps[planned.step].relabel.clone(),
        }
    }

    /// The hashes of the base model and of the plan's policies, those that are trained and then those between them, as far as they
    /// are complete. Mixtures are as soon as both ends are.
    ///
    /// # Errors
    /// A policy that is not the one that the recipe asks for. One that depends on another which is still to be made cannot be
    /// judged yet.
    fn complete(&self) -> Result<Vec<Option<String>>> {
        let mut hashes = vec![self.hash(0)];
        for planned in &self.plan.steps {
            let record = self.training(planned).finished(self, &|index| hashes[index].clone())?;
            hashes.push(record.map(|record| record.provenance.model));
        }
        let of_between = |planned: &PlannedBlend| {
            let between = Between::from(planned);
            Ok(match planned.merging {
                Some(merging) => {
                    let record = between.finished(self, merging, &|index| hashes[index].clone())?;
                    record.map(|record| record.provenance.model)
                }
                None => between.mixed_hash(&|index| hashes[index].clone()),
            })
        };
        let between = self.plan.blends.iter().map(of_between).collect::<Result<Vec<_>>>()?;
        hashes.extend(between);
        Ok(hashes)
    }

    /// For each step, how its trainings use the memory, if there are any to do: with `hashes` of what is
    /// [complete](Self::complete).
    ///
    /// # Errors
    /// A training that does not fit.
    fn plan_memory(&self, hashes: &[Option<String>]) -> Result<Vec<Option<MemoryPlan>>> {
        let of_step = |(number, step): (usize, &Step)| {
            let mut planned = self.plan.steps.iter().zip(&hashes[1..]).filter(|(policy, _)| policy.step == number);
            // a step without planned policies is one of which a constraint asks for some
            if planned.clone().next().is_some() && planned.all(|(_, hash)| hash.is_some()) {
                return Ok(None);
            }
            let StepData { train, validation, .. } = &self.data[number];
            let options = train_options(step, self.recipe.run.seed, self.recipe.run.memory_gib);
            step::plan_memory(&self.base.config, &step.objective_at(1.0)?, [train, validation], &options)
                .map(Some)
                .map_err(|error| Error::input(format!("In the step `{}`: {error}", step.name)))
        };
        self.recipe.steps.iter().enumerate().map(of_step).collect()
    }

    /// The hash of a policy that is made, by its index.
    fn hash(&self, index: usize) -> Option<String> {
        self.policies.get(index).map(|policy| policy.hash().to_owned())
    }

    /// The index of the policy of a training, which is done unless it is complete.
    fn make(&mut self, training: Training) -> Result<usize> {
        let step = &self.recipe.steps[training.step];
        let same = |policy: &Policy| {
            policy.step.as_ref() == Some(&step.name) && policy.origin == Some((training.beta, training.parent))
        };
        if let Some(index) = self.made(&training.name, same)? {
            return Ok(index);
        }
        self.policies.push(training.policy(self)?);
        Ok(self.policies.len() - 1)
    }

    /// The index of a policy between two others, whose weights are merged or whose logits are mixed.
    fn add_between(&mut self, between: Between, merging: Option<Merging>) -> Result<usize> {
        let from = between.ends.map(|end| self.policies[end].provenance.clone());
        let made = between.made(self, merging);
        let same = |policy: &Policy| policy.provenance.from == from && policy.provenance.made == made;
        if let Some(index) = self.made(&between.name, same)? {
            return Ok(index);
        }
        self.policies.push(match merging {
            Some(merging) => between.merged(self, merging)?,
            None => between.mixed(self),
        });
        Ok(self.policies.len() - 1)
    }

    /// The index of the policy of this name, if there is one.
    ///
    /// # Errors
    /// If it is not the `same` as is asked for: a constraint has found a value whose policy has the name of another one.
    fn made(&self, name: &str, same: impl Fn(&Policy) -> bool) -> Result<Option<usize>> {
        match self.policies.iter().position(|policy| policy.name() == name) {
            Some(index) if !same(&self.policies[index]) => Err(Error::input(format!(
                "Two policies would be called `{name}`: one of the recipe's and one that its constraint asks for. Give the step, \
                 merge or mixture of the first another `name`."
            ))),
            found => Ok(found),
        }
    }

    /// The index of the one policy that a constrained step starts from.
    fn start_of(&self, step: usize) -> usize {
        let origin = self.recipe.steps[step].from.step;
        index_of(self.plan.steps.iter().position(|policy| Some(policy.step) == origin))
    }

    /// The name of that policy.
    fn start_name(&self, step: usize) -> String {
        self.start_of(step).checked_sub(1).map_or(BASE, |planned| &self.plan.steps[planned].name).to_owned()
    }

    /// The index of the policy of a step that has the smallest temperature.
    fn strongest(&self, step: usize) -> usize {
        let own = self.plan.steps.iter().enumerate().filter(|(_, policy)| policy.step == step);
        index_of(own.min_by(|(_, a), (_, b)| a.beta.total_cmp(&b.beta)).map(|(planned, _)| planned))
    }

    /// β of the first step on the way to a policy.
    fn first_beta(&self, index: usize) -> f64 {
        match self.policies[index].origin {
            Some((beta, 0)) => beta,
            Some((_, parent)) => self.first_beta(parent),
            None => 1.0,
        }
    }

    /// Fills in how every policy ranks the held-out pairs of every step, relative to the base model.
    fn rank(&mut self) -> Result<()> {
        let mut base_logps: Vec<Vec<f64>> = Vec::new();
        for index in 0..self.policies.len() {
            let policy = &self.policies[index];
            let loaded = policy.load()?;
            let mut reports = Vec::new();
            for (number, (step, data)) in self.recipe.steps.iter().zip(self.data).enumerate() {
                let held_out = &data.validation;
                let bar = ui::bar(held_out.len() as u64, &format!("{} on {}", policy.name(), step.name));
                let (tokens, cache) = (step.train.micro_batch_tokens, self.folder.cache());
                let sequences = held_out.sequences();
                let policy = loaded.mixture()?.with_precision(step.train.dtype);
                let logps = reference::logps(policy, &sequences, tokens, Some(&cache), &mut ui::advance(&bar))?;
                bar.finish_and_clear();
                reports.push(step::rank(held_out, &logps, base_logps.get(number).unwrap_or(&logps)));
                if index == 0 {
                    base_logps.push(logps);
                }
            }
            self.policies[index].validation = reports;
        }
        Ok(())
    }
}
