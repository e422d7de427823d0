//! Causal attention over packed segments, with grouped key and value heads (arXiv 2305.13245).
//!
//! Each span of rows attends to an optional prefix (the prompt that it continues, or cached keys and
//! values) and causally to itself. Scores exist for one tile of rows at a time; the backward pass
//! computes them again from the log-sum-exp of each row (arXiv 2205.14135).
//!
//! The result of a row depends on its queries, and on the keys and values that it sees in their order, to the last bit, and on
//! nothing else: not on how they are cut into spans, nor on what is computed beside it.
#![allow(unsafe_code)]

use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::fit;
use super::linear::Matrix;
use super::simd::{LANES, dot, exp};
use crate::config::ModelConfig;
use crate::profile::{self, Stage, Work};

mod kernel;
mod single;

use kernel::product;

/// Query rows per tile: two vectors. A tile of scores is transposed, `[keys, TILE]`, so that a vector holds one key's score with
/// each of some rows, and no sum goes across a vector.
const TILE: usize = 2 * LANES;

/// Rows of a tile for which the products with later keys are left out together.
const STRIP: usize = 8;

/// Keys whose exponentials are added up before they are added to the sum of all.
const SUMMED: usize = 64;

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

    /// The key and value head of a query head.
    fn key_head(&self, head: usize) -> usize {
        head / (self.query / self.key_value)
    }

    /// Where the keys of a head start in a row of queries, keys and values.
    fn key_column(&self, key_head: usize) -> usize {
        self.query_width() + key_head * self.dim
    }

    /// Where its values start.
    fn value_column(&self, key_head: usize) -> usize {
        self.key_column(key_head) + self.key_value_width()
    }
}

/// What the rows of a span attend to besides themselves.
#[derive(Debug, Clone)]
pub(crate) enum Prefix<'a> {
    /// Other rows of the same batch, those of the first range before those of the second. Either may be empty.
    Rows([Range<usize>; 2]),
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
struct Piece {
    keys: Matrix,
    values: Matrix,
    tokens: usize,
}

impl Piece {
    /// The first of its tokens, as many as lie below `end` when it starts at `start`.
    fn until(&self, start: usize, end: usize) -> usize {
        self.tokens.min(end.saturating_sub(start))
    }
}

/// What a span's head attends to, in order: the two parts of its prefix, each of which may be empty, and itself.
fn pieces(qkv: &[f32], heads: Heads, span: &Span, head: usize) -> [Piece; 3] {
    let width = heads.qkv_width();
    let within = |rows: &Range<usize>| {
        assert!(rows.start <= rows.end && rows.end * width <= qkv.len(), "a span reaches beyond the batch");
        let start = qkv.as_ptr().wrapping_add(rows.start * width);
        Piece {
            keys: Matrix::rows(start.wrapping_add(heads.key_column(head)), width),
            values: Matrix::rows(start.wrapping_add(heads.value_column(head)), width),
            tokens: rows.len(),
        }
    };
    let own = within(&span.rows);
    match &span.prefix {
        Prefix::Rows([first, second]) => [within(first), within(second), own],
        Prefix::Cache { keys, values } => {
            let width = heads.key_value_width();
            assert_eq!(keys.len(), values.len());
            let cached = Piece {
                keys: Matrix::rows(keys.as_ptr().wrapping_add(head * heads.dim), width),
                values: Matrix::rows(values.as_ptr().wrapping_add(head * heads.dim), width),
                tokens: keys.len() / width,
            };
            [within(&(0..0)), cached, own]
        }
    }
}

/// One tile: some rows of a span under one query head.
#[derive(Clone, Copy)]
struct Tile<'p> {
    pieces: &'p [Piece; 3],
    /// The first row in the batch.
    row: usize,
    rows: usize,
    /// Keys before those of the tile's own rows.
    before: usize,
}

