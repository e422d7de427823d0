//! The training loop, one for all tasks.
//!
//! One optimizer step: choose the batch, cut it into micro-batches that fit the memory, and for each run
//! decoder forward → log-probabilities → task → derivative per response → decoder backward. The loss and the
//! gradient are those of the whole batch however it is cut.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::time::Instant;

use engine::batch::packed_rows;
use engine::optim::{Optimizer, OptimizerKind, OptimizerOptions, Schedule, global_norm};
use engine::{Decoder, Error, Keep, Model, PackedBatch, Result};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::log::MetricsLog;
use crate::state::TrainingState;
use crate::task::Task;

/// How to train.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainOptions {
    /// Peak learning rate.
    pub learning_rate: f64,
    /// How the learning rate falls after warm-up.
    pub schedule: Schedule,
    /// Share of all steps over which the learning rate rises from 0, in [0, 1].
    pub warmup_ratio: f64,
    /// Passes over the data.
    pub epochs: usize,
    /// Examples per optimizer step.
    pub batch_size: usize,
    /// Tokens per forward pass; changes memory and speed, not the result.
    pub micro_batch_tokens: usize,
    /// Bytes that training may use in all; decides whether blocks are recomputed. None: 80 % of what is available.
    pub memory_bytes: Option<usize>,
    /// Gradients are scaled down to this global norm.
    pub max_grad_norm: f64,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f64,
    /// Decides the order of the examples.
    pub seed: u64,
    /// Steps between saved training states; 0 saves only when interrupted.
    pub save_every: u64,
}

impl TrainOptions {
    /// The options that decide the result of a training, as text. How the work is cut and when it is saved does not.
    pub fn course(&self) -> String {
        format!("{:?}", Self { micro_batch_tokens: 0, memory_bytes: None, save_every: 0, ..self.clone() })
    }
}

/// One line of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepRecord {
    /// Optimizer steps taken, from 1.
    pub step: u64,
    /// Passes over the data so far, with fraction.
    pub epoch: f64,
    /// Mean loss of the batch before the step.
    pub loss: f64,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Tokens computed, shared prompts counted once.
    pub tokens: usize,
    /// Wall-clock seconds of the step.
    pub seconds: f64,
    /// The task's metrics, averaged over the batch, under TRL's names.
    #[serde(flatten)]
    pub metrics: BTreeMap<&'static str, f64>,
}

/// Who watches the training and may end it.
pub trait Monitor {
    /// Called as pairs are scored under the reference, before the first optimizer step.
    fn scored(&mut self, _done: usize, _total: usize) {}
    /// Called after each optimizer step.
    fn step(&mut self, total: u64, record: &StepRecord);
    /// Whether the user asked to stop; asked after each optimizer step.
    fn stop_requested(&self) -> bool;
}

/// Mean loss and metrics of some examples.
#[derive(Debug, Clone, Default, PartialEq)]
struct Means {
    loss: f64,
    metrics: BTreeMap<&'static str, f64>,
}

