//! The shape and the weights in a GGUF file of the architecture `llama`.

use std::collections::BTreeSet;

use super::container::{Container, Tensor};
use crate::config::{ModelConfig, OutputHead, RopeScaling};
use crate::error::{Error, Result};
use crate::model::{Layout, Model, ParamSpec};

const EMBEDDING: &str = "token_embd.weight";
const HEAD: &str = "output.weight";
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Values of the architecture that are read below, or that change nothing in what the model computes.
const UNDERSTOOD: &[&str] = &[
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.attention.key_length",
    "llama.attention.layer_norm_rms_epsilon",
    "llama.attention.value_length",
    "llama.block_count",
    "llama.context_length",
    "llama.embedding_length",
    "llama.expert_count",
    "llama.expert_used_count",
    "llama.feed_forward_length",
    "llama.rope.dimension_count",
    "llama.rope.freq_base",
    "llama.rope.scale_linear",
    "llama.rope.scaling.factor",
    "llama.rope.scaling.finetuned",
    "llama.rope.scaling.original_context_length",
    "llama.rope.scaling.type",
    "llama.tensor_data_layout",
    "llama.vocab_size",
];

/// Reads the shape.
pub(super) fn config(file: &Container) -> Result<ModelConfig> {
    let path = file.path().display();
    let unsupported = |what: String| Error::input(format!("{path} {what}, which is not supported. Use another model."));
    match file.text("general.architecture")? {
        Some("llama") => {}
        Some(other) => return Err(unsupported(format!("has the architecture {other}"))),
        None => return Err(Error::input(format!("{path} lacks the value general.architecture, which is needed."))),
    }
    if let Some(key) = file.keys().find(|key| key.starts_with("llama.") && !UNDERSTOOD.contains(key)) {
        return Err(unsupported(format!("sets the value {key}")));
    }
    if let Some(experts) = file.size("llama.expert_count")?.filter(|&n| n > 0) {
        return Err(unsupported(format!("is a mixture of {experts} experts")));
    }
    let required = |name: &str| -> Result<usize> {
        let size = file.size(&format!("llama.{name}"))?;
        size.ok_or_else(|| Error::input(format!("{path} lacks the value llama.{name}, which is needed.")))
    };
    let hidden_size = required("embedding_length")?;
    let heads = required("attention.head_count")?;
    let head_dim = match file.size("llama.attention.key_length")? {
        Some(width) => width,
        None => hidden_size.checked_div(heads).unwrap_or(0),
    };
    for name in ["llama.attention.value_length", "llama.rope.dimension_count"] {
        if let Some(width) = file.size(name)?.filter(|&width| width != head_dim) {
            return Err(unsupported(format!("has {name} {width} where a head is {head_dim} wide")));
        }
    }
    let embedding = file.tensor(EMBEDDING).and_then(|tensor| tensor.shape.first());
    let vocab_size = *embedding.ok_or_else(|| Error::input(format!("{path} lacks the tensor {EMBEDDING}.")))?;
    let rope_theta = file.number("llama.rope.freq_base")?.unwrap_or(10_000.0);
    let special = |name: &str| -> Result<Option<u32>> {
        let id = file.size(&format!("tokenizer.ggml.{name}_token_id"))?;
        id.map(|id| u32::try_from(id).map_err(|_| Error::input(format!("{path} has the {name} token {id}."))))
            .transpose()
    };
    let mut eos_token_ids = Vec::new();
    // End of text, of a turn, and of a message: a response may end with any of them.
    for id in [special("eos")?, special("eot")?, special("eom")?].into_iter().flatten() {
        if !eos_token_ids.contains(&id) {
            eos_token_ids.push(id);
        }
    }
    let config = ModelConfig {
        vocab_size,
        hidden_size,
        intermediate_size: required("feed_forward_length")?,
        num_hidden_layers: required("block_count")?,
        num_attention_heads: heads,
        num_key_value_heads: file.size("llama.attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        max_position_embeddings: required("context_length")?,
        rms_norm_eps: file.number("llama.attention.layer_norm_rms_epsilon")?.unwrap_or(1e-5),
        rope_theta,
        rope_scaling: rope_scaling(file, head_dim, rope_theta)?,
        tie_word_embeddings: file.tensor(HEAD).is_none(),
        model_type: "llama".to_owned(),
        bos_token_id: special("bos")?,
        eos_token_ids,
        head: OutputHead::Vocabulary,
    };
    config.validate(&path.to_string())?;
    Ok(config)
}

/// The scaling of rotary positions, from the file's values and from its table of frequency divisors.
fn rope_scaling(file: &Container, head_dim: usize, theta: f64) -> Result<RopeScaling> {
    let unsupported = |what: &str| {
        Error::input(format!("{} {what}, which is not supported. Use another model.", file.path().display()))
    };
    let named = match file.text("llama.rope.scaling.type")? {
        None | Some("none") => RopeScaling::Default,
        Some("linear") => RopeScaling::Linear { factor: file.number("llama.rope.scaling.factor")?.unwrap_or(1.0) },
        Some(other) => return Err(unsupported(&format!("has the rope scaling type {other}"))),
    };
    // The older name of linear scaling.
    let named = match file.number("llama.rope.scale_linear")? {
        Some(factor) if named == RopeScaling::Default && factor != 1.0 => RopeScaling::Linear { factor },
        _ => named,
    };
    let Some(tensor) = file.tensor(ROPE_FACTORS) else { return Ok(named) };
    let shape_fits = tensor.shape == [head_dim / 2];
    if !shape_fits || named != RopeScaling::Default {
        return Err(unsupported(&format!("has a table {ROPE_FACTORS} that does not fit its other rope settings")));
    }
    let mut divisors = vec![0.0; head_dim / 2];
    file.widen(tensor, &mut divisors);
    llama3_scaling(&divisors, theta)
        .ok_or_else(|| unsupported(&format!("has a table {ROPE_FACTORS} that is not the scaling of Llama 3")))
}

/// The Llama 3 scaling that divides the rotary frequencies by `divisors`, if there is one.
///
/// Every published Llama 3 scales from a context of 8192 with the factors 1 and 4; only the stretch differs, and it is
/// the divisor of the lowest frequency.
fn llama3_scaling(divisors: &[f32], theta: f64) -> Option<RopeScaling> {
    let (low, high, context) = (1.0, 4.0, 8192);
    let factor = f64::from(*divisors.last()?);
    let fits = divisors.iter().enumerate().all(|(i, &divisor)| {
        let wavelength = std::f64::consts::TAU * theta.powf(i as f64 / divisors.len() as f64);
        let smooth = ((f64::from(context) / wavelength - low) / (high - low)).clamp(0.0, 1.0);
        let expected = 1.0 / ((1.0 - smooth) / factor + smooth);
        (f64::from(divisor) - expected).abs() <= 1e-4 * expected
    });
    if divisors.iter().all(|&divisor| divisor == 1.0) {
        return Some(RopeScaling::Default);
    }
    let scaling = RopeScaling::Llama3 {
        factor,
        low_freq_factor: low,
        high_freq_factor: high,
        original_context: context as usize,
    };
    fits.then_some(scaling)
}

/// Reads the weights, widened to f32, in Hugging Face's order of rows.
pub(super) fn load(file: &Container, config: ModelConfig) -> Result<Model> {
    let path = file.path().display();
    // The densest type has 4 bits per weight, so this bounds the allocations by the size of the file.
    let needs = config.parameter_count().filter(|&needs| needs / 2 <= file.len());
    if needs.is_none() {
        return Err(Error::input(format!(
            "{path} describes a model of {} weights but has only {} bytes. It is damaged; fetch it again.",
            config.parameter_count().map_or("too many".to_owned(), |n| n.to_string()),
            file.len()
        )));
    }
    let layout = Layout::new(&config);
    let mut sources = Vec::with_capacity(layout.specs.len());
    for spec in &layout.specs {
        sources.push(find(file, spec)?);
    }
    let known: BTreeSet<String> = layout.specs.iter().map(|spec| gguf_name(&spec.name)).collect();
    if let Some((name, tensor)) = file.tensors().find(|(name, _)| *name != ROPE_FACTORS && !known.contains(*name)) {
        return Err(Error::input(format!(
            "{path} holds the tensor {name} of shape {:?}, which the models that are supported do not have. Use another \
             model.",
            tensor.shape
        )));
    }
    let mut weights = vec![0.0; layout.len];
    for (spec, tensor) in layout.specs.iter().zip(sources) {
        let rows = &mut weights[spec.range.clone()];
        file.widen(tensor, rows);
        if spec.name.ends_with("q_proj.weight") || spec.name.ends_with("k_proj.weight") {
            for head in rows.chunks_mut(config.head_dim * config.hidden_size) {
                halves_together(head, config.hidden_size);
            }
        }
    }
    Ok(Model { config, layout, weights })
}

fn find<'a>(file: &'a Container, spec: &ParamSpec) -> Result<&'a Tensor> {
    let (name, expected, path) = (gguf_name(&spec.name), &spec.shape, file.path().display());
    match file.tensor(&name) {
        None => Err(Error::input(format!(
            "The tensor {name} of shape {expected:?} is missing from {path}. The file is incomplete; fetch it again."
        ))),
        Some(tensor) if tensor.shape != *expected => Err(Error::input(format!(
            "In {path} the tensor {name} has the shape {:?}, but the file's own values make it {expected:?}. The file \
             is damaged; fetch it again.",
            tensor.shape
        ))),
        Some(tensor) => Ok(tensor),
    }
}

