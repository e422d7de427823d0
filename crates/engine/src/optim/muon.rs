//! Muon: momentum of matrices, orthogonalised by Newton–Schulz iterations.
//!
//! ```text
//! m ← μm + (1 − μ)g        u = μm + (1 − μ)g (Nesterov)
//! X₀ = u/‖u‖_F             Xₖ₊₁ = (a·I + b·A + c·A²)Xₖ,  A = XₖXₖᵀ,  five times
//! w ← (1 − ηλ)w − η · 0.2·√max(rows, columns) · X₅
//! ```
//!
//! Iteration and coefficients are those of <https://kellerjordan.github.io/posts/muon/>. The factor 0.2·√max(rows, columns)
//! gives the update the root mean square that AdamW's updates usually have (equation 4 of arXiv 2502.16982), so that
//! learning rates and weight decay for AdamW suit both the matrices and the tensors that AdamW updates.

use rayon::prelude::*;

use super::{CHUNK, Step, global_norm};
use crate::model::ParamSpec;
use crate::ops::linear;
use crate::ops::simd::dispatch;
use crate::precision::Precision::F32;

/// The coefficients a, b, c. They bring singular values near 1 quickly and leave them between about 0.7 and 1.2.
const COEFFICIENTS: [f32; 3] = [3.4445, -4.7750, 2.0315];
const ITERATIONS: usize = 5;
/// The smallest norm that is divided by, so that a gradient of zero gives an update of zero.
const SMALLEST_NORM: f64 = 1e-7;

/// Whether Muon updates this tensor: matrices that map hidden states, neither those over the vocabulary nor a score head.
pub(super) fn applies_to(spec: &ParamSpec) -> bool {
    let at_an_end = ["embed_tokens.weight", "lm_head.weight", "score.weight"];
    spec.shape.len() == 2 && !at_an_end.iter().any(|name| spec.name.ends_with(name))
}

/// The momentum of one matrix.
#[derive(Debug, Clone)]
pub(super) struct Momentum(pub(super) Vec<f32>);

/// Memory that holds nothing between matrices.
#[derive(Debug, Clone, Default)]
pub(super) struct Scratch {
    /// The update, `[rows, columns]`.
    x: Vec<f32>,
    next: Vec<f32>,
    /// A, `[k, k]` for the smaller side k.
    gram: Vec<f32>,
    polynomial: Vec<f32>,
}

/// Bytes of the [`Scratch`] that a step of this matrix needs.
pub(super) fn scratch_bytes(spec: &ParamSpec) -> usize {
    let side = spec.shape.iter().min().map_or(0, |side| side * side);
    size_of::<f32>() * 2 * (spec.range.len() + side)
}

impl Momentum {
    pub(super) fn new(len: usize) -> Self {
        Self(vec![0.0; len])
    }

    pub(super) fn step(
        &mut self,
        shape: &[usize],
        weights: &mut [f32],
        gradient: &mut [f32],
        step: Step,
        scratch: &mut Scratch,
    ) {
        let (rows, columns) = (shape[0], shape[1]);
        let (momentum, rest) = (step.options.momentum as f32, (1.0 - step.options.momentum) as f32);
        let scale = step.scale as f32;
        scratch.x.resize(weights.len(), 0.0);
        let parts = scratch.x.par_chunks_mut(CHUNK).zip(gradient.par_chunks_mut(CHUNK));
        parts.zip(self.0.par_chunks_mut(CHUNK)).for_each(|((updates, gradient), momenta)| {
            dispatch(
                #[inline(always)]
                || {
                    for ((u, g), m) in updates.iter_mut().zip(gradient).zip(momenta) {
                        let scaled = *g * scale;
                        *m = momentum.mul_add(*m, rest * scaled);
                        *u = momentum.mul_add(*m, rest * scaled);
                        *g = 0.0;
                    }
                },
            )
        });
        orthogonalise(scratch, rows, columns);
        let rate = (step.learning_rate * 0.2 * (rows.max(columns) as f64).sqrt()) as f32;
        let keep = step.keep as f32;
        weights.par_chunks_mut(CHUNK).zip(scratch.x.par_chunks(CHUNK)).for_each(|(weights, updates)| {
            dispatch(
                #[inline(always)]
                || weights.iter_mut().zip(updates).for_each(|(w, u)| *w = keep.mul_add(*w, -rate * u)),
            )
        });
    }
}

