//! What the trainer trains on: examples, and what their log-probabilities mean for the loss.

use std::collections::BTreeMap;

use engine::Model;

use crate::data::{TokenizedExample, TokenizedPair};
use crate::objective::{Derivative, Labelled, Pair, Pairwise, Response, RunningMean, Unpaired};
use crate::sequences::Sequences;
use crate::trainer::batches::derangement;

/// What the policy says of one response.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Scored {
    /// log π_θ(y | x), in nats; of a model with a score head the score of y.
    pub logp: f64,
    /// Σₜ KL(π_ref ‖ π_θ) along the response, in nats; 0 unless the task asks for it.
    pub kl: f64,
}

/// The loss of one example, before division by the batch's total weight.
#[derive(Debug, Clone, PartialEq)]
pub struct ExampleLoss {
    /// The loss.
    pub loss: f64,
    /// Its derivative with respect to each response.
    pub derivatives: Vec<Derivative>,
    /// Named quantities; each is averaged over the examples of a batch that have it.
    pub metrics: Vec<(&'static str, f64)>,
}

/// What a task must know of a whole batch before any of its losses.
#[derive(Debug, Clone, PartialEq)]
pub enum ShiftFrom<'a> {
    /// Nothing: the shift is 0.
    Nothing,
    /// What the policy says of the batch's own responses.
    OwnResponses,
    /// What the policy says of these responses, one to the prompt of each example of the batch.
    Others(Vec<&'a [u32]>),
}

/// A set of examples with a loss. The trainer minimises Σ loss / Σ weight over a batch.
pub trait Task: Sync {
    /// Number of examples.
    fn len(&self) -> usize;
    /// Whether there is nothing to train on.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The prompt and the responses of an example, at least one.
    fn sequences(&self, example: usize) -> Sequences<'_>;
    /// What the example counts in the mean: 1 for preferences, tokens for demonstrations.
    fn weight(&self, _example: usize) -> f64 {
        1.0
    }
    /// The loss and its parameters, as text: no two losses have the same.
    fn parameters(&self) -> String;
    /// The loss of an example of whose responses the policy says this, in a batch of this shift.
    fn evaluate(&self, example: usize, responses: &[Scored], shift: f64) -> ExampleLoss;
    /// The model of which the task must know the divergence along each response, if it must.
    fn divergence_from(&self) -> Option<&Model> {
        None
    }
    /// The fewest examples that a batch may have.
    fn smallest_batch(&self) -> usize {
        1
    }
    /// Whether the shift of a batch is made of what the policy says of other responses to its prompts.
    fn uses_mismatched(&self) -> bool {
        false
    }
    /// What the shift of a batch is made of.
    fn shift_from(&self, _batch: &[usize]) -> ShiftFrom<'_> {
        ShiftFrom::Nothing
    }
    /// The shift of the batch of `step`, from what [`shift_from`](Self::shift_from) asked for.
    fn shift(&self, _step: u64, _batch: &[usize], _scored: &[Scored], _running: &mut RunningMean) -> f64 {
        0.0
    }
    /// Adds metrics that follow from the means over a batch.
    fn complete(&self, _means: &mut BTreeMap<&'static str, f64>) {}
}

/// Preference pairs under an objective, with the log-probabilities of a fixed reference.
#[derive(Debug, Clone)]
pub struct Preferences<'a> {
    pairs: &'a [TokenizedPair],
    reference: &'a [[f64; 2]],
    /// The model that the log-probabilities are of, where the objective reads more of it.
    model: Option<&'a Model>,
    objective: &'a Pairwise,
}

impl<'a> Preferences<'a> {
    /// `reference[i]` holds the log-probabilities of pair i's chosen and rejected response under `model`,
    /// which only objectives that [use the divergence](Pairwise::uses_divergence) from it need.
    ///
    /// # Panics
    /// If there is not exactly one entry of `reference` per pair, or no model and the objective needs it.
    pub fn new(
        pairs: &'a [TokenizedPair],
        reference: &'a [[f64; 2]],
        model: impl Into<Option<&'a Model>>,
        objective: &'a Pairwise,
    ) -> Self {
        assert_eq!(pairs.len(), reference.len(), "every pair needs its reference log-probabilities");
        let model = model.into();
        assert!(model.is_some() || !objective.uses_divergence(), "the objective needs the reference");
        Self { pairs, reference, model, objective }
    }
}

