//! Adapters: against PEFT, in and out, and what happens to those that do not fit.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use common::{names, tiny_config, tokenizer};
use engine::checkpoint::{Checkpoint, GenerationConfig, StreamedModel, describe, load_model};
use engine::{Adapter, Decoder, Keep, LoraOptions, Model, ModelConfig, PackedBatch, Parameters, Projection};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use tempfile::TempDir;

/// The adapters that `scripts/make_lora_fixture.py` made.
const PEFT: [&str; 3] = ["all", "rslora_qv", "dora"];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/lora").join(name)
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// An adapter that PEFT wrote, and its base.
fn of_peft(name: &str) -> (Model, Adapter) {
    let folder = fixture(name);
    let base = json(&folder.join("adapter_config.json"))["base_model_name_or_path"].as_str().unwrap().to_owned();
    let model = load_model(&folder.join(base)).unwrap();
    let adapter = Adapter::load(&folder, &model.config).unwrap();
    (model, adapter)
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

#[test]
fn adapters_of_peft_give_its_log_probabilities_and_gradients() {
    let mut worst = [0f64; 3];
    for name in PEFT {
        let (model, adapter) = of_peft(name);
        let expected = json(&fixture(name).join("expected.json"));
        let mut batch = PackedBatch::default();
        for sequence in expected["sequences"].as_array().unwrap() {
            let ids = |part: usize| numbers(&sequence[part]).iter().map(|&id| id as u32).collect::<Vec<_>>();
            batch.push(&ids(0), &[&ids(1)]);
        }
        let parameters = Parameters { base: &model.weights, adapter: Some(&adapter), dropout_seed: None };
        let mut decoder = Decoder::new(&model, 32);
        let mut gradient = vec![0.0; adapter.layout.len];
        let logps = decoder.forward(parameters, &batch, Keep::All);
        decoder.backward(parameters, &batch, &numbers(&expected["d_logps"]), &mut gradient);
        let mut folded = model.clone();
        adapter.fold_into(&mut folded);
        let folded = decoder.logps(&folded.weights, &batch);
        for (i, expected) in numbers(&expected["logps"]).iter().enumerate() {
            worst[0] = worst[0].max((logps[i] / expected - 1.0).abs());
            worst[1] = worst[1].max((folded[i] / expected - 1.0).abs());
        }
        let gradients = expected["gradients"].as_object().unwrap();
        assert_eq!(gradients.len(), adapter.layout.specs.len());
        for spec in &adapter.layout.specs {
            let own = &gradient[spec.range.clone()];
            let (first, norm) =
                (numbers(&gradients[&spec.name]["first"]), gradients[&spec.name]["norm"].as_f64().unwrap());
            let own_norm = own.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
            let differences = first.iter().zip(own).map(|(expected, &g)| f64::from(g) - expected);
            // relative to the factor's gradient as a whole: single components cancel to almost nothing
            let difference = differences.chain([own_norm - norm]).fold(0.0, |m: f64, d| m.max(d.abs()));
            worst[2] = worst[2].max(difference / norm);
        }
    }
    let [adapter, folded, gradient] = worst;
    println!("largest relative differences: adapter {adapter:.1e}, folded {folded:.1e}, gradients {gradient:.1e}");
    assert!(adapter < 1e-5 && folded < 1e-5 && gradient < 1e-4, "{worst:?}");
}

fn tensors(folder: &Path) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(folder.join("adapter_model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.tensors().into_iter().map(|(name, view)| (name, (view.shape().to_vec(), view.data().to_vec()))).collect()
}

#[test]
fn what_is_written_is_what_peft_writes() {
    for name in PEFT {
        let (model, adapter) = of_peft(name);
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("adapter");
        adapter.save(Path::new("base"), &folder).unwrap();
        assert_eq!(names(&folder), ["adapter_config.json", "adapter_model.safetensors"]);
        assert_eq!(tensors(&folder), tensors(&fixture(name)));
        let (ours, theirs) =
            (json(&folder.join("adapter_config.json")), json(&fixture(name).join("adapter_config.json")));
        for (field, value) in ours.as_object().unwrap() {
            match field.as_str() {
                "base_model_name_or_path" => assert_eq!(value, "base"),
                // PEFT's order is any, and for `all-linear` it lists every layer's
                "target_modules" => {
                    let last_names = |value: &Value| -> BTreeSet<String> {
                        let names = value.as_array().unwrap().iter().map(|name| name.as_str().unwrap());
                        names.map(|name| name.rsplit('.').next().unwrap().to_owned()).collect()
                    };
                    assert_eq!(last_names(value), last_names(&theirs[field]));
                }
                _ => assert_eq!(Some(value), theirs.get(field), "{field}"),
            }
        }
        let again = Adapter::load(&folder, &model.config).unwrap();
        assert_eq!(again.hash(), adapter.hash());
    }
}

/// A folder with a base model `base` and an adapter `adapter` of it that is not zero.
fn saved(options: LoraOptions) -> (TempDir, Model, Adapter) {
    let parent = tempfile::tempdir().unwrap();
    let model = Model::random(tiny_config(), 0.1, 1);
    let mut adapter = Adapter::new(&model, options, 2).unwrap();
    adapter.weights.iter_mut().enumerate().for_each(|(i, weight)| *weight += 0.01 * (i % 7) as f32);
    let checkpoint =
        Checkpoint { model: model.clone(), tokenizer: tokenizer(), generation: GenerationConfig::default() };
    checkpoint.save(&parent.path().join("base")).unwrap();
    adapter.save(Path::new("../base"), &parent.path().join("adapter")).unwrap();
    (parent, model, adapter)
}

fn edit_config(folder: &Path, edit: impl FnOnce(&mut Value)) {
    let path = folder.join("adapter_config.json");
    let mut value = json(&path);
    edit(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

fn error_of(folder: &Path) -> String {
    let error = Checkpoint::load(folder).expect_err("a wrong adapter was loaded");
    assert_eq!(error.exit_code(), 2, "{error}");
    error.to_string()
}

fn says(message: &str, parts: &[&str]) {
    parts.iter().for_each(|part| assert!(message.contains(part), "`{part}` is missing: {message}"));
}

#[test]
fn an_adapter_folder_is_a_model() {
    for options in [LoraOptions::default(), LoraOptions { dora: true, ..LoraOptions::default() }] {
        let (parent, mut model, adapter) = saved(options);
        let folder = parent.path().join("adapter");
        adapter.fold_into(&mut model);
        let loaded = Checkpoint::load(&folder).unwrap();
        assert!(loaded.model.weights == model.weights);
        assert_eq!(loaded.tokenizer.hash(), tokenizer().hash());
        let description = describe(&folder).unwrap();
        assert_eq!(description.parameters, model.layout.len);
        let summary = description.adapter.unwrap();
        assert_eq!((summary.parameters, summary.options), (adapter.layout.len, adapter.options.clone()));
        // an absolute path, and a folder with a model of its own
        edit_config(&folder, |config| config["base_model_name_or_path"] = json!(parent.path().join("base")));
        assert!(Checkpoint::load(&folder).unwrap().model.weights == model.weights);
        fs::copy(folder.join("adapter_config.json"), parent.path().join("base/adapter_config.json")).unwrap();
        assert!(Checkpoint::load(&parent.path().join("base")).unwrap().model.weights != model.weights);
    }
}

#[test]
fn a_streamed_adapter_is_the_folded_model_bit_for_bit() {
    let some = vec![Projection::VProj, Projection::GateProj, Projection::DownProj];
    for options in [
        LoraOptions { rank: 3, ..LoraOptions::default() },
        LoraOptions { rank: 2, targets: some, ..LoraOptions::default() },
        LoraOptions { rank: 2, dora: true, ..LoraOptions::default() },
    ] {
        let (parent, model, _) = saved(options);
        let folder = parent.path().join("adapter");
        let folded = Checkpoint::load(&folder).unwrap();
        let (mut streamed, tokenizer, generation) = StreamedModel::open(&folder).unwrap();
        assert!(folded.model.weights != model.weights);
        assert_eq!((&streamed.config, &streamed.path), (&folded.model.config, &folder));
        assert_eq!((tokenizer.hash(), generation), (folded.tokenizer.hash(), folded.generation));
        let mut part = Vec::new();
        for (tensor, spec) in model.layout.specs.iter().enumerate().rev() {
            // parts that start and end within rows
            for start in (0..spec.range.len()).step_by(101) {
                let range = start..spec.range.len().min(start + 150);
                streamed.read(tensor, range.clone(), &mut part).unwrap();
                assert!(part == folded.model.weights[spec.range.clone()][range], "{}", spec.name);
            }
        }
    }
}

#[test]
fn targets_are_read_in_every_form_that_peft_has() {
    let some = LoraOptions { targets: vec![Projection::QProj, Projection::DownProj], ..LoraOptions::default() };
    for (options, forms) in [
        (LoraOptions::default(), vec![json!("all-linear"), json!(".*_proj")]),
        (
            some,
            vec![json!(["down_proj", "q_proj"]), json!(["self_attn.q_proj", "mlp.down_proj"]), json!(".*(q|down)_.*")],
        ),
    ] {
        let (parent, model, adapter) = saved(options);
        let folder = parent.path().join("adapter");
        for form in forms {
            edit_config(&folder, |config| config["target_modules"] = form.clone());
            assert_eq!(Adapter::load(&folder, &model.config).unwrap().hash(), adapter.hash(), "{form}");
        }
    }
}

#[test]
fn fields_that_are_wrong_or_not_supported_are_named() {
    let cases = [
        ("peft_type", json!("IA3"), "peft_type to \"IA3\""),
        ("peft_type", Value::Null, "lacks the field peft_type"),
        ("task_type", json!("SEQ_CLS"), "task_type to \"SEQ_CLS\""),
        ("bias", json!("all"), "bias to \"all\""),
        ("modules_to_save", json!(["lm_head"]), "modules_to_save to [\"lm_head\"]"),
        ("rank_pattern", json!({"q_proj": 4}), "rank_pattern to {\"q_proj\":4}"),
        ("alpha_pattern", json!({"q_proj": 4}), "alpha_pattern to"),
        ("layers_to_transform", json!([0]), "layers_to_transform to [0]"),
        ("fan_in_fan_out", json!(true), "fan_in_fan_out to true"),
        ("use_qalora", json!(true), "use_qalora to true"),
        ("init_lora_weights", json!("pissa"), "init_lora_weights to \"pissa\""),
        ("r", json!(0), "rank is 0"),
        ("r", json!(1_u64 << 40), "rank is 1099511627776"),
        ("r", json!("8"), "r is \"8\""),
        ("lora_alpha", Value::Null, "lacks the field lora_alpha"),
        ("lora_alpha", json!(-1), "alpha is -1"),
        ("lora_dropout", json!(1), "dropout is 1"),
        ("target_modules", json!(["q_proj", "lm_head"]), "lm_head cannot be adapted: many models use one matrix"),
        ("target_modules", json!(["c_attn"]), "c_attn is not a matrix that can be adapted"),
        ("target_modules", json!([]), "no target"),
        ("target_modules", json!(7), "target_modules is 7"),
        ("target_modules", json!(["q_proj"]), "has no place"),
        ("r", json!(4), "[16, 32], but adapter_config.json with this model makes it [4, 32]"),
        (
            "base_model_name_or_path",
            json!("HuggingFaceTB/SmolLM2"),
            "HuggingFaceTB/SmolLM2, which is no folder or file",
        ),
        ("base_model_name_or_path", Value::Null, "names no base_model_name_or_path"),
        ("base_model_name_or_path", json!("."), "an adapter itself"),
    ];
    let (parent, ..) = saved(LoraOptions::default());
    let folder = parent.path().join("adapter");
    let good = json(&folder.join("adapter_config.json"));
    for (field, value, expected) in cases {
        edit_config(&folder, |config| config[field] = value);
        says(&error_of(&folder), &[expected, "adapter"]);
        edit_config(&folder, |config| *config = good.clone());
    }
    fs::write(folder.join("adapter_config.json"), "{\"r\": 8").unwrap();
    says(&error_of(&folder), &["adapter_config.json is not a JSON object"]);
}

#[test]
fn adapters_of_other_models_name_tensor_and_shapes() {
    let (parent, ..) = saved(LoraOptions::default());
    let folder = parent.path().join("adapter");
    let base = tiny_config();
    let load = |config: &ModelConfig| Adapter::load(&folder, config).unwrap_err().to_string();
    let advice = "Use the adapter with the model that it was trained on (adapter_config.json says ../base).";
    says(
        &load(&ModelConfig { intermediate_size: 48, ..base.clone() }),
        &["layers.0.mlp.gate_proj.lora_B.weight", "[64, 16]", "[48, 16]", advice],
    );
    says(
        &load(&ModelConfig { num_hidden_layers: 3, ..base.clone() }),
        &["layers.2.self_attn.q_proj.lora_A.weight", "is missing", "adapter_model.safetensors", advice],
    );
    says(
        &load(&ModelConfig { num_hidden_layers: 1, ..base }),
        &["layers.1.", "for which adapter_config.json with this model has no place", advice],
    );
}

#[test]
fn damaged_weights_are_refused() {
    let (parent, ..) = saved(LoraOptions { rank: 2, targets: vec![Projection::VProj], ..LoraOptions::default() });
    let folder = parent.path().join("adapter");
    let file = folder.join("adapter_model.safetensors");
    let whole = fs::read(&file).unwrap();
    for len in (0..whole.len()).step_by(37) {
        fs::write(&file, &whole[..len]).unwrap();
        says(&error_of(&folder), &["adapter_model.safetensors", "truncated or damaged"]);
    }
    fs::remove_file(&file).unwrap();
    fs::write(folder.join("adapter_model.bin"), "x").unwrap();
    says(&error_of(&folder), &["has no adapter_model.safetensors", "PeftModel.from_pretrained"]);
}

#[test]
fn only_an_adapter_is_replaced() {
    let (parent, _, adapter) = saved(LoraOptions::default());
    let base = parent.path().join("base");
    let error = adapter.save(&base, &base).unwrap_err();
    says(&error.to_string(), &["base", "is not replaced"]);
    adapter.save(&base, &parent.path().join("adapter")).unwrap();
    assert_eq!(names(parent.path()), ["adapter", "base"]);
}

#[test]
fn options_out_of_range_are_named() {
    let model = Model::random(tiny_config(), 0.1, 1);
    let default = LoraOptions::default;
    let cases = [
        (LoraOptions { rank: 0, ..default() }, "rank is 0"),
        (LoraOptions { rank: 65, ..default() }, "from 1 to 64"),
        (LoraOptions { alpha: 0.0, ..default() }, "alpha is 0"),
        (LoraOptions { alpha: f64::NAN, ..default() }, "alpha is NaN"),
        (LoraOptions { dropout: 1.0, ..default() }, "dropout is 1"),
        (LoraOptions { dropout: -0.1, ..default() }, "dropout is -0.1"),
        (LoraOptions { targets: Vec::new(), ..default() }, "no target"),
        (LoraOptions { dora: true, dropout: 0.1, ..default() }, "DoRA and a dropout of 0.1 cannot be trained"),
    ];
    for (options, expected) in cases {
        let error = Adapter::new(&model, options, 0).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        says(&error.to_string(), &[expected]);
    }
}

#[test]
fn first_values_are_those_of_peft() {
    let model = Model::random(tiny_config(), 0.1, 1);
    let adapter = Adapter::new(&model, LoraOptions { dora: true, ..LoraOptions::default() }, 3).unwrap();
    for spec in &adapter.layout.specs {
        let values = &adapter.weights[spec.range.clone()];
        if spec.name.ends_with("lora_A.weight") {
            // kaiming_uniform_ with a = √5
            let bound = 1.0 / (spec.shape[1] as f32).sqrt();
            let variance = values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32;
            assert!(values.iter().all(|v| v.abs() <= bound));
            assert!((variance / (bound * bound / 3.0) - 1.0).abs() < 0.15, "{}: {variance}", spec.name);
        } else if spec.name.ends_with("lora_B.weight") {
            assert!(values.iter().all(|v| *v == 0.0));
        } else {
            let name = spec.name.replace("base_model.model.", "").replace("lora_magnitude_vector", "weight");
            let w = model.layout.specs.iter().find(|w| w.name == name).unwrap();
            for (m, row) in values.iter().zip(model.weights[w.range.clone()].chunks_exact(w.shape[1])) {
                let norm = row.iter().map(|w| w * w).sum::<f32>().sqrt();
                assert!((m / norm - 1.0).abs() < 1e-6);
            }
        }
    }
    let again = Adapter::new(&model, adapter.options.clone(), 3).unwrap();
    let other = Adapter::new(&model, adapter.options.clone(), 4).unwrap();
    assert!(again.hash() == adapter.hash() && other.hash() != adapter.hash());
}
