//! Preference data from files: formats, bad rows, prompts, splitting.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashSet;
use std::path::Path;

use align::data::{
    DataFile, Format, PreferencePair, Prompt, is_held_out, read_categorised_prompts, read_pairs, read_prompts,
};
use common::{chat, file, gzip, lines, pair, shared};
use proptest::prelude::*;
use serde_json::{Value, json};

// ------------------------------------------------------------------------------------------- helpers

fn read(path: &Path) -> DataFile<PreferencePair> {
    read_pairs(path, None, "helpfulness", false).unwrap()
}

fn read_rows(rows: &[Value]) -> Vec<PreferencePair> {
    read(&file("rows.jsonl", lines(rows)).path).rows
}

// ------------------------------------------------------------------------------------------- formats

#[test]
fn trl_strings_stay_as_they_are() {
    let pairs = read_rows(&[json!({"prompt": "The sky is", "chosen": " blue. ", "rejected": " green."})]);
    assert_eq!(pairs, [pair(Prompt::Text("The sky is".into()), " blue. ", " green.")]);
}

#[test]
fn trl_conversations_have_explicit_or_implicit_prompts() {
    let user = json!({"role": "user", "content": "Two and two?"});
    let right = json!({"role": "assistant", "content": "Four."});
    let wrong = json!({"role": "assistant", "content": "Five."});
    let rows = [
        json!({"prompt": [user], "chosen": [right], "rejected": [wrong]}),
        json!({"chosen": [user, right], "rejected": [user, wrong]}),
        json!({"prompt": "Two and two?", "chosen": [right], "rejected": [wrong]}),
        json!({"prompt": "Two and two?", "chosen": [user, right], "rejected": [user, wrong]}),
        json!({"prompt": [user], "chosen": "Four.", "rejected": "Five."}),
    ];
    for (index, got) in read_rows(&rows).into_iter().enumerate() {
        let expected = pair(chat(&[("user", "Two and two?")]), "Four.", "Five.");
        assert_eq!(got, PreferencePair { row: index + 1, ..expected });
    }
}

#[test]
fn hh_transcripts_become_conversations() {
    let shared = "\n\nHuman: Hello.\n\nNice day.\n\nAssistant: It is. Human: nature.\n\nHuman: Bye\n\nAssistant:";
    let row = json!({"chosen": format!("{shared} Bye! "), "rejected": format!("{shared} Go.\n\nNow.")});
    let expected = pair(
        chat(&[("user", "Hello.\n\nNice day."), ("assistant", "It is. Human: nature."), ("user", "Bye")]),
        "Bye!",
        "Go.\n\nNow.",
    );
    let path = file("rows.jsonl", lines(std::slice::from_ref(&row)));
    assert_eq!(read(&path.path).format, Format::Hh);
    assert_eq!(read(&path.path).rows, std::slice::from_ref(&expected));
    assert_eq!(read_pairs(&path.path, Some(Format::Trl), "safety", false).unwrap().rows, [expected]);
}

#[test]
fn the_metric_picks_the_label_of_pku_rows() {
    let row = json!({"prompt": " How? ", "response_0": "Like this.", "response_1": "I would not. ",
        "better_response_id": 0, "safer_response_id": 1});
    let path = file("rows.json", json!([row]).to_string());
    let prompt = chat(&[("user", "How?")]);
    for (metric, chosen, rejected) in [
        ("helpfulness", "Like this.", "I would not."),
        ("harmlessness", "I would not.", "Like this."),
        ("safety", "I would not.", "Like this."),
    ] {
        let got = read_pairs(&path.path, None, metric, false).unwrap();
        assert_eq!((got.format, got.rows), (Format::Pku, vec![pair(prompt.clone(), chosen, rejected)]));
    }
    let error = read_pairs(&path.path, None, "wit", false).unwrap_err().to_string();
    assert!(error.contains("`wit`") && error.contains("`helpfulness`"), "{error}");
}

#[test]
fn a_metric_without_its_column_names_the_columns_that_exist() {
    let row = json!({"prompt": "How?", "response_0": "a", "response_1": "b", "safer_response_id": 1});
    let path = file("rows.jsonl", lines(&[row]));
    for skip_bad_rows in [false, true] {
        let error = read_pairs(&path.path, None, "helpfulness", skip_bad_rows).unwrap_err().to_string();
        for part in ["`helpfulness`", "`better_response_id`", "`safer_response_id`", "rows.jsonl"] {
            assert!(error.contains(part), "{part} is not in: {error}");
        }
    }
}