impl Task for Preferences<'_> {
    fn len(&self) -> usize {
        self.pairs.len()
    }

    fn sequences(&self, example: usize) -> Sequences<'_> {
        self.pairs[example].sequences()
    }

    fn parameters(&self) -> String {
        format!("{:?}", self.objective)
    }

    fn divergence_from(&self) -> Option<&Model> {
        self.model.filter(|_| self.objective.uses_divergence())
    }

    fn evaluate(&self, example: usize, responses: &[Scored], _: f64) -> ExampleLoss {
        let pair = &self.pairs[example];
        let response = |index: usize, tokens: &[u32]| Response {
            policy: responses[index].logp,
            reference: self.reference[example][index],
            len: tokens.len(),
            kl: responses[index].kl,
        };
        let result = self.objective.evaluate(&Pair {
            chosen: response(0, &pair.chosen),
            rejected: response(1, &pair.rejected),
            is_unsafe: pair.is_unsafe.unwrap_or_default(),
            margin: pair.margin.unwrap_or_default(),
        });
        let margin = result.reward_chosen - result.reward_rejected;
        let mut metrics = vec![
            ("rewards/chosen", result.reward_chosen),
            ("rewards/rejected", result.reward_rejected),
            ("rewards/margins", margin),
            ("rewards/accuracies", f64::from(u8::from(margin > 0.0))),
            ("logps/chosen", responses[0].logp),
            ("logps/rejected", responses[1].logp),
        ];
        if self.objective.uses_divergence() {
            metrics.extend([("kl/chosen", responses[0].kl), ("kl/rejected", responses[1].kl)]);
        }
        ExampleLoss { loss: result.loss, derivatives: vec![result.chosen, result.rejected], metrics }
    }
}

/// Labelled responses under an objective, with the log-probabilities of a fixed reference.
#[derive(Debug, Clone)]
pub struct LabelledResponses<'a> {
    examples: &'a [TokenizedExample],
    reference: &'a [f64],
    objective: &'a Unpaired,
    /// For each step, the reference's log-probabilities of its batch's mismatched prompts and responses.
    mismatched: &'a [Vec<f64>],
    longest: usize,
}

impl<'a> LabelledResponses<'a> {
    /// `reference[i]` is the log-probability of example i's response. For `kto`, `mismatched[step]` holds those of
    /// the [`mismatched`] prompts and responses of the step's batch; others need none.
    ///
    /// # Panics
    /// If there is not exactly one entry of `reference` per example.
    pub fn new(
        examples: &'a [TokenizedExample],
        reference: &'a [f64],
        objective: &'a Unpaired,
        mismatched: &'a [Vec<f64>],
    ) -> Self {
        assert_eq!(examples.len(), reference.len(), "every example needs its reference log-probability");
        Self { examples, reference, objective, mismatched, longest: longest(examples) }
    }

    fn labelled(&self, example: usize, scored: &Scored) -> Labelled {
        let TokenizedExample { response, desirable, .. } = &self.examples[example];
        let reference = self.reference[example];
        let response = Response { policy: scored.logp, reference, len: response.len(), kl: 0.0 };
        Labelled { response, desirable: *desirable }
    }
}

/// The prompt of each example of a batch with the response of another, of another prompt where the batch allows it:
/// what `kto` estimates its divergence from. Responses are cut so that none is longer with its new prompt than the
/// `longest` example (see [`longest`]).
pub fn mismatched<'a>(examples: &'a [TokenizedExample], batch: &[usize], longest: usize) -> Vec<Sequences<'a>> {
    let prompts: Vec<&[u32]> = batch.iter().map(|&example| &*examples[example].prompt).collect();
    let pairs = batch.iter().zip(derangement(&prompts));
    pairs
        .map(|(&example, partner)| {
            let own = examples[example].sequences();
            let other = &examples[batch[partner]].response;
            Sequences { responses: vec![&other[..other.len().min(longest - own.prompt.len())]], ..own }
        })
        .collect()
}

