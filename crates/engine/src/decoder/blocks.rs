//! The blocks of a decoder.

use std::sync::Arc;

use super::tape::BlockTape;
use super::{Decoder, Keep, Parameters};
use crate::backend::{Backend, Cpu, Derivative, Pass, Room, Site};
use crate::batch::PackedBatch;
use crate::lora::Adapter;
use crate::model::{Layout, Model, Product};
use crate::ops::Number;
use crate::ops::attention::Heads;
use crate::ops::rope::RopeTable;

/// What a decoder knows of the models that it runs.
#[derive(Debug)]
pub(crate) struct Shape {
    pub(crate) layout: Layout,
    /// Whether the head gives scores instead of logits.
    pub(crate) scores: bool,
    pub(crate) heads: Heads,
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    pub(crate) eps: f32,
}

impl Shape {
    /// That of a model.
    pub(crate) fn new(model: &Model) -> Self {
        let config = &model.config;
        Self {
            layout: model.layout.clone(),
            scores: config.head.is_score(),
            heads: Heads::new(config),
            hidden: config.hidden_size,
            intermediate: config.intermediate_size,
            eps: config.rms_norm_eps as f32,
        }
    }

    /// Rows of the vocabulary head.
    pub(crate) fn vocab(&self) -> usize {
        self.layout.head.len() / self.hidden
    }

    /// Widths of what a product takes and of what it gives.
    pub(crate) fn widths(&self, product: Product) -> (usize, usize) {
        let Self { heads, hidden, intermediate, .. } = self;
        match product {
            Product::Qkv => (*hidden, heads.qkv_width()),
            Product::Output => (heads.query_width(), *hidden),
            Product::GateUp => (*hidden, 2 * intermediate),
            Product::Down => (*intermediate, *hidden),
        }
    }
}

/// A [`Decoder`] on a backend.
#[derive(Debug)]
pub(crate) struct DecoderOn<B: Backend> {
    pub(super) backend: B,
    pub(super) shape: Arc<Shape>,
    /// The residual stream; after a forward pass, the last block's output.
    pub(super) x: B::Buffer<f32>,
    /// Each block's input, when anything is kept.
    pub(super) inputs: Vec<B::Buffer<f32>>,
    /// What each block keeps, when all is.
    pub(super) tapes: Vec<BlockTape<B>>,
    /// What a block keeps that is nowhere else.
    pub(super) tape: BlockTape<B>,
    pub(super) softmax: B::Softmax,
    /// Whether it is of the last forward pass.
    pub(super) softmax_is_kept: bool,
    /// What the last forward pass has kept, if it is to be followed by a backward pass.
    pub(super) kept: Option<Keep>,
    pub(super) scratch: Scratch<B>,
    /// Rows for which buffers are made, those of the largest batch so far or [announced](Self::announce), and those of which the
    /// backward pass may read.
    pub(super) most_rows: usize,
    most_kept: usize,
}

/// Memory that holds nothing between operations.
#[derive(Debug)]
pub(super) struct Scratch<B: Backend> {
    pub(super) normed: B::Buffer<B::Number>,
    /// Sums for queries, keys and values, and for gate and up; derivatives for what is rotated, and for the activation.
    pub(super) sums: B::Buffer<B::Sum>,
    /// The activation; the derivatives for queries, keys and values.
    pub(super) passed: B::Buffer<B::Number>,
    pub(super) head: HeadScratch<B>,
    /// The derivative for the residual stream.
    pub(super) dx: B::Buffer<f32>,
    /// The derivatives for normalised rows, and for attention.
    pub(super) d_taken: B::Buffer<B::Sum>,
}

// not derived, which would ask as much of B
impl<B: Backend> Default for Scratch<B> {
    fn default() -> Self {
        Self {
            normed: Default::default(),
            sums: Default::default(),
            passed: Default::default(),
            head: HeadScratch::default(),
            dx: Default::default(),
            d_taken: Default::default(),
        }
    }
}

/// The rows that go to the head.
#[derive(Debug)]
pub(super) struct HeadScratch<B: Backend> {
    pub(super) x: B::Buffer<f32>,
    pub(super) r: B::Buffer<f32>,
    pub(super) normed: B::Buffer<B::Sum>,
    pub(super) d_x: B::Buffer<f32>,
    pub(super) d_normed: B::Buffer<B::Sum>,
}

