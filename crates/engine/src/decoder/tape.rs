//! What a block keeps for its backward pass.

use half::bf16;
use rayon::prelude::*;

use super::parameters::Kept;
use crate::ops::attention::Heads;
use crate::ops::simd::{dispatch, of_bf16, to_bf16};
use crate::ops::{Zeros, fit};

/// Numbers that a task converts.
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
    /// Takes what a tape holds of so many rows; the tape keeps memory for another block. With `moves`, what is as wide in both
    /// moves without a copy, for which this must have room for all rows of the tape.
    pub(super) fn store(
        &mut self,
        tape: &mut BlockTape,
        [hidden, intermediate]: [usize; 2],
        heads: Heads,
        room: Room,
        moves: bool,
    ) {
        if moves {
            self.exchange(tape);
        } else {
            let (narrow, copy) = (&mut self.narrow, |x: f32| x);
            convert(&tape.r_attention, room.of(&mut narrow.r_attention, 1), copy);
            convert(&tape.lse, room.of(&mut narrow.lse, heads.query), copy);
            convert(&tape.middle, room.of(&mut narrow.middle, hidden), copy);
            convert(&tape.r_feed_forward, room.of(&mut narrow.r_feed_forward, 1), copy);
            convert(&tape.rounded_gate_up, room.of(&mut narrow.rounded_gate_up, 2 * intermediate), |x| x);
        }
        convert(&tape.qkv, room.of(&mut self.qkv, heads.qkv_width()), to_bf16);
        convert(&tape.attention, room.of(&mut self.attention, heads.query_width()), to_bf16);
    }

    /// Lends a tape what it holds, until [`exchange`](Self::exchange) takes it back.
    pub(super) fn lend(&mut self, tape: &mut BlockTape, heads: Heads, room: Room) {
        self.exchange(tape);
        convert(&self.qkv, room.of(&mut tape.qkv, heads.qkv_width()), of_bf16);
        convert(&self.attention, room.of(&mut tape.attention, heads.query_width()), of_bf16);
    }

    /// Swaps what is no wider in a tape: what is narrow is in f32 in both, gate and up in 16 bits.
    pub(super) fn exchange(&mut self, tape: &mut BlockTape) {
        let narrow = &mut self.narrow;
        std::mem::swap(&mut narrow.r_attention, &mut tape.r_attention);
        std::mem::swap(&mut narrow.lse, &mut tape.lse);
        std::mem::swap(&mut narrow.middle, &mut tape.middle);
        std::mem::swap(&mut narrow.r_feed_forward, &mut tape.r_feed_forward);
        std::mem::swap(&mut narrow.rounded_gate_up, &mut tape.rounded_gate_up);
        std::mem::swap(&mut narrow.lora, &mut tape.lora);
    }
}

/// Converts the first numbers of a buffer, as many as there is room for, on all threads.
pub(super) fn convert<A: Copy + Sync, B: Send>(from: &[A], to: &mut [B], convert: impl Fn(A) -> B + Sync) {
    let from = &from[..to.len()];
    to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK)).for_each(|(to, from)| {
        dispatch(
            #[inline(always)]
            || to.iter_mut().zip(from).for_each(|(to, from)| *to = convert(*from)),
        );
    });
}
