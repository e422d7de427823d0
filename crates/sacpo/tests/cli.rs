//! The command as its users meet it: results, exit codes, messages, interruptions.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sacpo"));
    command.args(arguments).env("RUST_BACKTRACE", "0");
    command
}

fn sacpo(arguments: &[&str]) -> Output {
    command(arguments).output().unwrap()
}

/// The one JSON object on standard output of a call that succeeds.
fn json_of(arguments: &[&str]) -> Value {
    let output = sacpo(&[arguments, &["--json"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("standard output is one JSON object")
}

/// The message of a call that must fail with the given exit code: one paragraph, no panic.
fn failure(arguments: &[&str], code: i32) -> String {
    let output = sacpo(arguments);
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {message}");
    assert!(!message.contains("panicked"), "{message}");
    let error = message.split("error: ").nth(1).unwrap_or_else(|| panic!("no error in {message}"));
    assert_eq!(error.trim_end().lines().count(), 1, "not one paragraph: {error}");
    error.to_owned()
}

/// A small quickstart that several tests share: its folder, and what it printed.
fn quickstart() -> &'static (tempfile::TempDir, Value) {
    static SHARED: OnceLock<(tempfile::TempDir, Value)> = OnceLock::new();
    SHARED.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("q");
        let result = json_of(&["quickstart", "--size", "small", "--threads", "2", "--out", text(&out)]);
        (folder, result)
    })
}

