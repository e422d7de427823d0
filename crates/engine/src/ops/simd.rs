//! Vector arithmetic that the compiler turns into SIMD for the processor at hand.

use half::bf16;

/// Lanes of a partial sum: one 512-bit register of f32.
pub(crate) const LANES: usize = 16;

/// Runs `kernel` compiled for the best instruction set of this processor.
///
/// Only code that is inlined into `kernel` profits: mark helpers `#[inline(always)]`.
#[inline(always)]
pub(crate) fn dispatch<R>(kernel: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(kernel)
}

/// The instruction set that [`dispatch`] chooses here. Results in f32 may differ between instruction sets.
pub(crate) fn instruction_set() -> String {
    format!("{:?}", pulp::Arch::new())
}

/// eˣ with a relative error below 2e-7 for x in [−87.3, 88.3]; clamped outside; NaN stays NaN.
///
/// Range reduction by ln 2 in two parts and a polynomial of degree 6 (the classic Cephes scheme),
/// free of branches so that loops over it vectorise.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // adding 1.5·2²³ rounds to the nearest integer and leaves it in the low bits
    const ROUND: f32 = 12_582_912.0;
    // comparisons that are false for NaN, so that NaN passes through
    let x = if x < -87.3 { -87.3 } else { x };
    let x = if x > 88.3 { 88.3 } else { x };
    let shifted = x.mul_add(LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    let mut p = 1.987_569_1e-4f32;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p.mul_add(r, c);
    }
    let y = p.mul_add(r * r, r) + 1.0;
    y * f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000))
}

/// The logistic function 1/(1 + e⁻ˣ).
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The nearest bf16, of two equally near ones the even one; NaN stays NaN. As [`bf16::from_f32`], free of branches.
#[inline(always)]
pub(crate) fn to_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    bf16::from_bits((if x.is_nan() { bits | 0x0040_0000 } else { rounded } >> 16) as u16)
}

/// The same number in f32; as [`bf16::to_f32`], free of branches.
#[inline(always)]
pub(crate) fn of_bf16(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// Σᵢ aᵢ·bᵢ.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (a_body, a_tail) = a.as_chunks::<LANES>();
    let (b_body, b_tail) = b.as_chunks::<LANES>();
    for (x, y) in a_body.iter().zip(b_body) {
        for j in 0..LANES {
            lanes[j] = x[j].mul_add(y[j], lanes[j]);
        }
    }
    let tail: f32 = a_tail.iter().zip(b_tail).map(|(&x, &y)| x * y).sum();
    lanes.iter().sum::<f32>() + tail
}

/// [`dot`] of each of four with b, to the last bit, in which b is read once and no sum waits for another.
#[inline(always)]
pub(crate) fn dot4(a: [&[f32]; 4], b: &[f32]) -> [f32; 4] {
    let ([a0, a1, a2, a3], (b_body, b_tail)) = (a.map(|a| a.as_chunks::<LANES>()), b.as_chunks::<LANES>());
    // named apart, so that each stays in a register
    let [mut l0, mut l1, mut l2, mut l3] = [[0f32; LANES]; 4];
    for ((((y, x0), x1), x2), x3) in b_body.iter().zip(a0.0).zip(a1.0).zip(a2.0).zip(a3.0) {
        for j in 0..LANES {
            l0[j] = x0[j].mul_add(y[j], l0[j]);
            l1[j] = x1[j].mul_add(y[j], l1[j]);
            l2[j] = x2[j].mul_add(y[j], l2[j]);
            l3[j] = x3[j].mul_add(y[j], l3[j]);
        }
    }
    let sum = |lanes: [f32; LANES], a_tail: &[f32]| -> f32 {
        let tail: f32 = a_tail.iter().zip(b_tail).map(|(&x, &y)| x * y).sum();
        lanes.iter().sum::<f32>() + tail
    };
    [sum(l0, a0.1), sum(l1, a1.1), sum(l2, a2.1), sum(l3, a3.1)]
}

/// Σᵢ aᵢ·bᵢ·cᵢ.
#[inline(always)]
pub(crate) fn dot3(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (a_body, a_tail) = a.as_chunks::<LANES>();
    let (b_body, b_tail) = b.as_chunks::<LANES>();
    let (c_body, c_tail) = c.as_chunks::<LANES>();
    for ((x, y), z) in a_body.iter().zip(b_body).zip(c_body) {
        for j in 0..LANES {
            lanes[j] = (x[j] * y[j]).mul_add(z[j], lanes[j]);
        }
    }
    let tail: f32 = a_tail.iter().zip(b_tail).zip(c_tail).map(|((&x, &y), &z)| x * y * z).sum();
    lanes.iter().sum::<f32>() + tail
}

/// The largest element; −∞ for an empty slice. NaN elements are passed over.
#[inline(always)]
pub(crate) fn max(a: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (body, tail) = a.as_chunks::<LANES>();
    for x in body {
        for j in 0..LANES {
            lanes[j] = if x[j] > lanes[j] { x[j] } else { lanes[j] };
        }
    }
    lanes.iter().chain(tail).fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m })
}

/// Elements that are summed in f32 before they are added to a sum in f64: in a vocabulary of tens of thousands, small
/// probabilities would be lost one by one beside a large sum.
const BLOCK: usize = 64 * LANES;

