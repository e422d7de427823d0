//! Confidence bounds of a mean over prompts, by drawing the prompts again.

use engine::{Error, Result};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::{HIGHEST_CONFIDENCE, average, check_confidence, check_values};

/// How often the prompts are drawn again. One less than a round number, so that usual levels fall on a replicate.
const REPLICATES: usize = 1999;

/// The percentile bootstrap over prompts: each drawn prompt brings all its answers, so answers to one prompt need not be
/// independent of each other.
///
/// The same prompts are drawn for every λ. Since each prompt's estimate of E\[g_i\] rises with λ_i, so does every replicate
/// and every bound; those of a normal or t interval need not.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bootstrap {
    confidence: f64,
    seed: u64,
}

/// A mean over prompts and how uncertain the choice of prompts makes it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Mean {
    /// The mean.
    pub value: f64,
    /// The two-sided interval.
    pub interval: [f64; 2],
    /// The one-sided lower bound.
    pub lower_bound: f64,
}

/// Prompts drawn again.
struct Replicate {
    mean: f64,
    /// Where in the stream of random numbers their drawing begins.
    start: u128,
}

impl Bootstrap {
    /// Bounds that hold with probability `confidence`, from 0.5 to 0.999, when there are many prompts.
    ///
    /// # Errors
    /// [`Error::Input`] for another confidence level.
    pub fn new(confidence: f64, seed: u64) -> Result<Self> {
        check_confidence(confidence)?;
        Ok(Self { confidence, seed })
    }

    /// The mean of one number per prompt.
    ///
    /// # Errors
    /// [`Error::Input`] for fewer than two prompts and for a number that is not finite, named by its prompt counted from 1.
    pub fn mean(&self, by_prompt: &[f64]) -> Result<Mean> {
        check_values(by_prompt)?;
        let replicates = self.replicates(by_prompt);
        let tail = rank((1.0 - self.confidence) / 2.0);
        Ok(Mean {
            value: average(by_prompt),
            interval: [replicates[tail - 1].mean, replicates[REPLICATES - tail].mean],
            lower_bound: self.lowest(&replicates).mean,
        })
    }

    /// Bounds at a level at which `constraints` of them hold together with the present confidence, by Bonferroni's
    /// inequality.
    pub(super) fn jointly(self, constraints: usize) -> Result<Self> {
        let confidence = 1.0 - (1.0 - self.confidence) / constraints as f64;
        if confidence <= HIGHEST_CONFIDENCE + 1e-12 {
            return Ok(Self { confidence, ..self });
        }
        Err(Error::input(format!(
            "For {constraints} constraints to be met together with a confidence of {}, each bound would have to hold with \
             {confidence}, but {REPLICATES} replicates tell levels up to {HIGHEST_CONFIDENCE} only. Ask for less confidence.",
            self.confidence
        )))
    }

    /// The one-sided lower bound of the mean of `values`, which are not empty.
    pub(super) fn lower_bound(&self, values: &[f64]) -> f64 {
        self.lowest(&self.replicates(values)).mean
    }

    /// The lower bound with the prompts whose mean it is.
    pub(super) fn lower_draw(&self, values: &[f64]) -> (f64, Vec<usize>) {
        let replicates = self.replicates(values);
        let Replicate { mean, start } = *self.lowest(&replicates);
        let mut rng = self.rng();
        rng.set_word_pos(start);
        (mean, drawn(&mut rng, values.len()).collect())
    }

    /// In rising order of their means.
    fn replicates(&self, values: &[f64]) -> Vec<Replicate> {
        let mut rng = self.rng();
        let mut replicate = || {
            let start = rng.get_word_pos();
            let sum: f64 = drawn(&mut rng, values.len()).map(|x| values[x]).sum();
            Replicate { mean: sum / values.len() as f64, start }
        };
        let mut replicates: Vec<Replicate> = (0..REPLICATES).map(|_| replicate()).collect();
        replicates.sort_by(|a, b| a.mean.total_cmp(&b.mean));
        replicates
    }

    fn lowest<'a>(&self, replicates: &'a [Replicate]) -> &'a Replicate {
        &replicates[rank(1.0 - self.confidence) - 1]
    }

    fn rng(&self) -> ChaCha8Rng {
        ChaCha8Rng::seed_from_u64(self.seed)
    }
}

/// As many of `prompts` prompts, drawn with replacement.
fn drawn(rng: &mut ChaCha8Rng, prompts: usize) -> impl Iterator<Item = usize> {
    (0..prompts).map(move |_| rng.random_range(0..prompts))
}

/// The rank from 1 of the replicate below which this share of the distribution lies.
fn rank(tail: f64) -> usize {
    (tail * (REPLICATES + 1) as f64).round().max(1.0) as usize
}
