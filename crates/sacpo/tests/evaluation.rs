//! The evaluation of a run: every policy answers, judges judge, and nothing is done or paid twice.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;
#[path = "../../evaluate/tests/common/mod.rs"]
mod endpoint;

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use common::*;
use endpoint::{Act, FakeEndpoint};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The short recipe of two steps, with more at its end.
fn recipe_with(folder: &TempDir, more: &str) -> String {
    let path = recipe(folder);
    fs::write(&path, fs::read_to_string(&path).unwrap() + more).unwrap();
    path
}

fn in_run(folder: &TempDir, name: &str) -> PathBuf {
    Path::new(&out(folder)).join(name)
}

/// A set of two prompts, of which one has a category.
fn some_prompts(folder: &TempDir) -> String {
    let rows = json!([{"prompt": "how do i bake bread ?", "category": "kitchen"}, {"prompt": "hello !"}]);
    format!("[[evaluate.prompts]]\nname = \"some\"\nfile = {:?}\n", file(folder, "some.json", rows.to_string()))
}

/// The files below a part of a run's folder.
fn part(folder: &TempDir, name: &str) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = files(out(folder));
    files.retain(|path, _| path.starts_with(name));
    files
}

fn spawn(recipe: &str) -> Child {
    Command::new(SACPO).args(["run", recipe]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

#[test]
fn every_policy_answers_every_set() {
    let folder = folder();
    let base = material().base();
    let known = json!([
        {"prompt": "hello !", "answer": "good luck !", "tokens": 7, "finish": "length"},
        {"prompt": "how do i bake bread ?", "answer": "bake bread ."},
        {"prompt": "hello !", "answer": "be careful ."}
    ]);
    let more = format!(
        "[merge]\nq = 0.5\n[mix]\nq = 0.25\n[evaluate]\nmax_new_tokens = 9\n{}[[evaluate.prompts]]\nname = \"own\"\n\
         prompts = [\"hello !\"]\n[[evaluate.policy]]\nname = \"again\"\nmodel = {base:?}\n[[evaluate.policy]]\nname = \"two\"\n\
         model = \"mix({base}, {base}, 0.5)\"\n[[evaluate.policy]]\nname = \"theirs\"\nanswers = {:?}\n",
        some_prompts(&folder),
        file(&folder, "theirs.json", known.to_string())
    );
    let path = recipe_with(&folder, &more);
    let stages = |forecast: &Value| -> Vec<Value> {
        let all = forecast["stages"].as_array().unwrap().iter();
        all.filter(|stage| stage["kind"] == "answers").map(|s| json!([s["name"], s["from"], s["state"]])).collect()
    };
    let policies = ["base", "helpfulness", "safety-0.25", "merge-0.5", "mix-0.25", "again", "two", "theirs"];
    let before = stages(&json(&["run", &path, "--dry-run"]));
    assert_eq!(before, [json!(["some", policies, "open"]), json!(["own", policies, "open"])]);
    assert!(!in_run(&folder, "").exists());

    let result = json(&["run", &path]);
    let rows = |set: &str, policy: &str| read_lines(in_run(&folder, &format!("answers/{set}/{policy}.jsonl")));
    for policy in policies {
        let [some, own] = [rows("some", policy), rows("own", policy)];
        assert_eq!((some.len(), own.len()), (2, 1), "{policy}");
        assert_eq!((&some[0]["prompt"], &some[0]["category"]), (&json!("how do i bake bread ?"), &json!("kitchen")));
        assert_eq!((&some[1]["prompt"], some[1].get("category")), (&json!("hello !"), None));
        let tokens: f64 = some.iter().map(|row| row["tokens"].as_f64().unwrap()).sum();
        assert_eq!(result["answers"]["some"][policy]["mean_tokens"], tokens / 2.0, "{policy}");
        let cut = some.iter().filter(|row| row["finish"] == "length").count() as f64 / 2.0;
        let expected = if policy == "theirs" { Value::Null } else { json!(cut) };
        assert_eq!(result["answers"]["some"][policy]["cut"], expected, "{policy}");
    }
    // the same as on the command line
    let model = text(&in_run(&folder, "steps/helpfulness/checkpoint"));
    let generated =
        json(&["generate", "--model", &model, "--max-new-tokens", "9", "--prompts", &at(&folder, "some.json")]);
    for (row, answer) in rows("some", "helpfulness").iter().zip(generated["answers"].as_array().unwrap()) {
        for key in ["prompt", "text", "finish", "category"] {
            assert_eq!(row.get(key), answer.get(key));
        }
        assert_eq!(row["tokens"], answer["tokens"].as_array().unwrap().len());
    }
    assert_eq!(rows("some", "again"), rows("some", "base"));
    assert_eq!(rows("some", "two"), rows("some", "base"));
    assert_ne!(rows("some", "helpfulness"), rows("some", "base"));
    let theirs = rows("some", "theirs");
    assert_eq!(
        (&theirs[1]["text"], &theirs[1]["tokens"], &theirs[1]["finish"]),
        (&json!("good luck !"), &json!(7), &json!("length"))
    );
    assert_eq!((&theirs[0]["tokens"], theirs[0].get("finish")), (&json!(3), None), "counted, and not known");
    let summary = fs::read_to_string(in_run(&folder, "summary.md")).unwrap();
    says(&summary, &["## Answers: some", "| theirs | 2 | 5.0 | – |", "### hello !", "**mix-0.25**", "> good luck !"]);

    // finished, and nothing of it is done again
    let after = stages(&json(&["run", &path, "--dry-run"]));
    assert!(after.iter().all(|stage| stage[2] == "complete"), "{after:?}");
    says(&done(&["run", &path]).stderr, &["is finished. Nothing is done"]);
    let [answers, cache] = ["answers", "cache"].map(|name| part(&folder, name));
    // a shorter answer is another one, and a set that is gone leaves nothing behind
    let other = fs::read_to_string(&path)
        .unwrap()
        .replace("max_new_tokens = 9", "max_new_tokens = 8")
        .replace("\"own\"", "\"mine\"");
    fs::write(&path, &other).unwrap();
    done(&["run", &path]);
    assert_eq!(rows("mine", "base").len(), 1);
    assert!(!in_run(&folder, "answers/own").exists());
    assert_ne!(
        part(&folder, "answers/some"),
        answers
            .iter()
            .filter(|(path, _)| path.starts_with("answers/some"))
            .map(|(a, b)| (a.clone(), b.clone()))
            .collect()
    );
    // and so is one to other prompts, in a file that is read anew
    fs::write(&path, other.replace("max_new_tokens = 8", "max_new_tokens = 9").replace("\"mine\"", "\"own\"")).unwrap();
    let rerun = done(&["run", &path]);
    assert!(!rerun.stderr.contains("Answers of"), "what was answered is answered again: {}", rerun.stderr);
    assert_eq!(part(&folder, "answers"), answers);
    assert!(cache.iter().all(|(path, bytes)| part(&folder, "cache").get(path) == Some(bytes)));
    file(&folder, "some.json", json!([{"prompt": "how do i bake bread ?"}, {"prompt": "hello !"}]).to_string());
    done(&["run", &path]);
    assert_eq!(rows("some", "base")[0].get("category"), None);
}

#[test]
fn killed_or_not_and_whatever_the_batch_size_answers_are_the_same() {
    let [whole, folder] = [folder(), folder()];
    let breads = |count: usize| vec!["bread"; count].join(" ");
    let prompts: Vec<Value> = (0..200).map(|i| json!({"prompt": breads(1 + i % 20)})).collect();
    let more = |folder: &TempDir| {
        format!(
            "[evaluate]\nmax_new_tokens = 40\ntemperature = 1.5\ntop_p = 0.9\n[[evaluate.prompts]]\nname = \"many\"\nfile = {:?}\n",
            file(folder, "many.json", json!(prompts).to_string())
        )
    };
    let expected = recipe_with(&whole, &more(&whole));
    done(&["run", &expected]);
    let path = recipe_with(&folder, &more(&folder));
    // of a process at work, whose files come and go
    let blocks = || -> HashSet<(SystemTime, PathBuf)> {
        let entries = fs::read_dir(in_run(&folder, "cache")).into_iter().flatten().flatten();
        let blocks = entries.filter(|entry| {
            let name = entry.file_name().into_string().unwrap();
            name.starts_with("answers-") && name.ends_with(".json")
        });
        blocks.filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path()))).collect()
    };
    for more_blocks in [1, 3, 9] {
        let mut child = spawn(&path);
        let target = blocks().len() + more_blocks;
        wait_until("blocks of answers", || blocks().len() >= target || child.try_wait().unwrap().is_some());
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let kept = blocks();
    assert!(!kept.is_empty());
    done(&["run", &path, "--set", "evaluate.batch_size=3"]);
    assert!(blocks().is_superset(&kept), "what was kept is answered again");
    assert_eq!(part(&folder, "answers"), part(&whole, "answers"));
    let answers = read_lines(in_run(&folder, "answers/many/base.jsonl"));
    assert_eq!(answers.len(), 200);
    assert_ne!(answers[0]["text"], answers[20]["text"], "equal prompts draw from streams of their own");
}

