//! The decoder, written once over the operations: for log-probabilities, training and generation.
//!
//! ```text
//! x ─┬─ rmsnorm ─ qkv ─ rope ─ attention ─ output ─(+)─┬─ rmsnorm ─ gate·up ─ swiglu ─ down ─(+)─ x'
//!    └──────────────────────────────────────────────────┘└──────────────────────────────────────┘
//! ```

mod divergence;

use crate::batch::PackedBatch;
use crate::model::{BlockLayout, Layout, Model};
use crate::ops::attention::{self, Heads, Span};
use crate::ops::rope::RopeTable;
use crate::ops::{embedding, linear, logprob, rmsnorm, swiglu};

pub use crate::ops::divergence::Head;

/// How much of the forward pass is kept for the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// Everything that the backward pass reads.
    All,
    /// Only each block's input; the backward pass computes the block again (gradient checkpointing).
    Inputs,
}

/// Runs a model's forward and backward passes, and owns the memory they need between calls.
///
/// Weights and gradients are passed to each call, so that one decoder serves several policies of one shape.
#[derive(Debug)]
pub struct Decoder {
    layout: Layout,
    heads: Heads,
    hidden: usize,
    intermediate: usize,
    eps: f32,
    rope: RopeTable,
    /// The residual stream; after a forward pass, the last block's output.
    x: Vec<f32>,
    /// Each block's input, when anything is kept.
    inputs: Vec<Vec<f32>>,
    /// What each block keeps, or one place that all blocks use in turn.
    tapes: Vec<BlockTape>,
    kept: Option<Keep>,
    scratch: Scratch,
}

/// What the backward pass of one block reads, besides the block's input.
#[derive(Debug, Default)]
struct BlockTape {
    /// 1/rms of the block's input, `[n]`.
    r_attention: Vec<f32>,
    /// Rotated queries and keys, and values, `[n, qkv_width]`.
    qkv: Vec<f32>,
    /// Log-sum-exp of the scores, `[n, heads]`.
    lse: Vec<f32>,
    /// Output of attention before its projection, `[n, query_width]`.
    attention: Vec<f32>,
    /// The residual stream between the two halves, `[n, hidden]`.
    middle: Vec<f32>,
    /// 1/rms of `middle`, `[n]`.
    r_feed_forward: Vec<f32>,
    /// `[n, 2·intermediate]`.
    gate_up: Vec<f32>,
}

/// Memory that holds nothing between operations.
#[derive(Debug, Default)]
struct Scratch {
    normed: Vec<f32>,
    activation: Vec<f32>,
    logits: Vec<f32>,
    reference_logits: Vec<f32>,
    head: HeadScratch,
    dx: Vec<f32>,
    d_normed: Vec<f32>,
    d_attention: Vec<f32>,
    d_qkv: Vec<f32>,
}

/// Rows of one chunk of the vocabulary head.
#[derive(Debug, Default)]
struct HeadScratch {
    x: Vec<f32>,
    r: Vec<f32>,
    normed: Vec<f32>,
    d_x: Vec<f32>,
    d_normed: Vec<f32>,
}

