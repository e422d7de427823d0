//! Sequences in generation, and what is kept of the tokens that a policy has seen.

use std::ops::Range;
use std::sync::Arc;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::{Answer, Finish, SamplingOptions, SequenceId, choose};
use crate::decoder::KeyValueCache;
use crate::error::{Error, Result};
use crate::mixture::Mixture;
use crate::ops::attention::{Heads, Prefix, Span};

/// A sequence in generation.
pub(super) struct Sequence {
    pub(super) id: SequenceId,
    options: Arc<SamplingOptions>,
    /// For each pass of the policy, what each of its policies keeps of past tokens.
    caches: Vec<Vec<Cache>>,
    pub(super) past: usize,
    /// Tokens that the model has not seen yet: the prompt, then one token at a time.
    pub(super) pending: Vec<u32>,
    answer: Vec<u32>,
    rng: ChaCha8Rng,
}

/// A prompt that the policy has seen, for others that are the same.
pub(super) struct SeenPrompt {
    prompt: Vec<u32>,
    caches: Vec<Vec<Cache>>,
    past: usize,
    logits: Vec<f32>,
}

impl SeenPrompt {
    /// Of a sequence whose prompt has just been seen, with the logits of the token after it.
    pub(super) fn new(sequence: &Sequence, logits: &[f32]) -> Self {
        Self {
            prompt: sequence.pending.clone(),
            caches: sequence.caches.clone(),
            past: sequence.past,
            logits: logits.to_vec(),
        }
    }

    pub(super) fn prompt(&self) -> &[u32] {
        &self.prompt
    }

    /// Brings a sequence with the same prompt to where this one was; the logits of the token after it.
    pub(super) fn copy_to(&self, sequence: &mut Sequence) -> &[f32] {
        sequence.caches.clone_from(&self.caches);
        sequence.past = self.past;
        &self.logits
    }
}

/// Keys and values of past tokens. Of each block those of every head, `[past, dim]`, so that a head's lie next to each other.
#[derive(Clone)]
struct Cache {
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
}

impl Sequence {
    /// A sequence that the policy has not seen yet.
    pub(super) fn new(
        id: SequenceId,
        prompt: Vec<u32>,
        options: Arc<SamplingOptions>,
        stream: u64,
        policy: &Mixture<'_>,
    ) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
        rng.set_stream(stream);
        let caches = policy.passes().iter().map(|pass| {
            let config = &pass.model.config;
            let heads = vec![Vec::new(); config.num_hidden_layers * config.num_key_value_heads];
            vec![Cache { keys: heads.clone(), values: heads }; pass.adapters.len()]
        });
        Self { id, options, caches: caches.collect(), past: 0, pending: prompt, answer: Vec::new(), rng }
    }

    pub(super) fn positions(&self) -> impl Iterator<Item = u32> + use<> {
        (self.past as u32)..(self.past + self.pending.len()) as u32
    }

    /// The sequence with its next token.
    ///
    /// # Errors
    /// [`Error::Failed`] for logits that are not numbers.
    pub(super) fn choose(mut self, logits: &[f32]) -> (Self, Result<u32>) {
        let token = choose(logits, &self.options, &mut self.rng).ok_or_else(|| {
            Error::Failed(
                "The model's logits are not numbers. Its weights are damaged, or training diverged: check the checkpoint."
                    .into(),
            )
        });
        (self, token)
    }

    /// Takes the next token; returns the answer when it is complete, which it is at `positions` tokens at the latest.
    pub(super) fn accept(
        &mut self,
        token: u32,
        positions: usize,
        decode: &dyn Fn(&[u32]) -> Result<String>,
    ) -> Result<Option<Answer>> {
        let ended = self.options.end_tokens.contains(&token);
        if !ended {
            self.answer.push(token);
            self.pending = vec![token];
        }
        let full = self.answer.len() >= self.options.max_new_tokens || self.past + 1 >= positions;
        let mut stopped_at = None;
        let stop = &self.options.stop;
        if !stop.is_empty() {
            let text = decode(&self.answer)?;
            stopped_at = stop.iter().filter_map(|s| text.find(s.as_str())).min().map(|at| text[..at].to_owned());
        }
        if !(ended || full || stopped_at.is_some()) {
            return Ok(None);
        }
        let finish = if ended || stopped_at.is_some() { Finish::Stop } else { Finish::Length };
        let tokens = std::mem::take(&mut self.answer);
        let text = stopped_at.map_or_else(|| decode(&tokens), Ok)?;
        Ok(Some(Answer { tokens, text, finish, end: ended.then_some(token) }))
    }
}

/// The sequences of one forward pass; its rows are their pending tokens, under one policy after the other.
pub(super) struct PassCache<'s> {
    pub(super) heads: Heads,
    /// The place of the pass in the mixture.
    pub(super) pass: usize,
    pub(super) sequences: &'s mut [Sequence],
}

impl PassCache<'_> {
    /// Number of policies of the pass.
    fn policies(&self) -> usize {
        self.sequences.first().map_or(0, |sequence| sequence.caches[self.pass].len())
    }

    /// The heads of a block in a [`Cache`].
    fn of_block(&self, block: usize) -> Range<usize> {
        block * self.heads.key_value..(block + 1) * self.heads.key_value
    }
}

impl KeyValueCache for PassCache<'_> {
    fn spans(&self, block: usize) -> Vec<Span<'_>> {
        let (mut end, heads) = (0, self.of_block(block));
        let of_policies = (0..self.policies()).flat_map(|policy| self.sequences.iter().map(move |s| (policy, s)));
        let spans = of_policies.map(|(policy, s)| {
            let start = end;
            end += s.pending.len();
            let Cache { keys, values } = &s.caches[self.pass][policy];
            let prefix = Prefix::Cache { keys: &keys[heads.clone()], values: &values[heads.clone()] };
            Span { rows: start..end, prefix }
        });
        spans.collect()
    }

    fn store(&mut self, block: usize, qkv: &[f32]) {
        let (Heads { dim, .. }, heads) = (self.heads, self.of_block(block));
        let mut rows = qkv.chunks_exact(self.heads.qkv_width());
        for policy in 0..self.policies() {
            for sequence in &mut *self.sequences {
                let cache = &mut sequence.caches[self.pass][policy];
                for row in rows.by_ref().take(sequence.pending.len()) {
                    let (keys, values) = row[self.heads.query_width()..].split_at(self.heads.key_value_width());
                    for (all, new) in [(&mut cache.keys, keys), (&mut cache.values, values)] {
                        let of_heads = all[heads.clone()].iter_mut().zip(new.chunks_exact(dim));
                        of_heads.for_each(|(head, new)| head.extend_from_slice(new));
                    }
                }
            }
        }
    }
}
