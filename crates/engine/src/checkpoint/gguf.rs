//! Models in llama.cpp's layout: one GGUF file.

mod container;
mod model;
mod tokenizer;

use std::path::Path;

use super::GenerationConfig;
use super::describe::{Description, TokenizerSummary};
use crate::error::Result;
use crate::model::Model;
use crate::tokenizer::Tokenizer;
use container::Container;

/// Reads a model and its tokenizer. GGUF has no defaults for generation.
pub(super) fn load(path: &Path) -> Result<(Model, Tokenizer, GenerationConfig)> {
    let file = Container::open(path)?;
    let config = model::config(&file)?;
    let tokenizer = tokenizer::tokenizer(&file)?;
    Ok((model::load(&file, config)?, tokenizer, GenerationConfig::default()))
}

/// Describes a GGUF file from its header alone.
pub(super) fn describe(path: &Path) -> Result<Description> {
    let file = Container::open(path)?;
    let config = model::config(&file)?;
    let tensors = file.tensors().map(|(_, tensor)| (tensor.encoding.name().to_owned(), tensor.bytes.len()));
    let tokenizer = TokenizerSummary::new(&tokenizer::tokenizer(&file)?);
    Ok(Description::new(format!("GGUF version {}", file.version()), &config, tensors, file.len(), Some(tokenizer)))
}
