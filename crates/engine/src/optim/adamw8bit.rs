//! AdamW with moments in 8 bits (arXiv 2110.02861).
//!
//! A moment is cut into blocks of 256 numbers. Each block keeps its largest magnitude in f32, and for every number the
//! code of its share of that. A step decodes a block, takes AdamW's step in f32, and encodes what it leaves.
//!
//! The code is the paper's dynamic one: the magnitudes between 10^−7 and 1 fall into seven decades, and the decade that
//! ends at 10^−k has 2^(6−k) equal intervals for the first moment, twice as many for the second, which needs no sign. A
//! code stands for the middle of its interval; two more stand for 0 and 1.

use std::sync::LazyLock;

use rayon::prelude::*;

use super::adamw::{self, Constants};
use super::{CHUNK, Step};
use crate::model::ParamSpec;
use crate::ops::simd::{self, dispatch};

/// Numbers that share a largest magnitude.
pub(crate) const BLOCK: usize = 256;
/// Smaller tensors keep f32 moments, as in bitsandbytes: they matter little for memory and much for stability.
const SMALLEST: usize = 4096;

/// Whether the moments of this tensor are kept in 8 bits.
pub(super) fn applies_to(spec: &ParamSpec) -> bool {
    spec.range.len() >= SMALLEST
}

/// The moments of one tensor.
#[derive(Debug, Clone)]
pub(super) struct Moments {
    pub(super) first: Quantised,
    pub(super) second: Quantised,
}

/// Numbers in blocks of 256; the last block may be shorter.
#[derive(Debug, Clone)]
pub(super) struct Quantised {
    /// A code for each number.
    pub(super) codes: Vec<u8>,
    /// The largest magnitude of each block.
    pub(super) absmax: Vec<f32>,
}

impl Quantised {
    fn zeros(len: usize) -> Self {
        Self { codes: vec![0; len], absmax: vec![0.0; len.div_ceil(BLOCK)] }
    }

    /// Bytes that so many numbers take.
    pub(super) fn bytes(len: usize) -> usize {
        len + size_of::<f32>() * len.div_ceil(BLOCK)
    }

    /// Codes and largest magnitudes, in runs of whole blocks.
    fn par_chunks_mut(&mut self) -> impl IndexedParallelIterator<Item = (&mut [u8], &mut [f32])> {
        self.codes.par_chunks_mut(CHUNK).zip(self.absmax.par_chunks_mut(CHUNK / BLOCK))
    }
}

impl Moments {
    pub(super) fn new(len: usize) -> Self {
        Self { first: Quantised::zeros(len), second: Quantised::zeros(len) }
    }

    pub(super) fn step(&mut self, weights: &mut [f32], gradient: &mut [f32], step: Step) {
        let constants = Constants::new(step);
        let (signed, unsigned) = (&*SIGNED, &*UNSIGNED);
        weights
            .par_chunks_mut(CHUNK)
            .zip(gradient.par_chunks_mut(CHUNK))
            .zip(self.first.par_chunks_mut().zip(self.second.par_chunks_mut()))
            .for_each(|((weights, gradient), (first, second))| {
                dispatch(
                    #[inline(always)]
                    || update_blocks(weights, gradient, first, second, constants, signed, unsigned),
                )
            });
    }
}

/// Updates weights and moments, and sets the gradient to zero.
#[inline(always)]
fn update_blocks(
    weights: &mut [f32],
    gradient: &mut [f32],
    (m_codes, m_absmax): (&mut [u8], &mut [f32]),
    (v_codes, v_absmax): (&mut [u8], &mut [f32]),
    constants: Constants,
    signed: &DynamicCode,
    unsigned: &DynamicCode,
) {
    let m_blocks = m_codes.chunks_mut(BLOCK).zip(m_absmax);
    let v_blocks = v_codes.chunks_mut(BLOCK).zip(v_absmax);
    let blocks = weights.chunks_mut(BLOCK).zip(gradient.chunks_mut(BLOCK));
    for ((w, g), ((m_codes, m_absmax), (v_codes, v_absmax))) in blocks.zip(m_blocks.zip(v_blocks)) {
        let (mut m, mut v) = ([0.0; BLOCK], [0.0; BLOCK]);
        let (m, v) = (&mut m[..w.len()], &mut v[..w.len()]);
        signed.decode(m_codes, *m_absmax, m);
        unsigned.decode(v_codes, *v_absmax, v);
        adamw::update(w, g, m, v, constants);
        *m_absmax = signed.encode(m, m_codes);
        *v_absmax = unsigned.encode(v, v_codes);
        // a second moment that becomes 0 beside a first one that does not would make a step of m/ε
        v_codes.iter_mut().zip(v).for_each(|(code, v)| *code = (*code).max(u8::from(*v > 0.0)));
    }
}

