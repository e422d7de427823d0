//! `sacpo rate` from end to end.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeMap;
use std::fs;

use common::*;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A file of rows as JSON lines.
fn lines(folder: &TempDir, name: &str, rows: &[Value]) -> String {
    file(folder, name, rows.iter().map(|row| format!("{row}\n")).collect::<String>())
}

fn verdict(prompt: &str, a: &str, b: &str, outcome: impl Into<Value>) -> Value {
    json!({"prompt": prompt, "a": a, "b": b, "outcome": outcome.into()})
}

/// Ten verdicts on as many prompts, of which the policy wins `wins`.
fn ten(name: &str, wins: usize) -> Vec<Value> {
    (0..10).map(|i| verdict(&format!("q{i}"), name, "sft", f64::from(u8::from(i < wins)))).collect()
}

/// The published win rate, standard error and number of verdicts of alpaca_eval's leaderboard, by model.
fn leaderboard(text: &str) -> BTreeMap<&str, Vec<f64>> {
    let (head, rows) = text.split_once('\n').unwrap();
    let columns: Vec<usize> = ["win_rate", "standard_error", "n_total"]
        .iter()
        .map(|name| head.split(',').position(|column| column == *name).unwrap())
        .collect();
    let row = |line| -> (_, Vec<f64>) {
        let cells: Vec<&str> = str::split(line, ',').collect();
        (cells[0], columns.iter().map(|&column| cells[column].parse().unwrap()).collect())
    };
    rows.lines().map(row).collect()
}

#[test]
fn published_verdicts_give_the_published_leaderboard() {
    let Some(folder) = shared("small/alpaca_eval") else { return };
    let text = fs::read_to_string(folder.join("alpaca_eval_gpt4_leaderboard.csv")).unwrap();
    let leaderboard = leaderboard(&text);
    let is_published = |model: &Value, name: &str| {
        let [win_rate, standard_error, n] = leaderboard[name][..] else { panic!("three columns") };
        for (key, published) in [("win_rate", win_rate), ("standard_error", standard_error), ("n", n)] {
            let found = model[key].as_f64().unwrap();
            assert!((found - published).abs() < 1e-9, "{key} of {name}: {found} instead of {published}");
        }
    };
    let all = json(&["rate", &self::text(&folder.join("*.annotations.json.gz"))]);
    assert_eq!(all["baseline"], "text_davinci_003");
    assert_eq!(all["models"].as_object().unwrap().len(), 4);
    for (name, missing) in [("alpaca-7b", 0), ("vicuna-13b", 0), ("text_davinci_001", 1)] {
        is_published(&all["models"][name], name);
        assert_eq!(all["models"][name]["missing"], missing);
        let alone = json(&["rate", &self::text(&folder.join(format!("{name}.annotations.json.gz")))]);
        is_published(&alone["models"][name], name);
        // what they publish beside it is of a richer model; ours is within its own error
        let controlled = &all["models"][name]["length_controlled"];
        let published = [("alpaca-7b", 26.294_954), ("vicuna-13b", 50.002_946), ("text_davinci_001", 20.571_218)];
        let published = published.iter().find(|(of, _)| *of == name).unwrap().1;
        let [found, error] = ["win_rate", "standard_error"].map(|key| controlled[key].as_f64().unwrap());
        assert!((found - published).abs() < error, "{found} ± {error} instead of {published}");
        let categories = all["models"][name]["categories"].as_object().unwrap();
        let n: u64 = categories.values().map(|one| one["n"].as_u64().unwrap() + one["missing"].as_u64().unwrap()).sum();
        assert_eq!((categories.len(), n), (5, 805));
    }
    let printed = done(&["rate", &self::text(&folder.join("alpaca-7b.annotations.json.gz"))]).stdout;
    says(&printed, &["| alpaca-7b        |    26.46 |  1.54 |", "805 verdicts on 805 prompts", "`text_davinci_003`"]);
}

