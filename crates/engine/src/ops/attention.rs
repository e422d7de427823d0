//! Causal attention over packed segments, with grouped key and value heads (arXiv 2305.13245).
//!
//! Each span of rows attends to an optional prefix (the prompt that it continues, or cached keys and
//! values) and causally to itself. Scores exist for one tile of rows at a time; the backward pass
//! computes them again from the log-sum-exp of each row (arXiv 2205.14135).
#![allow(unsafe_code)]

use std::ops::Range;

use gemm::Parallelism;
use rayon::prelude::*;

use super::linear::{Matrix, multiply};
use super::simd::{dispatch, dot, exp_sum, max};
use crate::config::ModelConfig;
use crate::profile::{self, Stage, Work};

mod single;

/// Query rows per tile.
const TILE: usize = 64;

/// Numbers of heads, and their width.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    /// Query heads.
    pub(crate) query: usize,
    /// Key and value heads; divides `query`.
    pub(crate) key_value: usize,
    /// Width of one head.
    pub(crate) dim: usize,
}

impl Heads {
    /// Those of a model.
    pub(crate) fn new(config: &ModelConfig) -> Self {
        Self { query: config.num_attention_heads, key_value: config.num_key_value_heads, dim: config.head_dim }
    }

    /// Width of the queries of a row, and of the output.
    pub(crate) fn query_width(&self) -> usize {
        self.query * self.dim
    }

    /// Width of the keys (and of the values) of a row.
    pub(crate) fn key_value_width(&self) -> usize {
        self.key_value * self.dim
    }

    /// Width of a row that holds queries, keys and values.
    pub(crate) fn qkv_width(&self) -> usize {
        self.query_width() + 2 * self.key_value_width()
    }

    fn scale(&self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }
}

/// What the rows of a span attend to besides themselves.
#[derive(Debug, Clone)]
pub(crate) enum Prefix<'a> {
    /// Nothing.
    None,
    /// Other rows of the same batch.
    Rows(Range<usize>),
    /// Keys and values of earlier tokens, each `[tokens, key_value_width]`.
    Cache {
        /// Rotated keys.
        keys: &'a [f32],
        /// Values.
        values: &'a [f32],
    },
}

/// Rows that form one causal sequence after their prefix.
#[derive(Debug, Clone)]
pub(crate) struct Span<'a> {
    /// The rows.
    pub(crate) rows: Range<usize>,
    /// What comes before them.
    pub(crate) prefix: Prefix<'a>,
}

/// Shared mutable memory whose users write to disjoint places.
#[derive(Clone, Copy)]
struct Shared(*mut f32);
// SAFETY: the pointer is only used inside `forward` and `backward`, whose tasks write to disjoint
// elements (each function argues so) while the borrowed slice it came from is alive.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    fn at(self, offset: usize) -> *mut f32 {
        self.0.wrapping_add(offset)
    }
}

/// Keys and values of consecutive tokens for one head.
#[derive(Clone, Copy)]
struct KeysValues {
    keys: Matrix,
    values: Matrix,
    tokens: usize,
}

/// The two runs of tokens that a span's head attends to: its prefix (may be empty) and itself.
fn sources(qkv: &[f32], heads: Heads, span: &Span, head: usize) -> [KeysValues; 2] {
    let width = heads.qkv_width();
    let key_column = heads.query_width() + head * heads.dim;
    let value_column = key_column + heads.key_value_width();
    let within = |rows: &Range<usize>| {
        assert!(rows.start <= rows.end && rows.end * width <= qkv.len(), "a span reaches beyond the batch");
        let start = qkv.as_ptr().wrapping_add(rows.start * width);
        KeysValues {
            keys: Matrix::rows(start.wrapping_add(key_column), width),
            values: Matrix::rows(start.wrapping_add(value_column), width),
            tokens: rows.len(),
        }
    };
    let prefix = match &span.prefix {
        Prefix::None => within(&(0..0)),
        Prefix::Rows(rows) => within(rows),
        Prefix::Cache { keys, values } => {
            let width = heads.key_value_width();
            assert_eq!(keys.len(), values.len());
            KeysValues {
                keys: Matrix::rows(keys.as_ptr().wrapping_add(head * heads.dim), width),
                values: Matrix::rows(values.as_ptr().wrapping_add(head * heads.dim), width),
                tokens: keys.len() / width,
            }
        }
    };
    [prefix, within(&span.rows)]
}

