//! The vocabulary head as log-probabilities of given tokens: log p(t|x) = (x·Wᵀ)ₜ − logsumexp(x·Wᵀ).
//!
//! Only rows that predict a token of a response come here, in chunks; of their softmax as much is kept for the backward pass as [`KEPT`]
//! says. In bf16 it is in 16 bits, of which products read it: log-probabilities are of the logits in f32.

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::divergence::Head;
use super::simd::{dispatch, exp_sum, max, to_bf16};
use super::{fit, linear};
use crate::precision::Precision;
use crate::profile::{self, Stage, Work};

/// Logits held at once: 64 MiB of f32.
const LOGITS: usize = 1 << 24;

/// Numbers of the softmax that a forward pass keeps for the backward pass: 256 MiB of f32, 128 MiB in bf16; and half as many
/// where memory is short.
const KEPT: usize = 1 << 26;

/// The most rows to process at once for a vocabulary of this size.
pub(crate) fn chunk_rows(vocab: usize) -> usize {
    (LOGITS / vocab).clamp(32, 1024)
}

/// How many of `rows` to process at once, so that no chunk is a single row (unless that is all there is).
pub(crate) fn even_chunk(rows: usize, vocab: usize) -> usize {
    let most = chunk_rows(vocab).min(rows.max(1));
    (2..=most).rev().find(|chunk| rows % chunk != 1).unwrap_or(most)
}

/// How many of `rows` have their softmax kept for the backward pass, where there is ample memory or not.
pub(crate) fn kept_rows(ample: bool, rows: usize, vocab: usize) -> usize {
    let most = if ample { KEPT } else { KEPT / 2 };
    rows.min(most / vocab)
}

/// Cuts `rows` into the first `kept` and chunks of the others.
pub(crate) fn cut(rows: usize, kept: usize, vocab: usize) -> impl Iterator<Item = Range<usize>> {
    let chunk = even_chunk(rows - kept, vocab);
    let first = (kept > 0).then_some(0..kept);
    first.into_iter().chain((kept..rows).step_by(chunk).map(move |start| start..rows.min(start + chunk)))
}

/// The softmax of some rows as their backward pass reads it: the derivative of row i's log-probability with respect to its
/// logit v is −excess\[i·vocab + v\]·inverse_sums\[i\].
#[derive(Clone, Copy)]
pub(crate) struct Softmax<'a> {
    /// exp(logit − max), less the row's sum of these at the target, `[n, vocab]`.
    pub(crate) excess: Excess<'a>,
    /// 1/Σ of exp(logit − max), `[n]`.
    pub(crate) inverse_sums: &'a [f32],
}

/// See [`Softmax`]; each precision has its own.
#[derive(Clone, Copy)]
pub(crate) enum Excess<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

/// Log-probabilities of `targets`, `[n]`, and the `inverse_sums` of their [`Softmax`].
///
/// In f32 `logits` has the softmax's `excess` at its beginning afterwards; in bf16 it has a chunk at a time, and `rounded`
/// takes the `excess`, where there is one.
pub(crate) fn forward(
    precision: Precision,
    Head { rows: x, weights: w }: Head<'_>,
    targets: &[u32],
    logits: &mut Vec<f32>,
    rounded: Option<&mut Vec<bf16>>,
) -> (Vec<f32>, Vec<f32>) {
    let (width, vocab) = shape(x, w, targets);
    let _span = span(1, x, vocab);
    let mut rounded = rounded.map(|rounded| fit(rounded, targets.len() * vocab));
    let chunk = if precision == Precision::F32 { targets.len() } else { even_chunk(targets.len(), vocab) };
    let logits = fit(logits, chunk * vocab);
    let (mut logps, mut inverse_sums) = (Vec::with_capacity(targets.len()), Vec::with_capacity(targets.len()));
    for (index, targets) in targets.chunks(chunk.max(1)).enumerate() {
        let (first, logits) = (index * chunk, &mut logits[..targets.len() * vocab]);
        compute_logits(precision, &x[first * width..][..targets.len() * width], w, width, logits);
        let rows = logits.par_chunks_mut(vocab).zip(targets);
        let of_chunk: Vec<(f32, f32)> = match &mut rounded {
            None => rows.map(|(row, &target)| excess_row(row, target, &mut [])).collect(),
            Some(rounded) => {
                let rounded = rounded[first * vocab..].par_chunks_mut(vocab);
                rows.zip(rounded).map(|((row, &target), rounded)| excess_row(row, target, rounded)).collect()
            }
        };
        logps.extend(of_chunk.iter().map(|(logp, _)| logp));
        inverse_sums.extend(of_chunk.iter().map(|(_, inverse_sum)| inverse_sum));
    }
    (logps, inverse_sums)
}

