//! The decoder over batches of a task: losses, metrics and gradients.

use std::collections::BTreeMap;

use engine::batch::packed_rows;
use engine::{Decoder, Head, Keep, Model, Parameters, Precision};

use super::{MemoryPlan, Policy};
use crate::objective::{Derivative, RunningMean};
use crate::sequences::{Packing, Sequences};
use crate::task::{Scored, ShiftFrom, Task};

/// Mean loss and metrics of some examples.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Means {
    pub(super) loss: f64,
    pub(super) metrics: BTreeMap<&'static str, f64>,
}

/// Runs the decoder over batches of a task.
pub(super) struct Passes {
    decoder: Decoder,
    keep: Keep,
    micro_batch_tokens: usize,
    /// Tokens of mismatched responses that a pass may have behind its examples, where they do not count as theirs.
    behind: Option<usize>,
    /// Whether the policy has a score head.
    for_scores: bool,
}

/// A batch of a task, with what its losses depend on beside the policy.
pub(super) struct Batch<'a> {
    pub(super) task: &'a dyn Task,
    /// The optimizer step, from 0.
    pub(super) step: u64,
    pub(super) examples: &'a [usize],
}

impl Batch<'_> {
    fn weight(&self) -> f64 {
        self.examples.iter().map(|&example| self.task.weight(example)).sum()
    }

    fn sequences(&self) -> Vec<Sequences<'_>> {
        self.examples.iter().map(|&example| self.task.sequences(example)).collect()
    }
}

impl Passes {
    /// For batches of tasks with sequences of at most `longest` tokens, which train `policy`.
    pub(super) fn new(policy: &Policy, dtype: Precision, longest: usize, plan: &MemoryPlan) -> Self {
        let decoder = Decoder::new(policy.base(), longest).with_precision(dtype);
        let adapted = matches!(policy, Policy::Adapted(..));
        Self {
            decoder: decoder.with_rows(plan.largest_pass, plan.behind),
            keep: plan.keep(),
            behind: (!Decoder::keeps_behind(adapted, plan.keep())).then_some(plan.behind),
            micro_batch_tokens: plan.micro_batch_tokens,
            for_scores: policy.base().config.head.is_score(),
        }
    }

    /// Adds the gradient of the batch's mean loss.
    ///
    /// Returns the means, the number of tokens computed, and the rows whose own loss is not finite.
    pub(super) fn gradient(
        &mut self,
        parameters: Parameters<'_>,
        batch: &Batch<'_>,
        running: &mut RunningMean,
        gradient: &mut [f32],
    ) -> (Means, usize, Vec<usize>) {
        let items = batch.sequences();
        let packing = self.packing(parameters);
        let parts = packing.micro_batches(&items, self.micro_batch_tokens);
        let from = batch.task.shift_from(batch.examples);
        let (mut tokens, mut shift, mut behind) = (0, None, Vec::new());
        // what is kept of a forward pass ends with the next one, so other passes come before it
        match from {
            ShiftFrom::OwnResponses if parts.len() == 1 => {}
            ShiftFrom::Others(others) if !packing.dropout && self.fit_together(packing, &items, &others) => {
                behind = others;
            }
            from => {
                let (value, computed) = self.shift(parameters, batch, &items, from, running);
                (tokens, shift) = (computed, Some(value));
            }
        }
        let total_weight = batch.weight();
        let reference = batch.task.divergence_from();
        let mut sums = Sums::default();
        for part in parts {
            let examples = &batch.examples[part.clone()];
            let packed = packing.pack(&items[part], examples);
            let rows = reference.map(|model| self.decoder.head_rows(&model.weights, &packed));
            let head = reference.zip(rows.as_deref()).map(|(model, rows)| head(model, rows));
            let mut whole = packed.clone();
            behind.iter().enumerate().for_each(|(prompt, response)| whole.push_response(prompt, response));
            tokens += whole.rows();
            let scored = match head {
                None => logps(self.decoder.forward(parameters, &whole, self.keep)),
                Some(head) => divergences(self.decoder.forward_with_divergence(parameters, head, &whole, self.keep)),
            };
            let (scored, others) = scored.split_at(packed.responses.len());
            let of_shift = if others.is_empty() { scored } else { others };
            let shift = *shift.get_or_insert_with(|| batch.task.shift(batch.step, batch.examples, of_shift, running));
            let (mut d_logps, mut d_kls) = (Vec::new(), Vec::new());
            sums.add(batch.task, examples, scored, shift, |derivative| {
                d_logps.push(derivative.logp / total_weight);
                d_kls.push(derivative.kl / total_weight);
            });
            match head {
                None => self.decoder.backward(parameters, &packed, &d_logps, gradient),
                Some(head) => {
                    let derivatives = [d_logps.as_slice(), &d_kls];
                    self.decoder.backward_with_divergence(parameters, head, &packed, derivatives, gradient);
                }
            }
        }
        let broken = std::mem::take(&mut sums.broken);
        (sums.means(batch.task, total_weight), tokens, broken)
    }

