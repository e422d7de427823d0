//! The multipliers λ that meet stated thresholds on the safety, and whether a policy meets them.
//!
//! Theorems 1 and 4 of arXiv 2404.11049 make the constrained optimum π_λ ∝ π_r·exp(Σ λ_i g_i/β), so answers of π_r that are
//! scored by the g_i tell the expected safeties G_i(λ) = E_{π_λ}\[g_i\] for every λ before anything is trained: [`Samples`]
//! estimates them and [`Samples::choose`] takes the λ whose lower confidence bounds meet the thresholds and no more. What
//! training then makes of that λ need not be the tilt; [`Certificate`] judges the policy itself, on prompts that were held
//! out.
//!
//! `docs/choosing-lambda.md` has the formulas and what was measured.

mod bootstrap;
mod bounded;
mod certificate;
mod multiplier;
mod samples;

pub use bootstrap::{Bootstrap, Mean};
pub use certificate::{Certificate, Verdict};
pub use multiplier::Choice;
pub use samples::{EffectiveSampleSize, Estimate, Samples};

use engine::{Error, Result};

/// The highest confidence of one bound.
const HIGHEST_CONFIDENCE: f64 = 0.999;

/// Fails unless a confidence level is one that bounds can have.
fn check_confidence(confidence: f64) -> Result<()> {
    if (0.5..=HIGHEST_CONFIDENCE).contains(&confidence) {
        return Ok(());
    }
    Err(Error::input(format!(
        "The confidence level is {confidence:?}, but it must lie between 0.5 and {HIGHEST_CONFIDENCE}; 0.95 is usual."
    )))
}

/// Fails unless every constraint has a threshold that is a number.
fn check_thresholds(thresholds: &[f64], constraints: usize) -> Result<()> {
    if thresholds.len() != constraints {
        return Err(Error::input(format!(
            "There are {} thresholds for {constraints} constraints. Give one for each.",
            thresholds.len()
        )));
    }
    match thresholds.iter().position(|threshold| !threshold.is_finite()) {
        None => Ok(()),
        Some(i) => Err(Error::input(format!(
            "The threshold of constraint {} is {:?}, but it must be a finite number.",
            i + 1,
            thresholds[i]
        ))),
    }
}

/// Fails unless these are numbers of at least two prompts.
fn check_values(by_prompt: &[f64]) -> Result<()> {
    if by_prompt.len() < 2 {
        return Err(Error::input(format!(
            "There are values of {} prompts, but how much prompts differ can be seen from two of them on. Take more prompts: \
             a hundred or more are usual.",
            by_prompt.len()
        )));
    }
    match by_prompt.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(x) => Err(Error::input(format!(
            "The value of prompt {} is {:?}, but it must be a finite number.",
            x + 1,
            by_prompt[x]
        ))),
    }
}

/// The mean of values, of which there is at least one.
fn average(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}
