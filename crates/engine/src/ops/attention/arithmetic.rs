//! How the products of attention are computed.

use pulp::{Simd, WithSimd};

use super::{Stack, TILE};
use crate::ops::linear::Matrix;
use crate::ops::simd::LANES;
use crate::ops::{Number, words_of};
use crate::precision::Precision;

/// Factors come as words of 32 bits, each of which holds one or more adjacent numbers of a sum: of a row of a matrix, or of a
/// column.
pub(super) trait Arithmetic: Copy {
    /// The vectors.
    type Simd: Simd;

    /// Numbers in a word.
    const NUMBERS: usize;

    /// The vectors' instructions.
    fn simd(self) -> Self::Simd;

    /// sum + a·b of every lane: the numbers of a word one after the other.
    fn multiply_add(
        self,
        a: <Self::Simd as Simd>::u32s,
        b: <Self::Simd as Simd>::u32s,
        sum: <Self::Simd as Simd>::f32s,
    ) -> <Self::Simd as Simd>::f32s;

    /// Words of numbers beside each other, `[rows, columns / NUMBERS]`.
    ///
    /// # Safety
    /// All elements must be valid to read, and stay so while the result is used; `memory` must stay untouched as long.
    unsafe fn beside<T: Number>(self, matrix: Stack<T>, columns: usize, memory: &mut Vec<u32>) -> Stack<u32>;

    /// Words of numbers below each other, `[rows / NUMBERS, columns]`. Those of the second and third part, where the result has
    /// more than one, start a word.
    ///
    /// # Safety
    /// As of [`beside`](Self::beside).
    unsafe fn below<T: Number>(self, matrix: Stack<T>, columns: usize, memory: &mut Vec<u32>) -> Stack<u32>;

    /// Words of numbers beside each other in up to [`TILE`] rows, transposed: `[columns / NUMBERS, TILE]`; zeros in the place of
    /// rows that are not there, as far as the last of these vectors with a row.
    ///
    /// # Safety
    /// As of [`beside`](Self::beside).
    unsafe fn transposed<T: Number>(self, matrix: Matrix<T>, shape: [usize; 2], memory: &mut Vec<u32>) -> Matrix<u32>;
}

/// What is to be computed by any arithmetic.
pub(super) trait Task {
    /// Computes it. Only code that is inlined into it uses the arithmetic's instructions.
    fn run<A: Arithmetic>(self, arithmetic: A);
}

/// Runs a task: in f32, or with factors rounded to bf16 where that is the precision and the processor multiplies such.
pub(super) fn dispatch(precision: Precision, task: impl Task) {
    #[cfg(target_arch = "x86_64")]
    if precision == Precision::Bf16
        && let Some(pairs) = super::bf16::Pairs::new()
    {
        return pairs.run(task);
    }
    pulp::Arch::new().dispatch(InF32(task));
}

struct InF32<T>(T);

impl<T: Task> WithSimd for InF32<T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        self.0.run(F32(simd));
    }
}

/// A word is one number in f32.
#[derive(Clone, Copy)]
struct F32<S>(S);

impl<S: Simd> Arithmetic for F32<S> {
    type Simd = S;

    const NUMBERS: usize = 1;

    #[inline(always)]
    fn simd(self) -> S {
        self.0
    }

    #[inline(always)]
    fn multiply_add(self, a: S::u32s, b: S::u32s, sum: S::f32s) -> S::f32s {
        let Self(simd) = self;
        simd.mul_add_e_f32s(simd.transmute_f32s_u32s(a), simd.transmute_f32s_u32s(b), sum)
    }

    #[inline(always)]
    unsafe fn beside<T: Number>(self, matrix: Stack<T>, columns: usize, memory: &mut Vec<u32>) -> Stack<u32> {
        if !T::IS_ROUNDED {
            return matrix.map(Matrix::words);
        }
        let rows = matrix.rows();
        let words = words_of(memory, rows * columns);
        for (row, words) in matrix.row_starts().zip(words.chunks_exact_mut(columns)) {
            // SAFETY: the caller's promise.
            let numbers = unsafe { std::slice::from_raw_parts(row, columns) };
            words.iter_mut().zip(numbers).for_each(|(word, number)| *word = number.to_f32().to_bits());
        }
        Stack::of(Matrix::rows(words.as_ptr(), columns), rows)
    }

    #[inline(always)]
    unsafe fn below<T: Number>(self, matrix: Stack<T>, columns: usize, memory: &mut Vec<u32>) -> Stack<u32> {
        // a word of one number is beside and below others alike
        // SAFETY: the caller's promise.
        unsafe { self.beside(matrix, columns, memory) }
    }

    #[inline(always)]
    unsafe fn transposed<T: Number>(
        self,
        matrix: Matrix<T>,
        [rows, columns]: [usize; 2],
        memory: &mut Vec<u32>,
    ) -> Matrix<u32> {
        let out = words_of(memory, columns * TILE).as_chunks_mut::<TILE>().0;
        for row in 0..rows.next_multiple_of(LANES) {
            if row < rows {
                // SAFETY: the caller's promise.
                let values =
                    unsafe { std::slice::from_raw_parts(matrix.start.wrapping_add(row * matrix.row_stride), columns) };
                out.iter_mut().zip(values).for_each(|(out, value)| out[row] = value.to_f32().to_bits());
            } else {
                out.iter_mut().for_each(|out| out[row] = 0);
            }
        }
        Matrix::rows(out.as_ptr().cast(), TILE)
    }
}
