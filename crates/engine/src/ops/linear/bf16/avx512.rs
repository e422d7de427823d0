//! The product on processors with AVX512-BF16.
//!
//! A panel holds some rows of a factor (columns of the other) in the order in which the kernel reads them: for each pair of
//! summed elements, the pair of every row, as one 32-bit word. The kernel keeps a tile of the result in registers and adds to
//! each of its elements the dot product of two pairs at a time (`vdpbf16ps`).
#![allow(unsafe_code)]

use std::arch::x86_64::*;
use std::cell::RefCell;

use rayon::prelude::*;

use super::super::{PARALLEL_FROM, View, ViewMut, panels_of_task};
use crate::ops::{Number, words_of};

/// Rows of a tile: with 24 sums, two vectors of one factor and a broadcast of the other, 27 of 32 registers.
const ROWS: usize = 12;
/// Columns of a tile: two vectors.
const COLUMNS: usize = 32;
/// Elements that are summed before the tile returns to memory: a panel of rows is 24 KiB then and stays in the first cache.
const SUMMED: usize = 1024;
/// Tiles whose rows, and columns that are packed at once: 12 and 4 MiB at most.
const PACKED_ROWS: usize = 512;
const PACKED_COLUMNS: usize = 64 * COLUMNS;
/// Tiles and columns of a task.
const TASK_ROWS: usize = 8;
const TASK_COLUMNS: usize = 6 * COLUMNS;
/// Panels that the product of one row reads at a time.
const TOGETHER: usize = 4;

thread_local! {
    /// The panels of both factors, kept for the next product.
    static PANELS: RefCell<[Vec<u32>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
}

/// Whether this processor has what the kernels need.
pub(in crate::ops) fn is_available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512bf16")
}

/// Memory that tasks write to at disjoint places.
#[derive(Clone, Copy)]
struct Output {
    start: *mut f32,
    row_stride: usize,
}
// SAFETY: the pointer is used only within `multiply`, whose tasks write to disjoint tiles while the slice is borrowed.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

impl Output {
    /// The tile that starts at a row and a column.
    fn tile(self, [row, column]: [usize; 2], rows: usize, columns: usize) -> Tile {
        let start = self.start.wrapping_add(row * self.row_stride + column);
        Tile { rows, columns, start, row_stride: self.row_stride }
    }
}