/// llama.cpp's name for a tensor of a Hugging Face checkpoint.
fn gguf_name(name: &str) -> String {
    match name {
        "model.embed_tokens.weight" => return EMBEDDING.to_owned(),
        "model.norm.weight" => return "output_norm.weight".to_owned(),
        "lm_head.weight" => return HEAD.to_owned(),
        _ => {}
    }
    let parts = [
        ("model.layers.", "blk."),
        ("input_layernorm", "attn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    parts.iter().fold(name.to_owned(), |name, (hf, gguf)| name.replace(hf, gguf))
}

/// Puts the rows of one head into Hugging Face's order.
///
/// Rotary positions turn pairs of rows. llama.cpp keeps the two of a pair next to each other (0, 1), (2, 3), …;
/// Hugging Face keeps all the first ones before all the second ones.
fn halves_together(head: &mut [f32], width: usize) {
    let interleaved = head.to_vec();
    let (first, second) = head.split_at_mut(interleaved.len() / 2);
    let pairs = interleaved.chunks_exact(2 * width);
    for ((first, second), pair) in first.chunks_exact_mut(width).zip(second.chunks_exact_mut(width)).zip(pairs) {
        first.copy_from_slice(&pair[..width]);
        second.copy_from_slice(&pair[width..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(gguf_name("model.layers.12.self_attn.o_proj.weight"), "blk.12.attn_output.weight");
        assert_eq!(gguf_name("model.layers.0.post_attention_layernorm.weight"), "blk.0.ffn_norm.weight");
        assert_eq!(gguf_name("model.norm.weight"), "output_norm.weight");
    }

    #[test]
    fn rows_of_a_head() {
        let mut head = [0., 0., 1., 1., 2., 2., 3., 3., 4., 4., 5., 5.];
        halves_together(&mut head, 2);
        assert_eq!(head, [0., 0., 2., 2., 4., 4., 1., 1., 3., 3., 5., 5.]);
    }

    #[test]
    fn divisors_of_llama_3() {
        // Llama 3.2 1B: head width 64, base 500000, stretch 32. The divisors as llama.cpp's converter computes them.
        let divisors: Vec<f32> = (0..32)
            .map(|i| {
                let wavelength = std::f64::consts::TAU * 500_000_f64.powf(f64::from(i) / 32.0);
                if wavelength < 8192.0 / 4.0 {
                    1.0
                } else if wavelength > 8192.0 {
                    32.0
                } else {
                    let smooth = (8192.0 / wavelength - 1.0) / (4.0 - 1.0);
                    (1.0 / ((1.0 - smooth) / 32.0 + smooth)) as f32
                }
            })
            .collect();
        let expected =
            RopeScaling::Llama3 { factor: 32.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192 };
        assert_eq!(llama3_scaling(&divisors, 500_000.0), Some(expected));
        assert_eq!(llama3_scaling(&[1.0; 32], 500_000.0), Some(RopeScaling::Default));
        let mut other = divisors;
        other[20] *= 1.01;
        assert_eq!(llama3_scaling(&other, 500_000.0), None);
        assert_eq!(llama3_scaling(&[f32::NAN; 32], 500_000.0), None);
    }
}
