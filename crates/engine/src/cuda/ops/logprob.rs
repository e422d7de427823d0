//! Log-probabilities of given tokens from rows of logits, and what the gradient needs of their softmax; see
//! [`ops::logprob`](crate::ops::logprob). The products around it are not here.

use crate::cuda::Module;
use crate::cuda::device::{Argument, Device, IndexView, Launch, Number, View, ViewMut};
use crate::error::Result;

pub(crate) static MODULE: Module = Module {
    name: "logprob",
    text: include_str!("../kernels/logprob.cu"),
    kernels: &[
        "logprob_forward",
        "logprob_excess_f32",
        "logprob_excess_bf16",
        "logprob_scale_f32",
        "logprob_scale_bf16",
    ],
};

/// Log-probabilities of `targets`, `[n]`. logits `[n, vocab]`.
///
/// # Panics
/// If a target is not in the vocabulary.
pub(crate) fn forward(
    device: &impl Device,
    logits: View<'_, f32>,
    targets: IndexView<'_>,
    logps: ViewMut<'_, f32>,
    vocab: usize,
) -> Result<()> {
    let n = targets.len();
    assert!(targets.bound() <= vocab && logits.len() == n * vocab && logps.len() == n);
    let arguments = [logits.into(), targets.into(), logps.into(), (vocab as i32).into()];
    // SAFETY: the lengths are those of `n` rows, and the targets are in them.
    unsafe { device.launch(&MODULE, "logprob_forward", Launch::blocks(n), &arguments) }
}

/// As [`forward`], with what the gradient needs, `[n, vocab]`: exp(logit − max), less the row's sum of these at the target; and in
/// `inverse_sums`, `[n]`, 1/Σ of exp(logit − max).
pub(crate) fn excess<T: Number>(
    device: &impl Device,
    logits: View<'_, f32>,
    targets: IndexView<'_>,
    excess: ViewMut<'_, T>,
    logps: ViewMut<'_, f32>,
    inverse_sums: ViewMut<'_, f32>,
    vocab: usize,
) -> Result<()> {
    let n = targets.len();
    assert!(targets.bound() <= vocab && logits.len() == n * vocab && excess.len() == n * vocab);
    assert!(logps.len() == n && inverse_sums.len() == n);
    let arguments =
        [logits.into(), targets.into(), excess.into(), logps.into(), inverse_sums.into(), (vocab as i32).into()];
    // SAFETY: as in `forward`.
    unsafe { device.launch(&MODULE, &format!("logprob_excess_{}", T::NAME), Launch::blocks(n), &arguments) }
}

/// Multiplies each row by −d_logps·inverse_sums, the factor that the excess lacks. rows, scaled `[n, width]`.
pub(crate) fn scale<T: Number>(
    device: &impl Device,
    rows: View<'_, T>,
    d_logps: View<'_, f32>,
    inverse_sums: View<'_, f32>,
    scaled: ViewMut<'_, T>,
) -> Result<()> {
    let n = d_logps.len();
    let width = rows.len() / n.max(1);
    assert!(rows.len() == n * width && scaled.len() == rows.len() && inverse_sums.len() == n);
    let arguments = [rows.into(), d_logps.into(), inverse_sums.into(), scaled.into(), (width as i32).into()];
    // SAFETY: the lengths are those of `n` rows.
    unsafe { device.launch(&MODULE, &format!("logprob_scale_{}", T::NAME), Launch::blocks(n), &arguments) }
}