/// scores = q·kᵀ for `rows` query rows against the prefix and the first `own` tokens of the span.
///
/// # Safety
/// `q` and the matrices of `sources` must be valid to read, `scores` valid to write for `rows` rows of
/// prefix + own columns, and no other thread may use it meanwhile.
unsafe fn score_tile(q: Matrix, rows: usize, sources: &[KeysValues; 2], own: usize, dim: usize, scores: *mut f32) {
    let prefix = sources[0].tokens;
    for (source, tokens, column) in [(&sources[0], prefix, 0), (&sources[1], own, prefix)] {
        if tokens > 0 {
            // SAFETY: the caller's promise; the two calls write to disjoint columns.
            unsafe {
                let out = scores.add(column);
                let shape = [rows, tokens, dim];
                multiply(shape, q, source.keys.transposed(), out, prefix + own, 1.0, false, Parallelism::None);
            }
        }
    }
}

/// Attention of every span.
///
/// qkv `[n, qkv_width]` with rotated queries and keys; out `[n, query_width]`; lse `[n, query heads]`
/// keeps the log-sum-exp of each row's scaled scores for the backward pass.
pub(crate) fn forward(qkv: &[f32], heads: Heads, spans: &[Span], out: &mut [f32], lse: &mut [f32]) {
    let _span = profile::span(Stage::Attention, || Work::Flops(flops(heads, spans)));
    let (width, out_width, dim) = (heads.qkv_width(), heads.query_width(), heads.dim);
    let n = qkv.len() / width;
    assert!(qkv.len() == n * width && out.len() == n * out_width && lse.len() == n * heads.query);
    check(heads, spans);
    if single::applies_to(heads, spans) {
        return single::forward(qkv, heads, spans, out, lse);
    }
    let (out, lse) = (Shared(out.as_mut_ptr()), Shared(lse.as_mut_ptr()));
    let tasks: Vec<(&Span, usize)> = spans.iter().flat_map(|s| (0..heads.query).map(move |h| (s, h))).collect();
    tasks.into_par_iter().for_each_init(Vec::new, |scores: &mut Vec<f32>, (span, head)| {
        let sources = sources(qkv, heads, span, head / (heads.query / heads.key_value));
        let prefix = sources[0].tokens;
        for first in (0..span.rows.len()).step_by(TILE) {
            let rows = TILE.min(span.rows.len() - first);
            let own = first + rows;
            let columns = prefix + own;
            if scores.len() < rows * columns {
                scores.resize(rows * columns, 0.0);
            }
            let row = span.rows.start + first;
            let q = Matrix::rows(qkv.as_ptr().wrapping_add(row * width + head * dim), width);
            // SAFETY: `q` and the sources lie inside `qkv` or the caches (checked in `sources`); `scores`
            // was sized above and belongs to this task.
            unsafe { score_tile(q, rows, &sources, own, dim, scores.as_mut_ptr()) };
            let mut inverse_sums = [0f32; TILE];
            dispatch(
                #[inline(always)]
                || {
                    for (r, scores) in scores[..rows * columns].chunks_exact_mut(columns).enumerate() {
                        let (seen, hidden) = scores.split_at_mut(prefix + first + r + 1);
                        let highest = max(seen) * heads.scale();
                        let sum = exp_sum(seen, heads.scale(), highest);
                        hidden.fill(0.0);
                        inverse_sums[r] = 1.0 / sum;
                        // SAFETY: this (row, head) belongs to this task alone.
                        unsafe { *lse.at((row + r) * heads.query + head) = highest + sum.ln() };
                    }
                },
            );
            let target = out.at(row * out_width + head * dim);
            for (source, tokens, column) in [(&sources[0], prefix, 0), (&sources[1], own, prefix)] {
                if tokens > 0 {
                    let p = Matrix::rows(scores.as_ptr().wrapping_add(column), columns);
                    let add = column > 0;
                    // SAFETY: sources as above; the rows of this span and the columns of this head of
                    // `out` belong to this task alone.
                    unsafe {
                        let shape = [rows, dim, tokens];
                        multiply(shape, p, source.values, target, out_width, 1.0, add, Parallelism::None);
                    }
                }
            }
            for (r, inverse) in inverse_sums[..rows].iter().enumerate() {
                // SAFETY: as above.
                let out = unsafe { std::slice::from_raw_parts_mut(out.at((row + r) * out_width + head * dim), dim) };
                out.iter_mut().for_each(|o| *o *= inverse);
            }
        }
    });
}

