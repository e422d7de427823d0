//! Constraints in recipes: λ is chosen, realised and certified, whatever realises it, whoever judges, and however often the run
//! is killed.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use align::world::{World, json_lines};
use common::*;
use serde_json::{Value, json};

/// A small quickstart, of which base model, data and prompts are used.
fn quickstart() -> &'static Path {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    MADE.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("constraint-quickstart");
        let _ = fs::remove_dir_all(&folder);
        done(&["quickstart", "--size", "small", "--threshold", "-1", "--out", &text(&folder)]);
        folder
    })
}

/// A recipe of the quickstart's data, with two policies of the second step; `rest` follows.
fn recipe(folder: &tempfile::TempDir, rest: &str) -> String {
    let made = quickstart();
    let data = |name: &str| text(&made.join("data").join(name));
    let recipe = format!(
        "[model]\nbase = {:?}\n[run]\nout = {:?}\n[data]\nmax_length = 64\nmax_pairs = 400\n[train]\n\
         learning_rate = 1e-3\nbatch_size = 20\nsave_every = 4\n\
         [[step]]\nmetric = \"helpfulness\"\nbeta = 0.5\ndata = {:?}\n\
         [[step]]\nmetric = \"safety\"\nbeta_over_lambda = [1.0, 0.1]\ndata = {:?}\n\
         [[judge]]\nmetric = \"safety\"\nquickstart = \"safety\"\n\
         [[judge]]\nmetric = \"reward\"\nquickstart = \"reward\"\n{rest}",
        text(&made.join("base")),
        out(folder),
        data("helpfulness.jsonl"),
        data("safety.jsonl"),
    );
    file(folder, "recipe.toml", recipe)
}

/// A constraint on the safety; `more` are further keys.
fn safe(at_least: f64, more: &str) -> String {
    let prompts = |name: &str| text(&quickstart().join("data").join(name));
    format!(
        "[[constraint]]\nmetric = \"safety\"\nat_least = {at_least:?}\nanswers = 24\nmax_prompts = 60\nmax_new_tokens = 24\n\
         prompts = {:?}\nheld_out_prompts = {:?}\n{more}\n",
        prompts("prompts.jsonl"),
        prompts("held_out_prompts.jsonl")
    )
}

/// The constraint's result of a recipe with this rest, which is run twice: the second time from what is kept.
fn constraint(folder: &tempfile::TempDir, rest: &str) -> Value {
    let recipe = recipe(folder, rest);
    let first = json(&["run", &recipe]);
    fs::remove_file(Path::new(&out(folder)).join("manifest.json")).unwrap();
    let again = json(&["run", &recipe]);
    assert_eq!(first["constraint"], again["constraint"]);
    first["constraint"].clone()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value}"))
}

/// The last of the policies that were tried for it has bounds no more than `slack` below the threshold.
fn check_shots(constraint: &Value, at_least: f64, slack: f64) {
    let shots = constraint["shots"].as_array().unwrap();
    let best = shots.iter().find(|shot| shot["policy"] == constraint["policy"]).unwrap();
    let bound = number(&best["measured"][0]["lower_bound"]);
    assert!(bound >= at_least - slack, "{constraint}");
    let low = number(&constraint["lower_bound"]);
    let met = &constraint["constraints"][0];
    assert!(low < number(&met["safety"]) && number(&met["safety"]) < number(&met["upper_bound"]), "{met}");
}

#[test]
fn lambda_is_realised_by_training_mixing_and_merging() {
    for realise in ["train", "mix", "merge"] {
        let folder = folder();
        let result = constraint(&folder, &safe(-0.2, &format!("realise = \"{realise}\"\nshots = 6")));
        check_shots(&result, -0.2, 0.0);
        let (policy, lambda) = (result["policy"].as_str().unwrap(), number(&result["lambda"]));
        assert!(lambda > 0.0, "{result}");
        if realise == "train" {
            assert!(policy.starts_with("safety-0.") || policy.starts_with("safety-1"), "{policy}");
            assert!((number(&result["beta_over_lambda"]) * lambda - 0.5).abs() < 1e-9, "{result}");
        } else {
            // q = λ/λ̄, where λ̄ = 0.5/0.1
            let q: f64 = policy.strip_prefix(&format!("safety-{realise}-")).unwrap().parse().unwrap();
            assert!((q - lambda / 5.0).abs() < 1e-9, "{result}");
            assert_eq!(result["beta_over_lambda"], Value::Null);
        }
        let written = Path::new(&out(&folder)).join("merges").join(policy).join("checkpoint/model.safetensors");
        assert_eq!(written.exists(), realise == "merge");
    }
}