impl<B: Backend> Default for HeadScratch<B> {
    fn default() -> Self {
        Self {
            x: Default::default(),
            r: Default::default(),
            normed: Default::default(),
            d_x: Default::default(),
            d_normed: Default::default(),
        }
    }
}

impl<T: Number> DecoderOn<Cpu<T>> {
    /// On the CPU, for sequences of which a table of positions knows all.
    pub(super) fn on_cpu(shape: Arc<Shape>, rope: RopeTable) -> Self {
        Self::new(Cpu::new(shape.clone(), rope), shape)
    }

    pub(super) fn into_parts(self) -> (Arc<Shape>, RopeTable) {
        (self.shape, self.backend.into_rope())
    }

    /// What a pass over a batch computes with.
    pub(super) fn pass<'a>(&self, parameters: Parameters<'a>, batch: &'a PackedBatch) -> Pass<'a> {
        self.checked(Pass::new(T::PRECISION, parameters, batch))
    }

    /// As [`Pass::of_parts`].
    pub(super) fn pass_of_parts<'a>(&self, base: &'a [f32], adapters: &[Option<&'a Adapter>]) -> Pass<'a> {
        self.checked(Pass::of_parts(T::PRECISION, base, adapters))
    }

    fn checked<'a>(&self, pass: Pass<'a>) -> Pass<'a> {
        assert_eq!(pass.base.len(), self.shape.layout.len, "the weights do not fit this decoder");
        pass
    }
}

impl<B: Backend> DecoderOn<B> {
    pub(crate) fn new(backend: B, shape: Arc<Shape>) -> Self {
        Self {
            backend,
            shape,
            x: Default::default(),
            inputs: Vec::new(),
            tapes: Vec::new(),
            tape: BlockTape::default(),
            softmax: Default::default(),
            softmax_is_kept: false,
            kept: None,
            scratch: Scratch::default(),
            most_rows: 0,
            most_kept: 0,
        }
    }

    /// Makes buffers at once for passes of `rows` tokens that train and as many `behind`.
    pub(super) fn announce(&mut self, rows: usize, behind: usize) {
        (self.most_rows, self.most_kept) = (rows + behind, rows);
    }

    /// As [`Decoder::logps`].
    pub(crate) fn logps(&mut self, pass: &B::Pass<'_>, batch: &PackedBatch) -> Result<Vec<f64>, B::Error> {
        self.run_blocks(pass, batch, None)?;
        self.head_forward(pass, batch, None)
    }

    /// As [`Decoder::forward`].
    pub(crate) fn forward(
        &mut self,
        pass: &B::Pass<'_>,
        batch: &PackedBatch,
        keep: Keep,
    ) -> Result<Vec<f64>, B::Error> {
        self.run_blocks(pass, batch, Some(keep))?;
        self.head_forward(pass, batch, Some(keep))
    }

    /// As [`Decoder::backward`].
    pub(crate) fn backward(
        &mut self,
        pass: &B::Pass<'_>,
        batch: &PackedBatch,
        d_logps: &[f64],
        gradient: &mut B::Gradient<'_>,
    ) -> Result<(), B::Error> {
        let keep = self.kept.take();
        let Some(keep) = keep else { panic!("backward without a forward pass before it") };
        self.head_backward(pass, batch, d_logps, gradient)?;
        self.backward_blocks(pass, batch, keep, gradient)
    }

    /// As [`Decoder::forward_backward`].
    pub(crate) fn forward_backward(
        &mut self,
        pass: &B::Pass<'_>,
        batch: &PackedBatch,
        d_logps: &[f64],
        keep: Keep,
        gradient: &mut B::Gradient<'_>,
    ) -> Result<Vec<f64>, B::Error> {
        assert_eq!(batch.rows(), batch.rows_before(), "a backward pass takes no responses behind its batch");
        self.run_blocks(pass, batch, Some(keep))?;
        self.kept = None;
        self.head_backward(pass, batch, d_logps, gradient)?;
        self.backward_blocks(pass, batch, keep, gradient)?;
        Ok(batch.sum_responses(&self.backend.logps(pass, &self.softmax)?))
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
        self.x = Default::default();
        self.softmax = Default::default();
        self.scratch = Scratch::default();
        self.backend.release();
    }

