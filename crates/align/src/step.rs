//! One step of the chain, and how a policy ranks held-out data.
//!
//! SACPO (arXiv 2404.11049): step 1 aligns the base model at temperature β; step k aligns the policy of step k − 1 at
//! temperature β/λ, with that policy as its start *and* its reference. Theorem 1 makes the last policy the constrained
//! optimum, π* ∝ π_r · exp((λ/β)·g).

use std::path::Path;

use engine::{Adapter, Error, Mixture, Model, ModelConfig, Result};
use serde::Serialize;

use crate::data::{Dataset, TokenizedExample, TokenizedPair};
use crate::objective::{Objective, Pairwise, Unpaired};
use crate::reference;
use crate::sequences::Sequences;
use crate::task::{LabelledResponses, Preferences, Task, longest, mismatched};
use crate::trainer::memory::{Footprint, Lengths, resident_besides};
use crate::trainer::{MemoryPlan, Monitor, Policy, StepRecord, TrainOptions, train};

/// Aligns a policy on preference data, with its start as the reference, so that the first margin is exactly 0.
#[derive(Debug, Clone)]
pub struct Alignment<'a> {
    /// Where training starts, and the reference. It becomes the policy: a large model is not held twice.
    pub start: Model,
    /// What to train on.
    pub data: &'a Dataset,
    /// What is held out, of the same kind.
    pub validation: &'a Dataset,
    /// The loss.
    pub objective: &'a Objective,
    /// How to train.
    pub options: &'a TrainOptions,
    /// Receives metrics and state (see [`train`]).
    pub folder: &'a Path,
    /// Keeps the reference's log-probabilities.
    pub cache: &'a Path,
}

/// What a step has made.
#[derive(Debug, Clone)]
pub struct Aligned {
    /// The policy; an adapter is folded into it.
    pub policy: Model,
    /// The adapter that was trained, if one was: it makes the policy of the start.
    pub adapter: Option<Adapter>,
    /// The optimizer steps that this call took.
    pub records: Vec<StepRecord>,
}

impl Alignment<'_> {
    /// Trains the policy.
    ///
    /// # Errors
    /// Data of another kind than the objective takes ([`Error::Input`]); those of [`reference::logps`] and [`train`].
    pub fn run(self, monitor: &mut dyn Monitor) -> Result<Aligned> {
        match (self.objective, self.data, self.validation) {
            (Objective::Pairwise(objective), Dataset::Pairs(pairs), Dataset::Pairs(held_out)) => {
                self.on_pairs(objective, pairs, held_out, monitor)
            }
            (Objective::Unpaired(objective), Dataset::Examples(examples), Dataset::Examples(held_out)) => {
                self.on_examples(objective, examples, held_out, monitor)
            }
            (objective, data, _) => {
                Err(Error::input(format!("The objective `{}` does not take {}.", objective.name(), data.unit())))
            }
        }
    }

    fn on_pairs(
        self,
        objective: &Pairwise,
        pairs: &[TokenizedPair],
        held_out: &[TokenizedPair],
        monitor: &mut dyn Monitor,
    ) -> Result<Aligned> {
        let mut reference = |pairs: &[TokenizedPair]| {
            let sequences: Vec<_> = pairs.iter().map(TokenizedPair::sequences).collect();
            Ok(self.reference(&sequences, monitor)?.as_chunks::<2>().0.to_vec())
        };
        let held_out = self.validated(held_out);
        let (train, held_out_reference) = (reference(pairs)?, reference(held_out)?);
        // the log-probabilities are known, so that most objectives no longer need the reference itself
        let reference = objective.uses_divergence().then(|| self.start.clone());
        let held_out = Preferences::new(held_out, &held_out_reference, reference.as_ref(), objective);
        self.train(&Preferences::new(pairs, &train, reference.as_ref(), objective), &held_out, monitor)
    }

    fn on_examples(
        self,
        objective: &Unpaired,
        examples: &[TokenizedExample],
        held_out: &[TokenizedExample],
        monitor: &mut dyn Monitor,
    ) -> Result<Aligned> {
        let mut reference = |examples: &[TokenizedExample]| {
            let sequences: Vec<_> = examples.iter().map(TokenizedExample::sequences).collect();
            self.reference(&sequences, monitor)
        };
        let held_out = self.validated(held_out);
        let (train, held_out_reference) = (reference(examples)?, reference(held_out)?);
        let plan = self.options.plan(examples.len(), objective.smallest_batch());
        let mismatched = self.mismatched(objective, examples, &plan.batches, monitor)?;
        let whole = [(0..held_out.len()).collect()];
        let held_out_mismatched = self.mismatched(objective, held_out, &whole, monitor)?;
        let held_out = LabelledResponses::new(held_out, &held_out_reference, objective, &held_out_mismatched);
        self.train(&LabelledResponses::new(examples, &train, objective, &mismatched), &held_out, monitor)
    }

    /// The reference's log-probabilities of the mismatched prompts and responses of every batch, if the objective asks
    /// for them.
    fn mismatched(
        &self,
        objective: &Unpaired,
        examples: &[TokenizedExample],
        batches: &[Vec<usize>],
        monitor: &mut dyn Monitor,
    ) -> Result<Vec<Vec<f64>>> {
        if !objective.uses_mismatched() || batches.iter().any(|batch| batch.len() < objective.smallest_batch()) {
            return Ok(Vec::new());
        }
        let longest = longest(examples);
        let sequences: Vec<_> = batches.iter().flat_map(|batch| mismatched(examples, batch, longest)).collect();
        let logps = self.reference(&sequences, monitor)?;
        let mut rest = logps.as_slice();
        let of_batch = batches.iter().map(|batch| {
            let (own, others) = rest.split_at(batch.len());
            rest = others;
            own.to_vec()
        });
        Ok(of_batch.collect())
    }

    /// The held-out rows that training looks at: none without validation.
    fn validated<'t, T>(&self, held_out: &'t [T]) -> &'t [T] {
        if self.options.validate_every > 0 { held_out } else { &[] }
    }

    /// The log-probability of every response under the start; zeros where the objective does not read it.
    fn reference(&self, sequences: &[Sequences<'_>], monitor: &mut dyn Monitor) -> Result<Vec<f64>> {
        if !self.objective.uses_reference() {
            return Ok(vec![0.0; sequences.iter().map(|item| item.responses.len()).sum()]);
        }
        let total = sequences.len();
        let mut scored = |done| {
            monitor.scored(done, total);
            if !monitor.stop_requested() {
                return Ok(());
            }
            Err(Error::Interrupted(format!(
                "Stopped after {done} of {total} prompts were scored under the reference, as you asked. Run the same \
                 command again to continue."
            )))
        };
        let start = Mixture::from(&self.start).with_precision(self.options.dtype);
        reference::logps(start, sequences, self.options.micro_batch_tokens, Some(self.cache), &mut scored)
    }

    fn train(self, task: &dyn Task, held_out: &dyn Task, monitor: &mut dyn Monitor) -> Result<Aligned> {
        trained_from(self.start, task, held_out, self.options, self.folder, monitor)
    }
}

