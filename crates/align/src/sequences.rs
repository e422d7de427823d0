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

/// With fewer common tokens than these a pass does not compute them apart.
const WORTH_SHARING: usize = 8;

/// How passes compute items.
#[derive(Debug, Clone, Copy)]
pub struct Packing {
    /// Whether for scores of responses or for their log-probabilities.
    pub for_scores: bool,
    /// Whether with dropout, which is another one for every item, so that items share nothing.
    pub dropout: bool,
}

impl Packing {
    /// The tokens with which the prompts of all items begin, which a pass computes once: a system prompt, as a rule. At least one
    /// token of every prompt is not among them.
    fn common<'a>(self, items: &[Sequences<'a>]) -> &'a [u32] {
        let [first, others @ ..] = items else { return &[] };
        let shared = |len: usize, other: &Sequences<'_>| {
            let pairs = first.prompt[..len].iter().zip(&other.prompt[..other.prompt.len() - 1]);
            pairs.take_while(|(a, b)| a == b).count()
        };
        match others.iter().fold(first.prompt.len() - 1, shared) {
            len if len >= WORTH_SHARING && !others.is_empty() && !self.dropout => &first.prompt[..len],
            _ => &[],
        }
    }

    /// Number of tokens that a pass computes for items.
    pub(crate) fn computed(self, items: &[Sequences<'_>]) -> usize {
        let each: usize = items.iter().map(|item| item.computed(self.for_scores)).sum();
        each - items.len().saturating_sub(1) * self.common(items).len()
    }

    /// Cuts a list into runs that compute at most `tokens` tokens each (at least one item).
    pub(crate) fn micro_batches(self, items: &[Sequences<'_>], tokens: usize) -> Vec<Range<usize>> {
        let mut parts: Vec<Range<usize>> = Vec::new();
        // a part may have more in common than all have
        let (common, mut used) = (self.common(items).len(), 0);
        for (at, item) in items.iter().enumerate() {
            let rows = item.computed(self.for_scores) - common;
            match parts.last_mut() {
                Some(part) if used + rows <= tokens => part.end = at + 1,
                _ => {
                    parts.push(at..at + 1);
                    used = common;
                }
            }
            used += rows;
        }
        parts
    }

    /// The items as one packed batch, with the number of each as its key for dropout.
    pub fn pack(self, items: &[Sequences<'_>], keys: &[usize]) -> PackedBatch {
        let mut packed = self.empty().with_common(self.common(items));
        for (item, &key) in items.iter().zip(keys) {
            match self.dropout {
                true => packed.push_keyed(key as u64, item.prompt, &item.responses),
                false => packed.push(item.prompt, &item.responses),
            }
        }
        packed
    }

    /// The items as one packed batch, in which neighbours share a prompt that is the same.
    pub(crate) fn pack_neighbours(self, items: &[Sequences<'_>]) -> PackedBatch {
        let mut packed = self.empty().with_common(self.common(items));
        for same in items.chunk_by(|a, b| a.prompt == b.prompt) {
            let responses: Vec<&[u32]> = same.iter().flat_map(|item| &item.responses).copied().collect();
            packed.push(same[0].prompt, &responses);
        }
        packed
    }

    fn empty(self) -> PackedBatch {
        if self.for_scores { PackedBatch::for_scores() } else { PackedBatch::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_system_prompt_is_computed_once_a_pass() {
        let system = [1, 3, 3, 3, 3, 3, 3, 3, 4];
        let prompts: Vec<Vec<u32>> = (5..9).map(|token| [&system[..], &[token, 9]].concat()).collect();
        let items: Vec<Sequences<'_>> =
            prompts.iter().map(|prompt| Sequences { prompt, responses: vec![&[7, 2], &[8, 8, 2]], row: 0 }).collect();
        let packing = Packing { for_scores: false, dropout: false };
        // two tokens of each prompt, and the responses but their last tokens
        assert_eq!(packing.computed(&items), 9 + 4 * (2 + 3));
        assert_eq!(packing.pack(&items, &[0, 1, 2, 3]).rows(), packing.computed(&items));
        assert_eq!(packing.pack_neighbours(&items).rows(), packing.computed(&items));
        assert_eq!(packing.micro_batches(&items, 9 + 2 * 5), [0..2, 2..4]);
        assert_eq!(packing.micro_batches(&items, 9 + 2 * 5 - 1), [0..1, 1..2, 2..3, 3..4]);
        let apart = Packing { dropout: true, ..packing };
        assert_eq!((apart.computed(&items), apart.pack(&items, &[0, 1, 2, 3]).rows()), (4 * (11 + 3), 4 * (11 + 3)));
    }

    #[test]
    fn no_prompt_is_common_to_its_end() {
        let (long, short) = ([1; 20], [1; 12]);
        let item = |prompt| Sequences { prompt, responses: vec![&[7, 2]], row: 0 };
        let packing = Packing { for_scores: false, dropout: false };
        assert_eq!(packing.common(&[item(&long), item(&short)]).len(), 11);
        assert_eq!(packing.common(&[item(&short), item(&short)]).len(), 11);
        assert_eq!(packing.common(&[item(&long), item(&short[..WORTH_SHARING])]).len(), 0, "not worth it");
        assert_eq!(packing.common(&[item(&long)]).len(), 0);
    }
}
