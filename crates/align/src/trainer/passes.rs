//! The decoder over batches of a task: losses, metrics and gradients.

use std::collections::BTreeMap;

use engine::{Decoder, Keep, Model};

use super::TrainOptions;
use crate::objective::RunningMean;
use crate::sequences::{Sequences, micro_batches, pack};
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
    pub(super) keep: Keep,
    micro_batch_tokens: usize,
}

impl Passes {
    /// For batches of any of the tasks, which train `policy`.
    pub(super) fn new(policy: &Model, tasks: &[&dyn Task], options: &TrainOptions) -> Self {
        let (mut longest, mut largest) = (0, 0);
        for task in tasks {
            for example in 0..task.len() {
                let sequences = task.sequences(example);
                longest = longest.max(sequences.longest());
                largest = largest.max(sequences.computed());
            }
        }
        let decoder = Decoder::new(policy, longest);
        // weights, gradient and two moments stay whatever the batch
        let fixed = 4 * size_of::<f32>() * policy.layout.len;
        let memory = options.memory_bytes.or_else(|| engine::memory::available().map(|bytes| bytes / 5 * 4));
        let for_activations = memory.map_or(usize::MAX, |bytes| bytes.saturating_sub(fixed));
        let rows = options.micro_batch_tokens.max(largest);
        let keep = if decoder.activation_bytes(rows, Keep::All) <= for_activations { Keep::All } else { Keep::Inputs };
        Self { decoder, keep, micro_batch_tokens: options.micro_batch_tokens }
    }

    /// Adds the gradient of the batch's mean loss.
    ///
    /// Returns the means, the number of tokens computed, and the rows whose own loss is not finite.
    pub(super) fn gradient(
        &mut self,
        weights: &[f32],
        task: &dyn Task,
        (step, batch): (u64, &[usize]),
        running: &mut RunningMean,
        gradient: &mut [f32],
    ) -> (Means, usize, Vec<usize>) {
        let items: Vec<Sequences<'_>> = batch.iter().map(|&example| task.sequences(example)).collect();
        let parts = micro_batches(&items, self.micro_batch_tokens);
        let total_weight: f64 = batch.iter().map(|&example| task.weight(example)).sum();
        let mut sums = Sums::default();
        let mut tokens = items.iter().map(Sequences::computed).sum();
        let mut shift = None;
        for part in &parts {
            let packed = pack(&items[part.clone()]);
            // what is kept of a forward pass ends with the next one, so other passes come before it
            if shift.is_none() && (parts.len() > 1 || !matches!(task.shift_from(batch), ShiftFrom::OwnResponses)) {
                let (value, computed) = self.shift(weights, task, (step, batch), &items, running);
                tokens += computed;
                shift = Some(value);
            }
            let scored = scored(self.decoder.forward(weights, &packed, self.keep));
            let shift = *shift.get_or_insert_with(|| task.shift(step, batch, &scored, running));
            let mut d_logps = Vec::with_capacity(scored.len());
            sums.add(task, &batch[part.clone()], &scored, shift, |d| d_logps.push(d / total_weight));
            self.decoder.backward(weights, &packed, &d_logps, gradient);
        }
        let broken = std::mem::take(&mut sums.broken);
        (sums.means(task, total_weight), tokens, broken)
    }

    /// Mean loss and metrics of examples, as one batch of `step`; they leave no trace in `running`.
    pub(super) fn means(
        &mut self,
        weights: &[f32],
        task: &dyn Task,
        (step, batch): (u64, &[usize]),
        running: RunningMean,
    ) -> Means {
        let items: Vec<Sequences<'_>> = batch.iter().map(|&example| task.sequences(example)).collect();
        let shift = match task.shift_from(batch) {
            // a running mean is what training has seen
            ShiftFrom::OwnResponses => running.mean,
            _ => self.shift(weights, task, (step, batch), &items, &mut running.clone()).0,
        };
        let scored = self.score(weights, &items);
        let mut sums = Sums::default();
        sums.add(task, batch, &scored, shift, |_| ());
        sums.means(task, batch.iter().map(|&example| task.weight(example)).sum())
    }

    /// The shift of a batch, and the number of tokens computed for it.
    fn shift(
        &mut self,
        weights: &[f32],
        task: &dyn Task,
        (step, batch): (u64, &[usize]),
        own: &[Sequences<'_>],
        running: &mut RunningMean,
    ) -> (f64, usize) {
        let others;
        let items = match task.shift_from(batch) {
            ShiftFrom::Nothing => return (0.0, 0),
            ShiftFrom::OwnResponses => own,
            ShiftFrom::Others(items) => {
                others = items;
                &others
            }
        };
        let scored = self.score(weights, items);
        (task.shift(step, batch, &scored, running), items.iter().map(Sequences::computed).sum())
    }

    fn score(&mut self, weights: &[f32], items: &[Sequences<'_>]) -> Vec<Scored> {
        let parts = micro_batches(items, self.micro_batch_tokens);
        let parts = parts.into_iter().flat_map(|part| scored(self.decoder.logps(weights, &pack(&items[part]))));
        parts.collect()
    }
}

fn scored(logps: Vec<f64>) -> Vec<Scored> {
    logps.into_iter().map(|logp| Scored { logp, kl: 0.0 }).collect()
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
        mut derivative: impl FnMut(f64),
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
            result.derivatives.iter().for_each(|d| derivative(d.logp));
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
