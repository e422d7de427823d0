//! AdamW: Adam with decoupled weight decay (algorithm 2 of arXiv 1711.05101).
//!
//! ```text
//! m ← β₁m + (1 − β₁)g        v ← β₂v + (1 − β₂)g²
//! w ← (1 − ηλ)w − η · m/(1 − β₁ᵗ) / (√(v/(1 − β₂ᵗ)) + ε)
//! ```

use rayon::prelude::*;

use super::{CHUNK, Step};
use crate::ops::simd::dispatch;

/// The moments of one tensor.
#[derive(Debug, Clone)]
pub(super) struct Moments {
    pub(super) first: Vec<f32>,
    pub(super) second: Vec<f32>,
}

impl Moments {
    pub(super) fn new(len: usize) -> Self {
        Self { first: vec![0.0; len], second: vec![0.0; len] }
    }

    pub(super) fn step(&mut self, weights: &mut [f32], gradient: &mut [f32], step: Step) {
        let constants = Constants::new(step);
        weights
            .par_chunks_mut(CHUNK)
            .zip(gradient.par_chunks_mut(CHUNK))
            .zip(self.first.par_chunks_mut(CHUNK).zip(self.second.par_chunks_mut(CHUNK)))
            .for_each(|((w, g), (m, v))| {
                dispatch(
                    #[inline(always)]
                    || update(w, g, m, v, constants),
                )
            });
    }
}

/// The factors of one step in f32.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Constants {
    beta1: f32,
    beta2: f32,
    rest1: f32,
    rest2: f32,
    rate: f32,
    eps: f32,
    keep: f32,
    scale: f32,
}

impl Constants {
    pub(crate) fn new(step: Step) -> Self {
        let (beta1, beta2) = (step.options.beta1, step.options.beta2);
        let number = step.number.min(i32::MAX as u64) as i32;
        let first_correction = 1.0 - beta1.powi(number);
        // m̂/(√v̂ + ε) = (m/c₁)·√c₂ / (√v + ε√c₂), so that the corrections leave the loop
        let root = (1.0 - beta2.powi(number)).sqrt();
        Self {
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            rest1: (1.0 - beta1) as f32,
            rest2: (1.0 - beta2) as f32,
            rate: (step.learning_rate * root / first_correction) as f32,
            eps: (step.options.eps * root) as f32,
            keep: step.keep as f32,
            scale: step.scale as f32,
        }
    }

    /// All of them, in the order of the fields.
    pub(crate) fn as_array(self) -> [f32; 8] {
        let Self { beta1, beta2, rest1, rest2, rate, eps, keep, scale } = self;
        [beta1, beta2, rest1, rest2, rate, eps, keep, scale]
    }
}

/// Updates weights and moments, and sets the gradient to zero.
#[inline(always)]
pub(crate) fn update(weights: &mut [f32], gradient: &mut [f32], first: &mut [f32], second: &mut [f32], c: Constants) {
    for ((w, g), (m, v)) in weights.iter_mut().zip(gradient).zip(first.iter_mut().zip(second)) {
        let scaled = *g * c.scale;
        *m = c.beta1.mul_add(*m, c.rest1 * scaled);
        *v = c.beta2.mul_add(*v, c.rest2 * scaled * scaled);
        *w = c.keep.mul_add(*w, -c.rate * *m / (v.sqrt() + c.eps));
        *g = 0.0;
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{specs, trained};
    use super::super::{Optimizer, OptimizerKind, OptimizerOptions};
    use crate::ops::finite_difference::random;

    /// The order of the roundings is part of the contract: weights that were trained before stay reproducible.
    #[test]
    fn every_bit_is_that_of_the_formula_one_weight_at_a_time() {
        let specs = specs(&[&[400, 401], &[7]]);
        let options = OptimizerOptions { weight_decay: 0.1, ..OptimizerKind::AdamW.defaults() };
        let gradient = |step, i: usize| random(i, 2 + step);
        let start = random(specs[1].range.end, 1);
        let mut optimizer = Optimizer::new(OptimizerKind::AdamW, options, &specs);
        let weights = trained(&mut optimizer, start.clone(), 4, |step, w| gradient(step, w.len()));

        let (mut expected, mut m, mut v) = (start.clone(), vec![0f32; start.len()], vec![0f32; start.len()]);
        for step in 0..4 {
            let number = step as i32 + 1;
            let root = (1.0 - 0.999f64.powi(number)).sqrt();
            let (rate, eps) = ((0.01 * root / (1.0 - 0.9f64.powi(number))) as f32, (1e-8 * root) as f32);
            for (i, g) in gradient(step, start.len()).into_iter().enumerate() {
                let keep = if i < 400 * 401 { (1.0 - 0.01 * 0.1) as f32 } else { 1.0 };
                let g = g * 0.7f32;
                m[i] = 0.9f32.mul_add(m[i], (1.0f64 - 0.9) as f32 * g);
                v[i] = 0.999f32.mul_add(v[i], (1.0f64 - 0.999) as f32 * g * g);
                expected[i] = keep.mul_add(expected[i], -rate * m[i] / (v[i].sqrt() + eps));
            }
        }
        assert!(weights.iter().zip(&expected).all(|(w, e)| w.to_bits() == e.to_bits()));
    }
}