/// Replaces each xᵢ by exp(xᵢ·scale − shift) and returns the sum of the results.
#[inline(always)]
pub(crate) fn exp_sum(x: &mut [f32], scale: f32, shift: f32) -> f32 {
    let mut total = 0f64;
    for block in x.chunks_mut(BLOCK) {
        let mut lanes = [0f32; LANES];
        let (body, tail) = block.as_chunks_mut::<LANES>();
        for chunk in body {
            for j in 0..LANES {
                chunk[j] = exp(chunk[j].mul_add(scale, -shift));
                lanes[j] += chunk[j];
            }
        }
        let mut sum = lanes.iter().sum::<f32>();
        for x in tail {
            *x = exp(x.mul_add(scale, -shift));
            sum += *x;
        }
        total += f64::from(sum);
    }
    total as f32
}

/// As [`exp_sum`] with scale 1, to the last bit; returns besides the sum Σᵢ exp(xᵢ − shift)·(xᵢ − yᵢ).
#[inline(always)]
pub(crate) fn exp_sums(x: &mut [f32], y: &[f32], shift: f32) -> (f32, f32) {
    let (mut total, mut weighted_total) = (0f64, 0f64);
    for (x, y) in x.chunks_mut(BLOCK).zip(y.chunks(BLOCK)) {
        let (mut lanes, mut weighted) = ([0f32; LANES], [0f32; LANES]);
        let (x_body, x_tail) = x.as_chunks_mut::<LANES>();
        let (y_body, y_tail) = y.as_chunks::<LANES>();
        for (x, y) in x_body.iter_mut().zip(y_body) {
            for j in 0..LANES {
                let difference = x[j] - y[j];
                x[j] = exp(x[j] - shift);
                lanes[j] += x[j];
                weighted[j] = x[j].mul_add(difference, weighted[j]);
            }
        }
        let (mut sum, mut weighted_sum) = (lanes.iter().sum::<f32>(), weighted.iter().sum::<f32>());
        for (x, y) in x_tail.iter_mut().zip(y_tail) {
            let difference = *x - y;
            *x = exp(*x - shift);
            sum += *x;
            weighted_sum += *x * difference;
        }
        total += f64::from(sum);
        weighted_total += f64::from(weighted_sum);
    }
    (total as f32, weighted_total as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_over_its_range() {
        let worst = (-87_300..88_300)
            .map(|i| {
                let x = i as f32 / 1000.0;
                (f64::from(exp(x)) / f64::from(x).exp() - 1.0).abs()
            })
            .fold(0.0, f64::max);
        assert!(worst < 2e-7, "worst relative error {worst:e}");
    }

    #[test]
    fn exp_clamps_and_keeps_nan() {
        assert!(exp(f32::NEG_INFINITY) < 1.3e-38);
        assert!(exp(f32::INFINITY).is_finite());
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn rounding_to_bf16_is_that_of_the_crate() {
        let patterns = (0..=u16::MAX).flat_map(|high| [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|low| (high, low)));
        for (high, low) in patterns {
            let x = f32::from_bits(u32::from(high) << 16 | low);
            assert_eq!(to_bf16(x).to_bits(), bf16::from_f32(x).to_bits(), "{x}");
        }
    }

    #[test]
    fn reductions_cover_body_and_tail() {
        let a: Vec<f32> = (0..37).map(|i| i as f32 - 30.0).collect();
        assert_eq!(max(&a), 6.0);
        assert_eq!(dot(&a, &a), a.iter().map(|x| x * x).sum::<f32>());
        assert_eq!(dot3(&a, &a, &a), a.iter().map(|x| x * x * x).sum::<f32>());
        let rows: [Vec<f32>; 4] = std::array::from_fn(|i| a.iter().map(|x| (x * 0.37 + i as f32).sin()).collect());
        let rows = rows.each_ref().map(Vec::as_slice);
        assert_eq!(dot4(rows, rows[3]), rows.map(|row| dot(row, rows[3])));
        let mut e = a.clone();
        let sum = dispatch(|| exp_sum(&mut e, 0.5, 1.0));
        let expected: f64 = a.iter().map(|&x| (f64::from(x) * 0.5 - 1.0).exp()).sum();
        assert!((f64::from(sum) / expected - 1.0).abs() < 1e-6);
        let (mut e, mut again) = (a.clone(), a.clone());
        let y: Vec<f32> = a.iter().map(|x| x * 0.5).collect();
        let (sum, weighted) = dispatch(|| exp_sums(&mut e, &y, 1.0));
        assert_eq!((sum, &e), (dispatch(|| exp_sum(&mut again, 1.0, 1.0)), &again));
        let expected: f64 = a.iter().map(|&x| (f64::from(x) - 1.0).exp() * f64::from(x) * 0.5).sum();
        assert!((f64::from(weighted) / expected - 1.0).abs() < 1e-6);
    }

    /// One likely token and a vocabulary of unlikely ones, which together weigh as much as a rounding of f32 does not.
    #[test]
    fn small_terms_are_not_lost_beside_a_large_sum() {
        let mut x: Vec<f32> = (0..49_152).map(|i| -16.0 - (i % 97) as f32 / 97.0).collect();
        x[0] = 0.0;
        let y: Vec<f32> = x.iter().map(|x| x - 0.5).collect();
        let expected: f64 = x.iter().map(|&x| f64::from(x).exp()).sum();
        let (sum, weighted) = exp_sums(&mut x.clone(), &y, 0.0);
        assert_eq!(exp_sum(&mut x, 1.0, 0.0), sum);
        assert!((f64::from(sum) / expected - 1.0).abs() < 6e-7, "{sum} {expected}");
        assert!((f64::from(weighted) / (0.5 * expected) - 1.0).abs() < 6e-7, "{weighted}");
    }
}
