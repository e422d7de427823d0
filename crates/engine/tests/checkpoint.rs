//! Checkpoints in and out, and what happens to damaged ones.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use common::gguf::Writer;
use common::{byte_tokens, names, smollm2, tiny_config, tokenizer, tokenizer_json};
use engine::checkpoint::{Checkpoint, GenerationConfig, StreamedModel, describe};
use engine::{Model, ModelConfig, RopeScaling};
use half::{bf16, f16};
use proptest::prelude::*;
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::{Value, json};
use tempfile::TempDir;

fn checkpoint(config: ModelConfig) -> Checkpoint {
    let (bos_token_id, eos_token_ids) = (config.bos_token_id, config.eos_token_ids.clone());
    let generation = GenerationConfig {
        bos_token_id,
        eos_token_ids,
        temperature: Some(0.7),
        top_k: Some(50),
        other: [("do_sample".to_owned(), json!(true))].into_iter().collect(),
        ..GenerationConfig::default()
    };
    Checkpoint { model: Model::random(config, 0.02, 1), tokenizer: tokenizer(), generation }
}

fn assert_same(a: &Checkpoint, b: &Checkpoint) {
    assert_eq!(a.model.config, b.model.config);
    assert!(a.model.weights == b.model.weights, "the weights differ");
    assert_eq!(a.tokenizer.hash(), b.tokenizer.hash());
    assert_eq!(a.generation, b.generation);
}

/// A saved tiny checkpoint, to be damaged.
fn saved() -> (TempDir, PathBuf) {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("model");
    checkpoint(tiny_config()).save(&folder).unwrap();
    (parent, folder)
}

fn error_of(path: &Path) -> String {
    let error = Checkpoint::load(path).expect_err("a damaged checkpoint was loaded");
    assert_eq!(error.exit_code(), 2, "{error}");
    error.to_string()
}

fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    edit(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

#[test]
fn every_shape_survives_saving_and_loading() {
    let scaled = RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 64 };
    let shapes = [
        tiny_config(),
        ModelConfig { tie_word_embeddings: true, rope_scaling: scaled, ..tiny_config() },
        ModelConfig { rope_scaling: RopeScaling::Linear { factor: 2.5 }, rope_theta: 5e5, ..tiny_config() },
        ModelConfig { model_type: "mistral".into(), num_key_value_heads: 1, head_dim: 12, ..tiny_config() },
        ModelConfig { eos_token_ids: vec![257, 3], bos_token_id: Some(256), ..tiny_config() },
    ];
    for config in shapes {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("model");
        let original = checkpoint(config);
        original.save(&folder).unwrap();
        assert_same(&original, &Checkpoint::load(&folder).unwrap());
        let files =
            ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"];
        assert_eq!(names(&folder), [files.as_slice(), &["tokenizer_config.json"]].concat());
        assert_eq!(names(parent.path()), ["model"]);
    }
}

/// Writes some of a model's tensors in the given type.
fn write_tensors(path: &Path, model: &Model, dtype: Dtype, keep: impl Fn(usize) -> bool) {
    let specs = model.layout.specs.iter().enumerate().filter(|(i, _)| keep(*i)).map(|(_, spec)| spec);
    let data: Vec<_> = specs
        .map(|spec| {
            let numbers = &model.weights[spec.range.clone()];
            let bytes: Vec<u8> = match dtype {
                Dtype::F32 => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
                Dtype::F16 => numbers.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
                Dtype::BF16 => numbers.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
                _ => numbers.iter().flat_map(|&x| f64::from(x).to_le_bytes()).collect(),
            };
            (spec.name.clone(), spec.shape.clone(), bytes)
        })
        .collect();
    let views = data.iter().map(|(name, shape, bytes)| (name, TensorView::new(dtype, shape.clone(), bytes).unwrap()));
    fs::write(path, serialize(views, None).unwrap()).unwrap();
}