#[test]
fn format_names_round_trip() {
    for format in [Format::Trl, Format::Pku, Format::Hh] {
        assert_eq!(format.name().parse::<Format>().unwrap(), format);
        assert_eq!(serde_json::to_value(format).unwrap(), format.name());
    }
    let error = "csv".parse::<Format>().unwrap_err().to_string();
    assert!(error.contains("`csv`") && error.contains("`pku`"), "{error}");
}

#[test]
fn the_same_rows_are_read_from_every_kind_of_file() {
    let rows: Vec<Value> =
        (0..5).map(|i| json!({"prompt": format!("é {i}"), "chosen": "yes", "rejected": "no"})).collect();
    let expected = read_rows(&rows);
    let text = lines(&rows);
    let pretty = serde_json::to_string_pretty(&rows).unwrap();
    let two_members = [gzip(&text.as_bytes()[..40]), gzip(&text.as_bytes()[40..])].concat();
    let variants: [(&str, Vec<u8>); 7] = [
        ("array.json", pretty.clone().into_bytes()),
        ("array.json.gz", gzip(pretty.as_bytes())),
        ("lines.json", text.clone().into_bytes()),
        ("lines.jsonl.gz", two_members),
        ("bom.jsonl", format!("\u{feff}{text}").into_bytes()),
        ("crlf.jsonl", text.replace('\n', "\r\n").into_bytes()),
        ("no-last-newline.jsonl", text.trim_end().into()),
    ];
    for (name, bytes) in variants {
        assert_eq!(read(&file(name, bytes).path).rows, expected, "{name}");
    }
    let spaced = read(&file("spaced.jsonl", format!("\n{}", text.replace('\n', "\n\n"))).path);
    assert_eq!(spaced.rows.iter().map(|pair| pair.row).collect::<Vec<_>>(), [2, 4, 6, 8, 10]);
}

// ------------------------------------------------------------------------------------------ bad rows