#[test]
fn the_strongest_policy_is_measured_before_it_is_called_too_weak() {
    let folder = folder();
    let weak = recipe(&folder, &safe(-0.05, "realise = \"mix\"")).clone();
    let set = "step.2.beta_over_lambda=[4, 2]";
    let result = json(&["run", &weak, "--set", set])["constraint"].clone();
    let shots = result["shots"].as_array().unwrap();
    assert_eq!((shots.len(), shots[0]["policy"].as_str()), (1, Some("safety-2")), "{result}");
    assert_eq!((&result["policy"], &result["verdict"]), (&json!("safety-2"), &json!("not met")));
    says(
        result["reason"].as_str().unwrap(),
        &["the strongest policy of the step, safety-2, has λ = 0.25", "smaller β/λ"],
    );
    let page = fs::read_to_string(Path::new(&out(&folder)).join("summary.md")).unwrap();
    says(&page, &["## Constraint", "not met. The policy safety-2"]);
}

#[test]
fn a_threshold_beyond_all_answers_has_no_lambda() {
    let folder = folder();
    let result = constraint(&folder, &safe(2.0, "realise = \"mix\""));
    assert_eq!((&result["policy"], &result["verdict"]), (&Value::Null, &json!("undecided")));
    says(result["reason"].as_str().unwrap(), &["no λ meets the constraint with these answers"]);
    let page = fs::read_to_string(Path::new(&out(&folder)).join("summary.md")).unwrap();
    says(&page, &["## Constraint", "undecided, no policy was made for it"]);
}

#[test]
fn prompts_that_were_trained_on_certify_nothing() {
    let folder = folder();
    let recipe_of = recipe(&folder, &safe(-1.0, ""));
    let data = |name: &str| fs::read_to_string(quickstart().join("data").join(name)).unwrap();
    let both = file(&folder, "both.jsonl", data("held_out_prompts.jsonl") + &data("prompts.jsonl"));
    // λ is chosen from all of the second part; and where it is not, the steps train on 310 of its prompts
    let held_out = format!("constraint.1.held_out_prompts={both}");
    let told = done(&["run", &recipe_of, "--set", &held_out, "--set", "constraint.1.max_prompts=500"]).stderr;
    says(
        &told,
        &["384 of 480 prompts are left out of the certificate", "answers of helpfulness to each of 96 prompts"],
    );
    let choose = format!("constraint.1.prompts={}", text(&quickstart().join("data/held_out_prompts.jsonl")));
    let told = done(&["run", &recipe_of, "--set", &held_out, "--set", &choose]).stderr;
    says(&told, &["406 of 480 prompts are left out of the certificate"]);

    // nor do rows by which weights were chosen
    let rest = safe(-1.0, "").lines().filter(|line| !line.starts_with("held_out")).collect::<Vec<_>>().join("\n");
    let other = tempfile::tempdir().unwrap();
    let stopped = ["run", &recipe(&other, &rest), "--set", "train.validate_every=4", "--set", "train.patience=3"]
        .map(str::to_owned);
    says(&fails(2, &stopped), &["chooses its weights by the held-out rows", "constraint.held_out_prompts"]);
}