/// The gradient of [`forward`]: d_qkv is overwritten with the gradient with respect to qkv.
///
/// Spans must come in groups: one without prefix, then those that have exactly its rows as their prefix.
///
/// # Panics
/// If the spans are not grouped so, or have a cache as their prefix.
pub(crate) fn backward(
    qkv: &[f32],
    heads: Heads,
    spans: &[Span],
    out: &[f32],
    lse: &[f32],
    d_out: &[f32],
    d_qkv: &mut [f32],
) {
    let _span = profile::span(Stage::AttentionBackward, || Work::Flops(2.0 * flops(heads, spans)));
    let n = qkv.len() / heads.qkv_width();
    assert!(qkv.len() == n * heads.qkv_width() && d_qkv.len() == qkv.len() && lse.len() == n * heads.query);
    assert!(out.len() == n * heads.query_width() && d_out.len() == out.len());
    check(heads, spans);
    d_qkv.par_chunks_mut(1 << 16).for_each(|d| d.fill(0.0));
    let pass = Backward { qkv, heads, out, lse, d_out, d_qkv: Shared(d_qkv.as_mut_ptr()) };
    let tasks: Vec<(&[Span], usize)> =
        groups(spans).into_iter().flat_map(|g| (0..heads.key_value).map(move |h| (g, h))).collect();
    // A group's spans add to the gradients of their common prefix, and query heads to those of their
    // common key head: a task owns both, so that no two tasks write to the same place.
    tasks.into_par_iter().for_each_init(Scratch::default, |scratch, (group, key_head)| {
        let repeats = heads.query / heads.key_value;
        for span in group {
            for head in key_head * repeats..(key_head + 1) * repeats {
                pass.span(span, head, key_head, scratch);
            }
        }
    });
}

/// Floating-point operations of the products of a forward pass: of every row's queries with the keys that it attends to, its own
/// included, and of the weights with the values. The gradients need twice as many.
pub(crate) fn flops(heads: Heads, spans: &[Span]) -> f64 {
    let attended = |span: &Span| {
        let (rows, prefix) = (
            span.rows.len(),
            match &span.prefix {
                Prefix::None => 0,
                Prefix::Rows(rows) => rows.len(),
                Prefix::Cache { keys, .. } => keys.len() / heads.key_value_width(),
            },
        );
        rows * prefix + rows * (rows + 1) / 2
    };
    4.0 * (heads.query_width() * spans.iter().map(attended).sum::<usize>()) as f64
}

/// Checks what the tasks rely on: that heads divide, and that no row is in two spans.
fn check(heads: Heads, spans: &[Span]) {
    assert!(heads.query.is_multiple_of(heads.key_value), "query heads are not a multiple of key and value heads");
    assert!(spans.is_sorted_by(|a, b| a.rows.end <= b.rows.start), "spans overlap or are out of order");
}

/// Cuts the spans where one starts that has no prefix.
fn groups<'s, 'a>(spans: &'s [Span<'a>]) -> Vec<&'s [Span<'a>]> {
    let groups: Vec<_> = spans.chunk_by(|_, next| !matches!(next.prefix, Prefix::None)).collect();
    for group in &groups {
        let first = &group[0];
        assert!(matches!(first.prefix, Prefix::None), "the first span of a batch has a prefix");
        let continues = |s: &Span| matches!(&s.prefix, Prefix::Rows(rows) if *rows == first.rows);
        assert!(group[1..].iter().all(continues), "a span's prefix is not the span that its group starts with");
    }
    groups
}

/// Scores and their gradients for one tile.
#[derive(Default)]
struct Scratch {
    p: Vec<f32>,
    ds: Vec<f32>,
}

struct Backward<'a> {
    qkv: &'a [f32],
    heads: Heads,
    out: &'a [f32],
    lse: &'a [f32],
    d_out: &'a [f32],
    d_qkv: Shared,
}