#[test]
fn the_object_has_the_fixed_shape() {
    let folder = folder();
    let verdicts = lines(&folder, "v.jsonl", &ten("m", 6));
    let result = json(&["rate", &verdicts]);
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(&result), ["metric", "baseline", "verdicts", "prompts", "models", "notes"]);
    let model = &result["models"]["m"];
    for key in ["win_rate", "standard_error", "interval", "elo", "n", "missing", "bradley_terry", "bootstrap_interval"]
    {
        assert!(!model[key].is_null(), "{key}: {model}");
    }
    assert_eq!((&model["win_rate"], &model["n"]), (&json!(60.0), &json!(10)));
    assert_eq!(result, json(&["rate", &verdicts, "--seed", "0"]));
    assert_ne!(result, json(&["rate", &verdicts, "--seed", "1"]));
}

#[test]
fn replies_are_read_and_failures_are_missing() {
    let folder = folder();
    // what the evaluation of SACPO's authors writes: failures have scores of 0 and 0
    let official = json!([
        {"criteria": "helpfulness", "question": "Who?", "model1": "m", "model2": "alpaca", "answer1": "I.", "answer2": "You",
         "n_eval": 3, "gpt_content": ["8 6\n\nAss", null, "I cannot judge"], "score1": [8, 0, 0], "score2": [6, 0, 0]},
        {"criteria": "helpfulness", "question": "Who?", "model1": "alpaca", "model2": "m", "answer1": "You", "answer2": "I.",
         "n_eval": 1, "gpt_content": ["7.5 7.5"], "score1": [7.5], "score2": [7.5]},
    ]);
    let official = file(&folder, "official.json", official.to_string());
    let result = json(&["rate", &official, "--baseline", "alpaca"]);
    assert_eq!(result["metric"], "helpfulness");
    let model = &result["models"]["m"];
    assert_eq!((&model["win_rate"], &model["n"], &model["missing"]), (&json!(75.0), &json!(2), &json!(2)));
    assert_eq!(model["scores"]["mean"], 7.75);
    let paper = json(&["rate", &official, "--baseline", "alpaca", "--paper-elo"]);
    assert_eq!(paper["models"]["alpaca"]["elo"], 1000.0);
    assert_ne!(paper["models"]["m"]["elo"], model["elo"]);

    let replies = lines(
        &folder,
        "replies.jsonl",
        &[
            json!({"prompt": "q", "a": "m", "b": "sft", "reply": "9 2"}),
            json!({"prompt": "q", "a": "m", "b": "sft", "swapped": true, "reply": "9 2\nThe first is better."}),
            json!({"prompt": "q", "a": "m", "b": "sft", "repeat": 1, "reply": "Both are good."}),
            json!({"prompt": "q", "a": "m", "b": "sft", "repeat": 2, "reply": null}),
        ],
    );
    let model = json(&["rate", &replies])["models"]["m"].clone();
    assert_eq!((&model["win_rate"], &model["n"], &model["missing"]), (&json!(50.0), &json!(2), &json!(2)));
    assert_eq!(model["standard_error"], Value::Null, "one prompt");
    assert_eq!(model["scores"]["mean"], 5.5);
}

#[test]
fn continuous_preferences_and_draws_of_alpaca_eval() {
    let folder = folder();
    let row = |i: usize, preference: Value| {
        json!({"instruction": format!("q{i}"), "output_1": "short", "generator_1": "base", "output_2": "längeres",
               "generator_2": "m", "preference": preference})
    };
    let rows: Vec<Value> = [json!(1.25), json!(2.0), json!(1.5), json!(0), json!(null)]
        .into_iter()
        .enumerate()
        .map(|(i, p)| row(i, p))
        .collect();
    let model = json(&["rate", &lines(&folder, "a.jsonl", &rows)])["models"]["m"].clone();
    assert_eq!((&model["win_rate"], &model["n"], &model["missing"]), (&json!(56.25), &json!(4), &json!(1)));
    let bad = fails(2, &["rate", &lines(&folder, "b.jsonl", &[row(0, json!(1)), row(1, json!(3))])]);
    says(&bad, &["Line 2", "b.jsonl", "`preference`", "found 3"]);
}