/// How the passes of an [`Alignment`] of a model of this shape would be cut, and what memory the process would then take,
/// if it holds no model now.
///
/// # Errors
/// [`Error::Input`] if it does not fit.
pub fn plan_memory(
    config: &ModelConfig,
    objective: &Objective,
    [data, validation]: [&Dataset; 2],
    options: &TrainOptions,
) -> Result<MemoryPlan> {
    let validation = if options.validate_every > 0 { validation.sequences() } else { Vec::new() };
    let (keeps_reference, least, mismatched) = match objective {
        Objective::Pairwise(objective) => (objective.uses_divergence(), 1, false),
        Objective::Unpaired(objective) => (false, objective.smallest_batch(), objective.uses_mismatched()),
    };
    let lengths = Lengths::new(config, options, &data.sequences(), &validation, least, mismatched);
    Footprint { config, options, keeps_reference, lengths }.plan(resident_besides(0))
}

/// Trains all weights of a model, or an adapter of it, as the options say.
pub(crate) fn trained_from(
    start: Model,
    task: &dyn Task,
    held_out: &dyn Task,
    options: &TrainOptions,
    folder: &Path,
    monitor: &mut dyn Monitor,
) -> Result<Aligned> {
    let mut policy = match &options.lora {
        Some(lora) => {
            let adapter = Adapter::new(&start, lora.clone(), options.seed)?;
            Policy::Adapted(start, adapter)
        }
        None => Policy::Whole(start),
    };
    let records = train(&mut policy, task, Some(held_out), options, folder, monitor)?;
    let (policy, adapter) = policy.into_model();
    Ok(Aligned { policy, adapter, records })
}

/// How a policy ranks held-out responses.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PreferenceReport {
    /// Number of pairs; of labelled responses, every desirable one makes a pair with every undesirable one.
    pub pairs: usize,
    /// Share of pairs whose implicit reward log π − log π_base prefers the chosen response; ties count half.
    pub accuracy: f64,
    /// Mean difference of the implicit rewards of chosen and rejected, in nats.
    pub margin: f64,
    /// Share of pairs whose chosen response is likelier than the rejected one; ties count half.
    pub likelihood_accuracy: f64,
}

