//! What this machine can do at best, and what a pass needs at least.

use std::time::Instant;

use rayon::prelude::*;

use crate::batch::PackedBatch;
use crate::config::ModelConfig;
use crate::model::{BlockLayout, Layout};
use crate::ops::attention::{self, Heads};
use crate::ops::linear;
use crate::precision::Precision;

/// Rows and columns of the products that the peak is measured with.
const SIDE: usize = 1536;

/// Floats that the bandwidth is measured with: 512 MiB, more than caches hold.
const FLOATS: usize = 1 << 27;

/// Each measurement is repeated, and the best counts.
const REPEATS: usize = 7;

/// Floating-point operations per second of large square products on all threads, by the kernels that training in this precision
/// uses: the best of the three products of a linear layer.
pub fn peak(precision: Precision) -> f64 {
    let [a, b, mut out] = [0.5, 0.25, 0.0].map(|value| vec![value; SIDE * SIDE]);
    let forward = best_seconds(|| linear::forward(precision, &a, &b, &mut out, SIDE, false));
    let input = best_seconds(|| linear::backward_input(precision, &a, &b, &mut out, SIDE));
    let weight = best_seconds(|| linear::backward_weight(precision, &a, &b, &mut out, SIDE));
    2.0 * (SIDE as f64).powi(3) / forward.min(input).min(weight)
}

/// Bytes per second at which all threads together read memory and do nothing else.
pub fn bandwidth() -> f64 {
    // memory of zeros would be one page, read again and again
    let values = vec![1.0f32; FLOATS];
    let part = FLOATS.div_ceil(64 * rayon::current_num_threads());
    let seconds = best_seconds(|| std::hint::black_box(values.par_chunks(part).map(sum).sum::<f32>()));
    size_of_val(&*values) as f64 / seconds
}

fn best_seconds<T>(mut work: impl FnMut() -> T) -> f64 {
    let once = |_| {
        let start = Instant::now();
        std::hint::black_box(work());
        start.elapsed().as_secs_f64()
    };
    (0..REPEATS).map(once).fold(f64::INFINITY, f64::min)
}

/// A sum in as many parts as keep reading, not adding, the limit.
fn sum(values: &[f32]) -> f32 {
    let mut sums = [0.0f32; 128];
    for part in values.chunks_exact(sums.len()) {
        sums.iter_mut().zip(part).for_each(|(sum, value)| *sum += value);
    }
    sums.iter().sum()
}

/// Floating-point operations that the matrix products of a forward pass need; a multiplication with its addition counts two.
///
/// With n rows, s of them scored, w the weights of a block's matrices, and c the number of pairs of a row and one that it attends to,
/// itself included: blocks·(2·n·w + 4·heads·head_dim·c) + 2·s·hidden·vocab. Training all weights needs three times as many: a
/// product's gradients with respect to both of its factors are a product of the same size each.
pub fn forward_flops(config: &ModelConfig, batch: &PackedBatch) -> f64 {
    let layout = Layout::new(config);
    let weights = |block: &BlockLayout| {
        [&block.qkv, &block.output, &block.gate_up, &block.down].into_iter().map(ExactSizeIterator::len).sum::<usize>()
    };
    let block_weights: usize = layout.blocks.iter().map(weights).sum();
    let products = 2.0 * (batch.rows() * block_weights + batch.scored_rows.len() * layout.head.len()) as f64;
    products + config.num_hidden_layers as f64 * attention::flops(Heads::new(config), &batch.spans())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::tiny_config;

    #[test]
    fn useful_operations_are_those_counted_by_hand() {
        let mut batch = PackedBatch::default();
        batch.push(&[1, 2, 3], &[&[4, 5], &[6, 7, 8, 9]]);
        // width 12, four query heads and two key heads of 4, feed-forward 20
        let block = 12 * 32 + 16 * 12 + 12 * 40 + 20 * 12;
        // the last token of a response is not computed
        let rows = 3 + 1 + 3;
        // prompt, first response, second response
        let attended = (1 + 2 + 3) + 4 + (4 + 5 + 6);
        let scored = 2 + 4;
        let products = 2 * block * rows * 2;
        let attention = 2 * attended * (4 * 4) * 2 * 2;
        let head = scored * 12 * 11 * 2;
        assert_eq!(forward_flops(&tiny_config(), &batch), f64::from(products + attention + head));
    }
}
