//! `sacpo run --dry-run`: what a run would do, without doing it.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::path::Path;

use common::*;
use serde_json::{Value, json};

/// Kind, name, start and state of every stage.
fn stages(forecast: &Value) -> Vec<String> {
    let stages = forecast["stages"].as_array().unwrap().iter();
    stages.map(|s| format!("{} {} < {}: {}", s["kind"], s["name"], s["from"], s["state"]).replace('"', "")).collect()
}

#[test]
fn it_says_what_is_there_and_writes_nothing() {
    let folder = folder();
    let recipe = recipe(&folder);
    let blends = "[merge]\nq = 0.5\n[mix]\nq = 0.25\n";
    fs::write(&recipe, fs::read_to_string(&recipe).unwrap() + blends).unwrap();
    let before = json(&["run", &recipe, "--dry-run"]);
    assert_eq!(
        stages(&before),
        [
            "training helpfulness < [base]: open",
            "training safety-0.25 < [helpfulness]: open",
            "merge merge-0.5 < [helpfulness,safety-0.25]: open",
            "mix mix-0.25 < [helpfulness,safety-0.25]: open",
        ]
    );
    assert!(before["seconds"].as_f64().unwrap() > 0.0 && before["peak_memory_bytes"].as_u64().unwrap() > 1 << 20);
    assert!(before["stages"][0]["seconds"].as_f64().unwrap() > 0.0 && before["stages"][2]["seconds"] == Value::Null);
    assert!(!Path::new(&out(&folder)).exists(), "a dry run has made its folder");
    says(
        &done(&["run", &recipe, "--dry-run"]).stdout,
        &["training   helpfulness (from base): to do, about", "tokens a pass, everything kept", "Nothing was written"],
    );

    done(&["run", &recipe]);
    let files_before = files(out(&folder));
    let after = json(&["run", &recipe, "--dry-run"]);
    assert!(stages(&after).iter().all(|stage| stage.ends_with(": complete")), "{after}");
    assert_eq!((&after["seconds"], &after["peak_memory_bytes"]), (&json!(0.0), &Value::Null));
    // only what depends on a change is open
    let changed = fails(2, &["run", &recipe, "--dry-run", "--set", "step.2.epochs=2"]);
    says(&changed, &["safety-0.25", "other data or options"]);
    let merged = fails(2, &["run", &recipe, "--dry-run", "--set", "merge.method=slerp"]);
    says(&merged, &["merge-0.5", "other data or options"]);
    // a run says so too, before it trains
    let longer = fails(2, &["run", &recipe, "--set", "merge.method=slerp"]);
    says(&longer, &["merge-0.5", "other data or options"]);
    fs::remove_dir_all(Path::new(&out(&folder)).join("steps/safety-0.25")).unwrap();
    let half = json(&["run", &recipe, "--dry-run"]);
    assert_eq!(
        half["stages"].as_array().unwrap().iter().filter(|stage| stage["state"] == "complete").count(),
        1,
        "{half}"
    );
    let mut files_after = files(out(&folder));
    files_after.retain(|path, _| !path.starts_with("steps/safety-0.25"));
    assert!(files_after.iter().all(|(path, bytes)| files_before.get(path) == Some(bytes)));
}

#[test]
fn it_checks_what_a_run_checks() {
    let folder = folder();
    let recipe = recipe(&folder);
    says(&fails(2, &["run", &recipe, "--dry-run", "--set", "step.1.data=nowhere"]), &["nowhere"]);
    says(&fails(2, &["run", &recipe, "--dry-run", "--set", "step.1.betta=1"]), &["Did you mean `beta`?"]);
    let no_folder = format!("run.out={}/run", file(&folder, "no-folder", "text"));
    says(&fails(2, &["run", &recipe, "--dry-run", "--set", &no_folder]), &["write in", "no-folder"]);
    // what would fail only after training: a base model that cannot be merged, an adapter on an adapter
    let adapter = at(&folder, "adapter");
    done(&["model", "add-adapter", &material().base(), &adapter]);
    let text = fs::read_to_string(&recipe).unwrap();
    let alone = format!(
        "[[step]]\nname = \"alone\"\nmetric = \"safety\"\nfrom = \"base\"\nbeta = 1\nlora_rank = 2\ndata = {:?}\n",
        material().data("safety")
    );
    fs::write(&recipe, text + &alone).unwrap();
    let base = format!("model.base={adapter}");
    says(&fails(2, &["run", &recipe, "--dry-run", "--set", &base]), &["is an adapter", "sacpo model convert"]);
}