fn shared(name: &str) -> PathBuf {
    quickstart().0.path().join("q").join(name)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn first_step(folder: &Path) -> Value {
    let metrics = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    serde_json::from_str(metrics.lines().next().unwrap()).unwrap()
}

const POLICIES: [&str; 4] = ["helpfulness", "safety-1", "safety-0.5", "safety-0.25"];

#[test]
fn the_quickstart_prints_its_policies_and_leaves_a_whole_run() {
    let result = &quickstart().1;
    let names: Vec<&str> = result["policies"].as_array().unwrap().iter().map(|p| p["name"].as_str().unwrap()).collect();
    assert_eq!(names, [&["base"], &POLICIES[..]].concat());
    for policy in result["policies"].as_array().unwrap() {
        assert!(policy["reward"].is_f64() && policy["safety"].is_f64() && policy["kl"].is_f64());
        assert!(policy["outside"].as_f64().unwrap() < 0.5, "{policy}");
    }
    let values = |key: &str| -> Vec<f64> {
        result["policies"].as_array().unwrap().iter().map(|p| p[key].as_f64().unwrap()).collect()
    };
    let (reward, safety) = (values("reward"), values("safety"));
    assert!(reward[1] > reward[0] && safety[1] < safety[0], "the first step does not trade safety for reward");
    assert!(safety[1..].is_sorted() && safety[2] > safety[1], "safety does not rise along the sweep: {safety:?}");
    assert!(reward[1..].is_sorted_by(|a, b| a > b), "reward does not fall along the sweep: {reward:?}");
    for key in ["constraint", "seconds", "peak_memory_bytes", "out"] {
        assert!(result.get(key).is_some(), "{key}");
    }
    for file in ["summary.md", "frontier.svg", "recipe.toml", "results.json"] {
        assert!(shared(file).metadata().unwrap().len() > 0, "{file}");
    }
}

#[test]
fn every_step_starts_from_its_reference_with_a_margin_of_exactly_zero() {
    let parent = read_json(&shared("steps/helpfulness/policy.json"));
    for name in POLICIES {
        let folder = shared("steps").join(name);
        let first = first_step(&folder);
        for metric in ["rewards/margins", "rewards/chosen", "rewards/rejected"] {
            assert_eq!(first[metric].as_f64(), Some(0.0), "{name} {metric}");
        }
        assert!(first["logps/chosen"].is_f64() && first["grad_norm"].is_f64());
        let record = read_json(&folder.join("policy.json"));
        if name != "helpfulness" {
            assert_eq!(record["reference"], parent["model"]);
        }
        assert_ne!(record["reference"], record["model"]);
    }
}

#[test]
fn a_finished_run_is_not_repeated_and_threads_do_not_change_a_bit() {
    quickstart();
    let recipe = shared("recipe.toml");
    let before = std::fs::metadata(shared("steps/safety-1/checkpoint/model.safetensors")).unwrap().modified().unwrap();
    let output = sacpo(&["run", text(&recipe)]);
    let messages = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{messages}");
    assert_eq!(messages.matches("complete").count(), POLICIES.len(), "{messages}");
    let after = std::fs::metadata(shared("steps/safety-1/checkpoint/model.safetensors")).unwrap().modified().unwrap();
    assert_eq!(before, after);

    let folder = tempfile::tempdir().unwrap();
    let out = format!("run.out='{}'", text(&folder.path().join("again")));
    let one = ["run", text(&recipe), "--set", &out, "--set", "step.2.beta_over_lambda=[0.5]", "--threads", "1"];
    assert!(sacpo(&one).status.success());
    for name in ["helpfulness", "safety-0.5"] {
        let weights = Path::new("steps").join(name).join("checkpoint/model.safetensors");
        let (first, second) = (shared(text(&weights)), folder.path().join("again").join(&weights));
        assert!(std::fs::read(first).unwrap() == std::fs::read(second).unwrap(), "{name} differs");
    }
    let error = failure(&[&one[..], &["--set", "step.1.learning_rate=1e-3"]].concat(), 2);
    assert!(error.contains("another model, data or options"), "{error}");
}

#[test]
fn models_score_answer_and_convert() {
    quickstart();
    let (base, data) = (shared("base"), shared("data/helpfulness.jsonl"));
    let scores = json_of(&["logps", "--model", text(&base), "--data", text(&data), "--limit", "3"]);
    let rows = scores["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 3);
    for (row, role) in rows.iter().flat_map(|r| [(r, 0), (r, 1)]) {
        let response = &row["responses"][role];
        assert_eq!(response["role"], ["chosen", "rejected"][role]);
        assert!(response["logp"].as_f64().unwrap() < 0.0 && response["tokens"].as_u64().unwrap() > 1);
    }

    let ask = |seed: &str| {
        let sampling = ["--temperature", "1", "--max-new-tokens", "12", "--seed", seed];
        json_of(&[&["generate", "--model", text(&base), "--prompt", "how do i bake bread ?"], &sampling[..]].concat())
    };
    let answer = ask("1");
    assert_eq!(answer, ask("1"));
    let answer = &answer["answers"][0];
    assert_eq!(answer["prompt"], "how do i bake bread ?");
    assert!(answer["tokens"].is_array() && answer["text"].is_string());
    assert!(answer["finish"] == "stop" || answer["finish"] == "length");

    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("copy");
    assert!(sacpo(&["model", "convert", text(&base), text(&copy)]).status.success());
    let weights = |folder: &Path| std::fs::read(folder.join("model.safetensors")).unwrap();
    assert!(weights(&base) == weights(&copy));
    let description = json_of(&["model", "inspect", text(&copy)]);
    assert_eq!(description["parameters"], 356_064);
}

/// A training of many short steps, for interruptions.
fn long_training(out: &Path) -> Command {
    let mut child = command(&["train", "--metric", "helpfulness", "--beta", "0.5", "--threads", "1"]);
    child.args(["--model", text(&shared("base")), "--data", text(&shared("data/helpfulness.jsonl"))]);
    child.args(["--out", text(out), "--set", "train.epochs=12", "--set", "train.save_every=3"]);
    child.args(["--set", "data.max_length=64", "--set", "data.validation_fraction=0.05"]);
    child.stdout(Stdio::null()).stderr(Stdio::piped());
    child
}

/// Waits until the training has logged some steps.
fn wait_for_steps(child: &mut Child, out: &Path, steps: usize) {
    let metrics = out.join("steps/helpfulness/metrics.jsonl");
    let start = Instant::now();
    while std::fs::read_to_string(&metrics).unwrap_or_default().lines().count() < steps {
        assert!(child.try_wait().unwrap().is_none(), "the training ended before it could be interrupted");
        assert!(start.elapsed() < Duration::from_secs(120), "the training does not get on");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn an_interrupted_or_killed_training_continues_to_the_same_weights() {
    quickstart();
    let folder = tempfile::tempdir().unwrap();
    let weights = |out: &Path| std::fs::read(out.join("steps/helpfulness/checkpoint/model.safetensors")).unwrap();
    let whole = folder.path().join("whole");
    assert!(long_training(&whole).status().unwrap().success());

    let out = folder.path().join("interrupted");
    let mut child = long_training(&out).spawn().unwrap();
    wait_for_steps(&mut child, &out, 10);
    let second = failure(&["run", text(&out.join("recipe.toml"))], 2);
    assert!(second.contains("Another sacpo process"), "{second}");
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("run the same command again"), "{message}");

    for steps in [25, 50] {
        let mut child = long_training(&out).spawn().unwrap();
        wait_for_steps(&mut child, &out, steps);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!out.join("steps/helpfulness/policy.json").exists());
    }
    assert!(long_training(&out).status().unwrap().success());
    assert!(weights(&out) == weights(&whole), "the weights differ from the uninterrupted training's");
}

/// A copy of the shared base model that a test may damage.
fn damaged(folder: &Path, damage: impl FnOnce(&Path)) -> PathBuf {
    quickstart();
    let copy = folder.join("damaged");
    std::fs::create_dir(&copy).unwrap();
    for entry in std::fs::read_dir(shared("base")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
    }
    damage(&copy);
    copy
}

#[test]
fn damaged_and_foreign_models_are_named() {
    let inspectable = |damage: fn(&Path), parts: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        let model = damaged(folder.path(), damage);
        let to = folder.path().join("to");
        let error = failure(&["model", "convert", text(&model), text(&to)], 2);
        for part in parts {
            assert!(error.contains(part), "{error} lacks {part}");
        }
        assert!(!to.exists());
    };
    inspectable(
        |model| {
            let path = model.join("model.safetensors");
            let bytes = std::fs::read(&path).unwrap();
            std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        },
        &["model.safetensors"],
    );
    inspectable(|model| edit(&model.join("config.json"), |c| c["hidden_act"] = json!("gelu")), &["hidden_act", "gelu"]);
    inspectable(|model| edit(&model.join("config.json"), |c| c["mystery"] = json!(7)), &["mystery"]);
    inspectable(
        |model| edit(&model.join("tokenizer.json"), |t| t["model"]["vocab"]["unheard"] = json!(5000)),
        &["wrong tokenizer for the model"],
    );
    inspectable(|model| std::fs::remove_file(model.join("config.json")).unwrap(), &["config.json"]);
}

fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value = read_json(path);
    change(&mut value);
    std::fs::write(path, value.to_string()).unwrap();
}

