//! Means of the worst scores.

use super::share::Share;

/// A policy's scores, one per prompt: the mean of what its answers to it were given. There is at least one.
#[derive(Debug, Clone)]
pub(super) struct Scores {
    /// The numbers of the prompts and the scores, from the worst to the best.
    by_prompt: Vec<(usize, f64)>,
}

impl Scores {
    /// From scores and the numbers of their prompts; [`None`] if there are none.
    pub(super) fn new(scores: impl IntoIterator<Item = (usize, f64)>) -> Option<Self> {
        let mut by_prompt: Vec<(usize, f64)> = Share::new(scores)?.by_prompt().collect();
        by_prompt.sort_by(|(_, a), (_, b)| a.total_cmp(b));
        Some(Self { by_prompt })
    }

    /// The mean of the worst `share` of the scores, above 0 to 1, with a weight for every prompt or the same for all; of a
    /// share of 1 the mean of all.
    ///
    /// This is the conditional value at risk of the lower tail (R. Rockafellar, S. Uryasev, J. Banking & Finance 26, 2002):
    /// of the prompt at its end only the part that belongs to it counts.
    pub(super) fn lower_tail(&self, share: f64, weights: Option<&[f64]>) -> f64 {
        let weight = |prompt: usize| weights.map_or(1.0, |weights| weights[prompt]);
        let total: f64 = self.by_prompt.iter().map(|(prompt, _)| weight(*prompt)).sum();
        let (mut left, mut sum) = (share * total, 0.0);
        for (prompt, score) in &self.by_prompt {
            let weight = weight(*prompt).min(left);
            sum += weight * score;
            left -= weight;
        }
        sum / (share * total - left)
    }
}
