//! Steps with every kind of objective, data, adapter and optimizer, from a recipe to a policy; killed and continued.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::path::Path;

use align::world::{Metric, World, json_lines};
use common::*;
use serde_json::{Value, json};
use tempfile::TempDir;

/// The recipe of `common::recipe`, with these settings.
fn run_with(folder: &TempDir, settings: &[&str]) -> Vec<String> {
    let mut arguments = vec!["run".to_owned(), recipe(folder)];
    for setting in settings {
        arguments.extend(["--set".to_owned(), (*setting).to_owned()]);
    }
    arguments
}

fn metrics(folder: &TempDir, policy: &str) -> Vec<Value> {
    read_lines(Path::new(&out(folder)).join("steps").join(policy).join("metrics.jsonl"))
}

fn step_of(folder: &TempDir, policy: &str, name: &str) -> String {
    text(&Path::new(&out(folder)).join("steps").join(policy).join(name))
}

/// A file of the world's answers with labels.
fn labelled(folder: &TempDir) -> String {
    let rows = World::new(0).labelled_completions(Metric::Safety, 400, 0);
    file(folder, "labelled.jsonl", json_lines(&rows).unwrap())
}

#[test]
fn every_objective_trains_from_margin_zero() {
    for objective in
        ["robust-dpo", "ipo", "hinge", "nca", "exo", "sppo", "apo-zero", "apo-down", "simpo", "orpo", "cpo", "tdpo"]
    {
        let folder = folder();
        let set = format!("step.1.objective={objective}");
        let outcome = done(&run_with(&folder, &[&set, "step.2.objective=bco", "data.max_pairs=20"]));
        let lines = metrics(&folder, "helpfulness");
        if !["simpo", "orpo", "cpo"].contains(&objective) {
            assert_eq!(lines[0]["rewards/margins"], json!(0.0), "{objective}");
        }
        assert!(lines.iter().all(|line| line["loss"].as_f64().is_some_and(f64::is_finite)), "{objective}");
        assert_eq!(lines[0].get("kl/chosen"), (objective == "tdpo").then_some(&json!(0.0)), "{objective}");
        let covered = objective == "robust-dpo";
        assert_eq!(!outcome.stderr.contains("Theorem 1 does not cover"), covered, "{objective}: {}", outcome.stderr);
    }
}

#[test]
fn labelled_responses_and_pairs_train_losses_of_single_responses() {
    let folder = folder();
    let settings = ["step.1.objective=kto", "step.2.objective=bco", &format!("step.2.data={}", labelled(&folder))];
    let outcome = done(&run_with(&folder, &settings));
    says(
        &outcome.stderr,
        &[
            "Warning: the step `helpfulness` uses `kto`, which Theorem 1 does not cover",
            "Step helpfulness: 120 labelled responses",
            "all or nothing",
        ],
    );
    assert!(!outcome.stderr.contains("`bco`, which Theorem 1"), "{}", outcome.stderr);
    let (kto, bco) = (metrics(&folder, "helpfulness"), metrics(&folder, "safety-0.25"));
    assert_eq!((&kto[0]["kl"], &bco[0]["delta"], &kto[0]["rewards/chosen"]), (&json!(0.0), &json!(0.0), &json!(0.0)));
    assert!(bco[9]["delta"].as_f64().is_some_and(|delta| delta != 0.0));
    let results = read_json(Path::new(&out(&folder)).join("results.json"));
    let report = &results["policies"][2]["validation"]["safety"];
    assert!(report["pairs"].as_u64().unwrap() > 10 && report["accuracy"].as_f64().unwrap() > 0.0, "{report}");

    // unequal classes: the rule of the weights
    let positive = fs::read_to_string(labelled(&folder)).unwrap();
    let positive: Vec<&str> = positive.lines().filter(|line| line.contains("true")).collect();
    let second = common::folder();
    let one_class = file(&second, "positive.jsonl", positive.join("\n"));
    let unlabelled: Vec<String> = positive.iter().map(|line| line.replace("\"label\":true", "\"id\":0")).collect();
    let demonstrations = file(&second, "demonstrations.jsonl", unlabelled.join("\n"));
    let settings = [
        "step.1.objective=sft",
        &format!("step.1.data={demonstrations}"),
        "step.2.objective=kto",
        &format!("step.2.data={one_class}"),
    ];
    let outcome = done(&run_with(&second, &settings));
    let trained = "Step helpfulness: 120 labelled responses";
    says(&outcome.stderr, &[trained, "KTO's rule is a ratio from 1 to 4/3", "One of the classes is missing"]);
    assert!(metrics(&second, "safety-0.25").iter().all(|line| line["loss"].as_f64().is_some_and(f64::is_finite)));
}

