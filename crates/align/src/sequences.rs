//! What the decoder scores: prompts with the responses that follow them.

use std::ops::Range;

use engine::PackedBatch;
use engine::batch::packed_rows;

/// A prompt with the responses to score after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequences<'a> {
    /// At least one token.
    pub prompt: &'a [u32],
    /// At least one response of at least one token each.
    pub responses: Vec<&'a [u32]>,
    /// Where they came from, for messages: the line of the file.
    pub row: usize,
}

impl Sequences<'_> {
    /// Number of tokens that the decoder computes, for scores of responses or for their log-probabilities.
    pub fn computed(&self, for_scores: bool) -> usize {
        let responses: Vec<usize> = self.responses.iter().map(|response| response.len()).collect();
        packed_rows(self.prompt.len(), &responses, for_scores)
    }

    /// Number of tokens of the prompt with the longest response.
    pub fn longest(&self) -> usize {
        self.prompt.len() + self.responses.iter().map(|response| response.len()).max().unwrap_or(0)
    }

    /// Adds every token and every length to a hash.
    pub fn hash_into(&self, hasher: &mut blake3::Hasher) {
        for tokens in std::iter::once(&self.prompt).chain(&self.responses) {
            hasher.update(&(tokens.len() as u64).to_le_bytes());
            hasher.update(&tokens.iter().flat_map(|token| token.to_le_bytes()).collect::<Vec<u8>>());
        }
    }
}

/// Cuts a list into runs that compute at most `tokens` tokens each (at least one item).
pub(crate) fn micro_batches(items: &[Sequences<'_>], tokens: usize, for_scores: bool) -> Vec<Range<usize>> {
    let mut parts: Vec<Range<usize>> = Vec::new();
    let mut used = 0;
    for (at, item) in items.iter().enumerate() {
        let rows = item.computed(for_scores);
        match parts.last_mut() {
            Some(part) if used + rows <= tokens => part.end = at + 1,
            _ => {
                parts.push(at..at + 1);
                used = 0;
            }
        }
        used += rows;
    }
    parts
}

/// The items as one packed batch, with the number of each as its key for dropout, and prompts apart or not.
pub(crate) fn pack_keyed(items: &[Sequences<'_>], keys: &[usize], for_scores: bool, apart: bool) -> PackedBatch {
    let mut packed = empty(for_scores);
    if apart {
        packed = packed.with_prompts_apart();
    }
    for (item, &key) in items.iter().zip(keys) {
        packed.push_keyed(key as u64, item.prompt, &item.responses);
    }
    packed
}

/// The items as one packed batch, with prompts apart; neighbours share a prompt that is the same.
pub(crate) fn pack(items: &[Sequences<'_>], for_scores: bool) -> PackedBatch {
    let mut packed = empty(for_scores).with_prompts_apart();
    for same in items.chunk_by(|a, b| a.prompt == b.prompt) {
        let responses: Vec<&[u32]> = same.iter().flat_map(|item| &item.responses).copied().collect();
        packed.push(same[0].prompt, &responses);
    }
    packed
}

fn empty(for_scores: bool) -> PackedBatch {
    if for_scores { PackedBatch::for_scores() } else { PackedBatch::default() }
}
