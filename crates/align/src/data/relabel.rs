//! Labels and margins made from scores.

use std::collections::HashMap;

use super::TokenizedPair;
use super::split::uniform;
use crate::tabular::Table;

/// Σ_m w_m (score_m(chosen) − score_m(rejected)) of every pair, from the scores `[metric][pair][response]`, the chosen
/// response first, of at least one metric.
///
/// # Panics
/// If there is not one weight per metric, or not two scores of every metric for each pair.
pub fn margins(scores: &[Table], weights: &[f64]) -> Vec<f64> {
    assert_eq!(scores.len(), weights.len(), "every metric needs its weight");
    let pairs = scores.first().map_or(0, Vec::len);
    let mut margins = vec![0.0; pairs];
    for (scores, weight) in scores.iter().zip(weights) {
        assert_eq!(scores.len(), pairs, "every metric needs the scores of every pair");
        margins.iter_mut().zip(scores).for_each(|(margin, of_pair)| *margin += weight * (of_pair[0] - of_pair[1]));
    }
    margins
}

/// Gives every pair its margin, for `modpo`: Σ_j w_j (m_j(chosen) − m_j(rejected)) of the metrics other than its own.
///
/// # Panics
/// If there is not one margin per pair.
pub fn set_margins(pairs: &mut [TokenizedPair], margins: &[f64]) {
    assert_eq!(pairs.len(), margins.len(), "every pair needs its margin");
    pairs.iter_mut().zip(margins).for_each(|(pair, margin)| pair.margin = Some(*margin));
}

/// Draws every label again by Bradley–Terry: the response that is chosen stays so with probability σ(margin). Returns the
/// number of pairs whose responses changed places, with their flags and the sign of their margin.
///
/// `dpo` at β on such pairs has the population optimum π_ref·exp(Σ_m w_m score_m/β), normalised, whatever the labels were:
/// C-DPO (arXiv 2403.02475) with the scores of a reward and a cost model and weights 1 and −λ; MoCAN and PeCAN (arXiv
/// 2405.19544) with models or implicit rewards and weights 1 and λ. Labels are random as in the published program of the
/// latter two. Taking the sign of the margin instead would leave no finite optimum.
///
/// The outcome for a row depends on the seed, its texts, how many rows before it have the same texts, and how much better one
/// response is than the other: not on other rows, and not on which response was chosen. The random number is the same for
/// every margin, so that labels drawn for several weights by one seed differ only where the weights make them.
///
/// # Panics
/// If there is not one margin per pair.
pub fn relabel(pairs: &mut [TokenizedPair], margins: &[f64], seed: u64) -> usize {
    assert_eq!(pairs.len(), margins.len(), "every pair needs its margin");
    let mut swapped = 0;
    let mut before: HashMap<blake3::Hash, u64> = HashMap::new();
    for (pair, margin) in pairs.iter_mut().zip(margins) {
        // the draw is whether the first of the two in an order that no label changes is chosen
        let mut sequences = pair.sequences();
        sequences.responses.sort_unstable();
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes());
        sequences.hash_into(&mut hasher);
        let same = before.entry(hasher.finalize()).or_default();
        hasher.update(&same.to_le_bytes());
        *same += 1;
        let chosen_is_first = *pair.chosen <= *pair.rejected;
        let for_first = if chosen_is_first { *margin } else { -margin };
        let first_wins = uniform(&hasher) < 1.0 / (1.0 + (-for_first).exp());
        if first_wins != chosen_is_first {
            swap(pair);
            swapped += 1;
        }
    }
    swapped
}

/// Lets the two responses change places.
fn swap(pair: &mut TokenizedPair) {
    std::mem::swap(&mut pair.chosen, &mut pair.rejected);
    pair.is_unsafe = pair.is_unsafe.map(|[chosen, rejected]| [rejected, chosen]);
    pair.margin = pair.margin.map(|margin| -margin);
}
