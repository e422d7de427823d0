//! What the decoder scores: prompts with the responses that follow them.

use std::collections::HashSet;
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
    /// token of every prompt is not among them. Prompts that are the same have none: they are computed once as a whole.
    fn common<'a>(self, items: &[Sequences<'a>]) -> &'a [u32] {
        let [first, others @ ..] = items else { return &[] };
        let shared = |len: usize, other: &Sequences<'_>| {
            let pairs = first.prompt[..len].iter().zip(&other.prompt[..other.prompt.len() - 1]);
            pairs.take_while(|(a, b)| a == b).count()
        };
        match others.iter().fold(first.prompt.len() - 1, shared) {
            len if len < WORTH_SHARING || self.dropout => &[],
            _ if others.iter().all(|other| other.prompt == first.prompt) => &[],
            len => &first.prompt[..len],
        }
    }

    /// Number of tokens that a pass computes for items.
    pub(crate) fn computed(self, items: &[Sequences<'_>]) -> usize {
        let (common, mut prompts) = (self.common(items).len(), HashSet::new());
        common + items.iter().map(|item| self.further(item, common, &mut prompts)).sum::<usize>()
    }

    /// Number of tokens that a pass computes for one item more, beside the `common` ones, after items with these `prompts`.
    fn further<'a>(self, item: &Sequences<'a>, common: usize, prompts: &mut HashSet<&'a [u32]>) -> usize {
        let is_new = prompts.insert(item.prompt) || self.dropout;
        item.computed(self.for_scores) - if is_new { common } else { item.prompt.len() }
    }

    /// Cuts a list into runs that compute at most `tokens` tokens each (at least one item).
    pub(crate) fn micro_batches(self, items: &[Sequences<'_>], tokens: usize) -> Vec<Range<usize>> {
        let mut parts: Vec<Range<usize>> = Vec::new();
        // a part may have more in common than all have
        let (common, mut prompts, mut used) = (self.common(items).len(), HashSet::new(), 0);
        for (at, item) in items.iter().enumerate() {
            let mut rows = self.further(item, common, &mut prompts);
            match parts.last_mut() {
                Some(part) if used + rows <= tokens => part.end = at + 1,
                _ => {
                    parts.push(at..at + 1);
                    prompts.clear();
                    (rows, used) = (self.further(item, common, &mut prompts), common);
                }
            }
            used += rows;
        }
        parts
    }

    /// The items as one packed batch, in which items share a prompt that is the same. With dropout they share nothing, and
    /// `keys` has the number of each, which tells it from all others.
    pub fn pack(self, items: &[Sequences<'_>], keys: &[usize]) -> PackedBatch {
        let empty = if self.for_scores { PackedBatch::for_scores() } else { PackedBatch::default() };
        let mut packed = empty.with_common(self.common(items));
        if self.dropout {
            assert_eq!(keys.len(), items.len(), "every item has a key");
            for (item, &key) in items.iter().zip(keys) {
                packed.push_keyed(key as u64, item.prompt, &item.responses);
            }
        } else {
            packed.push_all(&items.iter().map(|item| (item.prompt, item.responses.as_slice())).collect::<Vec<_>>());
        }
        packed
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
        assert_eq!(packing.micro_batches(&items, 9 + 2 * 5), [0..2, 2..4]);
        assert_eq!(packing.micro_batches(&items, 9 + 2 * 5 - 1), [0..1, 1..2, 2..3, 3..4]);
        let apart = Packing { dropout: true, ..packing };
        assert_eq!((apart.computed(&items), apart.pack(&items, &[0, 1, 2, 3]).rows()), (4 * (11 + 3), 4 * (11 + 3)));
    }

    #[test]
    fn a_prompt_of_several_items_is_computed_once_a_pass() {
        let responses: [&[u32]; 4] = [&[7, 2], &[8, 8, 2], &[9, 2], &[7, 7, 2]];
        let prompts: [&[u32]; 4] = [&[1, 5, 3], &[1, 6], &[1, 5, 3], &[1, 6]];
        let items: Vec<Sequences<'_>> = prompts
            .into_iter()
            .zip(&responses)
            .map(|(prompt, &response)| Sequences { prompt, responses: vec![response], row: 0 })
            .collect();
        for for_scores in [false, true] {
            let packing = Packing { for_scores, dropout: false };
            let last = usize::from(for_scores);
            let expected = 3 + 2 + (1 + 2 + 1 + 2) + 4 * last;
            let packed = packing.pack(&items, &[]);
            assert_eq!((packing.computed(&items), packed.rows()), (expected, expected));
            assert_eq!(packing.micro_batches(&items, expected).len(), 1);
            assert_eq!(packing.micro_batches(&items, expected - 1), [0..3, 3..4]);
            if !for_scores {
                let targets = packed.responses.iter().map(|range| &packed.targets[range.clone()]);
                assert_eq!(targets.collect::<Vec<_>>(), responses, "in the order of the items");
            }
            let apart = Packing { dropout: true, ..packing };
            let sum = items.iter().map(|item| item.computed(for_scores)).sum();
            assert_eq!((apart.computed(&items), apart.pack(&items, &[0, 1, 2, 3]).rows()), (sum, sum));
        }
    }

    #[test]
    fn no_prompt_is_common_to_its_end() {
        let (long, short) = ([1; 20], [1; 12]);
        let item = |prompt| Sequences { prompt, responses: vec![&[7, 2]], row: 0 };
        let packing = Packing { for_scores: false, dropout: false };
        assert_eq!(packing.common(&[item(&long), item(&short)]).len(), 11);
        assert_eq!(packing.common(&[item(&short), item(&short)]).len(), 0, "the whole of it is");
        assert_eq!(packing.common(&[item(&long), item(&short[..WORTH_SHARING])]).len(), 0, "not worth it");
        assert_eq!(packing.common(&[item(&long)]).len(), 0);
    }
}