    /// Leaves the output of the last block in `self.x`.
    pub(super) fn run_blocks(
        &mut self,
        pass: &B::Pass<'_>,
        batch: &PackedBatch,
        keep: Option<Keep>,
    ) -> Result<(), B::Error> {
        assert_eq!(batch.for_scores, self.shape.scores, "the batch is not for this head");
        assert_eq!(B::rows(pass), batch.rows(), "the pass is of another batch");
        self.softmax_is_kept = false;
        let is_adapted = B::is_adapted(pass);
        let kept = match keep {
            None => 0,
            Some(keep) if Decoder::keeps_behind(is_adapted, keep) => batch.rows(),
            Some(_) => batch.rows_before(),
        };
        if batch.rows() > self.most_rows || kept > self.most_kept {
            self.release();
            (self.most_rows, self.most_kept) = (self.most_rows.max(batch.rows()), self.most_kept.max(kept));
        }
        let (room, kept_room) = (self.room(batch.rows()), self.kept_room(kept));
        // tapes that have no room for all rows take those that are kept when the block is done
        let is_cut = kept_room.most < room.most && !is_adapted;
        let blocks = self.shape.layout.blocks.len();
        if let Some(keep) = keep {
            self.inputs.resize_with(blocks, Default::default);
            self.tapes.resize_with(if keep == Keep::All { blocks } else { 0 }, BlockTape::default);
            if keep == Keep::All && !is_cut {
                self.tape = BlockTape::default();
            }
        }
        let mut x = std::mem::take(&mut self.x);
        self.backend.embed(room, pass, &mut x)?;
        for index in 0..blocks {
            if keep.is_some() {
                self.backend.copy(kept_room, self.shape.hidden, &x, &mut self.inputs[index])?;
            }
            // a pass that keeps nothing uses one of several tapes that are there
            let place = if keep.is_some() { index } else { 0 };
            let mut tape = std::mem::take(place_of(&mut self.tapes, &mut self.tape, place, is_cut));
            self.block_forward(pass, index, room, &mut x, &mut tape)?;
            if let (true, Some(_), Some(own)) = (is_cut, keep, self.tapes.get_mut(index)) {
                own.take_rows(&mut self.backend, &tape, kept_room, &self.shape)?;
            }
            *place_of(&mut self.tapes, &mut self.tape, place, is_cut) = tape;
        }
        self.x = x;
        self.kept = keep;
        Ok(())
    }

    /// Replaces the block's input `x` by its output and writes the tape.
    pub(super) fn block_forward(
        &mut self,
        pass: &B::Pass<'_>,
        index: usize,
        room: Room,
        x: &mut B::Buffer<f32>,
        tape: &mut BlockTape<B>,
    ) -> Result<(), B::Error> {
        let Self { backend, shape, scratch, .. } = self;
        let (block, site) = (&shape.layout.blocks[index], |product| Site { block: index, product });
        backend.norm(room, pass, &block.attention_norm, x, &mut scratch.normed, &mut tape.r_attention)?;
        backend.project(room, pass, site(Product::Qkv), &scratch.normed, &mut scratch.sums, &mut tape.lora)?;
        backend.rotate(room, pass, &scratch.sums, &mut tape.qkv)?;
        backend.attend(room, pass, &tape.qkv, &mut tape.attention, &mut tape.lse)?;
        backend.add_product(room, pass, site(Product::Output), &tape.attention, x, &mut tape.lora)?;

        backend.copy(room, shape.hidden, x, &mut tape.middle)?;
        backend.norm(room, pass, &block.feed_forward_norm, x, &mut scratch.normed, &mut tape.r_feed_forward)?;
        backend.project(room, pass, site(Product::GateUp), &scratch.normed, &mut scratch.sums, &mut tape.lora)?;
        backend.activate(room, &mut scratch.sums, &mut tape.gate_up, &mut scratch.passed)?;
        backend.add_product(room, pass, site(Product::Down), &scratch.passed, x, &mut tape.lora)
    }

