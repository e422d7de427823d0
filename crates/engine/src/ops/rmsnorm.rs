//! Root-mean-square normalisation (arXiv 1910.07467): y = x · r · w with r = 1/√(mean(x²) + ε).

use rayon::prelude::*;

use super::simd::{dispatch, dot, dot3};
use super::{Number, elementwise};

/// Rows per task; also the grouping of the sum over rows in the gradient of the gain.
const ROWS: usize = 64;

/// Normalises each row. x, y `[n, width]`, w `[width]`; r `[n]` keeps 1/rms for the backward pass.
pub(crate) fn forward<T: Number>(x: &[f32], w: &[f32], eps: f32, y: &mut [T], r: &mut [f32]) {
    let _span = elementwise(size_of_val(x) + size_of_val(y));
    let width = w.len();
    assert!(x.len() == y.len() && x.len() == r.len() * width);
    y.par_chunks_mut(ROWS * width).zip(x.par_chunks(ROWS * width)).zip(r.par_chunks_mut(ROWS)).for_each(
        |((y, x), r)| {
            dispatch(
                #[inline(always)]
                || {
                    for ((y, x), r) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(r) {
                        *r = 1.0 / (dot(x, x) / width as f32 + eps).sqrt();
                        scale_row(x, w, *r, y);
                    }
                },
            );
        },
    );
}

/// Computes y = x·r·w again from the kept r.
pub(crate) fn recompute<T: Number>(x: &[f32], w: &[f32], r: &[f32], y: &mut [T]) {
    let _span = elementwise(size_of_val(x) + size_of_val(y));
    let width = w.len();
    assert!(x.len() == y.len() && x.len() == r.len() * width);
    y.par_chunks_mut(ROWS * width).zip(x.par_chunks(ROWS * width)).zip(r.par_chunks(ROWS)).for_each(|((y, x), r)| {
        dispatch(
            #[inline(always)]
            || {
                for ((y, x), r) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(r) {
                    scale_row(x, w, *r, y);
                }
            },
        );
    });
}

#[inline(always)]
fn scale_row<T: Number>(x: &[f32], w: &[f32], r: f32, y: &mut [T]) {
    for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
        *y = T::of_f32(x * r * w);
    }
}

/// dx += r·(dy·w − x·r²·mean(dy·w·x)) and, unless the gain is frozen, dw += Σ dy·x·r.
pub(crate) fn backward(x: &[f32], w: &[f32], r: &[f32], dy: &[f32], dx: &mut [f32], dw: Option<&mut [f32]>) {
    let _span = elementwise(size_of_val(x) + size_of_val(dy) + 2 * size_of_val(dx));
    let width = w.len();
    assert!(x.len() == dy.len() && x.len() == dx.len() && x.len() == r.len() * width);
    let trained = dw.is_some();
    let partial: Vec<Vec<f32>> = dx
        .par_chunks_mut(ROWS * width)
        .zip(x.par_chunks(ROWS * width))
        .zip(dy.par_chunks(ROWS * width))
        .zip(r.par_chunks(ROWS))
        .map(|(((dx, x), dy), r)| {
            let mut dw = vec![0.0; if trained { width } else { 0 }];
            dispatch(
                #[inline(always)]
                || {
                    let rows = dx.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(dy.chunks_exact(width));
                    for (((dx, x), dy), &r) in rows.zip(r) {
                        backward_row(x, w, r, dy, dx);
                        if trained {
                            gain_row(x, r, dy, &mut dw);
                        }
                    }
                },
            );
            dw
        })
        .collect();
    let Some(dw) = dw else { return };
    assert_eq!(dw.len(), width);
    for part in partial {
        for (d, p) in dw.iter_mut().zip(part) {
            *d += p;
        }
    }
}

#[inline(always)]
fn backward_row(x: &[f32], w: &[f32], r: f32, dy: &[f32], dx: &mut [f32]) {
    let s = dot3(dy, w, x) * r * r * r / x.len() as f32;
    for (((dx, dy), w), x) in dx.iter_mut().zip(dy).zip(w).zip(x) {
        *dx += dy * w * r - x * s;
    }
}

#[inline(always)]
fn gain_row(x: &[f32], r: f32, dy: &[f32], dw: &mut [f32]) {
    for ((dw, dy), x) in dw.iter_mut().zip(dy).zip(x) {
        *dw += dy * x * r;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::finite_difference::{check, random};

    #[test]
    fn gradients_match_finite_differences() {
        let (n, width) = (3, 21);
        let (x, w, dy) = (random(n * width, 1), random(width, 2), random(n * width, 3));
        let run = |x: &[f32], w: &[f32]| {
            let (mut y, mut r) = (vec![0.0; n * width], vec![0.0; n]);
            forward(x, w, 1e-5, &mut y, &mut r);
            (y, r)
        };
        let (y, r) = run(&x, &w);
        let mut again = vec![0.0; y.len()];
        recompute(&x, &w, &r, &mut again);
        assert_eq!(y, again);
        let (mut dx, mut dw) = (vec![0.0; n * width], vec![0.0; width]);
        backward(&x, &w, &r, &dy, &mut dx, Some(&mut dw));
        check(&x, &dx, &dy, |x| run(x, &w).0);
        check(&w, &dw, &dy, |w| run(&x, w).0);
        // input gradients add to what is there: the residual path
        let mut twice = dx.clone();
        backward(&x, &w, &r, &dy, &mut twice, None);
        assert!(twice.iter().zip(&dx).all(|(t, d)| (t - 2.0 * d).abs() < 1e-5));
    }
}
