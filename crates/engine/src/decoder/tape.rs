//! What a block keeps for its backward pass.

use half::bf16;
use rayon::prelude::*;

use super::parameters::Kept;
use crate::ops::attention::Heads;
use crate::ops::simd::{dispatch, of_bf16, to_bf16};
use crate::ops::{Zeros, fit};

/// Numbers per task.
const CHUNK: usize = 1 << 14;

/// How many rows a pass has, and for how many its buffers are made, so that they need not grow with the next pass.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    pub(super) rows: usize,
    /// At least `rows`.
    pub(super) most: usize,
}

impl Room {
    /// The rows of a buffer of rows of this width.
    pub(super) fn of<T: Zeros>(self, buffer: &mut Vec<T>, width: usize) -> &mut [T] {
        &mut fit(buffer, self.most * width)[..self.rows * width]
    }
}

/// What the backward pass of one block reads, besides the block's input.
#[derive(Debug, Default)]
pub(super) struct BlockTape {
    /// 1/rms of the block's input, `[n]`.
    pub(super) r_attention: Vec<f32>,
    /// Rotated queries and keys, and values, `[n, qkv_width]`.
    pub(super) qkv: Vec<f32>,
    /// Log-sum-exp of the scores, `[n, heads]`.
    pub(super) lse: Vec<f32>,
    /// Output of attention before its projection, `[n, query_width]`.
    pub(super) attention: Vec<f32>,
    /// The residual stream between the two halves, `[n, hidden]`.
    pub(super) middle: Vec<f32>,
    /// 1/rms of `middle`, `[n]`.
    pub(super) r_feed_forward: Vec<f32>,
    /// `[n, 2·intermediate]`; in bf16 what it is before it is rounded, which nothing reads later.
    pub(super) gate_up: Vec<f32>,
    /// The same in bf16, there alone.
    pub(super) rounded_gate_up: Vec<bf16>,
    /// What adapts its products keeps this.
    pub(super) lora: Kept,
}

/// A tape whose wide arrays, which hold bf16 numbers, are kept in 16 bits.
#[derive(Debug, Default)]
pub(super) struct CompactTape {
    narrow: BlockTape,
    qkv: Vec<bf16>,
    attention: Vec<bf16>,
}

#[cfg(test)]
impl CompactTape {
    /// What it takes.
    pub(super) fn bytes(&self) -> usize {
        let narrow = [&self.narrow.r_attention, &self.narrow.lse, &self.narrow.middle, &self.narrow.r_feed_forward];
        let narrow = narrow.into_iter().chain(&self.narrow.lora);
        let narrow = narrow.map(|values| size_of_val(values.as_slice())).sum::<usize>();
        let wide = [&self.qkv, &self.attention, &self.narrow.rounded_gate_up];
        narrow + wide.map(|values| size_of_val(values.as_slice())).iter().sum::<usize>()
    }
}

impl CompactTape {
    /// Takes what a tape holds; the tape keeps memory for another block.
    pub(super) fn store(&mut self, tape: &mut BlockTape, heads: Heads, room: Room) {
        self.exchange(tape);
        let [qkv, attention] = [heads.qkv_width(), heads.query_width()];
        for (from, to, width) in [(&tape.qkv, &mut self.qkv, qkv), (&tape.attention, &mut self.attention, attention)] {
            let to = room.of(to, width);
            to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK)).for_each(|(to, from)| {
                dispatch(
                    #[inline(always)]
                    || to.iter_mut().zip(from).for_each(|(to, from)| *to = to_bf16(*from)),
                );
            });
        }
    }

    /// Gives it back to a tape.
    pub(super) fn restore(&mut self, tape: &mut BlockTape, heads: Heads, room: Room) {
        self.exchange(tape);
        let [qkv, attention] = [heads.qkv_width(), heads.query_width()];
        for (to, from, width) in [(&mut tape.qkv, &self.qkv, qkv), (&mut tape.attention, &self.attention, attention)] {
            let to = room.of(to, width);
            to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK)).for_each(|(to, from)| {
                dispatch(
                    #[inline(always)]
                    || to.iter_mut().zip(from).for_each(|(to, from)| *to = of_bf16(*from)),
                );
            });
        }
    }

    /// What is narrow stays in f32, gate and up are in 16 bits already: they move without a copy.
    fn exchange(&mut self, tape: &mut BlockTape) {
        let narrow = &mut self.narrow;
        std::mem::swap(&mut narrow.r_attention, &mut tape.r_attention);
        std::mem::swap(&mut narrow.lse, &mut tape.lse);
        std::mem::swap(&mut narrow.middle, &mut tape.middle);
        std::mem::swap(&mut narrow.r_feed_forward, &mut tape.r_feed_forward);
        std::mem::swap(&mut narrow.rounded_gate_up, &mut tape.rounded_gate_up);
        std::mem::swap(&mut narrow.lora, &mut tape.lora);
    }
}
