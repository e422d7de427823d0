//! Matrix products: y = x·Wᵀ and its gradients.
#![allow(unsafe_code)]

use std::ops::Range;

use gemm::{Parallelism, gemm};
use rayon::prelude::*;

use super::Number;
use super::simd::{dispatch, dot, dot4};
use crate::precision::Precision;

pub(crate) mod bf16;
mod int8;
pub(crate) mod packed;

/// Up to this many results `gemm` takes each as one dot product, if both factors have the summed elements next to each
/// other; its larger kernels sum in another order.
const DOT_PRODUCTS: usize = 256;

/// `gemm` sums products of up to 64 rows and 64 columns in blocks of 512, and others in equal blocks of 512 or more.
const SMALL: usize = 64;
const SUMMED_AT_ONCE: usize = 512;

/// Rows of W that a task of [`forward_rowwise`] takes.
const TOGETHER: usize = 64;

/// Products below this many multiplications run on the calling thread: waking others costs more.
const PARALLEL_FROM: usize = 1 << 19;

/// Tasks for each thread of a product of few rows, and bytes that a task reads of W at least, for every row.
const TASKS_PER_THREAD: usize = 4;
const TASK_BYTES: usize = 1 << 16;

/// A read-only matrix inside a larger allocation.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<T = f32> {
    pub(crate) start: *const T,
    pub(crate) row_stride: usize,
    pub(crate) column_stride: usize,
}

impl<T> Matrix<T> {
    /// The matrix whose rows are `row_stride` apart and whose columns are adjacent.
    pub(crate) fn rows(start: *const T, row_stride: usize) -> Self {
        Self { start, row_stride, column_stride: 1 }
    }

    /// The same places as words, of numbers in f32 their bits.
    pub(crate) fn words(self) -> Matrix<u32> {
        Matrix { start: self.start.cast(), row_stride: self.row_stride, column_stride: self.column_stride }
    }
}

/// out = a·b·scale, or out += a·b·scale with `add`; `a` is m×k, `b` is k×n, `out` is m×n with adjacent columns.
///
/// # Safety
/// Every element that the shapes and strides reach must lie in memory that is valid to read (`a`, `b`)
/// or to write (`out`), and `out` must not overlap `a` or `b` or be used by another thread meanwhile.
#[allow(clippy::too_many_arguments, reason = "the arguments of a matrix product")]
unsafe fn multiply(
    [m, n, k]: [usize; 3],
    a: Matrix,
    b: Matrix,
    out: *mut f32,
    out_row_stride: usize,
    scale: f32,
    add: bool,
    threads: Parallelism,
) {
    // SAFETY: the caller vouches for the memory; strides of live allocations fit isize.
    unsafe {
        gemm(
            m,
            n,
            k,
            out,
            1,
            out_row_stride as isize,
            add,
            a.start,
            a.column_stride as isize,
            a.row_stride as isize,
            b.start,
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            threads,
        );
    }
}

/// A matrix in row-major memory: whole rows, some of their columns, or the transpose of either.
///
/// Every element of the shape lies within `data`.
#[derive(Clone, Copy)]
pub(crate) struct View<'a, T = f32> {
    data: &'a [T],
    shape: [usize; 2],
    strides: [usize; 2],
}

impl<'a, T> View<'a, T> {
    /// All of `data`, in rows of `width`.
    pub(crate) fn rows(data: &'a [T], width: usize) -> Self {
        Self { data, shape: [rows(data, width), width], strides: [width, 1] }
    }

    /// Some of the columns.
    pub(crate) fn columns(self, range: Range<usize>) -> Self {
        let [rows, columns] = self.shape;
        assert!(range.start <= range.end && range.end <= columns, "columns {range:?} of {columns}");
        let data = self.data.get(range.start * self.strides[1]..).unwrap_or_default();
        Self { data, shape: [rows, range.len()], strides: self.strides }
    }

    /// The transposed matrix, in the same memory.
    pub(crate) fn transposed(self) -> Self {
        let ([rows, columns], [row, column]) = (self.shape, self.strides);
        Self { data: self.data, shape: [columns, rows], strides: [column, row] }
    }

    /// The same matrix in other memory, which holds its numbers at the same places.
    fn with<U>(self, data: &[U]) -> View<'_, U> {
        assert_eq!(data.len(), self.data.len());
        View { data, shape: self.shape, strides: self.strides }
    }
}

