//! Weight-decomposed adaptation (DoRA, arXiv 2402.09353): each row of V = W + s·B·A is given the length m that is
//! learned, y = x·(m·V/‖V‖)ᵀ. As in section 4.3 there, ‖V‖ counts as a constant in the derivatives.

use rayon::prelude::*;

use super::linear::{self, View, ViewMut, product};
use super::lora::{LowRank, Scratch};
use super::simd::{dispatch, dot};
use super::{Number, fit};

/// Columns per task.
const COLUMNS: usize = 64;

/// a/norm, and 0 for a row of zeros, whose direction does not exist. Exactly 1 for a = norm.
#[inline(always)]
pub(crate) fn ratio(a: f32, norm: f32) -> f32 {
    if norm == 0.0 { 0.0 } else { a / norm }
}

/// Adds the derivatives for A, B and m. With z = x·Vᵀ and c = m/‖V‖, row by row of V:
/// dm += Σ dy·z/‖V‖, dB += s·c·dyᵀ·u, dA += (s·dy·c·B)ᵀ·x, where u = x·Aᵀ.
pub(super) fn backward_weight(
    low_rank: &LowRank<'_>,
    dy: &[impl Number],
    x: &[impl Number],
    w: &[f32],
    gradient: &mut [f32],
    scratch: &mut Scratch,
) {
    let (inputs, rank, scale) = (low_rank.inputs(), low_rank.rank, low_rank.scale);
    let outputs = w.len() / inputs;
    let Scratch { u, d_u, y, .. } = scratch;
    let y = fit(y, dy.len());
    linear::forward(low_rank.precision, x, w, y, inputs, false);
    let dy_y = column_dots(dy, y, outputs);
    let u = View::rows(low_rank.down(x, u), low_rank.width());
    let mut scaled_b = Vec::with_capacity(low_rank.site.targets.len());
    for (index, target) in low_rank.site.targets.iter().enumerate() {
        let b = low_rank.b(index);
        let norms = norms(low_rank, index, w);
        let mut dy_u = vec![0.0; b.len()];
        let columns = View::rows(dy, outputs).columns(target.columns.clone());
        let part = u.columns(low_rank.part(index));
        product(low_rank.precision, columns.transposed(), part, ViewMut::rows(&mut dy_u, rank), 1.0, false);
        let dy_y = &dy_y[target.columns.clone()];
        let m = &low_rank.weights[target.magnitude.clone()];
        let d_m = &mut gradient[target.magnitude.clone()];
        for (row, d_m) in d_m.iter_mut().enumerate() {
            let at = low_rank.part(row);
            *d_m += ratio(dy_y[row] + scale * dot(&b[at.clone()], &dy_u[at]), norms[row]);
        }
        let factors: Vec<f32> = m.iter().zip(&norms).map(|(&m, &norm)| ratio(m, norm)).collect();
        let d_b = gradient[target.b.clone()].chunks_exact_mut(rank).zip(dy_u.chunks_exact(rank));
        for ((d_b, dy_u), factor) in d_b.zip(&factors) {
            d_b.iter_mut().zip(dy_u).for_each(|(d, g)| *d += scale * factor * g);
        }
        let rows = b.chunks_exact(rank).zip(&factors);
        scaled_b.push(rows.flat_map(|(row, factor)| row.iter().map(move |b| factor * b)).collect::<Vec<f32>>());
    }
    let d_u = low_rank.d_u(dy, outputs, |index| &scaled_b[index], d_u);
    let d_a = ViewMut::rows(&mut gradient[low_rank.site.a.clone()], inputs);
    product(low_rank.precision, d_u.transposed(), View::rows(x, inputs), d_a, 1.0, true);
}

/// ‖V‖ of each row of a target of the product by `w`.
pub(crate) fn norms(low_rank: &LowRank<'_>, index: usize, w: &[f32]) -> Vec<f32> {
    let (inputs, columns) = (low_rank.inputs(), &low_rank.site.targets[index].columns);
    let rows = w[columns.start * inputs..columns.end * inputs].par_chunks(inputs).enumerate();
    rows.map(|(row, w)| {
        let mut v = w.to_vec();
        dispatch(
            #[inline(always)]
            || {
                low_rank.add_update(index, row, &mut v);
                dot(&v, &v).sqrt()
            },
        )
    })
    .collect()
}

/// Σ over rows of a·b, for each of `width` columns.
fn column_dots(a: &[impl Number], b: &[f32], width: usize) -> Vec<f32> {
    let mut sums = vec![0.0; width];
    sums.par_chunks_mut(COLUMNS).enumerate().for_each(|(chunk, sums)| {
        let columns = chunk * COLUMNS..chunk * COLUMNS + sums.len();
        for (a, b) in a.chunks_exact(width).zip(b.chunks_exact(width)) {
            for ((sum, a), b) in sums.iter_mut().zip(&a[columns.clone()]).zip(&b[columns.clone()]) {
                *sum += a.to_f32() * b;
            }
        }
    });
    sums
}
