//! What goes wrong outside the program: every fault is a paragraph that names it, and leaves nothing half-made.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::path::Path;

use common::*;
use serde_json::json;
use tempfile::TempDir;

/// The arguments of a training that would work with the base model and a file of pairs.
fn train<'a>(model: &'a str, data: &'a str, out: &'a str) -> Vec<&'a str> {
    let mut arguments = vec!["train", "--model", model, "--data", data, "--metric", "helpfulness", "--beta", "0.1"];
    arguments.extend(["--out", out]);
    for setting in ["data.max_length=64", "data.max_pairs=40", "train.batch_size=4", "train.warmup_ratio=0.0"] {
        arguments.extend(["--set", setting]);
    }
    arguments
}

/// A training that must fail before it has made anything.
fn refused(folder: &TempDir, code: i32, model: &str, data: &str, extra: &[&str]) -> String {
    let out = out(folder);
    let message = fails(code, &[&train(model, data, &out), extra].concat());
    assert!(!Path::new(&out).exists(), "something was left behind after: {message}");
    message
}

fn long_words() -> String {
    ["bread"; 80].join(" ")
}

#[test]
fn data_that_is_no_data_is_named_by_file_row_and_column() {
    let folder = folder();
    let base = material().base();
    let good = json!({"prompt": "hello !", "chosen": "bake bread", "rejected": "sorry"}).to_string();
    let long = json!({"prompt": long_words(), "chosen": "bake", "rejected": "sorry"}).to_string();
    let rows = |second: &str| format!("{good}\n{second}\n").into_bytes();
    let cases: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("schema.jsonl", b"{\"text\": \"hello\"}\n".to_vec(), &["schema.jsonl", "`text`", "`chosen`"]),
        ("column.jsonl", rows("{\"prompt\": \"a\", \"chosen\": \"b\"}"), &["Line 2", "`rejected`", "missing"]),
        (
            "empty-response.jsonl",
            rows("{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \" \"}"),
            &["Line 2 of", "empty-response.jsonl", "`rejected`", "empty", "Correct or remove"],
        ),
        ("type.jsonl", rows("{\"prompt\": 3, \"chosen\": \"b\", \"rejected\": \"c\"}"), &["Line 2", "`prompt`", "`3`"]),
        ("half.jsonl", rows("{\"prompt\": \"a\", \"chos"), &["Line 2", "not one valid JSON object"]),
        (
            "latin-1.jsonl",
            [good.as_bytes(), b"\n{\"prompt\": \"caf\xe9\"}\n"].concat(),
            &["Line 2", "not UTF-8 (byte 16)", "Save"],
        ),
        (
            "utf-16.json",
            format!("\u{feff}[{good}]").encode_utf16().flat_map(u16::to_le_bytes).collect(),
            &["Line 1 of", "utf-16.json", "not UTF-8 (byte 1)"],
        ),
        ("latin-1.json", b"[{\"prompt\": \"caf\xe9\"}]".to_vec(), &["latin-1.json", "not UTF-8", "byte 17"]),
        ("garbage.jsonl", (0..4000u32).map(|i| (i * i % 251) as u8).collect(), &["Line 1", "garbage.jsonl"]),
        ("garbage.json.gz", [&[0x1f, 0x8b][..], &[7; 500]].concat(), &["garbage.json.gz", "gzip"]),
        ("empty.jsonl", Vec::new(), &["empty.jsonl", "no rows"]),
        ("blank.jsonl", b"\n\n \n".to_vec(), &["blank.jsonl", "no rows"]),
        ("long.jsonl", rows(&long), &["Line 2 of", "long.jsonl", "81 tokens", "64", "no room", "long_prompts"]),
    ];
    for (name, bytes, parts) in cases {
        let path = file(&folder, name, bytes);
        says(&refused(&folder, 2, &base, &path, &[]), parts);
        says(&fails(2, &["logps", "--model", &base, "--data", &path]), parts);
    }
    says(&refused(&folder, 2, &base, &at(&folder, "nowhere.jsonl"), &[]), &["nowhere.jsonl", "Check the path"]);
    // all files of a folder are one data set
    says(&refused(&folder, 2, &base, &text(folder.path()), &[]), &["Line 2 of", "column.jsonl", "`rejected`"]);
    says(&refused(&folder, 2, &base, &at(&folder, "none-*.jsonl"), &[]), &["No file matches", "none-*.jsonl"]);
}