/// The right factor of a product, k×n.
#[derive(Clone, Copy)]
enum Right<'a, T = f32> {
    View(View<'a, T>),
    /// What [`panels`] makes of it, and n.
    Panels(&'a [u32], usize),
}

/// As [`super::product`].
///
/// # Panics
/// Without AVX512-BF16.
pub(super) fn product<A: Number, B: Number>(a: View<'_, A>, b: View<'_, B>, out: ViewMut<'_>, scale: f32, add: bool) {
    multiply(a, Right::View(b), out, scale, add);
}

/// The panels of Wᵀ, for [`product_of_panels`]: of each block of summed elements all columns. w `[n, k]`.
///
/// # Panics
/// Without AVX512-BF16.
pub(in super::super) fn panels(w: View<'_>) -> Vec<u32> {
    assert!(is_available(), "the processor has no AVX512-BF16");
    let [n, k] = w.shape;
    let mut all = vec![0; n.next_multiple_of(COLUMNS) * k.div_ceil(2)];
    let mut rest = all.as_mut_slice();
    for first in (0..k).step_by(block(k)) {
        let part = w.columns(first..k.min(first + block(k)));
        let (panels, others) = rest.split_at_mut(n.next_multiple_of(COLUMNS) * part.shape[1].div_ceil(2));
        pack::<COLUMNS>(part, COLUMNS, panels, true);
        rest = others;
    }
    all
}

/// out = a·Wᵀ, or out += a·Wᵀ with `add`, from W's [`panels`]; to the last bit what [`product`] gives.
///
/// # Panics
/// Without AVX512-BF16.
pub(in super::super) fn product_of_panels(a: View<'_, impl Number>, panels: &[u32], out: ViewMut<'_>, add: bool) {
    let n = out.shape[1];
    assert_eq!(panels.len(), n.next_multiple_of(COLUMNS) * a.shape[1].div_ceil(2), "the panels do not fit the factor");
    if a.shape[0] == 1 && a.strides[1] == 1 {
        return multiply_row(&a.data[..a.shape[1]], panels, &mut out.data[..n], add);
    }
    multiply(a, Right::<f32>::Panels(panels, n), out, 1.0, add);
}

/// [`product_of_panels`] of one row, which is limited by how fast W is read: from several panels at a time, in one parallel loop.
fn multiply_row(row: &[impl Number], panels: &[u32], out: &mut [f32], add: bool) {
    assert!(is_available(), "the processor has no AVX512-BF16");
    let (k, columns) = (row.len(), out.len().next_multiple_of(COLUMNS));
    let mut pairs = vec![0; k.div_ceil(2)];
    // SAFETY: the processor has the instructions (above).
    unsafe { pack_row(row, &mut pairs) };
    let task = COLUMNS * panels_of_task(columns / COLUMNS, size_of::<[u32; COLUMNS]>() * pairs.len());
    out.par_chunks_mut(task).enumerate().for_each(|(index, out)| {
        for first in (0..k).step_by(block(k)) {
            let pairs = &pairs[first / 2..k.min(first + block(k)).div_ceil(2)];
            let panels = &panels[columns * (first / 2) + index * task * pairs.len()..];
            let panels = panels.chunks(TOGETHER * COLUMNS * pairs.len());
            for (out, panels) in out.chunks_mut(TOGETHER * COLUMNS).zip(panels) {
                // SAFETY: as above.
                unsafe { row_kernel(pairs, panels, out, add || first > 0) }
            }
        }
    });
}

/// How many of k elements are summed at once: equal blocks of an even number, which depend on k alone.
fn block(k: usize) -> usize {
    k.div_ceil(k.div_ceil(SUMMED).max(1)).next_multiple_of(2).max(2)
}

fn multiply<A: Number, B: Number>(a: View<'_, A>, b: Right<'_, B>, out: ViewMut<'_>, scale: f32, add: bool) {
    assert!(is_available(), "the processor has no AVX512-BF16");
    let ([m, k], n) = (a.shape, out.shape[1]);
    assert!(
        out.shape[0] == m
            && matches!(b, Right::Panels(_, columns) | Right::View(View { shape: [_, columns], .. }) if columns == n)
    );
    let parallel = m * n * k >= PARALLEL_FROM;
    let output = Output { start: out.data.as_mut_ptr(), row_stride: out.row_stride };
    let [mut a_memory, mut b_memory] = PANELS.take();
    // tiles of equal heights, which depend on nothing that results depend on
    let height = m.div_ceil(m.div_ceil(ROWS).max(1)).max(1);
    let width = if m <= 2 * ROWS { COLUMNS } else { TASK_COLUMNS };
    for first_summed in (0..k.max(1)).step_by(block(k)) {
        let summed = first_summed..k.min(first_summed + block(k));
        let (pairs, add) = (summed.len().div_ceil(2), add || first_summed > 0);
        for first_row in (0..m).step_by(PACKED_ROWS * height) {
            let rows = (PACKED_ROWS * height).min(m - first_row);
            let a = a.columns(summed.clone()).transposed().columns(first_row..first_row + rows).transposed();
            let a_panels = words_of(&mut a_memory, rows.div_ceil(height) * ROWS * pairs);
            pack::<ROWS>(a, height, a_panels, parallel);
            let a_panels = &*a_panels;
            for first_column in (0..n).step_by(PACKED_COLUMNS) {
                let columns = PACKED_COLUMNS.min(n - first_column);
                let b_panels = match b {
                    Right::Panels(all, _) => {
                        &all[n.next_multiple_of(COLUMNS) * first_summed / 2..][first_column * pairs..]
                    }
                    Right::View(b) => {
                        let b = b.transposed().columns(summed.clone()).transposed();
                        let b = b.columns(first_column..first_column + columns).transposed();
                        let panels = words_of(&mut b_memory, columns.next_multiple_of(COLUMNS) * pairs);
                        pack::<COLUMNS>(b, COLUMNS, panels, parallel);
                        &*panels
                    }
                };
                let down = rows.div_ceil(TASK_ROWS * height);
                for_each(parallel, down * columns.div_ceil(width), |task| {
                    let (row, column) = (task % down * TASK_ROWS * height, task / down * width);
                    for row in (row..rows.min(row + TASK_ROWS * height)).step_by(height) {
                        for column in (column..columns.min(column + width)).step_by(COLUMNS) {
                            let a = &a_panels[row / height * ROWS * pairs..][..ROWS * pairs];
                            let b = &b_panels[column * pairs..][..COLUMNS * pairs];
                            let at = [first_row + row, first_column + column];
                            let tile = output.tile(at, height.min(rows - row), COLUMNS.min(columns - column));
                            // SAFETY: the processor has the instructions (above); the tile lies within `out`, whose shape is
                            // m×n, and no other task has it.
                            unsafe { compute(a, b, tile, scale, add) }
                        }
                    }
                });
            }
        }
    }
    PANELS.set([a_memory, b_memory]);
}

/// Runs the tasks 0 to `count` − 1, on all threads or on this one.
fn for_each(parallel: bool, count: usize, task: impl Fn(usize) + Send + Sync) {
    if parallel { (0..count).into_par_iter().for_each(task) } else { (0..count).for_each(task) }
}

/// Packs a matrix into panels of `W` rows, of which `height` are used; the others, and rows beyond the last, are zeros.
fn pack<const W: usize>(matrix: View<'_, impl Number>, height: usize, panels: &mut [u32], parallel: bool) {
    let [rows, summed] = matrix.shape;
    let len = W * summed.div_ceil(2);
    assert!(height <= W && panels.len() == rows.div_ceil(height) * len && is_available());
    let pack = |(index, panel): (usize, &mut [u32])| {
        let first = index * height;
        let part = matrix.transposed().columns(first..rows.min(first + height)).transposed();
        // SAFETY: the processor has the instructions; the panel has W words for each pair, and a view's elements lie within
        // its slice, next to each other along one direction.
        unsafe { pack_panel::<W, _>(part.data.as_ptr(), part.strides, part.shape, panel) }
    };
    if parallel {
        panels.par_chunks_mut(len.max(1)).enumerate().with_min_len(2).for_each(pack);
    } else {
        panels.chunks_mut(len.max(1)).enumerate().for_each(pack);
    }
}

/// The lowest `count` of 16 bits, all of them from 16 on.
#[inline]
pub(in crate::ops) fn mask(count: usize) -> u16 {
    if count >= 16 { u16::MAX } else { (1 << count) - 1 }
}

/// Packs up to `W` rows into one panel.
///
/// # Safety
/// The processor must have the instructions. All elements that the shape and the strides reach from `start` must be valid to
/// read, next to each other along one of the two directions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(in crate::ops) unsafe fn pack_panel<const W: usize, T: Number>(
    start: *const T,
    [row_stride, stride]: [usize; 2],
    [rows, summed]: [usize; 2],
    panel: &mut [u32],
) {
    let pairs = summed.div_ceil(2);
    assert!(panel.len() == W * pairs && rows <= W);
    for group in (0..W).step_by(16) {
        let width = mask(W - group);
        let here = rows.saturating_sub(group).min(16);
        if stride == 1 {
            for pair in (0..pairs).step_by(16) {
                let left = summed - 2 * pair;
                let mut block = [_mm512_setzero_si512(); 16];
                for (row, block) in block.iter_mut().enumerate().take(here) {
                    // SAFETY: so many elements of the row are left.
                    *block = unsafe { load_pairs(start.wrapping_add((group + row) * row_stride + 2 * pair), left) };
                }
                for (index, word) in transposed(block).into_iter().enumerate().take(pairs - pair) {
                    let to = panel[(pair + index) * W + group..].as_mut_ptr();
                    // SAFETY: the mask leaves those of the panel's W words that are in this group.
                    unsafe { _mm512_mask_storeu_epi32(to.cast(), width, word) }
                }
            }
        } else {
            assert!(row_stride == 1 || rows <= 1, "no elements of the matrix lie next to each other");
            for pair in 0..pairs {
                let start = start.wrapping_add(2 * pair * stride + group * row_stride);
                let second = if 2 * pair + 1 < summed { here } else { 0 };
                // SAFETY: so many elements lie next to each other at both places; the mask leaves those of the panel's W words
                // that are in this group.
                unsafe {
                    let (low, high) = (load_words(start, here), load_words(start.wrapping_add(stride), second));
                    let words = _mm512_or_si512(low, _mm512_slli_epi32::<16>(high));
                    _mm512_mask_storeu_epi32(panel[pair * W + group..].as_mut_ptr().cast(), width, words);
                }
            }
        }
    }
}

