//! Models in Hugging Face's layout: a folder with `config.json`, safetensors and a tokenizer.

mod config;
mod streamed;
mod tensors;

use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use super::describe::{Description, TokenizerSummary};
use super::{GenerationConfig, Values};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::model::{Layout, Model};
use crate::tokenizer::Tokenizer;

pub(super) use config::{to_json, token_ids};
pub use streamed::StreamedModel;
pub(super) use tensors::Tensors;

/// The size above which weights are cut into several files, as `transformers` does by default.
const SHARD_BYTES: usize = 5_000_000_000;

/// Reads the language model of a folder, without its tokenizer.
pub(super) fn load_model(folder: &Path) -> Result<Model> {
    Tensors::open(folder)?.load(load_config(folder)?)
}

/// Reads the reward or cost model of a folder, without its tokenizer.
pub(super) fn load_scorer(folder: &Path) -> Result<Model> {
    let config = read_config(folder)?;
    if !config.head.is_score() {
        return Err(Error::input(format!(
            "{} holds a language model, but a reward or cost model is needed here, whose config.json names an architecture such as \
             LlamaForSequenceClassification. Train one by `sacpo train reward` or `sacpo train cost`.",
            folder.display()
        )));
    }
    Tensors::open(folder)?.load(config)
}

/// Reads `generation_config.json`; a folder without one has nothing to say about generation.
pub(super) fn load_generation(folder: &Path) -> Result<GenerationConfig> {
    let path = folder.join("generation_config.json");
    match fs::read(&path) {
        Ok(json) => GenerationConfig::parse(&json, &path),
        Err(source) if source.kind() == std::io::ErrorKind::NotFound => Ok(GenerationConfig::default()),
        Err(source) => Err(Error::io("read", &path)(source)),
    }
}

/// Writes all files of a checkpoint into an empty folder.
pub(super) fn save(
    config: &ModelConfig,
    tokenizer: &Tokenizer,
    generation: &GenerationConfig,
    values: &mut Values,
    folder: &Path,
) -> Result<()> {
    write_json(&folder.join("config.json"), config::to_json(config))?;
    if !config.head.is_score() {
        write_json(&folder.join("generation_config.json"), generation.to_json())?;
    }
    tokenizer.save(folder)?;
    tensors::save(&Layout::new(config).specs, values, folder, SHARD_BYTES)
}

/// Describes the model of a folder from its headers alone.
pub(super) fn describe(folder: &Path) -> Result<Description> {
    let config = read_config(folder)?;
    let tensors = Tensors::open(folder)?;
    let tokenizer = Tokenizer::found_in(folder)?.as_ref().map(TokenizerSummary::new);
    Ok(Description::new("Hugging Face folder", &config, tensors.by_type(), tensors.file_bytes(), tokenizer))
}

/// The shape of the language model of a folder.
fn load_config(folder: &Path) -> Result<ModelConfig> {
    let config = read_config(folder)?;
    if config.head.is_score() {
        return Err(Error::input(format!(
            "{} holds a reward or cost model, which scores texts and writes none, but a language model is needed here. Judges take \
             it: `sacpo judge --reward-model`, `--cost-model`.",
            folder.display()
        )));
    }
    Ok(config)
}

fn read_config(folder: &Path) -> Result<ModelConfig> {
    let path = folder.join("config.json");
    config::parse(&fs::read(&path).map_err(Error::io("read", &path))?, &path)
}

/// Writes a JSON object as a file.
pub(super) fn write_json(path: &Path, fields: Map<String, Value>) -> Result<()> {
    fs::write(path, format!("{:#}\n", Value::Object(fields))).map_err(Error::io("write", path))
}