#[test]
fn labels_do_not_depend_on_where_a_row_stands() {
    let [whole, folder] = [folder(), folder()];
    let data = fs::read_to_string(quickstart().join("data/helpfulness.jsonl")).unwrap();
    let path = at(&whole, "rows.jsonl");
    let rest = format!(
        "[[step]]\nname = \"joint\"\nmetric = \"both\"\nfrom = \"base\"\nbeta = 0.5\ndata = {path:?}\nskip_bad_rows = true\n\
         relabel = {{ reward = 1.0, safety = 0.5 }}\n"
    );
    fs::write(&path, &data).unwrap();
    let provenance = |folder| {
        done(&["run", &recipe(folder, &rest)]);
        read_json(step_of(folder, "joint", "checkpoint/provenance.json"))
    };
    let first = provenance(&whole);
    let (one, others) = data.split_once('\n').unwrap();
    fs::write(&path, format!("{one}\n{{}}\n{others}")).unwrap();
    assert_eq!(provenance(&folder)["model"], first["model"]);
}

#[test]
fn a_folder_is_no_longer_the_finished_run_of_another_recipe() {
    let folder = folder();
    let [first, second] = [recipe(&folder, &safe(-1.0, "")), "constraint.1.at_least=-0.9".to_owned()];
    let finished = |arguments: &[&str]| done(arguments).stderr.contains("is finished");
    assert!(!finished(&["run", &first]));
    assert!(finished(&["run", &first]));
    assert!(!finished(&["run", &first, "--set", &second]));
    let threshold = |result: Value| result["constraint"]["threshold"].clone();
    assert_eq!(threshold(read_json(Path::new(&out(&folder)).join("results.json"))), json!(-0.9));
    assert!(!finished(&["run", &first]));
    assert_eq!(threshold(json(&["run", &first])), json!(-1.0));
}

#[test]
fn what_is_merged_or_mixed_is_what_was_trained() {
    let folder = folder();
    let plain = recipe(&folder, "");
    done(&["run", &plain]);
    let weights = step_of(&folder, "safety-0.1", "checkpoint/model.safetensors");
    let right = fs::read(&weights).unwrap();
    let mut wrong = right.clone();
    // the lowest bit of the last weight
    let last = wrong.len() - 4;
    wrong[last] ^= 1;
    fs::write(&weights, wrong).unwrap();
    for blend in ["[merge]\nq = 0.5\n", "[mix]\nq = 0.5\n"] {
        let with_blend = recipe(&folder, blend);
        says(&fails(2, &["run", &with_blend]), &["not those of the policy `safety-0.1`", "Put them back"]);
        assert!(!Path::new(&out(&folder)).join("merges/merge-0.5/policy.json").exists());
    }
    fs::write(&weights, right).unwrap();
    let merged = recipe(&folder, "[merge]\nq = 0.5\n");
    assert!(!done(&["run", &merged]).stderr.contains("Policy merge-0.5: complete"));
}

#[test]
fn a_policy_judges_relative_to_the_base_model() {
    let made = quickstart();
    let folder = folder();
    let alone = format!(
        "[[step]]\nname = \"alone\"\nmetric = \"care\"\nfrom = \"base\"\nbeta = 0.5\ndata = {:?}\n\
         [[judge]]\nmetric = \"care\"\npolicy = \"alone\"\n\
         [constraint]\nmetric = \"care\"\nat_least = 0.0\nstep = \"safety\"\nanswers = 16\nmax_prompts = 40\nmax_new_tokens = 24\n",
        text(&made.join("data/safety.jsonl"))
    );
    let result = constraint(&folder, &alone);
    let shots = result["shots"].as_array().unwrap();
    assert!(!shots.is_empty() && result["constraints"][0]["metric"] == "care", "{result}");
    // the prompts are those of the data
    assert!(number(&result["prompts"][0]) == 40.0 && number(&result["prompts"][1]) >= 2.0, "{result}");
}

