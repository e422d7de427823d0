//! What several integration tests share.
#![allow(dead_code, unused_imports, unreachable_pub, clippy::unwrap_used, clippy::expect_used)]

pub mod gguf;
mod shared_data;
pub mod stories;

use std::path::Path;

use engine::tokenizer::Tokenizer;
use engine::{ModelConfig, OutputHead, RopeScaling};
use serde_json::{Map, Value, json};

pub(crate) use shared_data::{shared, smollm2};

/// The shape of a tiny model: grouped queries, an untied head, scaled rope, and a vocabulary for [`tokenizer`].
pub fn tiny_config() -> ModelConfig {
    ModelConfig {
        vocab_size: 260,
        hidden_size: 32,
        intermediate_size: 64,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        max_position_embeddings: 128,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::Default,
        tie_word_embeddings: false,
        model_type: "llama".to_owned(),
        bos_token_id: Some(256),
        eos_token_ids: vec![257],
        head: OutputHead::Vocabulary,
    }
}

/// The tokens that stand for the 256 bytes, in the order of the tokenizer's alphabet.
pub fn byte_tokens() -> Vec<String> {
    let mut alphabet: Vec<char> = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    alphabet.into_iter().map(String::from).collect()
}

/// A `tokenizer.json` of one token per byte, `<s>` (256), `</s>` (257) and the merge `t`+`h` (258).
pub fn tokenizer_json() -> Value {
    let mut tokens = byte_tokens();
    tokens.extend(["<s>", "</s>", "th"].map(str::to_owned));
    let vocab: Map<String, Value> =
        tokens.into_iter().zip(0..).map(|(token, id): (_, i32)| (token, id.into())).collect();
    let added = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                    "pad_type_id": 0, "pad_token": "!"},
        "added_tokens": [added(256, "<s>"), added(257, "</s>")],
        "normalizer": null,
        "pre_tokenizer": bytes,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}},
        },
        "decoder": bytes,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab,
                  "merges": [["t", "h"]]},
    })
}

/// A tokenizer of 259 tokens with BOS, EOS and a chat template.
pub fn tokenizer() -> Tokenizer {
    let template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}";
    Tokenizer::from_json(tokenizer_json().to_string().as_bytes(), Some("<s>"), Some("</s>"), Some(template)).unwrap()
}

/// The names of everything in a folder, sorted.
pub fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