static SIGNED: LazyLock<DynamicCode> = LazyLock::new(|| DynamicCode::new(true));
static UNSIGNED: LazyLock<DynamicCode> = LazyLock::new(|| DynamicCode::new(false));

/// Of the first moment's code, then of the second's: its numbers, ascending; where magnitudes change from so many codes from that
/// of 0 to one more.
pub(crate) fn tables() -> [[f32; 256]; 4] {
    [SIGNED.values, SIGNED.thresholds, UNSIGNED.values, UNSIGNED.thresholds]
}

/// The code of 0 in the first moment's code.
pub(crate) fn signed_zero() -> u8 {
    SIGNED.zero
}

/// A code of 256 numbers in [−1, 1] or [0, 1].
struct DynamicCode {
    /// The numbers, ascending.
    values: [f32; 256],
    /// The code of 0.
    zero: u8,
    /// For each [`bucket`], how many codes its first magnitude is from that of 0.
    steps: [u8; BUCKETS],
    /// Where magnitudes change from so many codes to one more.
    thresholds: [f32; 256],
}

/// Where magnitudes below 2^−24 and those from it on part, in units of the bits that [`bucket`] reads.
const LOWEST_BUCKET: u32 = (127 - 24) << 7;
/// A bucket for each exponent from −24 to −1 and the first seven bits of the fraction, and one for 1.
const BUCKETS: usize = (24 << 7) + 1;

/// The bucket of a magnitude in [0, 1]; narrow enough to hold one threshold at most.
#[inline(always)]
fn bucket(magnitude: f32) -> usize {
    ((magnitude.to_bits() >> 16).saturating_sub(LOWEST_BUCKET) as usize).min(BUCKETS - 1)
}

impl DynamicCode {
    fn new(signed: bool) -> Self {
        let mut magnitudes = vec![0.0];
        for decade in 0..7 {
            let intervals = (1 << decade) * if signed { 1 } else { 2 };
            let width = 0.9 / f64::from(intervals);
            let middles = (0..intervals).map(|i| 0.1 + width * (f64::from(i) + 0.5));
            magnitudes.extend(middles.map(|middle| (middle * 10f64.powi(decade - 6)) as f32));
        }
        magnitudes.push(1.0);
        let mut values = [0.0; 256];
        // −1 itself has no code: the signed code has one number more above 0 than below
        let negative = if signed { magnitudes.len() - 2 } else { 0 };
        let all = magnitudes[1..=negative].iter().rev().map(|m| -m).chain(magnitudes.iter().copied());
        values.iter_mut().zip(all).for_each(|(to, value)| *to = value);
        let mut thresholds = [f32::INFINITY; 256];
        thresholds.iter_mut().zip(magnitudes.windows(2)).for_each(|(to, pair)| *to = (pair[0] + pair[1]) / 2.0);
        let mut steps = [0; BUCKETS];
        for (steps, bits) in steps.iter_mut().zip(LOWEST_BUCKET..) {
            let start = f32::from_bits(bits << 16);
            *steps = thresholds.iter().filter(|&&threshold| threshold < start).count() as u8;
        }
        Self { values, zero: negative as u8, steps, thresholds }
    }

    #[inline(always)]
    fn decode(&self, codes: &[u8], absmax: f32, out: &mut [f32]) {
        out.iter_mut().zip(codes).for_each(|(out, &code)| *out = self.values[code as usize] * absmax);
    }