/// Packs a row into pairs.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn pack_row(row: &[impl Number], pairs: &mut [u32]) {
    for (x, pairs) in row.chunks(32).zip(pairs.chunks_mut(16)) {
        // SAFETY: the numbers are those of the chunk; the mask leaves words beyond the other chunk alone.
        unsafe {
            let words = load_pairs(x.as_ptr(), x.len());
            _mm512_mask_storeu_epi32(pairs.as_mut_ptr().cast(), mask(pairs.len()), words);
        }
    }
}

/// The first 16 pairs of `count` numbers in bf16, with zeros behind the last.
///
/// # Safety
/// The processor must have the instructions, and the numbers must be valid to read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(in crate::ops) unsafe fn load_pairs<T: Number>(start: *const T, count: usize) -> __m512i {
    const { assert!(size_of::<T>() == if T::IS_ROUNDED { 2 } else { 4 }) };
    let masks = [mask(count), mask(count.saturating_sub(16))];
    // SAFETY: the masks leave the numbers alone, which are of the type that the trait says; a transmutation between vectors of
    // 512 bits.
    unsafe {
        if T::IS_ROUNDED {
            let mask = u32::from(masks[0]) | u32::from(masks[1]) << 16;
            return _mm512_maskz_loadu_epi16(mask, start.cast());
        }
        let low = _mm512_maskz_loadu_ps(masks[0], start.cast());
        let high = _mm512_maskz_loadu_ps(masks[1], start.cast::<f32>().wrapping_add(16));
        std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
    }
}

