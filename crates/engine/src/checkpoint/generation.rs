//! `generation_config.json`: how a model's publisher generates with it.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::fields::Fields;
use super::hf::token_ids;
use crate::error::Result;

/// Defaults for generation, as a checkpoint carries them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationConfig {
    /// The token that starts a sequence.
    pub bos_token_id: Option<u32>,
    /// The tokens that end a response.
    pub eos_token_ids: Vec<u32>,
    /// The most tokens to generate after the prompt.
    pub max_new_tokens: Option<usize>,
    /// The sampling temperature.
    pub temperature: Option<f64>,
    /// Sample only among this many most likely tokens; 0 for all.
    pub top_k: Option<usize>,
    /// Sample only among the most likely tokens that together have this probability.
    pub top_p: Option<f64>,
    /// All other fields as they were found; they are written back unchanged.
    pub other: Map<String, Value>,
}

impl GenerationConfig {
    /// Reads the contents of a `generation_config.json`.
    pub(super) fn parse(json: &[u8], path: &Path) -> Result<Self> {
        let mut fields = Fields::parse(json, path)?;
        Ok(Self {
            bos_token_id: fields.token("bos_token_id")?,
            eos_token_ids: fields.tokens("eos_token_id")?,
            max_new_tokens: fields.size("max_new_tokens")?,
            temperature: fields.number("temperature")?,
            top_k: fields.size("top_k")?,
            top_p: fields.number("top_p")?,
            other: fields.into_rest(),
        })
    }

    /// The contents of a `generation_config.json`.
    pub(super) fn to_json(&self) -> Map<String, Value> {
        let known = [
            ("bos_token_id", json!(self.bos_token_id)),
            ("eos_token_id", token_ids(&self.eos_token_ids)),
            ("max_new_tokens", json!(self.max_new_tokens)),
            ("temperature", json!(self.temperature)),
            ("top_k", json!(self.top_k)),
            ("top_p", json!(self.top_p)),
        ];
        let known = known.into_iter().filter(|(_, value)| !value.is_null());
        known.map(|(name, value)| (name.to_owned(), value)).chain(self.other.clone()).collect()
    }
}
