//! `config.json` of a Hugging Face folder.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::checkpoint::fields::Fields;
use crate::config::{ModelConfig, OutputHead, RopeScaling};
use crate::error::Result;

/// Fields that change nothing in what the model computes.
const HARMLESS: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_flash_attn_2_enabled",
    "_model_name_or_path",
    "_name_or_path",
    "attn_implementation",
    "chunk_size_feed_forward",
    "do_sample",
    "dtype",
    "finetuning_task",
    "gradient_checkpointing",
    "id2label",
    "initializer_range",
    "is_llama_config",
    "keys_to_ignore_at_inference",
    "label2id",
    "license",
    "max_length",
    "max_sequence_length",
    "min_length",
    "model_max_length",
    "name_or_path",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    // The number of slices that a matrix product was cut into: the same sum, in another order.
    "pretraining_tp",
    "problem_type",
    "repetition_penalty",
    "return_dict",
    "task_specific_params",
    "temperature",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
    "use_return_dict",
];

/// The architectures that there are: model type, and whether there is a score head in the place of the vocabulary's.
const ARCHITECTURES: &[(&str, &str, bool)] = &[
    ("LlamaForCausalLM", "llama", false),
    ("MistralForCausalLM", "mistral", false),
    ("LlamaForSequenceClassification", "llama", true),
    ("MistralForSequenceClassification", "mistral", true),
];

/// Reads a model's shape. Absent fields have the defaults of `transformers`, save the sizes, which must be there.
///
/// # Errors
/// `Error::Input` that names any field that is missing, malformed, or asks for arithmetic that the engine does not do.
pub(crate) fn parse(json: &[u8], path: &Path) -> Result<ModelConfig> {
    let mut fields = Fields::parse(json, path)?;
    let (model_type, scores) = architecture(&mut fields)?;
    let head = if scores { score_head(&mut fields)? } else { OutputHead::Vocabulary };
    let mistral = model_type == "mistral";

    let required = |fields: &mut Fields, name: &str| {
        let size = fields.size(name)?;
        fields.required(name, size)
    };
    let hidden_size = required(&mut fields, "hidden_size")?;
    let heads = required(&mut fields, "num_attention_heads")?;
    let head_dim = match fields.size("head_dim")? {
        Some(width) => width,
        None if heads > 0 && hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => {
            let needs = "given, since hidden_size is not a multiple of num_attention_heads";
            return Err(fields.wrong("head_dim", &Value::Null, needs));
        }
    };
    let max_position_embeddings =
        fields.size("max_position_embeddings")?.unwrap_or(if mistral { 131_072 } else { 2048 });
    let (rope_theta, rope_scaling) = rope(&mut fields)?;
    let config = ModelConfig {
        vocab_size: required(&mut fields, "vocab_size")?,
        hidden_size,
        intermediate_size: required(&mut fields, "intermediate_size")?,
        num_hidden_layers: required(&mut fields, "num_hidden_layers")?,
        num_attention_heads: heads,
        num_key_value_heads: fields.size("num_key_value_heads")?.unwrap_or(heads),
        head_dim,
        // Up to the width of its window, attention over a sliding window is attention over everything.
        max_position_embeddings: match sliding_window(&mut fields, mistral)? {
            Some(window) => window.min(max_position_embeddings),
            None => max_position_embeddings,
        },
        rms_norm_eps: fields.number("rms_norm_eps")?.unwrap_or(1e-6),
        rope_theta,
        rope_scaling,
        tie_word_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
        model_type,
        bos_token_id: fields.token("bos_token_id")?,
        eos_token_ids: fields.tokens("eos_token_id")?,
        head,
    };

    fields.must_be("hidden_act", &[json!("silu")])?;
    for off in ["attention_bias", "mlp_bias", "rope_interleaved"] {
        fields.must_be(off, &[json!(false)])?;
    }
    for off in ["add_cross_attention", "is_decoder", "is_encoder_decoder", "tie_encoder_decoder"] {
        fields.must_be(off, &[json!(false)])?;
    }
    fields.must_be("pruned_heads", &[json!({})])?;
    for rate in ["attention_dropout", "hidden_dropout", "resid_pdrop"] {
        fields.must_be(rate, &[json!(0), json!(0.0)])?;
    }
    for name in HARMLESS {
        fields.take(name);
    }
    fields.finish()?;
    config.validate(&path.display().to_string())?;
    Ok(config)
}

