//! The vocabulary head beside a reference's: log-probabilities of given tokens, and in each row the divergence of the
//! policy from the reference, KL(π_ref ‖ π) = Σᵥ π_ref(v)·(log π_ref(v) − log π(v)) over the whole vocabulary.
//!
//! As in [`logprob`], rows come in chunks; the logits of both models exist for one chunk at a time.

use rayon::prelude::*;

use super::logprob::{self, compute_logits, log_softmax_at};
use super::simd::{dispatch, exp_sums, max};
use super::{fit, linear};
use crate::precision::Precision;

/// Normalised final hidden rows, and the vocabulary head that turns them into logits.
#[derive(Debug, Clone, Copy)]
pub struct Head<'a> {
    /// `[rows, hidden]`.
    pub rows: &'a [f32],
    /// `[vocab, hidden]`.
    pub weights: &'a [f32],
}

/// How many of `rows` to process at once, so that both models' logits take the room of one in [`logprob`].
pub(crate) fn even_chunk(rows: usize, vocab: usize) -> usize {
    logprob::even_chunk(rows, 2 * vocab)
}

/// Log-probabilities of `targets` under the policy, and divergences from the reference, each `[rows]`; `scratch` is
/// for the logits of policy and reference, grown as needed.
pub(crate) fn forward(
    precision: Precision,
    policy: Head,
    reference: Head,
    targets: &[u32],
    scratch: [&mut Vec<f32>; 2],
) -> (Vec<f32>, Vec<f32>) {
    let (vocab, logits, reference_logits) = both_logits(precision, policy, reference, targets, scratch);
    let rows = logits.par_chunks_mut(vocab).zip(reference_logits.par_chunks_mut(vocab)).zip(targets);
    rows.map(|((row, reference), &target)| {
        dispatch(
            #[inline(always)]
            || {
                let compared = compare(row, reference, target);
                (compared.logp, compared.divergence)
            },
        )
    })
    .unzip()
}

/// Gradients of the policy: d_x is overwritten and d_w, unless the head is frozen, added to, for the derivatives of the
/// loss with respect to each log-probability and to each divergence.
#[allow(clippy::too_many_arguments, reason = "factors, targets, derivatives and what they lead to")]
pub(crate) fn backward(
    precision: Precision,
    policy: Head,
    reference: Head,
    targets: &[u32],
    [d_logps, d_divergences]: [&[f32]; 2],
    d_x: &mut [f32],
    d_w: Option<&mut [f32]>,
    scratch: [&mut Vec<f32>; 2],
) {
    assert!(d_logps.len() == targets.len() && d_divergences.len() == targets.len());
    assert_eq!(d_x.len(), policy.rows.len());
    let (vocab, logits, reference_logits) = both_logits(precision, policy, reference, targets, scratch);
    let rows = logits.par_chunks_mut(vocab).zip(reference_logits.par_chunks_mut(vocab)).zip(targets);
    rows.zip(d_logps.par_iter().zip(d_divergences)).for_each(
        |(((row, reference), &target), (&d_logp, &d_divergence))| {
            dispatch(
                #[inline(always)]
                || {
                    let compared = compare(row, reference, target);
                    // d logp/d logit = 1[target] − p, d KL/d logit = p − p_ref
                    let scale = (d_divergence - d_logp) * compared.inverse_sum;
                    let reference_scale = -d_divergence * compared.reference_inverse_sum;
                    for (e, r) in row.iter_mut().zip(reference) {
                        *e = scale.mul_add(*e, reference_scale * *r);
                    }
                    row[target as usize] += d_logp;
                },
            );
        },
    );
    let width = policy.rows.len() / targets.len().max(1);
    linear::backward_input(precision, logits, policy.weights, d_x, width);
    if let Some(d_w) = d_w {
        linear::backward_weight(precision, logits, policy.rows, d_w, width);
    }
}

/// The size of the vocabulary, and both models' logits `[rows, vocab]`.
fn both_logits<'l>(
    precision: Precision,
    policy: Head,
    reference: Head,
    targets: &[u32],
    [logits, reference_logits]: [&'l mut Vec<f32>; 2],
) -> (usize, &'l mut [f32], &'l mut [f32]) {
    let (width, vocab) = logprob::shape(policy.rows, policy.weights, targets);
    assert!(
        reference.rows.len() == policy.rows.len() && reference.weights.len() == policy.weights.len(),
        "the reference has another shape than the policy"
    );
    let len = targets.len() * vocab;
    let (logits, reference_logits) = (fit(logits, len), fit(reference_logits, len));
    compute_logits(precision, policy.rows, policy.weights, width, logits);
    compute_logits(precision, reference.rows, reference.weights, width, reference_logits);
    (vocab, logits, reference_logits)
}

