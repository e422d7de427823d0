//! Two policies mixed at decode time.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::*;
use serde_json::Value;

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
    says(&run(&format!("mix({base}, no/such/model, 0.5)")), &["no/such/model"]);
    let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/../engine/tests/fixtures/tiny/tied");
    says(&run(&format!("mix({base}, {tiny}, 0.5)")), &["tokenizer"]);
}
