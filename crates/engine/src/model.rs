//! A model: its shape and all its weights in one flat vector.
//!
//! Weights, gradients and optimizer moments share one [`Layout`], so "for every parameter" is a loop
//! over a slice, and matrices that are applied to the same input (query, key and value; gate and up)
//! lie next to each other and are multiplied as one.

use std::ops::Range;

use rand::SeedableRng;
use rand::distr::{Distribution, StandardUniform};
use rand_chacha::ChaCha8Rng;

use crate::config::{ModelConfig, OutputHead};

/// One tensor of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParamSpec {
    /// The name in a Hugging Face checkpoint, such as `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// `[out, in]` for matrices, `[width]` for norms.
    pub shape: Vec<usize>,
    /// Where the tensor lies in the flat vector, row-major.
    pub range: Range<usize>,
}

impl ParamSpec {
    /// Whether weight decay applies: to matrices, not to the gains of norms.
    pub fn decays(&self) -> bool {
        self.shape.len() > 1
    }
}

/// Where the tensors of one block lie in the flat vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockLayout {
    /// Gain of the norm before attention, `[hidden]`.
    pub attention_norm: Range<usize>,
    /// Query, key and value projections, `[(heads + 2·kv_heads)·head_dim, hidden]`.
    pub qkv: Range<usize>,
    /// Output projection of attention, `[hidden, heads·head_dim]`.
    pub output: Range<usize>,
    /// Gain of the norm before the feed-forward layer, `[hidden]`.
    pub feed_forward_norm: Range<usize>,
    /// Gate and up projections, `[2·intermediate, hidden]`.
    pub gate_up: Range<usize>,
    /// Down projection, `[hidden, intermediate]`.
    pub down: Range<usize>,
}

impl BlockLayout {
    /// Where the matrices of a product lie.
    pub(crate) fn product(&self, product: Product) -> &Range<usize> {
        match product {
            Product::Qkv => &self.qkv,
            Product::Output => &self.output,
            Product::GateUp => &self.gate_up,
            Product::Down => &self.down,
        }
    }
}

/// The matrix products of a block, each of one input with the matrices that are applied to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Product {
    Qkv,
    Output,
    GateUp,
    Down,
}

impl Product {
    /// All of them, in the order of a block.
    pub(crate) const ALL: [Self; 4] = [Self::Qkv, Self::Output, Self::GateUp, Self::Down];

    /// Width of the input.
    pub(crate) fn inputs(self, config: &ModelConfig) -> usize {
        match self {
            Self::Qkv | Self::GateUp => config.hidden_size,
            Self::Output => config.query_width(),
            Self::Down => config.intermediate_size,
        }
    }
}

/// Where every tensor of a model lies in the flat vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// All tensors, in order.
    pub specs: Vec<ParamSpec>,
    /// Token embedding, `[vocab, hidden]`.
    pub embedding: Range<usize>,
    /// The blocks, first to last.
    pub blocks: Vec<BlockLayout>,
    /// Gain of the last norm, `[hidden]`.
    pub final_norm: Range<usize>,
    /// Vocabulary head, `[vocab, hidden]`, the embedding's range when tied; or score head, `[1, hidden]`.
    pub head: Range<usize>,
    /// Total number of weights.
    pub len: usize,
}

impl Layout {
    /// The layout of a model of the given shape.
    pub fn new(config: &ModelConfig) -> Self {
        let mut specs: Vec<ParamSpec> = Vec::new();
        let mut add = |name: String, shape: &[usize]| {
            let start = specs.last().map_or(0, |s| s.range.end);
            let range = start..start + shape.iter().product::<usize>();
            specs.push(ParamSpec { name, shape: shape.to_vec(), range: range.clone() });
            range
        };
        let (d, f) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.query_width(), config.key_value_width());
        let embedding = add("model.embed_tokens.weight".into(), &[config.vocab_size, d]);
        let mut blocks = Vec::with_capacity(config.num_hidden_layers);
        for i in 0..config.num_hidden_layers {
            let p = format!("model.layers.{i}");
            let attention_norm = add(format!("{p}.input_layernorm.weight"), &[d]);
            let query = add(format!("{p}.self_attn.q_proj.weight"), &[q, d]);
            add(format!("{p}.self_attn.k_proj.weight"), &[kv, d]);
            let value = add(format!("{p}.self_attn.v_proj.weight"), &[kv, d]);
            let output = add(format!("{p}.self_attn.o_proj.weight"), &[d, q]);
            let feed_forward_norm = add(format!("{p}.post_attention_layernorm.weight"), &[d]);
            let gate = add(format!("{p}.mlp.gate_proj.weight"), &[f, d]);
            let up = add(format!("{p}.mlp.up_proj.weight"), &[f, d]);
            let down = add(format!("{p}.mlp.down_proj.weight"), &[d, f]);
            blocks.push(BlockLayout {
                attention_norm,
                qkv: query.start..value.end,
                output,
                feed_forward_norm,
                gate_up: gate.start..up.end,
                down,
            });
        }
        let final_norm = add("model.norm.weight".into(), &[d]);
        let head = match config.head {
            OutputHead::Vocabulary if config.tie_word_embeddings => embedding.clone(),
            OutputHead::Vocabulary => add("lm_head.weight".into(), &[config.vocab_size, d]),
            OutputHead::Score { .. } => add("score.weight".into(), &[1, d]),
        };
        let len = specs.last().map_or(0, |s| s.range.end);
        Self { specs, embedding, blocks, final_norm, head, len }
    }
}

