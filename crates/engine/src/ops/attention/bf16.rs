//! Products of factors rounded to bf16, on processors with AVX512-BF16.

use std::arch::x86_64::*;

use pulp::x86::V4;
use pulp::{f32x16, u32x16};

use super::arithmetic::{Arithmetic, Task};
use super::{Stack, TILE};
use crate::ops::linear::Matrix;
use crate::ops::linear::bf16::avx512::{is_available, load_pairs, load_words, mask, pack_panel};
use crate::ops::{Number, words_of};

/// A word is a pair of numbers in bf16, the first of them in its lower half. There is none where the processor lacks AVX512-BF16.
#[derive(Clone, Copy)]
pub(super) struct Pairs(V4);

impl Pairs {
    /// If the processor has the instructions.
    pub(super) fn new() -> Option<Self> {
        is_available().then(V4::try_new).flatten().map(Self)
    }

    /// Runs a task.
    pub(super) fn run(self, task: impl Task) {
        // SAFETY: the processor has the instructions, as `self` shows.
        unsafe { run(self, task) }
    }
}

#[target_feature(enable = "avx2,bmi1,bmi2,fma,lzcnt,popcnt,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16")]
fn run(pairs: Pairs, task: impl Task) {
    task.run(pairs);
}

impl Arithmetic for Pairs {
    type Simd = V4;

    const NUMBERS: usize = 2;

    #[inline(always)]
    fn simd(self) -> V4 {
        self.0
    }

    #[inline(always)]
    fn multiply_add(self, a: u32x16, b: u32x16, sum: f32x16) -> f32x16 {
        // SAFETY: the processor has the instruction, as `self` shows; transmutations between vectors of 512 bits.
        unsafe {
            let [a, b] = [a, b].map(|words| std::mem::transmute::<u32x16, __m512bh>(words));
            std::mem::transmute(_mm512_dpbf16_ps(std::mem::transmute::<f32x16, __m512>(sum), a, b))
        }
    }

    #[inline(always)]
    unsafe fn beside<T: Number>(self, matrix: Stack<T>, columns: usize, memory: &mut Vec<u32>) -> Stack<u32> {
        let (rows, width) = (matrix.rows(), columns.div_ceil(2));
        let words = words_of(memory, rows * width);
        // SAFETY: the processor has the instructions, as `self` shows; the caller's promise.
        unsafe { pack_beside(&matrix, columns, words) };
        Stack::of(Matrix::rows(words.as_ptr(), width), rows)
    }

    #[inline(always)]
    unsafe fn below<T: Number>(self, matrix: Stack<T>, columns: usize, memory: &mut Vec<u32>) -> Stack<u32> {
        let rows = matrix.rows().div_ceil(2);
        let words = words_of(memory, rows * columns);
        // SAFETY: as in `beside`.
        unsafe { pack_below(&matrix, columns, words) };
        Stack::of(Matrix::rows(words.as_ptr(), columns), rows)
    }

    #[inline(always)]
    unsafe fn transposed<T: Number>(self, matrix: Matrix<T>, shape: [usize; 2], memory: &mut Vec<u32>) -> Matrix<u32> {
        let words = words_of(memory, shape[1].div_ceil(2) * TILE);
        // SAFETY: as in `beside`; columns are adjacent.
        unsafe { pack_panel::<TILE, T>(matrix.start, [matrix.row_stride, 1], shape, words) };
        Matrix::rows(words.as_ptr(), TILE)
    }
}

/// Writes pairs of each row's numbers, with a zero behind the last of an odd number, row by row.
///
/// # Safety
/// The processor must have the instructions. All elements must be valid to read.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn pack_beside<T: Number>(matrix: &Stack<T>, columns: usize, words: &mut [u32]) {
    for (row, words) in matrix.row_starts().zip(words.chunks_exact_mut(columns.div_ceil(2))) {
        for (block, words) in words.chunks_mut(16).enumerate() {
            // SAFETY: so many numbers of the row are left; the mask leaves words beyond the chunk alone.
            unsafe {
                let pairs = load_pairs(row.wrapping_add(32 * block), columns - 32 * block);
                _mm512_mask_storeu_epi32(words.as_mut_ptr().cast(), mask(words.len()), pairs);
            }
        }
    }
}

/// Writes pairs of the numbers of every two rows, with zeros below the last of an odd number.
///
/// # Safety
/// As of [`pack_beside`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn pack_below<T: Number>(matrix: &Stack<T>, columns: usize, words: &mut [u32]) {
    // numbers 0 to 15 and 16 to 31 in turns
    let order: [u16; 32] = std::array::from_fn(|at| (at / 2 + at % 2 * 16) as u16);
    // SAFETY: a transmutation to a vector of 512 bits.
    let in_turns = unsafe { std::mem::transmute::<[u16; 32], __m512i>(order) };
    let mut rows = matrix.row_starts();
    for words in words.chunks_exact_mut(columns) {
        let (Some(first), second) = (rows.next(), rows.next()) else { return };
        for (block, words) in words.chunks_mut(16).enumerate() {
            let at = 16 * block;
            let (count, other) = (words.len(), second.map_or(0, |_| words.len()));
            let [first, second] = [first, second.unwrap_or(first)].map(|row| row.wrapping_add(at));
            // SAFETY: no more of both rows is read than the chunk has words, nor is more written; numbers are of the type that the
            // trait says; a transmutation between vectors of 512 bits.
            unsafe {
                let pairs = if T::IS_ROUNDED {
                    let (low, high) = (load_words(first, count), load_words(second, other));
                    _mm512_or_si512(low, _mm512_slli_epi32::<16>(high))
                } else {
                    let low = _mm512_maskz_loadu_ps(mask(count), first.cast());
                    let high = _mm512_maskz_loadu_ps(mask(other), second.cast());
                    let rounded = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
                    _mm512_permutexvar_epi16(in_turns, rounded)
                };
                _mm512_mask_storeu_epi32(words.as_mut_ptr().cast(), mask(count), pairs);
            }
        }
    }
}
