//! The mean of what verdicts say, where verdicts on one prompt go together.

use std::collections::BTreeMap;

use statrs::distribution::{ContinuousCDF, StudentsT};

/// Values of verdicts, such as 1 for a win, by prompt. There is at least one.
#[derive(Debug, Clone)]
pub(super) struct Share {
    by_prompt: Vec<Sum>,
}

#[derive(Debug, Clone, Copy)]
struct Sum {
    prompt: usize,
    sum: f64,
    n: f64,
}

impl Share {
    /// From values and the numbers of their prompts; [`None`] if there are none.
    pub(super) fn new(values: impl IntoIterator<Item = (usize, f64)>) -> Option<Self> {
        let mut sums: BTreeMap<usize, (f64, f64)> = BTreeMap::new();
        for (prompt, value) in values {
            let (sum, n) = sums.entry(prompt).or_default();
            *sum += value;
            *n += 1.0;
        }
        let by_prompt: Vec<Sum> = sums.into_iter().map(|(prompt, (sum, n))| Sum { prompt, sum, n }).collect();
        (!by_prompt.is_empty()).then_some(Self { by_prompt })
    }

    /// The number of each prompt and the mean of its values.
    pub(super) fn by_prompt(&self) -> impl Iterator<Item = (usize, f64)> {
        self.by_prompt.iter().map(|one| (one.prompt, one.sum / one.n))
    }

    /// The number of values.
    pub(super) fn n(&self) -> f64 {
        self.by_prompt.iter().map(|one| one.n).sum()
    }

    /// The mean of the values.
    pub(super) fn mean(&self) -> f64 {
        self.by_prompt.iter().map(|one| one.sum).sum::<f64>() / self.n()
    }

    /// The mean with a weight for every prompt.
    pub(super) fn at(&self, weights: &[f64]) -> f64 {
        let (mut sum, mut n) = (0.0, 0.0);
        for one in &self.by_prompt {
            sum += weights[one.prompt] * one.sum;
            n += weights[one.prompt] * one.n;
        }
        sum / n
    }

    /// The standard error of the mean, √(G/(G−1) Σ_g (Σ_{i∈g} (s_i − s̄))²)/n over G prompts; [`None`] for a single one.
    ///
    /// With one value per prompt it is the usual s/√n with n − 1 in s, which alpaca_eval reports.
    pub(super) fn standard_error(&self) -> Option<f64> {
        let mean = self.mean();
        let squares: f64 = self.by_prompt.iter().map(|one| (one.sum - mean * one.n).powi(2)).sum();
        Some((correction(self.by_prompt.len())? * squares).sqrt() / self.n())
    }

    /// The 95 % interval of values from 0 to 1: Wilson's, with the number of values that would make their binomial variance
    /// the square of the standard error, and Student's t.
    ///
    /// It lies within 0 to 1 and is no point where all values are the same: then every prompt counts as one value.
    pub(super) fn interval(&self) -> Option<[f64; 2]> {
        let (p, prompts) = (self.mean(), self.by_prompt.len());
        let t = student(prompts)?;
        let (binomial, variance) = (p * (1.0 - p), self.standard_error()?.powi(2));
        let per_value = if binomial > 0.0 && variance > 0.0 { variance / binomial } else { 1.0 / prompts as f64 };
        Some(wilson(p, t * t * per_value))
    }
}

/// The 95 % interval of a share of `n` independent values from 0 to 1, such as an accuracy: Wilson's with Student's t; [`None`]
/// for a single one.
pub fn share_interval(share: f64, n: usize) -> Option<[f64; 2]> {
    Some(wilson(share, student(n)?.powi(2) / n as f64))
}

/// Wilson's interval around p, where q is t² over the number of values.
fn wilson(p: f64, q: f64) -> [f64; 2] {
    let (centre, margin) = ((p + q / 2.0) / (1.0 + q), (q * p * (1.0 - p) + q * q / 4.0).sqrt() / (1.0 + q));
    [(centre - margin).max(0.0), (centre + margin).min(1.0)]
}

/// G/(G − 1), which makes a variance over G prompts unbiased where they are alike; [`None`] for a single prompt.
pub(super) fn correction(prompts: usize) -> Option<f64> {
    (prompts > 1).then(|| prompts as f64 / (prompts as f64 - 1.0))
}

/// The t that bounds a two-sided 95 % interval over G prompts: Student's, at G − 1 degrees of freedom.
pub(super) fn student(prompts: usize) -> Option<f64> {
    let freedom = prompts.checked_sub(1).filter(|freedom| *freedom > 0)?;
    Some(StudentsT::new(0.0, 1.0, freedom as f64).ok()?.inverse_cdf(0.975))
}
