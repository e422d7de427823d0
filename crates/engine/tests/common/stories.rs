//! The file format of llama2.c's first models, in which the 260K-parameter story model is published.

use std::path::Path;

use engine::{Model, ModelConfig, OutputHead, RopeScaling};

/// Reads a model: seven i32 (width, feed-forward width, blocks, heads, key–value heads, vocabulary, context), then f32
/// tensors, each kind for all blocks at once. A vocabulary above 0 means that the head is tied.
pub fn load_stories(path: &Path) -> Model {
    let bytes = std::fs::read(path).unwrap();
    let (header, body) = bytes.split_at(28);
    let header: Vec<i32> = header.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b)).collect();
    let size = |i: usize| header[i].unsigned_abs() as usize;
    let config = ModelConfig {
        vocab_size: size(5),
        hidden_size: size(0),
        intermediate_size: size(1),
        num_hidden_layers: size(2),
        num_attention_heads: size(3),
        num_key_value_heads: size(4),
        head_dim: size(0) / size(3),
        max_position_embeddings: size(6),
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::Default,
        tie_word_embeddings: header[5] > 0,
        model_type: "llama".to_owned(),
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
        head: OutputHead::Vocabulary,
    };
    let numbers: Vec<f32> = body.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let mut rest = numbers.as_slice();
    let mut take = |len: usize| rest.split_off(..len).expect("the file is too short");

    let (d, layers) = (config.hidden_size, config.num_hidden_layers);
    let (q, kv, f) = (config.query_width() * d, config.key_value_width() * d, config.intermediate_size * d);
    let embedding = take(config.vocab_size * d);
    let [attention_norm, wq, wk, wv, wo, ffn_norm, gate, down, up] = [d, q, kv, kv, q, d, f, f, f].map(|n| {
        let all = take(n * layers);
        all.chunks(n).map(<[f32]>::to_vec).collect::<Vec<_>>()
    });
    let final_norm = take(d);
    take(config.max_position_embeddings * config.head_dim); // tables of cosines and sines
    let mut weights = embedding.to_vec();
    for i in 0..layers {
        weights.extend(&attention_norm[i]);
        weights.extend(halves_together(&wq[i], config.head_dim, d));
        weights.extend(halves_together(&wk[i], config.head_dim, d));
        for tensor in [&wv, &wo, &ffn_norm, &gate, &up, &down] {
            weights.extend(&tensor[i]);
        }
    }
    weights.extend(final_norm);
    if !config.tie_word_embeddings {
        weights.extend(take(config.vocab_size * d));
    }
    assert!(rest.is_empty(), "{} numbers are left over", rest.len());
    Model::new(config, weights)
}

/// Rotary pairs are neighbouring rows in this format: put the first rows of all pairs before the second ones.
fn halves_together(rows: &[f32], head_dim: usize, width: usize) -> Vec<f32> {
    let row = |i: usize| &rows[i * width..(i + 1) * width];
    let heads = rows.len() / width / head_dim;
    let order = (0..heads).flat_map(|head| {
        let pairs = (0..2).flat_map(move |second| (0..head_dim / 2).map(move |i| 2 * i + second));
        pairs.map(move |i| head * head_dim + i)
    });
    order.flat_map(|i| row(i).to_vec()).collect()
}
