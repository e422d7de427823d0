//! What the attention kernels are told of a batch: which rows a block of threads computes, and which queries see which keys.

use std::ops::Range;

use crate::ops::attention::{Prefix, Span};

/// Rows of a tile, and keys of a job: `ROWS` and `KEYS` of the kernels.
const TILE: usize = 64;

/// Queries after which the gradient of some keys is cut into several jobs, so that keys that all of a batch sees, those of a
/// system prompt, do not keep one block at work long after the others have ended.
const QUERIES_OF_JOB: usize = 1024;

/// The tables of a batch, as the kernels read them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// First row and rows of each span, first rows of both parts of its prefix, and their rows.
    pub(crate) spans: Vec<[i32; 6]>,
    /// Number of the span, and its first row of the tile.
    pub(crate) tiles: Vec<[i32; 2]>,
    /// First key's row, keys, first entry of `queries` and number of them, and the place in the workspace or −1.
    pub(crate) jobs: Vec<[i32; 5]>,
    /// First row, rows, position of the first row's own key, position of the job's first key.
    pub(crate) queries: Vec<[i32; 4]>,
    /// First key's row, keys, first place in the workspace and number of them.
    pub(crate) shared: Vec<[i32; 4]>,
    /// Places of the workspace.
    pub(crate) slots: usize,
}

