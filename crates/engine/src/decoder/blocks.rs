//! The blocks of a decoder, for activations of one type.

use half::bf16;

use super::tape::{BlockTape, Room};
use super::{Decoder, Gradient, Keep, Parameters, Pass};
use crate::batch::PackedBatch;
use crate::lora::Adapter;
use crate::model::{Layout, Model, Product};
use crate::ops::attention::{self, Heads, Span};
use crate::ops::number::copy;
use crate::ops::rope::RopeTable;
use crate::ops::{Number, embedding, lora, rmsnorm, swiglu};

/// What a decoder knows of the models that it runs.
#[derive(Debug)]
pub(super) struct Shape {
    pub(super) layout: Layout,
    /// Whether the head gives scores instead of logits.
    pub(super) scores: bool,
    pub(super) heads: Heads,
    pub(super) hidden: usize,
    intermediate: usize,
    pub(super) eps: f32,
    rope: RopeTable,
}

impl Shape {
    /// That of a model, for sequences of at most so many positions.
    pub(super) fn new(model: &Model, positions: usize) -> Self {
        let config = &model.config;
        Self {
            layout: model.layout.clone(),
            scores: config.head.is_score(),
            heads: Heads::new(config),
            hidden: config.hidden_size,
            intermediate: config.intermediate_size,
            eps: config.rms_norm_eps as f32,
            rope: RopeTable::new(config, positions),
        }
    }

    /// Rows of the vocabulary head.
    pub(super) fn vocab(&self) -> usize {
        self.layout.head.len() / self.hidden
    }
}

/// A [`Decoder`] whose operations pass numbers of type T on to products. The residual stream, sums of products, and gradients of both
/// are in f32 whatever T is.
#[derive(Debug)]
pub(super) struct DecoderOf<T> {
    pub(super) shape: Shape,
    /// The residual stream; after a forward pass, the last block's output.
    pub(super) x: Vec<f32>,
    /// Each block's input, when anything is kept.
    pub(super) inputs: Vec<Vec<f32>>,
    /// What each block keeps, when all is.
    pub(super) tapes: Vec<BlockTape<T>>,
    /// What a block keeps that is nowhere else.
    pub(super) tape: BlockTape<T>,
    /// The softmax of the first scored rows, as many as `inverse_sums` has: in f32, or
    pub(super) excess: Vec<f32>,
    /// in bf16.
    pub(super) rounded_excess: Vec<bf16>,
    /// What the last forward pass to be followed by a backward pass kept of the softmax.
    pub(super) inverse_sums: Vec<f32>,
    pub(super) kept: Option<Keep>,
    pub(super) scratch: Scratch<T>,
    /// Rows for which buffers are made, those of the largest batch so far or [announced](Self::announce), and those of which the
    /// backward pass may read.
    pub(super) most_rows: usize,
    most_kept: usize,
}

/// Memory that holds nothing between operations.
#[derive(Debug)]
pub(super) struct Scratch<T> {
    pub(super) normed: Vec<T>,
    /// Sums for queries, keys and values, and their gradients.
    pub(super) qkv: Vec<f32>,
    /// Sums for gate and up, and the gradient of the activation.
    pub(super) gate_up: Vec<f32>,
    pub(super) activation: Vec<T>,
    pub(super) logits: Vec<f32>,
    pub(super) rounded_excess: Vec<bf16>,
    pub(super) reference_logits: Vec<f32>,
    pub(super) head: HeadScratch,
    pub(super) dx: Vec<f32>,
    pub(super) d_normed: Vec<f32>,
    pub(super) d_attention: Vec<f32>,
    pub(super) d_qkv: Vec<T>,
    pub(super) lora: lora::Scratch,
}

// not derived, which would ask as much of T
impl<T> Default for Scratch<T> {
    fn default() -> Self {
        Self {
            normed: Vec::new(),
            qkv: Vec::new(),
            gate_up: Vec::new(),
            activation: Vec::new(),
            logits: Vec::new(),
            rounded_excess: Vec::new(),
            reference_logits: Vec::new(),
            head: HeadScratch::default(),
            dx: Vec::new(),
            d_normed: Vec::new(),
            d_attention: Vec::new(),
            d_qkv: Vec::new(),
            lora: lora::Scratch::default(),
        }
    }
}

/// Rows of one chunk of the vocabulary head.
#[derive(Debug, Default)]
pub(super) struct HeadScratch {
    pub(super) x: Vec<f32>,
    pub(super) r: Vec<f32>,
    pub(super) normed: Vec<f32>,
    pub(super) d_x: Vec<f32>,
    pub(super) d_normed: Vec<f32>,
}

