//! The vocabulary head as log-probabilities of given tokens: log p(t|x) = (x·Wᵀ)ₜ − logsumexp(x·Wᵀ).
//!
//! Only rows that predict a token of a response come here, in chunks; of their softmax as much is kept for the backward pass as [`KEPT`]
//! says.

use std::ops::Range;

use rayon::prelude::*;

use super::divergence::Head;
use super::simd::{dispatch, exp_sum, max};
use super::{fit, linear};
use crate::precision::Precision;
use crate::profile::{self, Stage, Work};

/// Logits held at once: 64 MiB of f32.
const LOGITS: usize = 1 << 24;

/// Elements of the softmax that a forward pass keeps for the backward pass: 128 MiB of f32.
const KEPT: usize = 1 << 25;

/// The most rows to process at once for a vocabulary of this size.
pub(crate) fn chunk_rows(vocab: usize) -> usize {
    (LOGITS / vocab).clamp(32, 1024)
}

/// How many of `rows` to process at once, so that no chunk is a single row (unless that is all there is).
pub(crate) fn even_chunk(rows: usize, vocab: usize) -> usize {
    let most = chunk_rows(vocab).min(rows.max(1));
    (2..=most).rev().find(|chunk| rows % chunk != 1).unwrap_or(most)
}

/// How many of `rows` have their softmax kept for the backward pass.
pub(crate) fn kept_rows(rows: usize, vocab: usize) -> usize {
    rows.min(KEPT / vocab)
}

/// Cuts `rows` into the first `kept` and chunks of the others.
pub(crate) fn cut(rows: usize, kept: usize, vocab: usize) -> impl Iterator<Item = Range<usize>> {
    let chunk = even_chunk(rows - kept, vocab);
    let first = (kept > 0).then_some(0..kept);
    first.into_iter().chain((kept..rows).step_by(chunk).map(move |start| start..rows.min(start + chunk)))
}

/// The softmax of some rows of logits: the probability of v in row i is exps\[i·vocab + v\]·inverse_sums\[i\].
pub(crate) struct Softmax<'a> {
    /// exp(logit − max), `[n, vocab]`.
    pub(crate) exps: &'a mut [f32],
    /// 1/Σ of each row of `exps`, `[n]`.
    pub(crate) inverse_sums: &'a [f32],
}

/// Log-probabilities of `targets`, `[n]`, and the `inverse_sums` of their [`Softmax`], whose `exps` are overwritten.
pub(crate) fn forward(
    precision: Precision,
    Head { rows: x, weights: w }: Head<'_>,
    targets: &[u32],
    exps: &mut [f32],
) -> (Vec<f32>, Vec<f32>) {
    let (width, vocab) = shape(x, w, targets);
    let _span = span(1, x, vocab);
    compute_logits(precision, x, w, width, exps);
    let rows = exps.par_chunks_mut(vocab).zip(targets);
    rows.map(|(row, &target)| {
        dispatch(
            #[inline(always)]
            || log_softmax_at(row, target),
        )
    })
    .unzip()
}

