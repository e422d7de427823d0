//! The gradient of attention.

use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::kernel::product;
use super::{
    Heads, Prefix, STRIP, Scratch, Shared, Span, TILE, Tile, by_vector, check, fit, flops, pieces, scores_of_last_tile,
};
use crate::ops::linear::Matrix;
use crate::ops::simd::{LANES, dot, exp};
use crate::profile::{self, Stage, Work};

/// Parts of a batch, and as many sums of gradients of each row that all of it continues.
const RUNS: usize = 8;

/// The gradient of [`forward`]: d_qkv is overwritten with the gradient with respect to qkv.
///
/// Spans must come in groups: one that continues nothing but perhaps the first span, then those that continue it.
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
    let (groups, common) = groups(spans);
    let tasks: Vec<(&[Span], usize)> =
        runs(spans, &groups, &common).into_iter().flat_map(|run| (0..heads.key_value).map(move |h| (run, h))).collect();
    // A group's spans add to the gradients of their prompt, and query heads to those of their common key head: a task owns
    // both, so that no two tasks write to the same place. To the rows that all groups continue each task adds in memory of its own.
    let mut of_common = vec![0f32; tasks.len() * common.len() * 2 * heads.dim];
    let of_task = of_common.len() / tasks.len().max(1);
    let (d_qkv, d_common) = (Shared(d_qkv.as_mut_ptr()), Shared(of_common.as_mut_ptr()));
    let pass = Pass { qkv, heads, out, lse, d_out, d_qkv };
    tasks.par_iter().enumerate().for_each_init(Scratch::default, |scratch, (task, &(spans, key_head))| {
        let d_common = Shared(d_common.at(task * of_task));
        pulp::Arch::new().dispatch(Backward { pass: &pass, d_common, spans, key_head, scratch });
    });
    for ((_, key_head), of_task) in tasks.iter().zip(of_common.chunks_exact(of_task.max(1))) {
        for (row, added) in common.clone().zip(of_task.chunks_exact(2 * heads.dim)) {
            for (column, added) in [heads.key_column(*key_head), heads.value_column(*key_head)]
                .into_iter()
                .zip(added.chunks_exact(heads.dim))
            {
                let start = d_qkv.at(row * heads.qkv_width() + column);
                // SAFETY: the columns of a key head in a row of the batch, and all tasks have ended.
                let sum = unsafe { std::slice::from_raw_parts_mut(start, heads.dim) };
                sum.iter_mut().zip(added).for_each(|(sum, added)| *sum += added);
            }
        }
    }
}

/// Bytes that [`backward`] takes at most for the rows that all groups continue, if they are no more than `rows`.
pub(crate) fn common_bytes(heads: Heads, rows: usize) -> usize {
    size_of::<f32>() * RUNS * rows * 2 * heads.key_value_width()
}

/// The groups, or, where they share rows, at most [`RUNS`] runs of them.
fn runs<'s, 'a>(mut spans: &'s [Span<'a>], groups: &[&[Span<'a>]], common: &Range<usize>) -> Vec<&'s [Span<'a>]> {
    let together = if common.is_empty() { 1 } else { groups.len().div_ceil(RUNS) };
    let of_groups = |groups: &[&[Span<'a>]]| {
        let (run, others) = spans.split_at(groups.iter().map(|group| group.len()).sum());
        spans = others;
        run
    };
    groups.chunks(together).map(of_groups).collect()
}

/// Cuts the spans where one starts that has no prompt, and gives the rows that groups besides the first continue.
fn groups<'s, 'a>(spans: &'s [Span<'a>]) -> (Vec<&'s [Span<'a>]>, Range<usize>) {
    let prefix = |span: &Span<'_>| match &span.prefix {
        Prefix::Rows(rows) => rows.clone(),
        Prefix::Cache { .. } => panic!("there is no gradient of a cache"),
    };
    let groups: Vec<_> = spans.chunk_by(|_, next| !prefix(next)[1].is_empty()).collect();
    let common = groups.get(1).map_or(0..0, |group| prefix(&group[0])[0].clone());
    assert!(common.is_empty() || common == spans[0].rows, "what all continue is not the first span");
    for (index, group) in groups.iter().enumerate() {
        let (common, prompt) = (if index == 0 { 0..0 } else { common.clone() }, &group[0].rows);
        let continues = |span: &Span| prefix(span) == [common.clone(), prompt.clone()];
        assert!(
            prefix(&group[0]) == [common.clone(), prefix(&group[0])[1].clone()]
                && prefix(&group[0])[1].is_empty()
                && group[1..].iter().all(continues),
            "a span's prefix is not the span that its group starts with"
        );
    }
    (groups, common)
}

/// What all tasks of a backward pass read, and where they write to.
struct Pass<'a> {
    qkv: &'a [f32],
    heads: Heads,
    out: &'a [f32],
    lse: &'a [f32],
    d_out: &'a [f32],
    d_qkv: Shared,
}

/// The task of some groups of spans and one key head.
struct Backward<'a> {
    pass: &'a Pass<'a>,
    /// Gradients of the rows that all groups continue, `[rows, keys and values of the head]`.
    d_common: Shared,
    spans: &'a [Span<'a>],
    key_head: usize,
    scratch: &'a mut Scratch,
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { pass, d_common, spans, key_head, scratch } = self;
        let repeats = pass.heads.query / pass.heads.key_value;
        for span in spans {
            let pieces = pieces(pass.qkv, pass.heads, span, key_head);
            let gradients = pass.gradients(span, key_head, d_common);
            for scores in [&mut scratch.p, &mut scratch.ds] {
                fit(scores, scores_of_last_tile(&pieces));
            }
            for head in key_head * repeats..(key_head + 1) * repeats {
                for tile in Tile::of(span, &pieces) {
                    pass.tile(simd, tile, &gradients, head, scratch);
                }
            }
        }
    }
}

