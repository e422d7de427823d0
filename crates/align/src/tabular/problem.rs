//! The constrained problem, checked.

use engine::{Error, Result};
use serde::Deserialize;

use super::{Policy, Table};

/// How far the probabilities of a prompt may sum from 1; within it they are normalised.
const SUM_TOLERANCE: f64 = 1e-6;

/// Numbers up to this keep every sum and quotient here finite.
const LARGEST: f64 = 1e100;

/// A constrained problem as it is written down: the JSON object that `sacpo tabular` reads.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// π_ref(y|x), `[prompt][answer]`: at least 0, summing to 1 for every prompt. An answer with 0 is impossible.
    #[serde(rename = "ref")]
    pub reference: Table,
    /// r(x, y), of the same shape.
    pub reward: Table,
    /// g_i(x, y), `[constraint][prompt][answer]`.
    pub safety: Vec<Table>,
    /// How often each prompt occurs, relative to the others: at least 0, not all 0. All the same if not given.
    #[serde(default)]
    pub prompt_weights: Option<Vec<f64>>,
    /// β > 0.
    pub beta: f64,
    /// b_i, one for each constraint.
    pub thresholds: Vec<f64>,
}

impl Description {
    /// The keys in JSON; all but `prompt_weights` must be there.
    pub const KEYS: [&'static str; 6] = ["ref", "reward", "safety", "prompt_weights", "beta", "thresholds"];
}

/// max_π E\[r\] − β KL(π ‖ π_ref) subject to E\[g_i\] ≥ b_i (problems 9 and 19 of arXiv 2404.11049).
#[derive(Debug, Clone, PartialEq)]
pub struct Problem {
    pub(super) weights: Vec<f64>,
    pub(super) reference: Policy,
    pub(super) reward: Table,
    pub(super) safety: Vec<Table>,
    pub(super) beta: f64,
    pub(super) thresholds: Vec<f64>,
}

impl Problem {
    /// Checks a description.
    ///
    /// # Errors
    /// [`Error::Input`] that names the field, and prompt and answer counted from 1, for shapes that do not fit, numbers
    /// that are not finite or beyond 1e100, probabilities and weights that are none, and β ≤ 0.
    pub fn new(description: Description) -> Result<Self> {
        let Description { reference, reward, safety, prompt_weights, beta, thresholds } = description;
        if !(1.0 / LARGEST..=LARGEST).contains(&beta) {
            return Err(Error::input(format!(
                "`beta` is {beta:?}, but it must be a number above 0, from 1e-100 to 1e100. It is the weight of the KL divergence \
                 from `ref`: values between 0.01 and 1 are usual."
            )));
        }
        check_reference(&reference)?;
        let shape: Vec<usize> = reference.iter().map(Vec::len).collect();
        check_values("`reward`", &reward, &shape)?;
        for (i, values) in safety.iter().enumerate() {
            check_values(&format!("Constraint {} of `safety`", i + 1), values, &shape)?;
        }
        if thresholds.len() != safety.len() {
            return Err(Error::input(format!(
                "`thresholds` has {} numbers, but `safety` has {} constraints. Give one threshold per constraint.",
                thresholds.len(),
                safety.len()
            )));
        }
        if let Some(i) = thresholds.iter().position(|b| !is_value(*b)) {
            return Err(Error::input(format!(
                "Number {} of `thresholds` is {:?}, but it must be finite and at most 1e100 in size. Leave a constraint \
                 out altogether if it should not bind.",
                i + 1,
                thresholds[i]
            )));
        }
        let prompts = shape.len();
        let weights = normalised_weights(prompt_weights.unwrap_or_else(|| vec![1.0; prompts]), prompts)?;
        Ok(Self { weights, reference: Policy::from_weights(&reference), reward, safety, beta, thresholds })
    }

    /// The weights of the prompts; they sum to 1.
    pub fn weights(&self) -> &[f64] {
        &self.weights
    }

    /// π_ref.
    pub fn reference(&self) -> &Policy {
        &self.reference
    }

    /// r.
    pub fn reward(&self) -> &Table {
        &self.reward
    }

    /// The g_i.
    pub fn safety(&self) -> &[Table] {
        &self.safety
    }

    /// β.
    pub fn beta(&self) -> f64 {
        self.beta
    }

    /// The b_i.
    pub fn thresholds(&self) -> &[f64] {
        &self.thresholds
    }
}

fn is_value(value: f64) -> bool {
    value.abs() <= LARGEST
}

fn check_reference(reference: &Table) -> Result<()> {
    if reference.is_empty() {
        return Err(Error::input("`ref` has no prompts. Give one list of probabilities per prompt."));
    }
    for (x, row) in reference.iter().enumerate() {
        if row.is_empty() {
            return Err(Error::input(format!("`ref` of prompt {} is empty. Give one probability per answer.", x + 1)));
        }
        if let Some(y) = row.iter().position(|p| !(0.0..=1.0 + SUM_TOLERANCE).contains(p)) {
            return Err(Error::input(format!(
                "`ref` of prompt {}, answer {} is {}, but a probability lies between 0 and 1.",
                x + 1,
                y + 1,
                row[y]
            )));
        }
        let sum: f64 = row.iter().sum();
        if (sum - 1.0).abs() > SUM_TOLERANCE {
            return Err(Error::input(format!(
                "The probabilities in `ref` of prompt {} sum to {sum}, but they must sum to 1. Add the answers that are \
                 missing, or divide by the sum.",
                x + 1
            )));
        }
    }
    Ok(())
}

fn check_values(what: &str, values: &Table, shape: &[usize]) -> Result<()> {
    if values.len() != shape.len() {
        return Err(Error::input(format!(
            "{what} has {} prompts, but `ref` has {}. Give one list of values per prompt.",
            values.len(),
            shape.len()
        )));
    }
    for (x, (row, &answers)) in values.iter().zip(shape).enumerate() {
        if row.len() != answers {
            return Err(Error::input(format!(
                "{what} has {} answers to prompt {}, but `ref` has {answers}. Give one value per answer.",
                row.len(),
                x + 1
            )));
        }
        if let Some(y) = row.iter().position(|value| !is_value(*value)) {
            return Err(Error::input(format!(
                "{what} of prompt {}, answer {} is {:?}, but it must be finite and at most 1e100 in size. Give an answer \
                 that must never occur the probability 0 in `ref`.",
                x + 1,
                y + 1,
                row[y]
            )));
        }
    }
    Ok(())
}

fn normalised_weights(weights: Vec<f64>, prompts: usize) -> Result<Vec<f64>> {
    if weights.len() != prompts {
        return Err(Error::input(format!(
            "`prompt_weights` has {} numbers, but `ref` has {prompts} prompts. Give one weight per prompt, or leave it out \
             to weigh all the same.",
            weights.len()
        )));
    }
    if let Some(x) = weights.iter().position(|weight| !(0.0..=LARGEST).contains(weight)) {
        return Err(Error::input(format!(
            "Number {} of `prompt_weights` is {:?}, but a weight is at least 0, finite and at most 1e100.",
            x + 1,
            weights[x]
        )));
    }
    let sum: f64 = weights.iter().sum();
    if sum == 0.0 {
        return Err(Error::input("All `prompt_weights` are 0. Give at least one prompt a weight above 0."));
    }
    Ok(weights.iter().map(|weight| weight / sum).collect())
}
