//! Whether a policy meets a threshold, judged on held-out prompts.

use std::f64::consts::{FRAC_PI_2, PI};

use engine::{Error, Result};
use serde::Serialize;

use super::{average, check_confidence, check_thresholds, check_values};

/// What a certificate says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Verdict {
    /// The lower bound is at least the threshold.
    #[serde(rename = "met")]
    Met,
    /// The upper bound is below the threshold.
    #[serde(rename = "not met")]
    NotMet,
    /// The threshold lies between the bounds.
    #[serde(rename = "undecided")]
    Undecided,
}

impl Verdict {
    /// As it is written in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Met => "met",
            Self::NotMet => "not met",
            Self::Undecided => "undecided",
        }
    }

    /// Of several constraints together: met if all are met, not met if any is not, and else undecided.
    pub fn of_all(certificates: &[Certificate]) -> Self {
        let any = |verdict: Self| certificates.iter().any(|certificate| certificate.verdict == verdict);
        if any(Self::NotMet) {
            Self::NotMet
        } else if any(Self::Undecided) {
            Self::Undecided
        } else {
            Self::Met
        }
    }
}

/// One-sided confidence bounds of E\[g\] over the prompts that the held-out ones were drawn from.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Certificate {
    /// The mean over the held-out prompts.
    pub safety: f64,
    /// E\[g\] is at least this, with the confidence asked for.
    pub lower_bound: f64,
    /// E\[g\] is at most this, with the confidence asked for.
    pub upper_bound: f64,
    /// What follows.
    pub verdict: Verdict,
}

impl Certificate {
    /// Judges a policy from one number per held-out prompt: the expectation of g over its answers, or the mean of g over
    /// some answers that were drawn from it. No such number may have been used to choose or to train the policy.
    ///
    /// The bounds are mean ± t·s/√n with Student's t at n − 1 degrees of freedom: exact for normal values, and otherwise
    /// the closer the more prompts there are. With few prompts they are wider than a percentile bootstrap's, which would be
    /// too narrow there; unlike [`Bootstrap`](super::Bootstrap)'s they need not rise with λ, for the policy is fixed.
    ///
    /// # Errors
    /// [`Error::Input`] for fewer than two prompts, a number that is not finite, named by its prompt counted from 1, a
    /// threshold that is not finite, and a confidence level outside 0.5 to 0.999.
    pub fn new(by_prompt: &[f64], threshold: f64, confidence: f64) -> Result<Self> {
        check_confidence(confidence)?;
        check_thresholds(&[threshold], 1)?;
        Self::at_level(by_prompt, threshold, confidence)
    }

    /// Judges a policy by several constraints, `by_prompt` being `[constraint][prompt]`: one certificate for each, of which
    /// all lower bounds hold together with the confidence, and all upper bounds too. By Bonferroni's inequality each holds at
    /// 1 − (1 − confidence)/k for k constraints. [`Verdict::of_all`] says what follows.
    ///
    /// # Errors
    /// As [`Certificate::new`] for any of them; another number of thresholds than of constraints, and none of either.
    pub fn jointly(by_prompt: &[Vec<f64>], thresholds: &[f64], confidence: f64) -> Result<Vec<Self>> {
        check_confidence(confidence)?;
        if by_prompt.is_empty() {
            return Err(Error::input("There is no constraint to judge the policy by. Give one or more."));
        }
        check_thresholds(thresholds, by_prompt.len())?;
        let level = 1.0 - (1.0 - confidence) / by_prompt.len() as f64;
        by_prompt.iter().zip(thresholds).map(|(values, &b)| Self::at_level(values, b, level)).collect()
    }

    fn at_level(by_prompt: &[f64], threshold: f64, level: f64) -> Result<Self> {
        check_values(by_prompt)?;
        let n = by_prompt.len() as f64;
        let safety = average(by_prompt);
        let variance = by_prompt.iter().map(|value| (value - safety).powi(2)).sum::<f64>() / (n - 1.0);
        let margin = student_quantile(level, by_prompt.len() - 1) * (variance / n).sqrt();
        let (lower_bound, upper_bound) = (safety - margin, safety + margin);
        let verdict = if lower_bound >= threshold {
            Verdict::Met
        } else if upper_bound < threshold {
            Verdict::NotMet
        } else {
            Verdict::Undecided
        };
        Ok(Self { safety, lower_bound, upper_bound, verdict })
    }
}

/// The t below which Student's distribution has probability `p`, from 0.5 up to 1, at `freedom` ≥ 1 degrees.
fn student_quantile(p: f64, freedom: usize) -> f64 {
    let (mut low, mut high) = (0.0, FRAC_PI_2);
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        *(if within(middle, freedom) < 2.0 * p - 1.0 { &mut low } else { &mut high }) = middle;
    }
    (freedom as f64).sqrt() * low.tan()
}

/// P(|T| ≤ √freedom·tan θ) for Student's T, by the finite series for whole degrees of freedom (Abramowitz and Stegun
/// 26.7.3 and 26.7.4).
fn within(angle: f64, freedom: usize) -> f64 {
    let (sin, cos) = angle.sin_cos();
    let odd = freedom % 2;
    let (mut term, mut sum) = (1.0, 0.0);
    for k in 0..freedom / 2 {
        if k > 0 {
            let j = (2 * k + odd) as f64;
            term *= cos * cos * (j - 1.0) / j;
        }
        sum += term;
    }
    if odd == 0 { sin * sum } else { (angle + sin * cos * sum) * 2.0 / PI }
}

#[cfg(test)]
mod tests {
    use super::student_quantile;

    #[test]
    fn quantiles_of_students_distribution_are_those_of_the_tables() {
        let table = [
            (0.95, 1, 6.313751514675),
            (0.95, 2, 2.919985580354),
            (0.95, 3, 2.353363434801),
            (0.975, 4, 2.776445105198),
            (0.95, 10, 1.812461122812),
            (0.99, 30, 2.457261542),
            (0.95, 95, 1.661051817),
            (0.5, 7, 0.0),
        ];
        for (p, freedom, expected) in table {
            let found = student_quantile(p, freedom);
            assert!((found - expected).abs() < 1e-8, "{p} at {freedom}: {found}");
        }
    }
}
