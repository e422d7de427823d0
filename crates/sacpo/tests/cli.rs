//! Every command from end to end: what it prints, what it leaves, and that it continues where it was stopped.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use common::*;
use serde_json::{Value, json};

/// The results of a run but for paths, times and memory.
fn policies(result: &Value) -> Vec<Value> {
    let mut policies = result["policies"].as_array().unwrap().clone();
    for policy in &mut policies {
        let policy = policy.as_object_mut().unwrap();
        policy.remove("checkpoint");
        policy.remove("policy");
        policy.remove("seconds");
    }
    policies
}

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

/// The object of `quickstart` and `run`.
fn check_result(result: &Value, names: &[&str]) {
    for key in ["policies", "constraint", "seconds", "peak_memory_bytes", "out"] {
        assert!(keys(result).contains(&key), "{key}");
    }
    let policies = result["policies"].as_array().unwrap();
    assert_eq!(policies.iter().map(|p| p["name"].as_str().unwrap()).collect::<Vec<_>>(), names);
    for policy in policies {
        for key in ["name", "step", "beta_over_lambda", "q", "reward", "safety", "kl"] {
            assert!(keys(policy).contains(&key), "{key}");
        }
        let mixed = policy["policy"].as_str().unwrap().starts_with("mix(");
        let checkpoint =
            policy["checkpoint"].as_str().filter(|path| Path::new(path).join("model.safetensors").is_file());
        assert_ne!(mixed, checkpoint.is_some(), "{policy}");
    }
    assert!(result["seconds"].as_f64().unwrap() > 0.0);
}

/// A small quickstart on two threads, made once; its folder, what it printed, and what it said.
fn quickstart() -> &'static (PathBuf, Value, String) {
    static MADE: OnceLock<(PathBuf, Value, String)> = OnceLock::new();
    MADE.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cli-quickstart");
        let _ = fs::remove_dir_all(&folder);
        let made = done(&["quickstart", "--size", "small", "--json", "--threads", "2", "--out", &text(&folder)]);
        (folder, object(&made.stdout), made.stderr)
    })
}

/// The policies of a small quickstart but for those that the constraint asked for.
const POLICIES: [&str; 11] = [
    "base",
    "helpfulness",
    "safety-2",
    "safety-1",
    "safety-0.5",
    "merge-0.25",
    "merge-0.5",
    "merge-0.75",
    "mix-0.25",
    "mix-0.5",
    "mix-0.75",
];

/// The names of a result's policies.
fn names(result: &Value) -> Vec<&str> {
    result["policies"].as_array().unwrap().iter().map(|policy| policy["name"].as_str().unwrap()).collect()
}

/// The constraint of a quickstart at threshold 0.
fn check_constraint(result: &Value) {
    let constraint = &result["constraint"];
    let number = |key: &str| constraint[key].as_f64().unwrap();
    let (lambda, low) = (number("lambda"), number("lower_bound"));
    assert_eq!(number("threshold"), 0.0);
    assert!(lambda > 0.0 && (lambda * number("beta_over_lambda") - 1.0).abs() < 1e-9, "{constraint}");
    let shots = constraint["shots"].as_array().unwrap();
    assert!((1..=4).contains(&shots.len()), "{constraint}");
    for shot in shots {
        for mean in [&shot["estimate"][0], &shot["measured"][0]] {
            let [low, high] = [0, 1].map(|end| mean["interval"][end].as_f64().unwrap());
            let (value, bound) = (mean["value"].as_f64().unwrap(), mean["lower_bound"].as_f64().unwrap());
            assert!(low < bound && bound < value && value < high, "{shot}");
        }
        assert!(shot["effective_sample_size"].as_f64().unwrap() >= 10.0, "{shot}");
    }
    assert!(shots.iter().any(|shot| shot["policy"] == constraint["policy"]));
    // what was sampled is what is exactly so, but for chance
    let met = &constraint["constraints"][0];
    let (safety, high) = (met["safety"].as_f64().unwrap(), met["upper_bound"].as_f64().unwrap());
    let exact = constraint["exact"]["safety"].as_f64().unwrap();
    assert!((safety - exact).abs() < 0.03 && low < exact && exact < high, "{constraint}");
    let verdict = match () {
        () if low >= 0.0 => "met",
        () if high < 0.0 => "not met",
        () => "undecided",
    };
    assert_eq!(constraint["verdict"], verdict);
}

