//! The matrix products of attention, in which an element of the result has the same bits whatever is computed beside it.

use pulp::Simd;

use super::arithmetic::Arithmetic;
use crate::ops::linear::Matrix;

/// Vectors of f32 numbers, and of words.
type F32s<A> = <<A as Arithmetic>::Simd as Simd>::f32s;
type U32s<A> = <<A as Arithmetic>::Simd as Simd>::u32s;

/// out = a·b, or out += a·b with `add`: a `[m, k]` and b `[k, n]` are words of the arithmetic, of k words with a sum's numbers; out
/// `[m, n]`; columns of b and of out are adjacent.
///
/// Each element is the sum of its products in their order, however many rows and columns there are.
///
/// # Safety
/// Every element that shapes and strides reach must be valid to read (`a`, `b`) or to write (`out`), and `out` must not overlap
/// `a` or `b` or be used by another thread meanwhile.
#[inline(always)]
pub(super) unsafe fn product<A: Arithmetic>(
    arithmetic: A,
    [m, n, k]: [usize; 3],
    a: Matrix<u32>,
    b: Matrix<u32>,
    out: *mut f32,
    out_row_stride: usize,
    add: bool,
) {
    let mut row = 0;
    let rows_from = |row: usize| Matrix { start: a.start.wrapping_add(row * a.row_stride), ..a };
    let out_from = |row: usize| out.wrapping_add(row * out_row_stride);
    // sixteen sums of two vectors each need more than the sixteen registers of older processors
    while A::Simd::REGISTER_COUNT >= 32 && row + 8 <= m {
        // SAFETY: the caller's promise, of which these rows are a part.
        unsafe { strip::<A, 8>(arithmetic, n, k, rows_from(row), b, out_from(row), out_row_stride, add) };
        row += 8;
    }
    while row + 4 <= m {
        // SAFETY: as above.
        unsafe { strip::<A, 4>(arithmetic, n, k, rows_from(row), b, out_from(row), out_row_stride, add) };
        row += 4;
    }
    while row < m {
        // SAFETY: as above.
        unsafe { strip::<A, 1>(arithmetic, n, k, rows_from(row), b, out_from(row), out_row_stride, add) };
        row += 1;
    }
}

/// `R` rows of [`product`].
///
/// # Safety
/// As there.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the arguments of a matrix product")]
unsafe fn strip<A: Arithmetic, const R: usize>(
    arithmetic: A,
    n: usize,
    k: usize,
    a: Matrix<u32>,
    b: Matrix<u32>,
    out: *mut f32,
    out_row_stride: usize,
    add: bool,
) {
    let lanes = A::Simd::F32_LANES;
    let mut column = 0;
    let from = |column: usize| Matrix { start: b.start.wrapping_add(column), ..b };
    while column + 2 * lanes <= n {
        let out = out.wrapping_add(column);
        // SAFETY: the caller's promise, of which these columns are a part.
        unsafe { tile::<A, R, 2, false>(arithmetic, lanes, k, a, from(column), out, out_row_stride, add) };
        column += 2 * lanes;
    }
    while column + lanes <= n {
        let out = out.wrapping_add(column);
        // SAFETY: as above.
        unsafe { tile::<A, R, 1, false>(arithmetic, lanes, k, a, from(column), out, out_row_stride, add) };
        column += lanes;
    }
    if column < n {
        let out = out.wrapping_add(column);
        // SAFETY: as above.
        unsafe { tile::<A, R, 1, true>(arithmetic, n - column, k, a, from(column), out, out_row_stride, add) };
    }
}

/// `R` rows and `V` vectors of columns of [`product`]; of a single vector, if `PARTIAL`, the first `width` columns.
///
/// # Safety
/// As there.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the arguments of a matrix product")]
unsafe fn tile<A: Arithmetic, const R: usize, const V: usize, const PARTIAL: bool>(
    arithmetic: A,
    width: usize,
    k: usize,
    a: Matrix<u32>,
    b: Matrix<u32>,
    out: *mut f32,
    out_row_stride: usize,
    add: bool,
) {
    let (simd, lanes) = (arithmetic.simd(), A::Simd::F32_LANES);
    let mut sums = [[simd.splat_f32s(0.0); V]; R];
    if add {
        for (row, sums) in sums.iter_mut().enumerate() {
            for (vector, sum) in sums.iter_mut().enumerate() {
                let from = out.wrapping_add(row * out_row_stride + vector * lanes);
                *sum = if PARTIAL {
                    // SAFETY: the caller's promise for the columns that there are.
                    simd.partial_load_f32s(unsafe { std::slice::from_raw_parts(from, width) })
                } else {
                    // SAFETY: the caller's promise; a vector is as many f32 in a row.
                    unsafe { from.cast::<F32s<A>>().read_unaligned() }
                };
            }
        }
    }
    for at in 0..k {
        let mut right = [simd.splat_u32s(0); V];
        for (vector, right) in right.iter_mut().enumerate() {
            let from = b.start.wrapping_add(at * b.row_stride + vector * lanes);
            *right = if PARTIAL {
                // SAFETY: as above.
                simd.partial_load_u32s(unsafe { std::slice::from_raw_parts(from, width) })
            } else {
                // SAFETY: as above, of words.
                unsafe { from.cast::<U32s<A>>().read_unaligned() }
            };
        }
        for (row, sums) in sums.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            let left = unsafe { *a.start.wrapping_add(row * a.row_stride + at * a.column_stride) };
            let left = simd.splat_u32s(left);
            for (sum, right) in sums.iter_mut().zip(right) {
                *sum = arithmetic.multiply_add(left, right, *sum);
            }
        }
    }
    for (row, sums) in sums.iter().enumerate() {
        for (vector, &sum) in sums.iter().enumerate() {
            let to = out.wrapping_add(row * out_row_stride + vector * lanes);
            if PARTIAL {
                // SAFETY: the caller's promise for the columns that there are.
                simd.partial_store_f32s(unsafe { std::slice::from_raw_parts_mut(to, width) }, sum);
            } else {
                // SAFETY: the caller's promise.
                unsafe { to.cast::<F32s<A>>().write_unaligned(sum) };
            }
        }
    }
}
