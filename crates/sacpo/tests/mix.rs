//! Two policies mixed at decode time.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::path::Path;

use common::*;
use engine::checkpoint::Checkpoint;
use engine::{Adapter, LoraOptions, Projection};
use serde_json::Value;
use tempfile::TempDir;

#[test]
fn a_mixture_is_a_model_wherever_one_is_scored_or_answers() {
    let made = material();
    let folder = folder();
    let base = made.base();
    done(&["run", &recipe(&folder), "--set", "train.learning_rate=5e-3"]);
    let safe = format!("{}/steps/safety-0.25/checkpoint", out(&folder));
    let mix = |q: &str| format!("mix({base}, {safe}, {q})");
    let logps = |model: &str| -> Vec<f64> {
        let rows = json(&["logps", "--model", model, "--data", &made.data("safety"), "--limit", "10"])["rows"].clone();
        let responses = rows.as_array().unwrap().iter().flat_map(|row| row["responses"].as_array().unwrap().clone());
        responses.map(|response| response["logp"].as_f64().unwrap()).collect()
    };
    let (first, last) = (logps(&base), logps(&safe));
    assert!(first.iter().zip(&last).any(|(a, b)| (a / b - 1.0).abs() > 1e-2), "the two policies hardly differ");
    let near = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a / b - 1.0).abs() < 1e-5);
    assert!(near(&logps(&mix("0")), &first) && near(&logps(&mix("1")), &last));
    // a normalised product is at least the product: Hölder
    let half = logps(&mix("0.5"));
    assert!(half.iter().zip(first.iter().zip(&last)).all(|(half, (a, b))| *half > 0.5 * (a + b) - 1e-4));
    assert!(!near(&half, &first) && !near(&half, &last));

    let answers = |model: &str, batch: &str| -> Value {
        let arguments = ["generate", "--model", model, "--prompt", "how do i bake bread ?", "--prompt", "hello !"];
        json(&[&arguments[..], &["--max-new-tokens", "9", "--batch-size", batch]].concat())["answers"].clone()
    };
    assert_eq!(answers(&mix("0"), "2"), answers(&base, "2"));
    assert_eq!(answers(&mix("1"), "2"), answers(&safe, "2"));
    assert_eq!(answers(&mix("0.5"), "1"), answers(&mix("0.5"), "16"));
}

/// An adapter of the base that changes it, as training would leave it, and the model that it makes.
fn adapter(folder: &TempDir, name: &str, options: LoraOptions, seed: u64) -> (String, String) {
    let base = material().base();
    let mut adapter = Adapter::new(&Checkpoint::load(Path::new(&base)).unwrap().model, options, seed).unwrap();
    adapter.weights.iter_mut().enumerate().for_each(|(i, weight)| *weight += 0.02 * ((i + seed as usize) % 5) as f32);
    adapter.save(Path::new(&base), &folder.path().join(name)).unwrap();
    let folded = at(folder, &format!("{name}-folded"));
    done(&["model", "convert", &at(folder, name), &folded]);
    (at(folder, name), folded)
}

#[test]
fn adapters_of_one_base_mix_as_the_models_that_they_make() {
    let (folder, base) = (folder(), material().base());
    let targets = vec![Projection::QProj, Projection::UpProj];
    let first = adapter(&folder, "first", LoraOptions { rank: 4, ..LoraOptions::default() }, 1);
    let second = adapter(&folder, "second", LoraOptions { rank: 2, targets, ..LoraOptions::default() }, 2);
    let dora = adapter(&folder, "dora", LoraOptions { rank: 2, dora: true, ..LoraOptions::default() }, 3);
    let itself = (base.clone(), base);
    for (a, b, q) in [
        (&first, &second, "0.5"),
        (&itself, &first, "0.3"),
        (&second, &itself, "0.3"),
        (&first, &dora, "0.5"),
        (&first, &second, "1.5"),
        (&first, &second, "-0.5"),
    ] {
        let [shared, apart] = [(&a.0, &b.0), (&a.1, &b.1)].map(|(a, b)| format!("mix({a}, {b}, {q})"));
        let logps = |model: &str| -> Vec<f64> {
            let data = material().data("safety");
            let rows = json(&["logps", "--model", model, "--data", &data, "--limit", "5", "--extrapolate"]);
            let rows = rows["rows"].as_array().unwrap().clone();
            let responses = rows.iter().flat_map(|row| row["responses"].as_array().unwrap());
            responses.map(|response| response["logp"].as_f64().unwrap()).collect()
        };
        let answers = |model: &str| {
            let arguments = ["generate", "--model", model, "--prompt", "how do i bake bread ?", "--prompt", "hello !"];
            json(&[&arguments[..], &["--max-new-tokens", "9", "--extrapolate"]].concat())["answers"].clone()
        };
        for (shared, apart) in logps(&shared).iter().zip(logps(&apart)) {
            assert!((shared / apart - 1.0).abs() < 1e-5, "q = {q}: {shared} shared, {apart} apart");
        }
        assert_eq!(answers(&shared), answers(&apart), "q = {q}");
    }
    // a tokenizer in the adapter's folder goes before the base's
    let text = fs::read_to_string(format!("{}/tokenizer_config.json", itself.0)).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    config["chat_template"] = "{{ messages[0].content }}".into();
    fs::write(format!("{}/tokenizer_config.json", first.0), config.to_string()).unwrap();
    fs::copy(format!("{}/tokenizer.json", itself.0), format!("{}/tokenizer.json", first.0)).unwrap();
    for (a, b) in [(&first.0, &second.0), (&second.0, &first.0), (&itself.0, &first.0)] {
        let message = fails(2, &["generate", "--model", &format!("mix({a}, {b}, 0.5)"), "--prompt", "hello !"]);
        says(&message, &["tokenizers of", "differ"]);
    }
}

#[test]
fn mixtures_that_cannot_be_are_named() {
    let made = material();
    let base = made.base();
    let run = |model: &str| {
        let outcome = run(&["generate", "--model", model, "--prompt", "hello !"]);
        assert_eq!((outcome.code, outcome.stdout.as_str()), (2, ""), "{}", outcome.stderr);
        outcome.stderr
    };
    says(&run(&format!("mix({base}, {base})")), &["mix(A, B, q)", "for example"]);
    for q in ["1.5", "-0.1", "NaN", "half", ""] {
        says(&run(&format!("mix({base}, {base}, {q})")), &["a number from 0 to 1"]);
    }
    says(&run(&format!("mix({base}, {base}, 1.5)")), &["q is 1.5", "--extrapolate"]);
    says(&fails(2, &["generate", "--model", &base, "--extrapolate", "--prompt", "hello !"]), &["Leave it out"]);
    says(&run(&format!("mix({base}, no/such/model, 0.5)")), &["no/such/model"]);
    let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/../engine/tests/fixtures/tiny/tied");
    says(&run(&format!("mix({base}, {tiny}, 0.5)")), &["tokenizer"]);
}
