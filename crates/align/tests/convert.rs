//! Data sets written again in other formats and kinds of files.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/parquet.rs"]
mod parquet_file;

use std::path::Path;

use ::parquet::basic::Compression;
use align::data::{
    Conversion, Converted, Format, LabelledExample, PreferencePair, Prompt, Source, Target, read_examples, read_pairs,
    read_prompts, read_records,
};
use common::{chat, file, lines, shared};
use parquet_file::parquet;
use proptest::prelude::*;
use serde_json::{Value, json};

/// A name of every kind of file.
const KINDS: [&str; 7] =
    ["out.jsonl", "out.jsonl.gz", "out.jsonl.zst", "out.json", "out.json.gz", "OUT.JSON.ZST", "out.parquet"];

fn conversion<'a>(from: &'a Path, to: Option<Target>, metric: &'a str) -> Conversion<'a> {
    Conversion { source: Source { path: from, format: None, metric, skip_bad_rows: false }, to }
}

fn skipping(conversion: Conversion<'_>) -> Conversion<'_> {
    Conversion { source: Source { skip_bad_rows: true, ..conversion.source }, ..conversion }
}

fn write(conversion: &Conversion<'_>, out: &Path) -> engine::Result<Converted> {
    conversion.write(out, &mut |_| Ok(()))
}

/// What a file of these rows becomes as JSON lines.
fn converted(rows: &[Value], to: Option<Target>) -> (Converted, Vec<Value>) {
    let folder = tempfile::tempdir().unwrap();
    let (from, out) = (folder.path().join("rows.jsonl"), folder.path().join("out.jsonl"));
    std::fs::write(&from, lines(rows)).unwrap();
    let converted = write(&conversion(&from, to, "harmlessness"), &out).unwrap();
    let text = std::fs::read_to_string(out).unwrap();
    (converted, text.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
}

fn refused(rows: &[Value], to: Option<Target>) -> String {
    let folder = tempfile::tempdir().unwrap();
    let (from, out) = (folder.path().join("rows.jsonl"), folder.path().join("out.jsonl"));
    std::fs::write(&from, lines(rows)).unwrap();
    let error = write(&conversion(&from, to, "helpfulness"), &out).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left of what failed");
    error.to_string()
}

fn user(content: &str) -> Value {
    json!({"role": "user", "content": content})
}

fn assistant(content: &str) -> Value {
    json!({"role": "assistant", "content": content})
}

// ------------------------------------------------------------------------------------------- each format

#[test]
fn pairs_become_every_format() {
    let transcript =
        |answer: &str| format!("\n\nHuman: Why?\n\nAssistant: Because.\n\nHuman: Really?\n\nAssistant: {answer}");
    let hh = [json!({"chosen": transcript("Yes."), "rejected": transcript("No."), "source": 3})];
    let turns = json!([user("Why?"), assistant("Because."), user("Really?")]);
    let trl = json!({"prompt": turns, "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]});
    let (report, rows) = converted(&hh, None);
    assert_eq!(rows, std::slice::from_ref(&trl));
    assert_eq!((report.from, report.to, report.rows), (Some(Format::Hh), Target::Trl, 1));
    assert_eq!(report.lost_columns, ["source"]);
    let (report, rows) = converted(&[trl], Some(Target::Hh));
    assert_eq!(rows, [json!({"chosen": transcript("Yes."), "rejected": transcript("No.")})]);
    assert_eq!(report.lost_columns, [""; 0]);
    let completion =
        |answer: &str, label: bool| json!({"prompt": turns, "completion": [assistant(answer)], "label": label});
    assert_eq!(converted(&hh, Some(Target::Unpaired)).1, [completion("Yes.", true), completion("No.", false)]);
    let (report, rows) = converted(&hh, Some(Target::Sft));
    assert_eq!((rows, report.left_out), (vec![json!({"prompt": turns, "completion": [assistant("Yes.")]})], 1));
    let twice = [hh[0].clone(), hh[0].clone()];
    let (report, rows) = converted(&twice, Some(Target::Prompts));
    assert_eq!((rows, report.left_out), (vec![json!({"prompt": turns})], 1));
    assert_eq!(report.lost_columns, [""; 0]);
}

#[test]
fn one_metric_of_pku_rows_is_kept() {
    let row = json!({
        "prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 0, "safer_response_id": 1,
        "is_response_0_safe": false, "is_response_1_safe": true, "margin": -0.5,
    });
    let pair = json!({
        "prompt": [user("p")], "chosen": [assistant("b")], "rejected": [assistant("a")], "safe_chosen": true,
        "safe_rejected": false, "margin": -0.5,
    });
    let (report, rows) = converted(std::slice::from_ref(&row), None);
    assert_eq!((rows, report.lost_columns), (vec![pair.clone()], vec!["better_response_id".to_owned()]));
    // the preferred response comes first
    let as_pku = json!({
        "prompt": "p", "response_0": "b", "response_1": "a", "safer_response_id": 0, "is_response_0_safe": true,
        "is_response_1_safe": false, "margin": -0.5,
    });
    let (report, rows) = converted(&[pair], Some(Target::Pku));
    assert_eq!((rows, report.lost_columns.len()), (vec![as_pku], 0));
    let (report, rows) = converted(&[row], Some(Target::Unpaired));
    let single =
        |text: &str, label: bool| json!({"prompt": [user("p")], "completion": [assistant(text)], "label": label});
    assert_eq!(rows, [single("a", false), single("b", true)]);
    assert_eq!(report.lost_columns, ["better_response_id", "safer_response_id", "margin"]);
}

#[test]
fn texts_and_conversations_stay_what_they_are() {
    let text = json!({"prompt": "The sky\n is", "chosen": " \"blue\".", "rejected": " red"});
    let as_it_is = std::slice::from_ref(&text);
    assert_eq!(converted(as_it_is, Some(Target::Trl)).1, as_it_is);
    let single = |text: &str, label: bool| json!({"prompt": "The sky\n is", "completion": text, "label": label});
    let labelled = [single(" \"blue\".", true), single(" red", false)];
    assert_eq!(converted(std::slice::from_ref(&text), Some(Target::Unpaired)).1, labelled);
    assert_eq!(converted(&labelled, None).1, labelled);
    let demonstration = json!({"prompt": "The sky\n is", "completion": " \"blue\"."});
    let (report, rows) = converted(&labelled, Some(Target::Sft));
    assert_eq!((rows, report.left_out, report.to), (vec![demonstration.clone()], 1, Target::Sft));
    assert_eq!(converted(std::slice::from_ref(&demonstration), None).1, [demonstration]);
    let conversation = json!({"messages": [user("Why?"), assistant("So.")]});
    let question = json!({"prompt": "Why?\n", "response": "So."});
    let as_prompt = json!({"prompt": [user("Why?")], "completion": [assistant("So.")]});
    for row in [conversation, question] {
        let (report, rows) = converted(&[row], None);
        assert_eq!((rows, report.lost_columns.len()), (vec![as_prompt.clone()], 0));
    }

    for to in [Target::Hh, Target::Pku] {
        let error = refused(std::slice::from_ref(&text), Some(to));
        assert!(
            error.starts_with("Line 1 of ") && error.contains("column `prompt`: the prompt is plain text"),
            "{error}"
        );
    }
}

#[test]
fn prompts_come_from_lists_and_from_rows_of_any_format() {
    let expected = ["One?", "Two, \"2\"?"];
    let rows: Vec<Value> = expected.iter().map(|text| json!({"prompt": text, "id": 1})).collect();
    let csv = "id,prompt\n1,One?\n2,\"Two, \"\"2\"\"?\"\n3,One?\n";
    for (name, bytes) in [
        ("p.txt", "One?\nTwo, \"2\"?\nOne?\n".to_owned()),
        ("p.csv", csv.to_owned()),
        ("p.jsonl", lines(&rows) + &lines(&rows[..1])),
    ] {
        let file = file(name, bytes);
        for kind in KINDS {
            let out = file.path.with_file_name(kind);
            for to in [None, Some(Target::Prompts)] {
                let report = write(&conversion(&file.path, to, "helpfulness"), &out).unwrap();
                assert_eq!((report.from, report.to, report.rows, report.left_out), (None, Target::Prompts, 2, 1));
                let records = read_records(&out).unwrap();
                let texts: Vec<Value> = records.into_iter().map(|record| record.columns.into()).collect();
                assert_eq!(texts, expected.map(|text| json!({"prompt": text})), "{name} {kind}");
            }
        }
    }
    // the prompt of a row of PKU-SafeRLHF is a message
    let pku = json!({"prompt": " p ", "response_0": "a", "response_1": "b", "better_response_id": 0});
    assert_eq!(converted_prompts(&pku), [chat(&[("user", "p")])]);
    assert_eq!(
        converted_prompts(&json!({"prompt": "p", "completion": "c", "label": false})),
        [Prompt::Text("p".into())]
    );
}

fn converted_prompts(row: &Value) -> Vec<Prompt> {
    let file = file("rows.jsonl", lines(std::slice::from_ref(row)));
    let out = file.path.with_file_name("prompts.parquet");
    write(&conversion(&file.path, Some(Target::Prompts), "helpfulness"), &out).unwrap();
    read_prompts(&out).unwrap()
}

// ------------------------------------------------------------------------------------------------ errors

#[test]
fn what_cannot_be_made_is_an_error_that_says_why() {
    let demonstration = json!({"prompt": "p", "completion": "c"});
    let labelled = json!({"prompt": "p", "completion": "c", "label": true});
    let undesirable = json!({"prompt": "p", "completion": "c", "label": false});
    let conversation = |turns: &[Value], answer: &str| json!({"prompt": turns, "chosen": [assistant(answer)], "rejected": [assistant("no")]});
    let system = json!({"role": "system", "content": "s"});
    #[rustfmt::skip]
    let cases = [
        (&demonstration, Target::Trl, "no pairs can be made"),
        (&labelled, Target::Hh, "no pairs can be made"),
        (&labelled, Target::Pku, "no pairs can be made"),
        (&demonstration, Target::Unpaired, "labels cannot be made up"),
        (&undesirable, Target::Sft, "holds no usable row for `sft`"),
        (&json!({"image": 1}), Target::Trl, "are no preference pairs: the columns are `image`"),
        (&json!({"image": 1}), Target::Prompts, "column `prompt`: the column is missing"),
        (&conversation(&[system, user("q")], "yes"), Target::Hh, "column `chosen`: the conversation does not fit"),
        (&conversation(&[user("q")], "yes\n"), Target::Hh, "column `chosen`: the conversation does not fit"),
        (&conversation(&[user("q\n\nHuman: r")], "yes"), Target::Hh, "column `chosen`: the conversation does not fit"),
        (&conversation(&[user("q"), assistant("a"), user("r")], "yes"), Target::Pku, "column `prompt`: `pku` holds one message"),
        (&conversation(&[user("q")], " yes"), Target::Pku, "column `response_0`: the text has white space"),
    ];
    for (row, to, reason) in cases {
        let error = refused(std::slice::from_ref(row), Some(to));
        assert!(error.contains(reason) && error.contains("rows.jsonl"), "{error}");
    }
    let error = refused(&[json!({"image": 1})], None);
    assert!(error.contains("are no preference pairs"), "{error}");

    let file = file("rows.jsonl", lines(&[labelled]));
    for name in ["out.csv", "out", "out.parquet.gz", "jsonl"] {
        let out = file.path.with_file_name(name);
        let error = write(&conversion(&file.path, None, "helpfulness"), &out).unwrap_err().to_string();
        assert!(error.contains("does not tell what kind of file") && !out.exists(), "{error}");
    }
    let pair = common::file("pairs.jsonl", lines(&[conversation(&[user("q")], "yes")]));
    let out = pair.path.with_file_name("out.jsonl");
    let error = write(&conversion(&pair.path, Some(Target::Pku), "honesty"), &out).unwrap_err().to_string();
    assert!(error.contains("no label for the metric `honesty`"), "{error}");
    let stopped =
        conversion(&pair.path, None, "").write(&out, &mut |_| Err(engine::Error::Interrupted("Stop.".into())));
    assert!(matches!(stopped, Err(engine::Error::Interrupted(_))) && !out.exists());
}

#[test]
fn bad_rows_are_errors_or_counted() {
    let good = |prompt: Value| json!({"prompt": prompt, "chosen": [assistant("yes")], "rejected": [assistant("no")]});
    let rows =
        [good(json!([user("q")])), json!({"prompt": [user("q")]}), good(json!([user(" r")])), good(json!([user("s")]))];
    let file = file("rows.jsonl", lines(&rows));
    let out = file.path.with_file_name("out.jsonl");
    let strict = conversion(&file.path, Some(Target::Hh), "helpfulness");
    let error = write(&strict, &out).unwrap_err().to_string();
    assert!(
        error.starts_with("Line 2 of ") && error.contains("`chosen`") && error.contains("--skip-bad-rows"),
        "{error}"
    );
    assert!(!out.exists());
    // one cannot be read, another not be written
    let report = write(&skipping(strict), &out).unwrap();
    assert_eq!((report.rows, report.bad_rows), (2, 2));
    assert!(report.first_bad_row.unwrap().starts_with("Line 2 of "));
    let read = read_pairs(&out, None, "helpfulness", false).unwrap();
    assert_eq!(
        read.rows.iter().map(|pair| pair.prompt.clone()).collect::<Vec<_>>(),
        ["q", "s"].map(|q| chat(&[("user", q)]))
    );

    let mixed = [good(json!([user("q")])), json!({"prompt": "p", "chosen": "a", "rejected": "b"})];
    let mixed = common::file("mixed.jsonl", lines(&mixed));
    let out = mixed.path.with_file_name("out.parquet");
    let error = write(&conversion(&mixed.path, None, "helpfulness"), &out).unwrap_err().to_string();
    assert!(
        error.starts_with("Line 2 of ") && error.contains("`prompt` is a text here and a list of messages"),
        "{error}"
    );
}

// ------------------------------------------------------------------------------------------- round trips

/// Texts that are not blank, with what files and formats may trip over.
fn any_text() -> BoxedStrategy<String> {
    let odd = vec![
        "\n\nHuman:",
        "\n",
        "\r\n",
        "\t",
        " ",
        "\"",
        "\\",
        "'",
        ",",
        "\u{0}",
        "\u{2028}",
        "é",
        "木",
        "😀",
        "{",
        "[]",
    ];
    let piece = prop_oneof![
        prop::sample::select(odd).prop_map(str::to_owned),
        "[a-z]{1,5}",
        any::<char>().prop_map(String::from),
    ];
    let text = prop::collection::vec(piece, 1..6).prop_map(|pieces| pieces.concat());
    text.prop_filter("blank", |text| !text.trim().is_empty()).boxed()
}

/// Texts that every format can hold.
fn tame_text() -> BoxedStrategy<String> {
    "[a-zé\"\\\\木😀]([a-z \n'\u{0}]{0,8}[a-zß])?".boxed()
}

/// A pair, as JSON written here, of a prompt and of texts.
fn row(prompt: BoxedStrategy<Value>, text: BoxedStrategy<String>) -> impl Strategy<Value = Value> {
    let beside = (prop::option::of(any::<[bool; 2]>()), prop::option::of(-1e9..1e9f64));
    (prompt, text.clone(), text, beside).prop_map(|(prompt, chosen, rejected, (safe, margin))| {
        let answer = |text: String| if prompt.is_array() { json!([assistant(&text)]) } else { json!(text) };
        let mut row = json!({"chosen": answer(chosen), "rejected": answer(rejected)});
        row["prompt"] = prompt;
        if let Some([chosen, rejected]) = safe {
            (row["safe_chosen"], row["safe_rejected"]) = (chosen.into(), rejected.into());
        }
        if let Some(margin) = margin {
            row["margin"] = margin.into();
        }
        row
    })
}

/// Pairs whose prompts are all texts, or all conversations: of any kind, of turns that alternate, or of one message.
fn rows() -> impl Strategy<Value = Vec<Value>> {
    let message = |role: &'static str, text: BoxedStrategy<String>| {
        text.prop_map(move |content| json!({"role": role, "content": content})).boxed()
    };
    let turns = |text: fn() -> BoxedStrategy<String>, most: usize| {
        let turn = (message("user", text()), message("assistant", text()));
        let turns = prop::collection::vec(turn, 0..=most);
        (turns, message("user", text())).prop_map(|(turns, last)| {
            turns.into_iter().flat_map(|(question, answer)| [question, answer]).chain([last]).collect::<Vec<_>>()
        })
    };
    let systems = prop::option::of(message("system", any_text()));
    let conversations =
        (systems, turns(any_text, 2)).prop_map(|(system, turns)| system.into_iter().chain(turns).collect::<Value>());
    let several = |row| prop::collection::vec(row, 1..4);
    prop_oneof![
        several(row(any_text().prop_map(Value::from).boxed(), any_text()).boxed()),
        several(row(conversations.boxed(), any_text()).boxed()),
        several(row(turns(tame_text, 2).prop_map(Value::from).boxed(), tame_text()).boxed()),
        several(row(turns(tame_text, 0).prop_map(Value::from).boxed(), tame_text()).boxed()),
    ]
}

/// Whether every pair can be told in a format, by its rules in docs/data.md.
fn fits(pairs: &[PreferencePair], target: Target) -> bool {
    let trimmed = |text: &str| text.trim() == text;
    pairs.iter().all(|pair| match (target, &pair.prompt) {
        (Target::Trl, _) => true,
        (_, Prompt::Text(_)) => false,
        (Target::Pku, Prompt::Chat(messages)) => {
            let texts = [&messages[0].content, &pair.chosen, &pair.rejected];
            messages.len() == 1 && messages[0].role == "user" && texts.iter().all(|text| trimmed(text))
        }
        (_, Prompt::Chat(messages)) => {
            let mut roles = messages.iter().zip(["user", "assistant"].iter().cycle());
            let mut contents = messages.iter().map(|message| &message.content).chain([&pair.chosen, &pair.rejected]);
            roles.all(|(message, role)| message.role == *role)
                && contents
                    .all(|text| trimmed(text) && !text.contains("\n\nHuman:") && !text.contains("\n\nAssistant:"))
        }
    })
}

fn pairs_of(path: &Path) -> Vec<PreferencePair> {
    read_pairs(path, None, "helpfulness", false).unwrap().rows
}

fn examples_of(path: &Path) -> Vec<LabelledExample> {
    let examples = read_examples(path, None, "helpfulness", false).unwrap().rows;
    examples.into_iter().map(|example| LabelledExample { row: 0, ..example }).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Pairs are the same after any way through formats and kinds of files that can hold them.
    #[test]
    fn pairs_survive_every_conversion(rows in rows(), kinds in prop::collection::vec(0..KINDS.len(), 3)) {
        let source = file("rows.jsonl", lines(&rows));
        // two responses may be the same
        let read = read_pairs(&source.path, None, "helpfulness", false);
        prop_assume!(read.is_ok());
        let expected = read.unwrap().rows;
        let pair_targets = [Target::Trl, Target::Hh, Target::Pku];
        for first in pair_targets {
            let between = source.path.with_file_name(format!("between-{}", KINDS[kinds[0]]));
            let done = write(&conversion(&source.path, Some(first), "helpfulness"), &between);
            prop_assert_eq!(done.is_ok(), fits(&expected, first), "{:?} {:?}", first, done);
            if done.is_err() {
                continue;
            }
            prop_assert_eq!(&pairs_of(&between), &expected, "{:?}", first);
            for second in pair_targets {
                let after = source.path.with_file_name(format!("after-{}", KINDS[kinds[1]]));
                let done = write(&conversion(&between, Some(second), "helpfulness"), &after);
                prop_assert_eq!(done.is_ok(), fits(&expected, second), "{:?} {:?}", second, done);
                if done.is_ok() {
                    prop_assert_eq!(&pairs_of(&after), &expected, "{:?} {:?}", first, second);
                }
            }
            // the same labelled responses and prompts as from the source
            for to in [Target::Unpaired, Target::Sft] {
                let after = source.path.with_file_name(format!("after-{}", KINDS[kinds[2]]));
                write(&conversion(&between, Some(to), "helpfulness"), &after).unwrap();
                let mut examples = examples_of(&source.path);
                examples.retain(|example| to == Target::Unpaired || example.desirable);
                prop_assert_eq!(&examples_of(&after), &examples);
                let again = source.path.with_file_name(format!("again-{}", KINDS[kinds[0]]));
                write(&conversion(&after, None, "helpfulness"), &again).unwrap();
                prop_assert_eq!(&examples_of(&again), &examples);
            }
            let after = source.path.with_file_name(format!("prompts-{}", KINDS[kinds[2]]));
            write(&conversion(&between, Some(Target::Prompts), "helpfulness"), &after).unwrap();
            let mut prompts: Vec<Prompt> = Vec::new();
            for pair in &expected {
                if !prompts.contains(&pair.prompt) {
                    prompts.push(pair.prompt.clone());
                }
            }
            prop_assert_eq!(read_prompts(&after).unwrap(), prompts);
        }
    }
}

#[test]
fn real_data_are_the_same_in_every_kind_of_file() {
    for (name, to) in [
        ("real-text/hh-helpful-base.train.jsonl.gz", [Target::Trl, Target::Hh]),
        ("real-text/pku-saferlhf-safety-pairs.train.jsonl.gz", [Target::Trl, Target::Pku]),
        ("small/pku-saferlhf-32rows.json", [Target::Trl, Target::Pku]),
    ] {
        let Some(path) = shared(name) else { continue };
        let metric = "harmlessness";
        let content = |path: &Path| -> Vec<PreferencePair> {
            let rows = read_pairs(path, None, metric, true).unwrap().rows;
            rows.into_iter().map(|pair| PreferencePair { row: 0, ..pair }).collect()
        };
        let expected = content(&path);
        let folder = tempfile::tempdir().unwrap();
        for target in to {
            for kind in KINDS {
                let out = folder.path().join(kind);
                let report = write(&skipping(conversion(&path, Some(target), metric)), &out).unwrap();
                assert_eq!(report.rows, expected.len());
                assert!(content(&out) == expected, "{name} {target:?} {kind}");
            }
        }
    }
}

#[test]
fn columns_of_other_types_do_no_harm() {
    let turn = |role: &str, content: &str| json!({"content": content, "role": role});
    let chosen = json!([turn("user", "Name a prime."), turn("assistant", "Seven.")]);
    let rejected = json!([turn("user", "Name a prime."), turn("assistant", "Nine.")]);
    let row = json!({"prompt": "Name a prime.", "prompt_id": "0f", "chosen": chosen, "rejected": rejected, "messages": chosen,
        "score_chosen": 8.5, "score_rejected": 2.0});
    let file = file("train.parquet", parquet(&[row.clone(), row], 1, Compression::SNAPPY));
    let out = file.path.with_file_name("out.jsonl");
    let report = write(&conversion(&file.path, None, "helpfulness"), &out).unwrap();
    assert_eq!(report.lost_columns, ["prompt_id", "messages", "score_chosen", "score_rejected"]);
    let line =
        json!({"prompt": [user("Name a prime.")], "chosen": [assistant("Seven.")], "rejected": [assistant("Nine.")]});
    assert_eq!(std::fs::read_to_string(&out).unwrap(), lines(&[line.clone(), line]));
}