/// Where the gradients of a piece's keys and values are added, in rows that are `stride` apart.
struct PieceGradient {
    keys: *mut f32,
    values: *mut f32,
    stride: usize,
}

impl Pass<'_> {
    /// Where the gradients of the pieces of a span's head are added.
    fn gradients(&self, span: &Span, key_head: usize, d_common: Shared) -> [PieceGradient; 3] {
        let (heads, width) = (self.heads, self.heads.qkv_width());
        let of_rows = |rows: &Range<usize>| PieceGradient {
            keys: self.d_qkv.at(rows.start * width + heads.key_column(key_head)),
            values: self.d_qkv.at(rows.start * width + heads.value_column(key_head)),
            stride: width,
        };
        let prompt = if let Prefix::Rows([_, prompt]) = &span.prefix { prompt } else { &(0..0) };
        let common = PieceGradient { keys: d_common.at(0), values: d_common.at(heads.dim), stride: 2 * heads.dim };
        [common, of_rows(prompt), of_rows(&span.rows)]
    }

    /// Adds the gradient of one tile.
    #[inline(always)]
    fn tile<S: Simd>(
        &self,
        simd: S,
        tile: Tile<'_>,
        gradients: &[PieceGradient; 3],
        head: usize,
        scratch: &mut Scratch,
    ) {
        let heads = self.heads;
        let (width, out_width, dim) = (heads.qkv_width(), heads.query_width(), heads.dim);
        let Scratch { q, d_out, p, ds } = scratch;
        let q_rows = &self.qkv[tile.row * width + head * dim..];
        let d_out_rows = &self.d_out[tile.row * out_width + head * dim..];
        tile.transpose(q_rows, width, dim, q);
        tile.transpose(d_out_rows, out_width, dim, d_out);
        tile.scores(simd, |piece| piece.keys, q, dim, p);
        tile.scores(simd, |piece| piece.values, d_out, dim, ds);
        for vector in 0..tile.vectors() {
            let [mut lse, mut delta] = [[0f32; LANES]; 2];
            for lane in 0..LANES.min(tile.rows - vector * LANES) {
                let row = tile.row + vector * LANES + lane;
                let at = row * out_width + head * dim;
                lse[lane] = self.lse[row * heads.query + head];
                delta[lane] = dot(&self.out[at..at + dim], &self.d_out[at..at + dim]);
            }
            let (p, ds) = (by_vector(p, tile.keys()), by_vector(ds, tile.keys()));
            softmax_gradient(p, ds, vector, heads.scale(), lse, delta);
        }
        tile.hide(by_vector(p, tile.keys()), 0.0);
        tile.hide(by_vector(ds, tile.keys()), 0.0);
        let (p, ds) = (p.as_ptr(), ds.as_ptr());
        for strip in (0..tile.rows).step_by(STRIP) {
            let rows = STRIP.min(tile.rows - strip);
            let d_q = self.d_qkv.at((tile.row + strip) * width + head * dim);
            for (first, piece, tokens) in tile.pieces_until(tile.before + strip + rows) {
                let ds = Matrix { start: ds.wrapping_add(first * TILE + strip), row_stride: 1, column_stride: TILE };
                // SAFETY: pieces as in `scores`, and `ds` has a place for every key of the tile; the rows of this span in the
                // columns of this query head are written by this task alone.
                unsafe { product(simd, [rows, dim, tokens], ds, piece.keys, d_q, width, true) };
            }
        }
        for ((first, piece, tokens), gradient) in tile.pieces_until(tile.keys()).zip(gradients) {
            let seen_by_all = piece.until(first, tile.before);
            let mut key = 0;
            while key < tokens {
                let (keys, hidden) = match key < seen_by_all {
                    true => (seen_by_all, 0),
                    false => (STRIP.min(tokens - key), first + key - tile.before),
                };
                let at = (first + key) * TILE + hidden;
                for (weights, rows, stride, to) in
                    [(ds, q_rows, width, gradient.keys), (p, d_out_rows, out_width, gradient.values)]
                {
                    let weights = Matrix::rows(weights.wrapping_add(at), TILE);
                    let rows = Matrix::rows(rows.as_ptr().wrapping_add(hidden * stride), stride);
                    let (shape, to) = ([keys, dim, tile.rows - hidden], to.wrapping_add(key * gradient.stride));
                    // SAFETY: reads as above. The rows of this group in the columns of this key head, and the task's own memory
                    // for the common rows, are written by this task alone.
                    unsafe { product(simd, shape, weights, rows, to, gradient.stride, true) };
                }
                key += keys;
            }
        }
    }
}

/// Turns the scores of one vector of rows into probabilities, and the products of values and output gradients into the gradient of
/// the products of queries and keys.
#[inline(always)]
fn softmax_gradient(
    p: &mut [[[f32; LANES]; 2]],
    ds: &mut [[[f32; LANES]; 2]],
    vector: usize,
    scale: f32,
    lse: [f32; LANES],
    delta: [f32; LANES],
) {
    for (p, ds) in p.iter_mut().zip(ds) {
        for lane in 0..LANES {
            let probability = exp(p[vector][lane].mul_add(scale, -lse[lane]));
            p[vector][lane] = probability;
            ds[vector][lane] = probability * (ds[vector][lane] - delta[lane]) * scale;
        }
    }
}
