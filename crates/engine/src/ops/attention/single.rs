//! Attention of one row of each sequence, as in generation: what limits it is reading keys and values, so each is read
//! once for all query heads that share it.

use rayon::prelude::*;

use super::{Heads, Prefix, Span};
use crate::ops::simd::{dispatch, dot, exp_sum, max};

/// Whether every row is the only one of a sequence whose keys and values are cached, in order.
pub(super) fn applies_to(spans: &[Span<'_>]) -> bool {
    spans
        .iter()
        .enumerate()
        .all(|(row, span)| span.rows == (row..row + 1) && matches!(span.prefix, Prefix::Cache { .. }))
}

/// As [`super::forward`], for spans of which [`applies_to`] is true.
pub(super) fn forward(qkv: &[f32], heads: Heads, spans: &[Span<'_>], out: &mut [f32], lse: &mut [f32]) {
    let (dim, shared) = (heads.dim, heads.query / heads.key_value);
    let tasks = out.par_chunks_exact_mut(shared * dim).zip(lse.par_chunks_exact_mut(shared)).enumerate();
    tasks.for_each_init(Vec::new, |scores: &mut Vec<f32>, (task, (out, lse))| {
        let (row, head) = (task / heads.key_value, task % heads.key_value);
        let Prefix::Cache { keys, values } = &spans[row].prefix else { return };
        let row = &qkv[row * heads.qkv_width()..(row + 1) * heads.qkv_width()];
        let queries = &row[head * shared * dim..(head + 1) * shared * dim];
        let [own_key, own_value] = [0, 1].map(|part| {
            let start = heads.query_width() + part * heads.key_value_width() + head * dim;
            &row[start..start + dim]
        });
        let tokens = keys.len() / heads.key_value_width() + 1;
        scores.resize(shared * tokens, 0.0);
        dispatch(
            #[inline(always)]
            || {
                for (token, key) in of_head(keys, heads, head).chain([own_key]).enumerate() {
                    for (query, scores) in queries.chunks_exact(dim).zip(scores.chunks_exact_mut(tokens)) {
                        scores[token] = dot(query, key);
                    }
                }
                for (scores, lse) in scores.chunks_exact_mut(tokens).zip(lse.iter_mut()) {
                    let highest = max(scores) * heads.scale();
                    let sum = exp_sum(scores, heads.scale(), highest);
                    *lse = highest + sum.ln();
                    let inverse = 1.0 / sum;
                    scores.iter_mut().for_each(|score| *score *= inverse);
                }
                out.fill(0.0);
                for (token, value) in of_head(values, heads, head).chain([own_value]).enumerate() {
                    for (out, scores) in out.chunks_exact_mut(dim).zip(scores.chunks_exact(tokens)) {
                        for (out, value) in out.iter_mut().zip(value) {
                            *out = scores[token].mul_add(*value, *out);
                        }
                    }
                }
            },
        );
    });
}

/// One head of each cached token.
#[inline(always)]
fn of_head(cached: &[f32], heads: Heads, head: usize) -> impl Iterator<Item = &[f32]> {
    let tokens = cached.chunks_exact(heads.key_value_width());
    tokens.map(move |token| &token[head * heads.dim..(head + 1) * heads.dim])
}

#[cfg(test)]
mod tests {
    use super::super::{Span, forward as of_any};
    use super::*;
    use crate::ops::finite_difference::random;

    #[test]
    fn a_row_by_itself_is_that_of_the_general_attention() {
        for heads in [Heads { query: 6, key_value: 2, dim: 20 }, Heads { query: 3, key_value: 3, dim: 64 }] {
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
            assert!(applies_to(&spans) && !applies_to(&[span(0, 1)]));
            let mut out = vec![0.0; lengths.len() * heads.query_width()];
            let mut lse = vec![0.0; lengths.len() * heads.query];
            forward(&qkv, heads, &spans, &mut out, &mut lse);
            for row in 0..lengths.len() {
                // a row of zeros before it, which the general attention is not short-cut for
                let both = [vec![0.0; heads.qkv_width()], qkv[row * heads.qkv_width()..][..heads.qkv_width()].to_vec()];
                let spans = [Span { rows: 0..1, prefix: Prefix::None }, span(row, 1)];
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