/// One row under both models.
struct Compared {
    /// The target's log-probability under the policy.
    logp: f32,
    /// KL(π_ref ‖ π).
    divergence: f32,
    /// 1/Σ of the policy's row, which [`compare`] leaves as exp(logit − max).
    inverse_sum: f32,
    /// The same of the reference's row.
    reference_inverse_sum: f32,
}

/// Replaces both rows by exp(logit − max). Equal rows have a divergence of exactly 0.
#[inline(always)]
fn compare(row: &mut [f32], reference: &mut [f32], target: u32) -> Compared {
    let (highest, reference_highest) = (max(row), max(reference));
    let (reference_sum, weighted) = exp_sums(reference, row, reference_highest);
    let reference_inverse_sum = 1.0 / reference_sum;
    let (logp, inverse_sum) = log_softmax_at(row, target);
    // KL = Σ p_ref·(r − l) − (lse r − lse l), with lse = max − ln(1/Σ)
    let normalisers = (reference_highest - highest) - (reference_inverse_sum.ln() - inverse_sum.ln());
    Compared { logp, divergence: weighted * reference_inverse_sum - normalisers, inverse_sum, reference_inverse_sum }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::finite_difference::{check, random};

    const WIDTH: usize = 5;
    const VOCAB: usize = 37;
    const TARGETS: [u32; 3] = [3, 0, 36];

    fn run(policy: Head, reference: Head) -> (Vec<f32>, Vec<f32>) {
        forward(Precision::F32, policy, reference, &TARGETS, [&mut Vec::new(), &mut Vec::new()])
    }

    /// Rows and head weights.
    fn numbers(seed: u64) -> (Vec<f32>, Vec<f32>) {
        (random(TARGETS.len() * WIDTH, seed), random(VOCAB * WIDTH, seed + 1))
    }

    /// Log-probabilities of all tokens in f64, row by row.
    fn log_softmax(head: Head) -> Vec<Vec<f64>> {
        let row = |x: &[f32]| {
            let logit = |w: &[f32]| x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum::<f64>();
            let logits: Vec<f64> = head.weights.chunks(WIDTH).map(logit).collect();
            let lse = logits.iter().map(|l| l.exp()).sum::<f64>().ln();
            logits.iter().map(|l| l - lse).collect()
        };
        head.rows.chunks(WIDTH).map(row).collect()
    }

    #[test]
    fn divergences_equal_the_sum_over_the_vocabulary_in_f64() {
        for scale in [1.0, 6.0] {
            let ((x, w), (mut reference_x, reference_w)) = (numbers(1), numbers(3));
            reference_x.iter_mut().for_each(|x| *x *= scale);
            let policy = Head { rows: &x, weights: &w };
            let reference = Head { rows: &reference_x, weights: &reference_w };
            let (logps, divergences) = run(policy, reference);
            assert_eq!(logps, logprob::forward(Precision::F32, policy, &TARGETS, &mut Vec::new(), None).0);
            for ((p, r), divergence) in log_softmax(policy).iter().zip(log_softmax(reference)).zip(divergences) {
                let expected: f64 = r.iter().zip(p).map(|(r, p)| r.exp() * (r - p)).sum();
                assert!((f64::from(divergence) - expected).abs() < 2e-6 * expected.max(1.0), "{divergence} {expected}");
            }
        }
    }

    #[test]
    fn gradients_match_finite_differences() {
        let ((x, w), (reference_x, reference_w)) = (numbers(1), numbers(3));
        let reference = Head { rows: &reference_x, weights: &reference_w };
        let derivatives = random(6, 5);
        let (d_logps, d_divergences) = derivatives.split_at(3);
        let outputs = |x: &[f32], w: &[f32]| {
            let (logps, divergences) = run(Head { rows: x, weights: w }, reference);
            [logps, divergences].concat()
        };
        let (mut d_x, mut d_w) = (vec![0.0; x.len()], vec![0.0; w.len()]);
        let (policy, scratch) = (Head { rows: &x, weights: &w }, [&mut Vec::new(), &mut Vec::new()]);
        backward(
            Precision::F32,
            policy,
            reference,
            &TARGETS,
            [d_logps, d_divergences],
            &mut d_x,
            Some(&mut d_w),
            scratch,
        );
        check(&x, &d_x, &derivatives, |x| outputs(x, &w));
        check(&w, &d_w, &derivatives, |w| outputs(&x, w));
    }

    #[test]
    fn equal_models_do_not_diverge_and_nan_shows() {
        let (x, w) = numbers(1);
        let same = Head { rows: &x, weights: &w };
        assert_eq!(run(same, same).1, [0.0; 3]);
        let spoilt: Vec<f32> = x.iter().map(|_| f32::NAN).collect();
        assert!(run(same, Head { rows: &spoilt, weights: &w }).1.iter().all(|d| d.is_nan()));
    }
}
