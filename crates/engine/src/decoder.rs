//! The decoder, written once over the operations: for log-probabilities, training and generation.
//!
//! ```text
//! x ─┬─ rmsnorm ─ qkv ─ rope ─ attention ─ output ─(+)─┬─ rmsnorm ─ gate·up ─ swiglu ─ down ─(+)─ x'
//!    └──────────────────────────────────────────────────┘└──────────────────────────────────────┘
//! ```

mod divergence;
mod head;
mod memory;
mod packed;
mod parameters;
mod tape;

use half::bf16;

use crate::batch::PackedBatch;
use crate::mixture::Shared;
use crate::model::{Layout, Model, Product};
use crate::ops::attention::{self, Heads, Span};
use crate::ops::rope::RopeTable;
use crate::ops::{embedding, fit, linear, lora, rmsnorm, swiglu};
use crate::precision::Precision;

pub use memory::PassSize;
pub use parameters::Parameters;
use parameters::{Gradient, Pass};
use tape::{BlockTape, CompactTape, Room};

pub use crate::ops::divergence::Head;
pub(crate) use packed::PackedModel;

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
/// Weights and gradients are passed to each call, so that one decoder serves several policies of one shape, with
/// adapters and without. A model with a score head gives the scores of responses where others give log-probabilities;
/// its batches are [`PackedBatch::for_scores`].
#[derive(Debug)]
pub struct Decoder {
    layout: Layout,
    /// Whether the head gives scores instead of logits.
    scores: bool,
    precision: Precision,
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
    /// What each block keeps in bf16; `tapes` is then the one place.
    compact: Vec<CompactTape>,
    /// The softmax of the first scored rows, as many as `inverse_sums` has: in f32, or
    excess: Vec<f32>,
    /// in bf16.
    rounded_excess: Vec<bf16>,
    /// What the last forward pass to be followed by a backward pass kept of the softmax.
    inverse_sums: Vec<f32>,
    kept: Option<Keep>,
    scratch: Scratch,
    /// Rows for which buffers are made, those of the largest batch so far or announced by [`with_rows`](Self::with_rows), and
    /// those of which the backward pass may read.
    most_rows: usize,
    most_kept: usize,
}

/// Memory that holds nothing between operations.
#[derive(Debug, Default)]
struct Scratch {
    normed: Vec<f32>,
    activation: Vec<f32>,
    rounded_activation: Vec<bf16>,
    logits: Vec<f32>,
    rounded_excess: Vec<bf16>,
    reference_logits: Vec<f32>,
    head: HeadScratch,
    dx: Vec<f32>,
    d_normed: Vec<f32>,
    d_attention: Vec<f32>,
    d_qkv: Vec<f32>,
    lora: lora::Scratch,
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

impl Decoder {
    /// A decoder for models of this shape. `positions` is the longest sequence that it will see.
    pub fn new(model: &Model, positions: usize) -> Self {
        let config = &model.config;
        Self {
            layout: model.layout.clone(),
            scores: config.head.is_score(),
            precision: Precision::F32,
            heads: Heads::new(config),
            hidden: config.hidden_size,
            intermediate: config.intermediate_size,
            eps: config.rms_norm_eps as f32,
            rope: RopeTable::new(config, positions),
            x: Vec::new(),
            inputs: Vec::new(),
            tapes: Vec::new(),
            compact: Vec::new(),
            excess: Vec::new(),
            rounded_excess: Vec::new(),
            inverse_sums: Vec::new(),
            kept: None,
            scratch: Scratch::default(),
            most_rows: 0,
            most_kept: 0,
        }
    }

    /// The same decoder with products in another precision than f32.
    pub fn with_precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// The same decoder, whose buffers are made at once for passes of `rows` tokens that train and as many `behind` as
    /// [`PassSize`] says, so that those of its blocks need not grow from one pass to the next.
    pub fn with_rows(self, rows: usize, behind: usize) -> Self {
        Self { most_rows: rows + behind, most_kept: rows, ..self }
    }

    /// The log-probability of each response of the batch, summed over its tokens; or its score.
    pub fn logps<'a>(&mut self, parameters: impl Into<Parameters<'a>>, batch: &'a PackedBatch) -> Vec<f64> {
        let pass = Pass::new(self.precision, parameters.into(), batch);
        self.run_blocks(&pass, batch, None);
        self.head_forward(&pass, batch, None)
    }

