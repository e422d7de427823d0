//! Merging on the command line: what the methods make of real checkpoints, and what is refused.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::path::Path;

use common::*;
use engine::checkpoint::Checkpoint;
use engine::tokenizer::Tokenizer;
use engine::{Adapter, LoraOptions, Model, ModelConfig, Projection};
use serde_json::json;
use tempfile::TempDir;

fn load(model: &str) -> Checkpoint {
    Checkpoint::load(Path::new(model)).unwrap()
}

/// A model of the base's shape with other weights, changed as told.
fn model(folder: &TempDir, name: &str, seed: u64, change: impl FnOnce(&mut Checkpoint)) -> String {
    let mut checkpoint = load(&material().base());
    let other = Model::random(checkpoint.model.config.clone(), 0.02, seed);
    checkpoint.model.weights.iter_mut().zip(&other.weights).for_each(|(weight, other)| *weight += other);
    change(&mut checkpoint);
    checkpoint.save(&folder.path().join(name)).unwrap();
    at(folder, name)
}

/// Two models trained from the base, as it were.
fn pair(folder: &TempDir) -> (String, String) {
    (model(folder, "a", 1, |_| ()), model(folder, "b", 2, |_| ()))
}

/// The weights of a merge made with these options; its folder is gone again.
fn merged(folder: &TempDir, arguments: &[&str]) -> Vec<f32> {
    let out = at(folder, "merged");
    done(&[&["merge"], arguments, &[&out]].concat());
    let weights = load(&out).model.weights;
    fs::remove_dir_all(&out).unwrap();
    weights
}

#[test]
fn the_shares_of_two_models() {
    let folder = folder();
    let (a, b) = pair(&folder);
    for method in ["linear", "slerp"] {
        for (q, end) in [("0", &a), ("1", &b)] {
            let out = at(&folder, "end");
            done(&["merge", "--method", method, "--q", q, &a, &b, &out]);
            assert!(files(&out) == files(end), "{method}, q = {q}");
            fs::remove_dir_all(&out).unwrap();
        }
    }
    let out = at(&folder, "out");
    let told = json(&["merge", "--q", "0.25", &a, &b, &out]);
    let (first, second, made) = (load(&a).model, load(&b).model, load(&out));
    for ((x, y), merged) in first.weights.iter().zip(&second.weights).zip(&made.model.weights) {
        assert_eq!(*merged, (0.75 * f64::from(*x) + 0.25 * f64::from(*y)) as f32);
    }
    assert_eq!(made.tokenizer.hash(), load(&a).tokenizer.hash());
    assert_eq!(told["method"], json!("linear"));
    assert_eq!((&told["weights"], &told["normalise"]), (&json!([0.75, 0.25]), &json!(true)));
    assert_eq!((&told["base"], &told["density"], &told["seed"]), (&json!(null), &json!(null), &json!(null)));
    let models = json!([{"path": &a, "hash": first.hash()}, {"path": &b, "hash": second.hash()}]);
    assert_eq!((&told["models"], &told["out"]), (&models, &json!(out)));
    assert_eq!(told["parameters"], json!(first.layout.len));
    assert_eq!(told["tensors"], json!(first.layout.specs.len()));
    assert!(told["seconds"].as_f64().unwrap() > 0.0 && told["peak_memory_bytes"].as_u64().unwrap() > 0);
    // equal weights for several models are their mean; the same as any that are normalised
    let mean = merged(&folder, &[&a, &b, &b]);
    assert!(mean == merged(&folder, &["--weight", "2", "--weight", "2", "--weight", "2", &a, &b, &b]));
    assert!(mean != merged(&folder, &["--normalise", "false", &a, &b, &b]));
    // beyond the second model
    let beyond = merged(&folder, &["--q", "2", "--extrapolate", &a, &b]);
    assert_eq!(beyond[7], (2.0 * f64::from(second.weights[7]) - f64::from(first.weights[7])) as f32);
}

