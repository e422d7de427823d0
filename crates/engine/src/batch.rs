//! Packed batches: sequences of different lengths in one flat array, without padding.

use std::collections::HashMap;
use std::ops::Range;

use crate::ops::attention::{Prefix, Span};
use crate::ops::dropout::mix;

/// Prompts with their responses, ready for the decoder.
///
/// A prompt that has several responses is computed once, and what all prompts begin with may be ([`with_common`](Self::with_common)); each response attends to it and to itself,
/// and takes the positions after it. The last token of a response predicts nothing and is not computed, unless the
/// batch is [`for_scores`](Self::for_scores).
#[derive(Debug, Clone, Default)]
pub struct PackedBatch {
    /// Whether it is for a score head.
    pub(crate) for_scores: bool,
    /// Number of tokens with which every prompt begins; the first rows.
    common: usize,
    /// Tokens that the decoder computes, `[rows]`.
    pub tokens: Vec<u32>,
    /// Position of each token in its sequence, `[rows]`.
    pub positions: Vec<u32>,
    segments: Vec<Segment>,
    /// The rows of each example's prompt after the common ones.
    prompts: Vec<Range<usize>>,
    /// For each scored token, the row that predicts it; for scores the row of the last token of each text.
    pub scored_rows: Vec<u32>,
    /// The scored tokens: every token of every response; none for scores.
    pub targets: Vec<u32>,
    /// For each response, its range in `scored_rows`.
    pub responses: Vec<Range<usize>>,
    /// Rows of the responses that were [added behind](Self::push_response); the last ones.
    rows_behind: usize,
    /// For dropout, what tells each row from all others of a training, `[rows]`; see [`push_keyed`](Self::push_keyed).
    pub(crate) row_keys: Vec<u64>,
}

#[derive(Debug, Clone)]
struct Segment {
    rows: Range<usize>,
    /// What it continues: the common rows, and those of its prompt. Either may be empty.
    prefix: [Range<usize>; 2],
}

impl PackedBatch {
    /// A batch for a model with a score head, which reads the row of the last token of each response.
    pub fn for_scores() -> Self {
        Self { for_scores: true, ..Self::default() }
    }

    /// The same batch, still empty, of prompts that all begin with these tokens, which are computed once.
    ///
    /// # Panics
    /// If the batch is not empty.
    pub fn with_common(mut self, tokens: &[u32]) -> Self {
        assert!(self.tokens.is_empty(), "what all prompts begin with comes first");
        self.add_segment(tokens, 0..0);
        self.common = tokens.len();
        self
    }

    /// Adds a prompt with its responses.
    ///
    /// # Panics
    /// If the prompt is empty: the first token of a sequence is predicted by nothing. Nor may a response be, unless the batch
    /// is for scores. If the prompt has not the batch's [common](Self::with_common) tokens and at least one more. If responses
    /// were [added behind](Self::push_response).
    pub fn push(&mut self, prompt: &[u32], responses: &[&[u32]]) {
        assert_eq!(self.rows_behind, 0, "examples come before responses that are added behind");
        let (common, prompt) = prompt.split_at_checked(self.common).unwrap_or_default();
        assert!(common == &self.tokens[..self.common], "a prompt does not begin as all others do");
        assert!(!prompt.is_empty(), "a prompt has at least one token, after those that are common");
        let start = self.rows();
        self.prompts.push(start..start + prompt.len());
        if let [response] = responses {
            self.add_segment(prompt.iter().chain(self.computed(response)), 0..0);
            self.score(start + prompt.len() - 1, start + prompt.len(), response);
            return;
        }
        self.add_segment(prompt, 0..0);
        for response in responses {
            self.add_response(self.prompts.len() - 1, response);
        }
    }

    /// Adds prompts with their responses to a batch that has no others; a prompt that several examples have is computed once.
    ///
    /// Rows come prompt by prompt, since the gradient of attention takes a prompt with all that continues it; examples and
    /// responses have the order in which they are given.
    ///
    /// # Panics
    /// As [`push`](Self::push), or if the batch has examples.
    pub fn push_all(&mut self, examples: &[(&[u32], &[&[u32]])]) {
        assert!(self.prompts.is_empty(), "the batch has examples");
        let (mut groups, mut of_prompt) = (Vec::<Vec<usize>>::new(), HashMap::new());
        let mut prompts = Vec::with_capacity(examples.len());
        for (example, (prompt, _)) in examples.iter().enumerate() {
            let group = *of_prompt.entry(*prompt).or_insert(groups.len());
            if group == groups.len() {
                groups.push(Vec::new());
            }
            groups[group].push(example);
            prompts.push(group);
        }
        let mut of_example = vec![Vec::new(); examples.len()];
        for group in groups {
            let (prompt, first) = (examples[group[0]].0, self.responses.len());
            let responses: Vec<&[u32]> = group.iter().flat_map(|&example| examples[example].1).copied().collect();
            self.push(prompt, &responses);
            let mut pushed = self.responses[first..].iter().cloned();
            for example in group {
                of_example[example] = pushed.by_ref().take(examples[example].1.len()).collect();
            }
        }
        self.prompts = prompts.iter().map(|&group| self.prompts[group].clone()).collect();
        self.responses = of_example.concat();
    }