/// `count` numbers, 16 at most, in bf16, each in the lower half of a word.
///
/// # Safety
/// As of [`load_pairs`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(in crate::ops) unsafe fn load_words<T: Number>(start: *const T, count: usize) -> __m512i {
    const { assert!(size_of::<T>() == if T::IS_ROUNDED { 2 } else { 4 }) };
    // SAFETY: as in `load_pairs`; a transmutation between vectors of 256 bits.
    unsafe {
        let rounded = if T::IS_ROUNDED {
            _mm256_maskz_loadu_epi16(mask(count), start.cast())
        } else {
            let numbers = _mm512_maskz_loadu_ps(mask(count), start.cast());
            std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(numbers))
        };
        _mm512_cvtepu16_epi32(rounded)
    }
}

/// The transpose of a square of 16×16 words.
#[inline]
#[target_feature(enable = "avx512f")]
fn transposed(rows: [__m512i; 16]) -> [__m512i; 16] {
    let (mut x, mut y) = (rows, rows);
    for i in 0..8 {
        y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
    for i in 0..4 {
        for j in 0..2 {
            x[4 * i + 2 * j] = _mm512_unpacklo_epi64(y[4 * i + j], y[4 * i + j + 2]);
            x[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(y[4 * i + j], y[4 * i + j + 2]);
        }
    }
    // x[4i + j] holds, in its quarter q, column 4q + j of the rows 4i to 4i + 3
    for j in 0..4 {
        let even_first = _mm512_shuffle_i32x4::<0x88>(x[j], x[4 + j]);
        let even_last = _mm512_shuffle_i32x4::<0x88>(x[8 + j], x[12 + j]);
        let odd_first = _mm512_shuffle_i32x4::<0xdd>(x[j], x[4 + j]);
        let odd_last = _mm512_shuffle_i32x4::<0xdd>(x[8 + j], x[12 + j]);
        y[j] = _mm512_shuffle_i32x4::<0x88>(even_first, even_last);
        y[4 + j] = _mm512_shuffle_i32x4::<0x88>(odd_first, odd_last);
        y[8 + j] = _mm512_shuffle_i32x4::<0xdd>(even_first, even_last);
        y[12 + j] = _mm512_shuffle_i32x4::<0xdd>(odd_first, odd_last);
    }
    y
}

/// A part of the result, of at most [`ROWS`]×[`COLUMNS`].
#[derive(Clone, Copy)]
struct Tile {
    rows: usize,
    columns: usize,
    start: *mut f32,
    row_stride: usize,
}

/// tile = a·b·scale, or tile += a·b·scale with `add`, of two panels.
///
/// # Safety
/// The processor must have the instructions. The tile must be valid to read and write, for this thread alone.
unsafe fn compute(a: &[u32], b: &[u32], tile: Tile, scale: f32, add: bool) {
    macro_rules! of_rows {
        ($vectors:literal: $($rows:literal)*) => {
            match tile.rows {
                // SAFETY: the caller's promise.
                $($rows => unsafe { kernel::<$rows, $vectors>(a, b, tile, scale, add) },)*
                rows => unreachable!("a tile of {rows} rows"),
            }
        };
    }
    if tile.columns <= 16 {
        of_rows!(1: 1 2 3 4 5 6 7 8 9 10 11 12);
    } else {
        of_rows!(2: 1 2 3 4 5 6 7 8 9 10 11 12);
    }
}

/// As [`compute`], of a tile of `R` rows and `V` vectors of columns. Every element is summed in the order of the pairs, whatever
/// these are.
///
/// # Safety
/// As for [`compute`], and the tile must have R rows and columns in V vectors.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn kernel<const R: usize, const V: usize>(a: &[u32], b: &[u32], tile: Tile, scale: f32, add: bool) {
    let mut sums = [[_mm512_setzero_ps(); V]; R];
    for (a, b) in a.as_chunks::<ROWS>().0.iter().zip(b.as_chunks::<COLUMNS>().0) {
        let mut right = [_mm512_setzero_si512(); V];
        for (right, b) in right.iter_mut().zip(b.as_chunks::<16>().0) {
            // SAFETY: 16 words to read.
            *right = unsafe { _mm512_loadu_si512(b.as_ptr().cast()) };
        }
        // SAFETY: a transmutation between vectors of 512 bits.
        let right = right.map(|right| unsafe { std::mem::transmute::<__m512i, __m512bh>(right) });
        for (sums, &a) in sums.iter_mut().zip(a) {
            // SAFETY: as above.
            let a = unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(a as i32)) };
            for (sum, right) in sums.iter_mut().zip(right) {
                *sum = _mm512_dpbf16_ps(*sum, a, right);
            }
        }
    }
    let scale = _mm512_set1_ps(scale);
    for (row, sums) in sums.into_iter().enumerate() {
        for (vector, sum) in sums.into_iter().enumerate() {
            let mask = mask(tile.columns - 16 * vector);
            let to = tile.start.wrapping_add(row * tile.row_stride + 16 * vector);
            let mut result = _mm512_mul_ps(sum, scale);
            // SAFETY: the mask leaves elements of the tile alone.
            unsafe {
                if add {
                    result = _mm512_add_ps(result, _mm512_maskz_loadu_ps(mask, to));
                }
                _mm512_mask_storeu_ps(to, mask, result);
            }
        }
    }
}