#[test]
fn narrow_types_are_widened_and_shards_are_put_together() {
    let (_parent, folder) = saved();
    let mut model = Checkpoint::load(&folder).unwrap().model;
    fs::remove_file(folder.join("model.safetensors")).unwrap();
    write_tensors(&folder.join("a.safetensors"), &model, Dtype::BF16, |i| i % 2 == 0);
    write_tensors(&folder.join("b.safetensors"), &model, Dtype::F16, |i| i % 2 == 1);
    let specs = model.layout.specs.iter().zip(["a.safetensors", "b.safetensors"].iter().cycle());
    let map: serde_json::Map<String, Value> = specs.map(|(spec, file)| (spec.name.clone(), json!(file))).collect();
    fs::write(folder.join("model.safetensors.index.json"), json!({"weight_map": map}).to_string()).unwrap();

    for (i, spec) in model.layout.specs.iter().enumerate() {
        for x in &mut model.weights[spec.range.clone()] {
            *x = if i % 2 == 0 { bf16::from_f32(*x).to_f32() } else { f16::from_f32(*x).to_f32() };
        }
    }
    let loaded = Checkpoint::load(&folder).unwrap();
    assert!(loaded.model.weights == model.weights);

    // in parts of a tensor, from any place
    let (mut streamed, tokenizer, generation) = StreamedModel::open(&folder).unwrap();
    assert_eq!((&streamed.config, &streamed.layout), (&loaded.model.config, &loaded.model.layout));
    assert_eq!((tokenizer.hash(), generation), (loaded.tokenizer.hash(), loaded.generation));
    let mut part = Vec::new();
    for (tensor, spec) in model.layout.specs.iter().enumerate().rev() {
        for start in (0..spec.range.len()).step_by(101) {
            let range = start..spec.range.len().min(start + 150);
            streamed.read(tensor, range.clone(), &mut part).unwrap();
            assert!(part == model.weights[spec.range.clone()][range]);
        }
    }

    edit_json(&folder.join("model.safetensors.index.json"), |index| index["weight_map"]["x"] = json!("../x"));
    assert!(error_of(&folder).contains("not a file name"));
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let (_parent, folder) = saved();
    let model = Checkpoint::load(&folder).unwrap().model;
    let file = folder.join("model.safetensors");

    write_tensors(&file, &model, Dtype::F32, |i| i != 3);
    let error = error_of(&folder);
    let missing = "model.layers.0.self_attn.k_proj.weight";
    assert!(error.contains(missing) && error.contains("[16, 32]") && error.contains("model.safetensors"), "{error}");

    write_tensors(&file, &model, Dtype::F64, |_| true);
    let error = error_of(&folder);
    assert!(error.contains("stored as F64") && error.contains("model.embed_tokens.weight"), "{error}");

    let mut narrow = tiny_config();
    narrow.intermediate_size = 48;
    write_tensors(&file, &Model::random(narrow, 0.02, 1), Dtype::F32, |_| true);
    let error = error_of(&folder);
    assert!(error.contains("gate_proj") && error.contains("[48, 32]") && error.contains("[64, 32]"), "{error}");

    // A model with more blocks than config.json says is another model; a head that is tied anyway is not.
    let more_blocks = ModelConfig { num_hidden_layers: 3, ..tiny_config() };
    write_tensors(&file, &Model::random(more_blocks, 0.02, 1), Dtype::F32, |_| true);
    assert!(error_of(&folder).contains("model.layers.2."), "{}", error_of(&folder));
    write_tensors(&file, &model, Dtype::F32, |_| true);
    edit_json(&folder.join("config.json"), |config| config["tie_word_embeddings"] = json!(true));
    assert!(Checkpoint::load(&folder).unwrap().model.config.tie_word_embeddings);
}

#[test]
fn truncated_weights_are_refused() {
    let (_parent, folder) = saved();
    let file = folder.join("model.safetensors");
    let whole = fs::read(&file).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let boundaries = (0..=header + 4).chain([whole.len() / 2, whole.len() - 4, whole.len() - 1]);
    for len in boundaries {
        fs::write(&file, &whole[..len]).unwrap();
        let error = error_of(&folder);
        assert!(error.contains("model.safetensors"), "cut at {len}: {error}");
    }
    let longer = [whole.as_slice(), &[0]].concat();
    fs::write(&file, longer).unwrap();
    assert!(error_of(&folder).contains("model.safetensors"));
}

#[test]
fn a_config_that_needs_more_weights_than_there_are_is_refused_before_allocating() {
    for (field, value) in
        [("num_hidden_layers", 4_000_000_000_u64), ("vocab_size", 4_000_000_000), ("head_dim", 1 << 31)]
    {
        let (_parent, folder) = saved();
        edit_json(&folder.join("config.json"), |config| config[field] = json!(value));
        let error = error_of(&folder);
        assert!(error.contains("config.json"), "{error}");
    }
}

#[test]
fn a_tokenizer_with_more_ids_than_the_model_is_refused() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("model");
    checkpoint(ModelConfig { vocab_size: 258, ..tiny_config() }).save(&folder).unwrap();
    let error = error_of(&folder);
    assert!(error.contains("258") && error.contains("wrong tokenizer"), "{error}");
}