/// Tokens of the longest prompt with its response.
pub fn longest(examples: &[TokenizedExample]) -> usize {
    examples.iter().map(|example| example.prompt.len() + example.response.len()).max().unwrap_or(0)
}

impl Task for LabelledResponses<'_> {
    fn len(&self) -> usize {
        self.examples.len()
    }

    fn sequences(&self, example: usize) -> Sequences<'_> {
        self.examples[example].sequences()
    }

    fn parameters(&self) -> String {
        format!("{:?}", self.objective)
    }

    fn evaluate(&self, example: usize, responses: &[Scored], shift: f64) -> ExampleLoss {
        let labelled = self.labelled(example, &responses[0]);
        let result = self.objective.evaluate(&labelled, shift);
        let [reward, logp] = if labelled.desirable {
            ["rewards/chosen", "logps/chosen"]
        } else {
            ["rewards/rejected", "logps/rejected"]
        };
        let mut metrics = vec![(reward, result.reward), (logp, responses[0].logp)];
        match self.objective {
            Unpaired::Kto { .. } => metrics.push(("kl", shift)),
            Unpaired::Bco { .. } => metrics.push(("delta", shift)),
            _ => {}
        }
        ExampleLoss { loss: result.loss, derivatives: vec![result.derivative], metrics }
    }

    fn smallest_batch(&self) -> usize {
        self.objective.smallest_batch()
    }

    fn uses_mismatched(&self) -> bool {
        self.objective.uses_mismatched()
    }

    fn shift_from(&self, batch: &[usize]) -> ShiftFrom<'_> {
        match self.objective {
            Unpaired::Kto { .. } => {
                let items = mismatched(self.examples, batch, self.longest);
                ShiftFrom::Others(items.iter().map(|item| item.responses[0]).collect())
            }
            Unpaired::Bco { .. } => ShiftFrom::OwnResponses,
            _ => ShiftFrom::Nothing,
        }
    }

    fn shift(&self, step: u64, batch: &[usize], scored: &[Scored], running: &mut RunningMean) -> f64 {
        match self.objective {
            Unpaired::Kto { .. } => {
                let reference = &self.mismatched[step as usize];
                let log_ratios: Vec<f64> =
                    scored.iter().zip(reference).map(|(s, reference)| s.logp - reference).collect();
                Unpaired::kl_estimate(&log_ratios)
            }
            Unpaired::Bco { .. } => {
                let rewards = batch
                    .iter()
                    .zip(scored)
                    .map(|(&example, scored)| self.objective.evaluate(&self.labelled(example, scored), 0.0).reward);
                running.update(&rewards.collect::<Vec<_>>())
            }
            _ => 0.0,
        }
    }

    fn complete(&self, means: &mut BTreeMap<&'static str, f64>) {
        if let (Some(chosen), Some(rejected)) = (means.get("rewards/chosen"), means.get("rewards/rejected")) {
            means.insert("rewards/margins", chosen - rejected);
        }
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

    fn sequences(&self, example: usize) -> Sequences<'_> {
        let Demonstration { prompt, response } = &self.0[example];
        Sequences { prompt, responses: vec![response], row: example + 1 }
    }

    fn weight(&self, example: usize) -> f64 {
        self.0[example].response.len() as f64
    }

    fn parameters(&self) -> String {
        format!("{:?} per token", Unpaired::Sft)
    }

    fn evaluate(&self, example: usize, responses: &[Scored], _: f64) -> ExampleLoss {
        let len = self.0[example].response.len();
        let response = Response { policy: responses[0].logp, reference: 0.0, len, kl: 0.0 };
        let result = Unpaired::Sft.evaluate(&Labelled { response, desirable: true }, 0.0);
        ExampleLoss { loss: result.loss, derivatives: vec![result.derivative], metrics: Vec::new() }
    }
}