/// Log-probabilities of `targets` under the softmax of the sum of several heads' logits. Every head has as many rows as
/// there are targets, and the same vocabulary.
pub(crate) fn mixed(precision: Precision, heads: &[Head<'_>], targets: &[u32]) -> Vec<f32> {
    let vocab = heads.first().map_or(1, |head| shape(head.rows, head.weights, targets).1);
    let chunk = even_chunk(targets.len(), 2 * vocab);
    let (mut sum, mut logits) = (Vec::new(), Vec::new());
    let mut logps = Vec::with_capacity(targets.len());
    for (index, targets) in targets.chunks(chunk).enumerate() {
        let sum = fit(&mut sum, targets.len() * vocab);
        sum.fill(0.0);
        for head in heads {
            let width = head.weights.len() / vocab;
            let rows = &head.rows[index * chunk * width..][..targets.len() * width];
            let logits = fit(&mut logits, sum.len());
            compute_logits(precision, rows, head.weights, width, logits);
            sum.par_chunks_mut(vocab).zip(logits.par_chunks(vocab)).for_each(|(sum, logits)| {
                sum.iter_mut().zip(logits).for_each(|(sum, logit)| *sum += logit);
            });
        }
        let rows = sum.par_chunks_mut(vocab).zip(targets);
        logps.par_extend(rows.map(|(row, &target)| {
            dispatch(
                #[inline(always)]
                || log_softmax_at(row, target).0,
            )
        }));
    }
    logps
}

/// Gradients of [`forward`], which made `softmax` and loses it here: d_x is overwritten and d_w, unless w is frozen, added
/// to, for the derivative `d_logps[i]` of the loss with respect to each log-probability.
pub(crate) fn backward(
    precision: Precision,
    Head { rows: x, weights: w }: Head<'_>,
    targets: &[u32],
    d_logps: &[f32],
    softmax: Softmax<'_>,
    d_x: &mut [f32],
    d_w: Option<&mut [f32]>,
) {
    let (width, vocab) = shape(x, w, targets);
    let Softmax { exps, inverse_sums } = softmax;
    assert!(d_logps.len() == targets.len() && inverse_sums.len() == targets.len() && d_x.len() == x.len());
    let _span = span(if d_w.is_some() { 2 } else { 1 }, x, vocab);
    let rows = exps.par_chunks_mut(vocab).zip(targets).zip(d_logps).zip(inverse_sums);
    rows.for_each(|(((row, &target), &d), inverse_sum)| {
        dispatch(
            #[inline(always)]
            || {
                // d logp/d logit = 1[target] − p
                let scale = -d * inverse_sum;
                row.iter_mut().for_each(|e| *e *= scale);
                row[target as usize] += d;
            },
        );
    });
    linear::backward_input(precision, exps, w, d_x, width);
    if let Some(d_w) = d_w {
        linear::backward_weight(precision, exps, x, d_w, width);
    }
}

/// Times so many products of `x` and the head.
fn span(products: usize, x: &[f32], vocab: usize) -> profile::Span {
    profile::span(Stage::Head, || Work::Flops(2.0 * (products * x.len() * vocab) as f64))
}

pub(super) fn shape(x: &[f32], w: &[f32], targets: &[u32]) -> (usize, usize) {
    let width = x.len() / targets.len().max(1);
    assert!(width > 0 && x.len() == width * targets.len() && w.len().is_multiple_of(width));
    (width, w.len() / width)
}

/// logits = x·Wᵀ. x `[n, width]`, w `[vocab, width]`, logits `[n, vocab]`.
pub(super) fn compute_logits(precision: Precision, x: &[f32], w: &[f32], width: usize, logits: &mut [f32]) {
    if x.len() > width {
        return linear::forward(precision, x, w, logits, width, false);
    }
    // A product of one row sums in another order than one of several, and a response's log-probability must not depend
    // on what it is packed with: a row that is alone comes twice.
    let mut twice = vec![0.0; 2 * logits.len()];
    linear::forward(precision, &x.repeat(2), w, &mut twice, width, false);
    logits.copy_from_slice(&twice[..logits.len()]);
}

/// Replaces the row by exp(logit − max); returns the target's log-probability and 1/Σ of the new row.
#[inline(always)]
pub(super) fn log_softmax_at(row: &mut [f32], target: u32) -> (f32, f32) {
    let target = row[target as usize];
    let highest = max(row);
    let sum = exp_sum(row, 1.0, highest);
    (target - highest - sum.ln(), 1.0 / sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::finite_difference::{check, random};

    fn logps(x: &[f32], w: &[f32], targets: &[u32]) -> Vec<f32> {
        let vocab = w.len() / (x.len() / targets.len());
        forward(Precision::F32, Head { rows: x, weights: w }, targets, &mut vec![0.0; targets.len() * vocab]).0
    }

    #[test]
    fn log_probabilities_and_gradients() {
        let (width, vocab, targets) = (5, 19, [3u32, 0, 18]);
        let (x, w, d) = (random(3 * width, 1), random(vocab * width, 2), random(3, 3));
        // probabilities of all tokens sum to one
        let total: f64 = (0..vocab as u32).map(|t| f64::from(logps(&x[..width], &w, &[t])[0]).exp()).sum();
        assert!((total - 1.0).abs() < 1e-5);
        let mut exps = vec![0.0; 3 * vocab];
        let head = Head { rows: &x, weights: &w };
        let (_, inverse_sums) = forward(Precision::F32, head, &targets, &mut exps);
        let mut again = exps.clone();
        let softmax = Softmax { exps: &mut exps, inverse_sums: &inverse_sums };
        let (mut d_x, mut d_w) = (vec![0.0; x.len()], vec![0.0; w.len()]);
        backward(Precision::F32, head, &targets, &d, softmax, &mut d_x, Some(&mut d_w));
        check(&x, &d_x, &d, |x| logps(x, &w, &targets));
        check(&w, &d_w, &d, |w| logps(&x, w, &targets));
        let mut frozen = vec![0.0; x.len()];
        let softmax = Softmax { exps: &mut again, inverse_sums: &inverse_sums };
        backward(Precision::F32, head, &targets, &d, softmax, &mut frozen, None);
        assert_eq!(frozen, d_x);
    }

    #[test]
    fn what_is_kept_comes_first_and_the_rest_in_chunks() {
        let cut = |rows, kept| cut(rows, kept, 49_152).collect::<Vec<_>>();
        assert_eq!((kept_rows(5, 49_152), kept_rows(5_000, 49_152)), (5, 682));
        assert_eq!(cut(682, 682).len(), 1);
        assert_eq!(cut(700, 0), [0..341, 341..682, 682..700]);
        assert_eq!(cut(700, 682), [0..682, 682..700]);
        assert!(cut(0, 0).is_empty());
    }

    #[test]
    fn no_chunk_is_a_single_row() {
        for vocab in [96, 32_000, 49_152, 200_000] {
            for rows in 2..5_000 {
                let chunk = even_chunk(rows, vocab);
                assert!(chunk <= chunk_rows(vocab) && rows % chunk != 1, "{rows} rows in chunks of {chunk}");
            }
        }
    }

    #[test]
    fn large_logits_do_not_overflow() {
        assert_eq!(logps(&[1.0], &[500.0, -500.0], &[0]), [0.0]);
    }

    #[test]
    fn nan_shows() {
        assert!(logps(&[f32::NAN], &[1.0, 2.0], &[0])[0].is_nan());
    }
}
