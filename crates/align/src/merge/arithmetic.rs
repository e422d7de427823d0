//! The formulas, on parts of tensors. Everything is summed in f64 and rounded to f32 once.

use rayon::prelude::*;

use super::trim::Trim;

/// Above this cosine, in absolute value, two tensors count as parallel, and the line between them serves as the arc
/// (mergekit's value).
const PARALLEL: f64 = 0.9995;

/// Below this length a tensor has no direction (mergekit's value).
const NO_LENGTH: f64 = 1e-8;

/// Σ cᵢ xᵢ for every entry. A model of coefficient 0 leaves no trace, so that coefficients 1 and 0 copy bits.
pub(super) fn linear(coefficients: &[f64], models: &[Vec<f32>], out: &mut [f32]) {
    const PART: usize = 1 << 13;
    let terms: Vec<_> = coefficients.iter().zip(models).filter(|(coefficient, _)| **coefficient != 0.0).collect();
    out.par_chunks_mut(PART).enumerate().for_each(|(part, out)| {
        for (i, out) in out.iter_mut().enumerate() {
            let at = part * PART + i;
            // −0 rather than 0, which would turn a sum of −0 into 0
            *out = terms.iter().fold(-0.0, |sum, (c, model)| sum + *c * f64::from(model[at])) as f32;
        }
    });
}

/// The squared lengths of two tensors and their product.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Angle {
    first: f64,
    second: f64,
    product: f64,
}

impl Angle {
    /// Adds the next entries of both.
    pub(super) fn add(&mut self, first: &[f32], second: &[f32]) {
        for (&a, &b) in first.iter().zip(second) {
            let (a, b) = (f64::from(a), f64::from(b));
            self.first += a * a;
            self.second += b * b;
            self.product += a * b;
        }
    }

    /// The coefficients of the two tensors at the shares 1 − q and q of the way: sin((1 − q)·Ω)/sin Ω and
    /// sin(q·Ω)/sin Ω with Ω the angle between them; the shares themselves for tensors that are parallel or have no
    /// length.
    pub(super) fn coefficients(self, shares: [f64; 2]) -> [f64; 2] {
        let length = |squared: f64| if squared.sqrt() > NO_LENGTH { squared.sqrt() } else { 1.0 };
        let cosine = self.product / (length(self.first) * length(self.second));
        if cosine.abs() > PARALLEL {
            return shares;
        }
        let angle = cosine.acos();
        shares.map(|share| match share {
            // exactly, so that the ends of the way copy bits
            0.0 | 1.0 => share,
            _ => (share * angle).sin() / angle.sin(),
        })
    }
}

/// Merges what is kept of task vectors into the base.
#[derive(Debug)]
pub(super) struct TaskVectors<'a> {
    /// One for each model.
    pub(super) weights: &'a [f64],
    /// What is kept is multiplied by this.
    pub(super) rescale: f64,
    /// Whether signs are elected, by the sum of the weighted entries: entries of the other sign are left out.
    pub(super) elect: bool,
    /// Whether the sum is divided by that of the weights; where signs are elected, by that of the entries taken.
    pub(super) normalise: bool,
}