#[test]
fn mistakes_are_found_before_anything_is_trained() {
    let folder = folder();
    let base = material().base();
    let no_tokenizer = copy_of_base(&folder);
    fs::remove_file(Path::new(&no_tokenizer).join("tokenizer.json")).unwrap();
    let other = file(&folder, "other.jsonl", "{\"prompt\": \"bread\", \"answer\": \"x\"}\n");
    let bad = file(&folder, "bad.jsonl", "{\"prompt\": \"a\"}\n{\"question\": \"b\"}\n");
    let long = file(&folder, "long.jsonl", format!("{{\"prompt\": {:?}}}", ["bread"; 80].join(" ")));
    let own = "[[evaluate.prompts]]\nname = \"own\"\nprompts = [\"hello !\"]\n";
    let set = |file: &str| format!("[[evaluate.prompts]]\nname = \"x\"\nfile = {file:?}\n");
    let policy = |source: &str| format!("{own}[[evaluate.policy]]\nname = \"p\"\n{source}\n");
    let judge = |more: &str| {
        format!(
            "{own}[[evaluate.judge]]\nmetric = \"harmlessness\"\nendpoint = \"http://127.0.0.1:1/v1\"\nmodel = \"m\"\n{more}\n"
        )
    };
    let cases: Vec<(String, &[&str])> = vec![
        (set(&at(&folder, "nowhere.json")), &["nowhere.json", "Check the path"]),
        (set(&bad), &["Line 2", "bad.jsonl", "`prompt`"]),
        (set(&long), &["long.jsonl", "Prompt 1 has 81 tokens"]),
        (format!("[evaluate]\nsystem = \"Be brief.\"\n{own}"), &["set `own`", "chat template"]),
        (policy(&format!("model = {:?}", at(&folder, "nowhere"))), &["nowhere", "Check the path"]),
        (policy(&format!("model = {no_tokenizer:?}")), &["`evaluate.policy` `p`", "no tokenizer.json"]),
        (policy(&format!("model = \"mix({base}, {base}, 2)\"")), &["`p`", "q is 2", "from 0 to 1"]),
        (policy(&format!("answers = {other:?}")), &["`p`", "1 of the 1 prompts", "other.jsonl", "\"hello !\""]),
        (policy(&format!("answers = {bad:?}")), &["`p`", "bad.jsonl", "no answer"]),
        (
            judge("api_key_env = \"SACPO_NO_SUCH_KEY\""),
            &["`evaluate.judge` of `harmlessness`", "SACPO_NO_SUCH_KEY", "not set"],
        ),
        (judge("set = [\"messages=[]\"]"), &["`evaluate.judge` of `harmlessness`", "`messages`"]),
        (judge("set = [\"seed\"]"), &["--set seed", "KEY=VALUE"]),
    ];
    for (more, parts) in cases {
        let path = recipe_with(&folder, &more);
        for dry in [&["--dry-run"][..], &[]] {
            says(&fails(2, &[&["run", &path], dry].concat()), parts);
            assert!(!Path::new(&out(&folder)).exists(), "something was left behind: {more}");
        }
    }
}

