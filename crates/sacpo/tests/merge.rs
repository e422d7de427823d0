//! Merging on the command line: what the methods make of real checkpoints, and what is refused.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::path::Path;

use common::*;
use engine::checkpoint::Checkpoint;
use engine::tokenizer::Tokenizer;
use engine::{Adapter, LoraOptions, Model, ModelConfig};
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
    says(&fails(2, &["merge", &a, &a, &b]), &["b exists", "Choose a folder"]);
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

    let mut adapter = Adapter::new(&load(&base).model, LoraOptions::default(), 1).unwrap();
    adapter.weights.fill(0.01);
    adapter.save(Path::new(&base), &folder.path().join("adapter")).unwrap();
    refused(&at(&folder, "adapter"), &["is an adapter", "sacpo model convert"]);
    refused(&file(&folder, "model.gguf", "GGUF"), &["is a GGUF file", "sacpo model convert"]);

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
