//! AdamW over the flat vector of weights, gradient norms, and learning-rate schedules.

use rayon::prelude::*;

use crate::model::Layout;
use crate::ops::simd::dispatch;

/// Weights per task; also the grouping of the sum in [`global_norm`].
const CHUNK: usize = 1 << 16;

/// The constants of AdamW (arXiv 1711.05101).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWOptions {
    /// Decay of the first moment, in [0, 1).
    pub beta1: f64,
    /// Decay of the second moment, in [0, 1).
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled decay per unit of learning rate; applies to matrices, not to the gains of norms.
    pub weight_decay: f64,
}

impl Default for AdamWOptions {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

/// AdamW: its moments, and the number of steps taken.
#[derive(Debug, Clone)]
pub struct AdamW {
    options: AdamWOptions,
    /// First moments, `[weights]`.
    pub first: Vec<f32>,
    /// Second moments, `[weights]`.
    pub second: Vec<f32>,
    /// Steps taken.
    pub steps: u64,
}

impl AdamW {
    /// An optimizer of `len` weights that has taken no step.
    pub fn new(options: AdamWOptions, len: usize) -> Self {
        Self { options, first: vec![0.0; len], second: vec![0.0; len], steps: 0 }
    }

    /// Takes one step and sets the gradient to zero. The gradient counts times `scale` (for clipping).
    pub fn step(&mut self, layout: &Layout, weights: &mut [f32], gradient: &mut [f32], learning_rate: f64, scale: f64) {
        self.steps += 1;
        let AdamWOptions { beta1, beta2, eps, weight_decay } = self.options;
        let steps = self.steps.min(i32::MAX as u64) as i32;
        let first_correction = 1.0 - beta1.powi(steps);
        let second_correction = 1.0 - beta2.powi(steps);
        // m̂/(√v̂ + ε) = (m/c₁)·√c₂ / (√v + ε√c₂), so that the corrections leave the loop
        let root = second_correction.sqrt();
        for spec in &layout.specs {
            let constants = StepConstants {
                beta1: beta1 as f32,
                beta2: beta2 as f32,
                rest1: (1.0 - beta1) as f32,
                rest2: (1.0 - beta2) as f32,
                rate: (learning_rate * root / first_correction) as f32,
                eps: (eps * root) as f32,
                keep: if spec.decays() { (1.0 - learning_rate * weight_decay) as f32 } else { 1.0 },
                scale: scale as f32,
            };
            let range = spec.range.clone();
            weights[range.clone()]
                .par_chunks_mut(CHUNK)
                .zip(gradient[range.clone()].par_chunks_mut(CHUNK))
                .zip(self.first[range.clone()].par_chunks_mut(CHUNK).zip(self.second[range].par_chunks_mut(CHUNK)))
                .for_each(|((w, g), (m, v))| {
                    dispatch(
                        #[inline(always)]
                        || step_chunk(w, g, m, v, constants),
                    )
                });
        }
    }
}

#[derive(Clone, Copy)]
struct StepConstants {
    beta1: f32,
    beta2: f32,
    rest1: f32,
    rest2: f32,
    rate: f32,
    eps: f32,
    keep: f32,
    scale: f32,
}

#[inline(always)]
fn step_chunk(weights: &mut [f32], gradient: &mut [f32], first: &mut [f32], second: &mut [f32], c: StepConstants) {
    for ((w, g), (m, v)) in weights.iter_mut().zip(gradient).zip(first.iter_mut().zip(second)) {
        let scaled = *g * c.scale;
        *m = c.beta1.mul_add(*m, c.rest1 * scaled);
        *v = c.beta2.mul_add(*v, c.rest2 * scaled * scaled);
        *w = c.keep.mul_add(*w, -c.rate * *m / (v.sqrt() + c.eps));
        *g = 0.0;
    }
}

/// The Euclidean norm of all gradients together, summed in f64.
pub fn global_norm(gradient: &[f32]) -> f64 {
    let partial: Vec<f64> = gradient
        .par_chunks(CHUNK)
        .map(|chunk| {
            dispatch(
                #[inline(always)]
                || {
                    let mut lanes = [0f64; 8];
                    let (body, tail) = chunk.as_chunks::<8>();
                    for x in body {
                        for j in 0..8 {
                            lanes[j] = f64::from(x[j]).mul_add(f64::from(x[j]), lanes[j]);
                        }
                    }
                    lanes.iter().sum::<f64>() + tail.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>()
                },
            )
        })
        .collect();
    partial.iter().sum::<f64>().sqrt()
}

/// How the learning rate falls after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Stays.
    Constant,
    /// Falls in a straight line to zero after the last step.
    Linear,
    /// Falls along half a cosine to zero after the last step.
    Cosine,
}

