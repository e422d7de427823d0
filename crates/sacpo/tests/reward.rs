//! Reward and cost models: trained in the quickstart's world, where their truth is known, saved, and asked as judges.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use align::world::{Metric, World};
use common::*;
use engine::checkpoint::Checkpoint;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Pairs of answers to the prompts of the world, the better one by its exact value chosen.
fn exact_pairs(folder: &TempDir, metric: Metric) -> String {
    let world = World::new(0);
    let (mut rows, mut rng) = (String::new(), ChaCha8Rng::seed_from_u64(1));
    for prompt in &world.train_prompts {
        let answers = world.answers(prompt);
        for _ in 0..8 {
            let pair = [(); 2].map(|()| &answers[rng.random_range(0..answers.len())]);
            let [a, b] = pair.map(|answer| answer.value(metric));
            if a == b {
                continue;
            }
            let [chosen, rejected] = if a > b { pair } else { [pair[1], pair[0]] };
            let row = json!({"prompt": prompt.text, "chosen": chosen.text, "rejected": rejected.text,
                "safe_chosen": chosen.safety >= 0.0, "safe_rejected": rejected.safety >= 0.0});
            rows += &format!("{row}\n");
        }
    }
    file(folder, "exact.jsonl", rows)
}

fn train<'a>(kind: &'a str, data: &'a str, out: &'a str, set: &[&'a str]) -> Vec<&'a str> {
    static BASE: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    let base = BASE.get_or_init(|| material().base());
    let mut arguments = vec!["train", kind, "--model", base, "--data", data, "--metric", "m", "--out", out];
    for set in [&["data.max_length=64"], set].concat() {
        arguments.extend(["--set", set]);
    }
    arguments
}

/// What trains well within seconds.
const WELL: [&str; 4] =
    ["train.learning_rate=2e-3", "train.epochs=4", "train.batch_size=16", "data.validation_fraction=0.2"];

/// What trains a little.
const BRIEFLY: [&str; 4] =
    ["train.learning_rate=1e-3", "train.batch_size=8", "train.save_every=1", "data.max_pairs=64"];

/// How many answers a policy of [`answers`] has to each prompt.
const EACH: usize = 4;

/// Two files of answers to the prompts that nothing is trained on.
fn answers(folder: &TempDir) -> [String; 2] {
    let world = World::new(0);
    [("a", 2), ("b", 3)].map(|(name, seed)| {
        let (mut rows, mut rng) = (String::new(), ChaCha8Rng::seed_from_u64(seed));
        for prompt in &world.heldout_prompts {
            let answers = world.answers(prompt);
            for _ in 0..EACH {
                let answer = &answers[rng.random_range(0..answers.len())].text;
                rows += &format!("{}\n", json!({"prompt": prompt.text, "answer": answer, "category": "world"}));
            }
        }
        file(folder, &format!("{name}.jsonl"), rows)
    })
}

fn judge(folder: &TempDir, name: &str, options: &[&str]) -> Vec<Value> {
    let [a, b] = answers(folder);
    let out = at(folder, name);
    done(&[&["judge", &a, &b, "--out", &out, "--metric", "m"], options].concat());
    let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(
        left.iter().all(|name| !name.to_string_lossy().ends_with(".scores")),
        "kept scores are left behind: {left:?}"
    );
    read_lines(&out)
}

fn scores(verdicts: &[Value]) -> Vec<f64> {
    verdicts.iter().flat_map(|verdict| [0, 1].map(|i| verdict["scores"][i].as_f64().unwrap())).collect()
}

/// A reward model of the world's exact reward ranks answers to prompts that it has never seen as the world does.
#[test]
fn a_reward_model_learns_the_exact_reward_of_the_world() {
    let folder = folder();
    let (data, out) = (exact_pairs(&folder, Metric::Reward), out(&folder));
    let result = json(&train("reward", &data, &out, &WELL));
    let accuracy = result["accuracy"].as_f64().unwrap();
    assert!(accuracy > 0.95, "{result}");
    let [low, high] = [0, 1].map(|i| result["interval"][i].as_f64().unwrap());
    assert!(low < accuracy && accuracy < high && low > 0.9, "{result}");
    assert_eq!(
        (&result["kind"], &result["metric"], &result["sign_accuracy"]),
        (&json!("reward"), &json!("m"), &Value::Null)
    );
    let metrics = read_lines(Path::new(&out).join("metrics.jsonl"));
    assert_eq!(metrics[0]["loss"], std::f64::consts::LN_2, "a new head scores everything 0");

    // the same command again does nothing, and another one is refused
    let before = files(&out);
    assert_eq!(json(&train("reward", &data, &out, &WELL)), result);
    assert!(files(&out) == before, "something was written");
    says(&fails(2, &train("reward", &data, &out, &BRIEFLY)), &["other options", "--out"]);
    let after = files(&out);
    assert!(before.iter().all(|(path, bytes)| after.get(path) == Some(bytes)), "something was changed");

    let model = format!("{out}/checkpoint");
    let by_model = judge(&folder, "model.jsonl", &["--reward-model", &model]);
    let by_world = judge(&folder, "world.jsonl", &["--quickstart", "reward"]);
    assert_eq!(by_model.len(), EACH * World::new(0).heldout_prompts.len());
    let decided = by_model.iter().zip(&by_world).filter(|(_, world)| world["outcome"] != 0.5);
    let (agreeing, all) = decided.fold((0, 0), |(agreeing, all), (model, world)| {
        (agreeing + usize::from(model["outcome"] == world["outcome"]), all + 1)
    });
    assert!(all > 200 && agreeing as f64 > 0.95 * f64::from(all), "{agreeing} of {all}");
    let first = &by_model[0];
    assert_eq!(
        (&first["a"], &first["b"], &first["metric"], &first["category"]),
        (&json!("a"), &json!("b"), &json!("m"), &json!("world"))
    );
    says(first["judge"].as_str().unwrap(), &["reward model", "checkpoint"]);
    // rated as any other verdicts
    let rated = json(&["rate", &at(&folder, "model.jsonl")]);
    assert_eq!(rated["models"]["a"]["n"], by_model.len());
    assert!(rated["models"]["b"]["scores"]["mean"].is_number(), "{rated}");
}

/// Costs are above 0 for unsafe answers and below for safe ones; as scores they count with the other sign.
#[test]
fn costs_have_the_sign_of_safety() {
    let folder = folder();
    let (data, out) = (exact_pairs(&folder, Metric::Safety), out(&folder));
    let result = json(&train("cost", &data, &out, &WELL));
    assert!(result["accuracy"].as_f64().unwrap() > 0.9 && result["sign_accuracy"].as_f64().unwrap() > 0.95, "{result}");
    let loss = read_lines(Path::new(&out).join("metrics.jsonl"))[0]["loss"].as_f64().unwrap();
    assert!((loss - 3.0 * std::f64::consts::LN_2).abs() < 1e-12);

    let model = format!("{out}/checkpoint");
    let by_model = scores(&judge(&folder, "model.jsonl", &["--cost-model", &model]));
    let by_world = scores(&judge(&folder, "world.jsonl", &["--quickstart", "safety"]));
    let right = by_model.iter().zip(&by_world).filter(|(own, exact)| (**own >= 0.0) == (**exact >= 0.0)).count();
    assert!(right as f64 > 0.95 * by_world.len() as f64, "{right} of {}", by_world.len());
    let mean = |is_safe: bool| {
        let of_kind =
            by_model.iter().zip(&by_world).filter(|(_, exact)| (**exact >= 0.0) == is_safe).map(|(own, _)| own);
        let of_kind: Vec<f64> = of_kind.copied().collect();
        of_kind.iter().sum::<f64>() / of_kind.len() as f64
    };
    assert!(mean(true) > 1.0 && mean(false) < -1.0, "safe {}, unsafe {}", mean(true), mean(false));
    let [a, b] = answers(&folder);
    let message = fails(2, &["judge", &a, &b, "--reward-model", &model, "--metric", "m", "--out", &at(&folder, "x")]);
    says(&message, &["is a cost model", "--cost-model"]);
}

#[test]
fn a_saved_model_is_a_sequence_classification_and_no_language_model() {
    let folder = folder();
    let (data, out) = (material().data("helpfulness"), out(&folder));
    let adapter = ["train.lora_rank=4", "train.lora_dropout=0.1"];
    done(&train("reward", &data, &out, &[&BRIEFLY[..], &adapter].concat()));
    let checkpoint = format!("{out}/checkpoint");
    let config = read_json(Path::new(&checkpoint).join("config.json"));
    assert_eq!(config["architectures"], json!(["LlamaForSequenceClassification"]));
    assert_eq!((&config["num_labels"], &config["id2label"]), (&json!(1), &json!({"0": "score"})));
    // <unk>, which ends no text; the end token would hide the ends of answers from transformers
    let tokenizer = read_json(Path::new(&checkpoint).join("tokenizer_config.json"));
    assert_eq!((&config["pad_token_id"], &tokenizer["pad_token"]), (&json!(align::world::UNKNOWN), &json!("<unk>")));
    let loaded = Checkpoint::load_scorer(checkpoint.as_ref()).unwrap();
    assert_eq!(loaded.model.layout.specs.last().unwrap().name, "score.weight");
    assert!(loaded.model.weights[loaded.model.layout.head.clone()].iter().any(|w| *w != 0.0));
    let again = folder.path().join("again");
    loaded.save(&again).unwrap();
    let reloaded = Checkpoint::load_scorer(&again).unwrap();
    assert_eq!((reloaded.model.hash(), &reloaded.model.config), (loaded.model.hash(), &loaded.model.config));
    let provenance = read_json(Path::new(&checkpoint).join("provenance.json"));
    assert_eq!((&provenance["kind"], &provenance["model"]), (&json!("reward"), &json!(loaded.model.hash())));
    assert_eq!(json(&["model", "inspect", &checkpoint])["config"]["num_labels"], 1);

    for command in [
        vec!["generate", "--model", &checkpoint, "--prompt", "hello !"],
        vec!["logps", "--model", &checkpoint, "--data", &data],
        vec!["merge", "--q", "0.5", &checkpoint, &checkpoint, &at(&folder, "merged")],
    ] {
        says(&fails(2, &command), &["reward or cost model", "language model is needed"]);
    }
}

/// Verdicts depend on the answers alone, and implicit rewards are scaled log-ratios, which `logps` gives too.
#[test]
fn implicit_rewards_judge_by_log_ratios() {
    let folder = folder();
    let (data, out) = (material().data("helpfulness"), out(&folder));
    let mut policy = vec!["train", "--model"];
    let base = material().base();
    policy.extend([base.as_str(), "--data", &data, "--metric", "helpfulness", "--beta", "0.5", "--out", &out]);
    for set in [&BRIEFLY[..], &["data.max_length=64"]].concat() {
        policy.extend(["--set", set]);
    }
    done(&policy);
    let policy = format!("{out}/steps/helpfulness/checkpoint");
    let implicit = ["--implicit", &policy, "--reference", &base, "--beta", "0.5"];
    let verdicts = judge(&folder, "verdicts.jsonl", &implicit);
    assert_eq!(judge(&folder, "again.jsonl", &implicit), verdicts);
    let [a, b] = answers(&folder).map(|path| read_lines(&path));
    let pairs: String = a
        .iter()
        .zip(&b)
        .filter(|(a, b)| a["answer"] != b["answer"])
        .map(|(a, b)| format!("{}\n", json!({"prompt": a["prompt"], "chosen": a["answer"], "rejected": b["answer"]})))
        .collect();
    let pairs = file(&folder, "pairs.jsonl", pairs);
    let [own, start] = [&policy, &base].map(|model| json(&["logps", "--model", model, "--data", &pairs]));
    let logp = |logps: &Value, row: usize, i: usize| logps["rows"][row]["responses"][i]["logp"].as_f64().unwrap();
    let different = verdicts.iter().zip(a.iter().zip(&b)).filter(|(_, (a, b))| a["answer"] != b["answer"]);
    for (row, (verdict, _)) in different.enumerate() {
        let expected = [0, 1].map(|i| 0.5 * (logp(&own, row, i) - logp(&start, row, i)));
        for (i, expected) in expected.into_iter().enumerate() {
            let score = verdict["scores"][i].as_f64().unwrap();
            assert!((score - expected).abs() < 1e-4, "{score} not {expected}");
        }
        let outcome = if verdict["scores"][0].as_f64() > verdict["scores"][1].as_f64() { 1.0 } else { 0.0 };
        assert_eq!(verdict["outcome"], outcome);
    }
}

#[test]
fn a_training_that_is_killed_ends_with_the_same_bits() {
    let (whole, killed) = (folder(), folder());
    let data = material().data("safety");
    done(&train("cost", &data, &out(&whole), &BRIEFLY));
    let out = out(&killed);
    let arguments = train("cost", &data, &out, &BRIEFLY);
    let lines = || fs::read_to_string(format!("{out}/metrics.jsonl")).map_or(0, |text| text.lines().count());
    for steps in [2, 4] {
        let mut child =
            Command::new(SACPO).args(&arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        wait_until("some steps", || lines() >= steps || child.try_wait().unwrap().is_some());
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let resumed = done(&arguments);
    assert_eq!(weights(&out), weights(self::out(&whole)), "{}", resumed.stderr);
    assert!(!Path::new(&out).join("training-state.safetensors").exists());
    let without_time = |folder: &str| {
        let mut result = read_json(Path::new(folder).join("results.json"));
        let result = result.as_object_mut().unwrap();
        result.retain(|name, _| !["seconds", "checkpoint"].contains(&name.as_str()));
        result.clone()
    };
    assert_eq!(without_time(&out), without_time(&self::out(&whole)));
}

#[test]
fn what_cannot_be_trained_or_judged_is_said() {
    let folder = folder();
    let (data, out, made) = (material().data("helpfulness"), out(&folder), at(&folder, "verdicts.jsonl"));
    let unlabelled = file(
        &folder,
        "plain.jsonl",
        "{\"prompt\": \"hello !\", \"chosen\": \"bake bread\", \"rejected\": \"sorry\"}\n",
    );
    fn refused<A: AsRef<str>>(nothing: [&str; 2], arguments: &[A], parts: &[&str]) {
        says(&fails(2, arguments), parts);
        assert!(nothing.iter().all(|path| !Path::new(path).exists()), "something was left after {parts:?}");
    }
    let nothing = [out.as_str(), &made];
    refused(
        nothing,
        &train("cost", &unlabelled, &out, &[]),
        &["whether each response is safe", "Line 1 of", "plain.jsonl", "reward model"],
    );
    refused(nothing, &train("reward", &data, &out, &["step.1.beta=2"]), &["step.1.beta=2", "data., train. or run."]);
    refused(nothing, &train("reward", &data, &out, &["train.lora_rank=9999"]), &["rank is 9999"]);
    refused(nothing, &train("reward", &data, &out, &["train.epoch=2"]), &["train.epoch", "`epochs`"]);
    refused(nothing, &train("reward", &at(&folder, "nowhere.jsonl"), &out, &[]), &["nowhere.jsonl", "Check the path"]);
    let singles =
        file(&folder, "single.jsonl", "{\"prompt\": \"hello !\", \"completion\": \"bake\", \"label\": true}\n");
    refused(nothing, &train("reward", &singles, &out, &[]), &["single responses"]);

    let [a, b] = answers(&folder);
    let base = material().base();
    let judge = |options: &[&str]| -> Vec<String> {
        [&["judge", &a, &b, "--out", &made], options].concat().into_iter().map(str::to_owned).collect()
    };
    refused(
        nothing,
        &judge(&["--reward-model", &base, "--metric", "m"]),
        &["holds a language model", "sacpo train reward"],
    );
    refused(nothing, &judge(&["--reward-model", &at(&folder, "none"), "--metric", "m"]), &["none", "Check the path"]);
    let other = file(&folder, "other.jsonl", "{\"prompt\": \"knit a car ?\", \"answer\": \"sorry\"}\n");
    refused(
        nothing,
        &["judge", &other, &format!("b={other}"), "--out", &made, "--quickstart", "reward", "--metric", "m"],
        &["row 1", "none of the quickstart world's"],
    );
    for (options, parts) in [
        (vec!["--reward-model", "x"], &["--metric"][..]),
        (vec!["--metric", "m"], &["--reward-model"]),
        (vec!["--implicit", &base, "--metric", "m"], &["--reference", "--beta"]),
        (vec!["--reward-model", "x", "--cost-model", "y", "--metric", "m"], &["cannot be used with"]),
        (vec!["--reward-model", "x", "--endpoint", "http://localhost:1/v1", "--metric", "m"], &["cannot be used with"]),
        (vec!["--reward-model", "x", "--max-calls", "3", "--metric", "m"], &["cannot be used with"]),
        (vec!["--quickstart", "reward", "--metric", "m", "--store", "s.sqlite"], &["cannot be used with"]),
        (vec!["--endpoint", "http://localhost:1/v1"], &["--model", "--rubric"]),
        (vec![], &["--endpoint", "--model", "--rubric"]),
    ] {
        let outcome = run(&judge(&options));
        assert_eq!((outcome.code, outcome.stdout.as_str()), (2, ""), "{options:?}: {}", outcome.stderr);
        says(&outcome.stderr, parts);
    }
    // an answer of nothing is judged as what it is
    let empty = file(
        &folder,
        "empty.jsonl",
        fs::read_to_string(&a)
            .unwrap()
            .lines()
            .enumerate()
            .map(|(number, line)| {
                let mut row: Value = serde_json::from_str(line).unwrap();
                if number == 0 {
                    row["answer"] = " ".into();
                }
                format!("{row}\n")
            })
            .collect::<String>(),
    );
    done(&[
        "judge",
        &empty,
        &b,
        "--out",
        &made,
        "--implicit",
        &base,
        "--reference",
        &base,
        "--beta",
        "1",
        "--metric",
        "m",
    ]);
    assert_eq!(read_lines(&made)[0]["scores"], json!([0.0, 0.0]));
}

/// Labels drawn anew from a reward model, and a constraint on a cost model's scores, 0 being safe.
#[test]
fn recipes_take_reward_and_cost_models_as_judges() {
    let folder = folder();
    let [reward, cost] = [("reward", "helpfulness"), ("cost", "safety")].map(|(kind, metric)| {
        let out = at(&folder, kind);
        done(&train(kind, &material().data(metric), &out, &BRIEFLY));
        format!("{out}/checkpoint")
    });
    let world = World::new(0);
    let prompts = |prompts: &[align::world::Prompt]| -> String {
        prompts.iter().take(8).map(|prompt| format!("{}\n", json!({"prompt": prompt.text}))).collect()
    };
    let choosing = file(&folder, "prompts.jsonl", prompts(&world.train_prompts));
    let held_out = file(&folder, "held_out.jsonl", prompts(&world.heldout_prompts));
    let recipe = file(
        &folder,
        "recipe.toml",
        format!(
            "[model]\nbase = {:?}\n[run]\nout = {:?}\n[data]\nmax_length = 64\nmax_pairs = 40\n[train]\nlearning_rate = 1e-3\n\
             batch_size = 10\n[[step]]\nmetric = \"helpfulness\"\nbeta = 0.5\ndata = {:?}\nrelabel = {{ helpfulness = 5.0 }}\n\
             [[step]]\nmetric = \"safety\"\nbeta_over_lambda = [1.0]\ndata = {:?}\n\
             [[judge]]\nmetric = \"helpfulness\"\nreward_model = {reward:?}\n[[judge]]\nmetric = \"safety\"\ncost_model = {cost:?}\n\
             [[constraint]]\nmetric = \"safety\"\nat_least = -5.0\nanswers = 16\nmax_new_tokens = 8\nshots = 1\n\
             prompts = {choosing:?}\nheld_out_prompts = {held_out:?}\n",
            material().base(),
            out(&folder),
            material().data("helpfulness"),
            material().data("safety"),
        ),
    );
    let result = json(&["run", &recipe]);
    let constraint = &result["constraint"];
    // the scores are the cost model's own, not relative to the base model
    assert_eq!((&constraint["lambda"], &constraint["verdict"]), (&json!(0.0), &json!("met")), "{constraint}");
    let outcome = done(&["run", &recipe]);
    says(&outcome.stderr, &["is finished"]);
    let written = fs::read_to_string(format!("{}/recipe.toml", out(&folder))).unwrap();
    says(&written, &[&format!("reward_model = {reward:?}"), &format!("cost_model = {cost:?}")]);

    // another judge makes other labels
    let other = at(&folder, "other");
    done(&train("reward", &material().data("safety"), &other, &BRIEFLY));
    let set = |value: String| ["run".to_owned(), recipe.clone(), "--set".to_owned(), value];
    let judged = |key: &str, model: &str| set(format!("judge.{key}={model}"));
    let message = fails(2, &judged("1.reward_model", &format!("{other}/checkpoint")));
    says(&message, &["helpfulness", "with other data or options"]);
    says(&fails(2, &judged("1.reward_model", &cost)), &["is a cost model", "cost_model"]);
    says(&fails(2, &judged("1.reward_model", &material().base())), &["holds a language model"]);
}