#[test]
fn data_that_lack_what_the_objective_needs_are_named() {
    let folder = folder();
    let labelled = labelled(&folder);
    let without_flags = read_lines(material().data("safety")).into_iter().map(|mut row| {
        row.as_object_mut().unwrap().retain(|name, _| !name.starts_with("safe_"));
        row.to_string()
    });
    let plain = file(&folder, "plain.jsonl", without_flags.collect::<Vec<_>>().join("\n"));
    for (settings, parts) in [
        (vec![format!("step.2.data={labelled}")], &["single responses", "`kto`, `bco`, `sft`"][..]),
        (vec!["step.2.objective=modpo".into()], &["`modpo`", "Line ", "`margin`"]),
        (
            vec!["step.2.objective=safe-dpo".into(), format!("step.2.data={plain}")],
            &["`safe-dpo`", "`safe_chosen`", "plain.jsonl"],
        ),
        (vec!["step.2.objective=kto".into(), "train.batch_size=1".into()], &["at least 2", "batch_size is 1"]),
        (vec!["step.2.objective=dpo".into(), "step.2.gamma=1".into()], &["`gamma`", "`simpo`"]),
        (vec!["step.2.lora_rank=1000".into()], &["step `safety`", "the rank is 1000"]),
        (
            vec!["step.1.validate_every=5".into(), "data.validation_fraction=0.0".into()],
            &["`helpfulness`", "train.validate_every", "0 rows"],
        ),
    ] {
        let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
        says(&fails(2, &run_with(&folder, &settings)), parts);
        assert!(!Path::new(&out(&folder)).exists(), "{settings:?} is found before the first step is trained");
    }

    // both unsafe: nothing to learn; the unsafe chosen one changes places
    let rows = [(true, true), (true, false), (false, true), (false, false)].map(|(chosen, rejected)| {
        json!({
            "prompt": "how do i bake bread ?", "chosen": "it depends .", "rejected": "be careful .",
            "safe_chosen": chosen, "safe_rejected": rejected,
        })
    });
    let rows: Vec<String> = rows.iter().cycle().take(40).map(Value::to_string).collect();
    let data = file(&folder, "flags.jsonl", rows.join("\n"));
    let settings = ["step.1.objective=safe-dpo", "step.1.delta=1", &format!("step.1.data={data}")];
    let settings = [&settings[..], &["data.validation_fraction=0.0", "train.epochs=2"]].concat();
    let outcome = done(&run_with(&common::folder(), &settings));
    says(&outcome.stderr, &["Step helpfulness: 30 pairs", "10 rows left out, from which the objective cannot learn"]);
}

