//! A moving average of weights.

use rayon::prelude::*;

use super::CHUNK;
use crate::ops::simd::dispatch;

/// The exponential moving average of a policy's weights over optimizer steps: w̄ ← δw̄ + (1 − δ)w.
#[derive(Debug, Clone, PartialEq)]
pub struct Ema {
    /// The decay δ, in [0, 1).
    pub decay: f64,
    /// The average so far, in the layout of the weights.
    pub weights: Vec<f32>,
}

impl Ema {
    /// An average that starts at the given weights.
    pub fn new(decay: f64, weights: Vec<f32>) -> Self {
        Self { decay, weights }
    }

    /// Takes the weights after an optimizer step into the average.
    ///
    /// # Panics
    /// If there are not as many weights as in the average.
    pub fn update(&mut self, weights: &[f32]) {
        assert_eq!(weights.len(), self.weights.len(), "the weights do not fit the average");
        let rest = (1.0 - self.decay) as f32;
        self.weights.par_chunks_mut(CHUNK).zip(weights.par_chunks(CHUNK)).for_each(|(averages, weights)| {
            dispatch(
                #[inline(always)]
                || {
                    for (average, weight) in averages.iter_mut().zip(weights) {
                        // as a difference, so that weights that do not move leave the average as it is
                        *average = rest.mul_add(weight - *average, *average);
                    }
                },
            )
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::finite_difference::random;

    #[test]
    fn the_average_follows_the_formula() {
        let start = random(100_003, 1);
        let mut ema = Ema::new(0.9, start.clone());
        ema.update(&start);
        assert_eq!(ema.weights, start);
        let mut expected: Vec<f64> = start.iter().map(|&w| f64::from(w)).collect();
        for seed in 2..10 {
            let weights = random(start.len(), seed);
            ema.update(&weights);
            expected.iter_mut().zip(&weights).for_each(|(e, &w)| *e = 0.9 * *e + 0.1 * f64::from(w));
        }
        assert!(ema.weights.iter().zip(&expected).all(|(&a, e)| (f64::from(a) - e).abs() < 1e-6));
    }
}
