//! Causal attention over packed segments, with grouped key and value heads (arXiv 2305.13245).
//!
//! Each span of rows attends to an optional prefix (the prompt that it continues, or cached keys and
//! values) and causally to itself. Scores exist for one tile of rows at a time; the backward pass
//! computes them again from the log-sum-exp of each row (arXiv 2205.14135).
//!
//! The result of a row depends on its queries, and on the keys and values that it sees in their order, to the last bit, and on
//! nothing else: not on how they are cut into spans, nor on what is computed beside it. Two things are taken for granted: no
//! number is infinite, and where keys and values are cached, either every sequence has one row or every one has more (`single.rs`).
#![allow(unsafe_code)]

use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::fit;
use super::linear::Matrix;
use super::simd::{LANES, exp};
use crate::config::ModelConfig;
use crate::profile::{self, Stage, Work};

mod backward;
mod kernel;
mod single;

pub(crate) use backward::{backward, common_bytes};
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

    pub(crate) fn scale(&self) -> f32 {
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
    /// Keys and values of earlier tokens: of each head, `[tokens, dim]`.
    Cache {
        /// Rotated keys.
        keys: &'a [Vec<f32>],
        /// Values.
        values: &'a [Vec<f32>],
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
            let (keys, values) = (&keys[head], &values[head]);
            assert_eq!(keys.len(), values.len());
            let cached = Piece {
                keys: Matrix::rows(keys.as_ptr(), heads.dim),
                values: Matrix::rows(values.as_ptr(), heads.dim),
                tokens: keys.len() / heads.dim,
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

/// How many scores the last tile of a span has, which has most: made room for at once, memory does not grow tile by tile.
fn scores_of_last_tile(pieces: &[Piece; 3]) -> usize {
    TILE * pieces.iter().map(|piece| piece.tokens).sum::<usize>()
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
        fit(p, scores_of_last_tile(&pieces));
        for tile in Tile::of(span, &pieces) {
            tile.transpose(&qkv[tile.row * width + head * dim..], width, dim, q);
            tile.scores(simd, |piece| piece.keys, q, dim, p);
            let scores = by_vector(p, tile.keys());
            tile.hide(scores, f32::NEG_INFINITY);
            let mut inverse_sums = [[0f32; LANES]; 2];
            for (vector, inverse_sums) in inverse_sums.iter_mut().enumerate().take(tile.vectors()) {
                let (highest, sums) = softmax(scores, vector, heads.scale());
                for lane in 0..LANES.min(tile.rows - vector * LANES) {
                    inverse_sums[lane] = 1.0 / sums[lane];
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

/// Floating-point operations of the products of a forward pass: of every row's queries with the keys that it attends to, its own
/// included, and of the weights with the values. The gradients need twice as many.
pub(crate) fn flops(heads: Heads, spans: &[Span]) -> f64 {
    let attended = |span: &Span| {
        let (rows, prefix) = (
            span.rows.len(),
            match &span.prefix {
                Prefix::Rows(rows) => rows.iter().map(ExactSizeIterator::len).sum(),
                Prefix::Cache { keys, .. } => keys.first().map_or(0, Vec::len) / heads.dim,
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

#[cfg(test)]
mod tests;