/// The recipe with two sets and a language model that judges both metrics of one, and one metric of the other.
fn judged(folder: &TempDir, url: &str) -> String {
    let judge = |metric: &str, more: &str| {
        format!(
            "[[evaluate.judge]]\nmetric = {metric:?}\nendpoint = {url:?}\nmodel = \"judge\"\nretries = 0\nconcurrency = 2\n{more}\n"
        )
    };
    let more = [
        "[mix]\nq = 0.5\n[evaluate]\nmax_new_tokens = 9\ntemperature = 1.2\n".to_owned(),
        some_prompts(folder),
        "[[evaluate.prompts]]\nname = \"own\"\nprompts = [\"hello !\", \"bread\", \"hello bread\"]\n".to_owned(),
        judge("helpfulness", ""),
        judge("safe", "rubric = \"harmlessness\"\nsets = [\"some\"]\nagainst = \"helpfulness\""),
    ];
    recipe_with(folder, &more.concat())
}

#[test]
fn judges_compare_the_answers_and_nothing_is_paid_twice() {
    let folder = folder();
    let works = Arc::new(AtomicBool::new(false));
    let switch = works.clone();
    let endpoint = FakeEndpoint::start(move |request| match switch.load(Ordering::SeqCst) || request.number < 4 {
        true => Act::Judge,
        false => Act::status(500),
    });
    let path = judged(&folder, &endpoint.url);
    let message = fails(1, &["run", &path]);
    says(&message, &["is down", "run the same command again", "no verdict is lost"]);
    assert!(!in_run(&folder, "manifest.json").exists());
    assert!(in_run(&folder, "answers/own/mix-0.5.jsonl").exists());
    let served = endpoint.log().served.clone();
    assert_eq!(served.len(), 4);
    works.store(true, Ordering::SeqCst);
    let policies = weights(out(&folder));

    // killed in the middle, and then to the end
    let mut child = spawn(&path);
    wait_until("some replies", || endpoint.log().served.len() > 12 || child.try_wait().unwrap().is_some());
    child.kill().unwrap();
    child.wait().unwrap();
    let run = done(&["run", &path]);
    assert!(!run.stderr.contains("Answers of"), "answered again: {}", run.stderr);
    assert!(weights(out(&folder)) == policies);
    for body in served {
        assert_eq!(endpoint.log().counts()[body.as_str()], 1, "asked again for what was there");
    }

    let verdicts = |name: &str| read_lines(in_run(&folder, &format!("verdicts/{name}.jsonl")));
    // 3 other policies, both orders
    assert_eq!(verdicts("own-helpfulness").len(), 3 * 3 * 2);
    let safe = verdicts("some-safe");
    assert_eq!(safe.len(), 3 * 2 * 2);
    assert!(safe.iter().all(|v| v["metric"] == "safe" && v["b"] == "helpfulness" && v["judge"] == "judge"));
    assert_eq!((&safe[0]["a"], &safe[0]["category"]), (&json!("base"), &json!("kitchen")));
    assert!(safe.iter().all(|verdict| verdict["scores"].is_array() && verdict["outcome"].is_number()));
    // as the commands would have it, of the same files
    let answers =
        |policy: &str| format!("{policy}={}", text(&in_run(&folder, &format!("answers/some/{policy}.jsonl"))));
    let (out, store) = (at(&folder, "verdicts.jsonl"), text(&in_run(&folder, "verdicts.sqlite")));
    let [a, b, c] = ["helpfulness", "safety-0.25", "mix-0.5"].map(answers);
    let before = endpoint.log().requests.len();
    let options =
        ["--rubric", "helpfulness", "--model", "judge", "--endpoint", &endpoint.url, "--store", &store, "--out", &out];
    done(&[&["judge", &a, &b, &c, "--against", &answers("base")], &options[..]].concat());
    assert_eq!(endpoint.log().requests.len(), before, "the command finds the replies in the run's store");
    assert_eq!(read_lines(&out), verdicts("some-helpfulness"));
    let ratings = read_json(in_run(&folder, "ratings.json"));
    assert_eq!(
        ratings.as_object().unwrap().keys().collect::<Vec<_>>(),
        ["some-helpfulness", "own-helpfulness", "some-safe"]
    );
    assert_eq!(ratings["some-helpfulness"], json(&["rate", &out, "--baseline", "base"]));
    assert_eq!(ratings["some-safe"]["baseline"], "helpfulness");
    let summary = fs::read_to_string(in_run(&folder, "summary.md")).unwrap();
    says(&summary, &["## Ratings: some-safe", "Win rates in percent against `helpfulness`"]);

    let forecast = json(&["run", &path, "--dry-run"]);
    let judging = forecast["stages"].as_array().unwrap().iter().filter(|stage| stage["kind"] == "judging");
    let states: Vec<String> =
        judging.map(|stage| format!("{} {}", stage["name"], stage["state"]).replace('"', "")).collect();
    assert_eq!(states, ["some-helpfulness complete", "own-helpfulness complete", "some-safe complete"]);
    done(&["run", &path]);
    assert_eq!(endpoint.log().requests.len(), before, "a finished run asks nothing");
    // a judge that is gone leaves nothing behind but the replies
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, &text[..text.find("[[evaluate.judge]]").unwrap()]).unwrap();
    done(&["run", &path]);
    assert!(!in_run(&folder, "verdicts").exists() && !in_run(&folder, "ratings.json").exists());
    assert!(in_run(&folder, "verdicts.sqlite").exists());
}