    /// Adds a response to a prompt that is there already, that of the `prompt`-th example from 0. Its rows come last and have no keys.
    ///
    /// A batch may so be computed together with responses of which no gradient is taken:
    /// [`Decoder::backward`](crate::Decoder::backward) takes the batch as it was before.
    ///
    /// # Panics
    /// If there is no such prompt, or as [`push`](Self::push) of empty responses.
    pub fn push_response(&mut self, prompt: usize, response: &[u32]) {
        let before = self.rows();
        self.add_response(prompt, response);
        self.rows_behind += self.rows() - before;
    }

    /// Adds a response to the prompt of an example.
    fn add_response(&mut self, prompt: usize, response: &[u32]) {
        let prompt = self.prompts[prompt].clone();
        let rows = self.add_segment(self.computed(response), prompt.clone());
        self.score(prompt.end - 1, rows.start, response);
    }

    /// The tokens of a response that have rows.
    fn computed<'t>(&self, response: &'t [u32]) -> &'t [u32] {
        assert!(self.for_scores || !response.is_empty(), "a response has at least one token");
        &response[..computed_tokens(response.len(), self.for_scores)]
    }

    /// As [`push`](Self::push), for training with dropout: `key` names the example, so that what is dropped of it does
    /// not depend on what it is packed with.
    ///
    /// # Panics
    /// As [`push`](Self::push), or if an example before it has no key, or tokens are common: what is dropped of them would be
    /// dropped of all examples.
    pub fn push_keyed(&mut self, key: u64, prompt: &[u32], responses: &[&[u32]]) {
        assert_eq!(self.row_keys.len(), self.rows(), "either every example of a batch has a key or none");
        self.push(prompt, responses);
        let of_responses = responses.iter().map(|r| computed_tokens(r.len(), self.for_scores));
        for (part, rows) in std::iter::once(prompt.len()).chain(of_responses).enumerate() {
            let part = mix(key ^ mix(part as u64));
            self.row_keys.extend((0..rows).map(|row| mix(part ^ row as u64)));
        }
    }

    /// Adds rows that continue the common ones and a prompt's.
    fn add_segment<'t>(&mut self, tokens: impl IntoIterator<Item = &'t u32>, prompt: Range<usize>) -> Range<usize> {
        let (start, offset) = (self.tokens.len(), self.common + prompt.len());
        self.tokens.extend(tokens);
        let rows = start..self.tokens.len();
        self.positions.extend((0..rows.len()).map(|i| (offset + i) as u32));
        if !rows.is_empty() {
            self.segments.push(Segment { rows: rows.clone(), prefix: [0..self.common, prompt] });
        }
        rows
    }

    /// Records the targets of a response whose first token is predicted by row `first` and the others
    /// by the rows from `rest`.
    fn score(&mut self, first: usize, rest: usize, response: &[u32]) {
        let start = self.scored_rows.len();
        if self.for_scores {
            let last = if response.is_empty() { first } else { rest + response.len() - 1 };
            self.scored_rows.push(last as u32);
        } else {
            self.targets.extend_from_slice(response);
            self.scored_rows.push(first as u32);
            self.scored_rows.extend((rest..rest + response.len() - 1).map(|row| row as u32));
        }
        self.responses.push(start..self.scored_rows.len());
    }

    /// The same examples several times, all of them once before any of them again. No others are added to it.
    pub(crate) fn repeated(&self, times: usize) -> Self {
        let mut all = Self { for_scores: self.for_scores, ..Self::default() };
        for _ in 0..times {
            let (row, target) = (all.rows(), all.scored_rows.len());
            let moved = |range: &Range<usize>, by: usize| range.start + by..range.end + by;
            all.tokens.extend(&self.tokens);
            all.positions.extend(&self.positions);
            all.segments.extend(self.segments.iter().map(|segment| Segment {
                rows: moved(&segment.rows, row),
                prefix: segment.prefix.each_ref().map(|rows| if rows.is_empty() { 0..0 } else { moved(rows, row) }),
            }));
            all.prompts.extend(self.prompts.iter().map(|prompt| moved(prompt, row)));
            all.scored_rows.extend(self.scored_rows.iter().map(|scored| scored + row as u32));
            all.targets.extend(&self.targets);
            all.responses.extend(self.responses.iter().map(|response| moved(response, target)));
            all.row_keys.extend(&self.row_keys);
        }
        all
    }

    /// Number of tokens that the decoder computes.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Number of them before the responses that were [added behind](Self::push_response): those of which a gradient may be taken.
    pub(crate) fn rows_before(&self) -> usize {
        self.rows() - self.rows_behind
    }

    /// What each segment attends to.
    pub(crate) fn spans(&self) -> Vec<Span<'static>> {
        self.segments.iter().map(|s| Span { rows: s.rows.clone(), prefix: Prefix::Rows(s.prefix.clone()) }).collect()
    }

    /// Sums one value per scored token into one per response, in f64.
    pub(crate) fn sum_responses(&self, token_logps: &[f32]) -> Vec<f64> {
        self.responses.iter().map(|r| token_logps[r.clone()].iter().map(|&l| f64::from(l)).sum()).collect()
    }

    /// Gives every scored token the value of its response.
    pub(crate) fn spread_responses(&self, values: &[f64]) -> Vec<f32> {
        assert_eq!(values.len(), self.responses.len(), "one value per response is needed");
        let mut spread = vec![0.0; self.scored_rows.len()];
        self.responses.iter().zip(values).for_each(|(response, &value)| spread[response.clone()].fill(value as f32));
        spread
    }
}

