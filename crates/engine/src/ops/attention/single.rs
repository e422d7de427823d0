//! Attention of one row of each sequence, as in generation: what limits it is reading keys and values.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::{Heads, Prefix, Span};
use crate::ops::simd::{dispatch, exp_sum, max};

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

/// As [`forward`], for heads of width `D`.
fn forward_of<const D: usize>(qkv: &[f32], heads: Heads, spans: &[Span<'_>], out: &mut [f32], lse: &mut [f32]) {
    let shared = heads.query / heads.key_value;
    // all heads of a row together read its cache from one end to the other; of few rows each head is by itself, so that every
    // thread has work
    let (queries, shared) =
        if spans.len() >= 2 * rayon::current_num_threads() { (heads.query, shared) } else { (1, 1) };
    let parts = heads.query / queries;
    let tasks = out.par_chunks_exact_mut(queries * D).zip(lse.par_chunks_exact_mut(queries)).enumerate();
    tasks.for_each_init(Vec::new, |scores: &mut Vec<f32>, (task, (out, lse))| {
        let (row, first) = (task / parts, task % parts * queries);
        let Prefix::Cache { keys, values } = &spans[row].prefix else { return };
        let row = &qkv[row * heads.qkv_width()..(row + 1) * heads.qkv_width()];
        let queries = row[first * D..][..out.len()].as_chunks::<D>().0;
        let offset = first / (heads.query / heads.key_value) * D;
        let (own_keys, own_values) = row[heads.query_width()..].split_at(heads.key_value_width());
        let tokens = keys.len() / heads.key_value_width() + 1;
        scores.resize(lse.len() * tokens, 0.0);
        let of_heads = |rows| OfHeads { rows, width: heads.key_value_width(), offset, shared };
        let (arch, out) = (pulp::Arch::new(), out.as_chunks_mut::<D>().0);
        for (keys, first) in [(*keys, 0), (own_keys, tokens - 1)] {
            arch.dispatch(Dots { queries, keys: of_heads(keys), scores, tokens, first });
        }
        dispatch(
            #[inline(always)]
            || {
                for (scores, lse) in scores.chunks_exact_mut(tokens).zip(lse) {
                    let highest = max(scores) * heads.scale();
                    let sum = exp_sum(scores, heads.scale(), highest);
                    *lse = highest + sum.ln();
                    let inverse = 1.0 / sum;
                    scores.iter_mut().for_each(|score| *score *= inverse);
                }
                out.fill([0.0; D]);
                for (values, first) in [(*values, 0), (own_values, tokens - 1)] {
                    add_weighted(scores, tokens, first, of_heads(values), out);
                }
            },
        );
    });
}

/// Keys or values of some heads, in rows of all heads.
struct OfHeads<'a> {
    rows: &'a [f32],
    width: usize,
    /// Where the first of the heads starts in each row.
    offset: usize,
    /// Query heads for each of them.
    shared: usize,
}

/// Writes the products of every query with the keys of its head to `scores` `[queries, tokens]`, from token `first` on.
struct Dots<'a, const D: usize> {
    queries: &'a [[f32; D]],
    keys: OfHeads<'a>,
    scores: &'a mut [f32],
    tokens: usize,
    first: usize,
}

// by the vectors of `pulp`: of a sum over an array of lanes the compiler makes code that takes longer than the products
impl<const D: usize> WithSimd for Dots<'_, D> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let OfHeads { rows, width, offset, shared } = self.keys;
        for (token, row) in rows.chunks_exact(width).enumerate() {
            let keys = row[offset..].as_chunks::<D>().0;
            for (head, (queries, key)) in self.queries.chunks_exact(shared).zip(keys).enumerate() {
                let key = S::as_simd_f32s(key).0;
                for (index, query) in queries.iter().enumerate() {
                    let mut sum = simd.splat_f32s(0.0);
                    for (q, k) in S::as_simd_f32s(query).0.iter().zip(key) {
                        sum = simd.mul_add_e_f32s(*q, *k, sum);
                    }
                    self.scores[(head * shared + index) * self.tokens + self.first + token] = simd.reduce_sum_f32s(sum);
                }
            }
        }
    }
}

/// out `[queries, D]` += Σ weight·value of the tokens from `first` on. weights `[queries, tokens]`.
#[inline(always)]
fn add_weighted<const D: usize>(
    weights: &[f32],
    tokens: usize,
    first: usize,
    values: OfHeads<'_>,
    out: &mut [[f32; D]],
) {
    let OfHeads { rows, width, offset, shared } = values;
    for (token, row) in rows.chunks_exact(width).enumerate() {
        let values = row[offset..].as_chunks::<D>().0;
        for (head, (out, value)) in out.chunks_exact_mut(shared).zip(values).enumerate() {
            for (index, out) in out.iter_mut().enumerate() {
                let weight = weights[(head * shared + index) * tokens + first + token];
                for j in 0..D {
                    out[j] = weight.mul_add(value[j], out[j]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Span, forward as of_any};
    use super::*;
    use crate::ops::finite_difference::random;

    #[test]
    fn a_row_by_itself_is_that_of_the_general_attention() {
        for heads in [Heads { query: 6, key_value: 2, dim: 32 }, Heads { query: 3, key_value: 3, dim: 64 }] {
            let width = heads.key_value_width();
            let lengths = [0usize, 1, 70, 333];
            let qkv = random(lengths.len() * heads.qkv_width(), 1);
            let caches: Vec<[Vec<f32>; 2]> =
                lengths.map(|n| [random(n * width, n as u64 + 2), random(n * width, n as u64 + 3)]).into();
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
                of_any(&both.concat(), heads, &spans, &mut general, &mut general_lse);
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
