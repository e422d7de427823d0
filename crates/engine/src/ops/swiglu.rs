//! The gated feed-forward activation (SwiGLU, arXiv 2002.05202): y = silu(gate)·up, silu(g) = g·σ(g).

use rayon::prelude::*;

use super::simd::{dispatch, sigmoid};
use super::{Number, elementwise};

/// Rows per task.
const ROWS: usize = 16;

/// Takes the sums of a product `[n, 2·width]`, gate then up in each row, over to gate_up, rounded to T, and writes the activation y
/// `[n, width]` of them. The memory of sums in f32 is exchanged with gate_up's where that is in f32 too.
pub(crate) fn forward<T: Number>(sums: &mut Vec<f32>, gate_up: &mut Vec<T>, y: &mut [T], width: usize) {
    let len = 2 * y.len();
    let is_there = T::exchange(sums, gate_up);
    let (sums, gate_up) = (&sums[..len], &mut gate_up[..len]);
    let _span = elementwise(size_of_val(gate_up) + size_of_val(y) + if is_there { 0 } else { size_of_val(sums) });
    let (of_task, sums) = (2 * ROWS * width, sums.par_chunks(2 * ROWS * width));
    y.par_chunks_mut(ROWS * width).zip(gate_up.par_chunks_mut(of_task)).zip(sums).for_each(|((y, gate_up), sums)| {
        dispatch(
            #[inline(always)]
            || {
                if !is_there {
                    gate_up.iter_mut().zip(sums).for_each(|(rounded, sum)| *rounded = T::of_f32(*sum));
                }
                for (y, row) in y.chunks_exact_mut(width).zip(gate_up.chunks_exact(2 * width)) {
                    let (gate, up) = row.split_at(width);
                    for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
                        let gate = gate.to_f32();
                        *y = T::of_f32(gate * sigmoid(gate) * up.to_f32());
                    }
                }
            },
        );
    });
}

/// Replaces gate_up by its gradient for dy `[n, width]`, and writes the activation y itself, which the gradient of the next weight
/// needs.
pub(crate) fn backward<T: Number>(gate_up: &mut [T], dy: &[f32], y: &mut [T], width: usize) {
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
                        let (d_gate, d_up, activation) = derivatives(gate.to_f32(), up.to_f32(), dy);
                        (*gate, *up, *y) = (T::of_f32(d_gate), T::of_f32(d_up), T::of_f32(activation));
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
    use half::bf16;

    use super::*;
    use crate::ops::finite_difference::{check, random};

    /// What [`forward`] gives: gate and up, and the activation.
    fn run<T: Number>(sums: &[f32], width: usize) -> (Vec<T>, Vec<T>) {
        let [mut gate_up, mut y] = [sums.len(), sums.len() / 2].map(|len| vec![T::of_f32(f32::NAN); len]);
        forward(&mut sums.to_vec(), &mut gate_up, &mut y, width);
        (gate_up, y)
    }

    #[test]
    fn gradients_match_finite_differences() {
        let (n, width) = (3, 17);
        let sums: Vec<f32> = random(n * 2 * width, 1).iter().map(|x| 4.0 * x).collect();
        let dy = random(n * width, 2);
        let (mut gradient, y) = run::<f32>(&sums, width);
        assert_eq!(gradient, sums);
        let mut again = vec![0.0; y.len()];
        backward(&mut gradient, &dy, &mut again, width);
        check(&sums, &gradient, &dy, |sums| run::<f32>(sums, width).1);
        assert_eq!(y, again);
    }

    #[test]
    fn rounded_is_what_is_rounded_before_and_after() {
        let (n, width) = (35, 17);
        let sums: Vec<f32> = random(n * 2 * width, 1).iter().map(|x| 4.0 * x).collect();
        let (dy, halves) = (random(n * width, 2), |x: &[f32]| x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>());
        let (mut rounded, y) = run::<bf16>(&sums, width);
        assert_eq!(rounded, halves(&sums));
        let mut expected: Vec<f32> = rounded.iter().map(|x| x.to_f32()).collect();
        let mut activation = vec![0.0; dy.len()];
        backward(&mut expected, &dy, &mut activation, width);
        assert_eq!(y, halves(&activation));
        let mut again = vec![bf16::ZERO; y.len()];
        backward(&mut rounded, &dy, &mut again, width);
        assert_eq!((rounded, again), (halves(&expected), halves(&activation)));
    }
}