#[test]
fn task_vectors_over_a_base() {
    let folder = folder();
    let ((a, b), base) = (pair(&folder), material().base());
    let (first, second, below) = (load(&a).model.weights, load(&b).model.weights, load(&base).model);
    // all that one model has learnt makes that model
    for method in [&["--method", "task-arithmetic"][..], &["--method", "ties", "--density", "1"]] {
        assert!(merged(&folder, &[method, &["--base", &base, &a]].concat()) == first, "{method:?}");
    }
    let sum =
        merged(&folder, &["--method", "task-arithmetic", "--base", &base, "--weight", "1", "--weight=-0.5", &a, &b]);
    for (((merged, x), y), base) in sum.iter().zip(&first).zip(&second).zip(&below.weights) {
        let [x, y, base] = [x, y, base].map(|value| f64::from(*value));
        assert!((f64::from(*merged) - (base + (x - base) - 0.5 * (y - base))).abs() < 1e-7);
    }
    // each tensor keeps the share, rounded down, of its largest changes
    let trimmed = merged(&folder, &["--method", "ties", "--density", "0.3", "--base", &base, &a]);
    for spec in &below.layout.specs {
        let changes = |model: &[f32]| -> Vec<f32> {
            model[spec.range.clone()]
                .iter()
                .zip(&below.weights[spec.range.clone()])
                .map(|(x, y)| (x - y).abs())
                .collect()
        };
        let (all, kept) = (changes(&first), changes(&trimmed));
        let n = kept.iter().filter(|change| **change > 0.0).count();
        let changed = all.iter().filter(|change| **change > 0.0).count();
        assert_eq!(n, ((0.3 * all.len() as f64) as usize).min(changed), "{}", spec.name);
        let least = kept.iter().copied().filter(|change| *change > 0.0).fold(f32::INFINITY, f32::min);
        let most = all.iter().zip(&kept).filter(|(_, kept)| **kept == 0.0).map(|(all, _)| *all).fold(0.0, f32::max);
        assert!(least >= most, "{}: {least} is kept, {most} is not", spec.name);
    }
}

#[test]
fn random_choices_follow_the_seed_and_nothing_else() {
    let folder = folder();
    let ((a, b), base) = (pair(&folder), material().base());
    for method in ["dare-linear", "dare-ties"] {
        let dare = |extra: &[&str]| {
            merged(&folder, &[&["--method", method, "--density", "0.5", "--base", &base], extra, &[&a, &b]].concat())
        };
        let first = dare(&["--threads", "1"]);
        assert!(first == dare(&["--threads", "3"]));
        assert!(first != dare(&["--seed", "1"]));
    }
    // what is kept of one model is twice its change, half of the time
    let half = merged(&folder, &["--method", "dare-linear", "--density", "0.5", "--base", &base, &a]);
    let (first, below) = (load(&a).model.weights, load(&base).model.weights);
    let (mut kept, mut changed) = (0_usize, 0_usize);
    for ((merged, model), base) in half.iter().zip(&first).zip(&below).filter(|((_, model), base)| model != base) {
        changed += 1;
        if merged != base {
            kept += 1;
            let [merged, model, base] = [merged, model, base].map(|value| f64::from(*value));
            assert!((merged - base - 2.0 * (model - base)).abs() < 1e-7);
        }
    }
    let share = kept as f64 / changed as f64;
    assert!((share - 0.5).abs() < 5.0 * (0.25 / changed as f64).sqrt(), "{share} of {changed}");
}

/// An adapter of `base` as training leaves it, and the model that it makes.
fn adapter(folder: &TempDir, name: &str, base: &str, options: LoraOptions, seed: u64) -> [String; 2] {
    let mut adapter = Adapter::new(&load(base).model, options, seed).unwrap();
    let shift = |i: usize| 0.01 * ((i + seed as usize) % 5) as f32;
    adapter.weights.iter_mut().enumerate().for_each(|(i, weight)| *weight += shift(i));
    adapter.save(Path::new(base), &folder.path().join(name)).unwrap();
    let folded = at(folder, &format!("{name}-folded"));
    done(&["model", "convert", &at(folder, name), &folded]);
    [at(folder, name), folded]
}

