//! What a block keeps for its backward pass.

use super::Shape;
use crate::backend::{Backend, Kept, Room};

/// What the backward pass of one block reads, besides the block's input.
#[derive(Debug)]
pub(super) struct BlockTape<B: Backend> {
    /// 1/rms of the block's input, `[n]`.
    pub(super) r_attention: B::Buffer<f32>,
    /// Rotated queries and keys, and values, `[n, qkv_width]`.
    pub(super) qkv: B::Buffer<B::Number>,
    /// Log-sum-exp of the scores, `[n, heads]`.
    pub(super) lse: B::Buffer<f32>,
    /// Output of attention before its projection, `[n, query_width]`.
    pub(super) attention: B::Buffer<B::Number>,
    /// The residual stream between the two halves, `[n, hidden]`.
    pub(super) middle: B::Buffer<f32>,
    /// 1/rms of `middle`, `[n]`.
    pub(super) r_feed_forward: B::Buffer<f32>,
    /// `[n, 2·intermediate]`.
    pub(super) gate_up: B::Buffer<B::Number>,
    /// What adapts its products keeps this.
    pub(super) lora: Kept<B>,
}

// not derived, which would ask as much of B
impl<B: Backend> Default for BlockTape<B> {
    fn default() -> Self {
        Self {
            r_attention: Default::default(),
            qkv: Default::default(),
            lse: Default::default(),
            attention: Default::default(),
            middle: Default::default(),
            r_feed_forward: Default::default(),
            gate_up: Default::default(),
            lora: Default::default(),
        }
    }
}

impl<B: Backend> BlockTape<B> {
    /// Takes the first rows of another tape, besides what is of adapters.
    pub(super) fn take_rows(
        &mut self,
        backend: &mut B,
        from: &Self,
        room: Room,
        shape: &Shape,
    ) -> Result<(), B::Error> {
        let heads = shape.heads;
        backend.copy(room, 1, &from.r_attention, &mut self.r_attention)?;
        backend.copy(room, heads.qkv_width(), &from.qkv, &mut self.qkv)?;
        backend.copy(room, heads.query, &from.lse, &mut self.lse)?;
        backend.copy(room, heads.query_width(), &from.attention, &mut self.attention)?;
        backend.copy(room, shape.hidden, &from.middle, &mut self.middle)?;
        backend.copy(room, 1, &from.r_feed_forward, &mut self.r_feed_forward)?;
        backend.copy(room, 2 * shape.intermediate, &from.gate_up, &mut self.gate_up)
    }
}