#[test]
fn every_file_that_names_an_eos_is_heard() {
    let (_parent, folder) = saved();
    edit_json(&folder.join("config.json"), |config| config["eos_token_id"] = json!(5));
    edit_json(&folder.join("generation_config.json"), |config| {
        config["eos_token_id"] = json!([6, 5]);
        config.as_object_mut().unwrap().remove("bos_token_id");
    });
    let loaded = Checkpoint::load(&folder).unwrap();
    assert_eq!(loaded.model.config.eos_token_ids, [5, 6, 257]);
    assert_eq!(loaded.generation.eos_token_ids, [5, 6, 257]);
    assert_eq!(loaded.generation.bos_token_id, Some(256));
}

#[test]
fn missing_files_say_what_to_do() {
    assert!(error_of(Path::new("/nowhere/model")).contains("/nowhere/model"));
    for (file, word) in [
        ("config.json", "config.json"),
        ("tokenizer.json", "save_pretrained"),
        ("model.safetensors", "save_pretrained"),
    ] {
        let (_parent, folder) = saved();
        fs::remove_file(folder.join(file)).unwrap();
        assert!(error_of(&folder).contains(word), "{}", error_of(&folder));
    }
    let (_parent, folder) = saved();
    assert!(error_of(&folder.join("config.json")).contains("neither a folder nor a .gguf file"));
}

#[test]
fn saving_replaces_checkpoints_and_nothing_else() {
    let (parent, folder) = saved();
    let other = checkpoint(ModelConfig { num_hidden_layers: 1, ..tiny_config() });
    other.save(&folder).unwrap();
    assert_same(&other, &Checkpoint::load(&folder).unwrap());

    // the parent holds a folder, not a checkpoint
    let error = other.save(parent.path()).unwrap_err().to_string();
    assert!(error.contains("is not replaced"), "{error}");
    fs::create_dir(folder.join("notes")).unwrap();
    assert!(other.save(&folder).is_err());
    assert!(folder.join("notes").exists());
    assert_eq!(names(parent.path()), ["model"]);
}

#[test]
fn description_of_a_folder() {
    let (_parent, folder) = saved();
    let description = describe(&folder).unwrap();
    assert_eq!(description.parameters, Model::random(tiny_config(), 0.0, 0).layout.len);
    assert_eq!(description.tensors["F32"].count, 2 * 9 + 3);
    assert_eq!(description.tensors["F32"].bytes, description.parameters * 4);
    assert_eq!(description.bytes as u64, fs::metadata(folder.join("model.safetensors")).unwrap().len());
    let json = serde_json::to_value(&description).unwrap();
    assert_eq!((&json["architecture"], &json["config"]["hidden_size"]), (&json!("llama"), &json!(32)));
    assert_eq!(json["tokenizer"]["vocab_size"], 259);
    assert!(description.to_string().contains("BOS        <s> (added to every prompt)"), "{description}");
}

/// A GGUF file of a tiny model in all types of tensors, and the model that it should load as.
fn tiny_gguf() -> (Vec<u8>, Model) {
    let (writer, model) = tiny_gguf_writer();
    (writer.build(), model)
}

fn tiny_gguf_writer() -> (Writer, Model) {
    let mut writer = Writer::default();
    let mut model = Model::random(ModelConfig { eos_token_ids: vec![257, 3], ..tiny_config() }, 0.02, 3);
    writer.model(&mut model, |name| match name {
        "token_embd.weight" => 8,
        "output.weight" => 1,
        name if name.contains("norm") => 0,
        name if name.contains("attn_q") => 3,
        name if name.contains("attn_k") => 2,
        name if name.contains("ffn_up") => 30,
        _ => 8,
    });
    let tokens = [byte_tokens(), ["<s>", "</s>", "th"].map(str::to_owned).to_vec()].concat();
    let types: Vec<i32> = (0..tokens.len()).map(|id| if id == 256 || id == 257 { 3 } else { 1 }).collect();
    writer
        .text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", "gpt-2")
        .texts("tokenizer.ggml.tokens", &tokens)
        .i32s("tokenizer.ggml.token_type", &types)
        .texts("tokenizer.ggml.merges", &["t h"])
        .u32("tokenizer.ggml.bos_token_id", 256)
        .u32("tokenizer.ggml.eos_token_id", 257)
        .u32("tokenizer.ggml.eot_token_id", 3)
        .flag("tokenizer.ggml.add_bos_token", true)
        .text("tokenizer.chat_template", "{{ messages[0].content }}{{ eos_token }}");
    (writer, model)
}

fn write_gguf(bytes: &[u8]) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    fs::write(&path, bytes).unwrap();
    (folder, path)
}

