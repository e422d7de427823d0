//! Products of factors that are rounded to bfloat16, with sums in f32.
//!
//! Where the processor has AVX512-BF16 the factors are packed into panels of pairs of bf16 numbers, and a kernel computes
//! tiles of the result in registers (the blocking of GotoBLAS). Elsewhere the rounded factors are multiplied as f32
//! numbers, which is the same but for the order of sums. The bits of a row never depend on how many rows there are.
//!
//! A factor that is kept in bf16 is read as it is.

use std::borrow::Cow;

use rayon::prelude::*;

use super::{View, ViewMut, product_f32};
use crate::ops::Number;
use crate::ops::simd::{dispatch, of_bf16, to_bf16};

#[cfg(target_arch = "x86_64")]
pub(in crate::ops) mod avx512;
#[cfg(target_arch = "x86_64")]
pub(super) use avx512::{panels, product_of_panels};

/// out = a·b·scale, or out += a·b·scale with `add`, of the factors rounded to bf16.
pub(crate) fn product<A: Number, B: Number>(a: View<'_, A>, b: View<'_, B>, out: ViewMut<'_>, scale: f32, add: bool) {
    #[cfg(target_arch = "x86_64")]
    if avx512::is_available() {
        return avx512::product(a, b, out, scale, add);
    }
    product_of_rounded(a, b, out, scale, add);
}

/// Whether this processor multiplies numbers in bf16. Results differ in the last bits from those where it does not.
pub(crate) fn is_native() -> bool {
    #[cfg(target_arch = "x86_64")]
    return avx512::is_available();
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

/// The product of rounded copies.
fn product_of_rounded<A: Number, B: Number>(a: View<'_, A>, b: View<'_, B>, out: ViewMut<'_>, scale: f32, add: bool) {
    let (a_data, b_data) = (rounded(a.data), rounded(b.data));
    let (a, b) = (a.with(&a_data), b.with(&b_data));
    if a.shape[0] != 1 {
        return product_f32(a, b, out, scale, add);
    }
    // one row by itself is summed in another order than one of several, so it comes twice
    let (row, n) = (a.to_rows(), out.shape[1]);
    let mut twice = out.data[..n].repeat(2);
    product_f32(View::rows(&row.repeat(2), row.len()), b, ViewMut::rows(&mut twice, n), scale, add);
    out.data[..n].copy_from_slice(&twice[..n]);
}

fn rounded<T: Number>(x: &[T]) -> Cow<'_, [f32]> {
    let mut x = T::widened(x);
    if !T::IS_ROUNDED {
        round(x.to_mut());
    }
    x
}

