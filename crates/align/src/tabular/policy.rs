//! Policies over finitely many answers, and expectations under them.

/// A number per prompt and answer, `[prompt][answer]`. Prompts may have different numbers of answers.
pub type Table = Vec<Vec<f64>>;

/// A policy: log π(y|x) as a [`Table`], normalised over the answers of every prompt; −∞ for an impossible answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy(Table);

impl Policy {
    /// The policy with these probabilities up to a factor per prompt. Each is at least 0, and one per prompt is above 0.
    pub fn from_weights(weights: &[Vec<f64>]) -> Self {
        Self::from_logits(weights.iter().map(|row| row.iter().map(|weight| weight.ln()).collect()).collect())
    }

    /// The policy with these log-probabilities up to a constant per prompt, of which one is not −∞.
    pub fn from_logits(mut logits: Table) -> Self {
        for row in &mut logits {
            let log_sum = log_sum_exp(row);
            row.iter_mut().for_each(|logp| *logp -= log_sum);
        }
        Self(logits)
    }

    /// log π(y|x).
    pub fn logps(&self) -> &Table {
        &self.0
    }

    /// π(y|x).
    pub fn probabilities(&self) -> Table {
        self.0.iter().map(|row| row.iter().map(|logp| logp.exp()).collect()).collect()
    }

    /// The Gibbs policy ∝ π·exp(values/temperature): see [`gibbs`].
    pub fn tilted(&self, values: &[Vec<f64>], temperature: f64) -> Self {
        Self(self.0.iter().zip(values).map(|(logps, values)| gibbs(logps, values, temperature)).collect())
    }

    /// The policy ∝ π^(1−q)·other^q, 0 ≤ q ≤ 1: log-probabilities mixed linearly, as logits are at decode time.
    ///
    /// Both policies must hold the same answers possible.
    pub fn mixed(&self, other: &Self, q: f64) -> Self {
        let mix = |(&a, &b): (&f64, &f64)| if a == f64::NEG_INFINITY { a } else { (1.0 - q) * a + q * b };
        let rows = self.0.iter().zip(&other.0);
        Self::from_logits(rows.map(|(a, b)| a.iter().zip(b).map(mix).collect()).collect())
    }

    /// The largest difference of any probability.
    pub fn max_difference(&self, other: &Self) -> f64 {
        let pairs = self.0.iter().flatten().zip(other.0.iter().flatten());
        pairs.map(|(a, b)| (a.exp() - b.exp()).abs()).fold(0.0, f64::max)
    }
}

/// E_{x,π}\[values\], prompts weighted by `weights`, which sum to 1.
pub fn expectation(weights: &[f64], policy: &Policy, values: &[Vec<f64>]) -> f64 {
    let of_prompt = |(logps, values): (&Vec<f64>, &Vec<f64>)| -> f64 {
        logps.iter().zip(values).map(|(logp, value)| logp.exp() * value).sum()
    };
    weights.iter().zip(policy.0.iter().zip(values)).map(|(weight, rows)| weight * of_prompt(rows)).sum()
}

/// KL(policy ‖ reference) in nats, prompts weighted by `weights`; infinite where the policy does what the reference
/// cannot.
pub fn kl(weights: &[f64], policy: &Policy, reference: &Policy) -> f64 {
    let of_prompt = |(p, q): (&Vec<f64>, &Vec<f64>)| -> f64 { p.iter().zip(q).map(|(&p, &q)| divergence(p, q)).sum() };
    weights.iter().zip(policy.0.iter().zip(&reference.0)).map(|(weight, rows)| weight * of_prompt(rows)).sum()
}

/// p log(p/q), from log-probabilities; 0 for p = 0.
pub(crate) fn divergence(log_p: f64, log_q: f64) -> f64 {
    if log_p == f64::NEG_INFINITY { 0.0 } else { log_p.exp() * (log_p - log_q) }
}

/// The policy ∝ reference · exp(value / temperature), which maximises E\[value\] − temperature · KL(policy ‖ reference).
///
/// Log-probabilities in and out, one per outcome, of which at least one must be possible; those of the result are
/// normalised whether or not those of the reference are. `temperature` is above 0; at ∞ the result is the reference.
pub fn gibbs(reference: &[f64], values: &[f64], temperature: f64) -> Vec<f64> {
    let tilted = tilt(reference, values, temperature).1;
    let log_sum = log_sum_exp(&tilted);
    tilted.iter().map(|t| t - log_sum).collect()
}

/// temperature · log Σ_y reference · exp(value / temperature): the largest E\[value\] − temperature · KL that a policy
/// reaches when the reference is normalised. At a finite temperature above 0.
pub(super) fn soft_max(reference: &[f64], values: &[f64], temperature: f64) -> f64 {
    let (max, tilted) = tilt(reference, values, temperature);
    max + temperature * log_sum_exp(&tilted)
}

/// The largest value of a possible outcome, and log reference + (value − largest) / temperature.
fn tilt(reference: &[f64], values: &[f64], temperature: f64) -> (f64, Vec<f64>) {
    let max = largest_possible(reference, values);
    // the exponent is at most 0 where the outcome is possible, so no temperature is too low
    let tilt = |(&logp, value): (&f64, &f64)| {
        if logp == f64::NEG_INFINITY { logp } else { logp + (value - max) / temperature }
    };
    (max, reference.iter().zip(values).map(tilt).collect())
}

/// The largest value of an outcome that the reference holds possible.
pub(super) fn largest_possible(reference: &[f64], values: &[f64]) -> f64 {
    let possible = reference.iter().zip(values).filter(|(logp, _)| **logp > f64::NEG_INFINITY);
    possible.map(|(_, value)| *value).fold(f64::NEG_INFINITY, f64::max)
}

fn log_sum_exp(logs: &[f64]) -> f64 {
    let max = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    max + logs.iter().map(|log| (log - max).exp()).sum::<f64>().ln()
}