#[test]
fn quickstart_shows_the_trade_and_makes_everything_once() {
    let (made, result, stderr) = quickstart();
    check_result(result, &names(result));
    let shots = result["constraint"]["shots"].as_array().unwrap();
    let tried: Vec<&str> = shots.iter().map(|shot| shot["policy"].as_str().unwrap()).collect();
    assert_eq!(names(result), [&POLICIES, &*tried].concat());
    check_constraint(result);
    let values = |key: &str| -> Vec<f64> {
        result["policies"].as_array().unwrap().iter().map(|policy| policy[key].as_f64().unwrap()).collect()
    };
    let (reward, safety) = (values("reward"), values("safety"));
    assert!(values("kl").iter().chain(&values("outside")).all(|value| value.is_finite()));
    assert!(values("outside").iter().all(|mass| *mass < 0.5), "{result}");
    assert!(reward[1] > reward[0] && safety[1] < safety[0], "the first step does not trade safety for reward");
    // along the sweep, and along merges and mixtures from the first step's policy to the safest one
    for line in [&[1, 2, 3, 4][..], &[1, 5, 6, 7, 4], &[1, 8, 9, 10, 4]] {
        let along = |values: &[f64]| line.iter().map(|policy| values[*policy]).collect::<Vec<_>>();
        let (reward, safety) = (along(&reward), along(&safety));
        assert!(safety.is_sorted_by(|a, b| a < b), "safety does not rise: {safety:?}");
        assert!(reward.is_sorted_by(|a, b| a > b), "reward does not fall: {reward:?}");
    }
    assert_eq!(read_json(made.join("results.json")), *result);
    says(
        stderr,
        &["Base model", "Step helpfulness", "Policy safety-0.5", "Policy merge-0.5", "Constraint: λ is chosen"],
    );
    for name in
        ["summary.md", "frontier.svg", "report.html", "recipe.toml", "data/safety.jsonl", "steps/safety-1/policy.json"]
    {
        assert!(made.join(name).metadata().unwrap().len() > 0, "{name}");
    }
    for name in POLICIES[1..5].iter().chain(&tried) {
        assert_eq!(read_lines(made.join("steps").join(name).join("metrics.jsonl"))[0]["rewards/margins"], json!(0.0));
    }

    // again in the same folder: nothing to do
    let before = weights(made);
    let second = done(&["quickstart", "--size", "small", "--out", &text(made)]);
    // the base model, trained and merged policies
    let complete = 1 + 4 + 3 + tried.len();
    assert_eq!(second.stderr.matches(": complete.").count(), complete, "{}", second.stderr);
    says(&second.stdout, &["| policy", "| safety-0.5", "| mix-0.5", "Constraint E[safety] ≥ 0: ", "Plot: "]);
    assert_eq!(policies(&read_json(made.join("results.json"))), policies(result));
    assert!(weights(made) == before);

    // thresholds for which nothing has to be trained, and for which nothing can be
    let at = |threshold: &str| {
        let arguments = ["quickstart", "--size", "small", "--threshold", threshold, "--json", "--out", &text(made)];
        object(&done(&arguments).stdout)
    };
    let low = at("-1");
    check_result(&low, &POLICIES);
    assert_eq!((&low["constraint"]["lambda"], &low["constraint"]["beta_over_lambda"]), (&json!(0.0), &Value::Null));
    assert_eq!((&low["constraint"]["policy"], &low["constraint"]["verdict"]), (&json!("helpfulness"), &json!("met")));
    let high = at("5");
    check_result(&high, &POLICIES);
    assert_eq!((&high["constraint"]["lambda"], &high["constraint"]["verdict"]), (&Value::Null, &json!("undecided")));
    assert!(high["constraint"]["reason"].as_str().unwrap().contains("no λ meets"), "{high}");

    // another seed or size would mix two worlds
    let before = files(made);
    for (size, seed) in [("small", "1"), ("full", "0")] {
        let message = fails(2, &["quickstart", "--size", size, "--seed", seed, "--out", &text(made)]);
        says(&message, &["another size, seed or objective", "--out"]);
    }
    let recipe = text(&made.join("recipe.toml"));
    says(&fails(2, &["run", &recipe]), &["the folder of a quickstart", "run.out"]);
    says(
        &fails(2, &["quickstart", "--out", &text(&made.join("base"))]),
        &["something else than a quickstart", "--out"],
    );
    assert!(files(made) == before);
}

