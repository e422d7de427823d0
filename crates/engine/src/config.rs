//! The shape of a decoder of the Llama family.

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
}
