//! One step of the chain, and how a policy ranks pairs.
//!
//! SACPO (arXiv 2404.11049): step 1 aligns the base model at temperature β; step k aligns the policy of step k − 1 at
//! temperature β/λ, with that policy as its start *and* its reference. Theorem 1 makes the last policy the constrained
//! optimum, π* ∝ π_r · exp((λ/β)·g).

use std::path::Path;

use engine::{Error, Model, Result};
use serde::Serialize;

use crate::data::TokenizedPair;
use crate::objective::Pairwise;
use crate::reference::pair_logps;
use crate::task::Preferences;
use crate::trainer::{Monitor, StepRecord, TrainOptions, train};

/// Aligns `start` on preferences, with `start` itself as the reference, so that the first margin is exactly 0.
///
/// `folder` receives metrics and state (see [`train`]); `cache` keeps the reference's log-probabilities.
///
/// # Errors
/// Those of [`pair_logps`] and [`train`].
pub fn align(
    start: &Model,
    pairs: &[TokenizedPair],
    objective: &Pairwise,
    options: &TrainOptions,
    folder: &Path,
    cache: &Path,
    monitor: &mut dyn Monitor,
) -> Result<(Model, Vec<StepRecord>)> {
    let mut scored = |done| {
        monitor.scored(done, pairs.len());
        if !monitor.stop_requested() {
            return Ok(());
        }
        Err(Error::Interrupted(format!(
            "Stopped after {done} of {} pairs were scored under the reference, as you asked. Run the same command again; \
             the scores are computed anew.",
            pairs.len()
        )))
    };
    let reference = pair_logps(start, pairs, options.micro_batch_tokens, Some(cache), &mut scored)?;
    let mut policy = start.clone();
    let records = train(&mut policy, &Preferences::new(pairs, &reference, objective), options, folder, monitor)?;
    Ok((policy, records))
}

/// How a policy ranks held-out pairs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PreferenceReport {
    /// Number of pairs.
    pub pairs: usize,
    /// Share of pairs whose implicit reward log π − log π_base prefers the chosen response; ties count half.
    pub accuracy: f64,
    /// Mean difference of the implicit rewards of chosen and rejected, in nats.
    pub margin: f64,
    /// Share of pairs whose chosen response is likelier than the rejected one; ties count half.
    pub likelihood_accuracy: f64,
}

/// Ranks pairs by a policy's log-probabilities and a base model's, each `[chosen, rejected]` per pair.
pub fn rank(policy: &[[f64; 2]], base: &[[f64; 2]]) -> PreferenceReport {
    assert_eq!(policy.len(), base.len(), "policy and base must have scored the same pairs");
    let prefers = |difference: f64| if difference == 0.0 { 0.5 } else { f64::from(u8::from(difference > 0.0)) };
    let margins = policy.iter().zip(base).map(|(p, b)| (p[0] - b[0]) - (p[1] - b[1]));
    let n = policy.len() as f64;
    PreferenceReport {
        pairs: policy.len(),
        accuracy: margins.clone().map(prefers).sum::<f64>() / n,
        margin: margins.sum::<f64>() / n,
        likelihood_accuracy: policy.iter().map(|p| prefers(p[0] - p[1])).sum::<f64>() / n,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_count_half_and_margins_are_relative_to_the_base() {
        let base = [[-3.0, -2.0], [-5.0, -5.0], [-1.0, -4.0]];
        let same = rank(&base, &base);
        assert_eq!((same.accuracy, same.margin, same.likelihood_accuracy), (0.5, 0.0, 0.5));
        let policy = [[-2.0, -2.5], [-5.0, -5.0], [-2.0, -4.0]];
        let report = rank(&policy, &base);
        assert_eq!(report.accuracy, 0.5);
        assert!((report.margin - (1.5 + 0.0 - 1.0) / 3.0).abs() < 1e-12);
        assert_eq!(report.likelihood_accuracy, 2.5 / 3.0);
    }
}