/// Each bad row is named with its column when it stands on line 3, and counted when bad rows are skipped.
#[test]
fn bad_rows_are_named_or_counted() {
    let hh = |chosen: &str, rejected: &str| json!({"chosen": chosen, "rejected": rejected}).to_string();
    let good_hh = hh("\n\nHuman: Hi\n\nAssistant: Yes", "\n\nHuman: Hi\n\nAssistant: No");
    let trl = |row: Value| row.to_string();
    let good_trl = trl(json!({"prompt": "p", "chosen": "a", "rejected": "b"}));
    let user = json!({"role": "user", "content": "u"});
    let answer = json!({"role": "assistant", "content": "a"});
    let pku = |id: Value| json!({"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": id});
    let good_pku = pku(json!(0)).to_string();
    #[rustfmt::skip]
    let cases: Vec<(&str, String, &str, &str)> = vec![
        (&good_hh, "{\"chosen\": \"x".into(), "", "not one valid JSON object"),
        (&good_hh, "{} {}".into(), "", "not one valid JSON object"),
        (&good_hh, "[1, 2]".into(), "", "not a JSON object"),
        (&good_hh, "{}".into(), "chosen", "missing"),
        (&good_hh, hh("\n\nHuman: Hi\n\nAssistant: ", "\n\nHuman: Hi\n\nAssistant: No"), "chosen", "empty"),
        (&good_hh, hh("\n\nHuman: Hi\n\nAssistant: Yes", "\n\nHuman: Hi\n\nAssistant:"), "rejected", "empty"),
        (&good_hh, hh("\n\nHuman: Hi\n\nAssistant: Yes", "\n\nHuman: Hey\n\nAssistant: No"), "rejected", "differs"),
        (&good_hh, hh("\n\nHuman: Hi\n\nAssistant: Yes", "\n\nHuman: Hi\n\nAssistant: Yes "), "rejected", "the same"),
        (&good_hh, hh("\n\nHuman: Hi", "\n\nHuman: Hi\n\nAssistant: No"), "chosen", "does not end with"),
        (&good_hh, hh("Yes", "\n\nHuman: Hi\n\nAssistant: No"), "chosen", "does not start with"),
        (&good_hh, hh("", "\n\nHuman: Hi\n\nAssistant: No"), "chosen", "does not start with"),
        (&good_hh, hh("\n\nHuman: Hi\n\nHuman: You\n\nAssistant: Yes", "\n\nHuman: Hi\n\nAssistant: No"), "chosen", "alternate"),
        (&good_hh, hh("\n\nHuman: \n\nAssistant: Yes", "\n\nHuman: \n\nAssistant: No"), "chosen", "prompt is empty"),
        (&good_hh, trl(json!({"chosen": 1, "rejected": "b"})), "chosen", "expected a string, found `1`"),
        (&good_trl, trl(json!({"prompt": "p", "chosen": "a"})), "rejected", "missing; the row has `prompt`, `chosen`"),
        (&good_trl, trl(json!({"prompt": "p", "chosen": null, "rejected": "b"})), "chosen", "expected a string"),
        (&good_trl, trl(json!({"prompt": " \n", "chosen": "a", "rejected": "b"})), "prompt", "empty"),
        (&good_trl, trl(json!({"prompt": "p", "chosen": "a", "rejected": "\t"})), "rejected", "empty"),
        (&good_trl, trl(json!({"prompt": [], "chosen": "a", "rejected": "b"})), "prompt", "empty"),
        (&good_trl, trl(json!({"prompt": [user, answer], "chosen": "a", "rejected": "b"})), "prompt", "nothing to answer"),
        (&good_trl, trl(json!({"prompt": ["p"], "chosen": "a", "rejected": "b"})), "prompt", "message 1 has no `role`"),
        (&good_trl, trl(json!({"prompt": [{"role": "user", "content": ["p"]}], "chosen": "a", "rejected": "b"})), "prompt", "no `content`"),
        (&good_trl, trl(json!({"prompt": "p", "chosen": [], "rejected": [answer]})), "chosen", "does not end with"),
        (&good_trl, trl(json!({"prompt": "p", "chosen": [user], "rejected": [answer]})), "chosen", "does not end with"),
        (&good_trl, trl(json!({"prompt": [user], "chosen": [answer], "rejected": [user, answer]})), "rejected", "one message"),
        (&good_trl, trl(json!({"prompt": "p", "chosen": [answer], "rejected": "b"})), "chosen", "expected a string, found a list"),
        (&good_trl, trl(json!({"chosen": [answer], "rejected": [{"role": "assistant", "content": "b"}]})), "chosen", "prompt is empty"),
        (&good_pku, pku(json!(2)).to_string(), "better_response_id", "must be 0 or 1"),
        (&good_pku, pku(json!(-1)).to_string(), "better_response_id", "must be 0 or 1"),
        (&good_pku, pku(json!("0")).to_string(), "better_response_id", "must be 0 or 1"),
        (&good_pku, trl(json!({"prompt": "p", "response_0": "a", "response_1": "b"})), "better_response_id", "missing"),
        (&good_pku, trl(json!({"prompt": "p", "response_0": "", "response_1": "b", "better_response_id": 1})), "response_0", "empty"),
        (&good_pku, trl(json!({"prompt": 7, "response_0": "a", "response_1": "b", "better_response_id": 1})), "prompt", "string"),
    ];
    for (good, bad, column, problem) in cases {
        let path = file("rows.jsonl", format!("{good}\n{good}\n{bad}\n{good}\n"));
        let error = read_pairs(&path.path, None, "helpfulness", false).unwrap_err();
        assert!(matches!(error, engine::Error::Input(_)), "{error:?}");
        let error = error.to_string();
        assert!(error.starts_with("Line 3 of ") && error.contains("rows.jsonl"), "{error}");
        assert!(error.contains(problem) && error.contains("skip_bad_rows"), "{bad}: {error}");
        assert_eq!(error.contains(&format!("column `{column}`")), !column.is_empty(), "{column}: {error}");

        let skipped = read_pairs(&path.path, None, "helpfulness", true).unwrap();
        assert_eq!(skipped.rows.iter().map(|pair| pair.row).collect::<Vec<_>>(), [1, 2, 4]);
        assert_eq!(skipped.skipped, 1);
        let reason = skipped.first_skipped.unwrap();
        assert!(error.starts_with(&reason), "{reason}");
    }
}