#[test]
fn prompts_that_cannot_be_answered_are_named_by_number() {
    let folder = folder();
    let base = material().base();
    let long = long_words();
    let generate = |extra: &[&str]| fails(2, &[&["generate", "--model", &base], extra].concat());
    says(
        &generate(&["--prompt", "hello !", "--prompt", &long]),
        &["Prompt 2 has 81 tokens", "context of 64", "Shorten"],
    );
    says(&generate(&["--prompts", &at(&folder, "nowhere.txt")]), &["nowhere.txt", "Check the path"]);
    let rows = file(&folder, "prompts.jsonl", "{\"prompt\": \"hello !\"}\n{\"text\": \"bread\"}\n");
    says(&generate(&["--prompts", &rows]), &["Line 2", "prompts.jsonl", "`prompt`"]);
    let chat = file(&folder, "chat.jsonl", r#"{"prompt": [{"role": "user", "content": "hello !"}]}"#);
    says(&generate(&["--prompts", &chat]), &["Prompt 1", "no chat template"]);
    says(&generate(&["--prompt", "a", "--temperature", "NaN"]), &["temperature", "at least 0"]);
    says(&generate(&["--prompt", "a", "--stop", ""]), &["stop text", "empty"]);
    // nothing is drawn at temperature 0, which is the default
    for drawing in [["--top-k", "5"], ["--top-p", "0.9"], ["--min-p", "0.1"]] {
        says(&generate(&[&["--prompt", "a"][..], &drawing].concat()), &[drawing[0], "Set --temperature"]);
    }

    // in a recipe they are found before the training, not after it
    let recipe = recipe(&folder);
    let prompts = format!("evaluate.prompts=[\"hello !\", {long:?}]");
    says(&fails(2, &["run", &recipe, "--set", &prompts]), &["evaluate.prompts", "Prompt 2 has 81 tokens"]);
    assert!(!Path::new(&out(&folder)).exists());
}

#[test]
fn options_out_of_range_name_the_key() {
    let folder = folder();
    let made = material();
    let (base, data) = (made.base(), made.data("safety"));
    let recipe = recipe(&folder);
    let cases: [(&str, &[&str]); 9] = [
        ("train.learning_rate=nan", &["train.learning_rate", "greater than 0"]),
        ("train.learning_rate=NaN", &["train.learning_rate", "greater than 0"]),
        ("train.learning_rte=1", &["learning_rte", "learning_rate"]),
        ("train.batch_size=0", &["train.batch_size", "from 1"]),
        ("data.max_length=65", &["64 tokens", "data.max_length=64"]),
        ("data.long_prompts=maybe", &["long_prompts", "\"drop\""]),
        ("run.threads=100000", &["100000 threads", "run.threads"]),
        ("step.1.beta=0", &["step.1.beta", "greater than 0"]),
        ("stp.1.beta=1", &["stp", "step"]),
    ];
    for (setting, parts) in cases {
        says(&refused(&folder, 2, &base, &data, &["--set", setting]), parts);
        says(&fails(2, &["run", &recipe, "--set", setting]), parts);
        assert!(!Path::new(&out(&folder)).exists(), "{setting}");
    }
    says(&fails(2, &["run", &recipe, "--set", "step.2.beta_over_lambda=-1"]), &["beta_over_lambda", "greater than 0"]);
    says(&fails(2, &["run", &at(&folder, "nowhere.toml")]), &["nowhere.toml", "Check the path"]);
    says(&fails(2, &["run", &file(&folder, "bytes.toml", [0xff, 0x00, 0x80])]), &["bytes.toml:1", "UTF-8"]);
    let text = fs::read_to_string(&recipe).unwrap().replace("beta = 0.5", "betta = 0.5");
    let message = fails(2, &["run", &file(&folder, "slip.toml", text)]);
    says(&message, &["slip.toml:14", "`step.1.betta`", "`beta`"]);
    for beta in ["0", "-0.1", "NaN", "inf", "much"] {
        let outcome = run(&["train", "--model", &base, "--data", &data, "--metric", "m", "--out", "o", "--beta", beta]);
        assert_eq!(outcome.code, 2);
        says(&outcome.stderr, &["--beta", "greater than 0"]);
    }
}

/// Changes one field of a JSON file.
fn set_field(path: &str, field: &str, value: serde_json::Value) {
    let mut json = read_json(path);
    json[field] = value;
    fs::write(path, json.to_string()).unwrap();
}

#[test]
fn models_that_are_not_whole_or_not_supported_are_refused() {
    let folder = folder();
    let data = material().data("safety");
    let model = copy_of_base(&folder);
    let (config, weights, tokenizer) =
        (format!("{model}/config.json"), format!("{model}/model.safetensors"), format!("{model}/tokenizer.json"));
    let copy = at(&folder, "copy");
    let check = |parts: &[&str]| {
        for message in [
            refused(&folder, 2, &model, &data, &[]),
            fails(2, &["logps", "--model", &model, "--data", &data]),
            fails(2, &["generate", "--model", &model, "--prompt", "hello !"]),
            fails(2, &["model", "convert", &model, &copy]),
        ] {
            says(&message, parts);
        }
        assert!(!Path::new(&copy).exists());
    };

    let whole = fs::read(&weights).unwrap();
    for length in [0, 7, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&weights, &whole[..length]).unwrap();
        check(&["model.safetensors", "truncated"]);
    }
    fs::remove_file(&weights).unwrap();
    check(&["model.safetensors", "index"]);
    fs::write(&weights, &whole).unwrap();

    let before = fs::read(&config).unwrap();
    for (field, value, part) in [
        ("attention_bias", json!(true), "not supported"),
        ("model_type", json!("gpt2"), "model_type"),
        ("hidden_act", json!("gelu"), "not supported"),
        ("no_such_field", json!(3), "not supported"),
        ("hidden_size", json!(-1), "whole number"),
        ("num_key_value_heads", json!(2), "multiple"),
        ("vocab_size", json!(9_999_999), "weights"),
        ("rope_scaling", json!({"rope_type": "yarn", "factor": 2.0}), "not supported"),
    ] {
        set_field(&config, field, value);
        check(
            &["config.json", field.trim_end_matches("scaling"), part]
                .map(|p| if field == "vocab_size" { part } else { p }),
        );
        fs::write(&config, &before).unwrap();
    }

    let before = fs::read(&tokenizer).unwrap();
    let mut other = read_json(&tokenizer);
    other["model"]["vocab"]["elsewhere"] = json!(5000);
    fs::write(&tokenizer, other.to_string()).unwrap();
    check(&["token ids up to 5000", "246", "wrong tokenizer"]);
    fs::write(&tokenizer, &before[..before.len() / 2]).unwrap();
    check(&["tokenizer.json", "malformed"]);
    fs::remove_file(&tokenizer).unwrap();
    check(&["no tokenizer.json"]);

    says(&fails(2, &["model", "inspect", &at(&folder, "nowhere")]), &["nowhere", "Check the path"]);
    says(&fails(2, &["model", "inspect", &data]), &["neither a folder nor a .gguf file"]);
    let gguf = file(&folder, "half.gguf", b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\x7f");
    says(&fails(2, &["model", "inspect", &gguf]), &["half.gguf"]);
}

#[test]
fn damaged_models_are_errors_and_never_panics() {
    let folder = folder();
    let model = copy_of_base(&folder);
    let mut state = 1u32;
    let mut random = move |below: usize| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as usize % below
    };
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        let path = format!("{model}/{name}");
        let whole = fs::read(&path).unwrap();
        for _ in 0..12 {
            let mut damaged = whole.clone();
            for _ in 0..3 {
                // the header of the weights is their first two thousand bytes
                let at = random(damaged.len().min(2000));
                damaged[at] = random(256) as u8;
            }
            fs::write(&path, damaged).unwrap();
            let arguments = ["generate", "--model", &model, "--prompt", "hello !", "--max-new-tokens", "2"];
            // `run` fails the test on a panic or a signal
            let outcome = run(&arguments);
            assert!([0, 1, 2].contains(&outcome.code), "{}", outcome.stderr);
        }
        fs::write(&path, whole).unwrap();
    }
}

