//! The gradient of attention.

use std::ops::Range;

use pulp::Simd;
use rayon::prelude::*;

use super::arithmetic::{Arithmetic, Task, dispatch};
use super::kernel::product;
use super::{
    Heads, Prefix, STRIP, Scratch, Shared, Span, Stack, TILE, Tile, by_vector, check, fit, flops, keys_and_values,
};
use crate::ops::Number;
use crate::ops::linear::Matrix;
use crate::ops::simd::{LANES, exp};
use crate::profile::{self, Stage, Work};

/// Parts of a batch, and as many sums of gradients of each row that all of it continues.
const RUNS: usize = 8;

/// The gradient of [`forward`](super::forward): d_qkv is overwritten with the gradient with respect to qkv.
///
/// Spans must come in groups: one that continues nothing but perhaps the first span, then those that continue it.
///
/// # Panics
/// If the spans are not grouped so, or have a cache as their prefix.
pub(crate) fn backward<T: Number>(
    qkv: &[T],
    heads: Heads,
    spans: &[Span],
    lse: &[f32],
    d_out: &[f32],
    d_qkv: &mut [f32],
) {
    let _span = profile::span(Stage::AttentionBackward, || Work::Flops(2.0 * flops(heads, spans)));
    let n = qkv.len() / heads.qkv_width();
    assert!(qkv.len() == n * heads.qkv_width() && d_qkv.len() == qkv.len() && lse.len() == n * heads.query);
    assert_eq!(d_out.len(), n * heads.query_width());
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
    let pass = Pass { qkv, heads, lse, d_out, d_qkv };
    tasks.par_iter().enumerate().for_each_init(Scratch::default, |scratch, (task, &(spans, key_head))| {
        let d_common = Shared(d_common.at(task * of_task));
        dispatch(T::PRECISION, Backward { pass: &pass, d_common, spans, key_head, scratch });
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
struct Pass<'a, T> {
    qkv: &'a [T],
    heads: Heads,
    lse: &'a [f32],
    d_out: &'a [f32],
    d_qkv: Shared,
}

/// The task of some groups of spans and one key head.
struct Backward<'a, T> {
    pass: &'a Pass<'a, T>,
    /// Gradients of the rows that all groups continue, `[rows, keys and values of the head]`.
    d_common: Shared,
    spans: &'a [Span<'a>],
    key_head: usize,
    scratch: &'a mut Scratch,
}

impl<T: Number> Task for Backward<'_, T> {
    #[inline(always)]
    fn run<A: Arithmetic>(self, arithmetic: A) {
        let Self { pass, d_common, spans, key_head, scratch } = self;
        let (repeats, dim) = (pass.heads.query / pass.heads.key_value, pass.heads.dim);
        for span in spans {
            let [keys, values] = keys_and_values(pass.qkv, pass.heads, span, key_head);
            let gradients = pass.gradients(span, key_head, d_common);
            for scores in [&mut scratch.p, &mut scratch.ds] {
                fit(scores, TILE * keys.rows());
            }
            let words = &mut scratch.words;
            // SAFETY: keys and values were checked in `keys_and_values`, and the words of each have memory of their own.
            let factors = unsafe {
                Factors {
                    keys: arithmetic.beside(keys, dim, &mut words.keys),
                    keys_below: arithmetic.below(keys, dim, &mut words.keys_below),
                    values: arithmetic.beside(values, dim, &mut words.values),
                }
            };
            for head in key_head * repeats..(key_head + 1) * repeats {
                for tile in Tile::of(span, keys.rows()) {
                    pass.tile(arithmetic, tile, &factors, &gradients, head, scratch);
                }
            }
        }
    }
}

/// Keys and values as factors: words of numbers beside each other, and below each other.
struct Factors {
    keys: Stack<u32>,
    keys_below: Stack<u32>,
    values: Stack<u32>,
}

/// Where the gradients of some tokens' keys and values are added, in rows that are `stride` apart.
struct KeyGradient {
    keys: *mut f32,
    values: *mut f32,
    stride: usize,
    tokens: usize,
}