#[test]
fn a_bad_element_of_an_array_is_named_by_its_number() {
    let path = file("rows.json", r#"[{"prompt": "p", "chosen": "a", "rejected": "b"}, 3]"#);
    let error = read_pairs(&path.path, None, "safety", false).unwrap_err().to_string();
    assert!(error.starts_with("Row 2 of "), "{error}");
}

#[test]
fn unusable_files_are_errors_that_say_why() {
    let text = lines(&[json!({"prompt": "p", "chosen": "a", "rejected": "b"})]).repeat(50);
    let compressed = gzip(text.as_bytes());
    let mut corrupt = compressed.clone();
    let middle = corrupt.len() / 2;
    corrupt[middle..].iter_mut().for_each(|byte| *byte ^= 0x5a);
    #[rustfmt::skip]
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty.jsonl", vec![], "no rows"),
        ("blank.jsonl", b" \n\n".to_vec(), "no rows"),
        ("empty.json", b"[]".to_vec(), "no rows"),
        ("cut.json", br#"[{"prompt": "p""#.to_vec(), "line 1 column"),
        ("cut.jsonl.gz", compressed[..compressed.len() - 9].to_vec(), "damaged"),
        ("corrupt.jsonl.gz", corrupt, "damaged"),
        ("header.jsonl.gz", compressed[..6].to_vec(), "damaged"),
        ("qa.jsonl", br#"{"question": "p", "answer": "a"}"#.to_vec(), "`question`, `answer`"),
        ("sft.jsonl", br#"{"prompt": "p", "response": "a"}"#.to_vec(), "single responses"),
        ("bad.jsonl", b"\xff\xfe\n{".to_vec(), "all its 2 rows are bad. Line 1 of"),
        ("deep.jsonl", "[".repeat(100_000).into_bytes(), "recursion limit"),
        ("deep-row.jsonl", [br#"{"a":"#.to_vec(), "[".repeat(100_000).into_bytes()].concat(), "recursion limit"),
    ];
    for (name, bytes, reason) in cases {
        let path = file(name, bytes);
        let error = read_pairs(&path.path, None, "helpfulness", true).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
        let error = error.to_string();
        assert!(error.contains(name) && error.contains(reason), "{error}");
    }
    let missing = read_pairs(Path::new("no/such/file.jsonl"), None, "helpfulness", true).unwrap_err();
    assert_eq!(missing.exit_code(), 2);
    assert!(missing.to_string().contains("no/such/file.jsonl"), "{missing}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever happens to the bytes of a file, it is read or refused; the rows that remain are sound.
    #[test]
    fn damaged_files_never_panic(
        which in 0usize..4,
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        cut in any::<prop::sample::Index>(),
    ) {
        let rows = [
            lines(&[json!({"prompt": "pé", "chosen": "a", "rejected": "b"}), json!({"prompt": "q", "chosen": "c", "rejected": "d"})]),
            lines(&[json!({"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi\n\nAssistant: No"})]),
            json!([{"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1}]).to_string(),
            lines(&[json!({"chosen": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}],
                "rejected": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "b"}]})]),
        ];
        let plain = rows[which].as_bytes().to_vec();
        for mut bytes in [gzip(&plain), plain] {
            for (index, value) in &damage {
                let index = index.index(bytes.len());
                bytes[index] = *value;
            }
            bytes.truncate(bytes.len() - cut.index(bytes.len() / 2));
            let path = file("rows.jsonl", &bytes);
            if let Ok(read) = read_pairs(&path.path, None, "helpfulness", true) {
                prop_assert!(!read.rows.is_empty());
                for pair in read.rows {
                    prop_assert!(!pair.chosen.trim().is_empty() && !pair.rejected.trim().is_empty());
                    prop_assert!(pair.chosen != pair.rejected);
                }
            }
            let _ = read_prompts(&path.path);
        }
    }
}

// ------------------------------------------------------------------------------------------- prompts

#[test]
fn prompts_come_from_json_and_from_text() {
    let rows = [json!({"prompt": "One?", "category": "x"}), json!({"prompt": [{"role": "user", "content": "Two?"}]})];
    let expected = [Prompt::Text("One?".into()), chat(&[("user", "Two?")])];
    assert_eq!(read_prompts(&file("p.jsonl", lines(&rows)).path).unwrap(), expected);
    assert_eq!(read_prompts(&file("p.json", json!(rows).to_string()).path).unwrap(), expected);

    let text = "\u{feff}One?\r\n\n  {Two}? \n";
    let expected = [Prompt::Text("One?".into()), Prompt::Text("  {Two}? ".into())];
    assert_eq!(read_prompts(&file("p.txt", text).path).unwrap(), expected);
    assert_eq!(read_prompts(&file("P.TXT.gz", gzip(text.as_bytes())).path).unwrap(), expected);
}

#[test]
fn prompts_keep_their_category() {
    let rows = [
        json!({"prompt": "One?", "category": "x"}),
        json!({"prompt": "Two?", "dataset": "y", "category": 3}),
        json!({"prompt": "Three?"}),
    ];
    let read = read_categorised_prompts(&file("p.jsonl", lines(&rows)).path).unwrap();
    let categories: Vec<Option<&str>> = read.iter().map(|row| row.category.as_deref()).collect();
    assert_eq!(categories, [Some("x"), Some("y"), None]);
    assert_eq!(read[2].prompt, Prompt::Text("Three?".into()));
}

#[test]
fn a_prompt_is_a_text_to_read() {
    for (prompt, expected) in [
        (Prompt::Text("One?".into()), "One?"),
        (chat(&[("system", "Be brief."), ("user", "One?")]), "One?"),
        (
            chat(&[("user", "One?"), ("assistant", "Yes."), ("user", "Two?")]),
            "user:\nOne?\n\nassistant:\nYes.\n\nuser:\nTwo?",
        ),
    ] {
        assert_eq!(prompt.text(), expected);
    }
}

#[test]
fn bad_prompts_are_named() {
    for (name, bytes, reason) in [
        ("p.jsonl", &b"{\"prompt\": \"a\"}\n{\"question\": \"b\"}"[..], "Line 2 of"),
        ("p.json", b"[{\"prompt\": \"\"}]", "column `prompt`: the prompt is empty"),
        ("p.txt", b"one\ntw\xffo", "Line 2 of"),
        ("p.txt", b"\n \n", "no rows"),
    ] {
        let error = read_prompts(&file(name, bytes).path).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
}

#[test]
fn the_evaluation_prompts_are_read() {
    for (name, count) in [("small/helpful_problem.json", 129), ("small/safety_problem.json", 83)] {
        if let Some(path) = shared(name) {
            assert_eq!(read_prompts(&path).unwrap().len(), count);
        }
    }
}

// ----------------------------------------------------------------------------------------- real files

#[test]
fn pku_rows_serve_both_metrics() {
    let Some(path) = shared("small/pku-saferlhf-32rows.json") else { return };
    let rows: Vec<Value> = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let [helpful, harmless] =
        ["helpfulness", "harmlessness"].map(|metric| read_pairs(&path, None, metric, false).unwrap());
    assert_eq!((helpful.format, rows.len(), helpful.rows.len(), harmless.rows.len()), (Format::Pku, 32, 32, 32));
    let mut opposite = 0;
    for (index, row) in rows.iter().enumerate() {
        for (read, label) in
            [(&helpful.rows[index], "better_response_id"), (&harmless.rows[index], "safer_response_id")]
        {
            let chosen = row[label].as_u64().unwrap();
            let response = |k: u64| row[format!("response_{k}")].as_str().unwrap().trim().to_owned();
            let is_unsafe = |k: u64| !row[format!("is_response_{k}_safe")].as_bool().unwrap();
            let expected = PreferencePair {
                is_unsafe: Some([is_unsafe(chosen), is_unsafe(1 - chosen)]),
                row: index + 1,
                ..pair(
                    chat(&[("user", row["prompt"].as_str().unwrap().trim())]),
                    &response(chosen),
                    &response(1 - chosen),
                )
            };
            assert_eq!(*read, expected, "row {}, {label}", index + 1);
        }
        opposite += usize::from(row["better_response_id"] != row["safer_response_id"]);
    }
    assert_eq!(opposite, 19);
}

/// The counts of bad rows were found with a separate script: conversations that differ before the last turn, empty or
/// equal answers, and two turns of the assistant in a row.
#[test]
fn every_real_row_is_read_or_named() {
    for (name, rows, pairs) in
        [("hh-helpful-base", 1792, 1780), ("hh-harmless-base", 1890, 1879), ("pku-saferlhf-safety-pairs", 4088, 4088)]
    {
        let Some(path) = shared(&format!("real-text/{name}.train.jsonl.gz")) else { continue };
        let file = read_pairs(&path, None, "harmlessness", true).unwrap();
        assert_eq!((file.rows.len(), file.skipped), (pairs, rows - pairs), "{name}: {:?}", file.first_skipped);
        match read_pairs(&path, None, "harmlessness", false) {
            Ok(strict) => assert_eq!((strict.rows.len(), file.skipped), (rows, 0)),
            Err(error) => {
                let first = file.first_skipped.as_deref().unwrap();
                assert!(error.to_string().starts_with(first), "{error}");
            }
        }
    }
}

#[test]
fn real_pairs_are_split_by_first_turn() {
    let Some(path) = shared("real-text/hh-helpful-base.train.jsonl.gz") else { return };
    let pairs = read_pairs(&path, None, "helpfulness", true).unwrap().rows;
    let total = pairs.len();
    let (train, validation) = split(pairs, 0.1, 7);
    assert_eq!(train.len() + validation.len(), total);
    assert!((0.07..0.13).contains(&(validation.len() as f64 / total as f64)), "{}", validation.len());
    let openings = |pairs: &[PreferencePair]| -> HashSet<String> {
        pairs
            .iter()
            .map(|pair| match &pair.prompt {
                Prompt::Chat(messages) => messages[0].content.clone(),
                Prompt::Text(text) => text.clone(),
            })
            .collect()
    };
    assert!(openings(&train).is_disjoint(&openings(&validation)));
}

// --------------------------------------------------------------------------------------------- split

fn split(pairs: Vec<PreferencePair>, fraction: f64, seed: u64) -> (Vec<PreferencePair>, Vec<PreferencePair>) {
    pairs.into_iter().partition(|pair| !is_held_out(pair, fraction, seed))
}

fn numbered(count: usize) -> Vec<PreferencePair> {
    (0..count)
        .map(|row| PreferencePair { row, ..pair(chat(&[("user", &format!("q{}", row / 3))]), "a", "b") })
        .collect()
}

fn rows(pairs: &[PreferencePair]) -> Vec<usize> {
    pairs.iter().map(|pair| pair.row).collect()
}

#[test]
fn the_side_of_a_pair_depends_on_its_first_turn_and_the_seed_alone() {
    let (train, validation) = split(numbered(3000), 0.2, 1);
    assert!((500..700).contains(&validation.len()), "{}", validation.len());
    for group in [&train, &validation] {
        assert!(rows(group).chunks(3).all(|rows| rows[0] % 3 == 0 && rows[2] == rows[0] + 2));
    }
    let mut reversed = numbered(3000);
    reversed.reverse();
    let (_, mut other) = split(reversed.split_off(1000), 0.2, 1);
    other.reverse();
    let kept: Vec<_> = rows(&validation).into_iter().filter(|row| *row < 2000).collect();
    assert_eq!(rows(&other), kept);
    assert_ne!(rows(&split(numbered(3000), 0.2, 2).1), rows(&validation));
    // A larger fraction holds out the same pairs and more.
    let larger: HashSet<_> = rows(&split(numbered(3000), 0.4, 1).1).into_iter().collect();
    assert!(rows(&validation).iter().all(|row| larger.contains(row)));
    assert_eq!(split(numbered(30), 0.0, 1).1, []);
}

#[test]
fn the_first_human_turn_is_found_in_every_kind_of_prompt() {
    let same = [
        chat(&[("user", "Hello there")]),
        chat(&[("system", "Be brief."), ("user", " Hello there ")]),
        chat(&[("user", "Hello there"), ("assistant", "Hi"), ("user", "Bye")]),
        Prompt::Text("Hello there\n".into()),
        Prompt::Text("\n\nHuman: Hello there\n\nAssistant: Hi\n\nHuman: Bye\n\nAssistant:".into()),
    ];
    for seed in 0..20 {
        let (train, validation) = split(same.iter().map(|prompt| pair(prompt.clone(), "a", "b")).collect(), 0.5, seed);
        assert!(train.is_empty() || validation.is_empty(), "seed {seed}");
    }
}