#[test]
fn gguf_becomes_a_checkpoint_that_survives_saving() {
    let (bytes, model) = tiny_gguf();
    let (folder, path) = write_gguf(&bytes);
    let loaded = Checkpoint::load(&path).unwrap();
    assert_eq!(loaded.model.config, model.config);
    for spec in &model.layout.specs {
        assert!(loaded.model.weights[spec.range.clone()] == model.weights[spec.range.clone()], "{}", spec.name);
    }
    assert_eq!(loaded.tokenizer.encode("the</s>").unwrap(), [258, tokenizer().encode("e").unwrap()[0], 257]);
    assert!(loaded.tokenizer.adds_bos());

    let converted = folder.path().join("converted");
    loaded.save(&converted).unwrap();
    assert_same(&loaded, &Checkpoint::load(&converted).unwrap());

    let description = describe(&path).unwrap();
    assert_eq!(description.format, "GGUF version 3");
    assert_eq!(description.parameters, model.layout.len);
    let counts: Vec<_> = description.tensors.iter().map(|(name, t)| (name.as_str(), t.count)).collect();
    assert_eq!(counts, [("BF16", 2), ("F16", 1), ("F32", 5), ("Q4_0", 2), ("Q4_1", 2), ("Q8_0", 9)]);
}

#[test]
fn gguf_that_is_not_supported_is_named() {
    let error = |edit: &dyn Fn(&mut Writer) -> &mut Writer| {
        let (mut writer, _) = tiny_gguf_writer();
        edit(&mut writer);
        error_of(&write_gguf(&writer.build()).1)
    };
    for key in ["llama.rope.scaling.yarn_beta_fast", "llama.attention.scale", "llama.logit_scale"] {
        assert!(error(&|w| w.f32(key, 0.5)).contains(key));
    }
    assert!(error(&|w| w.text("llama.rope.scaling.type", "yarn")).contains("yarn"));
    assert!(error(&|w| w.u32("llama.expert_count", 8)).contains("8 experts"));
    assert!(error(&|w| w.u32("llama.vocab_size", 8).u32("llama.vocab_size", 8)).contains("there twice"));
    assert!(error(&|w| w.tensor("blk.0.attn_q.bias", &[4], 0, vec![0; 16])).contains("blk.0.attn_q.bias"));
    assert!(error(&|w| w.tensor("rope_freqs.weight", &[4], 0, vec![0; 16])).contains("rope_freqs.weight"));
    assert!(error(&|w| w.tensor("x", &[256], 14, vec![0; 210])).contains("Q6_K"));
    assert!(error(&|w| w.tensor("x", &[33], 8, vec![0; 34])).contains("does not fit"));
    assert!(error(&|w| w.tensor("x", &[1 << 31, 1 << 31, 8], 0, vec![0; 34])).contains("does not fit"));

    let (mut bytes, _) = tiny_gguf();
    bytes[4] = 1;
    assert!(error_of(&write_gguf(&bytes).1).contains("version 1"));
    bytes[4..8].copy_from_slice(&[0, 0, 0, 3]);
    assert!(error_of(&write_gguf(&bytes).1).contains("big-endian"));
    bytes[0] = b'x';
    assert!(error_of(&write_gguf(&bytes).1).contains("not a GGUF file"));
}

#[test]
fn gguf_with_tensors_that_the_model_lacks_is_refused() {
    let (bytes, _) = tiny_gguf();
    // Renaming a tensor makes one missing; the same length keeps the file valid.
    let at = bytes.windows(20).position(|w| w == b"blk.1.ffn_up.weight\x02").unwrap();
    let mut renamed = bytes.clone();
    renamed[at + 4] = b'7';
    assert!(error_of(&write_gguf(&renamed).1).contains("blk.1.ffn_up.weight"));
}

#[test]
fn truncated_gguf_is_refused() {
    let (writer, _) = tiny_gguf_writer();
    let bytes = writer.build();
    for len in (0..writer.header_len()).step_by(7).chain([bytes.len() - 32, bytes.len() / 2]) {
        error_of(&write_gguf(&bytes[..len]).1);
    }
}

/// Loads what may be damaged: any error will do, a panic will not.
fn load_must_not_panic(path: &Path) {
    let _ = describe(path);
    if let Ok(loaded) = Checkpoint::load(path) {
        let _ = loaded.tokenizer.encode("the quick brown fox");
    }
}

/// Changes to a file: at a place, as a share of its length, a byte becomes another.
fn changes() -> impl Strategy<Value = Vec<(f64, u8)>> {
    prop::collection::vec((0.0..1.0, any::<u8>()), 1..6)
}