#[test]
fn the_baselines_run_in_the_quickstarts_world() {
    let folder = tempfile::tempdir().unwrap();
    let out = text(&folder.path().join("baselines"));
    let recipe = concat!(env!("CARGO_MANIFEST_DIR"), "/../../recipes/baselines.toml");
    let arguments = ["quickstart", "--recipe", recipe, "--size", "small", "--json", "--out", &out];
    let result = object(&done(&arguments).stdout);
    let policy = |name: &str| {
        let mut policies = result["policies"].as_array().unwrap().iter();
        policies.find(|policy| policy["name"] == name).unwrap_or_else(|| panic!("{name}: {result}"))
    };
    let tilts = ["helpful", "sacpo-0.5", "safe"];
    for name in tilts.iter().chain(&["c-dpo", "pecan", "modpo", "safe-dpo", "p-sacpo-0.5", "naive-0.5"]) {
        assert_eq!(policy(name)["distance_to_optimum"].is_f64(), tilts.contains(name), "{name}");
        let safer = policy(name)["safety"].as_f64() > policy("helpful")["safety"].as_f64();
        assert_eq!(safer, *name != "helpful", "{name}: {result}");
    }
    // λ is a weight in the labels, so that there is no β/λ and no tilt by the step's metric
    let constraint = &result["constraint"];
    assert!(constraint["policy"].as_str().unwrap().starts_with("mocan-"), "{constraint}");
    assert_eq!(keys(&constraint["exact"]), ["safety"]);
    let provenance = read_json(Path::new(&out).join("steps/modpo/checkpoint/provenance.json"));
    assert_eq!(provenance["label_weights"], json!({"implicit-reward": 1.0}));

    // a world that knows of no such metric, and data that are made for it
    let foreign = fs::read_to_string(recipe)
        .unwrap()
        .replace("metric = \"safety\"\nbeta_over", "metric = \"honesty\"\nbeta_over");
    let foreign = file(&folder, "foreign.toml", foreign);
    let message = fails(2, &["quickstart", "--recipe", &foreign, "--size", "small", "--out", &out]);
    says(&message, &["`sacpo`", "`honesty`", "`helpfulness` or `safety`"]);
}