/// Adapters of the base: of all matrices, and of some with another scale.
fn adapters(folder: &TempDir, base: &str) -> [[String; 2]; 2] {
    let all = LoraOptions { rank: 4, ..LoraOptions::default() };
    let targets = vec![Projection::QProj, Projection::UpProj];
    let some = LoraOptions { rank: 2, alpha: 3.0, rank_stabilized: true, targets, ..LoraOptions::default() };
    [adapter(folder, "first", base, all, 1), adapter(folder, "second", base, some, 2)]
}

#[test]
fn adapters_of_one_base_make_an_adapter_of_it() {
    let (folder, base) = (folder(), material().base());
    let [[a, a_folded], [b, b_folded]] = adapters(&folder, &base);
    let over_base = ["--method", "task-arithmetic", "--base", &base];
    let cases: [&[&str]; 6] = [
        &["--q", "0.3"],
        &["--q", "0"],
        &["--q=-0.5", "--extrapolate"],
        &["--weight", "0.4", "--weight", "0.6", "--normalise", "false"],
        &[&over_base[..], &["--weight", "0.8", "--weight=-0.5"]].concat(),
        &[&over_base[..], &["--weight", "3", "--weight", "1", "--normalise", "true"]].concat(),
    ];
    for arguments in cases {
        let out = at(&folder, "adapter");
        let told = json(&[&["merge"], arguments, &[&a, &b, &out]].concat());
        assert_eq!(told["adapter"], json!({"base": &base, "rank": 6}), "{arguments:?}");
        let parameters = json(&["model", "inspect", &out])["adapter"]["parameters"].clone();
        assert_eq!((&told["parameters"], &told["base"]), (&parameters, &json!(null)));
        let hash = |path: &str| Adapter::load(Path::new(path), &load(&base).model.config).unwrap().hash();
        assert_eq!(told["models"], json!([{"path": &a, "hash": hash(&a)}, {"path": &b, "hash": hash(&b)}]));
        let folded = merged(&folder, &[arguments, &[&a_folded, &b_folded]].concat());
        for (adapted, folded) in load(&out).model.weights.iter().zip(&folded) {
            assert!((adapted - folded).abs() < 1e-6, "{arguments:?}: {adapted} by the adapter, {folded} of the models");
        }
        fs::remove_dir_all(&out).unwrap();
    }
    // a tokenizer of the first goes before the base's
    fs::copy(format!("{base}/tokenizer.json"), format!("{a}/tokenizer.json")).unwrap();
    fs::write(format!("{a}/tokenizer_config.json"), json!({"chat_template": "{{ messages[0].content }}"}).to_string())
        .unwrap();
    let out = at(&folder, "templated");
    done(&["merge", &a, &b, &out]);
    assert!(load(&out).tokenizer.has_chat_template() && load(&out).tokenizer.hash() == load(&a).tokenizer.hash());
}

