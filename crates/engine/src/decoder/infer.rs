//! Passes that continue sequences, for generation.

use std::convert::Infallible;

use super::PackedModel;
use super::blocks::DecoderOn;
use crate::backend::{Backend, Cpu};
use crate::mixture::Shared;
use crate::ops::attention::Span;
use crate::ops::{Number, fit, linear};

/// Where generation keeps the keys and values of earlier tokens.
pub(crate) trait KeyValueCache {
    /// The spans of the rows at hand, each with its cached prefix in block `block`.
    fn spans(&self, block: usize) -> Vec<Span<'_>>;
    /// Takes the queries, keys and values of the rows at hand in block `block`.
    fn store(&mut self, block: usize, qkv: &[f32]);
}

impl<T: Number> DecoderOn<Cpu<T>> {
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
    ) -> Result<&[f32], Infallible> {
        let parts = policies.adapters.len();
        let adapters = packed.map_or(policies.adapters.clone(), |packed| packed.adapters(policies));
        let of_part = |part: usize| wanted.iter().map(move |&row| (part * tokens.len() + row) as u32);
        let (scored_rows, wanted) = ((0..parts).flat_map(of_part).collect::<Vec<_>>(), wanted.len());
        let rowwise = wanted == tokens.len();
        let (tokens, positions) = (tokens.repeat(parts), positions.repeat(parts));
        let pass = self.pass_of_parts(&policies.model.weights, &adapters).with_packed(packed);
        let pass = pass.continuing(&tokens, &positions, &scored_rows, rowwise);
        self.kept = None;
        let (d, room) = (self.shape.hidden, self.room(tokens.len()));
        let mut x = std::mem::take(&mut self.x);
        self.backend.embed(room, &pass, &mut x)?;
        let mut tape = std::mem::take(&mut self.tape);
        for index in 0..self.shape.layout.blocks.len() {
            self.block_forward(&pass.attending(cache.spans(index)), index, room, &mut x, &mut tape)?;
            cache.store(index, &T::widened(&tape.qkv[..tokens.len() * self.shape.heads.qkv_width()]));
        }
        self.tape = tape;
        self.x = x;
        self.gather_normed(&pass, scored_rows.len())?;
        let normed = policies.weighted_sum(&mut self.scratch.head.normed[..scored_rows.len() * d]);
        let logits = fit(&mut self.softmax.logits, wanted * self.shape.vocab());
        match packed {
            Some(packed) => packed.head.forward(normed, logits, false),
            None => {
                linear::forward_as(true, T::PRECISION)(normed, pass.base(&self.shape.layout.head), logits, d, false)
            }
        }
        Ok(logits)
    }
}
