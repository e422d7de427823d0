//! The gated feed-forward activation (SwiGLU, arXiv 2002.05202): y = silu(gate)·up, silu(g) = g·σ(g).

use rayon::prelude::*;

use super::elementwise;
use super::simd::{dispatch, sigmoid};

/// Rows per task.
const ROWS: usize = 16;

/// gate_up `[n, 2·width]` holds gate then up in each row; y `[n, width]`.
pub(crate) fn forward(gate_up: &[f32], y: &mut [f32], width: usize) {
    let _span = elementwise(size_of_val(gate_up) + size_of_val(y));
    assert_eq!(gate_up.len(), 2 * y.len());
    y.par_chunks_mut(ROWS * width).zip(gate_up.par_chunks(2 * ROWS * width)).for_each(|(y, gate_up)| {
        dispatch(
            #[inline(always)]
            || {
                for (y, row) in y.chunks_exact_mut(width).zip(gate_up.chunks_exact(2 * width)) {
                    let (gate, up) = row.split_at(width);
                    for ((y, &g), &u) in y.iter_mut().zip(gate).zip(up) {
                        *y = g * sigmoid(g) * u;
                    }
                }
            },
        );
    });
}

/// Replaces gate_up by its gradient, and dy by the activation y itself, which the gradient of the next weight needs.
pub(crate) fn backward_in_place(gate_up: &mut [f32], dy: &mut [f32], width: usize) {
    let _span = elementwise(2 * size_of_val(gate_up) + 2 * size_of_val(dy));
    assert_eq!(gate_up.len(), 2 * dy.len());
    dy.par_chunks_mut(ROWS * width).zip(gate_up.par_chunks_mut(2 * ROWS * width)).for_each(|(dy, gate_up)| {
        dispatch(
            #[inline(always)]
            || {
                for (dy, row) in dy.chunks_exact_mut(width).zip(gate_up.chunks_exact_mut(2 * width)) {
                    let (gate, up) = row.split_at_mut(width);
                    for ((dy, gate), up) in dy.iter_mut().zip(gate).zip(up) {
                        let (d, g, u) = (*dy, *gate, *up);
                        let s = sigmoid(g);
                        let silu = g * s;
                        *dy = silu * u;
                        *up = d * silu;
                        *gate = d * u * (s + silu * (1.0 - s));
                    }
                }
            },
        );
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::finite_difference::{check, random};

    #[test]
    fn gradients_match_finite_differences() {
        let (n, width) = (3, 17);
        let gate_up: Vec<f32> = random(n * 2 * width, 1).iter().map(|x| 4.0 * x).collect();
        let dy = random(n * width, 2);
        let run = |gate_up: &[f32]| {
            let mut y = vec![0.0; n * width];
            forward(gate_up, &mut y, width);
            y
        };
        let (mut gradient, mut y) = (gate_up.clone(), dy.clone());
        backward_in_place(&mut gradient, &mut y, width);
        check(&gate_up, &gradient, &dy, run);
        assert_eq!(y, run(&gate_up));
    }
}