#[test]
fn other_merges_of_adapters_are_those_of_the_models_that_they_make() {
    let (folder, base) = (folder(), material().base());
    let [[a, a_folded], [b, b_folded]] = adapters(&folder, &base);
    let [dora, dora_folded] =
        adapter(&folder, "dora", &base, LoraOptions { rank: 2, dora: true, ..LoraOptions::default() }, 3);
    // trained in a second step, on what the first made
    let [next, next_folded] = adapter(&folder, "next", &a_folded, LoraOptions { rank: 2, ..LoraOptions::default() }, 4);
    let over_base = |method: &'static str| ["--base", &base, "--method", method];
    let cases: [(&[&str], [&str; 2], [&str; 2]); 9] = [
        (&["--method", "slerp", "--q", "0.3"], [&a, &b], [&a_folded, &b_folded]),
        (&["--normalise", "false"], [&a, &b], [&a_folded, &b_folded]),
        (&["--q", "0.3"], [&a, &dora], [&a_folded, &dora_folded]),
        (&["--q", "0.3"], [&a, &b_folded], [&a_folded, &b_folded]),
        (&["--q", "0.3"], [&a, &next], [&a_folded, &next_folded]),
        (&["--method", "task-arithmetic", "--base", &a], [&b, &next], [&b_folded, &next_folded]),
        (&[&over_base("ties")[..], &["--density", "0.3"]].concat(), [&a, &b], [&a_folded, &b_folded]),
        (&[&over_base("dare-linear")[..], &["--density", "0.3"]].concat(), [&a, &b], [&a_folded, &b_folded]),
        (&over_base("task-arithmetic"), [&a, &dora], [&a_folded, &dora_folded]),
    ];
    for (arguments, adapters, folded) in cases {
        let out = at(&folder, "out");
        let told = json(&[&["merge"], arguments, &adapters, &[&out]].concat());
        assert_eq!(told["adapter"], json!(null), "{arguments:?}");
        assert_eq!(told["models"][0]["hash"], json!(load(folded[0]).model.hash()));
        fs::remove_dir_all(&out).unwrap();
        let of_adapters = merged(&folder, &[arguments, &adapters].concat());
        assert!(of_adapters == merged(&folder, &[arguments, &folded].concat()), "{arguments:?}");
    }
}

#[test]
fn options_that_do_not_fit_are_refused() {
    let folder = folder();
    let ((a, b), base) = (pair(&folder), material().base());
    let out = at(&folder, "out");
    let cases: [(&[&str], &[&str]); 14] = [
        (&["--q", "1.5", &a, &b], &["beyond the models", "--extrapolate"]),
        (&["--q", "-0.1", &a, &b], &["beyond the models", "--extrapolate"]),
        (&["--q", "NaN", &a, &b], &["NaN"]),
        (&["--q", "0.5", &a, &b, &a], &["--q divides between two models", "--weight"]),
        (&[&a], &["2 or more models"]),
        (&["--weight", "1", &a, &b], &["2 models need as many weights", "but 1"]),
        (&["--base", &base, &a, &b], &["linear knows no base"]),
        (&["--density", "0.5", &a, &b], &["linear keeps everything"]),
        (&["--method", "ties", "--base", &base, &a, &b], &["--density"]),
        (&["--method", "ties", "--density", "0.5", &a, &b], &["ties", "--base"]),
        (&["--method", "dare-ties", "--density", "0", "--base", &base, &a], &["density is 0", "above 0"]),
        (&["--method", "task-arithmetic", &a, &b], &["--base"]),
        (&["--method", "task-arithmetic", "--extrapolate", "--base", &base, &a], &["Leave --extrapolate out"]),
        (&["--method", "slerp", &a, &b, &a], &["2 models, not 3"]),
    ];
    for (arguments, parts) in cases {
        says(&fails(2, &[&["merge"], arguments, &[&out]].concat()), parts);
    }
    // what exists is not replaced
    let before = files(&b);
    says(&fails(2, &["merge", &a, &a, &b]), &["b exists", "Choose a path"]);
    assert!(files(&b) == before);
    says(&fails(2, &["merge", &a, &at(&folder, "none"), &out]), &["none", "Check the path"]);
    assert!(!Path::new(&out).exists());
}