/// out = row·W, or out += row·W with `add`, of up to [`TOGETHER`] panels of W, one after the other. Every element is summed as by
/// [`kernel`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn row_kernel(pairs: &[u32], panels: &[u32], out: &mut [f32], add: bool) {
    match out.len().div_ceil(COLUMNS) {
        1 => row_kernel_of::<1>(pairs, panels, out, add),
        2 => row_kernel_of::<2>(pairs, panels, out, add),
        3 => row_kernel_of::<3>(pairs, panels, out, add),
        TOGETHER => row_kernel_of::<TOGETHER>(pairs, panels, out, add),
        count => unreachable!("{count} panels at a time"),
    }
}

/// As [`row_kernel`], of `P` panels.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn row_kernel_of<const P: usize>(pairs: &[u32], panels: &[u32], out: &mut [f32], add: bool) {
    let panels = panels.as_chunks::<COLUMNS>().0;
    let panels: [_; P] = std::array::from_fn(|panel| &panels[panel * pairs.len()..][..pairs.len()]);
    let mut sums = [[_mm512_setzero_ps(); 2]; P];
    for (pair, &x) in pairs.iter().enumerate() {
        // SAFETY: a transmutation between vectors of 512 bits.
        let x = unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(x as i32)) };
        for (sums, panel) in sums.iter_mut().zip(panels) {
            for (sum, w) in sums.iter_mut().zip(panel[pair].as_chunks::<16>().0) {
                // SAFETY: 16 words to read; a transmutation as above.
                let w = unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(w.as_ptr().cast())) };
                *sum = _mm512_dpbf16_ps(*sum, x, w);
            }
        }
    }
    for (out, sum) in out.chunks_mut(16).zip(sums.into_iter().flatten()) {
        let mask = mask(out.len());
        // SAFETY: the mask leaves elements of `out` alone.
        unsafe {
            let sum = if add { _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, out.as_ptr())) } else { sum };
            _mm512_mask_storeu_ps(out.as_mut_ptr(), mask, sum);
        }
    }
}
