//! What a training keeps beside weights and moments.

use engine::optim::{Ema, StateTensor, StateValues};
use serde::{Deserialize, Serialize};

use super::TrainOptions;
use crate::objective::RunningMean;

/// The moving average, the best weights, and what was counted on the way.
#[derive(Debug, Clone)]
pub(crate) struct Progress {
    pub(crate) counts: Counts,
    ema: Option<Ema>,
    /// The weights of the lowest validation loss, when they are wanted.
    best: Option<Vec<f32>>,
    patience: u64,
}

/// The numbers of a [`Progress`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Counts {
    pub(crate) running: RunningMean,
    /// The lowest validation loss so far.
    lowest: Option<f64>,
    /// Validations since then.
    since: u64,
    /// Tokens per pass. A training goes on with them if they still fit: sums of another cut have other last bits.
    #[serde(default)]
    pub(crate) micro_batch_tokens: Option<usize>,
}

impl Progress {
    /// Before the first step, from these weights.
    pub(crate) fn new(options: &TrainOptions, weights: &[f32]) -> Self {
        Self {
            counts: Counts { running: RunningMean::default(), lowest: None, since: 0, micro_batch_tokens: None },
            ema: options.ema_decay.map(|decay| Ema::new(decay, weights.to_vec())),
            best: options.patience.map(|_| weights.to_vec()),
            patience: options.patience.unwrap_or(u64::MAX),
        }
    }

    /// Takes the weights after an optimizer step into the average.
    pub(crate) fn average(&mut self, weights: &[f32]) {
        if let Some(ema) = &mut self.ema {
            ema.update(weights);
        }
    }

    /// The moving average of the weights, if one is kept.
    pub(crate) fn averaged(&mut self) -> Option<&mut Vec<f32>> {
        self.ema.as_mut().map(|ema| &mut ema.weights)
    }

    /// Notes the validation loss of `weights`.
    pub(crate) fn validated(&mut self, loss: f64, weights: &[f32]) {
        self.counts.since += 1;
        if self.counts.lowest.is_none_or(|lowest| loss < lowest) {
            self.counts.lowest = Some(loss);
            self.counts.since = 0;
            if let Some(best) = &mut self.best {
                best.copy_from_slice(weights);
            }
        }
    }

    /// Whether validations have failed to improve for as long as was to be waited.
    pub(crate) fn is_out_of_patience(&self) -> bool {
        self.counts.since >= self.patience
    }

    /// The weights that the training ends with, if they are not those of its last step.
    pub(crate) fn into_weights(self) -> Option<Vec<f32>> {
        self.best.filter(|_| self.counts.lowest.is_some()).or(self.ema.map(|ema| ema.weights))
    }

    /// All tensors, to be saved or restored.
    pub(crate) fn tensors(&mut self) -> Vec<StateTensor<'_>> {
        let ema = self.ema.as_mut().map(|ema| ("ema", &mut ema.weights));
        let best = self.best.as_mut().map(|best| ("best", best));
        let tensors = ema.into_iter().chain(best);
        tensors
            .map(|(name, values)| StateTensor {
                name: name.to_owned(),
                shape: vec![values.len()],
                values: StateValues::F32(values),
            })
            .collect()
    }
}
