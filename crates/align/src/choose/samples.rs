//! The expected safety at every λ, from scored answers of one policy.

use engine::{Error, Result};
use serde::Serialize;

use super::Bootstrap;

/// The largest accepted score.
const LARGEST: f64 = 1e100;

/// Answers to prompts, drawn from the policy at λ₀ and scored by the safety g.
///
/// Prompts weigh the same, whatever their numbers of answers.
#[derive(Debug, Clone, PartialEq)]
pub struct Samples {
    pub(super) scores: Vec<Vec<f64>>,
    pub(super) beta: f64,
    pub(super) drawn_at: f64,
}

/// How many independent draws from the policy at λ the weighted answers to a prompt are worth: (Σw)²/Σw², from 1 to
/// the number of answers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct EffectiveSampleSize {
    /// The harmonic mean over prompts. It is the harmonic one since bias and variance of a prompt's estimate are in
    /// proportion to 1/size.
    pub average: f64,
    /// The smallest of any prompt.
    pub smallest: f64,
}

/// An estimate of G(λ) and how far it can be trusted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// λ.
    pub lambda: f64,
    /// Ĝ(λ).
    pub safety: f64,
    /// The two-sided interval of Ĝ(λ) over prompts and answers.
    pub interval: [f64; 2],
    /// The one-sided lower bound of Ĝ(λ).
    pub lower_bound: f64,
    /// An estimate of E\[Ĝ(λ)\] − G(λ), which the interval does not contain: see [`Samples::bias`].
    pub bias: f64,
    /// See there.
    pub effective_sample_size: EffectiveSampleSize,
}

impl Samples {
    /// `scores` holds g of every answer, `[prompt][answer]`; `beta` > 0 is the temperature of the reward step. The answers
    /// were drawn from π_λ at λ = `drawn_at` ≥ 0, which is 0 for π_r.
    ///
    /// Answers of a policy that was trained for λ₀ are not quite those of π_λ₀. What is estimated from them is that policy
    /// tilted by (λ − λ₀) g/β, which is what a further step would aim at.
    ///
    /// # Errors
    /// [`Error::Input`] that names the prompt, counted from 1, for a score that is not finite or beyond 1e100 and for a
    /// prompt without answers; for fewer than two prompts; and for β or λ₀ out of their ranges.
    pub fn new(scores: Vec<Vec<f64>>, beta: f64, drawn_at: f64) -> Result<Self> {
        if !(beta > 0.0 && beta.is_finite()) {
            return Err(Error::input(format!("The temperature β is {beta:?}, but it must be a number above 0.")));
        }
        check_lambda(drawn_at)?;
        if scores.len() < 2 {
            return Err(Error::input(format!(
                "There are scored answers to {} prompts, but how much prompts differ can be seen from two of them on. Score \
                 answers to more prompts: a hundred or more are usual.",
                scores.len()
            )));
        }
        for (x, row) in scores.iter().enumerate() {
            if row.is_empty() {
                return Err(Error::input(format!(
                    "Prompt {} has no scored answer. Score at least one, or leave the prompt out.",
                    x + 1
                )));
            }
            if let Some(y) = row.iter().position(|score| score.is_nan() || score.abs() > LARGEST) {
                return Err(Error::input(format!(
                    "The score of prompt {}, answer {} is {:?}, but it must be finite and at most 1e100 in size. Leave out \
                     answers that could not be scored.",
                    x + 1,
                    y + 1,
                    row[y]
                )));
            }
        }
        Ok(Self { scores, beta, drawn_at })
    }

    /// Ĝ_x(λ) = Σ_y w g / Σ_y w of every prompt, with w = exp((λ − λ₀) g/β). It does not fall with λ.
    ///
    /// # Errors
    /// [`Error::Input`] if λ is below 0 or not finite.
    pub fn by_prompt(&self, lambda: f64) -> Result<Vec<f64>> {
        check_lambda(lambda)?;
        Ok(self.scores.iter().map(|scores| weighted_mean(scores, &self.weights(scores, lambda))).collect())
    }