/// Overwrites a weight of the last norm, which every token passes.
fn overwrite_weight(model: &str, value: f32) {
    let path = format!("{model}/model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&value.to_le_bytes());
    fs::write(&path, bytes).unwrap();
}

#[test]
fn numbers_that_are_none_stop_the_work_and_keep_what_was_good() {
    let folder = folder();
    let data = material().data("safety");
    let model = copy_of_base(&folder);
    let run = out(&folder);
    let step = Path::new(&run).join("steps/helpfulness");

    let wild = [train(&model, &data, &run), vec!["--set", "train.learning_rate=1e38"]].concat();
    let message = fails(1, &wild);
    says(&message, &["Training stopped at step", "rows", "Lower the learning rate"]);
    assert!(!step.join("checkpoint").exists() && !step.join("policy.json").exists());
    // after the last step no other one shows that it overflowed
    let single = [wild.as_slice(), &["--set", "train.batch_size=40", "--set", "train.learning_rate=1e39"]].concat();
    says(&fails(1, &single), &["Training stopped at step 1", "weights became infinite"]);
    assert!(!step.join("checkpoint").exists() && !step.join("policy.json").exists());

    overwrite_weight(&model, f32::NAN);
    says(&fails(1, &["logps", "--model", &model, "--data", &data]), &["row 1 are", "not numbers", "checkpoint"]);
    says(&fails(1, &["generate", "--model", &model, "--prompt", "hello !"]), &["prompt 1", "not numbers"]);
    let other = at(&folder, "other");
    says(&fails(1, &train(&model, &data, &other)), &["responses in row", "not numbers"]);
    assert!(!Path::new(&other).join("steps").exists());
}

#[test]
fn what_a_run_made_is_not_built_on_when_it_was_changed() {
    let folder = folder();
    let recipe = recipe(&folder);
    done(&["run", &recipe]);
    let steps = Path::new(&out(&folder)).join("steps");
    let helpful = steps.join("helpfulness");

    // another command's folder stays as it is
    let before = files(out(&folder));
    let quickstart = ["quickstart", "--size", "small", "--out", &out(&folder)];
    says(&fails(2, &quickstart), &["a run that is no quickstart", "--out"]);
    assert!(files(out(&folder)) == before);

    // what a killed process leaves is swept
    for (parent, name) in [(steps.clone(), ".sacpo-1.partial"), (helpful.clone(), ".sacpo-2.partial")] {
        fs::create_dir(parent.join(name)).unwrap();
        fs::write(parent.join(name).join("model.safetensors"), "half").unwrap();
    }
    fs::write(helpful.join("training-state.safetensors"), "of a finished training").unwrap();
    done(&["run", &recipe]);
    let names: Vec<_> = fs::read_dir(&helpful).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    // checkpoint, metrics, events for TensorBoard, and the record
    assert_eq!(names.len(), 4, "{names:?}");
    assert!(!steps.join(".sacpo-1.partial").exists());

    let before = fs::read(helpful.join("checkpoint/model.safetensors")).unwrap();
    overwrite_weight(&text(&helpful.join("checkpoint")), 0.5);
    says(&fails(2, &["run", &recipe]), &["helpfulness", "not those of the policy", "delete"]);
    fs::remove_dir_all(steps.join("safety-0.25")).unwrap();
    says(&fails(2, &["run", &recipe]), &["helpfulness", "not those of the policy"]);
    assert!(!steps.join("safety-0.25").exists());

    fs::write(helpful.join("policy.json"), "{").unwrap();
    says(&fails(2, &["run", &recipe]), &["policy.json", "damaged", "Delete"]);

    // and deleting what the message says makes it again
    fs::remove_dir_all(&helpful).unwrap();
    fs::create_dir(&helpful).unwrap();
    fs::write(helpful.join("training-state.safetensors"), "half").unwrap();
    says(&fails(2, &["run", &recipe]), &["training-state.safetensors is damaged", "Delete"]);
    fs::remove_file(helpful.join("training-state.safetensors")).unwrap();
    done(&["run", &recipe]);
    assert!(fs::read(helpful.join("checkpoint/model.safetensors")).unwrap() == before);
}

#[test]
fn folders_that_cannot_be_written_are_named() {
    let folder = folder();
    let made = material();
    let (base, data) = (made.base(), made.data("safety"));
    let file = file(&folder, "file", "");
    let below = format!("{file}/run");
    says(&fails(1, &train(&base, &data, &file)), &["Could not create", &file, "choose another path"]);
    says(&fails(1, &["quickstart", "--out", &file]), &["Could not create", &file, "choose another path"]);
    for arguments in
        [train(&base, &data, &below), vec!["quickstart", "--out", &below], vec!["model", "convert", &base, &below]]
    {
        says(&fails(2, &arguments), &["Could not", &file, "file where a folder is needed"]);
    }
    assert_eq!(fs::read(&file).unwrap(), b"");
    if cfg!(target_os = "linux") {
        let message = fails(2, &train(&base, &data, "/proc/run"));
        says(&message, &["Could not create", "/proc/run", "Check the path"]);
    }
}

/// A file system that is too small, until [`Disk::grow`].
#[cfg(target_os = "linux")]
struct Disk(TempDir);

#[cfg(target_os = "linux")]
impl Disk {
    /// Nothing where tmpfs may not be mounted.
    fn new(size: &str) -> Option<Self> {
        let folder = folder();
        mount(&["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs", &text(folder.path())]).then(|| Self(folder))
    }

    fn grow(&self) {
        assert!(mount(&["-o", "remount,size=64m", &text(self.0.path())]));
    }
}

#[cfg(target_os = "linux")]
impl Drop for Disk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(self.0.path()).status();
    }
}

