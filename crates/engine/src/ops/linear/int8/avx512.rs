//! The kernel of processors with AVX512-VNNI.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{COLUMNS, Codes, Panel};

/// Rows of a tile: 12 sums of integers, 12 of results, two vectors of W and a broadcast are 27 of 32 registers.
const ROWS: usize = 6;

/// Whether this processor has what the kernel needs.
pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni")
}

/// As [`super::add_products`], to the last bit.
///
/// # Panics
/// Without AVX512-VNNI.
pub(super) fn add_products(rows: &[Codes], panels: &[Panel], sums: &mut [[f32; COLUMNS]]) {
    assert!(is_available(), "the processor has no AVX512-VNNI");
    let blocks = panels.len();
    assert_eq!(rows.len(), blocks * sums.len());
    // tiles of equal heights
    let height = sums.len().div_ceil(sums.len().div_ceil(ROWS).max(1)).max(1);
    for (rows, sums) in rows.chunks(height * blocks).zip(sums.chunks_mut(height)) {
        macro_rules! of_rows {
            ($($count:literal)*) => {
                match sums.len() {
                    // SAFETY: the processor has the instructions (above).
                    $($count => unsafe { tile::<$count>(rows, panels, sums) },)*
                    count => unreachable!("a tile of {count} rows"),
                }
            };
        }
        of_rows!(1 2 3 4 5 6);
    }
}

/// The products of `R` rows.
#[target_feature(enable = "avx512f,avx512vnni")]
fn tile<const R: usize>(rows: &[Codes], panels: &[Panel], sums: &mut [[f32; COLUMNS]]) {
    let blocks = panels.len();
    let rows: [&[Codes]; R] = std::array::from_fn(|row| &rows[row * blocks..(row + 1) * blocks]);
    let mut results = [[_mm512_setzero_ps(); 2]; R];
    for (block, panel) in panels.iter().enumerate() {
        let mut integers: [[__m512i; 2]; R] = std::array::from_fn(|row| [_mm512_set1_epi32(rows[row][block].shift); 2]);
        for (word, w) in panel.words.iter().enumerate() {
            let (low, high) = w.split_at(16);
            // SAFETY: both halves have 64 bytes.
            let w = [low, high].map(|half| unsafe { _mm512_loadu_si512(half.as_ptr().cast()) });
            for (integers, row) in integers.iter_mut().zip(rows) {
                let x = _mm512_set1_epi32(i32::from_ne_bytes(row[block].words[word].map(|x| x as u8)));
                integers[0] = _mm512_dpbusd_epi32(integers[0], w[0], x);
                integers[1] = _mm512_dpbusd_epi32(integers[1], w[1], x);
            }
        }
        let (low, high) = panel.scales.split_at(16);
        // SAFETY: both halves have 32 bytes.
        let scales = [low, high].map(|half| unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(half.as_ptr().cast())) });
        for ((results, integers), row) in results.iter_mut().zip(integers).zip(rows) {
            let x_scale = _mm512_set1_ps(row[block].scale);
            for ((result, integers), scale) in results.iter_mut().zip(integers).zip(scales) {
                *result = _mm512_fmadd_ps(_mm512_cvtepi32_ps(integers), _mm512_mul_ps(x_scale, scale), *result);
            }
        }
    }
    for (sums, result) in sums.iter_mut().zip(results) {
        for (sums, result) in sums.as_chunks_mut::<16>().0.iter_mut().zip(result) {
            // SAFETY: 16 numbers to read and write.
            unsafe {
                let sum = _mm512_add_ps(_mm512_loadu_ps(sums.as_ptr()), result);
                _mm512_storeu_ps(sums.as_mut_ptr(), sum);
            }
        }
    }
}
