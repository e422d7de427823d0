//! Matrix products: y = x·Wᵀ and its gradients.
#![allow(unsafe_code)]

use gemm::{Parallelism, gemm};

/// Up to this many results `gemm` takes each as one dot product, which sums in another order than its larger kernels.
const DOT_PRODUCTS: usize = 256;

/// Products below this many multiplications run on the calling thread: waking others costs more.
const PARALLEL_FROM: usize = 1 << 19;

/// A read-only matrix inside a larger allocation.
#[derive(Clone, Copy)]
pub(crate) struct Matrix {
    pub(crate) start: *const f32,
    pub(crate) row_stride: usize,
    pub(crate) column_stride: usize,
}

impl Matrix {
    /// The matrix whose rows are `row_stride` apart and whose columns are adjacent.
    pub(crate) fn rows(start: *const f32, row_stride: usize) -> Self {
        Self { start, row_stride, column_stride: 1 }
    }

    /// The same memory read as the transposed matrix.
    pub(crate) fn transposed(self) -> Self {
        Self { start: self.start, row_stride: self.column_stride, column_stride: self.row_stride }
    }
}

/// out = a·b·scale, or out += a·b·scale with `add`; `a` is m×k, `b` is k×n, `out` is m×n with adjacent columns.
///
/// # Safety
/// Every element that the shapes and strides reach must lie in memory that is valid to read (`a`, `b`)
/// or to write (`out`), and `out` must not overlap `a` or `b` or be used by another thread meanwhile.
#[allow(clippy::too_many_arguments, reason = "the arguments of a matrix product")]
pub(crate) unsafe fn multiply(
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

/// A product of whole matrices, on all threads where that pays.
fn multiply_slices(shape: [usize; 3], a: Matrix, b: Matrix, out: &mut [f32], add: bool) {
    let [m, n, k] = shape;
    assert_eq!(out.len(), m * n, "the output does not have the shape of the product");
    let threads = if m * n * k < PARALLEL_FROM { Parallelism::None } else { Parallelism::Rayon(0) };
    // SAFETY: the callers below check that `a` and `b` are whole slices of m·k and k·n elements; `out`
    // is borrowed mutably, so nothing else touches it.
    unsafe { multiply(shape, a, b, out.as_mut_ptr(), n, 1.0, add, threads) }
}

/// The number of rows of `x`, which has `width` columns.
fn rows(x: &[f32], width: usize) -> usize {
    assert_eq!(x.len() % width, 0, "a slice of {} elements has no rows of {width}", x.len());
    x.len() / width
}

/// y = x·Wᵀ, or y += x·Wᵀ with `add`. x `[n, inputs]`, w `[outputs, inputs]`, y `[n, outputs]`.
///
/// From two rows on, a row's result does not depend on how many others there are.
pub(crate) fn forward(x: &[f32], w: &[f32], y: &mut [f32], inputs: usize, add: bool) {
    let (n, outputs) = (rows(x, inputs), rows(w, inputs));
    if n > 1 && n * outputs <= DOT_PRODUCTS {
        let copies = DOT_PRODUCTS / (n * outputs) + 1;
        let mut all = y.repeat(copies);
        forward(&x.repeat(copies), w, &mut all, inputs, add);
        return y.copy_from_slice(&all[..n * outputs]);
    }
    let (x, w) = (Matrix::rows(x.as_ptr(), inputs), Matrix::rows(w.as_ptr(), inputs));
    multiply_slices([n, outputs, inputs], x, w.transposed(), y, add);
}

/// dx = dy·W. dy `[n, outputs]`, w `[outputs, inputs]`, dx `[n, inputs]`.
pub(crate) fn backward_input(dy: &[f32], w: &[f32], dx: &mut [f32], inputs: usize) {
    let outputs = rows(w, inputs);
    let n = rows(dy, outputs);
    let (dy, w) = (Matrix::rows(dy.as_ptr(), outputs), Matrix::rows(w.as_ptr(), inputs));
    multiply_slices([n, inputs, outputs], dy, w, dx, false);
}

/// dW += dyᵀ·x. dy `[n, outputs]`, x `[n, inputs]`, dw `[outputs, inputs]`.
pub(crate) fn backward_weight(dy: &[f32], x: &[f32], dw: &mut [f32], inputs: usize) {
    let n = rows(x, inputs);
    let outputs = rows(dw, inputs);
    assert_eq!(dy.len(), n * outputs, "the output gradient does not have the shape of the output");
    let (dy, x) = (Matrix::rows(dy.as_ptr(), outputs), Matrix::rows(x.as_ptr(), inputs));
    multiply_slices([outputs, inputs, n], dy.transposed(), x, dw, true);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::finite_difference::{check, random};

    #[test]
    fn gradients_match_finite_differences() {
        let (n, inputs, outputs) = (5, 7, 3);
        let (x, w, dy) = (random(n * inputs, 1), random(outputs * inputs, 2), random(n * outputs, 3));
        let run = |x: &[f32], w: &[f32]| {
            let mut y = vec![0.0; n * outputs];
            forward(x, w, &mut y, inputs, false);
            y
        };
        let mut dx = vec![0.0; x.len()];
        backward_input(&dy, &w, &mut dx, inputs);
        check(&x, &dx, &dy, |x| run(x, &w));
        let mut dw = vec![0.0; w.len()];
        backward_weight(&dy, &x, &mut dw, inputs);
        check(&w, &dw, &dy, |w| run(&x, w));
    }

    #[test]
    fn a_row_does_not_depend_on_the_number_of_others() {
        for (inputs, outputs) in [(24, 40), (48, 33), (64, 4), (96, 300), (577, 129)] {
            let (x, w, start) = (random(60 * inputs, 1), random(inputs * outputs, 2), random(60 * outputs, 3));
            let run = |n: usize| {
                let mut y = start[..n * outputs].to_vec();
                forward(&x[..n * inputs], &w, &mut y, inputs, true);
                y
            };
            let whole = run(60);
            assert!((2..60).all(|n| run(n) == whole[..n * outputs]), "{inputs} inputs, {outputs} outputs");
        }
    }

    #[test]
    fn weight_gradients_and_forward_accumulate() {
        let (x, w) = ([1.0, 2.0], [3.0, 4.0]);
        let mut y = [10.0];
        forward(&x, &w, &mut y, 2, true);
        assert_eq!(y, [21.0]);
        let mut dw = [100.0, 100.0];
        backward_weight(&[2.0], &x, &mut dw, 2);
        assert_eq!(dw, [102.0, 104.0]);
    }
}