impl Schedule {
    /// The factor on the learning rate at `step` (from 0) of `total`, after `warmup` steps of linear rise.
    ///
    /// The same values as the schedulers of Hugging Face transformers: step 0 of a warm-up has factor 0.
    pub fn factor(self, step: u64, warmup: u64, total: u64) -> f64 {
        if step < warmup {
            return step as f64 / warmup as f64;
        }
        let progress = (step - warmup) as f64 / (total.saturating_sub(warmup)).max(1) as f64;
        match self {
            Self::Constant => 1.0,
            Self::Linear => (1.0 - progress).max(0.0),
            Self::Cosine => (0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos())).max(0.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::tiny_config;

    #[test]
    fn steps_follow_the_formula_and_spare_norms_from_decay() {
        let layout = Layout::new(&tiny_config());
        let options = AdamWOptions { weight_decay: 0.1, ..AdamWOptions::default() };
        let mut optimizer = AdamW::new(options, layout.len);
        let (mut weights, mut m, mut v) = (vec![0.5f32; layout.len], 0.0, 0.0);
        let (matrix, norm) = (layout.embedding.start, layout.final_norm.start);
        let mut expected = [0.5f64; 2];
        for step in 1..=5 {
            let g = 0.3 * f64::from(step);
            let mut gradient = vec![g as f32; layout.len];
            optimizer.step(&layout, &mut weights, &mut gradient, 0.01, 0.5);
            assert!(gradient.iter().all(|&g| g == 0.0));
            m = 0.9 * m + 0.1 * g * 0.5;
            v = 0.999 * v + 0.001 * (g * 0.5) * (g * 0.5);
            let update = 0.01 * (m / (1.0 - 0.9f64.powi(step))) / ((v / (1.0 - 0.999f64.powi(step))).sqrt() + 1e-8);
            expected = [expected[0] * (1.0 - 0.01 * 0.1) - update, expected[1] - update];
        }
        assert!((f64::from(weights[matrix]) - expected[0]).abs() < 1e-6);
        assert!((f64::from(weights[norm]) - expected[1]).abs() < 1e-6);
    }

    #[test]
    fn the_norm_is_that_of_all_parts_together() {
        let gradient: Vec<f32> = (0..200_003).map(|i| (i % 7) as f32).collect();
        let expected: f64 = gradient.iter().map(|&g| f64::from(g * g)).sum::<f64>().sqrt();
        assert!((global_norm(&gradient) / expected - 1.0).abs() < 1e-12);
    }

    #[test]
    fn schedules_rise_and_fall() {
        let all = |s: Schedule| (0..=10).map(|i| s.factor(i, 2, 10)).collect::<Vec<_>>();
        assert_eq!(all(Schedule::Linear), [0.0, 0.5, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0]);
        assert_eq!(all(Schedule::Constant)[2..], [1.0; 9]);
        let cosine = all(Schedule::Cosine);
        assert!((cosine[6] - 0.5).abs() < 1e-12 && cosine[10].abs() < 1e-12 && cosine[2] == 1.0);
    }
}
