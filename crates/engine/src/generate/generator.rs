//! Sequences in generation under one policy, which others join at any time.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::Arc;

use super::sequence::{PassCache, SeenPrompt, Sequence};
use super::{Answer, Dtype, SamplingOptions, check_prompt};
use crate::decoder::{Decoder, PackedModel};
use crate::error::{Error, Result};
use crate::mixture::{Mixture, Shared};
use crate::model::{BlockLayout, Product};

/// Names a sequence of one [`Generator`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SequenceId(pub(super) u64);

/// What a step did for one sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// The answer has this token more.
    Token(u32),
    /// The answer is complete, and the generator no longer knows the sequence.
    Finished(Answer),
}

/// Continues sequences by a token each at a time (continuous batching). Others may join before any step.
///
/// The bits of an answer depend on its prompt, its options and its stream of random numbers alone, not on what is
/// generated with it. A prompt that joins several times in a row is computed once.
pub struct Generator<'a> {
    policy: Mixture<'a>,
    decode: &'a dyn Fn(&[u32]) -> Result<String>,
    batch_size: usize,
    /// The longest sequence.
    positions: usize,
    decoders: Vec<Decoder>,
    /// For each pass its matrices, unless they are read as they are.
    packed: Vec<Option<PackedModel>>,
    /// Memory for logits.
    sum: Vec<f32>,
    waiting: VecDeque<Waiting<'a>>,
    active: Vec<Sequence>,
    /// The prompt of the last sequence that began, while the next that waits has the same.
    seen: Option<SeenPrompt>,
    added: u64,
}

/// A sequence that has not begun.
struct Waiting<'a> {
    id: SequenceId,
    prompt: Cow<'a, [u32]>,
    options: Arc<SamplingOptions>,
    stream: u64,
}

/// A sequence and its next token.
type Chosen = (Sequence, Result<u32>);

impl<'a> Generator<'a> {
    /// Without sequences. `positions` is the longest sequence, prompt and answer, in tokens; the policy's context limits it.
    /// At most `batch_size` sequences are in progress, and the others wait. `decode` turns tokens into text.
    pub fn new(
        policy: impl Into<Mixture<'a>>,
        positions: usize,
        batch_size: usize,
        decode: &'a dyn Fn(&[u32]) -> Result<String>,
    ) -> Self {
        let policy = policy.into();
        let positions = positions.min(policy.context());
        Self {
            decoders: policy.passes().iter().map(|pass| Decoder::new(pass.model, positions)).collect(),
            packed: policy.passes().iter().map(|_| None).collect(),
            policy,
            decode,
            batch_size: batch_size.max(1),
            positions,
            sum: Vec::new(),
            waiting: VecDeque::new(),
            active: Vec::new(),
            seen: None,
            added: 0,
        }
    }

    /// The same generator with matrices read in fewer bits than f32's. They are made here, beside those of the models.
    pub fn with_dtype(self, dtype: Dtype) -> Self {
        let decoders = self.decoders.into_iter().map(|decoder| decoder.with_precision(dtype.precision()));
        let packed = self.policy.passes().iter().map(|pass| PackedModel::new(pass, dtype));
        Self { decoders: decoders.collect(), packed: packed.collect(), ..self }
    }

