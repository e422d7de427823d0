//! What a file of preference data holds, in numbers.

use std::collections::{HashMap, HashSet};

use serde::Serialize;

use super::split::turns;
use super::{LabelledExample, PreferencePair};

/// Counts over preference pairs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PairCounts {
    /// All pairs.
    pub pairs: usize,
    /// Different prompts.
    pub prompts: usize,
    /// Pairs that say the same as one before them.
    pub duplicates: usize,
    /// Pairs whose responses one before them ranks the other way round.
    pub contradictions: usize,
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
        let mut seen = HashSet::new();
        let mut counts = Self {
            pairs: pairs.len(),
            prompts: pairs.iter().map(|pair| turns(&pair.prompt)).collect::<HashSet<_>>().len(),
            duplicates: 0,
            contradictions: 0,
            chosen_is_longer: 0,
            flagged: 0,
            safe: [0, 0],
        };
        for PreferencePair { prompt, chosen, rejected, is_unsafe, .. } in pairs {
            let prompt = turns(prompt);
            counts.contradictions += usize::from(seen.contains(&(prompt.clone(), rejected, chosen)));
            counts.duplicates += usize::from(!seen.insert((prompt, chosen, rejected)));
            counts.chosen_is_longer += usize::from(chosen.chars().count() > rejected.chars().count());
            if let Some(flags) = is_unsafe {
                counts.flagged += 1;
                counts.safe.iter_mut().zip(flags).for_each(|(safe, is_unsafe)| *safe += usize::from(!is_unsafe));
            }
        }
        counts
    }
}

/// Counts over labelled responses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ExampleCounts {
    /// All responses.
    pub responses: usize,
    /// Different prompts.
    pub prompts: usize,
    /// Those to learn from.
    pub desirable: usize,
    /// Responses that say the same as one before them, with the same label.
    pub duplicates: usize,
    /// Responses that one before them labels otherwise.
    pub contradictions: usize,
}

impl ExampleCounts {
    /// Counts labelled responses in the order of their file.
    pub fn new(examples: &[LabelledExample]) -> Self {
        let mut seen = HashSet::new();
        let mut counts = Self {
            responses: examples.len(),
            prompts: examples.iter().map(|example| turns(&example.prompt)).collect::<HashSet<_>>().len(),
            desirable: examples.iter().filter(|example| example.desirable).count(),
            duplicates: 0,
            contradictions: 0,
        };
        for LabelledExample { prompt, completion, desirable, .. } in examples {
            let prompt = turns(prompt);
            counts.contradictions += usize::from(seen.contains(&(prompt.clone(), completion, !desirable)));
            counts.duplicates += usize::from(!seen.insert((prompt, completion, *desirable)));
        }
        counts
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