/// The first `len` elements of a buffer that grows as needed; their values are arbitrary.
fn fit(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

impl Decoder {
    /// A decoder for models of this shape. `positions` is the longest sequence that it will see.
    pub fn new(model: &Model, positions: usize) -> Self {
        let config = &model.config;
        Self {
            layout: model.layout.clone(),
            heads: Heads {
                query: config.num_attention_heads,
                key_value: config.num_key_value_heads,
                dim: config.head_dim,
            },
            hidden: config.hidden_size,
            intermediate: config.intermediate_size,
            eps: config.rms_norm_eps as f32,
            rope: RopeTable::new(config, positions),
            x: Vec::new(),
            inputs: Vec::new(),
            tapes: Vec::new(),
            kept: None,
            scratch: Scratch::default(),
        }
    }

    /// Bytes of activations that a training pass over `rows` tokens keeps, scratch memory included.
    pub fn activation_bytes(&self, rows: usize, keep: Keep) -> usize {
        let (d, f, heads) = (self.hidden, self.intermediate, self.heads);
        let tape = 2 + heads.qkv_width() + heads.query + heads.query_width() + d + 2 * f;
        let scratch = 4 * d + f + heads.query_width() + heads.qkv_width();
        let blocks = self.layout.blocks.len();
        let per_row = blocks * d + scratch + if keep == Keep::All { blocks * tape } else { tape };
        4 * (rows * per_row + logprob::chunk_rows(self.layout.head.len() / d) * (self.layout.head.len() / d + 5 * d))
    }

    /// The log-probability of each response of the batch, summed over its tokens.
    pub fn logps(&mut self, weights: &[f32], batch: &PackedBatch) -> Vec<f64> {
        self.run_blocks(weights, batch, None);
        self.head_forward(weights, batch)
    }

    /// As [`logps`](Self::logps), keeping what [`backward`](Self::backward) needs.
    pub fn forward(&mut self, weights: &[f32], batch: &PackedBatch, keep: Keep) -> Vec<f64> {
        self.run_blocks(weights, batch, Some(keep));
        self.head_forward(weights, batch)
    }

    /// Adds to `gradient` the derivative of Σ d_logps[i]·logp[i] with respect to every weight.
    ///
    /// # Panics
    /// If the last call was not [`forward`](Self::forward) with the same weights and batch.
    pub fn backward(&mut self, weights: &[f32], batch: &PackedBatch, d_logps: &[f64], gradient: &mut [f32]) {
        let keep = self.kept.take();
        let Some(keep) = keep else { panic!("backward without a forward pass before it") };
        self.head_forward_backward(weights, batch, d_logps, gradient);
        self.backward_blocks(weights, batch, keep, gradient);
    }

    /// Forward and backward in one, for derivatives that are known beforehand: saves one pass of the head.
    /// Returns the log-probabilities.
    pub fn forward_backward(
        &mut self,
        weights: &[f32],
        batch: &PackedBatch,
        d_logps: &[f64],
        keep: Keep,
        gradient: &mut [f32],
    ) -> Vec<f64> {
        self.run_blocks(weights, batch, Some(keep));
        self.kept = None;
        let logps = self.head_forward_backward(weights, batch, d_logps, gradient);
        self.backward_blocks(weights, batch, keep, gradient);
        logps
    }

    /// The logits `[wanted, vocab]` of the wanted rows, for tokens that continue the sequences of a cache.
    ///
    /// Keeps nothing for a backward pass; the cache takes each block's keys and values.
    pub(crate) fn infer(
        &mut self,
        weights: &[f32],
        tokens: &[u32],
        positions: &[u32],
        wanted: &[usize],
        cache: &mut dyn KeyValueCache,
    ) -> &[f32] {
        self.check_weights(weights);
        self.kept = None;
        self.tapes.resize_with(self.tapes.len().max(1), BlockTape::default);
        let d = self.hidden;
        let mut x = std::mem::take(&mut self.x);
        let rows = fit(&mut x, tokens.len() * d);
        embedding::forward(&weights[self.layout.embedding.clone()], tokens, rows, d);
        let mut tape = std::mem::take(&mut self.tapes[0]);
        for (index, block) in self.layout.blocks.clone().iter().enumerate() {
            self.block_forward(weights, block, &cache.spans(index), positions, rows, &mut tape);
            cache.store(index, &tape.qkv[..tokens.len() * self.heads.qkv_width()]);
        }
        self.tapes[0] = tape;
        let Scratch { logits, head, .. } = &mut self.scratch;
        let chosen = fit(&mut head.x, wanted.len() * d);
        for (to, &row) in chosen.chunks_exact_mut(d).zip(wanted) {
            to.copy_from_slice(&rows[row * d..(row + 1) * d]);
        }
        let (normed, r) = (fit(&mut head.normed, wanted.len() * d), fit(&mut head.r, wanted.len()));
        rmsnorm::forward(chosen, &weights[self.layout.final_norm.clone()], self.eps, normed, r);
        let vocab = self.layout.head.len() / d;
        let logits = fit(logits, wanted.len() * vocab);
        linear::forward(normed, &weights[self.layout.head.clone()], logits, d, false);
        self.x = x;
        logits
    }

    /// Numbers and width of the attention heads.
    pub(crate) fn heads(&self) -> Heads {
        self.heads
    }

    fn check_weights(&self, weights: &[f32]) {
        assert_eq!(weights.len(), self.layout.len, "the weights do not fit this decoder");
    }

    /// Leaves the output of the last block in `self.x`.
    fn run_blocks(&mut self, weights: &[f32], batch: &PackedBatch, keep: Option<Keep>) {
        self.check_weights(weights);
        let blocks = self.layout.blocks.clone();
        self.tapes.resize_with(if keep == Some(Keep::All) { blocks.len() } else { 1 }, BlockTape::default);
        self.inputs.resize_with(if keep.is_some() { blocks.len() } else { 0 }, Vec::new);
        let d = self.hidden;
        let mut x = std::mem::take(&mut self.x);
        let rows = fit(&mut x, batch.rows() * d);
        embedding::forward(&weights[self.layout.embedding.clone()], &batch.tokens, rows, d);
        let spans = batch.spans();
        for (index, block) in blocks.iter().enumerate() {
            if keep.is_some() {
                fit(&mut self.inputs[index], rows.len()).copy_from_slice(rows);
            }
            let place = if keep == Some(Keep::All) { index } else { 0 };
            let mut tape = std::mem::take(&mut self.tapes[place]);
            self.block_forward(weights, block, &spans, &batch.positions, rows, &mut tape);
            self.tapes[place] = tape;
        }
        self.x = x;
        self.kept = keep;
    }

    /// Replaces the block's input `x` by its output and writes the tape.
    fn block_forward(
        &mut self,
        weights: &[f32],
        block: &BlockLayout,
        spans: &[Span],
        positions: &[u32],
        x: &mut [f32],
        tape: &mut BlockTape,
    ) {
        let (n, d, f, heads) = (positions.len(), self.hidden, self.intermediate, self.heads);
        let normed = fit(&mut self.scratch.normed, n * d);
        let r = fit(&mut tape.r_attention, n);
        rmsnorm::forward(x, &weights[block.attention_norm.clone()], self.eps, normed, r);
        let qkv = fit(&mut tape.qkv, n * heads.qkv_width());
        linear::forward(normed, &weights[block.qkv.clone()], qkv, d, false);
        self.rope.forward(qkv, heads.qkv_width(), heads.query + heads.key_value, positions);
        let attended = fit(&mut tape.attention, n * heads.query_width());
        attention::forward(qkv, heads, spans, attended, fit(&mut tape.lse, n * heads.query));
        linear::forward(attended, &weights[block.output.clone()], x, heads.query_width(), true);

        fit(&mut tape.middle, n * d).copy_from_slice(x);
        let r = fit(&mut tape.r_feed_forward, n);
        rmsnorm::forward(x, &weights[block.feed_forward_norm.clone()], self.eps, normed, r);
        let gate_up = fit(&mut tape.gate_up, n * 2 * f);
        linear::forward(normed, &weights[block.gate_up.clone()], gate_up, d, false);
        let activation = fit(&mut self.scratch.activation, n * f);
        swiglu::forward(gate_up, activation, f);
        linear::forward(activation, &weights[block.down.clone()], x, f, true);
    }

    /// Takes `scratch.dx`, the gradient of the last block's output, through all blocks to the embedding.
    fn backward_blocks(&mut self, weights: &[f32], batch: &PackedBatch, keep: Keep, gradient: &mut [f32]) {
        assert_eq!(gradient.len(), self.layout.len, "the gradient does not fit this decoder");
        let spans = batch.spans();
        let len = batch.rows() * self.hidden;
        for (index, block) in self.layout.blocks.clone().iter().enumerate().rev() {
            let mut tape = std::mem::take(&mut self.tapes[if keep == Keep::All { index } else { 0 }]);
            if keep == Keep::Inputs {
                let mut x = std::mem::take(&mut self.x);
                x[..len].copy_from_slice(&self.inputs[index][..len]);
                self.block_forward(weights, block, &spans, &batch.positions, &mut x[..len], &mut tape);
                self.x = x;
            }
            self.block_backward(weights, block, index, &spans, &batch.positions, &mut tape, gradient);
            self.tapes[if keep == Keep::All { index } else { 0 }] = tape;
        }
        let d_embedding = &mut gradient[self.layout.embedding.clone()];
        embedding::backward(&batch.tokens, &self.scratch.dx[..len], d_embedding, self.hidden);
    }

    /// Replaces `scratch.dx`, the gradient of the block's output, by that of its input. Uses up the tape.
    #[allow(clippy::too_many_arguments, reason = "the block's place, its inputs, and its gradient")]
    fn block_backward(
        &mut self,
        weights: &[f32],
        block: &BlockLayout,
        index: usize,
        spans: &[Span],
        positions: &[u32],
        tape: &mut BlockTape,
        gradient: &mut [f32],
    ) {
        let (n, d, f, heads) = (positions.len(), self.hidden, self.intermediate, self.heads);
        let scratch = &mut self.scratch;
        let dx = fit(&mut scratch.dx, n * d);
        let normed = fit(&mut scratch.normed, n * d);
        let d_normed = fit(&mut scratch.d_normed, n * d);

        let middle = &tape.middle[..n * d];
        let gate_up = &mut tape.gate_up[..n * 2 * f];
        let activation = fit(&mut scratch.activation, n * f);
        linear::backward_input(dx, &weights[block.down.clone()], activation, f);
        swiglu::backward_in_place(gate_up, activation, f);
        linear::backward_weight(dx, activation, &mut gradient[block.down.clone()], f);
        let (norm, r) = (&weights[block.feed_forward_norm.clone()], &tape.r_feed_forward[..n]);
        rmsnorm::recompute(middle, norm, r, normed);
        linear::backward_weight(gate_up, normed, &mut gradient[block.gate_up.clone()], d);
        linear::backward_input(gate_up, &weights[block.gate_up.clone()], d_normed, d);
        rmsnorm::backward(middle, norm, r, d_normed, dx, &mut gradient[block.feed_forward_norm.clone()]);

        let (qkv, attended) = (&tape.qkv[..n * heads.qkv_width()], &tape.attention[..n * heads.query_width()]);
        let d_attended = fit(&mut scratch.d_attention, attended.len());
        linear::backward_input(dx, &weights[block.output.clone()], d_attended, heads.query_width());
        linear::backward_weight(dx, attended, &mut gradient[block.output.clone()], heads.query_width());
        let d_qkv = fit(&mut scratch.d_qkv, qkv.len());
        attention::backward(qkv, heads, spans, attended, &tape.lse[..n * heads.query], d_attended, d_qkv);
        self.rope.backward(d_qkv, heads.qkv_width(), heads.query + heads.key_value, positions);
        let x = &self.inputs[index][..n * d];
        let (norm, r) = (&weights[block.attention_norm.clone()], &tape.r_attention[..n]);
        rmsnorm::recompute(x, norm, r, normed);
        linear::backward_weight(d_qkv, normed, &mut gradient[block.qkv.clone()], d);
        linear::backward_input(d_qkv, &weights[block.qkv.clone()], d_normed, d);
        rmsnorm::backward(x, norm, r, d_normed, dx, &mut gradient[block.attention_norm.clone()]);
    }

    /// Log-probabilities of the batch's responses from `self.x`.
    fn head_forward(&mut self, weights: &[f32], batch: &PackedBatch) -> Vec<f64> {
        let chunk = logprob::even_chunk(batch.targets.len(), self.layout.head.len() / self.hidden);
        let mut logps = Vec::with_capacity(batch.targets.len());
        for (rows, targets) in batch.scored_rows.chunks(chunk).zip(batch.targets.chunks(chunk)) {
            self.gather_normed(weights, rows);
            let Scratch { head, logits, .. } = &mut self.scratch;
            let normed = &head.normed[..rows.len() * self.hidden];
            logps.extend(logprob::forward(normed, &weights[self.layout.head.clone()], targets, logits));
        }
        batch.sum_responses(&logps)
    }

    /// As [`head_forward`](Self::head_forward); overwrites `scratch.dx` with the gradient of `self.x` and adds
    /// the gradients of head and last norm.
    fn head_forward_backward(
        &mut self,
        weights: &[f32],
        batch: &PackedBatch,
        d_logps: &[f64],
        gradient: &mut [f32],
    ) -> Vec<f64> {
        let d = self.hidden;
        let d_logps = batch.spread_responses(d_logps);
        let chunk = logprob::even_chunk(batch.targets.len(), self.layout.head.len() / d);
        fit(&mut self.scratch.dx, batch.rows() * d).fill(0.0);
        let mut logps = Vec::with_capacity(batch.targets.len());
        let chunks = batch.scored_rows.chunks(chunk).zip(batch.targets.chunks(chunk)).zip(d_logps.chunks(chunk));
        for ((rows, targets), d_logps) in chunks {
            self.gather_normed(weights, rows);
            let Scratch { head, logits, .. } = &mut self.scratch;
            let len = rows.len() * d;
            let d_normed = fit(&mut head.d_normed, len);
            let (w, d_w) = (&weights[self.layout.head.clone()], &mut gradient[self.layout.head.clone()]);
            logps.extend(logprob::forward_backward(&head.normed[..len], w, targets, d_logps, d_normed, d_w, logits));
            self.norm_backward(weights, rows, gradient);
        }
        batch.sum_responses(&logps)
    }

    /// Takes `scratch.head.d_normed` of the given rows through the last norm and adds it to `scratch.dx`.
    fn norm_backward(&mut self, weights: &[f32], rows: &[u32], gradient: &mut [f32]) {
        let (d, Scratch { head, dx, .. }) = (self.hidden, &mut self.scratch);
        let len = rows.len() * d;
        let d_x = fit(&mut head.d_x, len);
        d_x.fill(0.0);
        let (norm, r) = (self.layout.final_norm.clone(), &head.r[..rows.len()]);
        let gain = &weights[norm.clone()];
        rmsnorm::backward(&head.x[..len], gain, r, &head.d_normed[..len], d_x, &mut gradient[norm]);
        // a prompt's last row predicts the first token of each of its responses, so rows may repeat
        for (d_x, &row) in d_x.chunks_exact(d).zip(rows) {
            let to = &mut dx[row as usize * d..(row as usize + 1) * d];
            to.iter_mut().zip(d_x).for_each(|(to, d)| *to += d);
        }
    }

    /// Copies rows of `self.x` to the head's scratch memory and normalises them.
    fn gather_normed(&mut self, weights: &[f32], rows: &[u32]) {
        let (d, head) = (self.hidden, &mut self.scratch.head);
        let x = fit(&mut head.x, rows.len() * d);
        for (to, &row) in x.chunks_exact_mut(d).zip(rows) {
            to.copy_from_slice(&self.x[row as usize * d..(row as usize + 1) * d]);
        }
        let (normed, r) = (fit(&mut head.normed, rows.len() * d), fit(&mut head.r, rows.len()));
        rmsnorm::forward(x, &weights[self.layout.final_norm.clone()], self.eps, normed, r);
    }
}

/// Where generation keeps the keys and values of earlier tokens.
pub(crate) trait KeyValueCache {
    /// The spans of the rows at hand, each with its cached prefix in block `block`.
    fn spans(&self, block: usize) -> Vec<Span<'_>>;
    /// Takes the queries, keys and values of the rows at hand in block `block`.
    fn store(&mut self, block: usize, qkv: &[f32]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ModelConfig;
    use crate::model::tests::tiny_config;
    use crate::ops::finite_difference::check;

    fn batch() -> PackedBatch {
        let mut batch = PackedBatch::default();
        batch.push(&[1, 5, 3], &[&[4, 2], &[9, 9, 10, 2]]);
        batch.push(&[1, 7], &[&[8, 2]]);
        batch.push(&[1], &[&[2], &[6, 0]]);
        batch
    }

    fn models() -> Vec<Model> {
        let base = tiny_config();
        [
            base.clone(),
            ModelConfig { tie_word_embeddings: true, ..base.clone() },
            ModelConfig { num_key_value_heads: 4, ..base.clone() },
            ModelConfig { num_key_value_heads: 1, num_attention_heads: 3, head_dim: 6, ..base },
        ]
        .into_iter()
        .enumerate()
        .map(|(seed, config)| Model::random(config, 0.4, seed as u64))
        .collect()
    }

    #[test]
    fn gradients_match_finite_differences() {
        let (batch, d_logps) = (batch(), [0.7, -0.4, 1.1, 0.3, -0.9]);
        let weights_of_logps: Vec<f32> = d_logps.iter().map(|&d| d as f32).collect();
        for model in models() {
            let mut decoder = Decoder::new(&model, 16);
            let mut gradient = vec![0.0; model.layout.len];
            decoder.forward(&model.weights, &batch, Keep::All);
            decoder.backward(&model.weights, &batch, &d_logps, &mut gradient);
            let decoder = std::cell::RefCell::new(decoder);
            for spec in &model.layout.specs {
                let range = spec.range.clone();
                check(&model.weights[range.clone()], &gradient[range.clone()], &weights_of_logps, |part| {
                    let mut weights = model.weights.clone();
                    weights[range.clone()].copy_from_slice(part);
                    decoder.borrow_mut().logps(&weights, &batch).iter().map(|&l| l as f32).collect()
                });
            }
        }
    }

    #[test]
    fn every_way_to_the_gradient_gives_the_same_bits() {
        let (batch, d_logps) = (batch(), [0.7, -0.4, 1.1, 0.3, -0.9]);
        for model in models() {
            let mut decoder = Decoder::new(&model, 16);
            let mut kept = vec![0.0; model.layout.len];
            let logps = decoder.forward(&model.weights, &batch, Keep::All);
            decoder.backward(&model.weights, &batch, &d_logps, &mut kept);
            assert_eq!(logps, decoder.logps(&model.weights, &batch));
            let mut recomputed = vec![0.0; model.layout.len];
            decoder.forward(&model.weights, &batch, Keep::Inputs);
            decoder.backward(&model.weights, &batch, &d_logps, &mut recomputed);
            assert_eq!(kept, recomputed);
            let mut fused = vec![0.0; model.layout.len];
            assert_eq!(logps, decoder.forward_backward(&model.weights, &batch, &d_logps, Keep::All, &mut fused));
            assert_eq!(kept, fused);
        }
    }

    #[test]
    fn packed_equals_one_sequence_at_a_time() {
        for model in models() {
            let mut decoder = Decoder::new(&model, 16);
            let packed = decoder.logps(&model.weights, &batch());
            let sequences: [(&[u32], &[u32]); 5] = [
                (&[1, 5, 3], &[4, 2]),
                (&[1, 5, 3], &[9, 9, 10, 2]),
                (&[1, 7], &[8, 2]),
                (&[1], &[2]),
                (&[1], &[6, 0]),
            ];
            for (packed, (prompt, response)) in packed.iter().zip(sequences) {
                let mut alone = PackedBatch::default();
                alone.push(prompt, &[response]);
                let alone = decoder.logps(&model.weights, &alone)[0];
                assert!((packed / alone - 1.0).abs() < 1e-5, "{packed} packed, {alone} alone");
            }
        }
    }

    #[test]
    fn a_small_batch_after_a_large_one_reads_nothing_stale() {
        let model = Model::random(tiny_config(), 0.4, 9);
        let mut small = PackedBatch::default();
        small.push(&[1, 2], &[&[3, 4]]);
        let fresh = Decoder::new(&model, 16).forward(&model.weights, &small, Keep::All);
        let mut decoder = Decoder::new(&model, 16);
        decoder.forward(&model.weights, &batch(), Keep::All);
        assert_eq!(fresh, decoder.forward(&model.weights, &small, Keep::All));
        let mut after = vec![0.0; model.layout.len];
        decoder.backward(&model.weights, &small, &[1.0], &mut after);
        let mut decoder = Decoder::new(&model, 16);
        let mut expected = vec![0.0; model.layout.len];
        decoder.forward(&model.weights, &small, Keep::All);
        decoder.backward(&model.weights, &small, &[1.0], &mut expected);
        assert_eq!(after, expected);
    }
}