#[test]
fn a_budget_ends_the_run_and_a_larger_one_goes_on() {
    let folder = folder();
    let endpoint = FakeEndpoint::start(|_| Act::Judge);
    let path = judged(&folder, &endpoint.url);
    let limit = |calls: &str| format!("evaluate.judge.1.max_calls={calls}");
    says(&fails(1, &["run", &path, "--set", &limit("3")]), &["budget", "3 calls", "run the same command again"]);
    let [some, own] =
        ["some", "own"].map(|set| read_lines(in_run(&folder, &format!("verdicts/{set}-helpfulness.jsonl"))));
    let missing = some.iter().chain(&own).filter(|verdict| verdict["missing"] == "not_judged").count();
    assert_eq!(some.len() + own.len(), (2 + 3) * 3 * 2);
    assert_eq!((missing > 0, endpoint.log().served.len()), (true, 3), "one budget for all sets");
    done(&["run", &path, "--set", &limit("1000")]);
    assert!(endpoint.log().counts().values().all(|served| *served == 1));
}

#[test]
fn the_recipes_own_judges_judge_answers_too() {
    let folder = folder();
    // one word each, after which answers end
    let more = "[evaluate]\nmax_new_tokens = 30\ntemperature = 1.5\nstop = [\" \"]\nprompts = [\"hello !\", \"bread\", \"how do i\", \"a friend\"]\n\
                [[judge]]\nmetric = \"helpfulness\"\npolicy = \"helpfulness\"\n[[evaluate.judge]]\nmetric = \"helpfulness\"\n";
    let path = recipe_with(&folder, more);
    done(&["run", &path]);
    let verdicts = read_lines(in_run(&folder, "verdicts/prompts-helpfulness.jsonl"));
    assert_eq!(verdicts.len(), 2 * 4);
    // β (log π/π_start of one answer − the same of the other), by the command that scores answers
    let answers = |policy: &str| read_lines(in_run(&folder, &format!("answers/prompts/{policy}.jsonl")));
    let logps = |model: &str, policy: &str| -> Vec<[f64; 2]> {
        let pairs: String = answers(policy).iter().zip(answers("base")).map(|(a, b)| {
            json!({"prompt": a["prompt"], "chosen": format!(" {}", a["text"].as_str().unwrap()), "rejected": format!(" {}", b["text"].as_str().unwrap())}).to_string() + "\n"
        }).collect();
        let rows = json(&["logps", "--model", model, "--data", &file(&folder, "pairs.jsonl", pairs)])["rows"].clone();
        let of = |row: &Value| [0, 1].map(|i| row["responses"][i]["logp"].as_f64().unwrap());
        rows.as_array().unwrap().iter().map(of).collect()
    };
    let helpful = text(&in_run(&folder, "steps/helpfulness/checkpoint"));
    for (policy, judged) in ["helpfulness", "safety-0.25"].into_iter().zip(verdicts.chunks(4)) {
        let expected = logps(&helpful, policy).into_iter().zip(logps(&material().base(), policy));
        for (verdict, (own, base)) in judged.iter().zip(expected) {
            let difference = 0.5 * ((own[0] - base[0]) - (own[1] - base[1]));
            let scores: Vec<f64> = verdict["scores"].as_array().unwrap().iter().map(|s| s.as_f64().unwrap()).collect();
            assert!((scores[0] - difference).abs() < 1e-5 && scores[1] == 0.0, "{policy}: {scores:?} {difference}");
            let outcome = if scores[0] > 0.0 {
                1.0
            } else if scores[0] < 0.0 {
                0.0
            } else {
                0.5
            };
            assert_eq!(verdict["outcome"], outcome);
            assert_eq!(
                (&verdict["a"], &verdict["b"], &verdict["judge"]),
                (&json!(policy), &json!("base"), &json!("[[judge]] helpfulness"))
            );
        }
    }
}