    /// Takes `scratch.dx`, the gradient of the last block's output, through all blocks to the embedding.
    pub(super) fn backward_blocks(
        &mut self,
        pass: &B::Pass<'_>,
        batch: &PackedBatch,
        keep: Keep,
        gradient: &mut B::Gradient<'_>,
    ) -> Result<(), B::Error> {
        let room = self.room(batch.rows());
        for index in (0..self.shape.layout.blocks.len()).rev() {
            let mut tape = std::mem::take(place_of(&mut self.tapes, &mut self.tape, index, false));
            if keep == Keep::Inputs {
                let mut x = std::mem::take(&mut self.x);
                self.backend.copy(room, self.shape.hidden, &self.inputs[index], &mut x)?;
                self.block_forward(pass, index, room, &mut x, &mut tape)?;
                self.x = x;
            }
            self.block_backward(pass, index, room, &mut tape, gradient)?;
            *place_of(&mut self.tapes, &mut self.tape, index, false) = tape;
        }
        self.backend.embed_backward(pass, &self.scratch.dx, gradient)
    }

    /// Replaces `scratch.dx`, the gradient of the block's output, by that of its input, where anything trained lies
    /// before it. Uses up the tape.
    fn block_backward(
        &mut self,
        pass: &B::Pass<'_>,
        index: usize,
        room: Room,
        tape: &mut BlockTape<B>,
        gradient: &mut B::Gradient<'_>,
    ) -> Result<(), B::Error> {
        use Derivative::{Passed, Stream};
        let Self { backend, shape, scratch, inputs, .. } = self;
        let (block, site) = (&shape.layout.blocks[index], |product| Site { block: index, product });
        let Scratch { normed, sums, passed, dx, d_taken, .. } = scratch;
        let (down, up) = (site(Product::Down), site(Product::GateUp));
        let (norm, of_norm) = (&block.feed_forward_norm, [&tape.middle, &tape.r_feed_forward]);
        backend.norm_again(room, pass, norm, of_norm, normed)?;
        backend.input_gradient(room, pass, down, Stream(dx), Some(sums))?;
        backend.activate_backward(room, &mut tape.gate_up, sums, passed)?;
        backend.weight_gradient(room, pass, down, Stream(dx), passed, &tape.lora, gradient)?;
        backend.input_gradient(room, pass, up, Passed(&tape.gate_up), Some(d_taken))?;
        backend.weight_gradient(room, pass, up, Passed(&tape.gate_up), normed, &tape.lora, gradient)?;
        backend.norm_backward(room, pass, norm, of_norm, d_taken, dx, gradient)?;

        let (output, product) = (site(Product::Output), site(Product::Qkv));
        backend.input_gradient(room, pass, output, Stream(dx), Some(d_taken))?;
        backend.weight_gradient(room, pass, output, Stream(dx), &tape.attention, &tape.lora, gradient)?;
        backend.attend_backward(room, pass, [&tape.qkv, &tape.attention], &tape.lse, d_taken, sums)?;
        backend.rotate_backward(room, pass, sums, passed)?;
        let (norm, of_norm) = (&block.attention_norm, [&inputs[index], &tape.r_attention]);
        backend.norm_again(room, pass, norm, of_norm, normed)?;
        // before the first block there is the embedding alone
        let further = index > 0 || !B::is_adapted(pass);
        backend.input_gradient(room, pass, product, Passed(passed), further.then_some(&mut *d_taken))?;
        backend.weight_gradient(room, pass, product, Passed(passed), normed, &tape.lora, gradient)?;
        if further {
            backend.norm_backward(room, pass, norm, of_norm, d_taken, dx, gradient)?;
        }
        Ok(())
    }
}

/// A block's own tape where there is one, unless they are too small; else the one that all use in turn.
fn place_of<'t, B: Backend>(
    tapes: &'t mut [BlockTape<B>],
    tape: &'t mut BlockTape<B>,
    index: usize,
    are_small: bool,
) -> &'t mut BlockTape<B> {
    tapes.get_mut(index).filter(|_| !are_small).unwrap_or(tape)
}
