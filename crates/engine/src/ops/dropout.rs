//! Inverted dropout (arXiv 1207.0580) with masks that a hash gives: an element's fate depends on the seed, the key of its
//! row and its column, and on nothing else. So the backward pass draws the same mask again, and neither the other rows
//! of a batch nor the number of threads change it.

use rayon::prelude::*;

use super::Number;
use super::simd::dispatch;

/// Rows per task.
const ROWS: usize = 64;

/// The dropout of one matrix.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dropout<'a> {
    /// The probability that an element is dropped, in [0, 1).
    pub(crate) rate: f64,
    /// Differs from pass to pass and from matrix to matrix.
    pub(crate) seed: u64,
    /// One key per row.
    pub(crate) row_keys: &'a [u64],
}

impl Dropout<'_> {
    /// y = x·mask/(1 − rate). x, y `[rows, width]`.
    pub(crate) fn forward(&self, x: &[impl Number], y: &mut [f32]) {
        self.each(x, y, |y, kept| *y = kept);
    }

    /// dx += dy·mask/(1 − rate). dy, dx `[rows, width]`.
    pub(crate) fn backward(&self, dy: &[f32], dx: &mut [f32]) {
        self.each(dy, dx, |dx, kept| *dx += kept);
    }

    /// Calls `put` for every element of `to` with the masked and scaled element of `from`.
    fn each(&self, from: &[impl Number], to: &mut [f32], put: impl Fn(&mut f32, f32) + Sync) {
        let width = from.len() / self.row_keys.len();
        assert!(from.len() == to.len() && from.len() == width * self.row_keys.len());
        let (threshold, scale) = (threshold(self.rate), scale(self.rate));
        let keys = self.row_keys.par_chunks(ROWS);
        to.par_chunks_mut(ROWS * width).zip(from.par_chunks(ROWS * width)).zip(keys).for_each(|((to, from), keys)| {
            dispatch(
                #[inline(always)]
                || {
                    for ((to, from), &key) in to.chunks_exact_mut(width).zip(from.chunks_exact(width)).zip(keys) {
                        let row = mix(self.seed ^ mix(key));
                        for (column, (to, &from)) in to.iter_mut().zip(from).enumerate() {
                            let kept = mix(row.wrapping_add(column as u64)) >> 32 >= threshold;
                            put(to, if kept { from.to_f32() * scale } else { 0.0 });
                        }
                    }
                },
            );
        });
    }
}

/// What the upper half of an element's hash is below where the element is dropped.
pub(crate) fn threshold(rate: f64) -> u64 {
    (rate * 2f64.powi(32)) as u64
}

/// The factor on an element that is not dropped.
pub(crate) fn scale(rate: f64) -> f32 {
    (1.0 / (1.0 - rate)) as f32
}

/// A hash of 64 bits whose every output bit depends on every input bit: the step of the generator SplitMix64.
#[inline(always)]
pub(crate) fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_dropped_and_the_mean_stays() {
        let keys: Vec<u64> = (0..200).collect();
        let x = vec![1.0; 200 * 300];
        let mut y = vec![0.0; x.len()];
        Dropout { rate: 0.1, seed: 3, row_keys: &keys }.forward(&x, &mut y);
        let dropped = y.iter().filter(|&&y| y == 0.0).count() as f64 / y.len() as f64;
        // five standard errors of 60,000 draws
        assert!((dropped - 0.1).abs() < 0.0062, "{dropped} are dropped");
        assert!(y.iter().all(|&y| y == 0.0 || y == 1.0 / 0.9));
        // neighbours, in a row and in a column, fall independently of each other
        for stride in [1, 300] {
            let both = y.iter().zip(&y[stride..]).filter(|&(&a, &b)| a == 0.0 && b == 0.0).count();
            let share = both as f64 / y.len() as f64;
            assert!((share - 0.01).abs() < 0.0025, "{share} of the pairs {stride} apart are dropped together");
        }
    }

    #[test]
    fn a_mask_depends_on_seed_row_key_and_column_alone() {
        let run = |seed: u64, row_keys: &[u64]| {
            let mut y = vec![0.0; 40 * row_keys.len()];
            Dropout { rate: 0.5, seed, row_keys }.forward(&vec![1.0; y.len()], &mut y);
            y
        };
        let together = run(1, &[7, 8, 9]);
        assert_eq!(together[40..80], run(1, &[8]));
        assert_ne!(together[..40], together[40..80]);
        assert_ne!(together, run(2, &[7, 8, 9]));
        // the backward pass uses the mask of the forward pass and adds
        let mut dx = vec![1.0; 120];
        Dropout { rate: 0.5, seed: 1, row_keys: &[7, 8, 9] }.backward(&[1.0; 120], &mut dx);
        assert!(dx.iter().zip(&together).all(|(dx, y)| *dx == 1.0 + y));
    }
}
