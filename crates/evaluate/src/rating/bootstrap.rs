//! Intervals of anything that depends on which prompts were asked, by weighing the prompts at random.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How often the prompts are weighed. One less than a round number, so that the ends of the interval are replicates.
const REPLICATES: usize = 1999;

/// Random weights of prompts, which all verdicts on a prompt share.
///
/// In every replicate each prompt gets a weight from the exponential distribution of mean 1 (the Bayesian bootstrap, D. Rubin,
/// Ann. Statist. 9, 1981). Drawing prompts with replacement would give whole numbers of nearly the same mean and variance;
/// but these weights are never 0, so what exists for the sample, such as Bradley–Terry ratings, exists in every replicate.
pub(super) struct Bootstrap {
    /// `[replicate][prompt]`, 16 MB per 1,000 prompts.
    weights: Vec<Vec<f64>>,
}

impl Bootstrap {
    pub(super) fn new(prompts: usize, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        // 1 − u is never 0
        let mut weigh = || (0..prompts).map(|_| -(1.0 - rng.random::<f64>()).ln()).collect();
        Self { weights: (0..REPLICATES).map(|_| weigh()).collect() }
    }

    /// The two-sided 95 % percentile interval of a function of the weights.
    pub(super) fn interval(&self, statistic: impl Fn(&[f64]) -> f64) -> [f64; 2] {
        self.intervals(|weights| [statistic(weights)])[0]
    }

    /// The intervals of several functions that are calculated together.
    pub(super) fn intervals<V: AsRef<[f64]>>(&self, statistics: impl Fn(&[f64]) -> V) -> Vec<[f64; 2]> {
        let rows: Vec<V> = self.weights.iter().map(|weights| statistics(weights)).collect();
        let tail = (REPLICATES + 1) / 40;
        let interval = |column: usize| {
            let mut values: Vec<f64> = rows.iter().map(|row| row.as_ref()[column]).collect();
            values.sort_by(f64::total_cmp);
            [values[tail - 1], values[REPLICATES - tail]]
        };
        (0..rows[0].as_ref().len()).map(interval).collect()
    }

    /// In which share of the replicates each of several conditions holds.
    pub(super) fn shares(&self, conditions: impl Fn(&[f64]) -> Vec<bool>) -> Vec<f64> {
        let rows: Vec<Vec<bool>> = self.weights.iter().map(|weights| conditions(weights)).collect();
        let share = |column: usize| rows.iter().filter(|row| row[column]).count() as f64 / rows.len() as f64;
        (0..rows[0].len()).map(share).collect()
    }
}