#[test]
fn bad_data_names_file_and_row() {
    quickstart();
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("pairs.jsonl");
    let good = r#"{"prompt": "how ?", "chosen": "sure .", "rejected": "no ."}"#;
    let long = format!(r#"{{"prompt": "{}", "chosen": "sure .", "rejected": "no ."}}"#, "how ".repeat(100));
    for (second, parts) in [
        (r#"{"prompt": "how ?", "chosen": "", "rejected": "no ."}"#, ["2", "chosen"]),
        (r#"{"prompt": "how ?", "rejected": "no ."}"#, ["2", "chosen"]),
        (r#"{"prompt": "how ?", "chosen": 7, "rejected": "no ."}"#, ["2", "chosen"]),
        ("{", ["2", "JSON"]),
        (&long, ["2", "tokens"]),
    ] {
        std::fs::write(&data, format!("{good}\n{second}\n")).unwrap();
        let model = shared("base");
        let out = folder.path().join("out");
        let training = ["train", "--metric", "x", "--beta", "1", "--set", "data.max_length=64"];
        let files = ["--model", text(&model), "--data", text(&data)];
        for arguments in
            [[&["logps"], &files[..]].concat(), [&training[..], &files[..], &["--out", text(&out)]].concat()]
        {
            let error = failure(&arguments, 2);
            for part in [&["pairs.jsonl"], &parts[..]].concat() {
                assert!(error.contains(part), "{error} lacks {part}");
            }
        }
        assert!(!out.join("steps").exists());
    }
    std::fs::write(&data, "").unwrap();
    let error = failure(&["logps", "--model", text(&shared("base")), "--data", text(&data)], 2);
    assert!(error.contains("pairs.jsonl"), "{error}");
    let missing = folder.path().join("missing.jsonl");
    let error = failure(&["logps", "--model", text(&shared("base")), "--data", text(&missing)], 2);
    assert!(error.contains("missing.jsonl"), "{error}");
    let error = failure(&["logps", "--model", text(&missing), "--data", text(&shared("data/safety.jsonl"))], 2);
    assert!(error.contains("missing.jsonl"), "{error}");
    let prompt = "how ".repeat(100);
    let error = failure(&["generate", "--model", text(&shared("base")), "--prompt", &prompt], 2);
    assert!(error.contains("rompt 1") && error.contains("context"), "{error}");
}

#[test]
fn bad_recipes_and_options_are_named() {
    quickstart();
    let recipe = shared("recipe.toml");
    for (setting, part) in [
        ("train.learning_rat=1", "learning_rate"),
        ("step.1.beta=0", "step.1.beta"),
        ("step.2.learning_rate=nan", "learning_rate"),
        ("step.1.max_length=100000", "max_length"),
    ] {
        let error = failure(&["run", text(&recipe), "--set", setting], 2);
        assert!(error.contains(part), "{error} lacks {part}");
    }
    assert_eq!(sacpo(&["run"]).status.code(), Some(2));
    assert_eq!(sacpo(&["generate", "--model", "x", "--prompt", "y", "--threads", "0"]).status.code(), Some(2));
}

#[test]
fn a_full_disk_leaves_the_target_as_it_was() {
    quickstart();
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("to");
    // a limit on the size of files stands for the full disk: 200 blocks of 512 or 1,024 bytes
    let script = "trap '' XFSZ; ulimit -f 200; exec \"$0\" model convert \"$1\" \"$2\"";
    let output = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_sacpo"), text(&shared("base")), text(&to)])
        .output()
        .unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("Could not write"), "{message}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "something is left behind");
}