#[test]
fn a_run_is_a_chain_whose_every_step_starts_at_its_reference() {
    let folder = folder();
    let recipe = recipe(&folder);
    let first = run(&["run", &recipe, "--json"]);
    let result = object(&first.stdout);
    check_result(&result, &["base", "helpfulness", "safety-0.25"]);
    says(&first.stderr, &["Policy helpfulness", "24 steps in"]);
    for policy in result["policies"].as_array().unwrap() {
        for metric in ["helpfulness", "safety"] {
            let report = &policy["validation"][metric];
            assert!(report["pairs"].as_u64().unwrap() > 10, "{report}");
            assert!((0.0..=1.0).contains(&report["accuracy"].as_f64().unwrap()), "{report}");
        }
    }

    let step = |name: &str| Path::new(&out(&folder)).join("steps").join(name);
    for name in ["helpfulness", "safety-0.25"] {
        let metrics = read_lines(step(name).join("metrics.jsonl"));
        assert_eq!(metrics.len(), 24);
        for record in &metrics {
            for key in [
                "loss",
                "learning_rate",
                "grad_norm",
                "epoch",
                "rewards/chosen",
                "rewards/rejected",
                "rewards/margins",
                "rewards/accuracies",
                "logps/chosen",
                "logps/rejected",
            ] {
                assert!(record[key].as_f64().is_some_and(f64::is_finite), "{key} of {record}");
            }
        }
        // before the first update policy and reference are one model, whatever the batches
        for key in ["rewards/chosen", "rewards/rejected", "rewards/margins"] {
            assert_eq!(metrics[0][key], json!(0.0), "{name} {key}");
        }
        assert_eq!(metrics[0]["loss"], json!(std::f64::consts::LN_2));
        // warm-up starts with a learning rate of 0, so the second step moves first
        assert_ne!(metrics[2]["rewards/margins"], json!(0.0));
        assert!(!step(name).join("training-state.safetensors").exists());
    }

    let [helpful, safe] = ["helpfulness", "safety-0.25"].map(|name| read_json(step(name).join("policy.json")));
    assert_eq!(safe["reference"], helpful["model"]);
    assert_ne!(helpful["reference"], helpful["model"]);
    assert_ne!(safe["model"], helpful["model"]);
    assert_eq!((&helpful["temperature"], &safe["temperature"]), (&json!(0.5), &json!(0.25)));

    // the recipe that is kept is the run
    let kept = format!("{}/recipe.toml", out(&folder));
    let before = files(out(&folder));
    let second = run(&["run", &kept, "--json"]);
    says(&second.stderr, &["The run in", "is finished"]);
    assert_eq!(object(&second.stdout), result);
    says(&done(&["run", &kept]).stdout, &["summary.md"]);
    assert!(files(out(&folder)) == before, "a run with nothing to do has done something");

    // provenance goes back to the base model, and hashes are those of the policies
    let provenance = read_json(step("safety-0.25").join("checkpoint/provenance.json"));
    assert_eq!((&provenance["policy"], &provenance["temperature"]), (&json!("safety-0.25"), &json!(0.25)));
    let [parent] = provenance["from"].as_array().unwrap().as_slice() else { panic!("{provenance}") };
    assert_eq!((&parent["model"], &parent["metric"]), (&helpful["model"], &json!("helpfulness")));
    assert_eq!((&parent["from"][0]["policy"], &parent["from"][0]["model"]), (&json!("base"), &helpful["reference"]));
    let manifest = read_json(Path::new(&out(&folder)).join("manifest.json"));
    assert_eq!(manifest["policies"][2]["model"], safe["model"]);

    // without its last file the run is not finished, and only that is made again
    fs::remove_file(Path::new(&out(&folder)).join("manifest.json")).unwrap();
    let third = run(&["run", &kept, "--json"]);
    assert_eq!(third.stderr.matches(": complete.").count(), 2, "{}", third.stderr);
    assert_eq!(policies(&object(&third.stdout)), policies(&result));
    let before = {
        let mut after = files(out(&folder));
        let times = ["summary.md", "results.json", "manifest.json", "report.html"].map(Path::new);
        after.retain(|path, bytes| !times.contains(&path.as_path()) && before.get(path) != Some(bytes));
        assert!(after.is_empty(), "changed by a run with nothing to do: {:?}", after.keys());
        files(out(&folder))
    };

    // other options need another folder, and leave this one as it is
    for change in ["step.2.epochs=2", "step.1.beta=0.6", "step.1.max_pairs=100", "run.seed=1"] {
        let message = fails(2, &["run", &kept, "--set", change]);
        let which = if change.starts_with("step.2") { "safety-0.25" } else { "helpfulness" };
        says(&message, &[which, "other data or options", "run.out"]);
    }
    let mut after = files(out(&folder));
    // they are named by the data and the options that they depend on
    after.retain(|path, _| before.contains_key(path) || !path.to_string_lossy().starts_with("cache/tokens-"));
    assert!(after == before);
}

