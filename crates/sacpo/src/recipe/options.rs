//! `[data]` and `[train]`: what every step has, and may set for itself.

use std::ops::Bound::Excluded;

use align::data::{LongPrompts, TemplateTail};
use engine::optim::{OptimizerKind, Schedule};
use engine::{LoraOptions, Precision, Projection, Result};
use serde::Serialize;

use super::POSITIVE;
use super::location::Location;
use super::section::Section;

pub(super) const DATA_KEYS: &[&str] = &[
    "max_length",
    "validation_fraction",
    "max_pairs",
    "max_validation_pairs",
    "shuffle",
    "long_prompts",
    "skip_bad_rows",
    "template_tail",
    "exclude_prompts",
    "deduplicate",
];
pub(super) const TRAIN_KEYS: &[&str] = &[
    "optimizer",
    "dtype",
    "learning_rate",
    "epochs",
    "batch_size",
    "schedule",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "micro_batch_tokens",
    "save_every",
    "validate_every",
    "patience",
    "ema_decay",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "lora_targets",
    "lora_rank_stabilized",
    "lora_dora",
    "lora_previous",
];

/// `[data]`: how preference pairs are turned into tokens and divided.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DataOptions {
    /// The longest prompt and response together, in tokens, ≥ 2; responses beyond it are cut. Default 512.
    pub max_length: usize,
    /// The share of pairs held out for validation, 0 ≤ share < 1. Default 0.1.
    pub validation_fraction: f64,
    /// The number of pairs to train on at most, ≥ 1: the first of the file that are not held out or
    /// dropped. Default: all.
    pub max_pairs: Option<usize>,
    /// The number of held-out pairs to rank at most, ≥ 1: the first of the file. Default: all.
    pub max_validation_pairs: Option<usize>,
    /// Whether the two numbers above draw pairs by the run's seed instead of taking the first. Default: no.
    pub shuffle: bool,
    /// What to do with a prompt that leaves no room for a response. Default: an error.
    pub long_prompts: LongPrompts,
    /// Whether a row that cannot be read is counted and left out, instead of being an error. Default: no.
    pub skip_bad_rows: bool,
    /// What happens to the text that a chat template writes after the end of a response. Default: dropped.
    pub template_tail: TemplateTail,
    /// Files of prompts, such as those of an evaluation, whose rows are counted and left out. Default: none.
    pub exclude_prompts: Vec<Location>,
    /// Whether a row that says the same as one before it is counted and left out. Default: no.
    pub deduplicate: bool,
}

/// `[train]`: how a step trains.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainOptions {
    /// The optimizer. Default: AdamW.
    pub optimizer: OptimizerKind,
    /// In what precision matrix products are computed; weights and optimizer states are f32 in any. Default: f32.
    pub dtype: Precision,
    /// The peak learning rate, > 0. Default 5e-6.
    pub learning_rate: f64,
    /// Passes over the training pairs, ≥ 1. Default 1.
    pub epochs: usize,
    /// Pairs per optimizer step, ≥ 1. Default 16.
    pub batch_size: usize,
    /// The course of the learning rate after warm-up. Default: cosine.
    pub schedule: Schedule,
    /// The share of all optimizer steps in which the learning rate rises from 0, 0 to 1. Default 0.1.
    pub warmup_ratio: f64,
    /// Decoupled weight decay of matrices, ≥ 0. Default 0.
    pub weight_decay: f64,
    /// The global gradient norm above which gradients are scaled down, > 0. Default 1.
    pub max_grad_norm: f64,
    /// Tokens per forward and backward pass, ≥ 1; a longer pair passes alone. It changes memory and speed,
    /// and the result by rounding at most. Default: what fits, 2048 at most.
    pub micro_batch_tokens: Option<usize>,
    /// Optimizer steps between the states that a killed run continues from, ≥ 1. Default 20.
    pub save_every: usize,
    /// Optimizer steps between validations on the held-out rows, ≥ 1. Default: none.
    pub validate_every: Option<usize>,
    /// Validations without a lower loss after which training stops and goes back to the best weights, ≥ 1; needs
    /// `validate_every`. Default: never.
    pub patience: Option<usize>,
    /// The decay per step of an exponential moving average of the weights, which becomes the policy, 0 < decay < 1.
    /// Default: none.
    pub ema_decay: Option<f64>,
    /// The rank of an adapter that is trained instead of all weights, ≥ 1. Default: none, all weights are trained.
    pub lora_rank: Option<usize>,
    /// The numerator of the adapter's scale, > 0. Default: twice the rank.
    pub lora_alpha: Option<f64>,
    /// The dropout of the adapter's input, 0 ≤ p < 1. Default 0.
    pub lora_dropout: f64,
    /// The matrices that are adapted. Default: all of the blocks.
    pub lora_targets: Vec<Projection>,
    /// Whether the scale is alpha/√rank instead of alpha/rank. Default: no.
    pub lora_rank_stabilized: bool,
    /// Whether the rows' lengths are learned by themselves (DoRA). Default: no.
    pub lora_dora: bool,
    /// What becomes of the adapter of the step before. Default: it is folded.
    pub lora_previous: PreviousAdapter,
}

