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

use rayon::prelude::*;

use super::linear::Matrix;
use super::simd::{LANES, exp};
use super::{Number, fit, number};
use crate::config::ModelConfig;
use crate::precision::Precision;
use crate::profile::{self, Stage, Work};

mod arithmetic;
mod backward;
#[cfg(target_arch = "x86_64")]
mod bf16;
mod kernel;
mod single;

use arithmetic::{Arithmetic, Task, dispatch};
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
    /// Keys and values of earlier tokens in f32: of each head, `[tokens, dim]`.
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
struct Shared<T = f32>(*mut T);
// SAFETY: the pointer is only used inside `forward` and `backward`, whose tasks write to disjoint
// elements (each function argues so) while the borrowed slice it came from is alive.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    fn at(self, offset: usize) -> *mut T {
        self.0.wrapping_add(offset)
    }
}

/// A matrix in up to three places, one part above the other.
#[derive(Clone, Copy)]
struct Stack<T = f32> {
    /// The parts, and how many rows each has.
    parts: [(Matrix<T>, usize); 3],
}

impl<T: Copy> Stack<T> {
    /// One part.
    fn of(matrix: Matrix<T>, rows: usize) -> Self {
        let none = || (Matrix::rows(std::ptr::null(), 0), 0);
        Self { parts: [(matrix, rows), none(), none()] }
    }

    fn map<U>(self, of: impl Fn(Matrix<T>) -> Matrix<U>) -> Stack<U> {
        Stack { parts: self.parts.map(|(matrix, rows)| (of(matrix), rows)) }
    }

    /// Rows of all parts.
    fn rows(&self) -> usize {
        self.parts.iter().map(|&(_, rows)| rows).sum()
    }

    /// The start of every row.
    fn row_starts(&self) -> impl Iterator<Item = *const T> {
        let of_part = |(matrix, rows): &(Matrix<T>, usize)| {
            let (start, stride) = (matrix.start, matrix.row_stride);
            (0..*rows).map(move |row| start.wrapping_add(row * stride))
        };
        self.parts.iter().flat_map(of_part)
    }

    /// The parts, each with the number of its first row, and how many of its rows lie before `end`.
    fn until(&self, end: usize) -> impl Iterator<Item = (usize, Matrix<T>, usize)> {
        let mut start = 0;
        self.parts.iter().map(move |&(matrix, rows)| {
            let first = start;
            start += rows;
            (first, matrix, rows.min(end.saturating_sub(first)))
        })
    }
}

/// The keys, and the values, that a span's head attends to, in order: those of the two parts of its prefix, each of which may be
/// empty, and its own.
///
/// # Panics
/// If keys and values are cached, and the others not in f32 as these are.
fn keys_and_values<T: Number>(qkv: &[T], heads: Heads, span: &Span, head: usize) -> [Stack<T>; 2] {
    let width = heads.qkv_width();
    let within = |rows: &Range<usize>| {
        assert!(rows.start <= rows.end && rows.end * width <= qkv.len(), "a span reaches beyond the batch");
        let start = qkv.as_ptr().wrapping_add(rows.start * width);
        [heads.key_column(head), heads.value_column(head)]
            .map(|column| (Matrix::rows(start.wrapping_add(column), width), rows.len()))
    };
    let (parts, own) = match &span.prefix {
        Prefix::Rows([first, second]) => ([within(first), within(second)], within(&span.rows)),
        Prefix::Cache { keys, values } => {
            let (keys, values) = (&keys[head], &values[head]);
            assert!(keys.len() == values.len() && !T::IS_ROUNDED);
            let cached = [keys, values].map(|of| (Matrix::rows(of.as_ptr().cast(), heads.dim), of.len() / heads.dim));
            ([within(&(0..0)), cached], within(&span.rows))
        }
    };
    [0, 1].map(|of| Stack { parts: [parts[0][of], parts[1][of], own[of]] })
}

/// One tile: some rows of a span under one query head.
#[derive(Clone, Copy)]
struct Tile {
    /// The first row in the batch.
    row: usize,
    rows: usize,
    /// Keys before those of the tile's own rows.
    before: usize,
}

impl Tile {
    /// The tiles of a span with so many keys, those of its own rows included.
    fn of(span: &Span, keys: usize) -> impl Iterator<Item = Tile> {
        let (start, len) = (span.rows.start, span.rows.len());
        (0..len).step_by(TILE).map(move |first| Tile {
            row: start + first,
            rows: TILE.min(len - first),
            before: keys - len + first,
        })
    }

    /// Keys that the last of its rows sees.
    fn keys(&self) -> usize {
        self.before + self.rows
    }

