//! `[constraint]`: what policies must meet, and how the λ for it is found.

use engine::Result;
use serde::{Serialize, Serializer};

use super::location::Location;
use super::plan::PlannedStep;
use super::section::Section;
use super::step::Step;

/// The keys of the first constraint, which are for all of them.
const CHOICE_KEYS: &[&str] =
    &["confidence", "realise", "prompts", "held_out_prompts", "max_prompts", "answers", "max_new_tokens", "shots"];
pub(super) const CONSTRAINT_KEYS: &[&str] = &[
    "metric",
    "at_least",
    "step",
    "confidence",
    "realise",
    "prompts",
    "held_out_prompts",
    "max_prompts",
    "answers",
    "max_new_tokens",
    "shots",
];

/// From fewer answers to a prompt no λ above 0 can be chosen, since it takes ten effective ones.
const MIN_ANSWERS: usize = 16;

/// `[constraint]`: the least expected score of one metric.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Constraint {
    /// The judged metric.
    pub metric: String,
    /// b of E\[g\] ≥ b.
    pub at_least: f64,
    /// The step whose λ is chosen for it. Default: the last one of this metric.
    pub step: StepRef,
    /// How λ is chosen and realised: in the first constraint, for all.
    #[serde(flatten)]
    pub choice: Option<ChoiceOptions>,
}

/// A step by its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepRef {
    /// Its name.
    pub name: String,
    /// Its index in [`Recipe::steps`](super::Recipe::steps).
    pub index: usize,
}

impl Serialize for StepRef {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.name)
    }
}

/// How λ is chosen and realised.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ChoiceOptions {
    /// The level of the bounds, of all constraints together, 0.5 to 0.999. Default 0.95.
    pub confidence: f64,
    /// What is made of a λ. Default: a policy is trained.
    pub realise: Realise,
    /// The file of the prompts from whose answers λ is chosen. Default: the step's training prompts.
    pub prompts: Option<Location>,
    /// The file of the prompts on which the policy is judged at the end. Default: the step's held-out prompts.
    pub held_out_prompts: Option<Location>,
    /// The number of different prompts of each kind at most, ≥ 2, drawn by the seed. Default 200.
    pub max_prompts: usize,
    /// Answers that are drawn for each prompt, ≥ 16. Default 64.
    pub answers: usize,
    /// The length of an answer at most, in tokens, ≥ 1. Default 128.
    pub max_new_tokens: usize,
    /// Policies that are made one after the other at most, each from what was measured of those before, ≥ 1. Default 4.
    pub shots: usize,
}

/// What is made of a λ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Realise {
    /// A policy is trained at β/λ.
    Train,
    /// The strongest policy of the step is mixed with its start at q = λ/λ̄, where λ̄ is its own λ.
    Mix,
    /// Their weights are merged at that q (P-SACPO).
    Merge,
}

impl Constraint {
    /// Reads a constraint on the policies of `steps`; `above` are the constraints before it.
    pub(super) fn read(section: &Section<'_>, above: &[Self], steps: &[Step]) -> Result<Self> {
        let first = above.is_empty();
        if !first {
            for key in CHOICE_KEYS {
                section.forbid(key, "It is for all constraints and stands in the first of them. Move it there.")?;
            }
        }
        let metric = section.required("metric", section.text("metric")?, "metric = \"harmlessness\"")?;
        let at_least = section.required("at_least", section.number("at_least", ..)?, "at_least = 0.0")?;
        let step = match section.text("step")? {
            Some(name) => steps.iter().position(|step| step.name == name).ok_or_else(|| {
                section
                    .error(&format!("`step` names `{name}`, which is no step of this recipe. Write the name of one."))
            }),
            None => steps.iter().rposition(|step| step.metric == metric).ok_or_else(|| {
                section.error(&format!(
                    "No step has the metric `{metric}`. Add one, or name by `step` the one whose λ is to be chosen."
                ))
            }),
        }?;
        let constraint = Self {
            metric,
            at_least,
            step: StepRef { name: steps[step].name.clone(), index: step },
            choice: if first { Some(ChoiceOptions::read(section)?) } else { None },
        };
        constraint.check_step(section, above, steps)?;
        Ok(constraint)
    }

