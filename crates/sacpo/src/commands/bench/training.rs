//! Steps of DPO on drawn pairs.

use align::data::{Dataset, TokenizedPair, Tokens};
use align::objective::{self, Objective};
use align::step::{Alignment, plan_memory};
use align::trainer::{MemoryPlan, Monitor, StepRecord, TrainOptions};
use engine::optim::Schedule;
use engine::profile::{self, Cost, Profile};
use engine::{Error, Model, ModelConfig, PackedBatch, Precision, Result, memory, roofline};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sacpo::recipe;
use serde::Serialize;

use super::Roofline;
use crate::cli::Bench;
use crate::ui;

/// Mean tokens of the prompts of PKU-SafeRLHF, and of their better and worse responses, with SmolLM2's tokenizer.
const LENGTHS: [usize; 3] = [49, 61, 72];

/// What is held out.
const NO_PAIRS: Dataset = Dataset::Pairs(Vec::new());

/// What pairs to draw.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pairs {
    /// How many.
    count: usize,
    /// How many times as long as those of PKU-SafeRLHF.
    stretch: usize,
    seed: u64,
}

impl Pairs {
    /// Those of the command line.
    pub(super) fn new(options: &Bench) -> Self {
        Self { count: options.batch_size, stretch: 1, seed: options.seed }
    }

    /// Pairs so many times as long, and that many times fewer.
    pub(super) fn stretched(self, stretch: usize) -> Self {
        Self { count: self.count.div_ceil(stretch), stretch, ..self }
    }

    /// Mean tokens of a prompt with a response.
    pub(super) fn mean_length(&self) -> usize {
        let [prompt, chosen, rejected] = LENGTHS;
        self.stretch * (prompt + (chosen + rejected) / 2)
    }

    /// Pairs of random tokens. Each length is drawn between half and one and a half of its mean.
    fn draw(&self, vocab: usize) -> Vec<TokenizedPair> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let pair = |row| {
            let [prompt, chosen, rejected] = LENGTHS.map(|mean| {
                let mean = mean * self.stretch;
                let length = rng.random_range(mean / 2..=mean + mean / 2);
                Tokens::from(tokens(&mut rng, length, vocab))
            });
            TokenizedPair { prompt, chosen, rejected, is_unsafe: None, margin: None, row }
        };
        (1..=self.count).map(pair).collect()
    }
}

/// Random tokens.
pub(super) fn tokens(rng: &mut impl Rng, length: usize, vocab: usize) -> Vec<u32> {
    (0..length).map(|_| rng.random_range(0..vocab as u32)).collect()
}

/// What timed optimizer steps took.
#[derive(Debug)]
pub(super) struct Steps {
    pairs: usize,
    /// Tokens computed in a step, shared prompts counted once.
    tokens: usize,
    /// Useful floating-point operations of a step.
    pub(super) flops: f64,
    /// Of each step.
    seconds: Vec<f64>,
    /// Of all of them.
    profile: Profile,
    peak_memory_bytes: Option<usize>,
}

/// Trains on one batch of pairs again and again, and leaves the first step out. Gives the trained model back.
pub(super) fn measure(model: Model, pairs: &Pairs, options: &Bench) -> Result<(Steps, Model)> {
    let drawn = pairs.draw(model.config.vocab_size);
    let mut batch = PackedBatch::default();
    drawn.iter().for_each(|pair| batch.push(&pair.prompt, &[&pair.chosen, &pair.rejected]));
    // all weights are trained: every product has two gradients
    let flops = 3.0 * roofline::forward_flops(&model.config, &batch);
    let folder = tempfile::tempdir().map_err(Error::io("create a folder in", &std::env::temp_dir()))?;
    let alignment = Alignment {
        start: model,
        data: &Dataset::Pairs(drawn),
        validation: &NO_PAIRS,
        objective: &dpo()?,
        options: &train_options(pairs, options),
        folder: folder.path(),
        cache: &folder.path().join("reference"),
    };
    let aligned = alignment.run(&mut Timed(ui::TrainingBar::new("training")));
    let profile = profile::stop();
    let aligned = aligned?;
    let timed = &aligned.records[1..];
    let steps = Steps {
        pairs: pairs.count,
        tokens: timed[0].tokens,
        flops,
        seconds: timed.iter().map(|step| step.seconds).collect(),
        profile,
        peak_memory_bytes: memory::peak(),
    };
    Ok((steps, aligned.policy))
}

