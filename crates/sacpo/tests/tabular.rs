//! `sacpo tabular` from end to end.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::*;
use proptest::prelude::*;
use serde_json::{Value, json};

// λ*, E[r], KL and the third answer's probability for the second prompt of the example, found by bisection on E[g] in
// Python's floats, with nothing of this program
const LAMBDA: f64 = 1.1149533739708066;
const REWARD: f64 = 0.8694030292762853;
const KL: f64 = 0.3162868736439902;
const THIRD: f64 = 0.30417428940332764;

fn example() -> Value {
    serde_json::from_str(include_str!("../../../docs/examples/two-prompts.json")).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    match value {
        Value::Array(items) => items.iter().flat_map(numbers).collect(),
        _ => vec![value.as_f64().unwrap()],
    }
}

#[test]
fn the_example_is_solved_and_reached_step_by_step() {
    let result = json(&["tabular", concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/examples/two-prompts.json")]);
    let expected = ["lambda", "policy", "reward", "safety", "kl", "duality_gap", "kkt_residual", "stepwise"];
    assert_eq!(result.as_object().unwrap().keys().collect::<Vec<_>>(), expected);
    let close = |value: &Value, expected: f64| {
        let value = value.as_f64().unwrap();
        assert!((value - expected).abs() < 1e-9, "{value} is not {expected}");
    };
    close(&result["lambda"][0], LAMBDA);
    close(&result["reward"], REWARD);
    close(&result["safety"][0], 0.2);
    close(&result["kl"], KL);
    close(&result["policy"][1][2], THIRD);
    for key in ["duality_gap", "kkt_residual"] {
        assert!(result[key].as_f64().unwrap().abs() < 1e-12, "{result}");
    }
    let stepwise = &result["stepwise"];
    assert!(stepwise["max_difference"].as_f64().unwrap() < 1e-12 && stepwise["orders"] == 2, "{stepwise}");
    let policies = stepwise["policies"].as_array().unwrap();
    assert_eq!(policies.len(), 2);
    let last = numbers(&policies[1]);
    assert!(last.iter().zip(numbers(&result["policy"])).all(|(a, b)| (a - b).abs() < 1e-12), "{result}");
    // the reward step lowers safety below the threshold: that is what the second step is for
    let g = numbers(&example()["safety"][0]);
    let safety: f64 = numbers(&policies[0]).iter().zip(&g).map(|(p, g)| 0.5 * p * g).sum();
    assert!(safety < 0.0, "{safety}");
}

#[test]
fn people_get_a_table() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/examples/two-prompts.json");
    let outcome = done(&["tabular", path]);
    assert_eq!(outcome.stderr, "");
    for part in ["E[r] 0.869403", "KKT residual", "orders tried: 2", "1.114953", "threshold", "+ safety 1"] {
        assert!(outcome.stdout.contains(part), "`{part}` is missing: {}", outcome.stdout);
    }
    assert_eq!(outcome.stdout.lines().filter(|line| line.starts_with("     ")).count(), 9, "{}", outcome.stdout);
}

#[test]
fn no_constraints_and_many_constraints_are_problems_too() {
    let folder = folder();
    let mut problem = example();
    let g = problem["safety"][0].clone();
    problem["safety"] = json!([]);
    problem["thresholds"] = json!([]);
    problem.as_object_mut().unwrap().remove("prompt_weights");
    let free = json(&["tabular", &file(&folder, "free.json", problem.to_string())]);
    assert_eq!((free["lambda"].clone(), free["stepwise"]["orders"].clone()), (json!([]), json!(1)));
    problem["safety"] = json!(vec![g; 7]);
    problem["thresholds"] = json!(vec![0.2; 7]);
    let many = json(&["tabular", &file(&folder, "many.json", problem.to_string())]);
    assert_eq!(many["stepwise"]["policies"].as_array().unwrap().len(), 8);
    assert!((numbers(&many["lambda"]).iter().sum::<f64>() - LAMBDA).abs() < 1e-6, "{many}");
    assert!(many["stepwise"]["max_difference"].as_f64().unwrap() < 1e-12, "{many}");
}

#[test]
fn wrong_problems_are_refused_by_field() {
    let folder = folder();
    let with = |key: &str, value: Value| {
        let mut problem = example();
        problem[key] = value;
        problem.to_string()
    };
    let without = |key: &str| {
        let mut problem = example();
        problem.as_object_mut().unwrap().remove(key);
        problem.to_string()
    };
    let long = "k".repeat(300);
    let cases: Vec<(String, &[&str])> = vec![
        (String::new(), &["no valid JSON"]),
        ("{\"ref\": [[1.0]".into(), &["no valid JSON", "line 1"]),
        ("{\"beta\": NaN}".into(), &["no valid JSON"]),
        ("[1, 2]".into(), &["one JSON object", "`thresholds`"]),
        (with("treshold", json!([0.0])), &["unknown key `treshold`", "`thresholds`"]),
        (with(&long, json!(0)), &["unknown key", "Known keys are", "`prompt_weights`"]),
        (without("reward"), &["lacks the key `reward`", "--help"]),
        (example().to_string().replacen("\"beta\"", "\"beta\":0.5,\"beta\"", 1), &["duplicate field `beta`"]),
        (with("beta", json!("0.1")), &["invalid type: string", "`beta` is a number"]),
        (with("reward", json!([1.0, 2.0])), &["invalid type", "one per prompt"]),
        (with("reward", json!([[0.0, null, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])), &["invalid type: null"]),
        (with("beta", json!(0)), &["`beta` is 0", "above 0"]),
        (with("beta", json!(-0.5)), &["`beta` is -0.5"]),
        (with("ref", json!([])), &["`ref` has no prompts"]),
        (with("ref", json!([[0.5, 0.2, 0.2, 0.2], [0.25, 0.25, 0.25, 0.25]])), &["prompt 1", "sum to 1"]),
        (with("ref", json!([[0.5, 0.5], [0.25, 0.25, 0.25, 0.25]])), &["`reward` has 4 answers to prompt 1"]),
        (with("thresholds", json!([0.0, 1.0])), &["`thresholds` has 2 numbers", "1 constraints"]),
        (with("prompt_weights", json!([1.0])), &["`prompt_weights` has 1 numbers", "2 prompts"]),
        (with("prompt_weights", json!([1.0, -1.0])), &["Number 2 of `prompt_weights` is -1"]),
        (with("prompt_weights", json!([0.0, 0.0])), &["All `prompt_weights` are 0"]),
        (with("thresholds", json!([5.0])), &["constraint 1", "`thresholds`", "5", "0.75", "Lower the threshold"]),
        (with("thresholds", json!([0.75])), &["constraint 1", "λ → ∞", "Lower the threshold a little"]),
    ];
    for (i, (contents, parts)) in cases.into_iter().enumerate() {
        let name = format!("problem-{i}.json");
        let message = fails(2, &["tabular", &file(&folder, &name, contents)]);
        if !message.contains("constraint 1") {
            says(&message, &[&name]);
        }
        says(&message, parts);
    }
    says(&fails(2, &["tabular", &at(&folder, "missing.json")]), &["missing.json", "Check the path"]);
    says(&fails(2, &["tabular", &text(folder.path())]), &["Give a file instead"]);
}

/// A JSON value that resembles a part of a problem, or not.
fn part() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (0.0..1.0f64).prop_map(Value::from),
        Just(json!(0.5)),
        "[a-z]{0,4}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 20, 3, |inner| prop::collection::vec(inner, 0..4).prop_map(Value::from))
}

proptest! {
    // each case starts the program
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_problem_is_solved_or_refused(
        changes in prop::collection::vec((prop::sample::select(vec!["ref", "reward", "safety", "prompt_weights", "beta", "thresholds", "x"]), part()), 1..3)
    ) {
        let folder = folder();
        let mut problem = example();
        for (key, value) in changes {
            problem[key] = value;
        }
        // `run` fails on a panic
        let outcome = run(&["tabular", &file(&folder, "p.json", problem.to_string()), "--json"]);
        prop_assert!(matches!(outcome.code, 0 | 2), "{}: {}", problem, outcome.stderr);
    }
}