    /// Vectors of rows.
    fn vectors(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// Writes the products of all keys (or values) with the transposed rows to `out` `[keys, TILE]`.
    ///
    /// # Safety
    /// Words of `dim` numbers of keys and of rows must be valid to read.
    #[inline(always)]
    unsafe fn scores<A: Arithmetic>(
        &self,
        arithmetic: A,
        keys: &Stack<u32>,
        transposed: Matrix<u32>,
        dim: usize,
        out: &mut Vec<f32>,
    ) {
        let out = fit(out, self.keys() * TILE).as_mut_ptr();
        for (first, keys, count) in keys.until(self.keys()) {
            let shape = [count, LANES * self.vectors(), dim.div_ceil(A::NUMBERS)];
            // SAFETY: the caller's promise; the keys of `out` are those that were sized above.
            unsafe { product(arithmetic, shape, keys, transposed, out.wrapping_add(first * TILE), TILE, false) };
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
pub(crate) fn forward<T: Number>(qkv: &[T], heads: Heads, spans: &[Span], out: &mut [T], lse: &mut [f32]) {
    let _span = profile::span(Stage::Attention, || Work::Flops(flops(heads, spans)));
    let n = qkv.len() / heads.qkv_width();
    assert!(qkv.len() == n * heads.qkv_width() && out.len() == n * heads.query_width() && lse.len() == n * heads.query);
    check(heads, spans);
    if !spans.iter().any(|span| matches!(span.prefix, Prefix::Cache { .. })) {
        return of_rows(T::PRECISION, qkv, heads, spans, out, lse);
    }
    // as keys and values of earlier tokens are
    let qkv = T::widened(qkv);
    let mut with_cache = |out: &mut [f32]| match single::applies_to(heads, spans) {
        true => single::forward(&qkv, heads, spans, out, lse),
        false => of_rows(T::PRECISION, &qkv, heads, spans, out, lse),
    };
    if T::IS_ROUNDED {
        let mut wide = vec![0.0; out.len()];
        with_cache(&mut wide);
        number::round(&wide, out);
    } else {
        with_cache(bytemuck::cast_slice_mut(out));
    }
}

/// As [`forward`], with products in a precision.
fn of_rows<T: Number>(precision: Precision, qkv: &[T], heads: Heads, spans: &[Span], out: &mut [T], lse: &mut [f32]) {
    let (out, lse) = (Shared(out.as_mut_ptr()), Shared(lse.as_mut_ptr()));
    let tasks: Vec<(&Span, usize)> = spans.iter().flat_map(|s| (0..heads.query).map(move |h| (s, h))).collect();
    tasks.into_par_iter().for_each_init(Scratch::default, |scratch, (span, head)| {
        dispatch(precision, Forward { qkv, heads, span, head, out, lse, scratch });
    });
}

/// Memory of a task.
#[derive(Default)]
struct Scratch {
    /// Scores and their gradients.
    p: Vec<f32>,
    ds: Vec<f32>,
    /// Some rows of the output.
    out: Vec<f32>,
    /// Words of factors.
    words: Words,
}

/// Memory for words of numbers beside each other, and of the same factors' numbers below each other.
#[derive(Default)]
struct Words {
    keys: Vec<u32>,
    keys_below: Vec<u32>,
    values: Vec<u32>,
    q: Vec<u32>,
    q_below: Vec<u32>,
    d_out: Vec<u32>,
    d_out_below: Vec<u32>,
    p: Vec<u32>,
    ds: Vec<u32>,
    ds_below: Vec<u32>,
}

/// The task of one span and query head.
struct Forward<'a, T> {
    qkv: &'a [T],
    heads: Heads,
    span: &'a Span<'a>,
    head: usize,
    out: Shared<T>,
    lse: Shared,
    scratch: &'a mut Scratch,
}

impl<T: Number> Task for Forward<'_, T> {
    #[inline(always)]
    fn run<A: Arithmetic>(self, arithmetic: A) {
        let Self { qkv, heads, span, head, out, lse, scratch: Scratch { p, words, out: sums, .. } } = self;
        let (width, out_width, dim) = (heads.qkv_width(), heads.query_width(), heads.dim);
        let [keys, values] = keys_and_values(qkv, heads, span, heads.key_head(head));
        fit(p, TILE * keys.rows());
        let sums = fit(sums, STRIP * dim);
        let tiles = Tile::of(span, keys.rows());
        // SAFETY: keys and values were checked in `keys_and_values`, and the words of each have memory of their own.
        let (keys, values) = unsafe {
            (arithmetic.beside(keys, dim, &mut words.keys), arithmetic.below(values, dim, &mut words.values))
        };
        for tile in tiles {
            let q = Matrix::rows(qkv[tile.row * width + head * dim..].as_ptr(), width);
            // SAFETY: the rows of the span were checked with its keys.
            unsafe {
                let q = arithmetic.transposed(q, [tile.rows, dim], &mut words.q);
                tile.scores(arithmetic, &keys, q, dim, p);
            }
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
            let weights = Stack::of(Matrix::rows(p.as_ptr(), TILE), tile.keys());
            // SAFETY: of every key a row of `p`.
            let weights = unsafe { arithmetic.below(weights, TILE, &mut words.p) }.parts[0].0;
            for strip in (0..tile.rows).step_by(STRIP) {
                let rows = STRIP.min(tile.rows - strip);
                let mut add = false;
                for (first, values, count) in values.until((tile.before + strip + rows).div_ceil(A::NUMBERS)) {
                    let start = weights.start.wrapping_add(first * TILE + strip);
                    let weights = Matrix { start, row_stride: 1, column_stride: TILE };
                    if count > 0 {
                        // SAFETY: of every key there is a weight; `sums` has as many rows.
                        unsafe {
                            product(arithmetic, [rows, dim, count], weights, values, sums.as_mut_ptr(), dim, add)
                        };
                        add = true;
                    }
                }
                for (row, sums) in sums.chunks_exact(dim).take(rows).enumerate() {
                    let out = out.at((tile.row + strip + row) * out_width + head * dim);
                    // SAFETY: the rows of this span in the columns of this head belong to this task alone.
                    let out = unsafe { std::slice::from_raw_parts_mut(out, dim) };
                    let inverse = inverse_sums.as_flattened()[strip + row];
                    out.iter_mut().zip(sums).for_each(|(out, sum)| *out = T::of_f32(sum * inverse));
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