/// Number of rows that [`PackedBatch::push`] computes for a prompt and responses of these lengths, `for_scores` or not, those of
/// common tokens included.
pub fn packed_rows(prompt: usize, responses: &[usize], for_scores: bool) -> usize {
    prompt + responses.iter().map(|&r| computed_tokens(r, for_scores)).sum::<usize>()
}

/// How many tokens of a response of this length are computed.
fn computed_tokens(len: usize, for_scores: bool) -> usize {
    if for_scores { len } else { len - 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_prompt_is_computed_once_and_last_tokens_not_at_all() {
        let mut batch = PackedBatch::default();
        batch.push(&[5, 6], &[&[7, 8, 2], &[9]]);
        batch.push(&[4], &[&[3, 2]]);
        assert_eq!(batch.tokens, [5, 6, 7, 8, 4, 3]);
        assert_eq!(batch.positions, [0, 1, 2, 3, 0, 1]);
        assert_eq!(batch.scored_rows, [1, 2, 3, 1, 4, 5]);
        assert_eq!(batch.targets, [7, 8, 2, 9, 3, 2]);
        assert_eq!(batch.responses, [0..3, 3..4, 4..6]);
        assert_eq!(batch.spans().len(), 3);
        assert_eq!(packed_rows(2, &[3, 1], false) + packed_rows(1, &[2], false), batch.rows());
        assert_eq!(batch.sum_responses(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), [6.0, 4.0, 11.0]);
        assert_eq!(batch.spread_responses(&[1.0, 2.0, 3.0]), [1.0, 1.0, 1.0, 2.0, 3.0, 3.0]);
    }

    #[test]
    fn responses_are_added_behind_to_prompts_that_are_there() {
        let mut batch = PackedBatch::default();
        batch.push(&[5, 6], &[&[7, 8, 2]]);
        batch.push(&[4], &[&[3, 2]]);
        assert_eq!(batch.spans().len(), 2);
        let own = batch.clone();
        batch.push_response(1, &[7, 8, 2]);
        batch.push_response(0, &[3]);
        assert_eq!(batch.tokens, [5, 6, 7, 8, 4, 3, 7, 8]);
        assert_eq!(batch.positions, [0, 1, 2, 3, 0, 1, 1, 2]);
        assert_eq!(batch.scored_rows, [1, 2, 3, 4, 5, 4, 6, 7, 1]);
        assert_eq!(batch.targets, [7, 8, 2, 3, 2, 7, 8, 2, 3]);
        assert_eq!(batch.responses, [0..3, 3..5, 5..8, 8..9]);
        assert_eq!(batch.tokens[..own.rows()], own.tokens);
    }

    #[test]
    fn what_all_prompts_begin_with_is_computed_once() {
        let mut batch = PackedBatch::default().with_common(&[1, 3]);
        batch.push(&[1, 3, 5, 6], &[&[7, 8, 2], &[9, 2]]);
        batch.push(&[1, 3, 4], &[&[3, 2]]);
        batch.push_response(0, &[3, 2]);
        assert_eq!(batch.tokens, [1, 3, 5, 6, 7, 8, 9, 4, 3, 3]);
        assert_eq!(batch.positions, [0, 1, 2, 3, 4, 5, 4, 2, 3, 4]);
        assert_eq!(batch.scored_rows, [3, 4, 5, 3, 6, 7, 8, 3, 9]);
        let prefixes: Vec<_> = batch.segments.iter().map(|segment| segment.prefix.clone()).collect();
        assert_eq!(prefixes, [[0..0, 0..0], [0..2, 0..0], [0..2, 2..4], [0..2, 2..4], [0..2, 0..0], [0..2, 2..4]]);
    }

    #[test]
    fn examples_with_one_prompt_share_it_and_keep_their_order() {
        let mut batch = PackedBatch::default();
        batch.push_all(&[(&[5, 6], &[&[7, 2]]), (&[4], &[&[3, 2]]), (&[5, 6], &[&[9], &[8, 2]])]);
        assert_eq!(batch.tokens, [5, 6, 7, 8, 4, 3]);
        assert_eq!(batch.targets, [7, 2, 9, 8, 2, 3, 2]);
        assert_eq!(batch.responses, [0..2, 5..7, 2..3, 3..5]);
        assert_eq!(batch.sum_responses(&[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]), [3.0, 96.0, 4.0, 24.0]);
        assert_eq!(batch.spread_responses(&[1.0, 2.0, 3.0, 4.0]), [1.0, 1.0, 3.0, 4.0, 4.0, 2.0, 2.0]);
        // the prompt of the third example is the first's
        batch.push_response(2, &[8, 2]);
        assert_eq!(batch.segments.last().map(|segment| segment.prefix.clone()), Some([0..0, 0..2]));
        assert_eq!(batch.responses[4], 7..9);
    }

    #[test]
    #[should_panic(expected = "does not begin as all others do")]
    fn a_prompt_that_begins_otherwise_is_refused() {
        PackedBatch::default().with_common(&[1, 3]).push(&[1, 4, 5], &[&[2]]);
    }

    #[test]
    fn for_scores_the_last_tokens_are_computed_and_scored_alone() {
        let mut batch = PackedBatch::for_scores();
        batch.push_keyed(0, &[5, 6], &[&[7, 8, 2], &[9], &[]]);
        batch.push_keyed(1, &[4], &[&[3, 2]]);
        assert_eq!(batch.tokens, [5, 6, 7, 8, 2, 9, 4, 3, 2]);
        assert_eq!(batch.positions, [0, 1, 2, 3, 4, 2, 0, 1, 2]);
        assert_eq!(batch.scored_rows, [4, 5, 1, 8]);
        assert_eq!(batch.responses, [0..1, 1..2, 2..3, 3..4]);
        assert_eq!(packed_rows(2, &[3, 1, 0], true) + packed_rows(1, &[2], true), batch.rows());
        assert_eq!(batch.row_keys.len(), batch.rows());
        assert_eq!(batch.sum_responses(&[1.0, 2.0, 3.0, 4.0]), [1.0, 2.0, 3.0, 4.0]);
        assert_eq!(batch.spread_responses(&[1.0, 2.0, 3.0, 4.0]), [1.0, 2.0, 3.0, 4.0]);
    }

    #[test]
    fn a_repeated_batch_is_its_examples_pushed_again() {
        let pushed = |times: usize| {
            let mut batch = PackedBatch::default();
            for _ in 0..times {
                batch.push_keyed(0, &[5, 6], &[&[7, 8, 2], &[9]]);
                batch.push_keyed(1, &[4], &[&[3, 2]]);
            }
            batch
        };
        assert_eq!(format!("{:?}", pushed(1).repeated(3)), format!("{:?}", pushed(3)));
    }

    #[test]
    fn a_repeated_batch_has_its_common_tokens_in_every_copy() {
        let mut batch = PackedBatch::default().with_common(&[1, 3]);
        batch.push(&[1, 3, 5], &[&[7, 2], &[9, 2]]);
        batch.push(&[1, 3, 4], &[&[3, 2]]);
        let (all, rows) = (batch.repeated(2), batch.rows());
        assert_eq!(all.tokens, [&batch.tokens[..], &batch.tokens].concat());
        let (first, second) = all.segments.split_at(batch.segments.len());
        for (a, b) in first.iter().zip(second) {
            assert_eq!(b.rows, a.rows.start + rows..a.rows.end + rows);
            for (a, b) in a.prefix.iter().zip(&b.prefix) {
                assert!(a.is_empty() && b.is_empty() || *b == (a.start + rows..a.end + rows), "{a:?} {b:?}");
            }
        }
        assert_eq!(all.responses.len(), 2 * batch.responses.len());
    }

    #[test]
    fn every_row_has_a_key_that_does_not_depend_on_the_batch() {
        let keyed = |examples: &[u64]| {
            let mut batch = PackedBatch::default();
            for &key in examples {
                batch.push_keyed(key, &[5, 6], &[&[7, 8, 2], &[7, 8, 2]]);
            }
            assert_eq!(batch.row_keys.len(), batch.rows());
            batch.row_keys
        };
        let both = keyed(&[0, 1]);
        assert_eq!(both, [keyed(&[0]), keyed(&[1])].concat());
        let distinct: std::collections::BTreeSet<_> = both.iter().collect();
        assert_eq!(distinct.len(), both.len());
    }
}
