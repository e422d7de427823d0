//! Attention of one row of each sequence, as in generation: what limits it is reading keys and values.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::{Heads, Prefix, Span};
use crate::ops::simd::{dispatch, exp_sum, max};

/// Query heads, and vectors of a value, that are summed together: with the vectors of a value 20 of 32 registers.
const TOGETHER: usize = 4;
const VECTORS: usize = 4;

/// Whether every row is the only one of a sequence whose keys and values are cached, in order, in heads of a usual width.
pub(super) fn applies_to(heads: Heads, spans: &[Span<'_>]) -> bool {
    let alone =
        |(row, span): (usize, &Span<'_>)| span.rows == (row..row + 1) && matches!(span.prefix, Prefix::Cache { .. });
    matches!(heads.dim, 32 | 64 | 96 | 128) && spans.iter().enumerate().all(alone)
}

/// As [`super::forward`], for spans of which [`applies_to`] is true.
pub(super) fn forward(qkv: &[f32], heads: Heads, spans: &[Span<'_>], out: &mut [f32], lse: &mut [f32]) {
    match heads.dim {
        32 => forward_of::<32>(qkv, heads, spans, out, lse),
        64 => forward_of::<64>(qkv, heads, spans, out, lse),
        96 => forward_of::<96>(qkv, heads, spans, out, lse),
        128 => forward_of::<128>(qkv, heads, spans, out, lse),
        dim => unreachable!("heads of width {dim}"),
    }
}

/// As [`forward`], for heads of width `D`. The query heads that share keys and values read them together.
fn forward_of<const D: usize>(qkv: &[f32], heads: Heads, spans: &[Span<'_>], out: &mut [f32], lse: &mut [f32]) {
    let shared = heads.query / heads.key_value;
    let tasks = out.par_chunks_exact_mut(shared * D).zip(lse.par_chunks_exact_mut(shared)).enumerate();
    tasks.for_each_init(Vec::new, |scores: &mut Vec<f32>, (task, (out, lse))| {
        let (row, head) = (task / heads.key_value, task % heads.key_value);
        let Prefix::Cache { keys, values } = &spans[row].prefix else { return };
        let row = qkv[row * heads.qkv_width()..(row + 1) * heads.qkv_width()].as_chunks::<D>().0;
        let (queries, own) = row.split_at(heads.query);
        let (own_keys, own_values) = own.split_at(heads.key_value);
        let queries = &queries[head * shared..][..shared];
        let [keys, values] = [keys, values].map(|of_heads| of_heads[head].as_chunks::<D>().0);
        let tokens = keys.len() + 1;
        scores.resize(shared * tokens, 0.0);
        let (arch, out) = (pulp::Arch::new(), out.as_chunks_mut::<D>().0);
        for (keys, first) in [(keys, 0), (&own_keys[head..=head], tokens - 1)] {
            arch.dispatch(Dots { queries, keys, scores, tokens, first });
        }
        dispatch(
            #[inline(always)]
            || {
                for (weights, lse) in scores.chunks_exact_mut(tokens).zip(lse) {
                    let highest = max(weights) * heads.scale();
                    let sum = exp_sum(weights, heads.scale(), highest);
                    *lse = highest + sum.ln();
                    let inverse = 1.0 / sum;
                    weights.iter_mut().for_each(|weight| *weight *= inverse);
                }
            },
        );
        out.fill([0.0; D]);
        for (values, first) in [(values, 0), (&own_values[head..=head], tokens - 1)] {
            for (weights, out) in scores.chunks(TOGETHER * tokens).zip(out.chunks_mut(TOGETHER)) {
                arch.dispatch(AddWeighted { weights, tokens, first, values, out });
            }
        }
    });
}

/// Writes the products of every query with the keys to `scores` `[queries, tokens]`, from token `first` on.
struct Dots<'a, const D: usize> {
    queries: &'a [[f32; D]],
    keys: &'a [[f32; D]],
    scores: &'a mut [f32],
    tokens: usize,
    first: usize,
}

// by the vectors of `pulp`: of a sum over an array of lanes the compiler makes code that takes longer than the products
impl<const D: usize> WithSimd for Dots<'_, D> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for (token, key) in (self.first..).zip(self.keys) {
            let key = S::as_simd_f32s(key).0;
            for (query, scores) in self.queries.iter().zip(self.scores.chunks_exact_mut(self.tokens)) {
                let mut sum = simd.splat_f32s(0.0);
                for (q, k) in S::as_simd_f32s(query).0.iter().zip(key) {
                    sum = simd.mul_add_e_f32s(*q, *k, sum);
                }
                scores[token] = simd.reduce_sum_f32s(sum);
            }
        }
    }
}