/// As [`scale`], in place.
pub(crate) fn scale_in_place<T: Number>(
    device: &impl Device,
    rows: ViewMut<'_, T>,
    d_logps: View<'_, f32>,
    inverse_sums: View<'_, f32>,
) -> Result<()> {
    let n = d_logps.len();
    let width = rows.len() / n.max(1);
    assert!(rows.len() == n * width && inverse_sums.len() == n);
    let rows = Argument::from(rows);
    let arguments = [rows, d_logps.into(), inverse_sums.into(), rows, (width as i32).into()];
    // SAFETY: as in `scale`; a thread reads a number before it writes it.
    unsafe { device.launch(&MODULE, &format!("logprob_scale_{}", T::NAME), Launch::blocks(n), &arguments) }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::cuda::device::Indices;
    use crate::cuda::ops::tests::{OnHost, as_rounded, assert_close, on, rounded, zeros};
    use crate::cuda::tested::{Tested, devices};
    use crate::ops::divergence::Head;
    use crate::ops::finite_difference::random;
    use crate::ops::logprob as cpu;
    use crate::precision::Precision;

    /// Logits that the head's product gives exactly: the rows of x are unit vectors.
    fn expected(logits: &[f32], targets: &[u32]) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let (n, vocab) = (targets.len(), logits.len() / targets.len());
        let rows: Vec<f32> = (0..n * n).map(|i| f32::from(i % n == i / n)).collect();
        let weights: Vec<f32> = (0..vocab * n).map(|i| logits[i % n * vocab + i / n]).collect();
        let mut excess = Vec::new();
        let head = Head { rows: &rows, weights: &weights };
        let (logps, inverse_sums) = cpu::forward(Precision::F32, head, targets, &mut excess, None);
        (logps, inverse_sums, excess)
    }

    #[test]
    fn log_probabilities_and_excess_as_on_the_cpu() {
        for device in devices() {
            for (n, vocab) in [(2, 1), (3, 19), (5, 256), (4, 3001)] {
                let logits: Vec<f32> = random(n * vocab, 1).iter().map(|x| 20.0 * x).collect();
                let targets: Vec<u32> = (0..n).map(|i| (i * 7 % vocab) as u32).collect();
                let (on_logits, on_targets) = (on(&device, &logits), Indices::new(&device, &targets).unwrap());
                let [mut logps, mut inverse_sums] = [(); 2].map(|()| zeros(&device, n));
                let (mut excess, mut wide) = (zeros::<bf16>(&device, n * vocab), zeros::<f32>(&device, n * vocab));
                let (all, targets_view) = (on_logits.view(), on_targets.view());
                forward(&device, all, targets_view, logps.view_mut(), vocab).unwrap();
                let alone = logps.to_vec(&device).unwrap();
                let (l, i) = (logps.view_mut(), inverse_sums.view_mut());
                super::excess(&device, all, targets_view, excess.view_mut(), l, i, vocab).unwrap();
                assert_eq!(logps.to_vec(&device).unwrap(), alone);
                let (l, i) = (logps.view_mut(), inverse_sums.view_mut());
                super::excess(&device, all, targets_view, wide.view_mut(), l, i, vocab).unwrap();
                assert_eq!(logps.to_vec(&device).unwrap(), alone);

                let (expected_logps, expected_sums, expected_excess) = expected(&logits, &targets);
                let near = |(a, e): (&f32, &f32)| (a - e).abs() <= 1e-5 * e.abs().max(1.0);
                assert!(alone.iter().zip(&expected_logps).all(near), "{alone:?} {expected_logps:?}");
                assert_close(&device, &inverse_sums, &expected_sums);
                if vocab > 1 {
                    assert_close(&device, &wide, &expected_excess);
                    assert_close(&device, &excess, &as_rounded::<bf16>(&expected_excess));
                }
            }
        }
    }

    #[test]
    fn rows_are_scaled() {
        fn check<T: OnHost>(device: &Tested) {
            let (n, width) = (3, 300);
            let (rows, d, sums) = (random(n * width, 1), random(n, 2), random(n, 3));
            let mut scaled = zeros::<T>(device, rows.len());
            let [on_d, on_sums] = [&d, &sums].map(|numbers| on(device, numbers));
            let on_rows = on(device, &rounded::<T>(&rows));
            scale(device, on_rows.view(), on_d.view(), on_sums.view(), scaled.view_mut()).unwrap();
            let expected = as_rounded::<T>(&rows);
            let expected: Vec<f32> =
                expected.iter().enumerate().map(|(i, x)| x * -d[i / width] * sums[i / width]).collect();
            assert_close(device, &scaled, &expected);
            let mut in_place = on(device, &rounded::<T>(&rows));
            scale_in_place(device, in_place.view_mut(), on_d.view(), on_sums.view()).unwrap();
            assert!(in_place.to_vec(device).unwrap() == scaled.to_vec(device).unwrap());
        }
        for device in devices() {
            check::<f32>(&device);
            check::<bf16>(&device);
        }
    }

    #[test]
    fn large_logits_do_not_overflow_and_nan_shows() {
        for device in devices() {
            let logits = on(&device, &[500.0, -500.0, f32::NEG_INFINITY, 1.0, f32::NAN, 0.0]);
            let (targets, mut logps) = (Indices::new(&device, &[0, 2]).unwrap(), zeros(&device, 2));
            forward(&device, logits.view(), targets.view(), logps.view_mut(), 3).unwrap();
            let logps = logps.to_vec(&device).unwrap();
            assert!(logps[0] == 0.0 && logps[1].is_nan(), "{logps:?}");
        }
    }
}