impl View<'_> {
    /// The elements row by row.
    fn to_rows(self) -> Vec<f32> {
        let ([rows, columns], [row, column]) = (self.shape, self.strides);
        (0..rows).flat_map(|i| (0..columns).map(move |j| self.data[i * row + j * column])).collect()
    }

    fn matrix(self) -> Matrix {
        Matrix { start: self.data.as_ptr(), row_stride: self.strides[0], column_stride: self.strides[1] }
    }
}

/// A matrix to write to, in row-major memory: whole rows or some of their columns.
///
/// Every element of the shape lies within `data`.
pub(crate) struct ViewMut<'a> {
    data: &'a mut [f32],
    shape: [usize; 2],
    row_stride: usize,
}

impl<'a> ViewMut<'a> {
    /// All of `data`, in rows of `width`.
    pub(crate) fn rows(data: &'a mut [f32], width: usize) -> Self {
        let shape = [rows(data, width), width];
        Self { data, shape, row_stride: width }
    }

    /// Some of the columns.
    pub(crate) fn columns(self, range: Range<usize>) -> Self {
        let [rows, columns] = self.shape;
        assert!(range.start <= range.end && range.end <= columns, "columns {range:?} of {columns}");
        let data = self.data.get_mut(range.start..).unwrap_or_default();
        Self { data, shape: [rows, range.len()], row_stride: self.row_stride }
    }
}

/// out = a·b·scale, or out += a·b·scale with `add`; on all threads where that pays.
///
/// From two rows on, a row's result does not depend on how many others there are.
pub(crate) fn product<A: Number, B: Number>(
    precision: Precision,
    a: View<'_, A>,
    b: View<'_, B>,
    out: ViewMut<'_>,
    scale: f32,
    add: bool,
) {
    assert_eq!(a.shape[1], b.shape[0], "the matrices do not fit each other");
    assert_eq!(out.shape, [a.shape[0], b.shape[1]], "the output does not have the shape of the product");
    match precision {
        Precision::F32 => product_f32(a.with(&A::widened(a.data)), b.with(&B::widened(b.data)), out, scale, add),
        Precision::Bf16 => bf16::product(a, b, out, scale, add),
    }
}

/// As [`product`], in f32.
fn product_f32(a: View<'_>, b: View<'_>, out: ViewMut<'_>, scale: f32, add: bool) {
    let ([m, k], n) = (a.shape, b.shape[1]);
    let copy;
    let b = if m > 1 && m * n <= DOT_PRODUCTS && a.strides[1] == 1 && b.strides[0] == 1 {
        copy = b.to_rows();
        View::rows(&copy, n)
    } else {
        b
    };
    // whoever has few columns may have few rows or many, and is to be summed alike
    let block = if n <= SMALL { SUMMED_AT_ONCE } else { k };
    let threads = if m * n * k < PARALLEL_FROM { Parallelism::None } else { Parallelism::Rayon(0) };
    for start in (0..k.max(1)).step_by(block.max(1)) {
        let summed = start..k.min(start + block);
        let (a, b) = (a.columns(summed.clone()), b.transposed().columns(summed.clone()).transposed());
        let (shape, add) = ([m, n, summed.len()], add || start > 0);
        // SAFETY: a view's elements lie within its slice; `out` is borrowed mutably, so nothing else touches its slice.
        unsafe { multiply(shape, a.matrix(), b.matrix(), out.data.as_mut_ptr(), out.row_stride, scale, add, threads) }
    }
}

/// How many of `count` panels a task takes, of which each is so many bytes to read for the rows of a product.
fn panels_of_task(count: usize, bytes: usize) -> usize {
    count.div_ceil(TASKS_PER_THREAD * rayon::current_num_threads()).max(TASK_BYTES.div_ceil(bytes.max(1)))
}

/// The number of rows of `x`, which has `width` columns.
fn rows<T>(x: &[T], width: usize) -> usize {
    assert_eq!(x.len() % width, 0, "a slice of {} elements has no rows of {width}", x.len());
    x.len() / width
}

/// y = x·Wᵀ, or y += x·Wᵀ with `add`. x `[n, inputs]`, w `[outputs, inputs]`, y `[n, outputs]`.
pub(crate) fn forward(precision: Precision, x: &[impl Number], w: &[f32], y: &mut [f32], inputs: usize, add: bool) {
    let (x, w) = (View::rows(x, inputs), View::rows(w, inputs));
    product(precision, x, w.transposed(), ViewMut::rows(y, w.shape[0]), 1.0, add);
}

