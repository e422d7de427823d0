//! `sacpo bench`: what it prints, and that its figures agree with each other.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::*;
use serde_json::Value;

fn number(value: &Value, path: &str) -> f64 {
    let found = value.pointer(path).unwrap_or_else(|| panic!("{path} is missing: {value}"));
    found.as_f64().unwrap_or_else(|| panic!("{path} is no number: {value}"))
}

/// What holds whatever the machine is and does besides.
fn check(result: &Value) {
    let positive = [
        "/gemm_f32_gflops",
        "/bandwidth_gbs",
        "/parameters",
        "/train/tokens_per_second",
        "/train/pairs_per_second",
        "/train/utilisation",
        "/train/useful_flops_per_step",
        "/generate/batch_1/tokens_per_second",
        "/generate/batch_1/decode_tokens_per_second",
        "/generate/batch_1/bandwidth_utilisation",
        "/generate/batch_16/tokens_per_second",
        "/generate/batch_16/bandwidth_utilisation",
    ];
    for path in positive {
        assert!(number(result, path) > 0.0, "{path}: {result}");
    }
    assert!(result.as_object().unwrap().contains_key("gemm_bf16_gflops"));
    if cfg!(target_os = "linux") {
        assert!(number(result, "/train/peak_memory_bytes") > 4.0 * number(result, "/parameters"));
    }
    let close = |a: f64, b: f64| assert!((a / b - 1.0).abs() < 1e-9, "{a} {b}: {result}");
    let seconds = number(result, "/train/seconds_per_step");
    close(number(result, "/train/pairs_per_second") * seconds, number(result, "/train/pairs_per_step"));
    close(number(result, "/train/tokens_per_second") * seconds, number(result, "/train/tokens_per_step"));
    let rate = number(result, "/train/useful_flops_per_step") / seconds;
    let peak = result["gemm_bf16_gflops"].as_f64().filter(|_| result["train"]["dtype"] == "bf16");
    if let Some(peak) = peak.or((result["train"]["dtype"] == "f32").then(|| number(result, "/gemm_f32_gflops"))) {
        close(number(result, "/train/utilisation"), rate / (1e9 * peak));
    }

    // the stages of a step take its time, and each is there
    let stages = result["train"]["stages"].as_array().unwrap();
    assert_eq!(stages.len(), 9, "{stages:?}");
    assert!(stages.iter().all(|stage| number(stage, "/seconds") > 0.0), "{stages:?}");
    close(stages.iter().map(|stage| number(stage, "/share")).sum(), 1.0);
    // nothing is recomputed in a model this small, so the products do the useful work and no other
    let done: f64 = stages
        .iter()
        .filter(|stage| stage.get("gflops").is_some())
        .map(|stage| 1e9 * number(stage, "/gflops") * number(stage, "/seconds"))
        .sum();
    let useful = number(result, "/train/useful_flops_per_step");
    close(done / useful, 1.0);
}

#[test]
fn a_drawn_model_is_measured_and_figures_agree() {
    let bench = ["bench", "--shape", "tiny", "--batch-size", "2", "--threads", "2"];
    let result = json(&[&bench[..], &["--scaling", "length,threads"]].concat());
    check(&result);
    assert_eq!(result["model"], "tiny");
    assert_eq!(number(&result, "/train/pairs_per_step"), 2.0);
    let column = |table: &str, key: &str| -> Vec<u64> {
        result["scaling"][table].as_array().unwrap().iter().map(|point| point[key].as_u64().unwrap()).collect()
    };
    assert_eq!(column("threads", "threads"), [1, 2]);
    assert_eq!(column("length", "length"), [115, 460, 1840]);
    assert!(result["scaling"].get("size").is_none());

    // the same tokens are drawn again, and text says the same as the object
    let text = done(&bench).stdout;
    let tokens = format!("{} tokens a step", result["train"]["tokens_per_step"]);
    says(&text, &[&tokens, "matrix products in f32", "products, weight gradient", "optimizer", "sixteen answers"]);
}

#[test]
fn a_model_of_a_folder_with_a_short_context_is_measured_in_bf16() {
    let base = material().base();
    let result = json(&["bench", "--model", &base, "--steps", "1", "--dtype", "bf16", "--generation-dtype", "int8"]);
    check(&result);
    assert_eq!((&result["train"]["dtype"], &result["generate"]["dtype"]), (&"bf16".into(), &"int8".into()));
}

#[test]
fn what_cannot_be_measured_is_refused() {
    says(&fails(2, &["bench", "--model", "no/such/model"]), &["no/such/model"]);
    for wrong in [&["--steps", "0"][..], &["--shape", "huge"], &["--shape", "tiny", "--model", "m"]] {
        assert_eq!(run(&[&["bench"], wrong].concat()).code, 2, "{wrong:?}");
    }
}