impl Tile<'_> {
    /// The tiles of a span.
    fn of<'p>(span: &Span, pieces: &'p [Piece; 3]) -> impl Iterator<Item = Tile<'p>> {
        let (start, len) = (span.rows.start, span.rows.len());
        let prefix = pieces[0].tokens + pieces[1].tokens;
        (0..len).step_by(TILE).map(move |first| Tile {
            pieces,
            row: start + first,
            rows: TILE.min(len - first),
            before: prefix + first,
        })
    }

    /// Keys that the last of its rows sees.
    fn keys(&self) -> usize {
        self.before + self.rows
    }

    /// The pieces, each with the number of its first key, and how many of its keys lie before `end`.
    fn pieces_until(&self, end: usize) -> impl Iterator<Item = (usize, &Piece, usize)> {
        let mut start = 0;
        self.pieces.iter().map(move |piece| {
            let first = start;
            start += piece.tokens;
            (first, piece, piece.until(first, end))
        })
    }

    /// Vectors of rows.
    fn vectors(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// Writes the tile's rows, which are `stride` apart, as columns to `out` `[dim, TILE]`; zero in the place of rows that it lacks.
    #[inline(always)]
    fn transpose(&self, rows: &[f32], stride: usize, dim: usize, out: &mut Vec<f32>) {
        let out = fit(out, dim * TILE).as_chunks_mut::<TILE>().0;
        for row in 0..LANES * self.vectors() {
            if row < self.rows {
                let values = &rows[row * stride..row * stride + dim];
                out.iter_mut().zip(values).for_each(|(out, &value)| out[row] = value);
            } else {
                out.iter_mut().for_each(|out| out[row] = 0.0);
            }
        }
    }

    /// Writes the products of all keys (or values) with the transposed rows to `out` `[keys, TILE]`.
    #[inline(always)]
    fn scores<S: Simd>(
        &self,
        simd: S,
        of: impl Fn(&Piece) -> Matrix,
        transposed: &[f32],
        dim: usize,
        out: &mut Vec<f32>,
    ) {
        let out = fit(out, self.keys() * TILE).as_mut_ptr();
        assert!(transposed.len() >= dim * TILE);
        for (first, piece, tokens) in self.pieces_until(self.keys()) {
            let shape = [tokens, LANES * self.vectors(), dim];
            let columns = Matrix::rows(transposed.as_ptr(), TILE);
            // SAFETY: the piece was checked in `pieces`; the columns and the keys of `out` are those that were sized above.
            unsafe { product(simd, shape, of(piece), columns, out.wrapping_add(first * TILE), TILE, false) };
        }
    }

    /// Sets the scores that rows have with keys of later rows.
    #[inline(always)]
    fn hide(&self, scores: &mut [[[f32; LANES]; 2]], value: f32) {
        for (later, scores) in scores[self.before..self.keys()].iter_mut().enumerate() {
            scores.as_flattened_mut()[..later].fill(value);
        }
    }
}

/// `[keys, TILE]` numbers, vector by vector.
fn by_vector(scores: &mut [f32], keys: usize) -> &mut [[[f32; LANES]; 2]] {
    scores[..keys * TILE].as_chunks_mut::<LANES>().0.as_chunks_mut::<2>().0
}

/// Attention of every span.
///
/// qkv `[n, qkv_width]` with rotated queries and keys; out `[n, query_width]`; lse `[n, query heads]`
/// keeps the log-sum-exp of each row's scaled scores for the backward pass.
pub(crate) fn forward(qkv: &[f32], heads: Heads, spans: &[Span], out: &mut [f32], lse: &mut [f32]) {
    let _span = profile::span(Stage::Attention, || Work::Flops(flops(heads, spans)));
    let n = qkv.len() / heads.qkv_width();
    assert!(qkv.len() == n * heads.qkv_width() && out.len() == n * heads.query_width() && lse.len() == n * heads.query);
    check(heads, spans);
    if single::applies_to(heads, spans) {
        return single::forward(qkv, heads, spans, out, lse);
    }
    let (out, lse) = (Shared(out.as_mut_ptr()), Shared(lse.as_mut_ptr()));
    let tasks: Vec<(&Span, usize)> = spans.iter().flat_map(|s| (0..heads.query).map(move |h| (s, h))).collect();
    tasks.into_par_iter().for_each_init(Scratch::default, |scratch, (span, head)| {
        pulp::Arch::new().dispatch(Forward { qkv, heads, span, head, out, lse, scratch });
    });
}

/// Memory of a task.
#[derive(Default)]
struct Scratch {
    /// Queries and gradients of a tile, transposed.
    q: Vec<f32>,
    d_out: Vec<f32>,
    /// Scores and their gradients.
    p: Vec<f32>,
    ds: Vec<f32>,
}

