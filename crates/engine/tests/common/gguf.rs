//! A writer of small GGUF files.

use half::{bf16, f16};

use engine::{Model, RopeScaling};

/// A GGUF file in the making.
#[derive(Default)]
pub struct Writer {
    values: Vec<u8>,
    value_count: u64,
    tensors: Vec<Tensor>,
}

struct Tensor {
    name: String,
    shape: Vec<usize>,
    kind: u32,
    data: Vec<u8>,
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

impl Writer {
    fn value(&mut self, key: &str, kind: u32, bytes: &[u8]) -> &mut Self {
        text(&mut self.values, key);
        self.values.extend(kind.to_le_bytes());
        self.values.extend(bytes);
        self.value_count += 1;
        self
    }

    fn list(&mut self, key: &str, kind: u32, len: usize, elements: &[u8]) -> &mut Self {
        let header = [kind.to_le_bytes().to_vec(), (len as u64).to_le_bytes().to_vec(), elements.to_vec()];
        self.value(key, 9, &header.concat())
    }

    pub fn u32(&mut self, key: &str, value: u32) -> &mut Self {
        self.value(key, 4, &value.to_le_bytes())
    }

    pub fn f32(&mut self, key: &str, value: f32) -> &mut Self {
        self.value(key, 6, &value.to_le_bytes())
    }

    pub fn flag(&mut self, key: &str, value: bool) -> &mut Self {
        self.value(key, 7, &[value.into()])
    }

    pub fn text(&mut self, key: &str, value: &str) -> &mut Self {
        let mut bytes = Vec::new();
        text(&mut bytes, value);
        self.value(key, 8, &bytes)
    }

    pub fn texts<T: AsRef<str>>(&mut self, key: &str, values: &[T]) -> &mut Self {
        let mut bytes = Vec::new();
        values.iter().for_each(|value| text(&mut bytes, value.as_ref()));
        self.list(key, 8, values.len(), &bytes)
    }

    pub fn i32s(&mut self, key: &str, values: &[i32]) -> &mut Self {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.list(key, 5, values.len(), &bytes)
    }

    pub fn f32s(&mut self, key: &str, values: &[f32]) -> &mut Self {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.list(key, 6, values.len(), &bytes)
    }

    /// Adds a tensor whose shape is given rows first.
    pub fn tensor(&mut self, name: &str, shape: &[usize], kind: u32, data: Vec<u8>) -> &mut Self {
        self.tensors.push(Tensor { name: name.to_owned(), shape: shape.to_vec(), kind, data });
        self
    }

    /// How many bytes come before the tensors' data.
    pub fn header_len(&self) -> usize {
        self.header().len()
    }

    /// The bytes of the file, version 3.
    pub fn build(&self) -> Vec<u8> {
        let mut file = self.header();
        for tensor in &self.tensors {
            file.extend(&tensor.data);
            file.resize(file.len().next_multiple_of(32), 0);
        }
        file
    }

    fn header(&self) -> Vec<u8> {
        let mut file = b"GGUF\x03\0\0\0".to_vec();
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend(self.value_count.to_le_bytes());
        file.extend(&self.values);
        let mut offset = 0_u64;
        for tensor in &self.tensors {
            text(&mut file, &tensor.name);
            file.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().rev().for_each(|&size| file.extend((size as u64).to_le_bytes()));
            file.extend(tensor.kind.to_le_bytes());
            file.extend(offset.to_le_bytes());
            offset += tensor.data.len().next_multiple_of(32) as u64;
        }
        file.resize(file.len().next_multiple_of(32), 0);
        file
    }