/// Rounds every number to the nearest bf16.
pub(crate) fn round(x: &mut [f32]) {
    x.par_chunks_mut(1 << 14).for_each(|x| {
        dispatch(
            #[inline(always)]
            || x.iter_mut().for_each(|x| *x = of_bf16(to_bf16(*x))),
        );
    });
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::ops::finite_difference::random;

    /// Shapes with every kind of edge: of tiles, of panels, of blocks of the sum, and odd ones.
    const SHAPES: [[usize; 3]; 9] = [
        [1, 1, 1],
        [12, 32, 64],
        [13, 33, 31],
        [5, 100, 1025],
        [100, 7, 2050],
        [97, 193, 47],
        [200, 2100, 40],
        [6200, 40, 3],
        [3, 4100, 77],
    ];

    fn views<'a>([m, n, k]: [usize; 3], a: &'a [f32], b: &'a [f32]) -> [[View<'a>; 2]; 4] {
        let [a_rows, a_columns] = [View::rows(a, k), View::rows(a, m).transposed()];
        let [b_rows, b_columns] = [View::rows(b, n), View::rows(b, k).transposed()];
        [[a_rows, b_rows], [a_rows, b_columns], [a_columns, b_rows], [a_columns, b_columns]]
    }

    #[test]
    fn products_are_those_of_the_rounded_factors() {
        for shape in SHAPES {
            let [m, n, k] = shape;
            let (a, b, start) = (random(m * k, 1), random(k * n, 2), random(m * n, 3));
            for [a, b] in views(shape, &a, &b) {
                for (scale, add) in [(1.0, false), (0.5, true)] {
                    let (mut y, mut expected) = (start.clone(), start.clone());
                    product(a, b, ViewMut::rows(&mut y, n), scale, add);
                    product_of_rounded(a, b, ViewMut::rows(&mut expected, n), scale, add);
                    // sums of k products of numbers below 1 in another order
                    let tolerance = 1e-6 * (k as f32).sqrt() + 1e-6;
                    let worst = y.iter().zip(&expected).map(|(y, e)| (y - e).abs()).fold(0.0, f32::max);
                    assert!(worst < tolerance, "{shape:?}: {worst:e}");
                }
            }
        }
    }

    #[test]
    fn factors_in_16_bits_are_those_in_32() {
        for shape in SHAPES {
            let [m, n, k] = shape;
            let (mut a, mut b) = (random(m * k, 1), random(k * n, 2));
            round(&mut a);
            round(&mut b);
            let [a16, b16] = [&a, &b].map(|x| x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>());
            let a16 = [View::rows(&a16, k), View::rows(&a16, m).transposed()];
            let b16 = [View::rows(&b16, n), View::rows(&b16, k).transposed()];
            for (index, [a, b]) in views(shape, &a, &b).into_iter().enumerate() {
                let (a16, b16) = (a16[index / 2], b16[index % 2]);
                let (mut expected, mut y) = (vec![0.0; m * n], vec![0.0; m * n]);
                product(a, b, ViewMut::rows(&mut expected, n), 1.0, false);
                product(a16, b16, ViewMut::rows(&mut y, n), 1.0, false);
                assert!(y == expected, "{shape:?}");
                product_of_rounded(a, b, ViewMut::rows(&mut expected, n), 1.0, false);
                product_of_rounded(a16, b16, ViewMut::rows(&mut y, n), 1.0, false);
                assert!(y == expected, "{shape:?}, as f32 numbers");
            }
        }
    }

    #[test]
    fn products_reach_some_columns_and_leave_the_others() {
        let (a, b) = (random(40 * 30, 1), random(30 * 20, 2));
        let mut y = vec![7.0; 40 * 50];
        let part = View::rows(&a, 30).columns(10..25);
        let b = View::rows(&b, 30).columns(3..18).transposed();
        product(part, b, ViewMut::rows(&mut y, 50).columns(11..31), 1.0, false);
        let mut expected = vec![0.0; 40 * 20];
        product_of_rounded(part, b, ViewMut::rows(&mut expected, 20), 1.0, false);
        for (row, expected) in y.chunks(50).zip(expected.chunks(20)) {
            assert!(row[..11].iter().chain(&row[31..]).all(|&y| y == 7.0));
            assert!(row[11..31].iter().zip(expected).all(|(y, e)| (y - e).abs() < 1e-5));
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_others() {
        for (n, k) in [(1, 700), (40, 576), (300, 20), (129, 2500)] {
            let (x, w) = (random(100 * k, 1), random(n * k, 2));
            let of_rows = |from: usize, to: usize| {
                let mut y = vec![0.0; (to - from) * n];
                let x = View::rows(&x[from * k..to * k], k);
                product(x, View::rows(&w, k).transposed(), ViewMut::rows(&mut y, n), 1.0, false);
                y
            };
            let of_rounded = |from: usize, to: usize| {
                let mut y = vec![0.5; (to - from) * n];
                let x = View::rows(&x[from * k..to * k], k);
                product_of_rounded(x, View::rows(&w, k).transposed(), ViewMut::rows(&mut y, n), 1.5, true);
                y
            };
            let (all, all_rounded) = (of_rows(0, 100), of_rounded(0, 100));
            for (from, to) in [(0, 1), (5, 18), (99, 100), (1, 100)] {
                assert!(of_rows(from, to) == all[from * n..to * n], "rows {from}..{to} of {n} columns, sums of {k}");
                assert!(
                    of_rounded(from, to) == all_rounded[from * n..to * n],
                    "rows {from}..{to} of {n} columns, rounded"
                );
            }
        }
    }

    #[test]
    fn rounding_is_to_the_nearest() {
        let mut x = [1.0, 1.0 + 1.0 / 512.0, 1.0 + 3.0 / 512.0, -2.003_906_5, f32::MAX];
        round(&mut x);
        assert_eq!(x, [1.0, 1.0, 1.0 + 2.0 / 128.0 * 0.5, -2.0, f32::INFINITY]);
    }
}