#[test]
fn lambda_may_be_a_weight_in_labels() {
    let folder = folder();
    let joint = format!(
        "[[step]]\nname = \"joint\"\nmetric = \"both\"\nfrom = \"base\"\nbeta = 0.5\ndata = {:?}\nrelabel = {{ reward = 1.0 }}\n",
        text(&quickstart().join("data/helpfulness.jsonl"))
    );
    let result = constraint(&folder, &(joint + &safe(-0.1, "step = \"joint\"")));
    let shots = result["shots"].as_array().unwrap();
    assert!(!shots.is_empty(), "{result}");
    for shot in shots {
        let (policy, lambda) = (shot["policy"].as_str().unwrap(), number(&shot["lambda"][0]));
        assert_eq!(policy, format!("joint-{lambda}"));
        let provenance = read_json(step_of(&folder, policy, "checkpoint/provenance.json"));
        assert_eq!(provenance["label_weights"], json!({"reward": 1.0, "safety": lambda}));
        assert_eq!(provenance["from"][0]["policy"], "base");
    }
}

#[test]
fn several_constraints_are_a_chain() {
    let folder = folder();
    let third = format!(
        "[[step]]\nname = \"again\"\nmetric = \"reward\"\nfrom = \"safety\"\ndata = {:?}\n{}\
         [[constraint]]\nmetric = \"reward\"\nat_least = 0.45\nstep = \"again\"\n",
        text(&quickstart().join("data/helpfulness.jsonl")),
        safe(-0.25, "shots = 2")
    );
    let result = constraint(&folder, &third);
    let met = result["constraints"].as_array().unwrap();
    assert_eq!(met.iter().map(|met| met["metric"].as_str().unwrap()).collect::<Vec<_>>(), ["safety", "reward"]);
    assert!(!result["shots"].as_array().unwrap().is_empty(), "{result}");
    for shot in result["shots"].as_array().unwrap() {
        let policy = shot["policy"].as_str().unwrap();
        let lambda: Vec<f64> = shot["lambda"].as_array().unwrap().iter().map(number).collect();
        assert_eq!(lambda.len(), 2);
        assert_eq!(policy.contains("again"), lambda[1] > 0.0, "{shot}");
        if lambda.iter().all(|lambda| *lambda > 0.0) {
            let provenance = read_json(step_of(&folder, policy, "checkpoint/provenance.json"));
            assert_eq!(provenance["from"][0]["step"], "safety");
        }
    }
}

#[test]
fn a_run_is_finished_as_long_as_its_prompts_are_the_same() {
    let folder = folder();
    let prompts = at(&folder, "prompts.jsonl");
    fs::copy(quickstart().join("data/prompts.jsonl"), &prompts).unwrap();
    let recipe = recipe(&folder, &safe(-1.0, ""));
    let arguments =
        ["run", &recipe, "--set", &format!("constraint.1.prompts={}", at(&folder, "pro*.jsonl"))].map(str::to_owned);
    let dry: Vec<String> = arguments.iter().cloned().chain(["--dry-run".into()]).collect();
    let state = |forecast: &Value| forecast["stages"].as_array().unwrap().last().unwrap()["state"].clone();
    assert_eq!(state(&json(&dry)), "open");
    done(&arguments);
    assert_eq!(state(&json(&dry)), "complete");
    says(&done(&arguments).stderr, &["is finished"]);
    let lines = fs::read_to_string(&prompts).unwrap();
    fs::write(&prompts, lines.lines().skip(30).map(|line| format!("{line}\n")).collect::<String>()).unwrap();
    assert_eq!(state(&json(&dry)), "open");
    assert!(!done(&arguments).stderr.contains("is finished"));
}

#[test]
fn too_few_answers_to_reach_lambda_are_told() {
    let folder = folder();
    let recipe = recipe(&folder, &safe(0.02, "shots = 1").replace("answers = 24", "answers = 16"));
    says(&done(&["run", &recipe]).stderr, &["16 answers are worth only", "they reach to λ = ", "Draw more answers"]);
}

#[test]
fn answers_that_were_cut_are_told() {
    let folder = folder();
    let result = constraint(&folder, &safe(-0.2, "").replace("max_new_tokens = 24", "max_new_tokens = 4"));
    assert!(number(&result["unfinished"]) > 0.5, "{result}");
    let page = fs::read_to_string(Path::new(&out(&folder)).join("summary.md")).unwrap();
    says(&page, &["% of its answers were cut before their end", "constraint.max_new_tokens"]);
    let whole = constraint(&common::folder(), &safe(-1.0, ""));
    assert!(number(&whole["unfinished"]) < 0.2, "{whole}");
}