impl Backward<'_> {
    /// Adds the gradient of one span and head to d_qkv.
    fn span(&self, span: &Span, head: usize, key_head: usize, scratch: &mut Scratch) {
        let heads = self.heads;
        let (width, out_width, dim) = (heads.qkv_width(), heads.query_width(), heads.dim);
        let sources = sources(self.qkv, heads, span, key_head);
        let prefix = sources[0].tokens;
        let prefix_row = if let Prefix::Rows(rows) = &span.prefix { rows.start } else { 0 };
        let key_column = heads.query_width() + key_head * dim;
        let value_column = key_column + heads.key_value_width();
        for first in (0..span.rows.len()).step_by(TILE) {
            let rows = TILE.min(span.rows.len() - first);
            let own = first + rows;
            let columns = prefix + own;
            for buffer in [&mut scratch.p, &mut scratch.ds] {
                if buffer.len() < rows * columns {
                    buffer.resize(rows * columns, 0.0);
                }
            }
            let row = span.rows.start + first;
            let q = Matrix::rows(self.qkv.as_ptr().wrapping_add(row * width + head * dim), width);
            let d_out = Matrix::rows(self.d_out.as_ptr().wrapping_add(row * out_width + head * dim), out_width);
            let as_keys = |s: KeysValues| KeysValues { keys: s.values, ..s };
            // SAFETY: sources, q and d_out lie inside their slices; p and ds were sized above and belong
            // to this task.
            unsafe {
                score_tile(q, rows, &sources, own, dim, scratch.p.as_mut_ptr());
                score_tile(d_out, rows, &sources.map(as_keys), own, dim, scratch.ds.as_mut_ptr());
            }
            self.softmax_tile(row, rows, head, prefix + first, columns, scratch);
            let (p, ds) = (scratch.p.as_ptr(), scratch.ds.as_ptr());
            let parts = [(&sources[0], prefix, 0, prefix_row), (&sources[1], own, prefix, span.rows.start)];
            for (source, tokens, column, key_row) in parts {
                if tokens == 0 {
                    continue;
                }
                let p = Matrix::rows(p.wrapping_add(column), columns);
                let ds = Matrix::rows(ds.wrapping_add(column), columns);
                let scale = heads.scale();
                let dq = self.d_qkv.at(row * width + head * dim);
                let dk = self.d_qkv.at(key_row * width + key_column);
                let dv = self.d_qkv.at(key_row * width + value_column);
                // SAFETY: reads as above. The rows of this group (prefix and span) in the columns of this
                // key head and of its query heads are written by this task alone.
                unsafe {
                    multiply([rows, dim, tokens], ds, source.keys, dq, width, scale, true, Parallelism::None);
                    multiply([tokens, dim, rows], ds.transposed(), q, dk, width, scale, true, Parallelism::None);
                    multiply([tokens, dim, rows], p.transposed(), d_out, dv, width, 1.0, true, Parallelism::None);
                }
            }
        }
    }

    /// Turns scores into probabilities p, and ds from d_out·vᵀ into the gradient of the scaled scores.
    fn softmax_tile(
        &self,
        row: usize,
        rows: usize,
        head: usize,
        before: usize,
        columns: usize,
        Scratch { p, ds }: &mut Scratch,
    ) {
        let heads = self.heads;
        dispatch(
            #[inline(always)]
            || {
                let tiles = p[..rows * columns].chunks_exact_mut(columns).zip(ds.chunks_exact_mut(columns));
                for (r, (p, ds)) in tiles.enumerate() {
                    let at = (row + r) * heads.query_width() + head * heads.dim;
                    let delta = dot(&self.out[at..at + heads.dim], &self.d_out[at..at + heads.dim]);
                    let (p, p_hidden) = p.split_at_mut(before + r + 1);
                    let (ds, ds_hidden) = ds.split_at_mut(before + r + 1);
                    exp_sum(p, heads.scale(), self.lse[(row + r) * heads.query + head]);
                    for (ds, p) in ds.iter_mut().zip(p) {
                        *ds = *p * (*ds - delta);
                    }
                    p_hidden.fill(0.0);
                    ds_hidden.fill(0.0);
                }
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::finite_difference::{check, random};

    const HEADS: Heads = Heads { query: 4, key_value: 2, dim: 6 };

    fn run(qkv: &[f32], heads: Heads, spans: &[Span]) -> (Vec<f32>, Vec<f32>) {
        let n = qkv.len() / heads.qkv_width();
        let (mut out, mut lse) = (vec![0.0; n * heads.query_width()], vec![0.0; n * heads.query]);
        forward(qkv, heads, spans, &mut out, &mut lse);
        (out, lse)
    }

    fn span(rows: Range<usize>, prefix: Option<Range<usize>>) -> Span<'static> {
        Span { rows, prefix: prefix.map_or(Prefix::None, Prefix::Rows) }
    }

    /// Attention of one row by its definition, in f64.
    fn attend_naively(qkv: &[f32], heads: Heads, row: usize, keys: &[usize]) -> Vec<f64> {
        let width = heads.qkv_width();
        let at = |r: usize, c: usize| f64::from(qkv[r * width + c]);
        let mut out = Vec::new();
        for h in 0..heads.query {
            let k0 = heads.query_width() + h / (heads.query / heads.key_value) * heads.dim;
            let v0 = k0 + heads.key_value_width();
            let score = |k: usize| -> f64 { (0..heads.dim).map(|d| at(row, h * heads.dim + d) * at(k, k0 + d)).sum() };
            let e: Vec<f64> = keys.iter().map(|&k| (score(k) / (heads.dim as f64).sqrt()).exp()).collect();
            let sum: f64 = e.iter().sum();
            out.extend((0..heads.dim).map(|d| keys.iter().zip(&e).map(|(&k, e)| e / sum * at(k, v0 + d)).sum::<f64>()));
        }
        out
    }

    #[test]
    fn equals_the_definition_with_shared_prompts_and_several_tiles() {
        // a prompt of 70 rows with two responses, and a sequence of its own
        let spans = [span(0..70, None), span(70..140, Some(0..70)), span(140..145, Some(0..70)), span(145..150, None)];
        let qkv = random(150 * HEADS.qkv_width(), 1);
        let (out, _) = run(&qkv, HEADS, &spans);
        for (row, keys) in [
            (0, (0..1).collect::<Vec<_>>()),
            (69, (0..70).collect()),
            (139, (0..140).collect()),
            (142, (0..70).chain(140..143).collect()),
            (149, (145..150).collect()),
        ] {
            let expected = attend_naively(&qkv, HEADS, row, &keys);
            let got = &out[row * HEADS.query_width()..][..HEADS.query_width()];
            for (g, e) in got.iter().zip(expected) {
                assert!((f64::from(*g) - e).abs() < 1e-5, "row {row}: {g} instead of {e}");
            }
        }
    }

    #[test]
    fn a_cache_gives_what_the_rows_give() {
        let qkv = random(9 * HEADS.qkv_width(), 3);
        let (whole, _) = run(&qkv, HEADS, &[span(0..9, None)]);
        let (q, kv) = (HEADS.query_width(), HEADS.key_value_width());
        let past: Vec<&[f32]> = qkv.chunks_exact(HEADS.qkv_width()).take(6).collect();
        let keys: Vec<f32> = past.iter().flat_map(|row| row[q..q + kv].to_vec()).collect();
        let values: Vec<f32> = past.iter().flat_map(|row| row[q + kv..].to_vec()).collect();
        let cached = [Span { rows: 0..3, prefix: Prefix::Cache { keys: &keys, values: &values } }];
        let (rest, _) = run(&qkv[6 * HEADS.qkv_width()..], HEADS, &cached);
        assert!(rest.iter().zip(&whole[6 * q..]).all(|(a, b)| (a - b).abs() < 1e-6));
    }

    #[test]
    fn gradient_matches_finite_differences() {
        for (heads, spans) in [
            (HEADS, vec![span(0..3, None), span(3..7, Some(0..3)), span(7..9, Some(0..3)), span(9..11, None)]),
            (Heads { query: 2, key_value: 2, dim: 4 }, vec![span(0..11, None)]),
        ] {
            let qkv = random(11 * heads.qkv_width(), 5);
            let d_out = random(11 * heads.query_width(), 6);
            let (out, lse) = run(&qkv, heads, &spans);
            let mut d_qkv = vec![f32::NAN; qkv.len()];
            backward(&qkv, heads, &spans, &out, &lse, &d_out, &mut d_qkv);
            check(&qkv, &d_qkv, &d_out, |qkv| run(qkv, heads, &spans).0);
        }
    }

    #[test]
    fn gradient_over_several_tiles_matches_finite_differences() {
        let heads = Heads { query: 1, key_value: 1, dim: 2 };
        let spans = [span(0..66, None), span(66..133, Some(0..66))];
        let qkv = random(133 * heads.qkv_width(), 7);
        let d_out = random(133 * heads.query_width(), 8);
        let (out, lse) = run(&qkv, heads, &spans);
        let mut d_qkv = vec![0.0; qkv.len()];
        backward(&qkv, heads, &spans, &out, &lse, &d_out, &mut d_qkv);
        check(&qkv, &d_qkv, &d_out, |qkv| run(qkv, heads, &spans).0);
    }
}
