//! The training loop, one for all tasks.
//!
//! One optimizer step: choose the batch, cut it into micro-batches that fit the memory, and for each run
//! decoder forward → log-probabilities → task → derivative per response → decoder backward. The loss and the
//! gradient are those of the whole batch however it is cut.

pub(crate) mod batches;
mod identity;
pub(crate) mod memory;
mod passes;
mod policy;
pub(crate) mod progress;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use engine::optim::{Optimizer, OptimizerKind, OptimizerOptions, Schedule, global_norm};
use engine::{Error, LoraOptions, ModelConfig, Precision, Result};
use identity::identity;
use memory::{Footprint, Lengths};
use passes::{Batch, Means, Passes};
use progress::Progress;
use serde::Serialize;

pub use batches::BatchPlan;
pub use memory::MemoryPlan;
pub use policy::Policy;

use crate::log::MetricsLog;
use crate::state::{self, TrainingState};
use crate::task::Task;

/// How to train.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainOptions {
    /// What to train instead of all weights, if anything.
    pub lora: Option<LoraOptions>,
    /// In what precision matrix products are computed; weights, their gradients and optimizer states are f32 in any.
    pub dtype: Precision,
    /// The optimizer, with its customary constants.
    pub optimizer: OptimizerKind,
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
    /// Tokens per forward pass; changes memory and speed, and the result by rounding at most. None: as many as fit, see [`MemoryPlan`].
    pub micro_batch_tokens: Option<usize>,
    /// Bytes that the process may hold while it trains. None: what it holds, and 90 % of what is available.
    pub memory_bytes: Option<usize>,
    /// Gradients are scaled down to this global norm.
    pub max_grad_norm: f64,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f64,
    /// Decides the order of the examples.
    pub seed: u64,
    /// Steps between saved training states; 0 saves only when interrupted.
    pub save_every: u64,
    /// Steps between validations, where there are examples for it; 0 for none. The last step is then validated too.
    pub validate_every: u64,
    /// Ends the training after this many validations in a row without a lower loss, and goes back to the weights of
    /// the lowest.
    pub patience: Option<u64>,
    /// Validates and returns an exponential moving average of the weights with this decay per step, in (0, 1).
    pub ema_decay: Option<f64>,
}

impl TrainOptions {
    /// The options that decide the result of a training, as text. How the work is cut and when it is saved does not.
    pub fn course(&self) -> String {
        format!("{:?}", Self { micro_batch_tokens: None, memory_bytes: None, save_every: 0, ..self.clone() })
    }

