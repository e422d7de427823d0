//! Single responses with labels, and what pairs carry beside the preference.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::PathBuf;

use align::data::{Format, LabelledExample, Prompt, read_examples, read_pairs};
use common::{chat, shared};
use serde_json::{Value, json};

fn file(folder: &tempfile::TempDir, rows: &[Value]) -> PathBuf {
    let path = folder.path().join("rows.jsonl");
    std::fs::write(&path, rows.iter().map(|row| format!("{row}\n")).collect::<String>()).unwrap();
    path
}

fn example(prompt: Prompt, completion: &str, desirable: bool, row: usize) -> LabelledExample {
    LabelledExample { prompt, completion: completion.into(), desirable, row }
}

#[test]
fn labelled_rows_are_taken_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let user = json!({"role": "user", "content": "Hi"});
    let answer = json!({"role": "assistant", "content": "Yes"});
    let path = file(
        &folder,
        &[
            json!({"prompt": "The sky is", "completion": " blue.", "label": true}),
            json!({"prompt": [user], "completion": [answer], "label": false}),
            json!({"prompt": "Hi", "completion": [answer], "label": true}),
        ],
    );
    let read = read_examples(&path, None, "helpfulness", false).unwrap();
    assert_eq!(read.format, Format::Unpaired);
    let conversation = chat(&[("user", "Hi")]);
    let expected = [
        example(Prompt::Text("The sky is".into()), " blue.", true, 1),
        example(conversation.clone(), "Yes", false, 2),
        example(conversation, "Yes", true, 3),
    ];
    assert_eq!(read.rows, expected);
    let error = read_pairs(&path, None, "helpfulness", false).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("single responses") && error.to_string().contains("`bco`"), "{error}");
}

#[test]
fn a_pair_is_a_desirable_and_an_undesirable_response() {
    let folder = tempfile::tempdir().unwrap();
    let path = file(&folder, &[json!({"prompt": "p", "chosen": "a", "rejected": "b"})]);
    let prompt = Prompt::Text("p".into());
    let expected = [example(prompt.clone(), "a", true, 1), example(prompt, "b", false, 1)];
    assert_eq!(read_examples(&path, None, "anything", false).unwrap().rows, expected);
}

#[test]
fn safety_flags_are_labels_and_go_with_pairs() {
    let folder = tempfile::tempdir().unwrap();
    let row = |better: u8, safe: [bool; 2]| {
        json!({
            "prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": better, "safer_response_id": 1,
            "is_response_0_safe": safe[0], "is_response_1_safe": safe[1],
        })
    };
    let path = file(&folder, &[row(1, [false, true]), row(0, [false, false])]);
    let labels = |metric: &str| -> Vec<(String, bool)> {
        let rows = read_examples(&path, None, metric, false).unwrap().rows;
        rows.into_iter().map(|example| (example.completion, example.desirable)).collect()
    };
    let of = |labels: [(&str, bool); 4]| labels.map(|(text, label)| (text.to_owned(), label)).to_vec();
    assert_eq!(labels("harmlessness"), of([("a", false), ("b", true), ("a", false), ("b", false)]));
    assert_eq!(labels("helpfulness"), of([("b", true), ("a", false), ("a", true), ("b", false)]));
    let pairs = read_pairs(&path, None, "helpfulness", false).unwrap().rows;
    assert_eq!(pairs[0].chosen, "b");
    assert_eq!([pairs[0].is_unsafe, pairs[1].is_unsafe], [Some([false, true]), Some([true, true])]);

    let path = file(
        &folder,
        &[
            json!({"prompt": "p", "chosen": "a", "rejected": "b", "safe_chosen": true, "safe_rejected": false, "margin": -0.5}),
            json!({"prompt": "p", "chosen": "a", "rejected": "b", "safe_chosen": null, "safe_rejected": null, "margin": null}),
        ],
    );
    let pairs = read_pairs(&path, None, "helpfulness", false).unwrap().rows;
    assert_eq!((pairs[0].is_unsafe, pairs[0].margin), (Some([false, true]), Some(-0.5)));
    assert_eq!((pairs[1].is_unsafe, pairs[1].margin), (None, None));
}

#[test]
fn bad_labels_name_the_column() {
    let folder = tempfile::tempdir().unwrap();
    let good = json!({"prompt": "p", "completion": "a", "label": true});
    let pair = json!({"prompt": "p", "chosen": "a", "rejected": "b"});
    let with = |row: &Value, column: &str, value: Value| {
        let mut row = row.clone();
        row[column] = value;
        row
    };
    let cases = [
        (&good, with(&good, "label", json!(1)), "label", "true or false, found `1`"),
        (&good, with(&good, "label", json!("yes")), "label", "found a string"),
        (&good, json!({"prompt": "p", "completion": "a"}), "label", "missing"),
        (&good, with(&good, "completion", json!(" ")), "completion", "empty"),
        (&good, with(&good, "completion", json!(null)), "completion", "expected a string"),
        (&good, with(&good, "prompt", json!("")), "prompt", "empty"),
        (&good, with(&good, "completion", json!([])), "completion", "does not end with"),
        (&pair, with(&pair, "margin", json!("1")), "margin", "expected a number"),
        (
            &pair,
            with(&with(&pair, "safe_chosen", json!(0)), "safe_rejected", json!(true)),
            "safe_chosen",
            "true or false",
        ),
    ];
    for (good, bad, column, problem) in cases {
        let path = file(&folder, &[good.clone(), bad]);
        let error = read_examples(&path, None, "helpfulness", false).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let error = error.to_string();
        assert!(error.starts_with("Line 2 of ") && error.contains(&format!("column `{column}`")), "{error}");
        assert!(error.contains(problem), "{error}");
        assert_eq!(read_examples(&path, None, "helpfulness", true).unwrap().skipped, 1);
    }
}

#[test]
fn real_rows_are_labelled_as_given() {
    let Some(path) = shared("small/pku-saferlhf-32rows.json") else { return };
    let rows: Vec<Value> = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let examples = read_examples(&path, None, "harmlessness", false).unwrap().rows;
    assert_eq!(examples.len(), 64);
    for (index, read) in examples.iter().enumerate() {
        let row = &rows[index / 2];
        let text = |column: String| row[column].as_str().unwrap().trim();
        let prompt = chat(&[("user", text("prompt".into()))]);
        let safe = row[format!("is_response_{}_safe", index % 2)].as_bool().unwrap();
        assert_eq!(*read, example(prompt, text(format!("response_{}", index % 2)), safe, index / 2 + 1));
    }
}