    /// Mean loss and metrics of a batch, and the rows whose own loss is not finite. It leaves no trace in the running mean.
    pub(super) fn means(
        &mut self,
        parameters: Parameters<'_>,
        batch: &Batch<'_>,
        running: RunningMean,
    ) -> (Means, Vec<usize>) {
        let items = batch.sequences();
        let from = batch.task.shift_from(batch.examples);
        let shift = match from {
            // a running mean is what training has seen
            ShiftFrom::OwnResponses => running.mean,
            from => self.shift(parameters, batch, &items, from, &mut running.clone()).0,
        };
        let (scored, _) = self.score(parameters, &items, batch.examples, batch.task.divergence_from());
        let mut sums = Sums::default();
        sums.add(batch.task, batch.examples, &scored, shift, |_| ());
        let broken = std::mem::take(&mut sums.broken);
        (sums.means(batch.task, batch.weight()), broken)
    }

    /// The shift of a batch whose own items are `own`, and the number of tokens computed for it.
    fn shift(
        &mut self,
        parameters: Parameters<'_>,
        batch: &Batch<'_>,
        own: &[Sequences<'_>],
        from: ShiftFrom<'_>,
        running: &mut RunningMean,
    ) -> (f64, usize) {
        let others: Vec<Sequences<'_>>;
        let (items, parameters) = match from {
            ShiftFrom::Nothing => return (0.0, 0),
            ShiftFrom::OwnResponses => (own, parameters),
            ShiftFrom::Others(responses) => {
                let pairs = own.iter().zip(responses);
                others = pairs.map(|(own, other)| Sequences { responses: vec![other], ..*own }).collect();
                (others.as_slice(), Parameters { dropout_seed: None, ..parameters })
            }
        };
        let (scored, tokens) = self.score(parameters, items, batch.examples, None);
        (batch.task.shift(batch.step, batch.examples, &scored, running), tokens)
    }

    /// Whether items, and further responses to their prompts, are one micro-batch.
    fn fit_together(&self, packing: Packing, items: &[Sequences<'_>], others: &[&[u32]]) -> bool {
        let lengths: Vec<usize> = others.iter().map(|other| other.len()).collect();
        let (own, others) = (packing.computed(items), packed_rows(0, &lengths, self.for_scores));
        match self.behind {
            Some(behind) => own <= self.micro_batch_tokens && others <= behind,
            None => own + others <= self.micro_batch_tokens,
        }
    }

    /// How a pass of these parameters computes items.
    fn packing(&self, parameters: Parameters<'_>) -> Packing {
        Packing { for_scores: self.for_scores, dropout: parameters.has_dropout() }
    }

    /// What the policy says of every response, with the divergence from `reference` if there is one, and the number of tokens
    /// computed. `keys` tell the items apart for dropout.
    fn score(
        &mut self,
        parameters: Parameters<'_>,
        items: &[Sequences<'_>],
        keys: &[usize],
        reference: Option<&Model>,
    ) -> (Vec<Scored>, usize) {
        let (mut all, mut tokens) = (Vec::new(), 0);
        let packing = self.packing(parameters);
        for part in packing.micro_batches(items, self.micro_batch_tokens) {
            let packed = packing.pack(&items[part.clone()], &keys[part]);
            tokens += packed.rows();
            all.extend(match reference {
                None => logps(self.decoder.logps(parameters, &packed)),
                Some(model) => {
                    let rows = self.decoder.head_rows(&model.weights, &packed);
                    let head = head(model, &rows);
                    divergences(self.decoder.forward_with_divergence(parameters, head, &packed, Keep::Inputs))
                }
            });
        }
        (all, tokens)
    }
}

/// What a policy is compared with: a model's vocabulary head, and its last hidden rows.
fn head<'a>(model: &'a Model, rows: &'a [f32]) -> Head<'a> {
    Head { rows, weights: &model.weights[model.layout.head.clone()] }
}

fn logps(logps: Vec<f64>) -> Vec<Scored> {
    logps.into_iter().map(|logp| Scored { logp, kl: 0.0 }).collect()
}

fn divergences((logps, kls): (Vec<f64>, Vec<f64>)) -> Vec<Scored> {
    logps.into_iter().zip(kls).map(|(logp, kl)| Scored { logp, kl }).collect()
}

/// Running sums over the examples of a batch.
#[derive(Default)]
struct Sums {
    loss: f64,
    /// Sum and number of examples.
    metrics: BTreeMap<&'static str, (f64, usize)>,
    /// Rows whose loss is not finite.
    broken: Vec<usize>,
}

impl Sums {
    /// Adds examples whose responses are scored in order; hands on each derivative.
    fn add(
        &mut self,
        task: &dyn Task,
        examples: &[usize],
        scored: &[Scored],
        shift: f64,
        mut derivative: impl FnMut(&Derivative),
    ) {
        let mut rest = scored;
        for &example in examples {
            let sequences = task.sequences(example);
            let (own, others) = rest.split_at(sequences.responses.len());
            rest = others;
            let result = task.evaluate(example, own, shift);
            if !result.loss.is_finite() {
                self.broken.push(sequences.row);
            }
            self.loss += result.loss;
            result.derivatives.iter().for_each(&mut derivative);
            for (name, value) in result.metrics {
                let (sum, examples) = self.metrics.entry(name).or_default();
                *sum += value;
                *examples += 1;
            }
        }
    }

    fn means(self, task: &dyn Task, weight: f64) -> Means {
        let metrics = self.metrics.into_iter().map(|(name, (sum, examples))| (name, sum / examples as f64));
        let mut metrics = metrics.collect();
        task.complete(&mut metrics);
        Means { loss: self.loss / weight, metrics }
    }
}