#[test]
fn bad_prompts_are_named() {
    let folder = folder();
    let one = file(&folder, "one.jsonl", "{\"prompt\": \"how do i\"}\n{\"prompt\": \"how do i\"}\n");
    let with = |setting: &str| fails(2, &["run", &recipe(&folder, &safe(0.0, "")), "--set", setting]);
    says(
        &with(&format!("constraint.1.prompts={one}")),
        &["1 different prompts to choose λ from", "constraint.prompts"],
    );
    let prompts = text(&quickstart().join("data/prompts.jsonl"));
    says(&with(&format!("constraint.1.held_out_prompts={prompts}")), &["nothing is held out", "prompts.jsonl"]);
    says(&with("constraint.1.prompts=nowhere.jsonl"), &["nowhere.jsonl"]);
    let recipe_of_one =
        ["run", &recipe(&folder, &safe(0.0, "")), "--set", &format!("constraint.1.prompts={one}"), "--dry-run"]
            .map(str::to_owned);
    says(&fails(2, &recipe_of_one), &["1 different prompts to choose λ from"]);
    assert!(!Path::new(&out(&folder)).join("steps").exists(), "trained before the prompts were read");
    // prompts that are none of the world's, judged by it
    let world = World::new(1);
    let foreign: Vec<Value> =
        world.train_prompts[..4].iter().map(|p| json!({"prompt": format!("{} {}", p.text, p.text)})).collect();
    let foreign = file(&folder, "foreign.jsonl", json_lines(&foreign).unwrap());
    says(&with(&format!("constraint.1.prompts={foreign}")), &["none of the quickstart world's"]);
}

fn step_of(folder: &tempfile::TempDir, policy: &str, name: &str) -> PathBuf {
    Path::new(&out(folder)).join("steps").join(policy).join(name)
}

#[cfg(unix)]
#[test]
fn a_run_killed_ten_times_ends_as_one_that_was_not() {
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    let rest = format!(
        "{}[[merge]]\nq = [0.25, 0.75]\n[[merge]]\nname = \"ties\"\nmethod = \"dare-ties\"\ndensity = 0.5\nq = 0.5\n[mix]\nq = 0.5\n\
         [evaluate]\nprompts = [\"how do i\"]\nmax_new_tokens = 8\n",
        safe(-0.2, "shots = 3")
    );
    let [whole, folder] = [folder(), folder()];
    let start = Instant::now();
    let expected = json(&["run", &recipe(&whole, &rest)]);
    // each of the ten is killed, on average, after a tenth of the whole
    let longest = start.elapsed().as_secs_f64() / 5.0;
    let recipe = recipe(&folder, &rest);
    let mut random = 0x9E37_79B9_7F4A_7C15_u64;
    for _ in 0..10 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let share = (random >> 33) as f64 / (1u64 << 31) as f64;
        let mut child =
            Command::new(SACPO).args(["run", &recipe]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_secs_f64(share * longest));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let result = json(&["run", &recipe]);
    assert_eq!(result["constraint"], expected["constraint"]);
    let names = |result: &Value| -> Vec<Value> {
        result["policies"].as_array().unwrap().iter().map(|policy| policy["name"].clone()).collect()
    };
    assert_eq!(names(&result), names(&expected));
    assert!(weights(out(&folder)) == weights(out(&whole)));
    let files = |folder| files(out(folder)).into_keys().collect::<Vec<_>>();
    assert_eq!(files(&folder), files(&whole), "something was left behind");
    let answers = |folder| {
        let mut files = common::files(out(folder));
        files.retain(|path, _| path.starts_with("answers"));
        files
    };
    assert!(answers(&folder).len() > 5 && answers(&folder) == answers(&whole));
    let read =
        |folder| fs::read_to_string(Path::new(&out(folder)).join("recipe.toml")).unwrap().replace(&out(folder), "RUN");
    assert_eq!(read(&folder), read(&whole));
}