#[test]
fn two_trainings_by_hand_are_the_run_and_batching_changes_no_margin() {
    let made = material();
    let folder = folder();
    done(&["run", &recipe(&folder), "--threads", "2"]);
    let settings = ["data.max_length=64", "data.max_pairs=120", "train.learning_rate=1e-3", "train.batch_size=5"];
    let train = |model: &str, metric: &str, beta: &str, out: &str, extra: &[&str]| {
        let data = made.data(metric);
        let mut arguments = vec!["train", "--model", model, "--data", &data, "--metric", metric];
        arguments.extend(["--beta", beta, "--out", out]);
        for setting in settings.iter().chain(extra) {
            arguments.extend(["--set", setting]);
        }
        json(&arguments)
    };
    let first = at(&folder, "first");
    let result = train(&made.base(), "helpfulness", "0.5", &first, &["run.threads=1"]);
    check_result(&result, &["base", "helpfulness"]);
    let helpful = format!("{first}/steps/helpfulness/checkpoint");
    let second = at(&folder, "second");
    train(&helpful, "safety", "0.25", &second, &["run.threads=1", "train.micro_batch_tokens=70"]);
    let model = |folder: String| fs::read(format!("{folder}/model.safetensors")).unwrap();
    assert!(model(helpful) == model(format!("{}/steps/helpfulness/checkpoint", out(&folder))));
    // micro-batches add up in another order, so the weights may differ in the last bits, but the start may not
    for run in [&second, &out(&folder)] {
        let step = fs::read_dir(format!("{run}/steps")).unwrap().flatten().map(|entry| entry.path());
        for step in step.filter(|step| text(step).contains("safety")) {
            assert_eq!(read_lines(step.join("metrics.jsonl"))[0]["rewards/margins"], json!(0.0));
        }
    }

    // nothing held out: nothing to rank, and no number is made up
    let last = at(&folder, "last");
    let all = ["data.validation_fraction=0.0", "step.1.max_pairs=5"];
    train(&made.base(), "safety", "0.5", &last, &all);
    says(&fs::read_to_string(format!("{last}/summary.md")).unwrap(), &["| base | – | – | – |", "0 held out"]);
}

/// A run that another process does, to be stopped.
#[cfg(unix)]
mod stopped {
    use std::process::Child;

    use super::*;

    fn start(recipe: &str) -> Child {
        Command::new(SACPO)
            .args(["run", recipe])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    fn signal(child: &Child, name: &str) {
        assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
    }

    fn steps_of(folder: &tempfile::TempDir, name: &str) -> usize {
        let path = Path::new(&out(folder)).join("steps").join(name).join("metrics.jsonl");
        fs::read_to_string(path).map_or(0, |text| text.lines().count())
    }

    /// The metrics without their times.
    fn metrics(folder: &tempfile::TempDir) -> Vec<Value> {
        let mut all = Vec::new();
        for name in ["helpfulness", "safety-0.25"] {
            all.extend(read_lines(Path::new(&out(folder)).join("steps").join(name).join("metrics.jsonl")));
        }
        all.iter_mut().for_each(|record| {
            record.as_object_mut().unwrap().remove("seconds");
        });
        all
    }

    #[test]
    fn a_stopped_run_says_how_to_go_on_and_goes_on_bit_by_bit() {
        let whole = folder();
        done(&["run", &recipe(&whole)]);

        let folder = folder();
        let recipe = recipe(&folder);
        for (policy, steps) in [("helpfulness", 3), ("safety-0.25", 6)] {
            let child = start(&recipe);
            wait_until("training", || steps_of(&folder, policy) >= steps);
            if policy == "helpfulness" {
                says(&fails(2, &["run", &recipe]), &["Another sacpo process", "Wait"]);
            }
            signal(&child, "-INT");
            let output = child.wait_with_output().unwrap();
            let stderr = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(1), "{stderr}");
            says(&stderr, &["Stopped after step", "as you asked", "run the same command again"]);
            assert!(!stderr.contains("error"), "{stderr}");
            assert!(!Path::new(&out(&folder)).join("steps").join(policy).join("checkpoint").exists());
            let kept = || fs::read_to_string(Path::new(&out(&folder)).join("recipe.toml")).unwrap();
            let before = kept();
            let message = fails(2, &["run", &recipe, "--set", "train.learning_rate=1e-4"]);
            assert_eq!(kept(), before, "a run that was refused is what the folder says now");
            let why = if policy == "helpfulness" { "belongs to another training" } else { "other data or options" };
            says(&message, &[why, "elete"]);
        }
        says(&done(&["run", &recipe]).stderr, &["Policy helpfulness: complete.", "Continues after step"]);
        assert_eq!(metrics(&folder), metrics(&whole));
        assert!(weights(out(&folder)) == weights(out(&whole)));
    }