/// `llama` or `mistral`, on which `architectures` and `model_type` must agree, and whether there is a score head.
fn architecture(fields: &mut Fields) -> Result<(String, bool)> {
    let named = fields.text("model_type")?;
    let architecture = fields.take("architectures");
    let known = match &architecture {
        None => None,
        Some(value) => {
            let only = value
                .as_array()
                .and_then(|names| if let [Value::String(name)] = &names[..] { Some(name) } else { None });
            let known = only.and_then(|name| ARCHITECTURES.iter().find(|(known, ..)| known == name));
            Some(known.ok_or_else(|| fields.unsupported("architectures", value))?)
        }
    };
    match (named.as_deref(), known) {
        (Some(name @ ("llama" | "mistral")), None) => Ok((name.to_owned(), false)),
        (Some(name), Some((_, other, _))) if name != *other => {
            let needs = format!("`{other}` to agree with architectures");
            Err(fields.wrong("model_type", &json!(name), &needs))
        }
        (_, Some((_, name, scores))) => Ok(((*name).to_owned(), *scores)),
        (Some(name), None) => Err(fields.unsupported("model_type", &json!(name))),
        (None, None) => fields.required("model_type", None),
    }
}

/// The head of a sequence classification, which must have one label. Without `num_labels` there are as many as
/// `id2label` names; `transformers` takes two where neither is given.
fn score_head(fields: &mut Fields) -> Result<OutputHead> {
    let named = fields.take("id2label").and_then(|labels| labels.as_object().map(Map::len));
    let labels = fields.size("num_labels")?.or(named).unwrap_or(2);
    if labels != 1 {
        return Err(fields.wrong("num_labels", &json!(labels), "1: a reward or cost model gives one number"));
    }
    Ok(OutputHead::Score { pad_token_id: fields.token("pad_token_id")? })
}

/// The width of Mistral's attention window in tokens. An absent field means the published default, `null` no window.
fn sliding_window(fields: &mut Fields, mistral: bool) -> Result<Option<usize>> {
    if !mistral {
        return fields.must_be("sliding_window", &[]).map(|()| None);
    }
    let absent = !fields.mentions("sliding_window");
    Ok(fields.size("sliding_window")?.or(absent.then_some(4096)))
}

/// The base and the scaling of rotary positions, from `rope_theta` and `rope_scaling` or, as newer files have it,
/// from `rope_parameters`.
fn rope(fields: &mut Fields) -> Result<(f64, RopeScaling)> {
    let theta = fields.number("rope_theta")?;
    fields.must_be("partial_rotary_factor", &[json!(1), json!(1.0)])?;
    let mut rope = match (fields.object("rope_scaling")?, fields.object("rope_parameters")?) {
        (Some(_), Some(_)) => {
            let needs = "absent where rope_parameters is given, since one would contradict the other";
            return Err(fields.wrong("rope_scaling", &json!("{…}"), needs));
        }
        (Some(rope), None) | (None, Some(rope)) => rope,
        (None, None) => return Ok((theta.unwrap_or(10_000.0), RopeScaling::Default)),
    };
    let theta = rope.number("rope_theta")?.or(theta).unwrap_or(10_000.0);
    let (new, old) = (rope.text("rope_type")?, rope.text("type")?);
    let kind = new.or(old).unwrap_or_else(|| "default".to_owned());
    let number = |rope: &mut Fields, name: &str| {
        let value = rope.number(name)?;
        rope.required(name, value)
    };
    let scaling = match kind.as_str() {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: number(&mut rope, "factor")? },
        "llama3" => {
            let original_context = rope.size("original_max_position_embeddings")?;
            RopeScaling::Llama3 {
                factor: number(&mut rope, "factor")?,
                low_freq_factor: number(&mut rope, "low_freq_factor")?,
                high_freq_factor: number(&mut rope, "high_freq_factor")?,
                original_context: rope.required("original_max_position_embeddings", original_context)?,
            }
        }
        other => return Err(rope.unsupported("rope_type", &json!(other))),
    };
    rope.must_be("partial_rotary_factor", &[json!(1), json!(1.0)])?;
    rope.finish()?;
    Ok((theta, scaling))
}

