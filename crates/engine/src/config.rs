//! The shape of a decoder of the Llama family.

use crate::error::{Error, Result};

/// How rotary positions are stretched beyond the context that a model was trained with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Positions as they are.
    Default,
    /// All frequencies divided by `factor` (position interpolation, arXiv 2306.15595).
    Linear {
        /// The stretch, ≥ 1.
        factor: f64,
    },
    /// Low frequencies divided by `factor`, high ones kept, a ramp between (Llama 3.1).
    Llama3 {
        /// The stretch of the low frequencies, ≥ 1.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are stretched fully.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length in tokens that the model was first trained with.
        original_context: usize,
    },
}

impl RopeScaling {
    /// Checks the ranges of the factors; the error says what is wrong.
    fn validate(&self) -> std::result::Result<(), String> {
        match *self {
            Self::Linear { factor } | Self::Llama3 { factor, .. } if !(factor.is_finite() && factor >= 1.0) => {
                Err(format!("the rope scaling factor is {factor}, but must be at least 1"))
            }
            Self::Llama3 { low_freq_factor: low, high_freq_factor: high, original_context, .. }
                if !(low > 0.0 && low < high && high.is_finite() && original_context > 0) =>
            {
                Err(format!(
                    "the rope scaling has low_freq_factor {low}, high_freq_factor {high} and \
                     original_max_position_embeddings {original_context}, but needs 0 < low < high and a context above 0"
                ))
            }
            _ => Ok(()),
        }
    }
}

/// What a decoder makes of its last hidden rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputHead {
    /// Logits of the next token: a language model.
    Vocabulary,
    /// One number for a text, from the row of its last token: a reward or cost model. Hugging Face's sequence
    /// classification with one label and no bias.
    Score {
        /// The token that fills batches up. As in `transformers`, a text ends before the ones at its end.
        pad_token_id: Option<u32>,
    },
}

impl OutputHead {
    /// Whether it gives scores of texts.
    pub fn is_score(self) -> bool {
        matches!(self, Self::Score { .. })
    }
}

/// The shape of a Llama-type decoder, in the names of Hugging Face's `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Number of token ids.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated feed-forward layer.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key and value heads; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// The longest sequence in tokens.
    pub max_position_embeddings: usize,
    /// The ε of RMS normalisation.
    pub rms_norm_eps: f64,
    /// The base of the rotary frequencies.
    pub rope_theta: f64,
    /// The stretch of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Whether the vocabulary head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// Hugging Face's `model_type`: `llama` or `mistral`.
    pub model_type: String,
    /// The token that starts a sequence, if the model has one.
    pub bos_token_id: Option<u32>,
    /// The tokens that end a response.
    pub eos_token_ids: Vec<u32>,
    /// What stands on top of the blocks.
    pub head: OutputHead,
}

impl ModelConfig {
    /// Width of the query part of a fused projection: heads × head width.
    pub fn query_width(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Width of the key part (and of the value part) of a fused projection.
    pub fn key_value_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Number of weights, a tied head counted once; `None` when it does not fit into a `usize`.
    pub fn parameter_count(&self) -> Option<usize> {
        let (d, f) = (self.hidden_size, self.intermediate_size);
        let q = self.num_attention_heads.checked_mul(self.head_dim)?;
        let kv = self.num_key_value_heads.checked_mul(self.head_dim)?;
        let attention = q.checked_add(kv)?.checked_mul(2)?.checked_mul(d)?;
        let feed_forward = d.checked_mul(f)?.checked_mul(3)?;
        let block = attention.checked_add(feed_forward)?.checked_add(d.checked_mul(2)?)?;
        let embedding = self.vocab_size.checked_mul(d)?;
        let head = match self.head {
            OutputHead::Vocabulary if self.tie_word_embeddings => 0,
            OutputHead::Vocabulary => embedding,
            OutputHead::Score { .. } => d,
        };
        let blocks = block.checked_mul(self.num_hidden_layers)?;
        blocks.checked_add(embedding)?.checked_add(head)?.checked_add(d)
    }

    /// Checks that the sizes fit together and that special tokens are in the vocabulary.
    ///
    /// # Errors
    /// [`Error::Input`] that names the field and `source`, the file that the shape was read from.
    pub fn validate(&self, source: &str) -> Result<()> {
        let wrong = |what: String| Err(Error::input(format!("{source} does not describe a usable model: {what}.")));
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        for (name, size) in sizes {
            if size == 0 || size > u32::MAX as usize {
                return wrong(format!("{name} is {size}, but must be between 1 and {}", u32::MAX));
            }
        }
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if !heads.is_multiple_of(kv_heads) {
            return wrong(format!("num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"));
        }
        if !self.head_dim.is_multiple_of(2) {
            return wrong(format!("head_dim is {}, but must be even for rotary positions", self.head_dim));
        }
        for (name, value) in [("rms_norm_eps", self.rms_norm_eps), ("rope_theta", self.rope_theta)] {
            if !(value.is_finite() && value > 0.0) {
                return wrong(format!("{name} is {value}, but must be greater than 0"));
            }
        }
        if let Err(what) = self.rope_scaling.validate() {
            return wrong(what);
        }
        let bos = self.bos_token_id.map(|id| ("bos_token_id", id));
        for (name, id) in bos.into_iter().chain(self.eos_token_ids.iter().map(|&id| ("eos_token_id", id))) {
            if id as usize >= self.vocab_size {
                return wrong(format!("{name} is {id}, which is beyond the vocabulary of {}", self.vocab_size));
            }
        }
        match self.parameter_count() {
            Some(_) => Ok(()),
            None => wrong("its sizes multiply to more weights than can be counted".into()),
        }
    }
}