    #[test]
    fn a_killed_run_goes_on_from_any_moment() {
        let whole = folder();
        done(&["run", &recipe(&whole)]);

        let folder = folder();
        let recipe = recipe(&folder);
        // at the start, before the first saved state, after some, in the second step; then at moments of the clock
        let progress =
            [("helpfulness", 0), ("helpfulness", 2), ("helpfulness", 9), ("safety-0.25", 1), ("safety-0.25", 13)];
        for (policy, steps) in progress {
            let mut child = start(&recipe);
            wait_until("training", || steps_of(&folder, policy) >= steps);
            assert!(child.try_wait().unwrap().is_none(), "the run ended before it could be killed");
            signal(&child, "-KILL");
            child.wait().unwrap();
        }
        for milliseconds in [30, 100, 200, 300, 500] {
            let mut child = start(&recipe);
            std::thread::sleep(std::time::Duration::from_millis(milliseconds));
            if child.try_wait().unwrap().is_none() {
                signal(&child, "-KILL");
            }
            let stderr = String::from_utf8(child.wait_with_output().unwrap().stderr).unwrap();
            assert!(!stderr.contains("error"), "{stderr}");
        }
        done(&["run", &recipe]);
        assert_eq!(metrics(&folder), metrics(&whole));
        assert!(weights(out(&folder)) == weights(out(&whole)));
        let names = files(out(&folder)).into_keys().collect::<Vec<_>>();
        assert_eq!(names, files(out(&whole)).into_keys().collect::<Vec<_>>(), "something was left behind");
    }

    #[test]
    fn an_interrupted_quickstart_on_one_thread_ends_as_the_whole_one_on_two() {
        let folder = folder();
        let out = out(&folder);
        let arguments = ["quickstart", "--size", "small", "--threads", "1", "--json", "--out", &out];
        let child = Command::new(SACPO).args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let log = Path::new(&out).join("pretraining/metrics.jsonl");
        wait_until("pretraining", || fs::read_to_string(&log).is_ok_and(|text| text.lines().count() >= 5));
        signal(&child, "-TERM");
        assert_eq!(child.wait_with_output().unwrap().status.code(), Some(1));
        assert!(!Path::new(&out).join("base").exists());
        let outcome = done(&arguments);
        says(&outcome.stderr, &["Continues after step"]);
        let (whole, result, _) = quickstart();
        assert_eq!(policies(&object(&outcome.stdout)), policies(result));
        assert!(weights(&out) == weights(whole));
    }