#[test]
fn models_that_do_not_fit_are_refused() {
    let folder = folder();
    let base = material().base();
    let out = at(&folder, "out");
    let refused = |other: &str, parts: &[&str]| says(&fails(2, &["merge", &base, other, &out]), parts);

    let shaped = |name: &str, change: fn(&mut ModelConfig)| {
        model(&folder, name, 1, |checkpoint| {
            let mut config = checkpoint.model.config.clone();
            change(&mut config);
            checkpoint.model = Model::random(config, 0.1, 0);
        })
    };
    refused(&shaped("narrow", |config| config.intermediate_size = 128), &["intermediate_size is 256", "128", "narrow"]);
    refused(&shaped("untied", |config| config.tie_word_embeddings = false), &["tie_word_embeddings", "untied"]);
    refused(&shaped("rope", |config| config.rope_theta = 5e5), &["rope_theta is 10000", "500000"]);
    // another context and another end of responses change no weight's meaning
    let longer = shaped("longer", |config| (config.max_position_embeddings, config.eos_token_ids) = (128, vec![3]));
    done(&["merge", &base, &longer, &at(&folder, "fine")]);

    let words = model(&folder, "words", 1, |checkpoint| {
        let text = fs::read_to_string(format!("{base}/tokenizer.json")).unwrap();
        let mut tokenizer: serde_json::Value = serde_json::from_str(&text).unwrap();
        let vocabulary = tokenizer["model"]["vocab"].as_object_mut().unwrap();
        let (word, id) =
            vocabulary.iter().find(|(_, id)| **id == json!(9)).map(|(w, id)| (w.clone(), id.clone())).unwrap();
        vocabulary.remove(&word);
        vocabulary.insert("entirely-new".into(), id);
        let text = tokenizer.to_string();
        checkpoint.tokenizer = Tokenizer::from_json(text.as_bytes(), Some("<s>"), Some("</s>"), None).unwrap();
    });
    refused(&words, &["The token 9 is", "entirely-new", "share a vocabulary"]);

    let gguf = file(&folder, "model.gguf", "GGUF");
    refused(&gguf, &["is a GGUF file", "sacpo model convert"]);
    let save = |name: &str, base: &str, weight: f32| {
        let mut adapter = Adapter::new(&load(&material().base()).model, LoraOptions::default(), 1).unwrap();
        adapter.weights.fill(weight);
        adapter.save(Path::new(base), &folder.path().join(name)).unwrap();
        at(&folder, name)
    };
    let of_gguf = save("of-gguf", &gguf, 0.1);
    refused(&of_gguf, &["of-gguf is an adapter of a GGUF file", "sacpo model convert"]);
    let (fine, broken) = (save("fine-adapter", &base, 0.1), save("broken-adapter", &base, f32::NAN));
    let message = fails(2, &["merge", &fine, &broken, &out]);
    says(&message, &["broken-adapter", "layers.0.self_attn.q_proj.lora_A.weight", "not finite"]);
    refused(&broken, &["broken-adapter", "model.layers.0.self_attn.q_proj.weight", "not finite"]);
    let huge = save("huge-adapter", &base, 3e38);
    let message = fails(1, &["merge", "--method", "task-arithmetic", "--base", &base, &huge, &out]);
    says(&message, &["too large for f32", "smaller weights"]);

    let broken = model(&folder, "broken", 1, |checkpoint| {
        let norm = checkpoint.model.layout.final_norm.start;
        checkpoint.model.weights[norm + 5] = f32::NAN;
    });
    refused(&broken, &["broken", "model.norm.weight", "not finite"]);
    let huge = model(&folder, "huge", 1, |checkpoint| checkpoint.model.weights.fill(3e38));
    let message = fails(1, &["merge", "--normalise", "false", &huge, &huge, &out]);
    says(&message, &["model.embed_tokens.weight", "too large for f32", "smaller weights"]);

    let weights = format!("{broken}/model.safetensors");
    let whole = fs::read(&weights).unwrap();
    fs::write(&weights, &whole[..whole.len() - 1]).unwrap();
    refused(&broken, &["model.safetensors", "damaged"]);
    fs::remove_file(&weights).unwrap();
    refused(&broken, &["broken", "model.safetensors"]);
    // nothing half-written stays behind
    assert!(!Path::new(&out).exists());
    let names = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(names.filter(|name| name.ends_with(".partial")).count(), 0);
}
