//! What a checkpoint is, without reading its weights.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;
use serde_json::{Map, Value};

use super::hf;
use crate::config::ModelConfig;
use crate::lora::LoraOptions;
use crate::tokenizer::Tokenizer;

/// What a checkpoint holds, for people and for programs.
#[derive(Debug, Clone, Serialize)]
pub struct Description {
    /// `Hugging Face folder`, or `GGUF` with its version.
    pub format: String,
    /// `llama` or `mistral`.
    pub architecture: String,
    /// Number of weights, a tied head counted once.
    pub parameters: usize,
    /// The shape, in the names of Hugging Face's `config.json`.
    pub config: Map<String, Value>,
    /// How the tensors are stored, by the name of the type.
    pub tensors: BTreeMap<String, TensorSummary>,
    /// The tokenizer, if there is one.
    pub tokenizer: Option<TokenizerSummary>,
    /// Size of the weight files in bytes.
    pub bytes: usize,
    /// The adapter on top; all else is the base model's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterSummary>,
}

/// What an adapter is.
#[derive(Debug, Clone, Serialize)]
pub struct AdapterSummary {
    /// Path of the base model.
    pub base: String,
    /// Number of weights.
    pub parameters: usize,
    /// The factor of B·A.
    pub scale: f64,
    /// Rank, targets and the rest.
    #[serde(flatten)]
    pub options: LoraOptions,
}

/// The tensors of one type.
#[derive(Debug, Clone, Default, Serialize)]
pub struct TensorSummary {
    /// How many there are.
    pub count: usize,
    /// Their size in bytes.
    pub bytes: usize,
}

/// What a tokenizer is.
#[derive(Debug, Clone, Serialize)]
pub struct TokenizerSummary {
    /// The kind of vocabulary, such as `BPE`.
    pub kind: &'static str,
    /// Number of token ids.
    pub vocab_size: usize,
    /// The token that starts a sequence.
    pub bos: Option<String>,
    /// The token that ends a response.
    pub eos: Option<String>,
    /// Whether texts are meant to start with BOS.
    pub adds_bos: bool,
    /// Whether there is a chat template.
    pub chat_template: bool,
}

impl Description {
    /// Puts a description together; `tensors` gives the type and the bytes of each tensor.
    pub(super) fn new(
        format: impl Into<String>,
        config: &ModelConfig,
        tensors: impl Iterator<Item = (String, usize)>,
        bytes: usize,
        tokenizer: Option<TokenizerSummary>,
    ) -> Self {
        let mut by_type: BTreeMap<String, TensorSummary> = BTreeMap::new();
        for (name, bytes) in tensors {
            let summary = by_type.entry(name).or_default();
            summary.count += 1;
            summary.bytes += bytes;
        }
        Self {
            format: format.into(),
            architecture: config.model_type.clone(),
            parameters: config.parameter_count().unwrap_or(usize::MAX),
            config: hf::to_json(config),
            tensors: by_type,
            tokenizer,
            bytes,
            adapter: None,
        }
    }
}

impl TokenizerSummary {
    /// Describes a tokenizer.
    pub(super) fn new(tokenizer: &Tokenizer) -> Self {
        let token = |id: Option<u32>| id.and_then(|id| tokenizer.token(id));
        Self {
            kind: tokenizer.kind(),
            vocab_size: tokenizer.vocab_size(),
            bos: token(tokenizer.bos()),
            eos: token(tokenizer.eos()),
            adds_bos: tokenizer.adds_bos(),
            chat_template: tokenizer.has_chat_template(),
        }
    }
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(AdapterSummary { base, parameters, scale, options }) = &self.adapter {
            let kind = if options.dora { "DoRA" } else { "LoRA" };
            let targets: Vec<_> = options.targets.iter().map(|target| target.name()).collect();
            writeln!(f, "adapter      {kind} of rank {}, scale {scale}, on {}", options.rank, targets.join(", "))?;
            writeln!(f, "  parameters {:.3} million ({parameters})", *parameters as f64 / 1e6)?;
            writeln!(f, "  base       {base}")?;
        }
        writeln!(f, "format       {}", self.format)?;
        writeln!(f, "architecture {}", self.architecture)?;
        writeln!(f, "parameters   {:.1} million ({})", self.parameters as f64 / 1e6, self.parameters)?;
        writeln!(f, "weight files {:.1} MB", self.bytes as f64 / 1e6)?;
        for (name, summary) in &self.tensors {
            writeln!(f, "  {name:<10} {} tensors, {:.1} MB", summary.count, summary.bytes as f64 / 1e6)?;
        }
        match &self.tokenizer {
            None => writeln!(f, "tokenizer    none")?,
            Some(tokenizer) => {
                let token = |token: &Option<String>| token.clone().unwrap_or_else(|| "none".to_owned());
                writeln!(f, "tokenizer    {}, {} tokens", tokenizer.kind, tokenizer.vocab_size)?;
                let adds = if tokenizer.adds_bos { "added to every prompt" } else { "not added" };
                writeln!(f, "  BOS        {} ({adds})", token(&tokenizer.bos))?;
                writeln!(f, "  EOS        {}", token(&tokenizer.eos))?;
                writeln!(f, "  template   {}", if tokenizer.chat_template { "yes" } else { "none" })?;
            }
        }
        writeln!(f, "config")?;
        for (name, value) in &self.config {
            writeln!(f, "  {name:<24} {value}")?;
        }
        Ok(())
    }
}
