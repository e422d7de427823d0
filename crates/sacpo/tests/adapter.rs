//! Adapters on the command line: made, folded, stacked, and taken wherever a model is.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::path::Path;

use common::*;
use engine::checkpoint::Checkpoint;
use engine::{Adapter, LoraOptions, Projection};
use serde_json::{Value, json};
use tempfile::TempDir;

/// An adapter of the base model that changes it, as training would leave it.
fn trained(folder: &TempDir, name: &str, options: LoraOptions) -> String {
    let base = material().base();
    let model = Checkpoint::load(Path::new(&base)).unwrap().model;
    let mut adapter = Adapter::new(&model, options, 1).unwrap();
    adapter.weights.iter_mut().enumerate().for_each(|(i, weight)| *weight += 0.01 * (i % 5) as f32);
    adapter.save(Path::new(&base), &folder.path().join(name)).unwrap();
    at(folder, name)
}

fn logps(model: &str) -> Value {
    json(&["logps", "--model", model, "--data", &material().data("safety"), "--limit", "4"])
}

#[test]
fn a_fresh_adapter_is_made_described_and_changes_nothing() {
    let folder = folder();
    let (base, out) = (material().base(), at(&folder, "adapter"));
    let made =
        json(&["model", "add-adapter", &base, &out, "--rank", "4", "--alpha", "6", "--targets", "q_proj, up_proj"]);
    assert_eq!(made, json(&["model", "inspect", &out]));
    assert_eq!(made["adapter"]["targets"], json!(["q_proj", "up_proj"]));
    assert_eq!((&made["adapter"]["rank"], &made["adapter"]["scale"]), (&json!(4), &json!(1.5)));
    // per block A and B of q_proj [96, 96] and up_proj [256, 96]
    assert_eq!(made["adapter"]["parameters"], json!(3 * 4 * (96 + 96 + 96 + 256)));
    says(&done(&["model", "inspect", &out]).stdout, &["LoRA of rank 4, scale 1.5, on q_proj, up_proj", &base]);
    assert_eq!(logps(&out), logps(&base));
    // the same seed draws the same values, another one others
    let weights = |out: &str| fs::read(Path::new(out).join("adapter_model.safetensors")).unwrap();
    for (name, seed, same) in [("again", "0", true), ("other", "1", false)] {
        let copy = at(&folder, name);
        done(&["model", "add-adapter", &base, &copy, "--rank", "4", "--targets", "q_proj,up_proj", "--seed", seed]);
        assert_eq!(weights(&copy) == weights(&out), same);
    }
    let all = json(&["model", "add-adapter", &base, &at(&folder, "all"), "--dora", "--rank-stabilized"]);
    assert_eq!(all["adapter"]["targets"].as_array().unwrap().len(), 7);
    assert_eq!((&all["adapter"]["dora"], &all["adapter"]["scale"]), (&json!(true), &json!(8.0)));
    assert_eq!(logps(&at(&folder, "all")), logps(&base));
}

#[test]
fn folding_stacking_and_loading_agree() {
    let folder = folder();
    let base = material().base();
    let first = trained(&folder, "first", LoraOptions { rank: 2, ..LoraOptions::default() });
    let targets = vec![Projection::VProj];
    let second =
        trained(&folder, "second", LoraOptions { rank: 3, rank_stabilized: true, targets, ..LoraOptions::default() });
    let (folded, both, stacked) = (at(&folder, "folded"), at(&folder, "both"), at(&folder, "stacked"));
    done(&["model", "fold-adapter", &base, &first, &folded]);
    assert_eq!(logps(&folded), logps(&first));
    assert_ne!(logps(&folded), logps(&base));
    let prompt = ["--prompt", "hello !", "--raw", "--max-new-tokens", "6"];
    let answers = |model: &str| json(&[&["generate", "--model", model], &prompt[..]].concat());
    assert_eq!(answers(&folded), answers(&first));

    done(&["model", "fold-adapter", &folded, &second, &both]);
    done(&["model", "stack-adapters", &base, &first, &second, &stacked]);
    let values = |model: &str| -> Vec<f64> {
        let rows = logps(model)["rows"].as_array().unwrap().clone();
        let responses = rows.iter().flat_map(|row| row["responses"].as_array().unwrap().clone());
        responses.map(|response| response["logp"].as_f64().unwrap()).collect()
    };
    for (stacked, folded) in values(&stacked).iter().zip(values(&both)) {
        assert!((stacked / folded - 1.0).abs() < 1e-5, "{stacked} stacked, {folded} folded");
    }
}

#[test]
fn what_cannot_be_done_says_why_and_leaves_nothing() {
    let folder = folder();
    let base = material().base();
    let out = at(&folder, "out");
    let add = |extra: &[&str]| fails(2, &[&["model", "add-adapter", &base, &out], extra].concat());
    says(&add(&["--targets", "lm_head"]), &["lm_head cannot be adapted", "q_proj"]);
    says(&add(&["--targets", "q_proj,w1"]), &["w1 is not a matrix", "down_proj"]);
    says(&add(&["--rank", "0"]), &["rank is 0", "from 1"]);
    says(&add(&["--dropout", "1"]), &["dropout is 1", "less than 1"]);
    says(&add(&["--alpha", "NaN"]), &["alpha is NaN", "greater than 0"]);
    says(&add(&["--dora", "--dropout", "0.1"]), &["DoRA", "dropout of 0.1", "Set the dropout to 0"]);

    let adapter = trained(&folder, "adapter", LoraOptions::default());
    let dora = trained(&folder, "dora", LoraOptions { dora: true, ..LoraOptions::default() });
    let fold = |model: &str, adapter: &str| fails(2, &["model", "fold-adapter", model, adapter, &out]);
    says(&fails(2, &["model", "add-adapter", &adapter, &out]), &["is an adapter", "sacpo model convert"]);
    says(&fold(&adapter, &dora), &["is an adapter", "sacpo model convert"]);
    says(&fails(2, &["model", "stack-adapters", &base, &adapter, &dora, &out]), &["DoRA cannot be stacked", "Fold it"]);
    says(&fold(&base, &base), &["adapter_config.json", "Check the path"]);

    // an adapter of another model
    let mut checkpoint = Checkpoint::load(Path::new(&base)).unwrap();
    let narrow = engine::ModelConfig { intermediate_size: 128, ..checkpoint.model.config };
    checkpoint.model = engine::Model::random(narrow, 0.1, 0);
    checkpoint.save(&folder.path().join("narrow")).unwrap();
    let message = fold(&at(&folder, "narrow"), &adapter);
    says(&message, &["gate_proj.lora_B.weight", "[256, 16]", "[128, 16]", "trained on"]);
    // damaged
    let weights = format!("{adapter}/adapter_model.safetensors");
    let whole = fs::read(&weights).unwrap();
    fs::write(&weights, &whole[..whole.len() - 1]).unwrap();
    says(&fold(&base, &adapter), &["adapter_model.safetensors", "damaged"]);
    says(&fails(2, &["logps", "--model", &adapter, "--data", &material().data("safety")]), &["damaged"]);
    assert!(!Path::new(&out).exists());
    // what exists is not replaced
    says(&fails(2, &["model", "add-adapter", &base, &dora]), &["dora exists", "Choose a path"]);
}