impl TaskVectors<'_> {
    /// The merge of the next part of a tensor; `trims` says of each model's entries which are kept.
    pub(super) fn merge(&self, trims: &mut [Trim], base: &[f32], models: &[Vec<f32>], out: &mut [f32]) {
        let kept: Vec<Vec<f64>> = (trims, models, self.weights)
            .into_par_iter()
            .map(|(trim, model, weight)| {
                let entries = base.iter().zip(model);
                // magnitudes are compared as f32, as they were counted
                let entries = entries.map(|(&base, &model)| match trim.keeps(model - base) {
                    true => weight * self.rescale * (f64::from(model) - f64::from(base)),
                    false => 0.0,
                });
                entries.collect()
            })
            .collect();
        let all: f64 = self.weights.iter().sum();
        for (i, (out, &base)) in out.iter_mut().zip(base).enumerate() {
            let mut sum: f64 = kept.iter().map(|entries| entries[i]).sum();
            let mut divisor = all;
            if self.elect {
                (sum, divisor) = self.elected(kept.iter().map(|entries| entries[i]), sum);
            }
            if self.normalise && divisor != 0.0 {
                sum /= divisor;
            }
            // no change leaves the bits alone: −0 + 0 would be 0
            *out = if sum == 0.0 { base } else { (f64::from(base) + sum) as f32 };
        }
    }

    /// The sum of the entries whose sign is that of `total`, and of the weights of their models. 0 counts as positive,
    /// and an entry that is 0 has no sign.
    fn elected(&self, entries: impl Iterator<Item = f64>, total: f64) -> (f64, f64) {
        let sign = if total >= 0.0 { 1.0 } else { -1.0 };
        entries.zip(self.weights).fold((0.0, 0.0), |(sum, divisor), (entry, weight)| match entry * sign > 0.0 {
            true => (sum + entry, divisor + weight),
            false => (sum, divisor),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(coefficients: &[f64], models: &[Vec<f32>]) -> Vec<f32> {
        let mut out = vec![f32::NAN; models[0].len()];
        linear(coefficients, models, &mut out);
        out
    }

    fn angle(a: &[f32], b: &[f32]) -> Angle {
        let mut angle = Angle::default();
        angle.add(a, b);
        angle
    }

    fn vectors(method: &TaskVectors<'_>, base: &[f32], models: &[Vec<f32>]) -> Vec<f32> {
        let mut out = vec![f32::NAN; base.len()];
        method.merge(&mut vec![Trim::Nothing; models.len()], base, models, &mut out);
        out
    }

    #[test]
    fn the_ends_of_a_line_are_the_models_bit_for_bit() {
        let models = [vec![0.1, -0.0, 3e38, 1e-45], vec![-7.3, 5.0, -3e38, 0.0]];
        let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&lines(&[1.0, 0.0], &models)), bits(&models[0]));
        assert_eq!(bits(&lines(&[0.0, 1.0], &models)), bits(&models[1]));
        assert_eq!(lines(&[0.75, 0.25], &[vec![1.0, -2.0], vec![5.0, 2.0]]), [2.0, -1.0]);
        let long: Vec<f32> = (0..30_000).map(|i| i as f32).collect();
        assert_eq!(lines(&[1.0], std::slice::from_ref(&long)), long);
    }

    #[test]
    fn an_arc_keeps_the_length_and_a_line_serves_for_parallel_tensors() {
        // a right angle, half way
        let half = angle(&[2.0, 0.0], &[0.0, 2.0]).coefficients([0.5, 0.5]);
        assert!(half.iter().all(|c| (c - 0.5_f64.sqrt()).abs() < 1e-15), "{half:?}");
        // 60 degrees, a third of the way: sin 40° / sin 60°, sin 20° / sin 60°
        let third = angle(&[1.0, 0.0], &[0.5, 3_f32.sqrt() / 2.0]).coefficients([2.0 / 3.0, 1.0 / 3.0]);
        assert!((third[0] - 0.742227).abs() < 1e-6 && (third[1] - 0.394931).abs() < 1e-6, "{third:?}");
        for (a, b) in [([1.0, 2.0], [2.0, 4.0]), ([1.0, 2.0], [-1.0, -2.0]), ([1.0, 0.0], [1.0, 0.03])] {
            assert_eq!(angle(&a, &b).coefficients([0.7, 0.3]), [0.7, 0.3]);
        }
        assert_ne!(angle(&[1.0, 0.0], &[1.0, 0.04]).coefficients([0.7, 0.3]), [0.7, 0.3]);
        // without length there is no angle; the arc of a right angle is as good as any
        assert!(angle(&[0.0; 2], &[1.0; 2]).coefficients([0.7, 0.3]).iter().all(|c| c.is_finite()));
        assert_eq!(angle(&[1.0, 0.0], &[0.0, 1.0]).coefficients([1.0, 0.0]), [1.0, 0.0]);
    }

    #[test]
    fn task_vectors_add_up() {
        let plain = TaskVectors { weights: &[0.5, 2.0], rescale: 1.0, elect: false, normalise: false };
        let (base, models) = ([1.0, 10.0], [vec![3.0, 10.0], vec![0.0, 11.0]]);
        // 1 + 0.5·2 + 2·(−1); 10 + 2·1
        assert_eq!(vectors(&plain, &base, &models), [0.0, 12.0]);
        // divided by 2.5
        assert_eq!(vectors(&TaskVectors { normalise: true, ..plain }, &base, &models), [0.6, 10.8]);
        // one model of weight 1 is that model, bit for bit
        let (base, model) = ([0.1, -0.0, 1e-30], vec![0.3, -0.0, 1e30]);
        let one = TaskVectors { weights: &[1.0], rescale: 1.0, elect: false, normalise: false };
        let same = vectors(&one, &base, std::slice::from_ref(&model));
        assert!(same.iter().zip(&model).all(|(a, b)| a.to_bits() == b.to_bits()), "{same:?}");
    }

    #[test]
    fn the_sign_of_the_larger_sum_is_elected() {
        let ties = TaskVectors { weights: &[1.0, 1.0, 1.0], rescale: 1.0, elect: true, normalise: true };
        let models = [vec![4.0, 1.0, 2.0, 0.0], vec![-1.0, -3.0, -2.0, 0.0], vec![2.0, 1.0, 0.0, 0.0]];
        // the mean of 4 and 2; of −3 alone, although two of three are positive; 2 against −2 counts as positive; nothing
        assert_eq!(vectors(&ties, &[0.0; 4], &models), [3.0, -3.0, 2.0, 0.0]);
        // weights count in the election: 4 − 6 + 1 is negative
        let weighted = TaskVectors { weights: &[1.0, 6.0, 0.5], ..ties };
        assert_eq!(vectors(&weighted, &[0.0; 4], &models)[0], -1.0);
        let sums = TaskVectors { normalise: false, ..weighted };
        assert_eq!(vectors(&sums, &[0.0; 4], &models)[0], -6.0);
    }
}
