//! The memory of a training: foretold, kept to, and refused before anything long begins.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use common::*;
use serde_json::Value;

/// What a training says it takes, in bytes; the number is rounded up.
fn foretold(stderr: &str) -> f64 {
    let line = stderr.lines().find(|line| line.contains(": at most ")).unwrap_or_else(|| panic!("no plan: {stderr}"));
    let (amount, _) = line.trim().split_once(": at most ").unwrap();
    let (number, unit) = amount.split_once(' ').unwrap();
    number.parse::<f64>().unwrap() * if unit == "GiB" { f64::from(1 << 30) } else { f64::from(1 << 20) }
}

#[test]
fn the_peak_of_a_real_training_is_as_foretold() {
    let Some(model) = smollm2() else { return };
    let folder = folder();
    let mut pairs = String::new();
    for i in 0..40 {
        let words = |word: &str| format!("{word} ").repeat(20 + i % 7 * 10);
        let row = serde_json::json!({"prompt": words("why"), "chosen": words("because"), "rejected": words("no")});
        let _ = writeln!(pairs, "{row}");
    }
    let data = file(&folder, "pairs.jsonl", pairs);
    for (name, settings) in [
        // its batches differ
        ("whole", &["data.max_pairs=12"][..]),
        ("recomputed", &["train.micro_batch_tokens=300", "run.memory_gib=2.3"]),
        ("in_bf16", &["train.dtype=bf16"]),
        ("adapter", &["train.lora_rank=16"]),
    ] {
        let out = at(&folder, name);
        let mut arguments = vec!["train", "--model", model.to_str().unwrap(), "--data", &data, "--metric", "m"];
        arguments.extend(["--beta", "0.1", "--out", &out, "--json", "--set", "data.max_pairs=4"]);
        arguments.extend(["--set", "data.max_validation_pairs=1", "--set", "train.batch_size=4"]);
        settings.iter().for_each(|setting| arguments.extend(["--set", setting]));
        let outcome = done(&arguments);
        let (foretold, peak) =
            (foretold(&outcome.stderr), object(&outcome.stdout)["peak_memory_bytes"].as_f64().unwrap());
        assert!(peak <= foretold && foretold <= 1.25 * peak, "{name}: {peak} bytes, {foretold} foretold");
        assert_eq!(outcome.stderr.contains("blocks computed again"), name == "recomputed", "{}", outcome.stderr);
    }
    let narrow = ["--beta", "0.1", "--out", &at(&folder, "narrow"), "--set", "run.memory_gib=0.5"];
    let refusal = fails(
        2,
        &[&["train", "--model", model.to_str().unwrap(), "--data", &data, "--metric", "m"], &narrow[..]].concat(),
    );
    offers_what_helps(&refusal, &["lora_rank = 16", "adamw-8bit"]);
}

/// A refusal must say what would need less, and name these among it and nothing that would not.
fn offers_what_helps(refusal: &str, changes: &[&str]) {
    says(refusal, &["as run.memory_gib says", "max_length", "allow more"]);
    says(refusal, changes);
    let mib = |text: &str| {
        let (number, unit) = text.split_once(' ').unwrap();
        number.parse::<f64>().unwrap() * if unit.starts_with("GiB") { 1024.0 } else { 1.0 }
    };
    let mut needed = refusal.split("needs ").skip(1).map(mib);
    let least = needed.next().unwrap();
    assert_eq!(needed.clone().count(), changes.len(), "{refusal}");
    assert!(needed.all(|needed| needed < least), "{refusal}");
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_trained() {
    let folder = folder();
    let recipe = recipe(&folder);
    let narrow = ["--set", "run.memory_gib=0.01"];
    for command in [vec!["run", &recipe], vec!["run", &recipe, "--dry-run"]] {
        let refusal = fails(2, &[&command[..], &narrow].concat());
        says(&refusal, &["In the step `helpfulness`: This training needs"]);
        // the reference's pass is what takes most beside so small a model
        offers_what_helps(&refusal, &[]);
    }
    assert!(!Path::new(&out(&folder)).join("steps").exists());
    let made = material();
    let (base, data) = (made.base(), made.data("safety"));
    let own = ["--model", &base, "--data", &data, "--metric", "safety", "--set", "data.max_length=64"];
    let (rewards, policies) = (at(&folder, "reward"), at(&folder, "policy"));
    let scorer = [&["train", "reward"], &own[..], &["--out", &rewards], &narrow].concat();
    offers_what_helps(&fails(2, &scorer), &[]);
    let policy = [&["train", "--beta", "0.1"], &own[..], &["--out", &policies], &narrow].concat();
    offers_what_helps(&fails(2, &policy), &[]);
    assert!(!Path::new(&policies).join("steps").exists());
}

#[test]
fn a_plan_is_said_and_what_is_chosen_is_no_part_of_what_is_made() {
    let folder = folder();
    let recipe = recipe(&folder);
    let forecast = common::json(&["run", &recipe, "--dry-run"]);
    let plans: Vec<&Value> = forecast["stages"].as_array().unwrap().iter().map(|stage| &stage["memory"]).collect();
    let peaks: Vec<u64> = plans.iter().map(|plan| plan["peak_bytes"].as_u64().unwrap()).collect();
    assert_eq!(forecast["peak_memory_bytes"].as_u64(), peaks.iter().copied().max());
    assert!(plans.iter().all(|plan| plan["recompute"] == false && plan["micro_batch_tokens"].as_u64().unwrap() > 5));
    let first = done(&["run", &recipe]);
    assert_eq!(first.stderr.matches("everything kept.").count(), 2, "a line for each training: {}", first.stderr);
    let manifest = fs::read(format!("{}/manifest.json", out(&folder))).unwrap();
    // another cut and another limit are the same run
    let again = done(&["run", &recipe, "--set", "train.micro_batch_tokens=70", "--set", "run.memory_gib=100"]);
    says(&again.stderr, &["is finished"]);
    assert_eq!(fs::read(format!("{}/manifest.json", out(&folder))).unwrap(), manifest);
}
