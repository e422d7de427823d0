//! What the trainer trains on: examples, and what their log-probabilities mean for the loss.

use crate::data::TokenizedPair;
use crate::objective::{Pair, Pairwise, Response};

/// The loss of one example, before division by the batch's total weight.
#[derive(Debug, Clone, PartialEq)]
pub struct ExampleLoss {
    /// The loss.
    pub loss: f64,
    /// Its derivative with respect to each response's log-probability.
    pub d_logps: Vec<f64>,
    /// Named quantities, averaged over a batch's examples and logged.
    pub metrics: Vec<(&'static str, f64)>,
}

/// A set of examples with a loss. The trainer minimises Σ loss / Σ weight over a batch.
pub trait Task: Sync {
    /// Number of examples.
    fn len(&self) -> usize;
    /// Whether there is nothing to train on.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The prompt of an example.
    fn prompt(&self, example: usize) -> &[u32];
    /// The responses of an example, at least one.
    fn responses(&self, example: usize) -> Vec<&[u32]>;
    /// What the example counts in the mean: 1 for preferences, tokens for demonstrations.
    fn weight(&self, example: usize) -> f64;
    /// The loss of an example whose responses have these log-probabilities under the policy.
    fn evaluate(&self, example: usize, logps: &[f64]) -> ExampleLoss;
    /// Where the example came from, for messages: the line of its file.
    fn row(&self, example: usize) -> usize;
}

/// Preference pairs under an objective, with the log-probabilities of a fixed reference.
#[derive(Debug, Clone)]
pub struct Preferences<'a> {
    pairs: &'a [TokenizedPair],
    reference: &'a [[f64; 2]],
    objective: &'a Pairwise,
}

impl<'a> Preferences<'a> {
    /// `reference[i]` holds the log-probabilities of pair i's chosen and rejected response.
    ///
    /// # Panics
    /// If there is not exactly one entry of `reference` per pair.
    pub fn new(pairs: &'a [TokenizedPair], reference: &'a [[f64; 2]], objective: &'a Pairwise) -> Self {
        assert_eq!(pairs.len(), reference.len(), "every pair needs its reference log-probabilities");
        Self { pairs, reference, objective }
    }
}

impl Task for Preferences<'_> {
    fn len(&self) -> usize {
        self.pairs.len()
    }

    fn prompt(&self, example: usize) -> &[u32] {
        &self.pairs[example].prompt
    }

    fn responses(&self, example: usize) -> Vec<&[u32]> {
        vec![&self.pairs[example].chosen, &self.pairs[example].rejected]
    }

    fn weight(&self, _: usize) -> f64 {
        1.0
    }

    fn evaluate(&self, example: usize, logps: &[f64]) -> ExampleLoss {
        let pair = &self.pairs[example];
        let [ref_chosen, ref_rejected] = self.reference[example];
        let (policy_chosen, policy_rejected) = (logps[0], logps[1]);
        let result = self.objective.evaluate(&Pair {
            chosen: Response { policy: policy_chosen, reference: ref_chosen, len: pair.chosen.len(), kl: 0.0 },
            rejected: Response { policy: policy_rejected, reference: ref_rejected, len: pair.rejected.len(), kl: 0.0 },
            is_unsafe: [false; 2],
            margin: 0.0,
        });
        let margin = result.reward_chosen - result.reward_rejected;
        ExampleLoss {
            loss: result.loss,
            d_logps: vec![result.chosen.logp, result.rejected.logp],
            metrics: vec![
                ("rewards/chosen", result.reward_chosen),
                ("rewards/rejected", result.reward_rejected),
                ("rewards/margins", margin),
                ("rewards/accuracies", f64::from(u8::from(margin > 0.0))),
                ("logps/chosen", policy_chosen),
                ("logps/rejected", policy_rejected),
            ],
        }
    }

    fn row(&self, example: usize) -> usize {
        self.pairs[example].row
    }
}

/// A prompt with the response to imitate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Demonstration {
    /// Tokens of the prompt.
    pub prompt: Vec<u32>,
    /// Tokens of the response, end token included.
    pub response: Vec<u32>,
}

/// Supervised fine-tuning: the mean negative log-probability per response token.
#[derive(Debug, Clone)]
pub struct Demonstrations<'a>(pub &'a [Demonstration]);

impl Task for Demonstrations<'_> {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn prompt(&self, example: usize) -> &[u32] {
        &self.0[example].prompt
    }

    fn responses(&self, example: usize) -> Vec<&[u32]> {
        vec![&self.0[example].response]
    }

    fn weight(&self, example: usize) -> f64 {
        self.0[example].response.len() as f64
    }

    fn evaluate(&self, _: usize, logps: &[f64]) -> ExampleLoss {
        ExampleLoss { loss: -logps[0], d_logps: vec![-1.0], metrics: Vec::new() }
    }

    fn row(&self, example: usize) -> usize {
        example + 1
    }
}