/// Ranks held-out data by a policy's log-probabilities of all responses, in order, and a base model's.
///
/// # Panics
/// If there is not one log-probability for each response.
pub fn rank(data: &Dataset, policy: &[f64], base: &[f64]) -> PreferenceReport {
    let rewards: Vec<f64> = policy.iter().zip(base).map(|(policy, base)| policy - base).collect();
    match data {
        Dataset::Pairs(pairs) => {
            assert!(policy.len() == 2 * pairs.len() && base.len() == policy.len(), "two log-probabilities a pair");
            let n = pairs.len() as f64;
            let accuracy = |values: &[f64]| {
                values.as_chunks::<2>().0.iter().map(|&[chosen, rejected]| wins(chosen, rejected)).sum::<f64>() / n
            };
            PreferenceReport {
                pairs: pairs.len(),
                accuracy: accuracy(&rewards),
                margin: rewards.as_chunks::<2>().0.iter().map(|[chosen, rejected]| chosen - rejected).sum::<f64>() / n,
                likelihood_accuracy: accuracy(policy),
            }
        }
        Dataset::Examples(examples) => {
            assert!(policy.len() == examples.len() && base.len() == policy.len(), "one log-probability an example");
            let divide = |values: &[f64]| -> [Vec<f64>; 2] {
                [true, false].map(|desirable| {
                    let of_class = examples.iter().zip(values).filter(|(example, _)| example.desirable == desirable);
                    of_class.map(|(_, value)| *value).collect()
                })
            };
            let [chosen, rejected] = divide(&rewards);
            let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
            PreferenceReport {
                pairs: chosen.len() * rejected.len(),
                accuracy: mean_wins(chosen.clone(), rejected.clone()),
                margin: mean(&chosen) - mean(&rejected),
                likelihood_accuracy: {
                    let [chosen, rejected] = divide(policy);
                    mean_wins(chosen, rejected)
                },
            }
        }
    }
}

/// 1 if the first is greater, 0 if it is less, ½ if they are equal.
fn wins(chosen: f64, rejected: f64) -> f64 {
    if chosen == rejected { 0.5 } else { f64::from(u8::from(chosen > rejected)) }
}

/// The mean of [`wins`] over all pairs of one of the first and one of the second list.
fn mean_wins(chosen: Vec<f64>, mut rejected: Vec<f64>) -> f64 {
    rejected.sort_unstable_by(f64::total_cmp);
    let below = |value: f64| rejected.partition_point(|&other| other < value) as f64;
    let up_to = |value: f64| rejected.partition_point(|&other| other <= value) as f64;
    let won: f64 = chosen.iter().map(|&value| 0.5 * (below(value) + up_to(value))).sum();
    won / (chosen.len() * rejected.len()) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_count_half_and_margins_are_relative_to_the_base() {
        let pair = TokenizedPair {
            prompt: [1].into(),
            chosen: [1].into(),
            rejected: [2].into(),
            is_unsafe: None,
            margin: None,
            row: 1,
        };
        let data = Dataset::Pairs(vec![pair; 3]);
        let base = [-3.0, -2.0, -5.0, -5.0, -1.0, -4.0];
        let same = rank(&data, &base, &base);
        assert_eq!((same.accuracy, same.margin, same.likelihood_accuracy), (0.5, 0.0, 0.5));
        let policy = [-2.0, -2.5, -5.0, -5.0, -2.0, -4.0];
        let report = rank(&data, &policy, &base);
        assert_eq!(report.accuracy, 0.5);
        assert!((report.margin - (1.5 + 0.0 - 1.0) / 3.0).abs() < 1e-12);
        assert_eq!(report.likelihood_accuracy, 2.5 / 3.0);
    }

    #[test]
    fn labelled_responses_are_ranked_by_all_pairs_of_both_classes() {
        let example = |desirable| TokenizedExample { prompt: [1].into(), response: [2].into(), desirable, row: 1 };
        let data = Dataset::Examples([true, false, true, false, false].map(example).to_vec());
        let policy = [-1.0, -2.0, -3.0, -3.0, -9.0];
        let base = [-2.0, -2.0, -3.0, -4.0, -9.0];
        let report = rank(&data, &policy, &base);
        // rewards 1 and 0 against 0, 1 and 0; log-probabilities −1 and −3 against −2, −3 and −9
        assert_eq!(report.pairs, 6);
        assert!((report.accuracy - (2.5 + 1.0) / 6.0).abs() < 1e-12);
        assert!((report.margin - (0.5 - 1.0 / 3.0)).abs() < 1e-12);
        assert!((report.likelihood_accuracy - (3.0 + 1.5) / 6.0).abs() < 1e-12);
    }
}
