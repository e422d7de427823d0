//! Confidence bounds of a mean over prompts, by drawing the prompts again.

use engine::Result;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::check_confidence;

/// How often the prompts are drawn again. One less than a round number, so that usual levels fall on a replicate.
const REPLICATES: usize = 1999;

/// The percentile bootstrap over prompts: each drawn prompt brings all its answers, so answers to one prompt need not be
/// independent of each other.
///
/// The same prompts are drawn for every λ. Since each prompt's estimate rises with λ, so does every replicate and every
/// bound; those of a normal or t interval need not.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bootstrap {
    pub(super) confidence: f64,
    seed: u64,
}

impl Bootstrap {
    /// Bounds that hold with probability `confidence`, from 0.5 to 0.999, when there are many prompts.
    ///
    /// # Errors
    /// [`engine::Error::Input`] for another confidence level.
    pub fn new(confidence: f64, seed: u64) -> Result<Self> {
        check_confidence(confidence)?;
        Ok(Self { confidence, seed })
    }

    /// The means of the values of prompts drawn again, in rising order; `values` is not empty.
    pub(super) fn means(&self, values: &[f64]) -> Vec<f64> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let mut mean = || {
            let drawn = (0..values.len()).map(|_| values[rng.random_range(0..values.len())]);
            drawn.sum::<f64>() / values.len() as f64
        };
        let mut means: Vec<f64> = (0..REPLICATES).map(|_| mean()).collect();
        means.sort_by(f64::total_cmp);
        means
    }

    /// The one-sided lower bound.
    pub(super) fn lower_bound(&self, means: &[f64]) -> f64 {
        means[rank(1.0 - self.confidence) - 1]
    }

    /// The two-sided interval.
    pub(super) fn interval(&self, means: &[f64]) -> [f64; 2] {
        let rank = rank((1.0 - self.confidence) / 2.0);
        [means[rank - 1], means[REPLICATES - rank]]
    }
}

/// The rank from 1 of the replicate below which this share of the distribution lies.
fn rank(tail: f64) -> usize {
    (tail * (REPLICATES + 1) as f64).round().max(1.0) as usize
}
