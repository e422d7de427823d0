//! Reward and cost models: decoders with a score head, trained on preference pairs.

use std::path::Path;

use engine::{Model, Result};

use crate::data::TokenizedPair;
use crate::objective::{Derivative, ScoreLoss};
use crate::sequences::Sequences;
use crate::step::{Aligned, trained_from};
use crate::task::{ExampleLoss, Scored, Task};
use crate::trainer::{Monitor, TrainOptions};

/// Preference pairs whose responses a model with a score head scores.
#[derive(Debug, Clone, Copy)]
pub struct ScoredPairs<'a> {
    pairs: &'a [TokenizedPair],
    loss: ScoreLoss,
}

impl<'a> ScoredPairs<'a> {
    /// # Panics
    /// If a pair does not say whether its responses are unsafe, for costs.
    pub fn new(pairs: &'a [TokenizedPair], loss: ScoreLoss) -> Self {
        let labelled = || pairs.iter().all(|pair| pair.is_unsafe.is_some());
        assert!(loss == ScoreLoss::Reward || labelled(), "costs need to know which responses are unsafe");
        Self { pairs, loss }
    }
}

impl Task for ScoredPairs<'_> {
    fn len(&self) -> usize {
        self.pairs.len()
    }

    fn sequences(&self, example: usize) -> Sequences<'_> {
        self.pairs[example].sequences()
    }

    fn parameters(&self) -> String {
        // at equal scores, which tell trainings apart, the loss does not show which of two responses is the unsafe one
        let mut labels = blake3::Hasher::new();
        for pair in self.pairs.iter().filter(|_| self.loss == ScoreLoss::Cost) {
            labels.update(&pair.is_unsafe.unwrap_or_default().map(u8::from));
        }
        format!("{:?} of scores {}", self.loss, labels.finalize().to_hex())
    }

    /// Metrics are of rewards, which are costs with the other sign, under the names that TRL has for implicit ones.
    fn evaluate(&self, example: usize, responses: &[Scored], _: f64) -> ExampleLoss {
        let scores = [responses[0].logp, responses[1].logp];
        let is_unsafe = self.pairs[example].is_unsafe.unwrap_or_default();
        let result = self.loss.evaluate(scores, is_unsafe);
        let [chosen, rejected] = scores.map(|score| self.loss.sign() * score);
        let mut metrics = vec![
            ("rewards/chosen", chosen),
            ("rewards/rejected", rejected),
            ("rewards/margins", chosen - rejected),
            ("rewards/accuracies", f64::from(u8::from(chosen > rejected))),
        ];
        if self.loss == ScoreLoss::Cost {
            let right = scores.iter().zip(is_unsafe).filter(|(cost, is_unsafe)| (**cost > 0.0) == *is_unsafe).count();
            metrics.push(("costs/sign_accuracies", right as f64 / 2.0));
        }
        let derivatives = result.derivatives.map(|score| Derivative { logp: score, kl: 0.0 }).to_vec();
        ExampleLoss { loss: result.loss, derivatives, metrics }
    }
}

/// Trains a reward or cost model from `start`, which has a score head, as [`train`](crate::trainer::train) does.
///
/// # Errors
/// As there; an adapter that the model cannot have.
///
/// # Panics
/// As [`ScoredPairs::new`].
pub fn train(
    start: Model,
    loss: ScoreLoss,
    [pairs, held_out]: [&[TokenizedPair]; 2],
    options: &TrainOptions,
    folder: &Path,
    monitor: &mut dyn Monitor,
) -> Result<Aligned> {
    let (task, held_out) = (ScoredPairs::new(pairs, loss), ScoredPairs::new(held_out, loss));
    trained_from(start, &task, &held_out, options, folder, monitor)
}