/// A `config.json` that `transformers` (4 and 5) and [`parse`] read as the same shape.
pub(crate) fn to_json(config: &ModelConfig) -> Map<String, Value> {
    let mistral = config.model_type == "mistral";
    let rope_scaling = match config.rope_scaling {
        RopeScaling::Default => Value::Null,
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_context,
        }),
    };
    let mut fields = Map::new();
    let mut set = |name: &str, value: Value| fields.insert(name.to_owned(), value);
    let scores = config.head.is_score();
    let architecture = ARCHITECTURES.iter().find(|(_, name, head)| *name == config.model_type && *head == scores);
    set("architectures", json!(architecture.map(|(name, ..)| vec![*name])));
    set("model_type", json!(config.model_type));
    set("vocab_size", json!(config.vocab_size));
    set("hidden_size", json!(config.hidden_size));
    set("intermediate_size", json!(config.intermediate_size));
    set("num_hidden_layers", json!(config.num_hidden_layers));
    set("num_attention_heads", json!(config.num_attention_heads));
    set("num_key_value_heads", json!(config.num_key_value_heads));
    set("head_dim", json!(config.head_dim));
    set("max_position_embeddings", json!(config.max_position_embeddings));
    if mistral {
        set("sliding_window", Value::Null);
    } else {
        set("attention_bias", json!(false));
        set("mlp_bias", json!(false));
    }
    set("hidden_act", json!("silu"));
    set("rms_norm_eps", json!(config.rms_norm_eps));
    set("rope_theta", json!(config.rope_theta));
    set("rope_scaling", rope_scaling);
    set("attention_dropout", json!(0.0));
    set("tie_word_embeddings", json!(config.tie_word_embeddings));
    set("bos_token_id", json!(config.bos_token_id));
    set("eos_token_id", token_ids(&config.eos_token_ids));
    if let OutputHead::Score { pad_token_id } = config.head {
        set("pad_token_id", json!(pad_token_id));
        set("num_labels", json!(1));
        set("id2label", json!({"0": "score"}));
        set("label2id", json!({"score": 0}));
    }
    set("torch_dtype", json!("float32"));
    fields
}

