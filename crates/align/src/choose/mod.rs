//! The multiplier λ that meets a stated threshold on the safety, and whether a policy meets it.
//!
//! Theorem 1 of arXiv 2404.11049 makes the constrained optimum π_λ ∝ π_r·exp(λ g/β), so answers of π_r that are scored
//! by g tell the expected safety G(λ) = E_{π_λ}\[g\] for every λ before anything is trained: [`Samples`] estimates it and
//! [`Samples::choose`] takes the smallest λ whose lower confidence bound meets the threshold. What training then makes of
//! that λ need not be the tilt; [`Certificate`] judges the policy itself, on prompts that were held out.
//!
//! `docs/choosing-lambda.md` has the formulas and what was measured.

mod bootstrap;
mod certificate;
mod multiplier;
mod samples;

pub use bootstrap::Bootstrap;
pub use certificate::{Certificate, Verdict};
pub use multiplier::Choice;
pub use samples::{EffectiveSampleSize, Estimate, Samples};

use engine::{Error, Result};

/// Fails unless a confidence level is one that bounds can have.
fn check_confidence(confidence: f64) -> Result<()> {
    if (0.5..=0.999).contains(&confidence) {
        return Ok(());
    }
    Err(Error::input(format!(
        "The confidence level is {confidence:?}, but it must lie between 0.5 and 0.999; 0.95 is usual."
    )))
}

/// Fails unless a threshold is a number.
fn check_threshold(threshold: f64) -> Result<()> {
    if threshold.is_finite() {
        return Ok(());
    }
    Err(Error::input(format!("The threshold is {threshold:?}, but it must be a finite number.")))
}
