//! What a block keeps for its backward pass.

use super::parameters::Kept;
use crate::ops::attention::Heads;
use crate::ops::number::copy;
use crate::ops::{Number, fit};

/// How many rows a pass has, and for how many its buffers are made, so that they need not grow with the next pass.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    pub(super) rows: usize,
    /// At least `rows`.
    pub(super) most: usize,
}

impl Room {
    /// The rows of a buffer of rows of this width.
    pub(super) fn of<T: Number>(self, buffer: &mut Vec<T>, width: usize) -> &mut [T] {
        &mut fit(buffer, self.most * width)[..self.rows * width]
    }
}

/// What the backward pass of one block reads, besides the block's input.
#[derive(Debug)]
pub(super) struct BlockTape<T> {
    /// 1/rms of the block's input, `[n]`.
    pub(super) r_attention: Vec<f32>,
    /// Rotated queries and keys, and values, `[n, qkv_width]`.
    pub(super) qkv: Vec<T>,
    /// Log-sum-exp of the scores, `[n, heads]`.
    pub(super) lse: Vec<f32>,
    /// Output of attention before its projection, `[n, query_width]`.
    pub(super) attention: Vec<T>,
    /// The residual stream between the two halves, `[n, hidden]`.
    pub(super) middle: Vec<f32>,
    /// 1/rms of `middle`, `[n]`.
    pub(super) r_feed_forward: Vec<f32>,
    /// `[n, 2·intermediate]`.
    pub(super) gate_up: Vec<T>,
    /// What adapts its products keeps this.
    pub(super) lora: Kept,
}

// not derived, which would ask as much of T
impl<T> Default for BlockTape<T> {
    fn default() -> Self {
        Self {
            r_attention: Vec::new(),
            qkv: Vec::new(),
            lse: Vec::new(),
            attention: Vec::new(),
            middle: Vec::new(),
            r_feed_forward: Vec::new(),
            gate_up: Vec::new(),
            lora: Kept::default(),
        }
    }
}

impl<T: Number> BlockTape<T> {
    /// Takes the first rows of another tape, besides what is of adapters.
    pub(super) fn take_rows(&mut self, from: &Self, room: Room, heads: Heads, [hidden, intermediate]: [usize; 2]) {
        fn take<N: Number>(from: &[N], to: &mut Vec<N>, room: Room, width: usize) {
            copy(&from[..room.rows * width], room.of(to, width));
        }
        take(&from.r_attention, &mut self.r_attention, room, 1);
        take(&from.qkv, &mut self.qkv, room, heads.qkv_width());
        take(&from.lse, &mut self.lse, room, heads.query);
        take(&from.attention, &mut self.attention, room, heads.query_width());
        take(&from.middle, &mut self.middle, room, hidden);
        take(&from.r_feed_forward, &mut self.r_feed_forward, room, 1);
        take(&from.gate_up, &mut self.gate_up, room, 2 * intermediate);
    }
}