    /// Writes the codes of the nearest numbers; returns the largest magnitude.
    #[inline(always)]
    fn encode(&self, values: &[f32], codes: &mut [u8]) -> f32 {
        let mut magnitudes = [0.0; BLOCK];
        let magnitudes = &mut magnitudes[..values.len()];
        magnitudes.iter_mut().zip(values).for_each(|(to, value)| *to = value.abs());
        let absmax = simd::max(magnitudes);
        let divisor = if absmax > 0.0 { absmax } else { 1.0 };
        for ((code, &value), &magnitude) in codes.iter_mut().zip(values).zip(&*magnitudes) {
            let share = magnitude / divisor;
            let steps = self.steps[bucket(share)];
            let steps = i32::from(steps) + i32::from(share > self.thresholds[steps as usize]);
            let sign = if value < 0.0 { -1 } else { 1 };
            *code = (i32::from(self.zero) + sign * steps).clamp(0, 255) as u8;
        }
        absmax
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{specs, trained};
    use super::super::{Optimizer, OptimizerKind};
    use super::*;
    use crate::ops::finite_difference::random;

    #[test]
    fn encoding_finds_the_nearest_number() {
        for code in [&*SIGNED, &*UNSIGNED] {
            assert!(code.values.is_sorted_by(|a, b| a < b) && code.values[255] == 1.0);
            let sign = if code.values[0] < 0.0 { -1.0 } else { 1.0 };
            for seed in 0..300 {
                // shares of all sizes, the largest magnitude in front
                let mut values: Vec<f32> = random(BLOCK, seed).iter().map(|u| (18.0 * (u.abs() - 1.0)).exp()).collect();
                values.iter_mut().skip(1).step_by(2).for_each(|v| *v *= sign);
                values[0] = 1.0;
                values.iter_mut().for_each(|v| *v *= 3.0);
                let (mut codes, mut decoded) = ([0; BLOCK], [0.0; BLOCK]);
                let absmax = code.encode(&values, &mut codes);
                assert_eq!(absmax, 3.0);
                code.decode(&codes, absmax, &mut decoded);
                for (value, decoded) in values.iter().zip(decoded) {
                    let distance = |number: f32| (f64::from(number) - f64::from(*value) / 3.0).abs();
                    let nearest = code.values.iter().map(|&n| distance(n)).fold(f64::INFINITY, f64::min);
                    assert!(distance(decoded / 3.0) <= nearest + 1e-7 * f64::from(value.abs()), "{value} as {decoded}");
                }
            }
            // what is encoded once stays
            let (mut codes, mut again) = ([0; BLOCK], [0.0; BLOCK]);
            code.encode(&code.values, &mut codes);
            code.decode(&codes, 1.0, &mut again);
            assert_eq!(again, code.values);
        }
    }

    #[test]
    fn zeros_and_the_smallest_numbers_are_encoded() {
        let (mut codes, mut decoded) = ([7; 3], [1.0; 3]);
        assert_eq!(SIGNED.encode(&[0.0; 3], &mut codes), 0.0);
        SIGNED.decode(&codes, 0.0, &mut decoded);
        assert_eq!(decoded, [0.0; 3]);
        let smallest = f32::from_bits(1);
        let absmax = SIGNED.encode(&[smallest, 0.0, smallest], &mut codes);
        SIGNED.decode(&codes, absmax, &mut decoded);
        assert_eq!(decoded, [smallest, 0.0, smallest]);
    }

    /// ½Σ hᵢ(wᵢ − tᵢ)² with curvatures h from 0.01 to 1: the 8-bit path stays near the f32 one, and both arrive.
    #[test]
    fn a_quadratic_problem_is_solved_as_with_f32_moments() {
        let len = 5000;
        let (start, target) = (random(len, 1), random(len, 2));
        let gradient = |_, w: &[f32]| -> Vec<f32> {
            let curvature = |i: usize| 10f32.powf(-2.0 * (i % 101) as f32 / 100.0);
            w.iter().zip(&target).enumerate().map(|(i, (w, t))| curvature(i) * (w - t)).collect()
        };
        let distance = |a: &[f32], b: &[f32]| -> f32 {
            (a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f32>() / len as f32).sqrt()
        };
        let run = |kind: OptimizerKind, steps| {
            let mut optimizer = Optimizer::new(kind, kind.defaults(), &specs(&[&[50, 100]]));
            trained(&mut optimizer, start.clone(), steps, gradient)
        };
        for steps in [20, 100] {
            let (exact, quantised) = (run(OptimizerKind::AdamW, steps), run(OptimizerKind::AdamW8bit, steps));
            let (apart, moved) = (distance(&exact, &quantised), distance(&exact, &start));
            assert!(apart < 0.08 * moved, "after {steps} steps {apart} apart, moved by {moved}");
        }
        let left = distance(&run(OptimizerKind::AdamW8bit, 600), &target);
        assert!(left < 1e-3 * distance(&start, &target), "still {left} away");
    }

    /// A gradient 10⁵ times smaller than its neighbours' must not make a step larger than theirs.
    #[test]
    fn a_small_gradient_beside_large_ones_makes_no_large_step() {
        let mut optimizer =
            Optimizer::new(OptimizerKind::AdamW8bit, OptimizerKind::AdamW8bit.defaults(), &specs(&[&[64, 64]]));
        let gradient = |_, w: &[f32]| (0..w.len()).map(|i| if i % 16 == 3 { 1e-5 } else { 1.0 }).collect();
        let weights = trained(&mut optimizer, vec![0.0; 4096], 50, gradient);
        assert!(weights.iter().all(|w| w.abs() < 1.01 * 50.0 * 0.01), "{:?}", &weights[..4]);
    }
}