/// Replaces a row of logits by its [`Softmax::excess`] and puts that into `rounded`, unless that is empty; returns what
/// [`log_softmax_at`] does.
fn excess_row(row: &mut [f32], target: u32, rounded: &mut [bf16]) -> (f32, f32) {
    dispatch(
        #[inline(always)]
        || {
            let (logp, inverse_sum) = log_softmax_at(row, target);
            row[target as usize] -= 1.0 / inverse_sum;
            rounded.iter_mut().zip(row).for_each(|(rounded, e)| *rounded = to_bf16(*e));
            (logp, inverse_sum)
        },
    )
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

/// Gradients of [`forward`], which made `softmax`: d_x is overwritten and d_w, unless w is frozen, added to, for the derivative
/// `d_logps[i]` of the loss with respect to each log-probability.
pub(crate) fn backward(
    Head { rows: x, weights: w }: Head<'_>,
    d_logps: &[f32],
    Softmax { excess, inverse_sums }: Softmax<'_>,
    d_x: &mut [f32],
    d_w: Option<&mut [f32]>,
) {
    let width = x.len() / d_logps.len().max(1);
    assert!(inverse_sums.len() == d_logps.len() && d_x.len() == x.len());
    let vocab = w.len() / width;
    let _span = span(if d_w.is_some() { 2 } else { 1 }, x, vocab);
    match excess {
        Excess::F32(excess) => linear::backward_input(Precision::F32, excess, w, d_x, width),
        Excess::Bf16(excess) => linear::backward_input(Precision::Bf16, excess, w, d_x, width),
    }
    // the factor of a row's derivatives comes to what is narrow
    let scaled_by_row = |rows: &mut [f32]| {
        let factors = d_logps.par_iter().zip(inverse_sums).map(|(d, inverse_sum)| -d * inverse_sum);
        rows.par_chunks_mut(width).zip(factors).for_each(|(row, factor)| row.iter_mut().for_each(|x| *x *= factor));
    };
    scaled_by_row(d_x);
    let Some(d_w) = d_w else { return };
    let mut scaled = x.to_vec();
    scaled_by_row(&mut scaled);
    match excess {
        Excess::F32(excess) => linear::backward_weight(Precision::F32, excess, &scaled, d_w, width),
        Excess::Bf16(excess) => linear::backward_weight(Precision::Bf16, excess, &scaled, d_w, width),
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
        forward(Precision::F32, Head { rows: x, weights: w }, targets, &mut Vec::new(), None).0
    }

    #[test]
    fn log_probabilities_and_gradients() {
        let (width, vocab, targets) = (5, 19, [3u32, 0, 18]);
        let (x, w, d) = (random(3 * width, 1), random(vocab * width, 2), random(3, 3));
        // probabilities of all tokens sum to one
        let total: f64 = (0..vocab as u32).map(|t| f64::from(logps(&x[..width], &w, &[t])[0]).exp()).sum();
        assert!((total - 1.0).abs() < 1e-5);
        let mut logits = Vec::new();
        let head = Head { rows: &x, weights: &w };
        let (_, inverse_sums) = forward(Precision::F32, head, &targets, &mut logits, None);
        let softmax = Softmax { excess: Excess::F32(&logits), inverse_sums: &inverse_sums };
        let (mut d_x, mut d_w) = (vec![0.0; x.len()], vec![0.0; w.len()]);
        backward(head, &d, softmax, &mut d_x, Some(&mut d_w));
        check(&x, &d_x, &d, |x| logps(x, &w, &targets));
        check(&w, &d_w, &d, |w| logps(&x, w, &targets));
        let mut frozen = vec![0.0; x.len()];
        backward(head, &d, softmax, &mut frozen, None);
        assert_eq!(frozen, d_x);
    }

    /// Rounding has the last word in each number alone: a likely target, whose derivative is small, keeps its digits.
    #[test]
    fn in_bf16_log_probabilities_are_of_unrounded_logits_and_derivatives_are_rounded_once() {
        let (width, vocab) = (8, 40);
        let chunk = chunk_rows(vocab);
        let (rows, mut w) = (chunk + 3, random(vocab * width, 2));
        linear::bf16::round(&mut w);
        let mut x = random(rows * width, 1);
        // the first rows are sure of token 7
        x[..5 * width].copy_from_slice(&w[7 * width..8 * width].repeat(5));
        x[..5 * width].iter_mut().for_each(|x| *x *= 8.0);
        linear::bf16::round(&mut x);
        let targets: Vec<u32> = (0..rows).map(|i| if i < 5 { 7 } else { i as u32 % 40 }).collect();
        let head = Head { rows: &x, weights: &w };
        let (mut exact, mut logits, mut rounded) = (Vec::new(), Vec::new(), Vec::new());
        let (expected, _) = forward(Precision::F32, head, &targets, &mut exact, None);
        let (logps, inverse_sums) = forward(Precision::Bf16, head, &targets, &mut logits, Some(&mut rounded));
        assert_eq!(forward(Precision::Bf16, head, &targets, &mut logits, None), (logps.clone(), inverse_sums.clone()));
        assert!(logps.iter().zip(&expected).all(|(l, e)| (l - e).abs() < 2e-6), "factors are exact in both");
        assert!(logps[..5].iter().all(|&l| l > -0.1) && logits.len() < exact.len());
        let close = |r: &bf16, e: &f32| (r.to_f32() - e).abs() <= e.abs() / 256.0 + 1e-6;
        assert!(rounded.len() == exact.len() && rounded.iter().zip(&exact).all(|(r, e)| close(r, e)));

        let d = random(rows, 3);
        let run = |excess| {
            let (mut d_x, mut d_w) = (vec![0.0; x.len()], vec![0.0; w.len()]);
            backward(head, &d, Softmax { excess, inverse_sums: &inverse_sums }, &mut d_x, Some(&mut d_w));
            (d_x, d_w)
        };
        let (f32s, bf16s) = (run(Excess::F32(&exact)), run(Excess::Bf16(&rounded)));
        for (exact, rounded) in [(&f32s.0, &bf16s.0), (&f32s.1, &bf16s.1)] {
            let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
            let difference = norm(&mut exact.iter().zip(rounded).map(|(e, r)| e - r));
            assert!(difference < 0.004 * norm(&mut exact.iter().copied()), "{difference}");
        }
        let sure = |d_x: &[f32]| d_x[..5 * width].to_vec();
        let largest = sure(&f32s.0).iter().fold(0f32, |m, d| m.max(d.abs()));
        assert!(sure(&f32s.0).iter().zip(sure(&bf16s.0)).all(|(e, r)| (e - r).abs() < 0.01 * largest), "{largest}");
    }

    #[test]
    fn what_is_kept_comes_first_and_the_rest_in_chunks() {
        let cut = |rows, kept| cut(rows, kept, 49_152).collect::<Vec<_>>();
        let kept = |rows| kept_rows(true, rows, 49_152);
        assert_eq!((kept(5), kept(5_000), kept_rows(false, 5_000, 49_152)), (5, 1365, 682));
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