/// Replaces `scratch.x = U·S·Vᵀ`, `[rows, columns]`, by about U·Vᵀ.
fn orthogonalise(scratch: &mut Scratch, rows: usize, columns: usize) {
    let Scratch { x, next, gram, polynomial } = scratch;
    let [a, b, c] = COEFFICIENTS;
    let side = rows.min(columns);
    let inverse = (1.0 / global_norm(x).max(SMALLEST_NORM)) as f32;
    x.par_chunks_mut(CHUNK).for_each(|chunk| chunk.iter_mut().for_each(|x| *x *= inverse));
    next.resize(x.len(), 0.0);
    polynomial.resize(side * side, 0.0);
    for _ in 0..ITERATIONS {
        // a tall X is treated as its transpose: A = XᵀX stands on the right, and all products are as small as they can be
        gram.clear();
        gram.resize(side * side, 0.0);
        if rows > columns {
            linear::backward_weight(F32, x, x, gram, columns);
        } else {
            linear::forward(F32, x, x, gram, columns, false);
        }
        // A is symmetric: A·Aᵀ is A²
        linear::forward(F32, gram, gram, polynomial, side, false);
        for (p, g) in polynomial.iter_mut().zip(gram.iter()) {
            *p = c.mul_add(*p, b * g);
        }
        polynomial.iter_mut().step_by(side + 1).for_each(|diagonal| *diagonal += a);
        if rows > columns {
            linear::forward(F32, x, polynomial, next, columns, false);
        } else {
            linear::backward_input(F32, polynomial, x, next, columns);
        }
        std::mem::swap(x, next);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{specs, trained};
    use super::super::{Optimizer, OptimizerKind};
    use super::*;
    use crate::ops::finite_difference::random;

    #[test]
    fn rows_become_nearly_orthogonal_whatever_the_shape() {
        for (rows, columns) in [(40, 100), (100, 40), (40, 40), (1, 30), (30, 1)] {
            let mut scratch = Scratch { x: random(rows * columns, 1), ..Scratch::default() };
            orthogonalise(&mut scratch, rows, columns);
            let Scratch { x, next, gram, polynomial } = &scratch;
            let bytes = [x, next, gram, polynomial].map(|part| size_of_val(part.as_slice())).iter().sum::<usize>();
            assert_eq!(scratch_bytes(&specs(&[&[rows, columns]])[0]), bytes);
            // the mean of the squared singular values, each of which should end between about 0.7² and 1.2²
            let mean_square = global_norm(x).powi(2) / rows.min(columns) as f64;
            assert!((0.45..1.45).contains(&mean_square), "{rows} × {columns}: {mean_square}");
        }
    }

    #[test]
    fn a_tall_matrix_gives_the_transpose_of_the_wide_one() {
        let (rows, columns) = (6, 11);
        let wide = random(rows * columns, 1);
        let transposed: Vec<f32> = (0..rows * columns).map(|i| wide[i % rows * columns + i / rows]).collect();
        let run = |x: Vec<f32>, rows, columns| {
            let mut scratch = Scratch { x, ..Scratch::default() };
            orthogonalise(&mut scratch, rows, columns);
            scratch.x
        };
        let (wide, tall) = (run(wide, rows, columns), run(transposed, columns, rows));
        for (i, t) in tall.iter().enumerate() {
            assert!((t - wide[i % rows * columns + i / rows]).abs() < 1e-4);
        }
    }

    #[test]
    fn no_gradient_leaves_the_weights() {
        let specs = specs(&[&[8, 5]]);
        let mut optimizer = Optimizer::new(OptimizerKind::Muon, OptimizerKind::Muon.defaults(), &specs);
        let start = random(40, 1);
        assert_eq!(trained(&mut optimizer, start.clone(), 2, |_, w| vec![0.0; w.len()]), start);
    }

    #[test]
    fn tensors_over_the_vocabulary_and_vectors_are_left_to_adamw() {
        let spec = |name: &str, shape: &[usize]| ParamSpec { name: name.into(), shape: shape.to_vec(), range: 0..0 };
        assert!(applies_to(&spec("model.layers.0.mlp.up_proj.weight", &[4, 3])));
        assert!(applies_to(&spec("base_model.model.lm_head.lora_A.weight", &[2, 3])));
        assert!(!applies_to(&spec("model.embed_tokens.weight", &[4, 3])));
        assert!(!applies_to(&spec("lm_head.weight", &[4, 3])));
        assert!(!applies_to(&spec("model.norm.weight", &[3])));
    }
}