#[cfg(target_os = "linux")]
fn mount(arguments: &[&str]) -> bool {
    std::process::Command::new("mount").args(arguments).output().is_ok_and(|output| output.status.success())
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_leaves_nothing_half_written() {
    let Some(disk) = Disk::new("1m") else {
        eprintln!("SKIPPED: a full disk, for tmpfs cannot be mounted here");
        return;
    };
    let made = material();
    let (base, data) = (made.base(), made.data("safety"));
    let (model, run) = (at(&disk.0, "model"), out(&disk.0));
    says(&fails(1, &["model", "convert", &base, &model]), &["model.safetensors", "disk is full", "free some space"]);
    assert!(files(disk.0.path()).is_empty(), "{:?}", files(disk.0.path()).keys());

    // first the state of the training does not fit, then the checkpoint
    let often = [train(&base, &data, &run), vec!["--set", "train.save_every=3"]].concat();
    for arguments in [&often, &train(&base, &data, &run)] {
        let message = fails(1, arguments);
        says(&message, &[&run, "disk is full"]);
        let left = files(&run);
        assert!(
            left.keys().all(|path| !text(path).contains("safetensors") || text(path).contains("cache")),
            "{left:?}"
        );
    }
    disk.grow();
    done(&often);
    let whole = folder();
    done(&train(&base, &data, &out(&whole)));
    assert!(weights(&run) == weights(out(&whole)), "what failed on a full disk goes on when there is room");
}

/// As a full disk, for those who may not mount one.
#[test]
#[cfg(unix)]
fn a_file_size_limit_leaves_nothing_half_written() {
    let made = material();
    let folder = folder();
    let model = at(&folder, "model");
    // in blocks of 512 or 1024 bytes; the signal is ignored so that the write fails instead
    let script = "trap '' XFSZ; ulimit -f 200 && exec \"$0\" \"$@\"";
    let output = std::process::Command::new("sh")
        .args(["-c", script, SACPO, "model", "convert", &made.base(), &model])
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    says(&stderr, &["error: Could not write", "model.safetensors", "limit is reached"]);
    assert!(files(folder.path()).is_empty());
}