#[test]
fn adapters_are_folded_or_stacked_and_make_the_policy() {
    let made = material();
    let folder = folder();
    let lora = ["train.lora_rank=4", "train.lora_alpha=8", "train.learning_rate=5e-3", "data.max_pairs=60"];
    done(&run_with(&folder, &[&lora[..], &["train.lora_previous=stack", "step.2.lora_rank=3"]].concat()));
    for name in ["helpfulness", "safety-0.25"] {
        assert_eq!(metrics(&folder, name)[0]["rewards/margins"], json!(0.0));
    }
    let base = |name: &str, folder: &TempDir| {
        read_json(step_of(folder, name, "adapter/adapter_config.json"))["base_model_name_or_path"].clone()
    };
    assert_eq!(base("helpfulness", &folder), json!(made.base()));
    assert_eq!(base("safety-0.25", &folder), json!(made.base()), "stacked on the first, below which is the base");
    let config = read_json(step_of(&folder, "safety-0.25", "adapter/adapter_config.json"));
    assert_eq!(config["r"], json!(7));
    let second = common::folder();
    done(&run_with(&second, &lora));
    assert_eq!(base("safety-0.25", &second), json!(step_of(&second, "helpfulness", "checkpoint")));

    // the adapter on its base is the policy; the reference of the second step is the first policy as it was saved
    let logps = |model: &str| -> Vec<f64> {
        let rows = json(&["logps", "--model", model, "--data", &made.data("safety"), "--limit", "20"])["rows"].clone();
        let responses = rows.as_array().unwrap().iter().flat_map(|row| row["responses"].as_array().unwrap().clone());
        responses.map(|response| response["logp"].as_f64().unwrap()).collect()
    };
    for (folder, name) in [(&folder, "helpfulness"), (&folder, "safety-0.25"), (&second, "safety-0.25")] {
        let (adapter, policy) = (step_of(folder, name, "adapter"), step_of(folder, name, "checkpoint"));
        let same = logps(&adapter).iter().zip(&logps(&policy)).all(|(a, b)| (a / b - 1.0).abs() < 1e-5);
        assert!(same, "{adapter}");
    }
    let reference = read_json(step_of(&folder, "safety-0.25", "policy.json"))["reference"].clone();
    assert_eq!(reference, read_json(step_of(&folder, "helpfulness", "policy.json"))["model"]);
    says(&fails(2, &run_with(&folder, &lora)), &["other data or options"]);

    // a changed or lost adapter is missed before the training of what would be stacked on it
    fs::remove_dir_all(step_of(&folder, "safety-0.25", "")).unwrap();
    let weights = step_of(&folder, "helpfulness", "adapter/adapter_model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 4;
    bytes[last] ^= 1;
    fs::write(&weights, bytes).unwrap();
    let stack = [&lora[..], &["step.2.lora_previous=stack", "step.2.lora_rank=3"]].concat();
    says(
        &fails(2, &run_with(&folder, &stack)),
        &["`helpfulness`", "not the one that was trained", "train the policy again"],
    );
    fs::remove_dir_all(step_of(&folder, "helpfulness", "adapter")).unwrap();
    says(&fails(2, &run_with(&folder, &stack)), &["adapter_config.json", "`helpfulness`", "train the policy again"]);
    assert!(!Path::new(&step_of(&folder, "safety-0.25", "metrics.jsonl")).exists());
}

#[test]
fn an_adapter_that_does_not_suit_the_model_is_refused_before_any_training() {
    let folder = folder();
    let stacked = ["train.lora_rank=150", "step.2.lora_previous=stack"];
    for (settings, parts) in [
        (&["step.2.lora_rank=1000"][..], &["In the step `safety`", "the rank is 1000"][..]),
        (&stacked, &["In the step `safety`", "the rank is 300"]),
    ] {
        says(&fails(2, &run_with(&folder, settings)), parts);
    }
    let adapter = text(&folder.path().join("adapter"));
    done(&["model", "add-adapter", &material().base(), &adapter]);
    let settings = [&format!("model.base={adapter}"), "train.lora_rank=4"];
    says(&fails(2, &run_with(&folder, &settings)), &["is an adapter", "sacpo model convert"]);
    assert!(!Path::new(&out(&folder)).exists());
}

#[test]
fn validation_stands_in_the_metrics_and_ends_a_training_early() {
    let folder = folder();
    let settings = ["train.validate_every=2", "train.patience=2", "train.epochs=30", "train.learning_rate=2e-2"];
    let outcome = done(&run_with(&folder, &settings));
    let lines = metrics(&folder, "helpfulness");
    assert!(lines.len() < 30 * 24, "no end before time");
    let losses: Vec<f64> = lines.iter().filter_map(|line| line["eval_loss"].as_f64()).collect();
    assert_eq!(losses.len(), lines.len() / 2);
    let best = losses.iter().copied().fold(f64::INFINITY, f64::min);
    assert_eq!(losses.iter().position(|&loss| loss == best), Some(losses.len() - 3));
    assert!(lines[1]["eval_rewards/accuracies"].is_f64() && lines[0].get("eval_loss").is_none());
    says(&outcome.stderr, &[&format!("weights after step {}", lines.len() - 4), &format!("{best:.4}")]);
}

/// What a training keeps of every kind, killed wherever it is.
#[cfg(unix)]
mod killed {
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    const SETTINGS: [&str; 16] = [
        "train.epochs=6",
        "train.save_every=7",
        "step.1.objective=kto",
        "step.1.optimizer=lion",
        "step.1.lora_rank=4",
        "step.1.lora_dropout=0.2",
        "step.1.learning_rate=1e-3",
        "step.1.ema_decay=0.9",
        "step.2.objective=bco",
        "step.2.optimizer=adamw-8bit",
        "step.2.validate_every=5",
        "step.2.patience=1000",
        "step.2.learning_rate=1e-4",
        "step.2.beta_over_lambda=[0.25, 1.0]",
        "data.max_pairs=100",
        "data.max_validation_pairs=20",
    ];

    #[test]
    fn at_twenty_random_moments_and_continued_it_ends_with_the_same_bytes() {
        let whole = folder();
        let start = Instant::now();
        done(&run_with(&whole, &SETTINGS));
        let seconds = start.elapsed().as_secs_f64();

        let mut rng = ChaCha8Rng::seed_from_u64(20);
        let mut killed = 0;
        while killed < 20 {
            let folder = folder();
            let arguments = run_with(&folder, &SETTINGS);
            // one run, killed as often as it takes to end or to come to twenty
            while killed < 20 {
                let mut child =
                    Command::new(SACPO).args(&arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
                // from before anything is written to well into a step
                std::thread::sleep(Duration::from_secs_f64(seconds * rng.random_range(0.0..0.12)));
                if child.try_wait().unwrap().is_some() {
                    break;
                }
                child.kill().unwrap();
                child.wait().unwrap();
                killed += 1;
            }
            done(&arguments);
            assert!(weights(out(&folder)) == weights(out(&whole)), "after {killed} kills");
            for policy in ["helpfulness", "safety-0.25", "safety-1"] {
                let losses = |folder: &TempDir| -> Vec<Value> {
                    let lines = metrics(folder, policy).into_iter();
                    lines.map(|line| json!([line["step"], line["loss"], line["eval_loss"]])).collect()
                };
                assert_eq!(losses(&folder), losses(&whole));
            }
            let names = |folder: &TempDir| files(out(folder)).into_keys().collect::<Vec<_>>();
            assert_eq!(names(&folder), names(&whole), "something was left behind");
        }
    }
}
