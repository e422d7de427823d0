//! Passes that continue sequences, for generation.

use super::blocks::{DecoderOf, Scratch};
use super::{PackedModel, Pass};
use crate::mixture::Shared;
use crate::ops::attention::Span;
use crate::ops::{Number, embedding, fit, linear};

/// Where generation keeps the keys and values of earlier tokens.
pub(crate) trait KeyValueCache {
    /// The spans of the rows at hand, each with its cached prefix in block `block`.
    fn spans(&self, block: usize) -> Vec<Span<'_>>;
    /// Takes the queries, keys and values of the rows at hand in block `block`.
    fn store(&mut self, block: usize, qkv: &[f32]);
}

impl<T: Number> DecoderOf<T> {
    /// The logits `[wanted, vocab]` of the wanted tokens, for tokens that continue the sequences of a cache: the weighted
    /// sum of the policies' logits.
    ///
    /// The rows of the pass, and the cache's spans, are all tokens under the first policy, then all under the next. The bits
    /// of a sequence's logits do not depend on what is computed with it, as long as either every sequence has one token or
    /// every one has more.
    /// Where there is a packed model of these policies, its matrices are read instead of theirs.
    /// Keeps nothing for a backward pass; the cache takes each block's keys and values.
    pub(super) fn infer(
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
        let pass = Pass::of_parts(T::PRECISION, &policies.model.weights, &adapters).with_packed(packed);
        let pass = if wanted.len() == tokens.len() { pass.rowwise() } else { pass };
        self.check_weights(&pass);
        self.kept = None;
        let d = self.shape.hidden;
        let mut x = std::mem::take(&mut self.x);
        let all = parts * tokens.len();
        let rows = self.room(all).of(&mut x, d);
        embedding::forward(pass.base(&self.shape.layout.embedding), &tokens.repeat(parts), rows, d);
        let positions = positions.repeat(parts);
        let mut tape = std::mem::take(&mut self.tape);
        for index in 0..self.shape.layout.blocks.len() {
            self.block_forward(&pass, index, &cache.spans(index), &positions, rows, &mut tape);
            cache.store(index, &T::widened(&tape.qkv[..all * self.shape.heads.qkv_width()]));
        }
        self.tape = tape;
        self.x = x;
        let of_part = |part: usize| wanted.iter().map(move |&row| (part * tokens.len() + row) as u32);
        self.gather_normed(&pass, &(0..parts).flat_map(of_part).collect::<Vec<_>>());
        let vocab = self.shape.vocab();
        let Scratch { logits, head, .. } = &mut self.scratch;
        let normed = policies.weighted_sum(&mut head.normed[..parts * wanted.len() * d]);
        let logits = fit(logits, wanted.len() * vocab);
        match packed {
            Some(packed) => packed.head.forward(normed, logits, false),
            None => {
                linear::forward_as(true, T::PRECISION)(normed, pass.base(&self.shape.layout.head), logits, d, false)
            }
        }
        logits
    }
}