/// Trains `policy` on a task, in place. Returns the records of the steps that this call took.
///
/// `folder` receives `metrics.jsonl` and, when the training is interrupted or `save_every` says so, its state.
/// A state found there continues bit-exactly, if it is of the same training (same start, data and options).
///
/// # Errors
/// No examples ([`Error::Input`]); a loss or gradient that is not finite ([`Error::Failed`], which names the rows);
/// a file that cannot be written; [`Error::Interrupted`] after the state was saved because the monitor asked to stop.
pub fn train(
    policy: &mut Model,
    task: &dyn Task,
    options: &TrainOptions,
    folder: &Path,
    monitor: &mut dyn Monitor,
) -> Result<Vec<StepRecord>> {
    if task.is_empty() {
        return Err(Error::input("There is nothing to train on: the data holds no usable example."));
    }
    let identity = identity(policy, task, options);
    let kind = OptimizerKind::AdamW;
    let constants = OptimizerOptions { weight_decay: options.weight_decay, ..kind.defaults() };
    let mut optimizer = Optimizer::new(kind, constants, &policy.layout.specs);
    TrainingState::load(folder, &identity, policy, &mut optimizer)?;
    let mut log = MetricsLog::open(&folder.join("metrics.jsonl"), optimizer.steps)?;
    let mut gradient = vec![0.0; policy.layout.len];
    let mut passes = Passes::new(policy, task, options);

    let steps_per_epoch = task.len().div_ceil(options.batch_size) as u64;
    let total = steps_per_epoch * options.epochs as u64;
    // the first step of a warm-up has rate 0, so a training of one step must not be all warm-up
    let warmup = ((options.warmup_ratio * total as f64).ceil() as u64).min(total - 1);
    let mut records = Vec::new();
    while optimizer.steps < total {
        let start = Instant::now();
        let (epoch, in_epoch) = (optimizer.steps / steps_per_epoch, optimizer.steps % steps_per_epoch);
        let order = epoch_order(task.len(), options.seed, epoch);
        let first = in_epoch as usize * options.batch_size;
        let batch = &order[first..(first + options.batch_size).min(order.len())];
        let (means, tokens) = passes.gradient(&policy.weights, task, batch, &mut gradient);
        let grad_norm = global_norm(&gradient);
        if !(means.loss.is_finite() && grad_norm.is_finite()) {
            let what = format!("the loss is {} and the norm of the gradient is {grad_norm}", means.loss);
            return Err(diverged(task, batch, optimizer.steps + 1, &what));
        }
        let learning_rate = options.learning_rate * options.schedule.factor(optimizer.steps, warmup, total);
        let scale = (options.max_grad_norm / grad_norm).min(1.0);
        optimizer.step(&mut policy.weights, &mut gradient, learning_rate, scale);
        let record = StepRecord {
            step: optimizer.steps,
            epoch: optimizer.steps as f64 / steps_per_epoch as f64,
            loss: means.loss,
            grad_norm,
            learning_rate,
            tokens,
            seconds: start.elapsed().as_secs_f64(),
            metrics: means.metrics,
        };
        log.append(&record)?;
        monitor.step(total, &record);
        records.push(record);
        let last = optimizer.steps == total;
        let stop = monitor.stop_requested() && !last;
        let due = options.save_every > 0 && optimizer.steps.is_multiple_of(options.save_every) && !last;
        // what is saved here must not hold an overflow that only the next loss would show
        if (stop || due || last) && !policy.weights.iter().all(|w| w.is_finite()) {
            return Err(diverged(task, batch, optimizer.steps, "weights became infinite"));
        }
        if stop || due {
            TrainingState::save(folder, &identity, policy, &mut optimizer)?;
        }
        if stop {
            return Err(Error::Interrupted(format!(
                "Stopped after step {} of {total}, as you asked. The state is saved in {}: run the same command \
                 again to continue from there.",
                optimizer.steps,
                folder.display()
            )));
        }
    }
    Ok(records)
}

/// Removes the state of a training that is complete and saved elsewhere.
///
/// # Errors
/// If the file exists and cannot be removed.
pub fn discard_state(folder: &Path) -> Result<()> {
    TrainingState::discard(folder)
}

/// The order in which an epoch visits the examples; depends on seed and epoch alone.
fn epoch_order(examples: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(epoch);
    let mut order: Vec<usize> = (0..examples).collect();
    order.shuffle(&mut rng);
    order
}