    #[test]
    fn output_that_cannot_be_written_is_no_panic() {
        let made = material();
        let arguments = ["logps", "--model", &made.base(), "--data", &made.data("safety")].map(str::to_owned);
        let mut child =
            Command::new(SACPO).args(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!((output.status.code(), output.stderr.len()), (Some(0), 0), "a reader that goes away is no failure");

        let folder = folder();
        let mut child = start(&recipe(&folder));
        drop(child.stderr.take());
        assert_eq!(child.wait().unwrap().code(), Some(0), "nobody has to read the messages");

        let Ok(full) = fs::File::options().write(true).open("/dev/full") else {
            eprintln!("SKIPPED: a full disk behind standard output, for there is no /dev/full");
            return;
        };
        let output = Command::new(SACPO).args(&arguments).stdout(full).stderr(Stdio::piped()).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        says(&stderr, &["error: Could not write standard output", "disk is full"]);
    }
}

#[test]
fn logps_scores_every_response() {
    let made = material();
    let (base, data) = (made.base(), made.data("helpfulness"));
    let arguments = ["logps", "--model", &base, "--data", &data];
    let rows = json(&arguments)["rows"].as_array().unwrap().clone();
    let pairs = read_lines(&data);
    assert_eq!(rows.len(), pairs.len());
    for (index, (row, pair)) in rows.iter().zip(&pairs).enumerate() {
        assert_eq!(row["row"], json!(index));
        for (response, role) in row["responses"].as_array().unwrap().iter().zip(["chosen", "rejected"]) {
            assert_eq!(keys(response), ["role", "logp", "tokens"]);
            assert_eq!(response["role"], json!(role));
            assert!(response["logp"].as_f64().unwrap() < 0.0);
            // a token a word, and the end
            assert_eq!(response["tokens"], json!(pair[role].as_str().unwrap().split(' ').count() + 1));
        }
    }
    let few = [arguments.as_slice(), &["--limit", "3", "--threads", "1"]].concat();
    assert_eq!(json(&few)["rows"].as_array().unwrap()[..], rows[..3]);
    let table = done(&few).stdout;
    assert_eq!(table.lines().count(), 4);
    says(
        table.lines().nth(1).unwrap(),
        &["     1", &format!("{:.4}", rows[0]["responses"][0]["logp"].as_f64().unwrap())],
    );

    // the trainer scores the same: the first batch of all pairs has their mean
    let folder = folder();
    let mut train = vec!["train", "--model", &base, "--data", &data, "--metric", "helpfulness", "--beta", "0.1"];
    let out = out(&folder);
    train.extend(["--out", &out]);
    for setting in ["data.max_length=64", "data.validation_fraction=0.0", "train.batch_size=400"] {
        train.extend(["--set", setting]);
    }
    done(&train);
    let first = &read_lines(format!("{out}/steps/helpfulness/metrics.jsonl"))[0];
    for (index, role) in ["chosen", "rejected"].iter().enumerate() {
        let mean = rows.iter().map(|row| row["responses"][index]["logp"].as_f64().unwrap()).sum::<f64>() / 400.0;
        let trainers = first[format!("logps/{role}")].as_f64().unwrap();
        assert!((trainers - mean).abs() < 1e-9 * mean.abs(), "{trainers} {mean}");
    }
}

#[test]
fn generate_answers_every_prompt() {
    let made = material();
    let base = made.base();
    let folder = folder();
    let prompts = ["how do i bake bread ?", "how can i plant a tree ?", "hello !"];
    let lines = file(&folder, "prompts.txt", prompts.join("\n\n"));
    let rows: Vec<String> = prompts.iter().map(|prompt| json!({"prompt": prompt}).to_string()).collect();
    let rows = file(&folder, "prompts.jsonl", rows.join("\n"));
    let with = |extra: &[&str]| {
        json(&[&["generate", "--model", &base, "--max-new-tokens", "9"], extra].concat())["answers"].clone()
    };

    let greedy = with(&["--prompts", &lines]);
    let answers = greedy.as_array().unwrap();
    assert_eq!(answers.len(), 3);
    for (answer, prompt) in answers.iter().zip(prompts) {
        assert_eq!(keys(answer), ["prompt", "tokens", "text", "finish"]);
        assert_eq!(answer["prompt"], json!(prompt));
        let length = answer["tokens"].as_array().unwrap().len();
        assert_eq!(answer["finish"], json!(if length == 9 { "length" } else { "stop" }), "{answer}");
    }
    assert_eq!(with(&["--prompts", &rows, "--batch-size", "1", "--threads", "1"]), greedy);
    assert_eq!(with(&["--prompt", prompts[1]]), json!([answers[1]]));

    let sampled = |seed: &str| with(&["--prompts", &lines, "--temperature", "1.5", "--seed", seed]);
    assert_eq!(sampled("3"), sampled("3"));
    assert_ne!(sampled("3"), sampled("4"));

    let words = answers[0]["text"].as_str().unwrap().split_whitespace().collect::<Vec<_>>();
    assert!(words.len() > 2, "{words:?}");
    let stopped = with(&["--prompt", prompts[0], "--stop", words[1]]);
    assert_eq!(stopped[0]["finish"], json!("stop"));
    assert!(!stopped[0]["text"].as_str().unwrap().contains(words[1]));

    let text = done(&["generate", "--model", &base, "--prompt", "hello !", "--max-new-tokens", "2"]).stdout;
    assert!(text.starts_with("> hello !\n\n"), "{text}");
    // a limit beyond the context is no harm
    done(&["generate", "--model", &base, "--prompt", "hello !", "--max-new-tokens", &usize::MAX.to_string()]);
}

#[test]
fn models_are_described_and_converted() {
    let made = material();
    let base = made.base();
    let description = json(&["model", "inspect", &base]);
    assert_eq!(description["parameters"], json!(356_064));
    assert_eq!(description["config"]["max_position_embeddings"], json!(64));
    assert_eq!(description["tokenizer"]["vocab_size"], description["config"]["vocab_size"]);
    says(&done(&["model", "inspect", &base]).stdout, &["architecture llama", "356064", "BOS        <s>"]);
    let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/../engine/tests/fixtures/tiny/untied_gqa");
    assert_eq!(json(&["model", "inspect", tiny])["tokenizer"], Value::Null);

    let folder = folder();
    let copy = at(&folder, "a/copy");
    let converted = run(&["model", "convert", &base, &copy]);
    assert_eq!((converted.code, converted.stdout.as_str()), (0, ""), "{}", converted.stderr);
    says(&converted.stderr, &["356064 parameters"]);
    assert!(files(&copy) == files(&base), "a copy of what this program wrote is the same");
    assert_eq!(json(&["model", "convert", &base, &at(&folder, "b")])["parameters"], json!(356_064));
    let before = files(folder.path());
    for taken in ["a", "a/copy", "a/copy/config.json"] {
        says(&fails(2, &["model", "convert", &base, &at(&folder, taken)]), &["exists", "lost", "Choose a path"]);
    }
    assert!(files(folder.path()) == before);
}

#[test]
fn help_and_usage() {
    let commands: [&[&str]; 10] = [
        &[],
        &["quickstart"],
        &["run"],
        &["train"],
        &["logps"],
        &["generate"],
        &["tabular"],
        &["model"],
        &["model", "inspect"],
        &["model", "convert"],
    ];
    for command in commands {
        let help = done(&[command, &["--help"]].concat());
        says(&help.stdout, &["Usage: sacpo", "--json", "--threads"]);
        let long = help.stdout.lines().find(|line| line.chars().count() > 100 && !line.starts_with("Usage"));
        assert_eq!(long, None);
        assert_eq!(help.stderr, "");
    }
    says(&done(&["--version"]).stdout, &["sacpo "]);
    let wrong: [(&[&str], &str); 6] = [
        (&[], "Usage"),
        (&["trian"], "train"),
        (&["generate", "--model", "m"], "--prompt"),
        (&["quickstart", "--threads", "0"], "at least 1"),
        (&["quickstart", "--seed", "18446744073709551615"], "--seed"),
        (&["train", "--model", "m", "--data", "d", "--metric", "m", "--out", "o", "--beta", "-1"], "greater than 0"),
    ];
    for (arguments, part) in wrong {
        let outcome = run(arguments);
        assert_eq!((outcome.code, outcome.stdout.as_str()), (2, ""), "{arguments:?}");
        says(&outcome.stderr, &[part]);
    }
}
