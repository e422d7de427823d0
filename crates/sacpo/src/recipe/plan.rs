//! The policies that a recipe asks for.

use serde::Serialize;

use super::blend::{Blend, Merging};
use super::constraint::Constraint;
use super::step::{Step, Temperature};

/// All policies that are known before anything is trained; those that meet constraints come to them.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The policies to train, every parent before its children.
    pub steps: Vec<PlannedStep>,
    /// The policies between them.
    pub blends: Vec<PlannedBlend>,
}

/// One policy to train.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PlannedStep {
    /// The policy's name, unique in the plan and fit for a folder's name.
    pub name: String,
    /// The index of its step in [`Recipe::steps`](super::Recipe::steps).
    pub step: usize,
    /// The index in the plan of the policy that it starts from and is referenced to; `None`: the base model.
    pub parent: Option<usize>,
    /// The temperature that its objective is given: β if it starts from the base model, else β/λ.
    pub beta: f64,
}

/// One policy between two others.
#[derive(Debug, Clone, PartialEq)]
pub struct PlannedBlend {
    /// The policy's name, unique in the plan and fit for a folder's name.
    pub name: String,
    /// The policies at q = 0 and q = 1: their indices among the planned steps; `None`: the base model.
    pub ends: [Option<usize>; 2],
    /// The share of the second.
    pub q: f64,
    /// How their weights are merged; nothing if their logits are mixed.
    pub merging: Option<Merging>,
    /// Whether q may lie outside 0 to 1.
    pub extrapolate: bool,
}

/// The steps of a recipe and what they expand to.
pub(super) struct Sweep<'a> {
    pub(super) steps: &'a [Step],
    pub(super) plan: &'a [PlannedStep],
}

impl PlannedStep {
    /// β/λ of a policy that starts from another; `None` if it starts from the base model and has no λ.
    pub fn beta_over_lambda(&self) -> Option<f64> {
        self.parent.map(|_| self.beta)
    }

    /// The policy of a step at a temperature, of this parent. `among` says whether the step has several parents, `alone`
    /// whether it has no other value.
    fn new(step: usize, options: &Step, parent: Option<(usize, &str)>, among: bool, beta: f64, alone: bool) -> Self {
        let prefix = parent.filter(|_| among).map(|(_, name)| format!("{name}-")).unwrap_or_default();
        let value = match options.temperature {
            Temperature::Beta(_) if alone => String::new(),
            _ => format!("-{}", short(beta)),
        };
        Self { name: format!("{prefix}{}{value}", options.name), step, parent: parent.map(|(index, _)| index), beta }
    }
}

/// Expands steps into the policies to train.
///
/// A step makes one policy from each policy of the step that it starts from, and one for each value of its sweep.
/// Names are the step's name; with the value where it starts from another step, or has several (`harmlessness-0.05`); and
/// behind the parent's name if that step made several policies (`harmlessness-0.05-honesty-0.1`). A step whose labels wait for
/// the λ of a constraint makes none yet.
pub(super) fn expand(steps: &[Step], constraints: &[Constraint]) -> Vec<PlannedStep> {
    let mut plan: Vec<PlannedStep> = Vec::new();
    for (number, step) in steps.iter().enumerate() {
        let of_origin = |policy: &&(usize, &PlannedStep)| Some(policy.1.step) == step.from.step;
        let parents: Vec<Option<(usize, &str)>> = match step.from.step {
            None => vec![None],
            Some(_) => {
                plan.iter().enumerate().filter(|p| of_origin(&p)).map(|(i, p)| Some((i, p.name.as_str()))).collect()
            }
        };
        let labels_open = constraints.iter().any(|c| c.step.index == number && c.weighs_labels(steps));
        let values = if labels_open { &[] } else { step.temperature.values() };
        let (among, alone) = (parents.len() > 1, values.len() == 1);
        let of_parent =
            |&parent| values.iter().map(move |&beta| PlannedStep::new(number, step, parent, among, beta, alone));
        let policies: Vec<PlannedStep> = parents.iter().flat_map(of_parent).collect();
        plan.extend(policies);
    }
    plan
}

/// Expands merges and mixtures into the policies that they name.
pub(super) fn between(blends: &[Blend]) -> impl Iterator<Item = PlannedBlend> {
    let of = |blend: &Blend, q: f64| PlannedBlend {
        name: format!("{}-{}", blend.name, short(q)),
        ends: [blend.from.planned, blend.to.planned],
        q,
        merging: blend.merging,
        extrapolate: blend.extrapolate,
    };
    blends.iter().flat_map(move |blend| blend.q.iter().map(move |&q| of(blend, q)))
}

/// A number as short as it reads exactly, without an exponent where people write none.
pub fn short(value: f64) -> String {
    if value == 0.0 || (1e-5..1e7).contains(&value.abs()) { format!("{value}") } else { format!("{value:e}") }
}