/// What [`measure`] would take of memory with a model of this shape.
///
/// # Errors
/// [`Error::Input`] if it does not fit.
pub(super) fn plan(config: &ModelConfig, pairs: &Pairs, options: &Bench) -> Result<MemoryPlan> {
    let drawn = Dataset::Pairs(pairs.draw(config.vocab_size));
    plan_memory(config, &dpo()?, [&drawn, &NO_PAIRS], &train_options(pairs, options))
}

fn dpo() -> Result<Objective> {
    objective::Options::default().build("dpo", 0.1)
}

fn train_options(pairs: &Pairs, options: &Bench) -> TrainOptions {
    let defaults = recipe::TrainOptions::default();
    TrainOptions {
        lora: None,
        dtype: options.dtype,
        optimizer: defaults.optimizer,
        learning_rate: 1e-6,
        schedule: Schedule::Constant,
        warmup_ratio: 0.0,
        epochs: options.steps + 1,
        batch_size: pairs.count,
        micro_batch_tokens: defaults.micro_batch_tokens,
        memory_bytes: None,
        max_grad_norm: defaults.max_grad_norm,
        weight_decay: defaults.weight_decay,
        seed: options.seed,
        save_every: 0,
        validate_every: 0,
        patience: None,
        ema_decay: None,
    }
}

/// Begins the profile after the first step.
struct Timed(ui::TrainingBar);

impl Monitor for Timed {
    fn scored(&mut self, done: usize, total: usize) {
        self.0.scored(done, total);
    }

    fn step(&mut self, total: u64, record: &StepRecord) {
        if record.step == 1 {
            profile::start();
        }
        self.0.step(total, record);
    }

    /// Never: the trainer would save its state, and the steps are few.
    fn stop_requested(&self) -> bool {
        false
    }
}

/// The speed of training.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) dtype: Precision,
    pub(super) tokens_per_second: f64,
    pub(super) pairs_per_second: f64,
    /// Useful floating-point operations per second over those of large products.
    pub(super) utilisation: f64,
    /// Of the whole process up to the end of the training; nothing where the system does not say.
    pub(super) peak_memory_bytes: Option<usize>,
    pub(super) seconds_per_step: f64,
    pub(super) pairs_per_step: usize,
    pub(super) tokens_per_step: usize,
    pub(super) useful_flops_per_step: f64,
    pub(super) stages: Vec<StageReport>,
}

/// A stage of a step.
#[derive(Debug, Serialize)]
pub(super) struct StageReport {
    pub(super) stage: &'static str,
    /// Mean of the timed steps.
    pub(super) seconds: f64,
    /// Of the time of a step.
    pub(super) share: f64,
    /// What was done in a second, for stages of matrix products: recomputed blocks count too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) gflops: Option<f64>,
    /// What was read and written in a second, for stages without products.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) gbs: Option<f64>,
    /// The one of the two over what the machine does at best.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) roofline: Option<f64>,
}

impl Steps {
    /// The speed, from the step of median time.
    pub(super) fn report(&self, dtype: Precision, roofline: Roofline) -> Report {
        let seconds = median(&self.seconds);
        let steps = self.seconds.len() as f64;
        let whole = self.seconds.iter().sum::<f64>();
        let stage = |stage, Cost { seconds, flops, bytes }: Cost| {
            let rate = |work: f64| (work > 0.0).then_some(work / seconds);
            let (flops, bytes) = (rate(flops), rate(bytes));
            StageReport {
                stage,
                seconds: seconds / steps,
                share: seconds / whole,
                gflops: flops.map(|rate| rate / 1e9),
                gbs: bytes.map(|rate| rate / 1e9),
                roofline: flops.map(|rate| rate / roofline.flops).or(bytes.map(|rate| rate / roofline.bandwidth)),
            }
        };
        let mut stages: Vec<StageReport> = self.profile.iter().map(|(name, cost)| stage(name.name(), *cost)).collect();
        let other = whole - self.profile.values().map(|cost| cost.seconds).sum::<f64>();
        stages.push(stage("other", Cost { seconds: other, ..Cost::default() }));
        Report {
            dtype,
            tokens_per_second: self.tokens as f64 / seconds,
            pairs_per_second: self.pairs as f64 / seconds,
            utilisation: self.flops / seconds / roofline.flops,
            peak_memory_bytes: self.peak_memory_bytes,
            seconds_per_step: seconds,
            pairs_per_step: self.pairs,
            tokens_per_step: self.tokens,
            useful_flops_per_step: self.flops,
            stages,
        }
    }
}

/// The middle value; the mean of the two in the middle of an even number.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    if sorted.len().is_multiple_of(2) { 0.5 * (sorted[half - 1] + sorted[half]) } else { sorted[half] }
}