impl Plan {
    /// Of a forward pass.
    ///
    /// # Panics
    /// If a span continues a cache.
    pub(crate) fn forward(spans: &[Span<'_>]) -> Self {
        let mut plan = Self::default();
        for (index, span) in spans.iter().enumerate() {
            let [first, second] = prefix(span);
            let numbers =
                [span.rows.start, span.rows.len(), first.start, second.start, first.len(), second.len()].map(number);
            plan.spans.push(numbers);
            plan.tiles.extend((0..span.rows.len()).step_by(TILE).map(|row| [number(index), number(row)]));
        }
        plan
    }

    /// Of a forward and a backward pass.
    ///
    /// # Panics
    /// If a span continues a cache, or a part of another span.
    pub(crate) fn backward(spans: &[Span<'_>]) -> Self {
        Self::with_jobs(spans, QUERIES_OF_JOB)
    }

    /// As [`backward`](Self::backward), with jobs of at most so many queries, or those of one span.
    pub(crate) fn with_jobs(spans: &[Span<'_>], queries_of_job: usize) -> Self {
        let mut plan = Self::forward(spans);
        for span in spans {
            let seen_by = queries(spans, &span.rows);
            for first in span.rows.clone().step_by(TILE) {
                let keys = first..span.rows.end.min(first + TILE);
                plan.add_keys(keys, first - span.rows.start, &seen_by, queries_of_job);
            }
        }
        plan
    }

    /// Adds the keys of a tile, `offset` rows after the first of their span, which these queries see.
    fn add_keys(&mut self, keys: Range<usize>, offset: usize, seen_by: &[[usize; 4]], queries_of_job: usize) {
        let (mut parts, mut full) = (vec![Vec::new()], 0);
        for &[row, rows, position, key_position] in seen_by {
            if full > 0 && full + rows > queries_of_job {
                parts.push(Vec::new());
                full = 0;
            }
            full += rows;
            parts.last_mut().into_iter().for_each(|part| part.push([row, rows, position, key_position + offset]));
        }
        let shared = parts.len() > 1;
        if shared {
            let numbers = [keys.start, keys.len(), self.slots, parts.len()].map(number);
            self.shared.push(numbers);
        }
        for part in parts {
            let [row, keys, first, queries] = [keys.start, keys.len(), self.queries.len(), part.len()].map(number);
            let slot = if shared { number(self.slots) } else { -1 };
            self.slots += usize::from(shared);
            self.jobs.push([row, keys, first, queries, slot]);
            self.queries.extend(part.into_iter().map(|entry| entry.map(number)));
        }
    }
}

/// The queries that see keys of a span: first row, rows, position of the first row's own key, and that of the span's first key.
fn queries(spans: &[Span<'_>], keys: &Range<usize>) -> Vec<[usize; 4]> {
    let mut all = Vec::new();
    for span in spans {
        let parts = prefix(span);
        let before = parts[0].len() + parts[1].len();
        let mut start = 0;
        for part in parts.into_iter().chain([&span.rows]) {
            if part.start < keys.end && keys.start < part.end {
                assert_eq!(part, keys, "a span continues a part of another");
                all.push([span.rows.start, span.rows.len(), before, start]);
            }
            start += part.len();
        }
    }
    all
}

/// The rows that a span continues.
fn prefix<'s>(span: &'s Span<'_>) -> [&'s Range<usize>; 2] {
    match &span.prefix {
        Prefix::Rows(parts) => parts.each_ref(),
        Prefix::Cache { .. } => panic!("a batch of training has no cache"),
    }
}

/// A number as the kernels have it.
///
/// # Panics
/// If it does not fit: no batch has two thousand million rows.
fn number(number: usize) -> i32 {
    i32::try_from(number).unwrap_or_else(|_| panic!("{number} rows are too many for a kernel"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn span(rows: Range<usize>, prefix: [Range<usize>; 2]) -> Span<'static> {
        Span { rows, prefix: Prefix::Rows(prefix) }
    }

    /// A system prompt, two prompts with responses, one of them longer than a tile, and a text by itself.
    fn batch(responses: usize) -> Vec<Span<'static>> {
        let mut spans = vec![span(0..10, [0..0, 0..0]), span(10..15, [0..10, 0..0])];
        let mut row = 15;
        for len in (0..responses).map(|i| 3 + 70 * (i % 3)) {
            spans.push(span(row..row + len, [0..10, 10..15]));
            row += len;
        }
        spans.push(span(row..row + 130, [0..10, 0..0]));
        spans
    }

    /// How often each row is to add to the gradient of each key's row.
    fn seen(plan: &Plan) -> BTreeMap<(i32, i32), usize> {
        let mut seen = BTreeMap::new();
        for &[key_row, keys, first, count, _] in &plan.jobs {
            for &[row, rows, position, key_position] in &plan.queries[first as usize..(first + count) as usize] {
                for (query, key) in (0..rows).flat_map(|query| (0..keys).map(move |key| (query, key))) {
                    if key_position + key <= position + query {
                        *seen.entry((row + query, key_row + key)).or_insert(0) += 1;
                    }
                }
            }
        }
        seen
    }

    #[test]
    fn every_row_meets_every_key_that_it_sees_once() {
        for responses in [0, 2, 40] {
            let spans = batch(responses);
            let mut expected = BTreeMap::new();
            for span in &spans {
                let before = prefix(span).map(Clone::clone);
                for row in span.rows.clone() {
                    let own = span.rows.start..row + 1;
                    for key in before.iter().cloned().chain([own]).flatten() {
                        expected.insert((row as i32, key as i32), 1);
                    }
                }
            }
            let plan = Plan::backward(&spans);
            assert_eq!(seen(&plan), expected);
            let rows = plan.tiles.iter().map(|&[span, first]| (plan.spans[span as usize][1] - first).min(TILE as i32));
            assert_eq!(rows.sum::<i32>() as usize, spans.last().map_or(0, |span| span.rows.end));
        }
    }

    #[test]
    fn keys_that_all_of_a_batch_sees_are_shared_by_jobs_with_a_place_each() {
        let plan = Plan::backward(&batch(40));
        assert!(plan.shared.iter().any(|&[row, ..]| row == 0), "{:?}", plan.shared);
        let mut slots = Vec::new();
        for &[row, keys, first, count] in &plan.shared {
            let of = plan.jobs.iter().filter(|job| job[0] == row).map(|job| (job[1], job[4]));
            assert_eq!(of.collect::<Vec<_>>(), (first..first + count).map(|slot| (keys, slot)).collect::<Vec<_>>());
            slots.extend(first..first + count);
        }
        assert_eq!(slots, (0..plan.slots as i32).collect::<Vec<_>>());
        assert!(Plan::backward(&batch(2)).shared.is_empty());
    }

    #[test]
    #[should_panic(expected = "a part of another")]
    fn the_gradient_of_a_part_of_a_span_is_refused() {
        Plan::backward(&[span(0..8, [0..0, 0..0]), span(8..10, [0..0, 0..5])]);
    }
}