    /// Whether λ is the weight of the metric in the step's labels, instead of the divisor of its β.
    pub fn weighs_labels(&self, steps: &[Step]) -> bool {
        steps[self.step.index].relabel.is_some()
    }

    fn check_step(&self, section: &Section<'_>, above: &[Self], steps: &[Step]) -> Result<()> {
        let step = &steps[self.step.index];
        let realise = above.first().unwrap_or(self).choice.as_ref().map_or(Realise::Train, |choice| choice.realise);
        let alone = above.is_empty();
        if above.iter().any(|other| other.metric == self.metric) {
            return Err(section.error(&format!("The metric `{}` is constrained twice. Keep one of them.", self.metric)));
        }
        if let Some(weights) = &step.relabel {
            let wrong = if !alone || realise != Realise::Train {
                "must be the only constraint, realised by training"
            } else if weights.contains_key(&self.metric) {
                "cannot be given a weight in `relabel` as well"
            } else if step.temperature.values().len() != 1 {
                "must have one temperature"
            } else {
                return Ok(());
            };
            return Err(section.error(&format!(
                "The labels of the step `{}` are drawn anew, and λ is the weight of `{}` in them, so it {wrong}.",
                step.name, self.metric
            )));
        }
        if step.from.step.is_none() {
            return Err(section.error(&format!(
                "The step `{}` starts from the base model and has no λ. Constrain a step that starts from another one.",
                step.name
            )));
        }
        if let Some(before) = above.last()
            && step.from.step != Some(before.step.index)
        {
            return Err(section.error(&format!(
                "The steps of several constraints are a chain, but `{}` does not start from `{}`, the step of the constraint \
                 above. Put the constraints in the order of their steps.",
                step.name, before.step.name
            )));
        }
        if realise != Realise::Train && !alone {
            return Err(section.error(
                "Mixing and merging go from one policy to another, so they realise one constraint. Write `realise = \"train\"` \
                 for several.",
            ));
        }
        if realise != Realise::Train && step.temperature.is_open() {
            return Err(section.error(&format!(
                "The step `{}` has no policy to mix or merge with. Give it a `beta_over_lambda` that is small enough to meet the \
                 constraint.",
                step.name
            )));
        }
        Ok(())
    }

    /// The policy whose answers λ is chosen from: the one that the first constraint's step starts from.
    pub(super) fn check_start(&self, section: &Section<'_>, steps: &[Step], plan: &[PlannedStep]) -> Result<()> {
        let from = &steps[self.step.index].from;
        let starts = plan.iter().filter(|policy| Some(policy.step) == from.step).count();
        if from.step.is_none() || starts == 1 {
            return Ok(());
        }
        Err(section.error(&format!(
            "λ is chosen from the answers of one policy, but the step `{}` starts from the {starts} policies of `{}`. Give \
             that step one temperature.",
            self.step.name, from.name
        )))
    }
}

impl ChoiceOptions {
    fn read(section: &Section<'_>) -> Result<Self> {
        let realise = &[("train", Realise::Train), ("mix", Realise::Mix), ("merge", Realise::Merge)];
        Ok(Self {
            confidence: section.number("confidence", 0.5..=0.999)?.unwrap_or(0.95),
            realise: section.choice("realise", realise)?.unwrap_or(Realise::Train),
            prompts: section.text("prompts")?.map(Location::from),
            held_out_prompts: section.text("held_out_prompts")?.map(Location::from),
            max_prompts: section.count("max_prompts", 2)?.unwrap_or(200),
            answers: section.count("answers", MIN_ANSWERS)?.unwrap_or(64),
            max_new_tokens: section.count("max_new_tokens", 1)?.unwrap_or(128),
            shots: section.count("shots", 1)?.unwrap_or(4),
        })
    }
}