/// A decoder's shape and weights.
#[derive(Debug, Clone)]
pub struct Model {
    /// The shape.
    pub config: ModelConfig,
    /// Where each tensor lies in `weights`.
    pub layout: Layout,
    /// All weights, f32.
    pub weights: Vec<f32>,
}

impl Model {
    /// A model with the given weights.
    ///
    /// # Panics
    /// If the number of weights is not that of the layout.
    pub fn new(config: ModelConfig, weights: Vec<f32>) -> Self {
        let layout = Layout::new(&config);
        assert_eq!(weights.len(), layout.len, "the number of weights does not fit the layout");
        Self { config, layout, weights }
    }

    /// A model with random weights: normal with standard deviation `std` for matrices, 1 for norms.
    pub fn random(config: ModelConfig, std: f32, seed: u64) -> Self {
        let layout = Layout::new(&config);
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut weights = vec![1.0; layout.len];
        for spec in layout.specs.iter().filter(|s| s.decays()) {
            for pair in weights[spec.range.clone()].chunks_mut(2) {
                // Box–Muller, with u in (0, 1] so that the logarithm is finite
                let u: f64 = 1.0 - Distribution::<f64>::sample(&StandardUniform, &mut rng);
                let v: f64 = StandardUniform.sample(&mut rng);
                let radius = f64::from(std) * (-2.0 * u.ln()).sqrt();
                let (sin, cos) = (std::f64::consts::TAU * v).sin_cos();
                for (weight, part) in pair.iter_mut().zip([cos, sin]) {
                    *weight = (radius * part) as f32;
                }
            }
        }
        Self { config, layout, weights }
    }

    /// The same blocks under a score head of zeros, so that every text has the score 0.
    ///
    /// `pad_token_id` is as in [`OutputHead::Score`].
    pub fn with_score_head(self, pad_token_id: Option<u32>) -> Self {
        let config = ModelConfig { head: OutputHead::Score { pad_token_id }, ..self.config };
        let layout = Layout::new(&config);
        let mut weights = self.weights;
        // a head of its own is behind everything else
        weights.truncate(layout.head.start);
        weights.resize(layout.len, 0.0);
        Self { config, layout, weights }
    }

    /// A hash of shape and weights that names this model: 64 hexadecimal digits.
    pub fn hash(&self) -> String {
        let mut hash = ModelHash::new(&self.config);
        hash.update(&self.weights);
        hash.finish()
    }
}

/// [`Model::hash`] of a model whose weights come in parts.
#[derive(Debug, Clone)]
pub struct ModelHash(blake3::Hasher);

impl ModelHash {
    /// Before the first weight.
    pub fn new(config: &ModelConfig) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(format!("{config:?}").as_bytes());
        Self(hasher)
    }

    /// Adds the next weights, in the order of the layout.
    pub fn update(&mut self, weights: &[f32]) {
        hash_weights(&mut self.0, weights);
    }

    /// 64 hexadecimal digits.
    pub fn finish(&self) -> String {
        self.0.finalize().to_hex().to_string()
    }
}

/// Adds weights to a hash.
pub(crate) fn hash_weights(hasher: &mut blake3::Hasher, weights: &[f32]) {
    for chunk in weights.chunks(1 << 16) {
        let bytes: Vec<u8> = chunk.iter().flat_map(|w| w.to_le_bytes()).collect();
        hasher.update(&bytes);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::config::RopeScaling;

    /// A model small enough for finite differences: two blocks, grouped heads, untied.
    pub(crate) fn tiny_config() -> ModelConfig {
        ModelConfig {
            vocab_size: 11,
            hidden_size: 12,
            intermediate_size: 20,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 4,
            max_position_embeddings: 64,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::Default,
            tie_word_embeddings: false,
            model_type: "llama".into(),
            bos_token_id: Some(1),
            eos_token_ids: vec![2],
            head: OutputHead::Vocabulary,
        }
    }

    #[test]
    fn the_layout_covers_the_weights_without_gaps() {
        for tie_word_embeddings in [false, true] {
            let layout = Layout::new(&ModelConfig { tie_word_embeddings, ..tiny_config() });
            let mut end = 0;
            for spec in &layout.specs {
                assert_eq!(spec.range.start, end);
                assert_eq!(spec.range.len(), spec.shape.iter().product::<usize>());
                end = spec.range.end;
            }
            assert_eq!(end, layout.len);
            assert_eq!(layout.head == layout.embedding, tie_word_embeddings);
        }
    }

    #[test]
    fn the_hash_sees_every_weight() {
        let model = Model::random(tiny_config(), 0.1, 1);
        let mut other = model.clone();
        assert_eq!(model.hash(), other.hash());
        *other.weights.last_mut().unwrap() += 1e-6;
        assert_ne!(model.hash(), other.hash());
    }
}
