//! The score head: one number for each row, s = x·w.
//!
//! Only the rows of the last tokens of texts come here, so there are few of them.

use super::simd::{dispatch, dot};

/// The score of every row. x `[n, width]`, w `[width]`.
pub(crate) fn forward(x: &[f32], w: &[f32]) -> Vec<f32> {
    x.chunks_exact(w.len())
        .map(|row| {
            dispatch(
                #[inline(always)]
                || dot(row, w),
            )
        })
        .collect()
}

/// For the derivative `d_scores[i]` of the loss with respect to each score: d_x is overwritten, d_w added to.
pub(crate) fn backward(x: &[f32], w: &[f32], d_scores: &[f32], d_x: &mut [f32], d_w: &mut [f32]) {
    let width = w.len();
    assert!(x.len() == d_scores.len() * width && d_x.len() == x.len() && d_w.len() == width);
    for ((x, d_x), &d) in x.chunks_exact(width).zip(d_x.chunks_exact_mut(width)).zip(d_scores) {
        d_x.iter_mut().zip(w).for_each(|(d_x, w)| *d_x = d * w);
        d_w.iter_mut().zip(x).for_each(|(d_w, x)| *d_w += d * x);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::finite_difference::{check, random};

    #[test]
    fn scores_and_gradients() {
        let (x, w, d) = (random(3 * 5, 1), random(5, 2), random(3, 3));
        let (mut d_x, mut d_w) = (vec![9.0; x.len()], vec![0.0; w.len()]);
        backward(&x, &w, &d, &mut d_x, &mut d_w);
        check(&x, &d_x, &d, |x| forward(x, &w));
        check(&w, &d_w, &d, |w| forward(&x, w));
        backward(&x, &w, &d, &mut d_x, &mut d_w);
        check(&w, &d_w.iter().map(|d| d / 2.0).collect::<Vec<_>>(), &d, |w| forward(&x, w));
    }
}