/// The task of one span and query head.
struct Forward<'a> {
    qkv: &'a [f32],
    heads: Heads,
    span: &'a Span<'a>,
    head: usize,
    out: Shared,
    lse: Shared,
    scratch: &'a mut Scratch,
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { qkv, heads, span, head, out, lse, scratch: Scratch { q, p, .. } } = self;
        let (width, out_width, dim) = (heads.qkv_width(), heads.query_width(), heads.dim);
        let pieces = pieces(qkv, heads, span, heads.key_head(head));
        for tile in Tile::of(span, &pieces) {
            tile.transpose(&qkv[tile.row * width + head * dim..], width, dim, q);
            tile.scores(simd, |piece| piece.keys, q, dim, p);
            let scores = by_vector(p, tile.keys());
            tile.hide(scores, f32::NEG_INFINITY);
            let mut inverse_sums = [[0f32; LANES]; 2];
            for vector in 0..tile.vectors() {
                let (highest, sums) = softmax(scores, vector, heads.scale());
                for lane in 0..LANES.min(tile.rows - vector * LANES) {
                    inverse_sums[vector][lane] = 1.0 / sums[lane];
                    let row = tile.row + vector * LANES + lane;
                    // SAFETY: this (row, head) belongs to this task alone.
                    unsafe { *lse.at(row * heads.query + head) = highest[lane] + sums[lane].ln() };
                }
            }
            tile.hide(scores, 0.0);
            for strip in (0..tile.rows).step_by(STRIP) {
                let rows = STRIP.min(tile.rows - strip);
                let out = out.at((tile.row + strip) * out_width + head * dim);
                let mut add = false;
                for (first, piece, tokens) in tile.pieces_until(tile.before + strip + rows) {
                    let start = p.as_ptr().wrapping_add(first * TILE + strip);
                    let weights = Matrix { start, row_stride: 1, column_stride: TILE };
                    if tokens > 0 {
                        // SAFETY: pieces as in `scores`, and weights lie in `p`; the rows of this span in the columns of this
                        // head of `out` belong to this task alone.
                        unsafe { product(simd, [rows, dim, tokens], weights, piece.values, out, out_width, add) };
                        add = true;
                    }
                }
                for row in 0..rows {
                    // SAFETY: as above.
                    let out = unsafe { std::slice::from_raw_parts_mut(out.wrapping_add(row * out_width), dim) };
                    let inverse = inverse_sums.as_flattened()[strip + row];
                    out.iter_mut().for_each(|o| *o *= inverse);
                }
            }
        }
    }
}

/// Replaces the scores of one vector of rows by their exponentials, scaled so that the largest of each row is 1.
/// Returns the largest scaled scores, and the sums of the exponentials.
#[inline(always)]
fn softmax(scores: &mut [[[f32; LANES]; 2]], vector: usize, scale: f32) -> ([f32; LANES], [f32; LANES]) {
    let mut highest = [f32::NEG_INFINITY; LANES];
    for scores in scores.iter() {
        for lane in 0..LANES {
            let score = scores[vector][lane];
            highest[lane] = if score > highest[lane] { score } else { highest[lane] };
        }
    }
    highest.iter_mut().for_each(|highest| *highest *= scale);
    let mut sums = [0f32; LANES];
    for scores in scores.chunks_mut(SUMMED) {
        let mut part = [0f32; LANES];
        for scores in scores {
            for lane in 0..LANES {
                let e = exp(scores[vector][lane].mul_add(scale, -highest[lane]));
                scores[vector][lane] = e;
                part[lane] += e;
            }
        }
        for lane in 0..LANES {
            sums[lane] += part[lane];
        }
    }
    (highest, sums)
}

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
        groups.into_iter().flat_map(|g| (0..heads.key_value).map(move |h| (g, h))).collect();
    // A group's spans add to the gradients of their prompt, and query heads to those of their common key head: a task owns
    // both, so that no two tasks write to the same place. To the rows that all groups continue each task adds in memory of its own.
    let mut of_common = vec![0f32; tasks.len() * common.len() * 2 * heads.dim];
    let of_task = of_common.len() / tasks.len().max(1);
    let (d_qkv, d_common) = (Shared(d_qkv.as_mut_ptr()), Shared(of_common.as_mut_ptr()));
    let pass = Pass { qkv, heads, out, lse, d_out, d_qkv };
    tasks.par_iter().enumerate().for_each_init(Scratch::default, |scratch, (task, &(group, key_head))| {
        let d_common = Shared(d_common.at(task * of_task));
        pulp::Arch::new().dispatch(Backward { pass: &pass, d_common, group, key_head, scratch });
    });
    for ((_, key_head), of_task) in tasks.iter().zip(of_common.chunks_exact(of_task.max(1))) {
        for (row, added) in common.clone().zip(of_task.chunks_exact(2 * heads.dim)) {
            for (column, added) in [heads.key_column(*key_head), heads.value_column(*key_head)].into_iter().zip(added.chunks_exact(heads.dim)) {
                let start = d_qkv.at(row * heads.qkv_width() + column);
                // SAFETY: the columns of a key head in a row of the batch, and all tasks have ended.
                let sum = unsafe { std::slice::from_raw_parts_mut(start, heads.dim) };
                sum.iter_mut().zip(added).for_each(|(sum, added)| *sum += added);
            }
        }
    }
}