    /// Ĝ(λ), the mean of [`Samples::by_prompt`], with everything that says how good it is.
    ///
    /// # Errors
    /// As [`Samples::by_prompt`].
    pub fn estimate(&self, lambda: f64, bootstrap: &Bootstrap) -> Result<Estimate> {
        let values = self.by_prompt(lambda)?;
        let means = bootstrap.means(&values);
        Ok(Estimate {
            lambda,
            safety: mean(&values),
            interval: bootstrap.interval(&means),
            lower_bound: bootstrap.lower_bound(&means),
            bias: self.bias(lambda)?,
            effective_sample_size: self.effective_sample_size(lambda)?,
        })
    }

    /// The bias of Ĝ(λ) to first order, −E_x (G(2λ − λ₀) − G(λ))/N_eff, with estimates in place of both G and of N_eff.
    ///
    /// A quotient of two means is biased, here towards λ₀: for λ > λ₀ the estimate is too low, and a bound on it errs on
    /// the safe side. More prompts do not help, more answers per prompt do. Where N_eff is near 1, the largest score is
    /// all that is left, and this number is too small as well.
    ///
    /// # Errors
    /// As [`Samples::by_prompt`].
    pub fn bias(&self, lambda: f64) -> Result<f64> {
        check_lambda(lambda)?;
        let of_prompt = |scores: &Vec<f64>| {
            let weights = self.weights(scores, lambda);
            let squares: Vec<f64> = weights.iter().map(|w| w * w).collect();
            (weighted_mean(scores, &weights) - weighted_mean(scores, &squares)) / effective(&weights)
        };
        Ok(mean(&self.scores.iter().map(of_prompt).collect::<Vec<_>>()))
    }

    /// The effective sample sizes at λ. They fall with the distance of λ from λ₀.
    ///
    /// # Errors
    /// As [`Samples::by_prompt`].
    pub fn effective_sample_size(&self, lambda: f64) -> Result<EffectiveSampleSize> {
        check_lambda(lambda)?;
        let sizes: Vec<f64> = self.scores.iter().map(|scores| effective(&self.weights(scores, lambda))).collect();
        let inverse = mean(&sizes.iter().map(|size| 1.0 / size).collect::<Vec<_>>());
        Ok(EffectiveSampleSize { average: 1.0 / inverse, smallest: sizes.into_iter().fold(f64::INFINITY, f64::min) })
    }

    /// The weights of answers to one prompt, the largest of which is 1.
    fn weights(&self, scores: &[f64], lambda: f64) -> Vec<f64> {
        let shift = lambda - self.drawn_at;
        let heaviest = if shift < 0.0 { smallest(scores) } else { largest(scores) };
        scores.iter().map(|score| (shift * (score - heaviest) / self.beta).exp()).collect()
    }
}

pub(super) fn largest(scores: &[f64]) -> f64 {
    scores.iter().copied().fold(f64::NEG_INFINITY, f64::max)
}

pub(super) fn smallest(scores: &[f64]) -> f64 {
    scores.iter().copied().fold(f64::INFINITY, f64::min)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn weighted_mean(values: &[f64], weights: &[f64]) -> f64 {
    values.iter().zip(weights).map(|(value, weight)| weight * value).sum::<f64>() / weights.iter().sum::<f64>()
}

/// The effective number of answers with these weights, the largest of which is 1.
fn effective(weights: &[f64]) -> f64 {
    let (sum, squares) = weights.iter().fold((0.0, 0.0), |(sum, squares), w| (sum + w, squares + w * w));
    sum * sum / squares
}

fn check_lambda(lambda: f64) -> Result<()> {
    if lambda >= 0.0 && lambda.is_finite() {
        return Ok(());
    }
    Err(Error::input(format!("The multiplier λ is {lambda:?}, but it must be a finite number that is at least 0.")))
}
