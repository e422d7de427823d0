//! Lion (algorithm 2 of arXiv 2302.06675).
//!
//! ```text
//! w ← (1 − ηλ)w − η · sign(β₁m + (1 − β₁)g)        m ← β₂m + (1 − β₂)g
//! ```

use rayon::prelude::*;

use super::{CHUNK, Step};
use crate::ops::simd::dispatch;

/// The momentum of one tensor.
#[derive(Debug, Clone)]
pub(super) struct Momentum(pub(super) Vec<f32>);

impl Momentum {
    pub(super) fn new(len: usize) -> Self {
        Self(vec![0.0; len])
    }

    pub(super) fn step(&mut self, weights: &mut [f32], gradient: &mut [f32], step: Step) {
        let (beta1, beta2) = (step.options.beta1 as f32, step.options.beta2 as f32);
        let (rest1, rest2) = ((1.0 - step.options.beta1) as f32, (1.0 - step.options.beta2) as f32);
        let (rate, keep, scale) = (step.learning_rate as f32, step.keep as f32, step.scale as f32);
        let parts = weights.par_chunks_mut(CHUNK).zip(gradient.par_chunks_mut(CHUNK)).zip(self.0.par_chunks_mut(CHUNK));
        parts.for_each(|((weights, gradient), momentum)| {
            dispatch(
                #[inline(always)]
                || {
                    for ((w, g), m) in weights.iter_mut().zip(gradient).zip(momentum) {
                        let scaled = *g * scale;
                        let direction = beta1.mul_add(*m, rest1 * scaled);
                        // unlike `signum`, 0 at 0: a weight without gradient stays
                        let sign = f32::from(direction > 0.0) - f32::from(direction < 0.0);
                        *w = keep.mul_add(*w, -rate * sign);
                        *m = beta2.mul_add(*m, rest2 * scaled);
                        *g = 0.0;
                    }
                },
            )
        });
    }
}
