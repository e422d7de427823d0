//! Rotary position embedding (arXiv 2104.09864), in Hugging Face's half-split layout.

use rayon::prelude::*;

use super::simd::dispatch;
use super::{Number, elementwise};
use crate::config::{ModelConfig, RopeScaling};

/// Rows per task.
const ROWS: usize = 64;

/// Cosines and sines of every position and frequency of a model.
#[derive(Debug, Clone)]
pub(crate) struct RopeTable {
    head_dim: usize,
    /// `[positions, head_dim]`: the cosines of a position, then its sines.
    table: Vec<f32>,
}

/// The angular frequency of each of the head_dim/2 planes, in radians per token.
fn frequencies(config: &ModelConfig) -> Vec<f64> {
    let half = config.head_dim / 2;
    (0..half)
        .map(|i| {
            let plain = config.rope_theta.powf(-(i as f64) / half as f64);
            match config.rope_scaling {
                RopeScaling::Default => plain,
                RopeScaling::Linear { factor } => plain / factor,
                RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                    let turns = original_context as f64 * plain / std::f64::consts::TAU;
                    let smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    let keep = smooth.clamp(0.0, 1.0);
                    plain * keep + plain / factor * (1.0 - keep)
                }
            }
        })
        .collect()
}

impl RopeTable {
    /// The table of positions 0 to `positions` − 1.
    pub(crate) fn new(config: &ModelConfig, positions: usize) -> Self {
        // angles in f32, as PyTorch computes them: checkpoints were trained with these very values
        let frequencies: Vec<f32> = frequencies(config).into_iter().map(|f| f as f32).collect();
        let table = (0..positions)
            .flat_map(|p| {
                let angles = frequencies.iter().map(move |f| f64::from(p as f32 * f));
                angles.clone().map(|a| a.cos() as f32).chain(angles.map(|a| a.sin() as f32))
            })
            .collect();
        Self { head_dim: config.head_dim, table }
    }

    /// Dimensions of a head.
    pub(crate) fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// `[positions, head_dim]`: the cosines of a position, then its sines.
    pub(crate) fn values(&self) -> &[f32] {
        &self.table
    }

    /// y = x with the first `heads` heads of each row rotated by its position. x, y `[n, stride]`, positions `[n]`.
    pub(crate) fn forward<T: Number>(&self, x: &[f32], y: &mut [T], stride: usize, heads: usize, positions: &[u32]) {
        self.rotate(x, y, stride, heads, positions, 1.0);
    }

    /// Turns the gradient dy with respect to the rotated rows into dx, that with respect to the plain ones.
    pub(crate) fn backward<T: Number>(&self, dy: &[f32], dx: &mut [T], stride: usize, heads: usize, positions: &[u32]) {
        self.rotate(dy, dx, stride, heads, positions, -1.0);
    }

    fn rotate<T: Number>(&self, x: &[f32], y: &mut [T], stride: usize, heads: usize, positions: &[u32], sign: f32) {
        let _span = elementwise(size_of_val(x) + size_of_val(y));
        let dim = self.head_dim;
        assert!(x.len() == positions.len() * stride && y.len() == x.len() && heads * dim <= stride);
        let x = x.par_chunks(ROWS * stride);
        y.par_chunks_mut(ROWS * stride).zip(x).zip(positions.par_chunks(ROWS)).for_each(|((y, x), positions)| {
            dispatch(
                #[inline(always)]
                || {
                    let rows = y.chunks_exact_mut(stride).zip(x.chunks_exact(stride));
                    for ((y, x), &position) in rows.zip(positions) {
                        let start = position as usize * dim;
                        let (cos, sin) = self.table[start..start + dim].split_at(dim / 2);
                        let ((x, x_rest), (y, y_rest)) = (x.split_at(heads * dim), y.split_at_mut(heads * dim));
                        for (y, x) in y.chunks_exact_mut(dim).zip(x.chunks_exact(dim)) {
                            let ((p, q), (a, b)) = (x.split_at(dim / 2), y.split_at_mut(dim / 2));
                            // a loop for each half: of both at once the compiler makes none of vectors
                            for ((((a, p), q), c), s) in a.iter_mut().zip(p).zip(q).zip(cos).zip(sin) {
                                *a = T::of_f32(p * c - sign * q * s);
                            }
                            for ((((b, p), q), c), s) in b.iter_mut().zip(p).zip(q).zip(cos).zip(sin) {
                                *b = T::of_f32(q * c + sign * p * s);
                            }
                        }
                        y_rest.iter_mut().zip(x_rest).for_each(|(y, x)| *y = T::of_f32(*x));
                    }
                },
            );
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::tiny_config;
    use crate::ops::finite_difference::{check, random};

    #[test]
    fn gradient_matches_finite_differences() {
        let config = ModelConfig { head_dim: 6, ..tiny_config() };
        let rope = RopeTable::new(&config, 10);
        let (positions, stride) = ([3, 9, 0], 14);
        let (x, dy) = (random(3 * stride, 1), random(3 * stride, 2));
        let mut dx = vec![0.0; x.len()];
        rope.backward(&dy, &mut dx, stride, 2, &positions);
        check(&x, &dx, &dy, |x| {
            let mut y = vec![0.0; x.len()];
            rope.forward(x, &mut y, stride, 2, &positions);
            y
        });
    }

    #[test]
    fn llama3_keeps_fast_planes_and_stretches_slow_ones() {
        let plain = ModelConfig { head_dim: 64, rope_theta: 500_000.0, ..tiny_config() };
        let scaling =
            RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192 };
        let before = frequencies(&plain);
        let after = frequencies(&ModelConfig { rope_scaling: scaling, ..plain });
        assert_eq!(before[0], after[0]);
        assert_eq!(before[31] / 8.0, after[31]);
        assert!((0..32).any(|i| after[i] < before[i] && after[i] > before[i] / 8.0));
    }
}
