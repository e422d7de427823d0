//! Merging models that stay on the disk.

use std::ops::Range;
use std::path::{Path, PathBuf};

use engine::checkpoint::{GenerationConfig, StreamedModel, save_in_parts};
use engine::{Error, ModelConfig, ModelHash, ParamSpec, Result, Tokenizer};
use rayon::prelude::*;
use serde::Serialize;

use super::arithmetic::{Angle, TaskVectors, linear};
use super::trim::{Random, Select, Trim};
use super::{Method, Options, adapters};

/// Numbers of each model in memory at once.
const PART: usize = 1 << 18;

/// What a merge made, and of what.
#[derive(Debug, Clone, Serialize)]
pub struct Merged {
    /// The models, in the order given.
    pub models: Vec<Input>,
    /// What task vectors start from, where the result is a model.
    pub base: Option<Input>,
    /// Number of tensors.
    pub tensors: usize,
    /// Number of weights.
    pub parameters: usize,
    /// Where the result is an adapter.
    pub adapter: Option<MergedAdapter>,
}

/// An adapter that a merge made.
#[derive(Debug, Clone, Serialize)]
pub struct MergedAdapter {
    /// The model that it adapts.
    pub base: PathBuf,
    /// The sum of the ranks.
    pub rank: usize,
}

/// A model that went into a merge.
#[derive(Debug, Clone, Serialize)]
pub struct Input {
    /// Where it is.
    pub path: PathBuf,
    /// [`engine::Model::hash`] of it; [`engine::Adapter::hash`] where the result is an adapter.
    pub hash: String,
}

