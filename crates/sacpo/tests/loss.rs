//! `sacpo loss`: every objective on given log-probabilities, and every row that it cannot evaluate.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::*;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Losses and gradients by TRL, made for the objectives' own tests.
const FIXTURE: &str = include_str!("../../align/tests/fixtures/objectives.json");

fn write(folder: &TempDir, rows: &[Value]) -> String {
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    file(folder, "rows.jsonl", lines.join("\n"))
}

/// The command line of an objective and its parameters, as the recipe's options name them.
fn arguments(objective: &str, beta: f64, options: &Value, file: &str) -> Vec<String> {
    let mut arguments = vec!["loss".into(), "--objective".into(), objective.into(), "--beta".into(), beta.to_string()];
    for (name, value) in options.as_object().unwrap() {
        let flag = format!("--{}", name.replace('_', "-"));
        match value.as_bool() {
            Some(given) => arguments.extend(given.then_some(flag)),
            None => arguments.extend([flag, value.to_string()]),
        }
    }
    arguments.push(file.into());
    arguments
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

fn assert_all_close(got: &[f64], expected: &[f64], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (got, expected) in got.iter().zip(expected) {
        assert!((got - expected).abs() <= 1e-9, "{what}: {got} is not {expected}");
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Rows of columns of equal length.
fn transposed(columns: &[(&str, &Value)]) -> Vec<Value> {
    (0..columns[0].1.as_array().unwrap().len())
        .map(|i| columns.iter().map(|(name, values)| ((*name).to_owned(), values[i].clone())).collect())
        .collect()
}

#[test]
fn pairs_give_the_losses_and_gradients_of_trl() {
    let folder = folder();
    let fixture: Value = serde_json::from_str(FIXTURE).unwrap();
    let inputs = &fixture["pairs"];
    let columns: Vec<(&str, &Value)> = inputs.as_object().unwrap().iter().map(|(name, v)| (name.as_str(), v)).collect();
    let mut rows = transposed(&columns);
    for row in &mut rows {
        for side in ["chosen", "rejected"] {
            row[format!("safe_{side}")] = json!(!row[format!("unsafe_{side}")].as_bool().unwrap());
        }
    }
    let file = write(&folder, &rows);
    let n = rows.len() as f64;
    for case in fixture["pairwise"].as_array().unwrap() {
        let (name, beta) = (case["objective"].as_str().unwrap(), case["beta"].as_f64().unwrap());
        let got = json(&arguments(name, beta, &case["options"], &file));
        let expected = ["losses", "grad_chosen", "grad_rejected"].map(|key| numbers(&case[key]));
        if name == "sft" {
            // TRL's loss is a mean over tokens
            let sums: Vec<f64> =
                expected[0].iter().zip(numbers(&inputs["len_chosen"])).map(|(loss, len)| loss * len).collect();
            assert_all_close(&numbers(&got["losses"]), &sums, name);
            assert_all_close(&numbers(&got["grad"]["policy"]), &vec![-1.0 / n; rows.len()], name);
            continue;
        }
        assert_all_close(&numbers(&got["losses"]), &expected[0], name);
        assert_all_close(&[got["loss"].as_f64().unwrap()], &[mean(&expected[0])], name);
        let mut keys = vec![("policy_chosen", "grad_chosen"), ("policy_rejected", "grad_rejected")];
        if name == "tdpo" {
            keys.extend([("kl_chosen", "grad_kl_chosen"), ("kl_rejected", "grad_kl_rejected")]);
        }
        assert_eq!(got["grad"].as_object().unwrap().len(), keys.len(), "{name}");
        for (key, expected) in keys {
            let of_mean: Vec<f64> = numbers(&case[expected]).iter().map(|slope| slope / n).collect();
            assert_all_close(&numbers(&got["grad"][key]), &of_mean, name);
        }
        for key in ["rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"] {
            assert!(got["metrics"][key].is_f64(), "{name} {key}");
        }
    }
}

#[test]
fn single_responses_give_the_losses_and_gradients_of_trl() {
    let folder = folder();
    let fixture: Value = serde_json::from_str(FIXTURE).unwrap();
    for case in fixture["unpaired"].as_array().unwrap() {
        let (name, beta) = (case["objective"].as_str().unwrap(), case["beta"].as_f64().unwrap());
        for (number, inputs) in fixture["batches"].as_array().unwrap().iter().enumerate() {
            if name == "bco" && number > 0 {
                // the running mean of one call starts with its file
                break;
            }
            let columns: Vec<(&str, &Value)> =
                inputs.as_object().unwrap().iter().map(|(name, v)| (name.as_str(), v)).collect();
            let file = write(&folder, &transposed(&columns));
            let got = json(&arguments(name, beta, &case["options"], &file));
            let expected = &case["batches"][number];
            let losses = numbers(&expected["losses"]);
            let of_mean: Vec<f64> =
                numbers(&expected["grad"]).iter().map(|slope| slope / losses.len() as f64).collect();
            assert_all_close(&numbers(&got["losses"]), &losses, name);
            assert_all_close(&[got["loss"].as_f64().unwrap()], &[mean(&losses)], name);
            assert_all_close(&numbers(&got["grad"]["policy"]), &of_mean, name);
            let shift = got["metrics"][if name == "kto" { "kl" } else { "delta" }].as_f64().unwrap();
            assert_all_close(&[shift], &[expected["shift"].as_f64().unwrap()], name);
            // a class without examples has no mean
            let desirable: Vec<bool> = inputs["desirable"].as_array().unwrap().iter().map(|v| v == true).collect();
            assert_eq!(got["metrics"]["rewards/chosen"].is_f64(), desirable.contains(&true));
            assert_eq!(got["metrics"]["rewards/rejected"].is_f64(), desirable.contains(&false));
        }
    }
}

fn pair() -> Value {
    json!({
        "policy_chosen": -4.0, "policy_rejected": -6.0, "ref_chosen": -5.0, "ref_rejected": -5.5,
        "len_chosen": 3, "len_rejected": 4, "safe_chosen": false, "safe_rejected": true, "margin": 0.25,
        "kl_chosen": 0.5, "kl_rejected": 1.0, "policy_kl": -9.0, "ref_kl": -9.5
    })
}

fn single() -> Value {
    json!({"policy": -4.0, "ref": -5.0, "len": 3, "desirable": true, "policy_kl": -9.0, "ref_kl": -9.5})
}

/// A row without some of its columns.
fn without(mut row: Value, columns: &[&str]) -> Value {
    columns.iter().for_each(|column| drop(row.as_object_mut().unwrap().remove(*column)));
    row
}

fn of(name: &str, file: &str) -> Vec<String> {
    arguments(name, 0.1, &json!({}), file)
}

#[test]
fn the_metrics_are_those_of_the_trainer() {
    let folder = folder();
    let mut second = pair();
    second["policy_chosen"] = json!(-7.0);
    let got = json(&of("dpo", &write(&folder, &[pair(), second])));
    let metrics = |key: &str| got["metrics"][key].as_f64().unwrap();
    assert_all_close(&[metrics("rewards/chosen"), metrics("rewards/rejected")], &[-0.05, -0.05], "rewards");
    assert_all_close(&[metrics("rewards/margins"), metrics("rewards/accuracies")], &[0.0, 0.5], "margins");
    assert_all_close(&[metrics("logps/chosen"), metrics("logps/rejected")], &[-5.5, -6.0], "log-probabilities");
}

#[test]
fn a_column_is_needed_only_where_the_objective_reads_it() {
    let folder = folder();
    let references = ["ref_chosen", "ref_rejected"];
    let lengths = ["len_chosen", "len_rejected"];
    let rest = ["safe_chosen", "safe_rejected", "margin", "kl_chosen", "kl_rejected", "policy_kl", "ref_kl"];
    for name in ["dpo", "robust-dpo", "hinge", "nca", "exo", "sppo", "apo-zero", "apo-down", "bco"] {
        done(&of(name, &write(&folder, &[without(pair(), &[&lengths[..], &rest].concat())])));
        for column in references {
            let message = fails(2, &of(name, &write(&folder, &[pair(), without(pair(), &[column])])));
            says(&message, &["Line 2 of", "rows.jsonl", column, "missing", name, "under the reference"]);
        }
    }
    for name in ["simpo", "orpo", "cpo"] {
        done(&of(name, &write(&folder, &[without(pair(), &[&references[..], &rest].concat())])));
    }
    done(&of("sft", &write(&folder, &[without(pair(), &[&references[..], &lengths, &rest].concat())])));
    for name in ["ipo", "simpo", "orpo", "cpo"] {
        for column in lengths {
            let message = fails(2, &of(name, &write(&folder, &[without(pair(), &[column])])));
            says(&message, &["Line 1 of", column, "missing", name, "number of tokens"]);
        }
    }
    let sums = arguments("ipo", 0.1, &json!({"sum_logps": true}), &write(&folder, &[without(pair(), &lengths)]));
    done(&sums);
    for (name, column) in [
        ("safe-dpo", "safe_chosen"),
        ("safe-dpo", "safe_rejected"),
        ("modpo", "margin"),
        ("tdpo", "kl_chosen"),
        ("tdpo", "kl_rejected"),
        ("dpo", "policy_chosen"),
        ("dpo", "policy_rejected"),
        ("kto", "policy_kl"),
        ("kto", "ref_kl"),
    ] {
        let message = fails(2, &of(name, &write(&folder, &[without(pair(), &[column])])));
        says(&message, &["Line 1 of", column, "missing", name]);
    }
    for column in ["policy", "ref", "desirable", "policy_kl", "ref_kl"] {
        let mut null = single();
        null[column] = Value::Null;
        for row in [without(single(), &[column]), null] {
            let message = fails(2, &of("kto", &write(&folder, &[single(), row])));
            says(&message, &["Line 2 of", column, "missing", "kto"]);
        }
    }
    done(&of("kto", &write(&folder, &[without(single(), &["len"])])));
    done(&of("bco", &write(&folder, &[without(single(), &["len", "policy_kl", "ref_kl"])])));
    says(&fails(2, &of("kto", &write(&folder, &[without(single(), &["ref_kl"])]))), &["mismatched pair"]);
    says(
        &fails(2, &of("dpo", &write(&folder, &[single()]))),
        &["single response", "`policy`", "`kto`", "policy_chosen"],
    );
}

#[test]
fn pairs_become_single_responses_for_unpaired_objectives() {
    let folder = folder();
    let singles = |columns: [&str; 2], desirable: bool| json!({"policy": pair()[columns[0]], "ref": pair()[columns[1]], "desirable": desirable, "policy_kl": -9.0, "ref_kl": -9.5});
    let (chosen, rejected) =
        (singles(["policy_chosen", "ref_chosen"], true), singles(["policy_rejected", "ref_rejected"], false));
    for name in ["bco", "kto"] {
        let of_pair = json(&of(name, &write(&folder, &[pair()])));
        assert_eq!(of_pair, json(&of(name, &write(&folder, &[chosen.clone(), rejected.clone()]))), "{name}");
        assert_eq!(of_pair["losses"].as_array().unwrap().len(), 2);
    }
    // fine-tuning takes what is desirable, and needs neither label nor temperature
    let demonstration = json!({"policy": -4.0});
    for rows in [vec![pair()], vec![chosen.clone()], vec![demonstration]] {
        let got = json(&["loss", "--objective", "sft", &write(&folder, &rows)]);
        assert_eq!((&got["loss"], &got["grad"]), (&json!(4.0), &json!({"policy": [-1.0]})));
    }
    let both = json(&of("sft", &write(&folder, &[chosen, rejected.clone()])));
    assert_eq!((&both["loss"], &both["losses"]), (&json!(4.0), &json!([4.0, 0.0])));
    assert_eq!(numbers(&both["grad"]["policy"]), [-1.0, 0.0]);
    says(&fails(2, &of("sft", &write(&folder, &[rejected]))), &["desirable"]);
}

#[test]
fn a_bad_value_is_named_by_row_column_and_remedy() {
    let folder = folder();
    let cases = [
        ("dpo", pair(), "policy_chosen", json!("NaN"), "the text \"NaN\""),
        ("dpo", pair(), "ref_rejected", json!([1.0]), "a list"),
        ("dpo", pair(), "policy_rejected", json!(true), "`true`"),
        ("ipo", pair(), "len_chosen", json!(0), "`0`"),
        ("dpo", pair(), "len_chosen", json!(0), "`0`"),
        ("simpo", pair(), "len_rejected", json!(2.5), "`2.5`"),
        ("cpo", pair(), "len_rejected", json!(-3), "`-3`"),
        ("orpo", pair(), "policy_chosen", json!(0.5), "0.5"),
        ("orpo", pair(), "policy_rejected", json!(0.0), "odds"),
        ("safe-dpo", pair(), "safe_chosen", json!(1), "`1`"),
        ("modpo", pair(), "margin", json!("0.3"), "the text"),
        ("tdpo", pair(), "kl_rejected", json!(-0.1), "-0.1"),
        ("kto", single(), "desirable", json!(1), "`1`"),
        ("bco", single(), "desirable", json!("yes"), "the text \"yes\""),
        ("kto", single(), "policy_kl", json!({"a": 1}), "an object"),
    ];
    for (name, row, column, value, found) in cases {
        let mut bad = row.clone();
        bad[column] = value;
        let message = fails(2, &of(name, &write(&folder, &[row, bad])));
        says(&message, &["Line 2 of", "rows.jsonl", &format!("column `{column}`"), found, "orrect"]);
    }
    let mut unsafe_both = pair();
    unsafe_both["safe_rejected"] = json!(false);
    let message = fails(2, &of("safe-dpo", &write(&folder, &[pair(), unsafe_both])));
    says(&message, &["Line 2 of", "safe_chosen", "both responses are unsafe", "contradictory", "Remove the row"]);
    let mut huge = pair();
    huge["policy_chosen"] = json!(-1e200);
    says(&fails(2, &of("sppo", &write(&folder, &[huge]))), &["Line 1 of", "not finite", "too large"]);
    // what is no JSON at all
    for (content, parts) in [
        ("", &["no rows"][..]),
        ("[]", &["no rows"]),
        ("{\"policy_chosen\": NaN}", &["Line 1 of", "not one valid JSON object"]),
        ("{\"policy_chosen\": 1e999}", &["Line 1 of", "number out of range"]),
        ("[1, 2]", &["Row 1 of", "not a JSON object"]),
    ] {
        says(&fails(2, &of("dpo", &file(&folder, "bad.json", content))), &[&["bad.json"][..], parts].concat());
    }
    says(&fails(2, &of("dpo", "nowhere.jsonl")), &["nowhere.jsonl"]);
}

#[test]
fn a_bad_parameter_is_named() {
    let folder = folder();
    let file = write(&folder, &[pair()]);
    for beta in [0.0, -0.1, f64::NAN, f64::INFINITY] {
        says(&fails(2, &arguments("dpo", beta, &json!({}), &file)), &["beta", "`dpo`", "positive"]);
    }
    says(&fails(2, &["loss", "--objective", "dpo", &file]), &["--beta", "`dpo`"]);
    for (name, options, parts) in [
        ("dpo", json!({"label_smoothing": 0.5}), ["label_smoothing", "0.5"]),
        ("dpo", json!({"gamma": 1.0}), ["gamma", "`simpo`"]),
        ("simpo", json!({"gamma": -1.0}), ["gamma", "-1"]),
        ("kto", json!({"undesirable_weight": 0.0}), ["undesirable_weight", "above 0"]),
        ("dpo", json!({"sum_logps": true}), ["sum_logps", "`ipo`"]),
        ("modpo", json!({"weight": -2.0}), ["weight", "-2"]),
    ] {
        says(&fails(2, &arguments(name, 0.1, &options, &file)), &parts);
    }
    let unknown = run(&of("dpoo", &file));
    assert_eq!(unknown.code, 2);
    says(&unknown.stderr, &["dpoo", "similar", "'dpo'", "safe-dpo"]);
}

#[test]
fn arrays_and_blank_lines_are_read_and_text_is_a_table() {
    let folder = folder();
    let rows = [pair(), pair()];
    let expected = json(&of("dpo", &write(&folder, &rows)));
    let array = file(&folder, "rows.json", json!(rows).to_string());
    assert_eq!(json(&of("dpo", &array)), expected);
    let spaced = file(&folder, "spaced.jsonl", format!("{}\n\n{}\n", rows[0], rows[1]));
    assert_eq!(json(&of("dpo", &spaced)), expected);

    let shown = done(&of("dpo", &spaced));
    says(&shown.stdout, &["row", "d/d policy_chosen", "mean loss", "rewards/accuracies"]);
    // the second pair is on the third line
    assert!(shown.stdout.lines().any(|line| line.starts_with("     3  ")), "{}", shown.stdout);
    assert_eq!(shown.stderr, "");
}

#[test]
fn a_positive_log_probability_is_pointed_at() {
    let folder = folder();
    let row = |policy: f64| json!({"policy_chosen": policy, "policy_rejected": -2.0, "ref_chosen": -1.0, "ref_rejected": -2.0});
    let path = file(&folder, "nll.jsonl", format!("{}\n{}\n", row(-1.0), row(5.0)));
    let outcome = done(&["loss", "--objective", "dpo", "--beta", "0.1", &path, "--json"]);
    says(&outcome.stderr, &["Warning: Line 2 of", "`policy_chosen`", "5 is taken as it stands", "change their sign"]);
    assert_eq!(object(&outcome.stdout)["losses"].as_array().unwrap().len(), 2);
}