/// What becomes of the adapter of the step before in the adapter that a step writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PreviousAdapter {
    /// It is folded into the policy that this step starts from; the new adapter belongs to that policy.
    Fold,
    /// It is stacked: the new adapter holds both, and belongs to the model below the first of them.
    Stack,
}

impl Default for DataOptions {
    fn default() -> Self {
        Self {
            max_length: 512,
            validation_fraction: 0.1,
            max_pairs: None,
            max_validation_pairs: None,
            shuffle: false,
            long_prompts: LongPrompts::Error,
            skip_bad_rows: false,
            template_tail: TemplateTail::Drop,
            exclude_prompts: Vec::new(),
            deduplicate: false,
        }
    }
}

impl DataOptions {
    pub(super) fn read(section: &Section<'_>, defaults: &Self) -> Result<Self> {
        let long_prompts =
            &[("error", LongPrompts::Error), ("drop", LongPrompts::Drop), ("keep-end", LongPrompts::KeepEnd)];
        let template_tail = &[("drop", TemplateTail::Drop), ("keep", TemplateTail::Keep)];
        Ok(Self {
            max_length: section.count("max_length", 2)?.unwrap_or(defaults.max_length),
            validation_fraction: section
                .number("validation_fraction", 0.0..1.0)?
                .unwrap_or(defaults.validation_fraction),
            max_pairs: section.count("max_pairs", 1)?.or(defaults.max_pairs),
            max_validation_pairs: section.count("max_validation_pairs", 1)?.or(defaults.max_validation_pairs),
            shuffle: section.flag("shuffle")?.unwrap_or(defaults.shuffle),
            long_prompts: section.choice("long_prompts", long_prompts)?.unwrap_or(defaults.long_prompts),
            skip_bad_rows: section.flag("skip_bad_rows")?.unwrap_or(defaults.skip_bad_rows),
            template_tail: section.choice("template_tail", template_tail)?.unwrap_or(defaults.template_tail),
            exclude_prompts: match section.texts("exclude_prompts")? {
                Some(files) => files.into_iter().map(Location::from).collect(),
                None => defaults.exclude_prompts.clone(),
            },
            deduplicate: section.flag("deduplicate")?.unwrap_or(defaults.deduplicate),
        })
    }
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self {
            optimizer: OptimizerKind::AdamW,
            dtype: Precision::F32,
            learning_rate: 5e-6,
            epochs: 1,
            batch_size: 16,
            schedule: Schedule::Cosine,
            warmup_ratio: 0.1,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            micro_batch_tokens: None,
            save_every: 20,
            validate_every: None,
            patience: None,
            ema_decay: None,
            lora_rank: None,
            lora_alpha: None,
            lora_dropout: 0.0,
            lora_targets: Projection::ALL.to_vec(),
            lora_rank_stabilized: false,
            lora_dora: false,
            lora_previous: PreviousAdapter::Fold,
        }
    }
}