    /// As [`logps`](Self::logps), keeping what [`backward`](Self::backward) needs.
    pub fn forward<'a>(
        &mut self,
        parameters: impl Into<Parameters<'a>>,
        batch: &'a PackedBatch,
        keep: Keep,
    ) -> Vec<f64> {
        let pass = Pass::new(self.precision, parameters.into(), batch);
        self.run_blocks(&pass, batch, Some(keep));
        self.head_forward(&pass, batch, Some(keep))
    }

    /// Adds to `gradient` the derivative of Σ d_logps\[i\]·logp\[i\] with respect to every weight of what is trained:
    /// of the adapter if there is one, else of the model.
    ///
    /// # Panics
    /// If the last call was not [`forward`](Self::forward) with the same parameters and batch. The forward pass may have had
    /// [further responses](PackedBatch::push_response) behind this batch, which cost nothing here.
    pub fn backward<'a>(
        &mut self,
        parameters: impl Into<Parameters<'a>>,
        batch: &'a PackedBatch,
        d_logps: &[f64],
        gradient: &mut [f32],
    ) {
        let keep = self.kept.take();
        let Some(keep) = keep else { panic!("backward without a forward pass before it") };
        let pass = Pass::new(self.precision, parameters.into(), batch);
        let mut gradient = pass.gradient(gradient);
        self.head_backward(&pass, batch, d_logps, &mut gradient);
        self.backward_blocks(&pass, batch, keep, &mut gradient);
    }

    /// Forward and backward in one, for derivatives that are known beforehand: no logits are computed twice.
    /// Returns the log-probabilities.
    pub fn forward_backward<'a>(
        &mut self,
        parameters: impl Into<Parameters<'a>>,
        batch: &'a PackedBatch,
        d_logps: &[f64],
        keep: Keep,
        gradient: &mut [f32],
    ) -> Vec<f64> {
        let pass = Pass::new(self.precision, parameters.into(), batch);
        let mut gradient = pass.gradient(gradient);
        self.run_blocks(&pass, batch, Some(keep));
        self.kept = None;
        let logps = self.head_backward(&pass, batch, d_logps, &mut gradient);
        self.backward_blocks(&pass, batch, keep, &mut gradient);
        batch.sum_responses(&logps)
    }

    /// The logits `[wanted, vocab]` of the wanted tokens, for tokens that continue the sequences of a cache: the weighted
    /// sum of the policies' logits.
    ///
    /// The rows of the pass, and the cache's spans, are all tokens under the first policy, then all under the next. The bits
    /// of a sequence's logits do not depend on what is computed with it, as long as either every sequence has one token or
    /// every one has more.
    /// Where there is a packed model of these policies, its matrices are read instead of theirs.
    /// Keeps nothing for a backward pass; the cache takes each block's keys and values.
    pub(crate) fn infer(
        &mut self,
        policies: &Shared<'_>,
        packed: Option<&PackedModel>,
        tokens: &[u32],
        positions: &[u32],
        wanted: &[usize],
        cache: &mut dyn KeyValueCache,
    ) -> &[f32] {
        let parts = policies.adapters.len();
        let adapters = packed.map_or(policies.adapters.clone(), |packed| packed.adapters(policies));
        let pass = Pass::of_parts(self.precision, &policies.model.weights, &adapters).with_packed(packed);
        let pass = if wanted.len() == tokens.len() { pass.rowwise() } else { pass };
        self.check_weights(&pass);
        self.kept = None;
        self.tapes.resize_with(self.tapes.len().max(1), BlockTape::default);
        let d = self.hidden;
        let mut x = std::mem::take(&mut self.x);
        let all = parts * tokens.len();
        let rows = self.room(all).of(&mut x, d);
        embedding::forward(pass.base(&self.layout.embedding), &tokens.repeat(parts), rows, d);
        let positions = positions.repeat(parts);
        let mut tape = std::mem::take(&mut self.tapes[0]);
        for index in 0..self.layout.blocks.len() {
            self.block_forward(&pass, index, &cache.spans(index), &positions, rows, &mut tape);
            cache.store(index, &tape.qkv[..all * self.heads.qkv_width()]);
        }
        self.tapes[0] = tape;
        self.x = x;
        let of_part = |part: usize| wanted.iter().map(move |&row| (part * tokens.len() + row) as u32);
        self.gather_normed(&pass, &(0..parts).flat_map(of_part).collect::<Vec<_>>());
        let vocab = self.vocab();
        let Scratch { logits, head, .. } = &mut self.scratch;
        let normed = policies.weighted_sum(&mut head.normed[..parts * wanted.len() * d]);
        let logits = fit(logits, wanted.len() * vocab);
        match packed {
            Some(packed) => packed.head.forward(normed, logits, false),
            None => linear::forward_as(true, self.precision)(normed, pass.base(&self.layout.head), logits, d, false),
        }
        logits
    }

    /// Numbers and width of the attention heads.
    pub(crate) fn heads(&self) -> Heads {
        self.heads
    }

    /// Rows of the vocabulary head.
    fn vocab(&self) -> usize {
        self.layout.head.len() / self.hidden
    }

    fn check_weights(&self, pass: &Pass<'_>) {
        assert_eq!(pass.base.len(), self.layout.len, "the weights do not fit this decoder");
    }

    /// Memory for so many rows, made for those of the largest pass.
    fn room(&self, rows: usize) -> Room {
        Room { rows, most: self.most_rows.max(rows) }
    }

    /// As [`room`](Self::room), of what the backward pass reads.
    fn kept_room(&self, rows: usize) -> Room {
        Room { rows, most: self.most_kept.max(rows) }
    }

    /// Whether a pass that keeps what `keep` says for the backward pass keeps it of responses [added
    /// behind](PackedBatch::push_response) too, which needs none of it.
    pub fn keeps_behind(precision: Precision, adapted: bool, keep: Keep) -> bool {
        keep == Keep::All && (precision == Precision::F32 || adapted)
    }

    /// Whether every block has a tape of its own.
    fn has_tapes(&self, keep: Option<Keep>) -> bool {
        keep == Some(Keep::All) && self.precision == Precision::F32
    }

    /// Whether every block has a compact tape.
    fn has_compact_tapes(&self, keep: Option<Keep>) -> bool {
        keep == Some(Keep::All) && self.precision == Precision::Bf16
    }

    /// Gives back all memory before a pass that is larger than all before it, and than was [announced](Self::with_rows). A buffer
    /// that grew by itself would leave a hole into which none of the others fits, as they have to grow too.
    fn release(&mut self) {
        self.tapes.clear();
        self.compact.clear();
        self.inputs.clear();
        self.x = Vec::new();
        self.excess = Vec::new();
        self.rounded_excess = Vec::new();
        self.scratch = Scratch::default();
    }

    /// Leaves the output of the last block in `self.x`.
    fn run_blocks(&mut self, pass: &Pass<'_>, batch: &PackedBatch, keep: Option<Keep>) {
        self.check_weights(pass);
        assert_eq!(batch.for_scores, self.scores, "the batch is not for this head");
        // what was kept of the softmax is of another batch
        self.inverse_sums.clear();
        let kept = match keep {
            None => 0,
            Some(keep) if Self::keeps_behind(self.precision, pass.is_adapted(), keep) => batch.rows(),
            Some(_) => batch.rows_before(),
        };
        if batch.rows() > self.most_rows || kept > self.most_kept {
            self.release();
            (self.most_rows, self.most_kept) = (self.most_rows.max(batch.rows()), self.most_kept.max(kept));
        }
        let blocks = self.layout.blocks.len();
        let (apart, compact) = (self.has_tapes(keep), self.has_compact_tapes(keep));
        self.tapes.resize_with(if apart { blocks } else { 1 }, BlockTape::default);
        self.compact.resize_with(if compact { blocks } else { 0 }, CompactTape::default);
        self.inputs.resize_with(if keep.is_some() { blocks } else { 0 }, Vec::new);
        let d = self.hidden;
        let mut x = std::mem::take(&mut self.x);
        let (room, kept_room) = (self.room(batch.rows()), self.kept_room(kept));
        let rows = room.of(&mut x, d);
        embedding::forward(pass.base(&self.layout.embedding), &batch.tokens, rows, d);
        let spans = batch.spans();
        for index in 0..blocks {
            if keep.is_some() {
                copy(&rows[..kept * d], kept_room.of(&mut self.inputs[index], d));
            }
            let place = if apart { index } else { 0 };
            let mut tape = std::mem::take(&mut self.tapes[place]);
            self.block_forward(pass, index, &spans, &batch.positions, rows, &mut tape);
            if compact {
                let moves = kept_room.most == room.most;
                self.compact[index].store(&mut tape, [d, self.intermediate], self.heads, kept_room, moves);
            }
            self.tapes[place] = tape;
        }
        self.x = x;
        self.kept = keep;
    }

    /// Replaces the block's input `x` by its output and writes the tape.
    fn block_forward(
        &mut self,
        pass: &Pass<'_>,
        index: usize,
        spans: &[Span],
        positions: &[u32],
        x: &mut [f32],
        tape: &mut BlockTape,
    ) {
        let (n, d, f, heads) = (positions.len(), self.hidden, self.intermediate, self.heads);
        let (room, block, scratch) = (self.room(n), &self.layout.blocks[index], &mut self.scratch);
        let lora = &mut scratch.lora;
        let normed = room.of(&mut scratch.normed, d);
        let r = room.of(&mut tape.r_attention, 1);
        rmsnorm::forward(x, pass.base(&block.attention_norm), self.eps, normed, r);
        let qkv = room.of(&mut tape.qkv, heads.qkv_width());
        pass.linear(block, index, Product::Qkv).forward(normed, qkv, d, false, &mut tape.lora, lora);
        self.rope.forward(qkv, heads.qkv_width(), heads.query + heads.key_value, positions);
        round_kept(self.precision, qkv);
        let attended = room.of(&mut tape.attention, heads.query_width());
        attention::forward(qkv, heads, spans, self.precision, attended, room.of(&mut tape.lse, heads.query));
        round_kept(self.precision, attended);
        let output = pass.linear(block, index, Product::Output);
        output.forward(attended, x, heads.query_width(), true, &mut tape.lora, lora);

        copy(x, room.of(&mut tape.middle, d));
        let r = room.of(&mut tape.r_feed_forward, 1);
        rmsnorm::forward(x, pass.base(&block.feed_forward_norm), self.eps, normed, r);
        let gate_up = room.of(&mut tape.gate_up, 2 * f);
        pass.linear(block, index, Product::GateUp).forward(normed, gate_up, d, false, &mut tape.lora, lora);
        let down = pass.linear(block, index, Product::Down);
        match self.precision {
            Precision::F32 => {
                let activation = room.of(&mut scratch.activation, f);
                swiglu::forward(gate_up, activation, f);
                down.forward(activation, x, f, true, &mut tape.lora, lora);
            }
            Precision::Bf16 => {
                let rounded = room.of(&mut tape.rounded_gate_up, 2 * f);
                let activation = room.of(&mut scratch.rounded_activation, f);
                swiglu::forward_rounded(gate_up, rounded, activation, f);
                down.forward(activation, x, f, true, &mut tape.lora, lora);
            }
        }
    }

    /// Takes `scratch.dx`, the gradient of the last block's output, through all blocks to the embedding.
    fn backward_blocks(&mut self, pass: &Pass<'_>, batch: &PackedBatch, keep: Keep, gradient: &mut Gradient<'_>) {
        let spans = batch.spans();
        let (len, room) = (batch.rows() * self.hidden, self.room(batch.rows()));
        for index in (0..self.layout.blocks.len()).rev() {
            let place = if self.has_tapes(Some(keep)) { index } else { 0 };
            let mut tape = std::mem::take(&mut self.tapes[place]);
            if self.has_compact_tapes(Some(keep)) {
                self.compact[index].lend(&mut tape, self.heads, room);
            }
            if keep == Keep::Inputs {
                let mut x = std::mem::take(&mut self.x);
                copy(&self.inputs[index][..len], &mut x[..len]);
                self.block_forward(pass, index, &spans, &batch.positions, &mut x[..len], &mut tape);
                self.x = x;
            }
            self.block_backward(pass, index, &spans, &batch.positions, &mut tape, gradient);
            if self.has_compact_tapes(Some(keep)) {
                self.compact[index].exchange(&mut tape);
            }
            self.tapes[place] = tape;
        }
        if let Some(d_embedding) = gradient.base(&self.layout.embedding) {
            embedding::backward(&batch.tokens, &self.scratch.dx[..len], d_embedding, self.hidden);
        }
    }

    /// Replaces `scratch.dx`, the gradient of the block's output, by that of its input, where anything trained lies
    /// before it. Uses up the tape.
    fn block_backward(
        &mut self,
        pass: &Pass<'_>,
        index: usize,
        spans: &[Span],
        positions: &[u32],
        tape: &mut BlockTape,
        gradient: &mut Gradient<'_>,
    ) {
        let (n, d, f, heads) = (positions.len(), self.hidden, self.intermediate, self.heads);
        let (room, block, scratch) = (self.room(n), &self.layout.blocks[index], &mut self.scratch);
        let lora = &mut scratch.lora;
        let dx = room.of(&mut scratch.dx, d);
        let normed = room.of(&mut scratch.normed, d);
        let d_normed = room.of(&mut scratch.d_normed, d);

        let middle = &tape.middle[..n * d];
        let (norm, r) = (pass.base(&block.feed_forward_norm), &tape.r_feed_forward[..n]);
        rmsnorm::recompute(middle, norm, r, normed);
        let d_activation = room.of(&mut scratch.activation, f);
        let (down, product) = (pass.linear(block, index, Product::Down), pass.linear(block, index, Product::GateUp));
        down.backward_input(dx, Some(d_activation), f, lora);
        match self.precision {
            Precision::F32 => {
                let gate_up = &mut tape.gate_up[..n * 2 * f];
                swiglu::backward_in_place(gate_up, d_activation, f);
                down.backward_weight(dx, d_activation, f, gradient, &tape.lora, lora);
                product.backward_input(gate_up, Some(d_normed), d, lora);
                product.backward_weight(gate_up, normed, d, gradient, &tape.lora, lora);
            }
            Precision::Bf16 => {
                let gate_up = &mut tape.rounded_gate_up[..n * 2 * f];
                let activation = room.of(&mut scratch.rounded_activation, f);
                swiglu::backward_rounded(gate_up, d_activation, activation, f);
                down.backward_weight(dx, activation, f, gradient, &tape.lora, lora);
                product.backward_input(gate_up, Some(d_normed), d, lora);
                product.backward_weight(gate_up, normed, d, gradient, &tape.lora, lora);
            }
        }
        rmsnorm::backward(middle, norm, r, d_normed, dx, gradient.base(&block.feed_forward_norm));

        let (qkv, attended) = (&tape.qkv[..n * heads.qkv_width()], &tape.attention[..n * heads.query_width()]);
        let d_attended = room.of(&mut scratch.d_attention, heads.query_width());
        let output = pass.linear(block, index, Product::Output);
        output.backward_input(dx, Some(d_attended), heads.query_width(), lora);
        output.backward_weight(dx, attended, heads.query_width(), gradient, &tape.lora, lora);
        let d_qkv = room.of(&mut scratch.d_qkv, heads.qkv_width());
        attention::backward(qkv, heads, spans, self.precision, &tape.lse[..n * heads.query], d_attended, d_qkv);
        self.rope.backward(d_qkv, heads.qkv_width(), heads.query + heads.key_value, positions);
        let x = &self.inputs[index][..n * d];
        let (norm, r) = (pass.base(&block.attention_norm), &tape.r_attention[..n]);
        rmsnorm::recompute(x, norm, r, normed);
        let product = pass.linear(block, index, Product::Qkv);
        // before the first block there is the embedding alone
        let further = index > 0 || gradient.base(&self.layout.embedding).is_some();
        product.backward_input(d_qkv, further.then_some(&mut *d_normed), d, lora);
        product.backward_weight(d_qkv, normed, d, gradient, &tape.lora, lora);
        if further {
            rmsnorm::backward(x, norm, r, d_normed, dx, gradient.base(&block.attention_norm));
        }
    }
}

/// Copies numbers on all threads.
fn copy(from: &[f32], to: &mut [f32]) {
    assert_eq!(from.len(), to.len());
    tape::convert(from, to, |x| x);
}

/// Rounds what a tape keeps in bf16, so that the values are the same whether they are kept or computed again.
fn round_kept(precision: Precision, x: &mut [f32]) {
    if precision == Precision::Bf16 {
        linear::bf16::round(x);
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
mod tests;
