//! The vocabulary head as log-probabilities of given tokens: log p(t|x) = (x·Wᵀ)ₜ − logsumexp(x·Wᵀ).
//!
//! Only rows that predict a token of a response come here, in chunks; logits of all rows never exist at once.

use rayon::prelude::*;

use super::divergence::Head;
use super::simd::{dispatch, exp_sum, max};
use super::{fit, linear};
use crate::precision::Precision;
use crate::profile::{self, Stage, Work};

/// Logits held at once: 64 MiB of f32.
const LOGITS: usize = 1 << 24;

/// The most rows to process at once for a vocabulary of this size.
pub(crate) fn chunk_rows(vocab: usize) -> usize {
    (LOGITS / vocab).clamp(32, 1024)
}

/// How many of `rows` to process at once, so that no chunk is a single row (unless that is all there is).
pub(crate) fn even_chunk(rows: usize, vocab: usize) -> usize {
    let most = chunk_rows(vocab).min(rows.max(1));
    (2..=most).rev().find(|chunk| rows % chunk != 1).unwrap_or(most)
}

/// Log-probabilities of `targets`. x `[n, width]`, w `[vocab, width]`; `logits` is scratch, grown as needed.
pub(crate) fn forward(precision: Precision, x: &[f32], w: &[f32], targets: &[u32], logits: &mut Vec<f32>) -> Vec<f32> {
    let (width, vocab) = shape(x, w, targets);
    let _span = span(1, x, vocab);
    let logits = compute_logits(precision, x, w, width, vocab, logits);
    let rows = logits.par_chunks_mut(vocab).zip(targets);
    rows.map(|(row, &target)| {
        dispatch(
            #[inline(always)]
            || log_softmax_at(row, target).0,
        )
    })
    .collect()
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
            let logits = compute_logits(precision, rows, head.weights, width, vocab, &mut logits);
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

/// As [`forward`], with gradients: d_x is overwritten and d_w, unless w is frozen, added to, for the derivative
/// `d_logps[i]` of the loss with respect to each log-probability.
#[allow(clippy::too_many_arguments, reason = "factors, targets, derivatives and what they lead to")]
pub(crate) fn forward_backward(
    precision: Precision,
    x: &[f32],
    w: &[f32],
    targets: &[u32],
    d_logps: &[f32],
    d_x: &mut [f32],
    d_w: Option<&mut [f32]>,
    logits: &mut Vec<f32>,
) -> Vec<f32> {
    let (width, vocab) = shape(x, w, targets);
    assert!(d_logps.len() == targets.len() && d_x.len() == x.len());
    let _span = span(if d_w.is_some() { 3 } else { 2 }, x, vocab);
    let logits = compute_logits(precision, x, w, width, vocab, logits);
    let rows = logits.par_chunks_mut(vocab).zip(targets).zip(d_logps);
    let logps = rows
        .map(|((row, &target), &d)| {
            dispatch(
                #[inline(always)]
                || {
                    let (logp, inverse_sum) = log_softmax_at(row, target);
                    // d logp/d logit = 1[target] − p
                    let scale = -d * inverse_sum;
                    row.iter_mut().for_each(|e| *e *= scale);
                    row[target as usize] += d;
                    logp
                },
            )
        })
        .collect();
    linear::backward_input(precision, logits, w, d_x, width);
    if let Some(d_w) = d_w {
        linear::backward_weight(precision, logits, x, d_w, width);
    }
    logps
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

pub(super) fn compute_logits<'l>(
    precision: Precision,
    x: &[f32],
    w: &[f32],
    width: usize,
    vocab: usize,
    logits: &'l mut Vec<f32>,
) -> &'l mut [f32] {
    let len = x.len() / width * vocab;
    // A product of one row sums in another order than one of several, and a response's log-probability must not depend
    // on what it is packed with: a row that is alone comes twice.
    let twice;
    let x = if x.len() == width {
        twice = x.repeat(2);
        &twice
    } else {
        x
    };
    let computed = x.len() / width * vocab;
    let logits = fit(logits, computed);
    linear::forward(precision, x, w, logits, width, false);
    &mut logits[..len]
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

    #[test]
    fn log_probabilities_and_gradients() {
        let (width, vocab, targets) = (5, 19, [3u32, 0, 18]);
        let (x, w, d) = (random(3 * width, 1), random(vocab * width, 2), random(3, 3));
        let run = |x: &[f32], w: &[f32]| forward(Precision::F32, x, w, &targets, &mut Vec::new());
        // probabilities of all tokens sum to one
        let total: f64 = (0..vocab as u32)
            .map(|t| f64::from(forward(Precision::F32, &x[..width], &w, &[t], &mut Vec::new())[0]).exp())
            .sum();
        assert!((total - 1.0).abs() < 1e-5);
        let (mut d_x, mut d_w) = (vec![0.0; x.len()], vec![0.0; w.len()]);
        let logps = forward_backward(Precision::F32, &x, &w, &targets, &d, &mut d_x, Some(&mut d_w), &mut Vec::new());
        assert_eq!(logps, run(&x, &w));
        check(&x, &d_x, &d, |x| run(x, &w));
        check(&w, &d_w, &d, |w| run(&x, w));
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
        let logps = forward(Precision::F32, &[1.0], &[500.0, -500.0], &[0], &mut vec![]);
        assert_eq!(logps, [0.0]);
    }

    #[test]
    fn nan_shows() {
        assert!(forward(Precision::F32, &[f32::NAN], &[1.0, 2.0], &[0], &mut vec![])[0].is_nan());
    }
}