/// A hash of all that decides the course of a training.
fn identity(policy: &Model, task: &dyn Task, options: &TrainOptions) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(format!("{} {}", policy.hash(), options.course()).as_bytes());
    for example in 0..task.len() {
        let responses = task.responses(example);
        // the loss at zero stands for the objective's parameters and the reference
        let loss = task.evaluate(example, &vec![0.0; responses.len()]).loss;
        hasher.update(format!("{:?} {responses:?} {loss:?}", task.prompt(example)).as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

fn diverged(task: &dyn Task, batch: &[usize], step: u64, what: &str) -> Error {
    let rows: Vec<String> = batch.iter().map(|&i| task.row(i).to_string()).collect();
    Error::Failed(format!(
        "Training stopped at step {step}: {what}. The batch holds the rows {}. What was saved before is untouched. \
         Lower the learning rate, or look at those rows.",
        rows.join(", ")
    ))
}

/// Runs the decoder over batches of a task.
struct Passes {
    decoder: Decoder,
    keep: Keep,
    micro_batch_tokens: usize,
}

impl Passes {
    fn new(policy: &Model, task: &dyn Task, options: &TrainOptions) -> Self {
        let (mut longest, mut largest) = (0, 0);
        for example in 0..task.len() {
            let (prompt, responses) = lengths(task, example);
            longest = longest.max(prompt + responses.iter().max().unwrap_or(&0));
            largest = largest.max(packed_rows(prompt, &responses));
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

    /// Adds the gradient of the batch's mean loss; returns the means and the number of tokens computed.
    fn gradient(&mut self, weights: &[f32], task: &dyn Task, batch: &[usize], gradient: &mut [f32]) -> (Means, usize) {
        let total_weight: f64 = batch.iter().map(|&i| task.weight(i)).sum();
        let mut sums = Sums::default();
        let mut tokens = 0;
        for part in micro_batches(task, batch, self.micro_batch_tokens) {
            let part = &batch[part];
            let packed = pack(task, part);
            let logps = self.decoder.forward(weights, &packed, self.keep);
            let mut d_logps = Vec::with_capacity(logps.len());
            sums.add(task, part, &logps, |d| d_logps.push(d / total_weight));
            self.decoder.backward(weights, &packed, &d_logps, gradient);
            tokens += packed.rows();
        }
        (sums.means(batch.len(), total_weight), tokens)
    }

    #[cfg(test)]
    fn means(&mut self, weights: &[f32], task: &dyn Task, batch: &[usize]) -> Means {
        let mut sums = Sums::default();
        for part in micro_batches(task, batch, self.micro_batch_tokens) {
            let part = &batch[part];
            let logps = self.decoder.logps(weights, &pack(task, part));
            sums.add(task, part, &logps, |_| ());
        }
        sums.means(batch.len(), batch.iter().map(|&i| task.weight(i)).sum())
    }
}

/// Running sums over the examples of a batch.
#[derive(Default)]
struct Sums {
    loss: f64,
    metrics: BTreeMap<&'static str, f64>,
}

impl Sums {
    /// Adds examples whose responses have the given log-probabilities, in order; hands on each derivative.
    fn add(&mut self, task: &dyn Task, examples: &[usize], logps: &[f64], mut derivative: impl FnMut(f64)) {
        let mut rest = logps;
        for &example in examples {
            let (own, others) = rest.split_at(task.responses(example).len());
            rest = others;
            let result = task.evaluate(example, own);
            self.loss += result.loss;
            result.d_logps.into_iter().for_each(&mut derivative);
            for (name, value) in result.metrics {
                *self.metrics.entry(name).or_default() += value;
            }
        }
    }

    fn means(self, examples: usize, weight: f64) -> Means {
        let metrics = self.metrics.into_iter().map(|(name, sum)| (name, sum / examples as f64)).collect();
        Means { loss: self.loss / weight, metrics }
    }
}

fn lengths(task: &dyn Task, example: usize) -> (usize, Vec<usize>) {
    (task.prompt(example).len(), task.responses(example).iter().map(|r| r.len()).collect())
}

/// Cuts a batch into runs of examples of at most `tokens` rows each (at least one example).
pub(crate) fn micro_batches(task: &dyn Task, batch: &[usize], tokens: usize) -> Vec<Range<usize>> {
    let mut parts: Vec<Range<usize>> = Vec::new();
    let mut used = 0;
    for (at, &example) in batch.iter().enumerate() {
        let (prompt, responses) = lengths(task, example);
        let rows = packed_rows(prompt, &responses);
        match parts.last_mut() {
            Some(part) if used + rows <= tokens => part.end = at + 1,
            _ => {
                parts.push(at..at + 1);
                used = 0;
            }
        }
        used += rows;
    }
    parts
}

/// The examples as one packed batch.
pub(crate) fn pack(task: &dyn Task, examples: &[usize]) -> PackedBatch {
    let mut packed = PackedBatch::default();
    for &example in examples {
        packed.push(task.prompt(example), &task.responses(example));
    }
    packed
}

#[cfg(test)]
mod tests;