/// No id as `null`, one as a number, several as a list.
pub(crate) fn token_ids(ids: &[u32]) -> Value {
    match ids {
        [] => Value::Null,
        [id] => json!(id),
        ids => json!(ids),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 100, "hidden_size": 32,
            "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        })
    }

    fn parsed(edits: Value) -> Result<ModelConfig> {
        let mut config = small();
        for (name, value) in edits.as_object().unwrap() {
            config[name] = value.clone();
        }
        parse(config.to_string().as_bytes(), Path::new("m/config.json"))
    }

    #[test]
    fn absent_fields_have_the_defaults_of_transformers() {
        let config = parsed(json!({})).unwrap();
        assert_eq!((config.num_key_value_heads, config.head_dim, config.max_position_embeddings), (4, 8, 2048));
        assert_eq!((config.rms_norm_eps, config.rope_theta, config.rope_scaling), (1e-6, 1e4, RopeScaling::Default));
        assert!(!config.tie_word_embeddings && config.bos_token_id.is_none() && config.eos_token_ids.is_empty());
    }

    #[test]
    fn published_spellings_are_understood() {
        let old = parsed(json!({
            "_name_or_path": "x", "attention_bias": false, "mlp_bias": false, "hidden_act": "silu", "use_cache": true,
            "attention_dropout": 0.0, "initializer_range": 0.02, "pretraining_tp": 1, "torch_dtype": "bfloat16",
            "transformers_version": "4.44.0", "rope_interleaved": false, "is_llama_config": true, "bos_token_id": 1,
            "eos_token_id": [2, 3], "max_position_embeddings": 4096, "rope_theta": 500000.0, "quantization_config": null,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 512},
        }));
        let new = parsed(json!({
            "dtype": "float32", "head_dim": null, "bos_token_id": 1, "eos_token_id": [2, 3],
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8, "low_freq_factor": 1,
                                "high_freq_factor": 4, "original_max_position_embeddings": 512},
        }));
        let (old, new) = (old.unwrap(), new.unwrap());
        assert_eq!(old, new);
        assert_eq!((old.eos_token_ids, old.rope_theta), (vec![2, 3], 5e5));
        let linear = parsed(json!({"rope_scaling": {"type": "linear", "factor": 2.0}})).unwrap();
        assert_eq!(linear.rope_scaling, RopeScaling::Linear { factor: 2.0 });
    }

    #[test]
    fn the_context_of_mistral_ends_with_its_window() {
        let context = |extra: Value| {
            let mut edits = json!({"architectures": ["MistralForCausalLM"], "model_type": "mistral"});
            edits.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            parsed(edits).unwrap().max_position_embeddings
        };
        assert_eq!(context(json!({"sliding_window": 1000, "max_position_embeddings": 32768})), 1000);
        assert_eq!(context(json!({"sliding_window": 1000, "max_position_embeddings": 500})), 500);
        assert_eq!(context(json!({"sliding_window": null, "max_position_embeddings": 32768})), 32768);
        assert_eq!(context(json!({"max_position_embeddings": 32768})), 4096);
    }

    #[test]
    fn what_is_not_supported_is_named_with_its_value() {
        let cases = [
            (json!({"attention_bias": true}), "attention_bias to true"),
            (json!({"mlp_bias": true}), "mlp_bias to true"),
            (json!({"hidden_act": "gelu"}), "hidden_act to \"gelu\""),
            (json!({"attention_dropout": 0.1}), "attention_dropout to 0.1"),
            (json!({"quantization_config": {"bits": 4}}), "quantization_config to {\"bits\":4}"),
            (json!({"sliding_window": 4096}), "sliding_window to 4096"),
            (json!({"rope_scaling": {"type": "yarn", "factor": 2}}), "rope_scaling.rope_type to \"yarn\""),
            (json!({"rope_parameters": {"rope_type": "default", "mscale": 2}}), "rope_parameters.mscale to 2"),
            (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor to 0.5"),
            (json!({"architectures": ["LlamaForTokenClassification"]}), "architectures to"),
            (json!({"num_labels": 1}), "num_labels to 1"),
            (json!({"architectures": null, "model_type": "qwen2"}), "model_type to \"qwen2\""),
            (json!({"new_trick": true}), "new_trick to true"),
            (json!({"auto_map": {"AutoModel": "x"}}), "auto_map to"),
        ];
        for (edits, expected) in cases {
            let error = parsed(edits).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("m/config.json"), "{error}");
        }
    }

    #[test]
    fn a_sequence_classification_with_one_label_is_a_score_head() {
        let classifier = |extra: Value| {
            let mut edits = json!({"architectures": ["LlamaForSequenceClassification"], "pad_token_id": 3});
            edits.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            parsed(edits)
        };
        for one in [json!({"num_labels": 1}), json!({"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}})] {
            let config = classifier(one).unwrap();
            assert_eq!(config.head, OutputHead::Score { pad_token_id: Some(3) });
            let written = Value::Object(to_json(&config)).to_string();
            assert_eq!(parse(written.as_bytes(), Path::new("m/config.json")).unwrap(), config);
        }
        for more in [json!({}), json!({"num_labels": 3}), json!({"id2label": {"0": "a", "1": "b"}})] {
            let error = classifier(more).unwrap_err().to_string();
            assert!(error.contains("num_labels is") && error.contains("one number"), "{error}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let cases = [
            (json!({"vocab_size": null}), "lacks the field vocab_size"),
            (json!({"hidden_size": -32}), "hidden_size is -32"),
            (json!({"hidden_size": "32"}), "hidden_size is \"32\""),
            (json!({"num_attention_heads": 0}), "head_dim is null"),
            (json!({"num_attention_heads": 0, "head_dim": 8}), "num_attention_heads is 0"),
            (json!({"num_hidden_layers": 0}), "num_hidden_layers is 0"),
            (json!({"num_hidden_layers": 5_000_000_000_u64}), "num_hidden_layers is 5000000000"),
            (json!({"num_attention_heads": 5}), "head_dim is null"),
            (json!({"num_key_value_heads": 3}), "not a multiple of num_key_value_heads 3"),
            (json!({"head_dim": 7}), "head_dim is 7"),
            (json!({"rms_norm_eps": 0}), "rms_norm_eps is 0"),
            (json!({"rope_theta": -1}), "rope_theta is -1"),
            (json!({"rope_scaling": {"type": "linear"}}), "lacks the field rope_scaling.factor"),
            (json!({"rope_scaling": {"type": "linear", "factor": 0.5}}), "factor is 0.5"),
            (json!({"rope_scaling": [], "rope_theta": 1e4}), "rope_scaling is []"),
            (
                json!({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4,
                                     "original_max_position_embeddings": 512}}),
                "low_freq_factor 4",
            ),
            (json!({"eos_token_id": -1}), "eos_token_id is -1"),
            (json!({"eos_token_id": [2, "x"]}), "eos_token_id is [2,\"x\"]"),
            (json!({"bos_token_id": 100}), "bos_token_id is 100, which is beyond the vocabulary of 100"),
            (
                json!({"vocab_size": u32::MAX, "hidden_size": 1 << 30, "intermediate_size": u32::MAX,
                    "num_hidden_layers": u32::MAX}),
                "more weights than can be counted",
            ),
            (json!({"model_type": "mistral"}), "model_type is \"mistral\", but must be `llama`"),
        ];
        for (edits, expected) in cases {
            let error = parsed(edits).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("m/config.json"), "{error}");
        }
        let error = parse(b"{\"vocab_size\": ", Path::new("m/config.json")).unwrap_err().to_string();
        assert!(error.contains("m/config.json is not a JSON object"), "{error}");
    }

    #[test]
    fn the_number_of_weights_is_that_of_the_layout() {
        for tie in [false, true] {
            let edits = json!({"tie_word_embeddings": tie, "num_key_value_heads": 2, "head_dim": 6});
            let config = parsed(edits).unwrap();
            assert_eq!(config.parameter_count(), Some(crate::Layout::new(&config).len));
            let config = ModelConfig { head: OutputHead::Score { pad_token_id: None }, ..config };
            assert_eq!(config.parameter_count(), Some(crate::Layout::new(&config).len));
        }
    }
}