fn changed(bytes: &[u8], changes: &[(f64, u8)], within: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for &(at, byte) in changes {
        bytes[(at * within as f64) as usize] = byte;
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_gguf_does_not_panic(changes in changes()) {
        let (writer, _) = tiny_gguf_writer();
        let bytes = writer.build();
        load_must_not_panic(&write_gguf(&changed(&bytes, &changes, writer.header_len())).1);
        load_must_not_panic(&write_gguf(&changed(&bytes, &changes, 400)).1);
    }

    #[test]
    fn damaged_folders_do_not_panic(changes in changes(), file in 0..6_usize) {
        static FILES: LazyLock<Vec<(String, Vec<u8>)>> = LazyLock::new(|| {
            let (_parent, folder) = saved();
            names(&folder).into_iter().map(|name| (name.clone(), fs::read(folder.join(name)).unwrap())).collect()
        });
        let folder = tempfile::tempdir().unwrap();
        for (i, (name, bytes)) in FILES.iter().enumerate() {
            let bytes = if i == file { changed(bytes, &changes, bytes.len().min(3000)) } else { bytes.clone() };
            fs::write(folder.path().join(name), bytes).unwrap();
        }
        load_must_not_panic(folder.path());
    }
}

/// Replaces one value, somewhere in a JSON document, by another.
fn replace_somewhere(value: &mut Value, mut at: usize, by: &Value) -> Option<usize> {
    if at == 0 {
        *value = by.clone();
        return None;
    }
    at -= 1;
    let children: Vec<&mut Value> = match value {
        Value::Array(items) => items.iter_mut().collect(),
        Value::Object(fields) => fields.values_mut().collect(),
        _ => return Some(at),
    };
    for child in children {
        at = replace_somewhere(child, at, by)?;
    }
    Some(at)
}

#[test]
fn tokenizers_with_any_value_replaced_do_not_panic() {
    let whole = tokenizer_json();
    let values = [json!(null), json!(-1), json!(4_294_967_295_u32), json!("x"), json!([]), json!({}), json!("<s>")];
    let mut tried = 0;
    for by in &values {
        for at in 0.. {
            let mut json = whole.clone();
            if replace_somewhere(&mut json, at, by).is_some() {
                break;
            }
            tried += 1;
            let bytes = json.to_string();
            if let Ok(tokenizer) = engine::tokenizer::Tokenizer::from_json(bytes.as_bytes(), None, None, None) {
                let ids = tokenizer.encode("the <s>").unwrap_or_default();
                let _ = (tokenizer.decode(&ids), tokenizer.vocab_size());
            }
        }
    }
    assert!(tried > 2000, "{tried}");
}

#[test]
fn the_story_model_is_read_whole() {
    let Some(stories) = common::shared("small/stories260K.bin") else { return };
    let model = common::stories::load_stories(&stories);
    assert_eq!((model.config.hidden_size, model.config.num_key_value_heads, model.config.vocab_size), (64, 4, 512));
    assert!(model.config.tie_word_embeddings && model.weights.iter().all(|x| x.is_finite()));
}

#[test]
fn smollm2_through_gguf() {
    let reference = "real-text/smollm2-135m.reference.json";
    let (Some(path), Some(reference)) = (smollm2(), common::shared(reference)) else { return };
    let reference: Value = serde_json::from_slice(&fs::read(reference).unwrap()).unwrap();
    let loaded = Checkpoint::load(&path).unwrap();
    let config = &loaded.model.config;
    assert_eq!((config.parameter_count(), config.rope_theta, config.rms_norm_eps), (Some(134_515_008), 1e5, 1e-5));
    assert_eq!((config.bos_token_id, config.eos_token_ids.as_slice()), (Some(1), [2].as_slice()));
    assert!(config.tie_word_embeddings && !loaded.tokenizer.adds_bos());

    let ids: Vec<u32> = serde_json::from_value(reference["nll"]["ids"].clone()).unwrap();
    let text = reference["nll"]["text"].as_str().unwrap();
    assert_eq!(loaded.tokenizer.encode(text).unwrap(), ids);
    assert_eq!(loaded.tokenizer.decode(&ids).unwrap(), text);
    let chat = loaded.tokenizer.chat(&[engine::chat::Message::new("user", "Hi")], true).unwrap();
    let system = reference["system"].as_str().unwrap();
    let expected =
        format!("<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    assert_eq!(chat, expected);

    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("smollm2");
    loaded.save(&folder).unwrap();
    assert_same(&loaded, &Checkpoint::load(&folder).unwrap());
}