/// As [`forward`] in f32, with every row computed by itself: its bits do not depend on how many rows there are.
///
/// W is read once, as it lies, where the general product first copies it into blocks, which pays when many rows use each
/// block: this is the faster one for few rows.
pub(crate) fn forward_rowwise(x: &[f32], w: &[f32], y: &mut [f32], inputs: usize, add: bool) {
    let (n, outputs) = (rows(x, inputs), rows(w, inputs));
    assert_eq!(y.len(), n * outputs, "the output does not have the shape of the product");
    if n == 0 {
        return;
    }
    let mut columns = vec![0.0; y.len()];
    columns.par_chunks_mut(TOGETHER * n).zip(w.par_chunks(TOGETHER * inputs)).for_each(|(columns, w)| {
        dispatch(
            #[inline(always)]
            || {
                let (whole, rest) = w.split_at(w.len() / inputs / 4 * 4 * inputs);
                let (of_whole, of_rest) = columns.split_at_mut(whole.len() / inputs * n);
                for (columns, w) in of_whole.chunks_exact_mut(4 * n).zip(whole.chunks_exact(4 * inputs)) {
                    let w: [&[f32]; 4] = std::array::from_fn(|i| &w[i * inputs..][..inputs]);
                    for (j, x) in x.chunks_exact(inputs).enumerate() {
                        let [y0, y1, y2, y3] = dot4(w, x);
                        (columns[j], columns[n + j], columns[2 * n + j], columns[3 * n + j]) = (y0, y1, y2, y3);
                    }
                }
                for (column, w) in of_rest.chunks_exact_mut(n).zip(rest.chunks_exact(inputs)) {
                    for (y, x) in column.iter_mut().zip(x.chunks_exact(inputs)) {
                        *y = dot(x, w);
                    }
                }
            },
        );
    });
    write_columns(&columns, y, outputs, add);
}

/// y = columns, or y += columns with `add`. columns `[outputs, n]`, y `[n, outputs]`.
fn write_columns(columns: &[f32], y: &mut [f32], outputs: usize, add: bool) {
    let n = y.len() / outputs;
    for (row, y) in y.chunks_exact_mut(outputs).enumerate() {
        for (y, column) in y.iter_mut().zip(columns.chunks_exact(n)) {
            *y = column[row] + if add { *y } else { 0.0 };
        }
    }
}

/// [`forward`], by [`forward_rowwise`] where `rowwise` asks for rows that are computed by themselves, which in bf16 they
/// always are.
pub(crate) fn forward_as<T: Number>(
    rowwise: bool,
    precision: Precision,
) -> impl Fn(&[T], &[f32], &mut [f32], usize, bool) {
    move |x, w, y, inputs, add| match precision {
        Precision::F32 if rowwise => forward_rowwise(&T::widened(x), w, y, inputs, add),
        _ => forward(precision, x, w, y, inputs, add),
    }
}

/// dx = dy·W. dy `[n, outputs]`, w `[outputs, inputs]`, dx `[n, inputs]`.
pub(crate) fn backward_input(precision: Precision, dy: &[impl Number], w: &[f32], dx: &mut [f32], inputs: usize) {
    let w = View::rows(w, inputs);
    product(precision, View::rows(dy, w.shape[0]), w, ViewMut::rows(dx, inputs), 1.0, false);
}

/// dW += dyᵀ·x. dy `[n, outputs]`, x `[n, inputs]`, dw `[outputs, inputs]`.
pub(crate) fn backward_weight(
    precision: Precision,
    dy: &[impl Number],
    x: &[impl Number],
    dw: &mut [f32],
    inputs: usize,
) {
    let outputs = rows(dw, inputs);
    let (dy, x) = (View::rows(dy, outputs), View::rows(x, inputs));
    product(precision, dy.transposed(), x, ViewMut::rows(dw, inputs), 1.0, true);
}

#[cfg(test)]
mod tests {
    use super::Precision::F32;
    use super::*;
    use crate::ops::finite_difference::{check, random};