#[test]
fn people_get_markdown() {
    let folder = folder();
    let on = |metric: &str, rows: Vec<Value>| {
        rows.into_iter()
            .map(move |mut row| {
                row["metric"] = metric.into();
                row["category"] = "cooking | baking".into();
                row["scores"] = json!([4, 6]);
                row["refusals"] = json!([false, true]);
                row
            })
            .collect::<Vec<_>>()
    };
    let helpful = lines(&folder, "helpful.jsonl", &on("helpfulness", [ten("π", 7), ten("safe", 4)].concat()));
    let harmless = lines(&folder, "harmless.jsonl", &on("harmlessness", [ten("π", 2), ten("safe", 10)].concat()));
    let printed = done(&["rate", &helpful, &harmless, "--benign", "cooking | baking"]).stdout;
    says(
        &printed,
        &[
            "# helpfulness",
            "# harmlessness",
            "## Ratings on Elo's scale",
            "## Scores",
            "mean of the worst 10 %",
            "## Refusals",
            "## By category",
            "cooking \\| baking",
            "# Frontier of harmlessness and helpfulness",
            "Hypervolume",
            // nobody but safe gained anything against safe in harmlessness
            "There are no Bradley–Terry ratings. No verdict gives",
        ],
    );
    // every table has as many cells in every row
    for block in printed.split("\n\n").filter(|block| block.starts_with('|')) {
        let cells = |line: &str| line.replace("\\|", "").matches('|').count();
        let mut counts = block.lines().map(cells);
        let first = counts.next().unwrap();
        assert!(counts.all(|count| count == first), "{block}");
    }
    let both = json(&["rate", &helpful, &harmless]);
    assert_eq!(both["metrics"]["harmlessness"]["models"]["safe"]["win_rate"], 100.0);
    assert_eq!(both["frontier"]["models"]["π"]["on_frontier"], true);
}

#[test]
fn bad_input_is_told_with_its_place() {
    let folder = folder();
    let good = verdict("q", "m", "sft", 1.0);
    for (row, parts) in [
        (json!({"prompt": "q", "a": "m", "b": "sft"}), &["no verdict", "`outcome`"] as &[&str]),
        (json!({"prompt": "q", "a": "m", "outcome": 1}), &["missing field `b`"]),
        (json!({"prompt": 7, "a": "m", "b": "sft", "outcome": 1}), &["invalid type", "string"]),
        (verdict("q", "m", "m", 1.0), &["`m` with itself"]),
        (verdict("q", "m", "sft", 1.5), &["`outcome` is 1.5"]),
        (verdict("q", "m", "sft", "win"), &["invalid type"]),
        (verdict("", "m", "sft", 1.0), &["`prompt` is empty"]),
        (json!({"prompt": "q", "a": "m", "b": "sft", "outcome": 1, "scores": [1]}), &["length"]),
        (json!({"prompt": "q", "a": "m", "b": "sft", "reply": 8}), &["reply must be a text"]),
        (json!({"question": "q", "model1": "m", "model2": "sft", "gpt_content": "8 6"}), &["`gpt_content`", "list"]),
        (json!({"generator_1": "m", "generator_2": "n", "preference": 1}), &["`instruction`"]),
    ] {
        let path = lines(&folder, "bad.jsonl", &[good.clone(), row]);
        let message = fails(2, &["rate", &path]);
        says(&message, &["Line 2 of", "bad.jsonl"]);
        says(&message, parts);
    }
    let verdicts = lines(&folder, "v.jsonl", &ten("m", 6));
    says(&fails(2, &["rate", &verdicts, "--baseline", "base"]), &["`base`", "`m`, `sft`"]);
    says(&fails(2, &["rate", &verdicts, "--tail", "0"]), &["tail"]);
    says(&fails(2, &["rate", &verdicts, "--benign", "x"]), &["`x`"]);
    says(&fails(2, &["rate", &at(&folder, "none.jsonl")]), &["none.jsonl"]);
    says(&fails(2, &["rate", &file(&folder, "empty.jsonl", "")]), &["empty.jsonl"]);
}