    /// Bytes of matrices that every step reads at least.
    pub fn weight_bytes(&self) -> usize {
        let matrices = |pass: &Shared<'_>| {
            let layout = &pass.model.layout;
            let of_block = |block: &BlockLayout| Product::ALL.map(|product| block.product(product).len());
            4 * (layout.blocks.iter().flat_map(of_block).sum::<usize>() + layout.head.len())
        };
        let passes = self.policy.passes().iter().zip(&self.packed);
        passes.map(|(pass, packed)| packed.as_ref().map_or_else(|| matrices(pass), PackedModel::bytes)).sum()
    }

    /// Adds a sequence, which begins as soon as there is room. It draws from stream `stream` of its options' seed.
    ///
    /// # Errors
    /// [`Error::Input`] for options out of range, an empty prompt, one that leaves no room for an answer, or one with a token
    /// that the model does not know.
    pub fn add(
        &mut self,
        prompt: impl Into<Cow<'a, [u32]>>,
        options: Arc<SamplingOptions>,
        stream: u64,
    ) -> Result<SequenceId> {
        let prompt = prompt.into();
        options.validate()?;
        check_prompt(&prompt, self.policy.vocab_size(), self.positions)
            .map_err(|fault| Error::input(format!("The prompt {fault}")))?;
        let id = SequenceId(self.added);
        self.added += 1;
        self.waiting.push_back(Waiting { id, prompt, options, stream });
        Ok(id)
    }

    /// Drops a sequence and its memory; one that has ended may be named too.
    pub fn cancel(&mut self, id: SequenceId) {
        self.waiting.retain(|waiting| waiting.id != id);
        self.active.retain(|sequence| sequence.id != id);
    }

    /// Whether no sequence is in progress and none waits.
    pub fn is_empty(&self) -> bool {
        self.active.is_empty() && self.waiting.is_empty()
    }

    /// Computes one token of every sequence in progress, and says what came of each.
    ///
    /// A sequence of which there is an error is dropped: [`Error::Failed`] for logits that are not numbers, or an error of
    /// `decode`.
    pub fn step(&mut self) -> Vec<(SequenceId, Result<Progress>)> {
        while self.active.len() < self.batch_size {
            let Some(Waiting { id, prompt, options, stream }) = self.waiting.pop_front() else { break };
            self.active.push(Sequence::new(id, prompt.into_owned(), options, stream, &self.policy));
        }
        // prompts by themselves, so that the bits of an answer do not depend on which others are in progress
        let active = std::mem::take(&mut self.active);
        let (next, new): (Vec<_>, Vec<_>) = active.into_iter().partition(|sequence| sequence.pending.len() == 1);
        let mut chosen = self.go_on(next);
        chosen.extend(self.begin(new));
        let waits = self.waiting.front().map(|waiting| &*waiting.prompt);
        self.seen.take_if(|seen| waits != Some(seen.prompt()));
        let mut done = Vec::with_capacity(chosen.len());
        for (mut sequence, token) in chosen {
            let id = sequence.id;
            let progress = token.and_then(|token| {
                let answer = sequence.accept(token, self.positions, self.decode)?;
                Ok(answer.map_or(Progress::Token(token), Progress::Finished))
            });
            if matches!(progress, Ok(Progress::Token(_))) {
                self.active.push(sequence);
            }
            done.push((id, progress));
        }
        done
    }

    /// The next token of sequences with one pending token each.
    fn go_on(&mut self, mut sequences: Vec<Sequence>) -> Vec<Chosen> {
        if sequences.is_empty() {
            return Vec::new();
        }
        let logits = next_logits(&self.policy, &self.packed, &mut self.decoders, &mut sequences, &mut self.sum);
        let rows = logits.chunks_exact(self.policy.vocab_size());
        sequences.into_iter().zip(rows).map(|(sequence, logits)| sequence.choose(logits)).collect()
    }

    /// The first token of sequences with longer prompts. Of equal prompts in a row the first is computed, and what the policy
    /// has seen of it is copied to the others.
    fn begin(&mut self, sequences: Vec<Sequence>) -> Vec<Chosen> {
        let mut first: Vec<Sequence> = Vec::new();
        // each with the number of those in `first` that come before it
        let mut copies = Vec::new();
        for sequence in sequences {
            let before = first.last().map(|first| &first.pending[..]).or(self.seen.as_ref().map(SeenPrompt::prompt));
            if before == Some(&sequence.pending) {
                copies.push((first.len(), sequence));
            } else {
                first.push(sequence);
            }
        }
        let mut chosen = Vec::with_capacity(first.len() + copies.len());
        let mut copies = copies.into_iter().peekable();
        let mut copy = |number: usize, seen: &Option<SeenPrompt>, chosen: &mut Vec<Chosen>| {
            while let (Some(seen), Some((_, mut sequence))) = (seen, copies.next_if(|(before, _)| *before == number)) {
                let logits = seen.copy_to(&mut sequence);
                chosen.push(sequence.choose(logits));
            }
            copies.peek().is_some_and(|(before, _)| *before == number + 1)
        };
        let mut has_copies = copy(0, &self.seen, &mut chosen);
        if first.is_empty() {
            return chosen;
        }
        let logits = next_logits(&self.policy, &self.packed, &mut self.decoders, &mut first, &mut self.sum);
        let waits = self.waiting.front().map(|waiting| &*waiting.prompt);
        for (index, (sequence, logits)) in
            first.into_iter().zip(logits.chunks_exact(self.policy.vocab_size())).enumerate()
        {
            let comes_again = has_copies || waits == Some(&sequence.pending);
            self.seen = comes_again.then(|| SeenPrompt::new(&sequence, logits));
            chosen.push(sequence.choose(logits));
            has_copies = copy(index + 1, &self.seen, &mut chosen);
        }
        chosen
    }
}

/// The logits `[sequence, vocab]` of the token after those that are pending, which join the sequences' caches; `sum` is
/// memory for them. All sequences have one pending token, or all have more.
pub(super) fn next_logits<'l>(
    policy: &Mixture<'_>,
    packed: &[Option<PackedModel>],
    decoders: &'l mut [Decoder],
    sequences: &mut [Sequence],
    sum: &'l mut Vec<f32>,
) -> &'l [f32] {
    let tokens: Vec<u32> = sequences.iter().flat_map(|s| s.pending.clone()).collect();
    let positions: Vec<u32> = sequences.iter().flat_map(Sequence::positions).collect();
    let mut end = 0;
    let last_rows: Vec<usize> = sequences.iter().map(|s| (end += s.pending.len(), end - 1).1).collect();
    let passes = decoders.iter_mut().zip(policy.passes()).zip(packed).enumerate();
    let each: Vec<&[f32]> = passes
        .map(|(index, ((decoder, pass), packed))| {
            let mut cache = PassCache { heads: decoder.heads(), pass: index, sequences: &mut *sequences };
            decoder.infer(pass, packed.as_ref(), &tokens, &positions, &last_rows, &mut cache)
        })
        .collect();
    sequences.iter_mut().for_each(|sequence| sequence.past += sequence.pending.len());
    policy.logits(&each, sum)
}