    /// The batches of a training on this many examples, none with fewer than `least`.
    pub fn plan(&self, examples: usize, least: usize) -> BatchPlan {
        BatchPlan::new(examples, self.batch_size, least, self.epochs, self.seed)
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
    /// Loss and metrics of the validation examples after the step, their names prefixed `eval_`; empty without.
    #[serde(flatten)]
    pub validation: BTreeMap<String, f64>,
}

/// Who watches the training and may end it.
pub trait Monitor {
    /// Called before the first optimizer step. `before` are the tokens per pass that the training began with, if it was stopped
    /// and goes on with others.
    fn planned(&mut self, _plan: &MemoryPlan, _before: Option<usize>) {}
    /// Called as prompts are scored under the reference, before the first optimizer step.
    fn scored(&mut self, _done: usize, _total: usize) {}
    /// Called after each optimizer step.
    fn step(&mut self, total: u64, record: &StepRecord);
    /// Whether the user asked to stop; asked after each optimizer step.
    fn stop_requested(&self) -> bool;
}

/// Trains `policy` on a task, in place. Returns the records of the steps that this call took.
///
/// `validation` is a task of held-out examples, for `validate_every`. `folder` receives `metrics.jsonl` and, when the
/// training is interrupted or `save_every` says so, its state. A state found there continues, if it is of the same training (same
/// start, data and options): bit-exactly, if its passes are cut as before. They are unless `micro_batch_tokens` asks for
/// others, or they no longer fit; the monitor is told.
///
/// # Errors
/// No examples, or fewer than the task's smallest batch ([`Error::Input`]); a loss, of validation too, or a gradient that
/// is not finite ([`Error::Failed`], which names the rows); less memory than is needed; a file that cannot be written; [`Error::Interrupted`] after the state
/// was saved because the monitor asked to stop.
pub fn train(
    policy: &mut Policy,
    task: &dyn Task,
    validation: Option<&dyn Task>,
    options: &TrainOptions,
    folder: &Path,
    monitor: &mut dyn Monitor,
) -> Result<Vec<StepRecord>> {
    check_size(task.len(), options.batch_size, task.smallest_batch())?;
    let validation = validation.filter(|task| options.validate_every > 0 && task.len() >= task.smallest_batch());
    let tasks: Vec<&dyn Task> = std::iter::once(task).chain(validation).collect();
    let config = policy.base().config.clone();
    let footprint = footprint(&config, &tasks, options);
    let reference = task.divergence_from().map_or(0, |model| size_of_val(&*model.weights));
    let others = memory::resident_besides(policy.bytes() + reference);
    // what does not fit is refused before anything is allocated
    let mut memory = footprint.plan(others)?;
    let identity = identity(policy, &tasks, options);
    let constants = OptimizerOptions { weight_decay: options.weight_decay, ..options.optimizer.defaults() };
    let mut optimizer = Optimizer::new(options.optimizer, constants, policy.specs());
    let mut progress = Progress::new(options, policy.weights());
    state(policy, &mut optimizer, &mut progress).load(folder, &identity)?;
    if let (Some(tokens), None) = (progress.counts.micro_batch_tokens, options.micro_batch_tokens) {
        memory = footprint.plan_with(tokens, others).unwrap_or(memory);
    }
    let before = progress.counts.micro_batch_tokens.replace(memory.micro_batch_tokens);
    monitor.planned(&memory, before.filter(|tokens| *tokens != memory.micro_batch_tokens));
    let mut log = MetricsLog::open(&folder.join("metrics.jsonl"), optimizer.steps)?;
    let mut gradient = vec![0.0; policy.weights().len()];
    let mut passes = Passes::new(policy, options.dtype, footprint.lengths.longest, &memory);

    let plan = options.plan(task.len(), task.smallest_batch());
    let total = plan.batches.len() as u64;
    // the first step of a warm-up has rate 0, so a training of one step must not be all warm-up
    let warmup = ((options.warmup_ratio * total as f64).ceil() as u64).min(total - 1);
    let mut records = Vec::new();
    while optimizer.steps < total && !progress.is_out_of_patience() {
        let start = Instant::now();
        let examples = &plan.batches[optimizer.steps as usize];
        let batch = Batch { task, step: optimizer.steps, examples };
        let parameters = policy.parameters(Some(dropout_seed(options.seed, optimizer.steps)));
        let (means, tokens, broken) = passes.gradient(parameters, &batch, &mut progress.counts.running, &mut gradient);
        let grad_norm = global_norm(&gradient);
        if !(means.loss.is_finite() && grad_norm.is_finite()) {
            let what = format!("the loss is {} and the norm of the gradient is {grad_norm}", means.loss);
            return Err(diverged(task, examples, &broken, optimizer.steps + 1, &what));
        }
        let learning_rate = options.learning_rate * options.schedule.factor(optimizer.steps, warmup, total);
        let scale = (options.max_grad_norm / grad_norm).min(1.0);
        optimizer.step(policy.weights_mut(), &mut gradient, learning_rate, scale);
        progress.average(policy.weights());
        let last = optimizer.steps == total;
        let validated = validation.filter(|_| last || optimizer.steps.is_multiple_of(options.validate_every));
        let validated = validated.map(|task| validate(&mut passes, policy, task, &mut progress, optimizer.steps));
        let record = StepRecord {
            step: optimizer.steps,
            epoch: optimizer.steps as f64 / plan.steps_per_epoch as f64,
            loss: means.loss,
            grad_norm,
            learning_rate,
            tokens,
            seconds: start.elapsed().as_secs_f64(),
            metrics: means.metrics,
            validation: validated.transpose()?.unwrap_or_default(),
        };
        log.append(&record)?;
        monitor.step(total, &record);
        records.push(record);
        let last = last || progress.is_out_of_patience();
        let stop = monitor.stop_requested() && !last;
        let due = options.save_every > 0 && optimizer.steps.is_multiple_of(options.save_every) && !last;
        // what is saved here must not hold an overflow that only the next loss would show
        if (stop || due || last) && !policy.weights().iter().all(|w| w.is_finite()) {
            return Err(diverged(task, examples, &[], optimizer.steps, "weights became infinite"));
        }
        if stop || due {
            state(policy, &mut optimizer, &mut progress).save(folder, &identity)?;
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
    if let Some(weights) = progress.into_weights() {
        *policy.weights_mut() = weights;
    }
    Ok(records)
}

/// What decides the memory of a training of a model of this shape on the first task, validated on the second.
fn footprint<'a>(config: &'a ModelConfig, tasks: &[&dyn Task], options: &'a TrainOptions) -> Footprint<'a> {
    let mut of_tasks = tasks.iter().map(|task| (0..task.len()).map(|i| task.sequences(i)).collect::<Vec<_>>());
    let (examples, validation) = (of_tasks.next().unwrap_or_default(), of_tasks.next().unwrap_or_default());
    let least = tasks.first().map_or(1, |task| task.smallest_batch());
    let mismatched = tasks.iter().any(|task| task.uses_mismatched());
    Footprint {
        config,
        options,
        keeps_reference: tasks.iter().any(|task| task.divergence_from().is_some()),
        lengths: Lengths::new(config, options, &examples, &validation, least, mismatched),
    }
}

/// What is saved of a training, and restored.
fn state<'a>(policy: &'a mut Policy, optimizer: &'a mut Optimizer, progress: &'a mut Progress) -> TrainingState<'a> {
    TrainingState { weights: policy.weights_mut(), optimizer, progress }
}

/// Loss and metrics of held-out examples after `step` steps; notes in `progress` whether the loss is the lowest so far.
///
/// # Errors
/// A loss that is not finite.
fn validate(
    passes: &mut Passes,
    policy: &mut Policy,
    task: &dyn Task,
    progress: &mut Progress,
    step: u64,
) -> Result<BTreeMap<String, f64>> {
    let all: Vec<usize> = (0..task.len()).collect();
    let running = progress.counts.running;
    // the average takes the place of the weights for as long as it is looked at
    let exchange = |progress: &mut Progress, policy: &mut Policy| {
        if let Some(averaged) = progress.averaged() {
            std::mem::swap(averaged, policy.weights_mut());
        }
    };
    exchange(progress, policy);
    let (Means { loss, metrics }, broken) =
        passes.means(policy.parameters(None), &Batch { task, step: 0, examples: &all }, running);
    if !loss.is_finite() {
        return Err(diverged(task, &all, &broken, step, &format!("the loss of the held-out rows is {loss}")));
    }
    progress.validated(loss, policy.weights());
    exchange(progress, policy);
    let metrics = metrics.into_iter().map(|(name, value)| (format!("eval_{name}"), value));
    Ok(metrics.chain([("eval_loss".to_owned(), loss)]).collect())
}

/// Checks that there are enough examples for batches of at least `least`.
///
/// # Errors
/// [`Error::Input`] if there are not, or `batch_size` is smaller.
pub fn check_size(examples: usize, batch_size: usize, least: usize) -> Result<()> {
    if examples == 0 {
        return Err(Error::input("There is nothing to train on: the data holds no usable example."));
    }
    for (what, value) in [("there are only", examples), ("train.batch_size is", batch_size)] {
        if value < least {
            return Err(Error::input(format!(
                "The objective compares the examples of a batch with each other, so a batch must have at least {least} of \
                 them, but {what} {value}. Raise the batch size, or give more data."
            )));
        }
    }
    Ok(())
}

/// Whether a training in this folder was stopped and can go on.
pub fn has_state(folder: &Path) -> bool {
    state::is_in(folder)
}

/// Removes the state of a training that is complete and saved elsewhere.
///
/// # Errors
/// If the file exists and cannot be removed.
pub fn discard_state(folder: &Path) -> Result<()> {
    TrainingState::discard(folder)
}

/// Seeds the dropout of a step.
fn dropout_seed(seed: u64, step: u64) -> u64 {
    let mut word = [0; 8];
    blake3::Hasher::new().update(&seed.to_le_bytes()).update(&step.to_le_bytes()).finalize_xof().fill(&mut word);
    u64::from_le_bytes(word)
}

/// Names the rows that broke, or all of the batch if none broke by itself.
fn diverged(task: &dyn Task, batch: &[usize], broken: &[usize], step: u64, what: &str) -> Error {
    let batch: Vec<usize> = batch.iter().map(|&example| task.sequences(example).row).collect();
    let (where_, rows) =
        if broken.is_empty() { ("The batch holds the rows", &*batch) } else { ("It broke in the rows", broken) };
    let rows: Vec<String> = rows.iter().map(usize::to_string).collect();
    Error::Failed(format!(
        "Training stopped at step {step}: {what}. {where_} {}. What was saved before is untouched. Lower the learning rate, \
         or look at those rows.",
        rows.join(", ")
    ))
}

#[cfg(test)]
mod tests;