/// out `[queries, D]` += Σ weight·value of the tokens from `first` on, for up to [`TOGETHER`] queries. weights `[queries, tokens]`.
struct AddWeighted<'a, const D: usize> {
    weights: &'a [f32],
    tokens: usize,
    first: usize,
    values: &'a [[f32; D]],
    out: &'a mut [[f32; D]],
}

impl<const D: usize> WithSimd for AddWeighted<'_, D> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match self.out.len() {
            1 => self.add::<S, 1>(simd),
            2 => self.add::<S, 2>(simd),
            3 => self.add::<S, 3>(simd),
            TOGETHER => self.add::<S, TOGETHER>(simd),
            count => unreachable!("{count} queries at a time"),
        }
    }
}

impl<const D: usize> AddWeighted<'_, D> {
    /// For `Q` queries.
    #[inline(always)]
    fn add<S: Simd, const Q: usize>(mut self, simd: S) {
        // as many columns as stay in registers from one token to the next
        let vectors = D / S::F32_LANES;
        let whole = vectors / VECTORS * VECTORS;
        (0..whole).step_by(VECTORS).for_each(|at| self.add_columns::<S, Q, VECTORS>(simd, at));
        // widths divide into pairs of vectors of every size
        (whole..vectors).step_by(2).for_each(|at| self.add_columns::<S, Q, 2>(simd, at));
    }

    /// For the columns of `N` vectors from vector `at` on.
    #[inline(always)]
    fn add_columns<S: Simd, const Q: usize, const N: usize>(&mut self, simd: S, at: usize) {
        let mut sums = [[simd.splat_f32s(0.0); N]; Q];
        for (sums, out) in sums.iter_mut().zip(&*self.out) {
            sums.copy_from_slice(&S::as_simd_f32s(out).0[at..at + N]);
        }
        let weights: [&[f32]; Q] = std::array::from_fn(|query| &self.weights[query * self.tokens + self.first..]);
        for (token, value) in self.values.iter().enumerate() {
            let value = &S::as_simd_f32s(value).0[at..at + N];
            for (sums, weights) in sums.iter_mut().zip(weights) {
                let weight = simd.splat_f32s(weights[token]);
                for (sum, value) in sums.iter_mut().zip(value) {
                    *sum = simd.mul_add_e_f32s(weight, *value, *sum);
                }
            }
        }
        for (sums, out) in sums.iter().zip(&mut *self.out) {
            S::as_mut_simd_f32s(out).0[at..at + N].copy_from_slice(sums);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Span, of_rows};
    use super::*;
    use crate::ops::finite_difference::random;
    use crate::precision::Precision;

    #[test]
    fn a_row_by_itself_is_that_of_the_general_attention() {
        for (query, key_value, dim) in [(6, 2, 32), (3, 3, 64), (10, 2, 96), (4, 2, 128)] {
            let heads = Heads { query, key_value, dim };
            let lengths = [0usize, 1, 70, 333];
            let qkv = random(lengths.len() * heads.qkv_width(), 1);
            let of_heads = |n: usize, seed: u64| -> Vec<Vec<f32>> {
                (0..heads.key_value).map(|head| random(n * heads.dim, seed + 7 * head as u64)).collect()
            };
            let caches = lengths.map(|n| [of_heads(n, n as u64 + 2), of_heads(n, n as u64 + 3)]);
            let span = |row: usize, first: usize| Span {
                rows: first..first + 1,
                prefix: Prefix::Cache { keys: &caches[row][0], values: &caches[row][1] },
            };
            let spans: Vec<Span<'_>> = (0..lengths.len()).map(|row| span(row, row)).collect();
            assert!(applies_to(heads, &spans) && !applies_to(heads, &[span(0, 1)]));
            let mut out = vec![0.0; lengths.len() * heads.query_width()];
            let mut lse = vec![0.0; lengths.len() * heads.query];
            forward(&qkv, heads, &spans, &mut out, &mut lse);
            for row in 0..lengths.len() {
                // a row of zeros before it, which the general attention is not short-cut for
                let both = [vec![0.0; heads.qkv_width()], qkv[row * heads.qkv_width()..][..heads.qkv_width()].to_vec()];
                let spans = [Span { rows: 0..1, prefix: Prefix::Rows([0..0, 0..0]) }, span(row, 1)];
                let (mut general, mut general_lse) = (vec![0.0; 2 * heads.query_width()], vec![0.0; 2 * heads.query]);
                of_rows(Precision::F32, &both.concat(), heads, &spans, &mut general, &mut general_lse);
                let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
                assert!(close(
                    &general[heads.query_width()..],
                    &out[row * heads.query_width()..][..heads.query_width()]
                ));
                assert!(close(&general_lse[heads.query..], &lse[row * heads.query..][..heads.query]));
            }
        }
    }
}