/// Floating-point operations of the products of a forward pass: of every row's queries with the keys that it attends to, its own
/// included, and of the weights with the values. The gradients need twice as many.
pub(crate) fn flops(heads: Heads, spans: &[Span]) -> f64 {
    let attended = |span: &Span| {
        let (rows, prefix) = (
            span.rows.len(),
            match &span.prefix {
                Prefix::Rows(rows) => rows.iter().map(ExactSizeIterator::len).sum(),
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

/// The task of one group of spans and key head.
struct Backward<'a> {
    pass: &'a Pass<'a>,
    /// Gradients of the rows that all groups continue, `[rows, keys and values of the head]`.
    d_common: Shared,
    group: &'a [Span<'a>],
    key_head: usize,
    scratch: &'a mut Scratch,
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { pass, d_common, group, key_head, scratch } = self;
        let repeats = pass.heads.query / pass.heads.key_value;
        for span in group {
            let pieces = pieces(pass.qkv, pass.heads, span, key_head);
            let gradients = pass.gradients(span, key_head, d_common);
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
        Span { rows, prefix: Prefix::Rows([0..0, prefix.unwrap_or(0..0)]) }
    }

    /// A span that continues rows which all continue, and perhaps a prompt.
    fn third(rows: Range<usize>, common: Range<usize>, prompt: Range<usize>) -> Span<'static> {
        Span { rows, prefix: Prefix::Rows([common, prompt]) }
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
    fn the_bits_of_a_row_do_not_depend_on_how_its_sequence_is_cut() {
        for heads in [HEADS, Heads { query: 2, key_value: 1, dim: 64 }, Heads { query: 1, key_value: 1, dim: 40 }] {
            let width = heads.qkv_width();
            let sequence = random(150 * width, 1);
            let (whole, whole_lse) = run(&sequence, heads, &[span(0..150, None)]);
            // the same rows thrice, cut differently, and others between them
            let other = random(7 * width, 2);
            let rows = |range: Range<usize>| sequence[range.start * width..range.end * width].to_vec();
            let qkv = [rows(0..150), other.clone(), rows(0..90), rows(90..150), other, rows(21..90), rows(90..150)].concat();
            let spans = [
                span(0..21, None),
                third(21..90, 0..21, 0..0),
                third(90..150, 0..21, 21..90),
                third(150..157, 0..21, 21..90),
                span(157..247, None),
                span(247..307, Some(157..247)),
                span(307..314, None),
                third(314..383, 0..21, 0..0),
                third(383..443, 0..21, 314..383),
            ];
            let (out, lse) = run(&qkv, heads, &spans);
            let same = |got: &[f32], expected: &[f32], of_row: usize, rows: Range<usize>, at: usize| {
                let expected = &expected[rows.start * of_row..rows.end * of_row];
                assert_eq!(got[at * of_row..][..expected.len()], *expected, "rows {rows:?} at {at}");
            };
            for (rows, at) in [(0..150, 0), (0..150, 157), (21..150, 314)] {
                same(&out, &whole, heads.query_width(), rows.clone(), at);
                same(&lse, &whole_lse, heads.query, rows, at);
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
            (
                Heads { query: 4, key_value: 2, dim: 20 },
                vec![
                    span(0..2, None),
                    third(2..4, 0..2, 0..0),
                    third(4..6, 0..2, 2..4),
                    third(6..7, 0..2, 2..4),
                    third(7..9, 0..2, 0..0),
                    third(9..11, 0..2, 7..9),
                ],
            ),
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
        let spans =
            [span(0..40, None), third(40..66, 0..40, 0..0), third(66..100, 0..40, 40..66), third(100..133, 0..40, 0..0)];
        let qkv = random(133 * heads.qkv_width(), 7);
        let d_out = random(133 * heads.query_width(), 8);
        let (out, lse) = run(&qkv, heads, &spans);
        let mut d_qkv = vec![0.0; qkv.len()];
        backward(&qkv, heads, &spans, &out, &lse, &d_out, &mut d_qkv);
        check(&qkv, &d_qkv, &d_out, |qkv| run(qkv, heads, &spans).0);
    }
}
