//! The λ that meets the quickstart's threshold, and whether the policy trained for it does.

use std::fmt::Write as _;

use align::choose::{Bootstrap, Certificate, Choice, Estimate, Samples};
use align::world::{Metric, World};
use engine::{Error, Result};
use sacpo::recipe::{Recipe, Temperature};
use serde_json::{Value, json};

/// The level of all bounds.
const CONFIDENCE: f64 = 0.95;

/// Answers per training prompt from which λ is chosen.
const ANSWERS: usize = 64;

/// What was chosen for a threshold on E\[g*\].
pub(super) struct Chosen {
    threshold: f64,
    outcome: Outcome,
}

/// The policy that realises the chosen λ.
pub(super) struct Realised<'a> {
    /// Its name.
    pub(super) policy: &'a str,
    /// Its log-probabilities, `[held-out prompt][answer]`.
    pub(super) logps: &'a [Vec<f64>],
    /// Those of the policy that its step started from.
    pub(super) start: &'a [Vec<f64>],
}

enum Outcome {
    /// The estimate at the λ that is realised, and its β/λ; none for λ = 0, for which nothing has to be trained.
    Lambda(Estimate, Option<f64>),
    /// Why there is no λ.
    Nothing(String),
}

impl Chosen {
    /// Draws answers to the training prompts from a policy, whose log-probabilities are given as `[training prompt][answer]`,
    /// scores them by g*, and chooses λ.
    ///
    /// # Errors
    /// A threshold that is not finite, or log-probabilities that no policy can have.
    pub(super) fn new(world: &World, logps: &[Vec<f64>], beta: f64, threshold: f64, seed: u64) -> Result<Self> {
        let scores = world.sampled_values(logps, Metric::Safety, ANSWERS, seed)?;
        let samples = Samples::new(vec![scores], beta)?;
        let bootstrap = Bootstrap::new(CONFIDENCE, seed)?;
        let outcome = match samples.choose(&[threshold], &bootstrap)? {
            Choice::Chosen(estimate) if estimate.lambda[0] == 0.0 => Outcome::Lambda(estimate, None),
            Choice::Chosen(estimate) => {
                let beta_over_lambda = short_below(beta / estimate.lambda[0]);
                Outcome::Lambda(samples.estimate(&[beta / beta_over_lambda], &bootstrap)?, Some(beta_over_lambda))
            }
            Choice::OutOfSupport { needed, reachable } => Outcome::Nothing(format!(
                "λ = {:.3} seems to be needed, but there {ANSWERS} answers per prompt are worth only {:.1}, which is too few to \
                 trust; they reach to λ = {:.3}",
                needed.lambda[0], needed.effective_sample_size.average, reachable[0]
            )),
            Choice::Unreachable { lower_bounds, .. } => Outcome::Nothing(format!(
                "no λ meets it with these answers: the safest of {ANSWERS} answers to each prompt have a lower bound of \
                 {:.3}",
                lower_bounds[0]
            )),
        };
        Ok(Self { threshold, outcome })
    }

    /// Adds the policy that realises λ to the last step of a recipe, unless it is there.
    pub(super) fn add_to(&self, recipe: &mut Recipe) {
        let step = recipe.steps.last_mut().map(|step| &mut step.temperature);
        if let (Outcome::Lambda(_, Some(value)), Some(Temperature::BetaOverLambda(values))) = (&self.outcome, step)
            && !values.contains(value)
        {
            values.push(*value);
        }
    }

    /// Whether a policy with this β/λ, which is none in the first step, realises the λ.
    pub(super) fn is_realised_by(&self, beta_over_lambda: Option<f64>) -> bool {
        matches!(&self.outcome, Outcome::Lambda(_, chosen) if *chosen == beta_over_lambda)
    }

    /// The result for machines and for people. `realised` is none if no λ was chosen.
    ///
    /// # Errors
    /// A chosen λ without a policy, or log-probabilities that no policy can have.
    pub(super) fn report(&self, world: &World, realised: Option<Realised<'_>>) -> Result<(Value, String)> {
        let (estimate, beta_over_lambda) = match &self.outcome {
            Outcome::Lambda(estimate, beta_over_lambda) => (estimate, beta_over_lambda),
            Outcome::Nothing(reason) => {
                let result = json!({
                    "threshold": self.threshold, "confidence": CONFIDENCE, "lambda": Value::Null,
                    "beta_over_lambda": Value::Null, "verdict": "undecided", "lower_bound": Value::Null,
                    "policy": Value::Null, "reason": reason,
                });
                let text = format!(
                    "Constraint E[g*] ≥ {}: undecided, and no policy was trained for it; {reason}.",
                    self.threshold
                );
                return Ok((result, text));
            }
        };
        let Some(Realised { policy, logps, start }) = realised else {
            return Err(Error::Failed(
                "The policy for the chosen λ is not among those of the run. Run it again.".into(),
            ));
        };
        let certificate = Certificate::new(&world.expectations(logps, Metric::Safety)?, self.threshold, CONFIDENCE)?;
        let optimum = match beta_over_lambda {
            Some(temperature) => {
                mean(&world.expectations(&world.optimum(start, Metric::Safety, *temperature)?, Metric::Safety)?)
            }
            None => certificate.safety,
        };
        let result = json!({
            "threshold": self.threshold,
            "confidence": CONFIDENCE,
            "lambda": estimate.lambda[0],
            "beta_over_lambda": beta_over_lambda,
            "estimate": estimate.safety[0].value,
            "interval": estimate.safety[0].interval,
            "bias": estimate.bias[0],
            "effective_sample_size": estimate.effective_sample_size,
            "optimum_safety": optimum,
            "policy": policy,
            "safety": certificate.safety,
            "lower_bound": certificate.lower_bound,
            "upper_bound": certificate.upper_bound,
            "verdict": certificate.verdict,
        });
        let mut text = format!("Constraint E[g*] ≥ {}: λ = {:.3}", self.threshold, estimate.lambda[0]);
        let [low, high] = estimate.safety[0].interval;
        let _ = write!(
            text,
            ". The exact tilt is estimated to have {:.3} ({low:.3} to {high:.3}) and has {optimum:.3} on held-out \
             prompts. The policy {policy}, trained for it, has {:.3} there (95 % bounds {:.3} and {:.3}): {}.",
            estimate.safety[0].value,
            certificate.safety,
            certificate.lower_bound,
            certificate.upper_bound,
            certificate.verdict.name()
        );
        Ok((result, text))
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The largest number of three significant digits that is not above a positive one: a smaller β/λ is a larger λ.
fn short_below(value: f64) -> f64 {
    let decimals = 2 - value.log10().floor() as i32;
    // by way of a text, whose nearest number reads as short as it is
    let scaled = (value * 10f64.powi(decimals)).floor();
    format!("{scaled}e{}", -decimals).parse().unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::short_below;

    #[test]
    fn rounding_down_keeps_three_digits() {
        for (value, expected) in
            [(0.45678, 0.456), (0.4, 0.4), (1.999, 1.99), (12345.0, 12300.0), (0.00098765, 0.000987)]
        {
            assert_eq!(short_below(value), expected);
        }
    }
}