/// Merges models, in Hugging Face's layout, into the new checkpoint `out`, with f32 weights. Shape, tokenizer and defaults
/// for generation are those of the base, or of the first model where there is no base.
///
/// A PEFT folder stands for the model that the adapter makes of its base. Where all models are adapters of one base, and
/// the merge is that base and a weighted sum of their updates, `out` is an adapter of it instead, whose rank is the sum of
/// theirs: linear merges whose weights add up to 1, and task arithmetic over that base, without DoRA.
///
/// A part of a tensor of each model is in memory at a time, whatever the size of the models. `progress` is told now and
/// then how many of how many weights are done.
///
/// # Errors
/// [`Error::Input`] when the options do not fit, a model cannot be read, holds a number that is not finite, or differs
/// from the first in shape or vocabulary; [`Error::Failed`] when the merged weights are not finite; what
/// [`save_in_parts`] and `progress` return. `out` is then what it was.
pub fn merge(
    models: &[PathBuf],
    base: Option<&Path>,
    options: &Options,
    out: &Path,
    progress: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<Merged> {
    options.validate(models.len(), base.is_some())?;
    let paths: Vec<&Path> = base.into_iter().chain(models.iter().map(PathBuf::as_path)).collect();
    let (mut inputs, tokenizer, generation) = Inputs::open(&paths)?;
    if let Some(below) = adapters::common_base(&inputs, options) {
        // of task arithmetic it is the base's already
        let has_own = base.is_none() && paths[0].join("tokenizer.json").exists();
        let merged = adapters::merge(&inputs, options, below, has_own.then_some(&tokenizer), out)?;
        progress(merged.parameters, merged.parameters)?;
        return Ok(merged);
    }
    let config = inputs.models[0].model.config.clone();
    let (tensors, parameters) = (inputs.models[0].model.layout.specs.len(), inputs.models[0].model.layout.len);
    let mut tensor = 0;
    save_in_parts(out, &config, &tokenizer, &generation, &mut |spec, put| {
        let mut merger = Merger::new(options, &mut inputs, tensor, spec)?;
        let mut merged = Vec::new();
        for range in parts(spec.range.len()) {
            let parts = inputs.read(tensor, range.clone())?;
            inputs.models.iter_mut().zip(&parts).for_each(|(input, part)| input.hash.update(part));
            merged.resize(range.len(), 0.0);
            merger.merge(&parts, &mut merged);
            if !merged.iter().all(|value| value.is_finite()) {
                return Err(Error::Failed(format!(
                    "In the merged tensor {} some numbers are too large for f32. Give smaller weights.",
                    spec.name
                )));
            }
            put(&merged)?;
            progress(spec.range.start + range.end, parameters)?;
        }
        tensor += 1;
        Ok(())
    })?;
    let mut inputs =
        inputs.models.into_iter().map(|Source { model, hash }| Input { path: model.path, hash: hash.finish() });
    let base = base.and_then(|_| inputs.next());
    Ok(Merged { models: inputs.collect(), base, tensors, parameters, adapter: None })
}

/// The models of a merge, the base first if there is one.
pub(super) struct Inputs {
    pub(super) models: Vec<Source>,
}

pub(super) struct Source {
    pub(super) model: StreamedModel,
    /// Of what was merged so far.
    hash: ModelHash,
}

impl Inputs {
    /// Opens models that can be merged, with the tokenizer and the defaults for generation of the first.
    fn open(paths: &[&Path]) -> Result<(Self, Tokenizer, GenerationConfig)> {
        let (first, tokenizer, generation) = StreamedModel::open(paths[0])?;
        let mut models = vec![first];
        for path in &paths[1..] {
            let (model, other, _) = StreamedModel::open(path)?;
            check_shape(&models[0], &model)?;
            check_vocabulary(&tokenizer, paths[0], &other, path)?;
            models.push(model);
        }
        let models = models.into_iter().map(|model| Source { hash: ModelHash::new(&model.config), model }).collect();
        Ok((Self { models }, tokenizer, generation))
    }

    /// A part of a tensor of every model.
    fn read(&mut self, tensor: usize, range: Range<usize>) -> Result<Vec<Vec<f32>>> {
        let read = |Source { model, .. }: &mut Source| {
            let mut part = Vec::new();
            model.read(tensor, range.clone(), &mut part)?;
            if part.iter().all(|value| value.is_finite()) {
                return Ok(part);
            }
            Err(not_finite(&model.path, &model.layout.specs[tensor].name))
        };
        self.models.par_iter_mut().map(read).collect()
    }
}

/// The error for a model that was damaged.
pub(super) fn not_finite(model: &Path, tensor: &str) -> Error {
    Error::input(format!(
        "In {} the tensor {tensor} holds numbers that are not finite. The model was damaged in training or on the disk; \
         merge another checkpoint of it.",
        model.display()
    ))
}

/// A tensor's numbers, a part at a time.
fn parts(len: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(PART).map(move |start| start..len.min(start + PART))
}

/// The merge of one tensor, given in parts.
enum Merger<'a> {
    Coefficients(Vec<f64>),
    TaskVectors(TaskVectors<'a>, Vec<Trim>),
}

impl<'a> Merger<'a> {
    /// Reads of a tensor what must be known of all of it before the first part is merged.
    fn new(options: &'a Options, inputs: &mut Inputs, tensor: usize, spec: &ParamSpec) -> Result<Self> {
        let (method, models) = (options.method, options.weights.len());
        if method == Method::Linear {
            return Ok(Self::Coefficients(options.coefficients()));
        }
        if method == Method::Slerp {
            let mut angle = Angle::default();
            for range in parts(spec.range.len()) {
                let parts = inputs.read(tensor, range)?;
                angle.add(&parts[0], &parts[1]);
            }
            let shares = options.coefficients();
            return Ok(Self::Coefficients(angle.coefficients([shares[0], shares[1]]).to_vec()));
        }
        let (density, seed) = (options.density, options.seed);
        let trims = if method.is_random() {
            (0..models).map(|model| Trim::Random(Box::new(Random::new(density, seed, &spec.name, model)))).collect()
        } else if method.is_sparse() && density < 1.0 {
            largest(inputs, tensor, spec.range.len(), density)?
        } else {
            vec![Trim::Nothing; models]
        };
        let vectors = TaskVectors {
            weights: &options.weights,
            rescale: if method.is_random() { 1.0 / density } else { 1.0 },
            elect: method.elects(),
            normalise: options.normalise,
        };
        Ok(Self::TaskVectors(vectors, trims))
    }

    fn merge(&mut self, parts: &[Vec<f32>], out: &mut [f32]) {
        match self {
            Self::Coefficients(coefficients) => linear(coefficients, parts, out),
            Self::TaskVectors(vectors, trims) => vectors.merge(trims, &parts[0], &parts[1..], out),
        }
    }
}

/// Finds the largest entries of each model's task vector.
fn largest(inputs: &mut Inputs, tensor: usize, len: usize, density: f64) -> Result<Vec<Trim>> {
    let mut selections = vec![Select::new(len, density); inputs.models.len() - 1];
    for pass in 0..2 {
        if pass == 1 {
            selections.iter_mut().for_each(Select::next_pass);
        }
        for range in parts(len) {
            let parts = inputs.read(tensor, range)?;
            let entries = |model: &Vec<f32>| model.iter().zip(&parts[0]).map(|(model, base)| model - base).collect();
            selections.par_iter_mut().zip(&parts[1..]).for_each(|(selection, model)| {
                let entries: Vec<f32> = entries(model);
                selection.count(entries.into_iter());
            });
        }
    }
    Ok(selections.into_iter().map(|selection| Trim::Smallest(selection.finish())).collect())
}

/// Refuses models whose weights do not mean the same. The context and the special tokens may differ.
fn check_shape(first: &StreamedModel, other: &StreamedModel) -> Result<()> {
    let shape = |config: &ModelConfig| {
        [
            ("model_type", config.model_type.clone()),
            ("vocab_size", config.vocab_size.to_string()),
            ("hidden_size", config.hidden_size.to_string()),
            ("intermediate_size", config.intermediate_size.to_string()),
            ("num_hidden_layers", config.num_hidden_layers.to_string()),
            ("num_attention_heads", config.num_attention_heads.to_string()),
            ("num_key_value_heads", config.num_key_value_heads.to_string()),
            ("head_dim", config.head_dim.to_string()),
            ("rms_norm_eps", config.rms_norm_eps.to_string()),
            ("rope_theta", config.rope_theta.to_string()),
            ("rope_scaling", format!("{:?}", config.rope_scaling)),
            ("tie_word_embeddings", config.tie_word_embeddings.to_string()),
        ]
    };
    let (ours, theirs) = (shape(&first.config), shape(&other.config));
    match ours.iter().zip(&theirs).find(|(ours, theirs)| ours != theirs) {
        None => Ok(()),
        Some(((name, first_has), (_, other_has))) => Err(Error::input(format!(
            "{name} is {first_has} in {} but {other_has} in {}. Only models of the same shape can be merged, best those \
             trained from the same base.",
            first.path.display(),
            other.path.display()
        ))),
    }
}

/// Refuses tokenizers that give an id to different tokens.
fn check_vocabulary(first: &Tokenizer, first_path: &Path, other: &Tokenizer, path: &Path) -> Result<()> {
    let ids = first.vocab_size().max(other.vocab_size()) as u32;
    let Some(id) = (0..ids).find(|&id| first.token(id) != other.token(id)) else { return Ok(()) };
    let named = |tokenizer: &Tokenizer| tokenizer.token(id).map_or("no token".to_owned(), |token| format!("{token:?}"));
    Err(Error::input(format!(
        "The token {id} is {} in {} but {} in {}. Models can only be merged when they share a vocabulary.",
        named(first),
        first_path.display(),
        named(other),
        path.display()
    )))
}