impl TrainOptions {
    pub(super) fn read(section: &Section<'_>, defaults: &Self) -> Result<Self> {
        let schedule = &[("cosine", Schedule::Cosine), ("linear", Schedule::Linear), ("constant", Schedule::Constant)];
        let optimizers = OptimizerKind::ALL.map(|kind| (kind.name(), kind));
        let previous = &[("fold", PreviousAdapter::Fold), ("stack", PreviousAdapter::Stack)];
        let train = Self {
            optimizer: section.choice("optimizer", &optimizers)?.unwrap_or(defaults.optimizer),
            dtype: section.choice("dtype", &Precision::ALL.map(|it| (it.name(), it)))?.unwrap_or(defaults.dtype),
            learning_rate: section.number("learning_rate", POSITIVE)?.unwrap_or(defaults.learning_rate),
            epochs: section.count("epochs", 1)?.unwrap_or(defaults.epochs),
            batch_size: section.count("batch_size", 1)?.unwrap_or(defaults.batch_size),
            schedule: section.choice("schedule", schedule)?.unwrap_or(defaults.schedule),
            warmup_ratio: section.number("warmup_ratio", 0.0..=1.0)?.unwrap_or(defaults.warmup_ratio),
            weight_decay: section.number("weight_decay", 0.0..)?.unwrap_or(defaults.weight_decay),
            max_grad_norm: section.number("max_grad_norm", POSITIVE)?.unwrap_or(defaults.max_grad_norm),
            micro_batch_tokens: section.count("micro_batch_tokens", 1)?.or(defaults.micro_batch_tokens),
            save_every: section.count("save_every", 1)?.unwrap_or(defaults.save_every),
            validate_every: section.count("validate_every", 1)?.or(defaults.validate_every),
            patience: section.count("patience", 1)?.or(defaults.patience),
            ema_decay: section.number("ema_decay", (Excluded(0.0), Excluded(1.0)))?.or(defaults.ema_decay),
            lora_rank: section.count("lora_rank", 1)?.or(defaults.lora_rank),
            lora_alpha: section.number("lora_alpha", POSITIVE)?.or(defaults.lora_alpha),
            lora_dropout: section.number("lora_dropout", 0.0..1.0)?.unwrap_or(defaults.lora_dropout),
            lora_targets: targets(section)?.unwrap_or_else(|| defaults.lora_targets.clone()),
            lora_rank_stabilized: section.flag("lora_rank_stabilized")?.unwrap_or(defaults.lora_rank_stabilized),
            lora_dora: section.flag("lora_dora")?.unwrap_or(defaults.lora_dora),
            lora_previous: section.choice("lora_previous", previous)?.unwrap_or(defaults.lora_previous),
        };
        if let (None, Some(key)) = (train.lora_rank, train.set_for_adapters()) {
            return Err(section.error(&format!(
                "`{key}` is about an adapter, but there is none. Set `lora_rank`, or remove the key to train all weights."
            )));
        }
        if let Some(options) = train.lora() {
            options.check_trainable().map_err(|error| section.error(&error.to_string()))?;
        }
        if train.patience.is_some() && train.validate_every.is_none() {
            return Err(section.error(
                "`patience` counts validations, but there are none. Set `validate_every` to a number of optimizer steps.",
            ));
        }
        Ok(train)
    }

    /// A key of adapters that does not have its default, beside the rank.
    fn set_for_adapters(&self) -> Option<&'static str> {
        let defaults = Self::default();
        let keys = [
            ("lora_alpha", self.lora_alpha != defaults.lora_alpha),
            ("lora_dropout", self.lora_dropout != defaults.lora_dropout),
            ("lora_targets", self.lora_targets != defaults.lora_targets),
            ("lora_rank_stabilized", self.lora_rank_stabilized),
            ("lora_dora", self.lora_dora),
            ("lora_previous", self.lora_previous != defaults.lora_previous),
        ];
        keys.into_iter().find(|(_, set)| *set).map(|(key, _)| key)
    }

    /// The adapter to train; nothing if all weights are trained.
    pub fn lora(&self) -> Option<LoraOptions> {
        self.lora_rank.map(|rank| LoraOptions {
            rank,
            alpha: self.lora_alpha.unwrap_or(2.0 * rank as f64),
            dropout: self.lora_dropout,
            targets: self.lora_targets.clone(),
            rank_stabilized: self.lora_rank_stabilized,
            dora: self.lora_dora,
        })
    }
}

/// The matrices that an adapter is for.
fn targets(section: &Section<'_>) -> Result<Option<Vec<Projection>>> {
    let Some(names) = section.texts("lora_targets")? else { return Ok(None) };
    let targets = names.iter().map(|name| name.parse()).collect::<Result<Vec<_>>>();
    targets.map(Some).map_err(|error| section.error(&format!("In `lora_targets`: {error}")))
}
