//! The gated feed-forward activation (SwiGLU, arXiv 2002.05202): y = silu(gate)·up, silu(g) = g·σ(g).

use half::bf16;
use rayon::prelude::*;

use super::elementwise;
use super::simd::{dispatch, of_bf16, sigmoid, to_bf16};

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

/// As [`forward`], of gate_up rounded to bf16, which `rounded` takes; y is rounded too.
pub(crate) fn forward_rounded(gate_up: &[f32], rounded: &mut [bf16], y: &mut [bf16], width: usize) {
    let _span = elementwise(size_of_val(gate_up) + size_of_val(rounded) + size_of_val(y));
    assert!(gate_up.len() == 2 * y.len() && gate_up.len() == rounded.len());
    let (of_task, rounded) = (2 * ROWS * width, rounded.par_chunks_mut(2 * ROWS * width));
    y.par_chunks_mut(ROWS * width).zip(gate_up.par_chunks(of_task)).zip(rounded).for_each(|((y, gate_up), rounded)| {
        dispatch(
            #[inline(always)]
            || {
                rounded.iter_mut().zip(gate_up).for_each(|(rounded, x)| *rounded = to_bf16(*x));
                for (y, row) in y.chunks_exact_mut(width).zip(rounded.chunks_exact(2 * width)) {
                    let (gate, up) = row.split_at(width);
                    for ((y, &g), &u) in y.iter_mut().zip(gate).zip(up) {
                        let g = of_bf16(g);
                        *y = to_bf16(g * sigmoid(g) * of_bf16(u));
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
                        (*gate, *up, *dy) = derivatives(*gate, *up, *dy);
                    }
                }
            },
        );
    });
}

/// As [`backward_in_place`], of what [`forward_rounded`] has rounded, with the activation in `y`.
pub(crate) fn backward_rounded(gate_up: &mut [bf16], dy: &[f32], y: &mut [bf16], width: usize) {
    let _span = elementwise(2 * size_of_val(gate_up) + size_of_val(dy) + size_of_val(y));
    assert!(gate_up.len() == 2 * dy.len() && y.len() == dy.len());
    let (of_task, gate_up) = (ROWS * width, gate_up.par_chunks_mut(2 * ROWS * width));
    y.par_chunks_mut(of_task).zip(dy.par_chunks(of_task)).zip(gate_up).for_each(|((y, dy), gate_up)| {
        dispatch(
            #[inline(always)]
            || {
                let rows = y.chunks_exact_mut(width).zip(dy.chunks_exact(width));
                for ((y, dy), row) in rows.zip(gate_up.chunks_exact_mut(2 * width)) {
                    let (gate, up) = row.split_at_mut(width);
                    for (((y, &dy), gate), up) in y.iter_mut().zip(dy).zip(gate).zip(up) {
                        let (d_gate, d_up, activation) = derivatives(of_bf16(*gate), of_bf16(*up), dy);
                        (*gate, *up, *y) = (to_bf16(d_gate), to_bf16(d_up), to_bf16(activation));
                    }
                }
            },
        );
    });
}

/// The derivatives for gate and up, and the activation.
#[inline(always)]
fn derivatives(gate: f32, up: f32, dy: f32) -> (f32, f32, f32) {
    let s = sigmoid(gate);
    let silu = gate * s;
    (dy * up * (s + silu * (1.0 - s)), dy * silu, silu * up)
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

    #[test]
    fn rounded_is_what_is_rounded_before_and_after() {
        let (n, width) = (35, 17);
        let gate_up: Vec<f32> = random(n * 2 * width, 1).iter().map(|x| 4.0 * x).collect();
        let (dy, halves) = (random(n * width, 2), |x: &[f32]| x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>());
        let (mut rounded, mut y) = (vec![bf16::ZERO; gate_up.len()], vec![bf16::ZERO; dy.len()]);
        forward_rounded(&gate_up, &mut rounded, &mut y, width);
        assert_eq!(rounded, halves(&gate_up));
        let mut expected: Vec<f32> = rounded.iter().map(|x| x.to_f32()).collect();
        let mut activation = dy.clone();
        backward_in_place(&mut expected, &mut activation, width);
        assert_eq!(y, halves(&activation));
        y.fill(bf16::ZERO);
        backward_rounded(&mut rounded, &dy, &mut y, width);
        assert_eq!((rounded, y), (halves(&expected), halves(&activation)));
    }
}