    /// Adds a model's shape and its weights, each tensor stored as `kind` says by its GGUF name, and rounds the model's
    /// own weights to what was stored.
    pub fn model(&mut self, model: &mut Model, kind: impl Fn(&str) -> u32) -> &mut Self {
        let c = model.config.clone();
        assert_eq!(c.rope_scaling, RopeScaling::Default);
        self.text("general.architecture", "llama");
        self.u32("llama.block_count", c.num_hidden_layers as u32);
        self.u32("llama.context_length", c.max_position_embeddings as u32);
        self.u32("llama.embedding_length", c.hidden_size as u32);
        self.u32("llama.feed_forward_length", c.intermediate_size as u32);
        self.u32("llama.attention.head_count", c.num_attention_heads as u32);
        self.u32("llama.attention.head_count_kv", c.num_key_value_heads as u32);
        self.u32("llama.rope.dimension_count", c.head_dim as u32);
        self.f32("llama.rope.freq_base", c.rope_theta as f32);
        self.f32("llama.attention.layer_norm_rms_epsilon", c.rms_norm_eps as f32);
        for spec in model.layout.specs.clone() {
            let name = gguf_name(&spec.name);
            let (data, rounded) = encode(&model.weights[spec.range.clone()], kind(&name));
            model.weights[spec.range.clone()].copy_from_slice(&rounded);
            let row_bytes = data.len() / spec.shape[0];
            let data = match name.contains("attn_q.") || name.contains("attn_k.") {
                true => pairs_together(&data, c.head_dim, row_bytes),
                false => data,
            };
            self.tensor(&name, &spec.shape, kind(&name), data);
        }
        self
    }
}

fn gguf_name(name: &str) -> String {
    let parts: Vec<&str> = name.split('.').collect();
    match parts.as_slice() {
        ["model", "embed_tokens", _] => "token_embd.weight".to_owned(),
        ["model", "norm", _] => "output_norm.weight".to_owned(),
        ["lm_head", _] => "output.weight".to_owned(),
        ["model", "layers", i, .., part, "weight"] => {
            let part = match *part {
                "input_layernorm" => "attn_norm",
                "post_attention_layernorm" => "ffn_norm",
                "q_proj" => "attn_q",
                "k_proj" => "attn_k",
                "v_proj" => "attn_v",
                "o_proj" => "attn_output",
                "gate_proj" => "ffn_gate",
                "up_proj" => "ffn_up",
                "down_proj" => "ffn_down",
                other => panic!("no GGUF name for {other}"),
            };
            format!("blk.{i}.{part}.weight")
        }
        _ => panic!("no GGUF name for {name}"),
    }
}

/// Rows as llama.cpp's converter orders those of queries and keys: the two rows of a rotary pair are neighbours.
fn pairs_together(rows: &[u8], head_dim: usize, row_bytes: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(rows.len());
    for head in rows.chunks(head_dim * row_bytes) {
        let (first, second) = head.split_at(head.len() / 2);
        for (first, second) in first.chunks(row_bytes).zip(second.chunks(row_bytes)) {
            out.extend(first);
            out.extend(second);
        }
    }
    out
}

/// Stores numbers as the given GGUF type; also what they are worth afterwards.
pub fn encode(numbers: &[f32], kind: u32) -> (Vec<u8>, Vec<f32>) {
    let (mut bytes, mut rounded) = (Vec::new(), Vec::new());
    let half = |x: f32, bytes: &mut Vec<u8>| {
        let x = f16::from_f32(x);
        bytes.extend(x.to_le_bytes());
        x.to_f32()
    };
    match kind {
        0 => {
            bytes.extend(numbers.iter().flat_map(|x| x.to_le_bytes()));
            rounded.extend(numbers);
        }
        1 => rounded.extend(numbers.iter().map(|&x| half(x, &mut bytes))),
        30 => {
            for &x in numbers {
                let x = bf16::from_f32(x);
                bytes.extend(x.to_le_bytes());
                rounded.push(x.to_f32());
            }
        }
        8 => {
            for block in numbers.chunks(32) {
                let largest = block.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
                let d = half(largest / 127.0, &mut bytes);
                for x in block {
                    let q = (x / d).round().clamp(-128.0, 127.0) as i8;
                    bytes.push(q.cast_unsigned());
                    rounded.push(f32::from(q) * d);
                }
            }
        }
        2 | 3 => {
            for block in numbers.chunks(32) {
                let low = block.iter().copied().fold(f32::INFINITY, f32::min);
                let high = block.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let largest = high.max(-low);
                let (d, m) = match kind {
                    2 => {
                        let d = half(largest / 7.0, &mut bytes);
                        (d, -8.0 * d)
                    }
                    _ => (half((high - low) / 15.0, &mut bytes), half(low, &mut bytes)),
                };
                let q: Vec<u8> = block.iter().map(|x| ((x - m) / d).round().clamp(0.0, 15.0) as u8).collect();
                bytes.extend((0..16).map(|i| q[i] | (q[i + 16] << 4)));
                rounded.extend(q.iter().map(|&q| f32::from(q) * d + m));
            }
        }
        other => panic!("no encoding {other}"),
    }
    (bytes, rounded)
}