impl<T: Number> Pass<'_, T> {
    /// Where the gradients of the keys and values of a span's head are added: of the parts of its prefix, and of itself.
    fn gradients(&self, span: &Span, key_head: usize, d_common: Shared) -> [KeyGradient; 3] {
        let (heads, width) = (self.heads, self.heads.qkv_width());
        let of_rows = |rows: &Range<usize>| KeyGradient {
            keys: self.d_qkv.at(rows.start * width + heads.key_column(key_head)),
            values: self.d_qkv.at(rows.start * width + heads.value_column(key_head)),
            stride: width,
            tokens: rows.len(),
        };
        let [common, prompt] = if let Prefix::Rows(rows) = &span.prefix { rows.clone() } else { [0..0, 0..0] };
        let common = KeyGradient {
            keys: d_common.at(0),
            values: d_common.at(heads.dim),
            stride: 2 * heads.dim,
            tokens: common.len(),
        };
        [common, of_rows(&prompt), of_rows(&span.rows)]
    }

    /// Adds the gradient of one tile.
    #[inline(always)]
    fn tile<A: Arithmetic>(
        &self,
        arithmetic: A,
        tile: Tile,
        factors: &Factors,
        gradients: &[KeyGradient; 3],
        head: usize,
        scratch: &mut Scratch,
    ) {
        let heads = self.heads;
        let (width, out_width, dim) = (heads.qkv_width(), heads.query_width(), heads.dim);
        let Scratch { p, ds, words, .. } = scratch;
        let q_rows = Matrix::rows(self.qkv[tile.row * width + head * dim..].as_ptr(), width);
        let d_out_rows = Matrix::rows(self.d_out[tile.row * out_width + head * dim..].as_ptr(), out_width);
        // SAFETY: the rows of the span were checked with its keys.
        unsafe {
            let q = arithmetic.transposed(q_rows, [tile.rows, dim], &mut words.q);
            let d_out = arithmetic.transposed(d_out_rows, [tile.rows, dim], &mut words.d_out);
            tile.scores(arithmetic, &factors.keys, q, dim, p);
            tile.scores(arithmetic, &factors.values, d_out, dim, ds);
        }
        let probability = by_vector(p, tile.keys());
        for vector in 0..tile.vectors() {
            let mut lse = [0f32; LANES];
            for (lane, lse) in lse.iter_mut().enumerate().take(tile.rows - vector * LANES) {
                *lse = self.lse[(tile.row + vector * LANES + lane) * heads.query + head];
            }
            probabilities(probability, vector, heads.scale(), lse);
        }
        tile.hide(probability, 0.0);
        let len = tile.keys() * TILE;
        score_gradients(arithmetic.simd(), &p[..len], &mut ds[..len], tile.vectors(), heads.scale());
        let [p, ds] = [p, ds].map(|scores| Stack::of(Matrix::rows(scores.as_ptr(), TILE), tile.keys()));
        let (q_rows, d_out_rows) = (Stack::of(q_rows, tile.rows), Stack::of(d_out_rows, tile.rows));
        // SAFETY: of every key a row of `p` and `ds`; rows as above.
        let [p, ds, ds_below, q, d_out] = unsafe {
            [
                arithmetic.beside(p, TILE, &mut words.p),
                arithmetic.beside(ds, TILE, &mut words.ds),
                arithmetic.below(ds, TILE, &mut words.ds_below),
                arithmetic.below(q_rows, dim, &mut words.q_below),
                arithmetic.below(d_out_rows, dim, &mut words.d_out_below),
            ]
        }
        .map(|stack| stack.parts[0].0);
        for strip in (0..tile.rows).step_by(STRIP) {
            let rows = STRIP.min(tile.rows - strip);
            let d_q = self.d_qkv.at((tile.row + strip) * width + head * dim);
            let mut add = false;
            for (first, keys, count) in factors.keys_below.until((tile.before + strip + rows).div_ceil(A::NUMBERS)) {
                let start = ds_below.start.wrapping_add(first * TILE + strip);
                let ds = Matrix { start, row_stride: 1, column_stride: TILE };
                // SAFETY: `ds` has a place for every key of the tile; the rows of this span in the columns of this query head are
                // written by this task alone.
                unsafe { product(arithmetic, [rows, dim, count], ds, keys, d_q, width, add) };
                add |= count > 0;
            }
        }
        let mut first = 0;
        for gradient in gradients {
            let before = |end: usize| gradient.tokens.min(end.saturating_sub(first));
            let (tokens, seen_by_all) = (before(tile.keys()), before(tile.before));
            let mut key = 0;
            while key < tokens {
                let (keys, hidden) = match key < seen_by_all {
                    true => (seen_by_all, 0),
                    false => (STRIP.min(tokens - key), first + key - tile.before),
                };
                let shape = [keys, dim, (tile.rows - hidden).div_ceil(A::NUMBERS)];
                // strips start with a word
                let hidden = hidden / A::NUMBERS;
                for (weights, rows, to) in [(ds, q, gradient.keys), (p, d_out, gradient.values)] {
                    let start = weights.start.wrapping_add((first + key) * weights.row_stride + hidden);
                    let weights = Matrix { start, ..weights };
                    let rows = Matrix { start: rows.start.wrapping_add(hidden * rows.row_stride), ..rows };
                    let to = to.wrapping_add(key * gradient.stride);
                    // SAFETY: reads as above. The rows of this group in the columns of this key head, and the task's own memory
                    // for the common rows, are written by this task alone.
                    unsafe { product(arithmetic, shape, weights, rows, to, gradient.stride, true) };
                }
                key += keys;
            }
            first += gradient.tokens;
        }
    }
}

/// Turns the scores of one vector of rows into probabilities.
#[inline(always)]
fn probabilities(scores: &mut [[[f32; LANES]; 2]], vector: usize, scale: f32, lse: [f32; LANES]) {
    for scores in scores {
        for lane in 0..LANES {
            scores[vector][lane] = exp(scores[vector][lane].mul_add(scale, -lse[lane]));
        }
    }
}

/// Turns the gradients of the probabilities of some vectors of rows into those of the products of queries and keys.
// by the vectors of `pulp`: the compiler takes the loops over arrays of lanes for loops over keys, whose numbers are far apart
#[inline(always)]
fn score_gradients<S: Simd>(simd: S, p: &[f32], gradients: &mut [f32], vectors: usize, scale: f32) {
    let (p, gradients) = (S::as_simd_f32s(p).0, S::as_mut_simd_f32s(gradients).0);
    let (width, scale) = (TILE / S::F32_LANES, simd.splat_f32s(scale));
    for vector in 0..vectors * LANES / S::F32_LANES {
        let mut mean = simd.splat_f32s(0.0);
        for (p, d_p) in p.chunks_exact(width).zip(gradients.chunks_exact(width)) {
            mean = simd.mul_add_e_f32s(p[vector], d_p[vector], mean);
        }
        for (p, gradient) in p.chunks_exact(width).zip(gradients.chunks_exact_mut(width)) {
            let deviation = simd.sub_f32s(gradient[vector], mean);
            gradient[vector] = simd.mul_f32s(simd.mul_f32s(p[vector], deviation), scale);
        }
    }
}
