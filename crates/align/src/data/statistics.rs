//! What a file of preference data holds, in numbers.

use std::collections::{HashMap, HashSet};

use serde::Serialize;

use super::split::{Answered, turns};
use super::{LabelledExample, PreferencePair};

/// What rows repeat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RowCounts {
    /// All rows.
    pub rows: usize,
    /// Different prompts.
    pub prompts: usize,
    /// Rows that say the same as one before them.
    pub duplicates: usize,
    /// Rows that say the opposite of one before them.
    pub contradictions: usize,
}

impl RowCounts {
    /// Counts rows in the order of their file.
    pub fn new<T: Answered>(rows: &[T]) -> Self {
        let (mut seen, mut prompts) = (HashSet::new(), HashSet::new());
        let (mut duplicates, mut contradictions) = (0, 0);
        for row in rows {
            let (prompt, responses) = (turns(row.prompt()), row.responses());
            // the preferred response comes first
            let opposite: Vec<(&str, bool)> = responses.iter().rev().map(|(text, label)| (*text, !label)).collect();
            contradictions += usize::from(seen.contains(&(prompt.clone(), opposite)));
            prompts.insert(prompt.clone());
            duplicates += usize::from(!seen.insert((prompt, responses)));
        }
        Self { rows: rows.len(), prompts: prompts.len(), duplicates, contradictions }
    }
}

/// Counts over preference pairs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PairCounts {
    /// What they repeat.
    #[serde(flatten)]
    pub rows: RowCounts,
    /// Pairs whose chosen response has more characters than the rejected one. Far from half, a policy can learn length.
    pub chosen_is_longer: usize,
    /// Pairs that say of both responses whether they are safe.
    pub flagged: usize,
    /// Of those, pairs with a safe chosen, and with a safe rejected response.
    pub safe: [usize; 2],
}

impl PairCounts {
    /// Counts pairs in the order of their file.
    pub fn new(pairs: &[PreferencePair]) -> Self {
        let longer = |pair: &&PreferencePair| pair.chosen.chars().count() > pair.rejected.chars().count();
        let flags = || pairs.iter().filter_map(|pair| pair.is_unsafe);
        Self {
            rows: RowCounts::new(pairs),
            chosen_is_longer: pairs.iter().filter(longer).count(),
            flagged: flags().count(),
            safe: [0, 1].map(|response| flags().filter(|is_unsafe| !is_unsafe[response]).count()),
        }
    }
}

/// Counts over labelled responses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ExampleCounts {
    /// What they repeat.
    #[serde(flatten)]
    pub rows: RowCounts,
    /// Those to learn from.
    pub desirable: usize,
}

impl ExampleCounts {
    /// Counts labelled responses in the order of their file.
    pub fn new(examples: &[LabelledExample]) -> Self {
        let desirable = examples.iter().filter(|example| example.desirable).count();
        Self { rows: RowCounts::new(examples), desirable }
    }
}

/// How many rows prefer another response by one metric than by another: rows that both files have, and of those the rows whose
/// chosen response differs.
pub fn disagreement(pairs: &[PreferencePair], others: &[PreferencePair]) -> [usize; 2] {
    let chosen: HashMap<usize, &String> = others.iter().map(|pair| (pair.row, &pair.chosen)).collect();
    let both = pairs.iter().filter_map(|pair| chosen.get(&pair.row).map(|other| *other != &pair.chosen));
    both.fold([0, 0], |[rows, differ], differs| [rows + 1, differ + usize::from(differs)])
}

/// How long texts or token sequences are.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Lengths {
    /// The mean.
    pub mean: f64,
    /// The least, the median, the lengths that 90 % and 99 % do not exceed, and the greatest.
    pub quantiles: [usize; 5],
    /// The number of lengths in each of some ranges of equal width, from 0 up to the greatest.
    pub histogram: Vec<usize>,
}

impl Lengths {
    /// Of at least one length; the histogram has as many ranges as it says.
    ///
    /// # Panics
    /// If there is no length, or no range.
    pub fn new(mut lengths: Vec<usize>, ranges: usize) -> Self {
        lengths.sort_unstable();
        let last = lengths.len() - 1;
        // the smallest length that this share of all does not exceed
        let quantile =
            |share: f64| lengths[((share * lengths.len() as f64).ceil() as usize).saturating_sub(1).min(last)];
        let quantiles = [0.0, 0.5, 0.9, 0.99, 1.0].map(quantile);
        let mut histogram = vec![0; ranges];
        for length in &lengths {
            histogram[length * ranges / (lengths[last] + 1)] += 1;
        }
        Self { mean: lengths.iter().sum::<usize>() as f64 / lengths.len() as f64, quantiles, histogram }
    }
}