impl<T: Number> DecoderOf<T> {
    pub(super) fn new(shape: Shape) -> Self {
        Self {
            shape,
            x: Vec::new(),
            inputs: Vec::new(),
            tapes: Vec::new(),
            tape: BlockTape::default(),
            excess: Vec::new(),
            rounded_excess: Vec::new(),
            inverse_sums: Vec::new(),
            kept: None,
            scratch: Scratch::default(),
            most_rows: 0,
            most_kept: 0,
        }
    }

    pub(super) fn into_shape(self) -> Shape {
        self.shape
    }

    /// Makes buffers at once for passes of `rows` tokens that train and as many `behind`.
    pub(super) fn announce(&mut self, rows: usize, behind: usize) {
        (self.most_rows, self.most_kept) = (rows + behind, rows);
    }

    /// What a pass over a batch computes with.
    pub(super) fn pass<'a>(&self, parameters: Parameters<'a>, batch: &'a PackedBatch) -> Pass<'a> {
        Pass::new(T::PRECISION, parameters, batch)
    }

    /// As [`Pass::of_parts`].
    pub(super) fn pass_of_parts<'a>(&self, base: &'a [f32], adapters: &[Option<&'a Adapter>]) -> Pass<'a> {
        Pass::of_parts(T::PRECISION, base, adapters)
    }

    /// As [`Decoder::logps`].
    pub(super) fn logps(&mut self, pass: &Pass<'_>, batch: &PackedBatch) -> Vec<f64> {
        self.run_blocks(pass, batch, None);
        self.head_forward(pass, batch, None)
    }

    /// As [`Decoder::forward`].
    pub(super) fn forward(&mut self, pass: &Pass<'_>, batch: &PackedBatch, keep: Keep) -> Vec<f64> {
        self.run_blocks(pass, batch, Some(keep));
        self.head_forward(pass, batch, Some(keep))
    }

    /// As [`Decoder::backward`].
    pub(super) fn backward(&mut self, pass: &Pass<'_>, batch: &PackedBatch, d_logps: &[f64], gradient: &mut [f32]) {
        let keep = self.kept.take();
        let Some(keep) = keep else { panic!("backward without a forward pass before it") };
        let mut gradient = pass.gradient(gradient);
        self.head_backward(pass, batch, d_logps, &mut gradient);
        self.backward_blocks(pass, batch, keep, &mut gradient);
    }

    /// As [`Decoder::forward_backward`].
    pub(super) fn forward_backward(
        &mut self,
        pass: &Pass<'_>,
        batch: &PackedBatch,
        d_logps: &[f64],
        keep: Keep,
        gradient: &mut [f32],
    ) -> Vec<f64> {
        assert_eq!(batch.rows(), batch.rows_before(), "a backward pass takes no responses behind its batch");
        let mut gradient = pass.gradient(gradient);
        self.run_blocks(pass, batch, Some(keep));
        self.kept = None;
        let logps = self.head_backward(pass, batch, d_logps, &mut gradient);
        self.backward_blocks(pass, batch, keep, &mut gradient);
        batch.sum_responses(&logps)
    }

    pub(super) fn check_weights(&self, pass: &Pass<'_>) {
        assert_eq!(pass.base.len(), self.shape.layout.len, "the weights do not fit this decoder");
    }

    /// Memory for so many rows, made for those of the largest pass.
    pub(super) fn room(&self, rows: usize) -> Room {
        Room { rows, most: self.most_rows.max(rows) }
    }

    /// As [`room`](Self::room), of what the backward pass reads.
    fn kept_room(&self, rows: usize) -> Room {
        Room { rows, most: self.most_kept.max(rows) }
    }

    /// Gives back all memory before a pass that is larger than all before it, and than was [announced](Self::announce). A buffer
    /// that grew by itself would leave a hole into which none of the others fits, as they have to grow too.
    fn release(&mut self) {
        self.tapes.clear();
        self.tape = BlockTape::default();
        self.inputs.clear();
        self.x = Vec::new();
        self.excess = Vec::new();
        self.rounded_excess = Vec::new();
        self.scratch = Scratch::default();
    }

    /// Leaves the output of the last block in `self.x`.
    pub(super) fn run_blocks(&mut self, pass: &Pass<'_>, batch: &PackedBatch, keep: Option<Keep>) {
        self.check_weights(pass);
        assert_eq!(batch.for_scores, self.shape.scores, "the batch is not for this head");
        // what was kept of the softmax is of another batch
        self.inverse_sums.clear();
        let kept = match keep {
            None => 0,
            Some(keep) if Decoder::keeps_behind(pass.is_adapted(), keep) => batch.rows(),
            Some(_) => batch.rows_before(),
        };
        if batch.rows() > self.most_rows || kept > self.most_kept {
            self.release();
            (self.most_rows, self.most_kept) = (self.most_rows.max(batch.rows()), self.most_kept.max(kept));
        }
        let (room, kept_room) = (self.room(batch.rows()), self.kept_room(kept));
        // tapes that have no room for all rows take those that are kept when the block is done
        let is_cut = kept_room.most < room.most && !pass.is_adapted();
        let blocks = self.shape.layout.blocks.len();
        if let Some(keep) = keep {
            self.inputs.resize_with(blocks, Vec::new);
            self.tapes.resize_with(if keep == Keep::All { blocks } else { 0 }, BlockTape::default);
            if keep == Keep::All && !is_cut {
                self.tape = BlockTape::default();
            }
        }
        let d = self.shape.hidden;
        let mut x = std::mem::take(&mut self.x);
        let rows = room.of(&mut x, d);
        embedding::forward(pass.base(&self.shape.layout.embedding), &batch.tokens, rows, d);
        let spans = batch.spans();
        for index in 0..blocks {
            if keep.is_some() {
                copy(&rows[..kept * d], kept_room.of(&mut self.inputs[index], d));
            }
            // a pass that keeps nothing uses one of several tapes that are there
            let place = if keep.is_some() { index } else { 0 };
            let mut tape = std::mem::take(place_of(&mut self.tapes, &mut self.tape, place, is_cut));
            self.block_forward(pass, index, &spans, &batch.positions, rows, &mut tape);
            if let (true, Some(_), Some(own)) = (is_cut, keep, self.tapes.get_mut(index)) {
                own.take_rows(&tape, kept_room, self.shape.heads, [d, self.shape.intermediate]);
            }
            *place_of(&mut self.tapes, &mut self.tape, place, is_cut) = tape;
        }
        self.x = x;
        self.kept = keep;
    }

    /// Replaces the block's input `x` by its output and writes the tape.
    pub(super) fn block_forward(
        &mut self,
        pass: &Pass<'_>,
        index: usize,
        spans: &[Span],
        positions: &[u32],
        x: &mut [f32],
        tape: &mut BlockTape<T>,
    ) {
        let room = self.room(positions.len());
        let Shape { layout, heads, hidden: d, intermediate: f, eps, rope, .. } = &self.shape;
        let (&d, &f, heads) = (d, f, *heads);
        let (block, scratch) = (&layout.blocks[index], &mut self.scratch);
        let lora = &mut scratch.lora;
        let normed = room.of(&mut scratch.normed, d);
        let r = room.of(&mut tape.r_attention, 1);
        rmsnorm::forward(x, pass.base(&block.attention_norm), *eps, normed, r);
        let sums = room.of(&mut scratch.qkv, heads.qkv_width());
        pass.linear(block, index, Product::Qkv).forward(normed, sums, d, false, &mut tape.lora, lora);
        let qkv = room.of(&mut tape.qkv, heads.qkv_width());
        rope.forward(sums, qkv, heads.qkv_width(), heads.query + heads.key_value, positions);
        let attended = room.of(&mut tape.attention, heads.query_width());
        attention::forward(qkv, heads, spans, attended, room.of(&mut tape.lse, heads.query));
        let output = pass.linear(block, index, Product::Output);
        output.forward(attended, x, heads.query_width(), true, &mut tape.lora, lora);

        copy(x, room.of(&mut tape.middle, d));
        let r = room.of(&mut tape.r_feed_forward, 1);
        rmsnorm::forward(x, pass.base(&block.feed_forward_norm), *eps, normed, r);
        let sums = room.of(&mut scratch.gate_up, 2 * f);
        pass.linear(block, index, Product::GateUp).forward(normed, sums, d, false, &mut tape.lora, lora);
        room.of(&mut tape.gate_up, 2 * f);
        let activation = room.of(&mut scratch.activation, f);
        swiglu::forward(&mut scratch.gate_up, &mut tape.gate_up, activation, f);
        let down = pass.linear(block, index, Product::Down);
        down.forward(activation, x, f, true, &mut tape.lora, lora);
    }

    /// Takes `scratch.dx`, the gradient of the last block's output, through all blocks to the embedding.
    pub(super) fn backward_blocks(
        &mut self,
        pass: &Pass<'_>,
        batch: &PackedBatch,
        keep: Keep,
        gradient: &mut Gradient<'_>,
    ) {
        let (spans, d) = (batch.spans(), self.shape.hidden);
        let len = batch.rows() * d;
        for index in (0..self.shape.layout.blocks.len()).rev() {
            let mut tape = std::mem::take(place_of(&mut self.tapes, &mut self.tape, index, false));
            if keep == Keep::Inputs {
                let mut x = std::mem::take(&mut self.x);
                copy(&self.inputs[index][..len], &mut x[..len]);
                self.block_forward(pass, index, &spans, &batch.positions, &mut x[..len], &mut tape);
                self.x = x;
            }
            self.block_backward(pass, index, &spans, &batch.positions, &mut tape, gradient);
            *place_of(&mut self.tapes, &mut self.tape, index, false) = tape;
        }
        if let Some(d_embedding) = gradient.base(&self.shape.layout.embedding) {
            embedding::backward(&batch.tokens, &self.scratch.dx[..len], d_embedding, d);
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
        tape: &mut BlockTape<T>,
        gradient: &mut Gradient<'_>,
    ) {
        let (n, room) = (positions.len(), self.room(positions.len()));
        let Shape { layout, heads, hidden: d, intermediate: f, rope, .. } = &self.shape;
        let (&d, &f, heads) = (d, f, *heads);
        let (block, scratch) = (&layout.blocks[index], &mut self.scratch);
        let lora = &mut scratch.lora;
        let dx = room.of(&mut scratch.dx, d);
        let normed = room.of(&mut scratch.normed, d);
        let d_normed = room.of(&mut scratch.d_normed, d);

        let middle = &tape.middle[..n * d];
        let (norm, r) = (pass.base(&block.feed_forward_norm), &tape.r_feed_forward[..n]);
        rmsnorm::recompute(middle, norm, r, normed);
        let d_activation = room.of(&mut scratch.gate_up, f);
        let (down, product) = (pass.linear(block, index, Product::Down), pass.linear(block, index, Product::GateUp));
        down.backward_input(dx, Some(d_activation), f, lora);
        let (gate_up, activation) = (&mut tape.gate_up[..n * 2 * f], room.of(&mut scratch.activation, f));
        swiglu::backward(gate_up, d_activation, activation, f);
        down.backward_weight(dx, activation, f, gradient, &tape.lora, lora);
        product.backward_input(gate_up, Some(d_normed), d, lora);
        product.backward_weight(gate_up, normed, d, gradient, &tape.lora, lora);
        rmsnorm::backward(middle, norm, r, d_normed, dx, gradient.base(&block.feed_forward_norm));

        let (qkv, attended) = (&tape.qkv[..n * heads.qkv_width()], &tape.attention[..n * heads.query_width()]);
        let d_attended = room.of(&mut scratch.d_attention, heads.query_width());
        let output = pass.linear(block, index, Product::Output);
        output.backward_input(dx, Some(d_attended), heads.query_width(), lora);
        output.backward_weight(dx, attended, heads.query_width(), gradient, &tape.lora, lora);
        let d_rotated = room.of(&mut scratch.qkv, heads.qkv_width());
        attention::backward(qkv, heads, spans, &tape.lse[..n * heads.query], d_attended, d_rotated);
        let d_qkv = room.of(&mut scratch.d_qkv, heads.qkv_width());
        rope.backward(d_rotated, d_qkv, heads.qkv_width(), heads.query + heads.key_value, positions);
        let x = &self.inputs[index][..n * d];
        let (norm, r) = (pass.base(&block.attention_norm), &tape.r_attention[..n]);
        rmsnorm::recompute(x, norm, r, normed);
        let product = pass.linear(block, index, Product::Qkv);
        // before the first block there is the embedding alone
        let further = index > 0 || gradient.base(&layout.embedding).is_some();
        product.backward_input(d_qkv, further.then_some(&mut *d_normed), d, lora);
        product.backward_weight(d_qkv, normed, d, gradient, &tape.lora, lora);
        if further {
            rmsnorm::backward(x, norm, r, d_normed, dx, gradient.base(&block.attention_norm));
        }
    }
}

/// A block's own tape where there is one, unless they are too small; else the one that all use in turn.
fn place_of<'t, T>(
    tapes: &'t mut [BlockTape<T>],
    tape: &'t mut BlockTape<T>,
    index: usize,
    are_small: bool,
) -> &'t mut BlockTape<T> {
    tapes.get_mut(index).filter(|_| !are_small).unwrap_or(tape)
}