    #[test]
    fn gradients_match_finite_differences() {
        let (n, inputs, outputs) = (5, 7, 3);
        let (x, w, dy) = (random(n * inputs, 1), random(outputs * inputs, 2), random(n * outputs, 3));
        let run = |x: &[f32], w: &[f32]| {
            let mut y = vec![0.0; n * outputs];
            forward(F32, x, w, &mut y, inputs, false);
            y
        };
        let mut dx = vec![0.0; x.len()];
        backward_input(F32, &dy, &w, &mut dx, inputs);
        check(&x, &dx, &dy, |x| run(x, &w));
        let mut dw = vec![0.0; w.len()];
        backward_weight(F32, &dy, &x, &mut dw, inputs);
        check(&w, &dw, &dy, |w| run(&x, w));
    }

    #[test]
    fn a_row_does_not_depend_on_the_number_of_others() {
        for (inputs, outputs) in [(24, 40), (48, 33), (64, 4), (96, 300), (577, 129)] {
            let (x, w, start) = (random(60 * inputs, 1), random(inputs * outputs, 2), random(60 * outputs, 3));
            let run = |n: usize| {
                let mut y = start[..n * outputs].to_vec();
                forward(F32, &x[..n * inputs], &w, &mut y, inputs, true);
                y
            };
            let whole = run(60);
            assert!((2..60).all(|n| run(n) == whole[..n * outputs]), "{inputs} inputs, {outputs} outputs");
        }
    }

    #[test]
    fn from_two_rows_on_a_row_does_not_depend_on_how_many_there_are() {
        for (n, k) in [(1, 700), (3, 40), (8, 576), (48, 1100), (64, 1536), (65, 576), (300, 20)] {
            let (x, w) = (random(200 * k, 1), random(n * k, 2));
            let of_rows = |m: usize| {
                let mut y = vec![0.0; m * n];
                forward(F32, &x[..m * k], &w, &mut y, k, false);
                y
            };
            let all = of_rows(200);
            for m in [2, 3, 16, 63, 64, 65, 100] {
                assert!(of_rows(m) == all[..m * n], "{m} rows of {n} columns, sums of {k}");
            }
        }
    }

    #[test]
    fn rows_by_themselves_are_those_of_the_product_and_keep_their_bits() {
        for (n, inputs, outputs) in [(1, 24, 40), (2, 577, 129), (3, 5, 300), (4, 16, 8), (33, 64, 34)] {
            let (x, w, start) = (random(n * inputs, 1), random(inputs * outputs, 2), random(n * outputs, 3));
            for add in [false, true] {
                let (mut together, mut rowwise) = (start.clone(), start.clone());
                forward(F32, &x, &w, &mut together, inputs, add);
                forward_rowwise(&x, &w, &mut rowwise, inputs, add);
                let largest = together.iter().fold(0f32, |m, y| m.max(y.abs()));
                assert!(together.iter().zip(&rowwise).all(|(a, b)| (a - b).abs() < 1e-6 * largest));
                let mut last = start[(n - 1) * outputs..].to_vec();
                forward_rowwise(&x[(n - 1) * inputs..], &w, &mut last, inputs, add);
                assert!(last == rowwise[(n - 1) * outputs..]);
            }
        }
    }

    #[test]
    fn weight_gradients_and_forward_accumulate() {
        let (x, w) = ([1.0, 2.0], [3.0, 4.0]);
        let mut y = [10.0];
        forward(F32, &x, &w, &mut y, 2, true);
        assert_eq!(y, [21.0]);
        let mut dw = [100.0, 100.0];
        backward_weight(F32, &[2.0], &x, &mut dw, 2);
        assert_eq!(dw, [102.0, 104.0]);
    }

    #[test]
    fn products_reach_some_columns_and_leave_the_others() {
        let (a, b) = ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [10.0, 100.0]);
        let mut out = [0.5; 8];
        let columns = View::rows(&a, 3).columns(1..3);
        product(F32, columns, View::rows(&b, 1), ViewMut::rows(&mut out, 4).columns(2..3), 2.0, true);
        assert_eq!(out, [0.5, 0.5, 640.5, 0.5, 0.5, 0.5, 1300.5, 0.5]);
        let mut across = [0.0; 2];
        product(F32, columns.transposed(), View::rows(&b, 1), ViewMut::rows(&mut across, 1), 1.0, false);
        assert_eq!(across, [520.0, 630.0]);
    }

    #[test]
    #[should_panic(expected = "columns 2..4 of 3")]
    fn columns_beyond_the_rows_are_refused() {
        View::rows(&[0.0; 6], 3).columns(2..4);
    }
}
