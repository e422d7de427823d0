//! Kinds of files: zstd, Parquet, several files, CSV; and what becomes of damaged ones.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/parquet.rs"]
mod parquet_file;

use std::path::Path;

use ::parquet::basic::{Compression, GzipLevel, ZstdLevel};
use align::data::{Format, PreferencePair, Prompt, files, read_examples, read_pairs, read_prompts, read_records};
use common::{chat, file, gzip, lines, pair, shared};
use parquet_file::parquet;
use proptest::prelude::*;
use serde_json::{Value, json};

fn zstd(bytes: &[u8]) -> Vec<u8> {
    ::zstd::encode_all(bytes, 3).unwrap()
}

fn pairs(count: usize) -> Vec<Value> {
    (0..count).map(|i| json!({"prompt": format!("é {i}"), "chosen": format!("yes {i}"), "rejected": "no"})).collect()
}

fn read(path: &Path) -> Vec<PreferencePair> {
    read_pairs(path, None, "helpfulness", false).unwrap().rows
}

fn error(path: &Path) -> String {
    let error = read_pairs(path, None, "helpfulness", true).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{error}");
    error.to_string()
}

// ---------------------------------------------------------------------------------------------- zstd

#[test]
fn zstd_is_known_by_its_first_bytes() {
    let text = lines(&pairs(5));
    let expected = read(&file("rows.jsonl", &text).path);
    let array = zstd(json!(pairs(5)).to_string().as_bytes());
    let two_frames = [zstd(&text.as_bytes()[..40]), zstd(&text.as_bytes()[40..])].concat();
    for (name, bytes) in [("rows.jsonl.zst", two_frames), ("rows.json", array)] {
        assert_eq!(read(&file(name, bytes).path), expected, "{name}");
    }
    assert_eq!(read_prompts(&file("p.txt.zst", zstd(b"One?\n")).path).unwrap(), [Prompt::Text("One?".into())]);
}

#[test]
fn damaged_streams_say_where_they_end() {
    // more than a block of zstd, so that something is decoded
    let text = lines(&pairs(20_000));
    for (compression, whole) in [("gzip", gzip(text.as_bytes())), ("zstd", zstd(text.as_bytes()))] {
        let mut corrupt = whole.clone();
        let middle = corrupt.len() / 2;
        corrupt[middle..middle + 64].fill(0x5a);
        for bytes in [&whole[..whole.len() - 3], &whole[..middle], &corrupt] {
            let error = error(&file("rows.jsonl.z", bytes).path);
            let parts = error.split_once(&format!("rows.jsonl.z is damaged: its {compression} data")).expect(&error);
            let count: usize = parts.1.split_once(" after ").unwrap().1.split(' ').next().unwrap().parse().unwrap();
            // a corrupt stream may give any bytes until its checksum is seen to differ
            assert!(count > 100_000 && (count <= text.len() || bytes == corrupt), "{error}");
        }
    }
}

// ------------------------------------------------------------------------------------------- Parquet

#[test]
fn parquet_rows_are_those_of_json() {
    let rows = pairs(25);
    let expected = read(&file("rows.jsonl", lines(&rows)).path);
    for compression in [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::GZIP(GzipLevel::default()),
        Compression::ZSTD(ZstdLevel::default()),
    ] {
        for group in [1, 10, 25] {
            // the content decides, not the name
            let parquet = file("rows.bin", parquet(&rows, group, compression));
            assert_eq!(read(&parquet.path), expected, "{compression} {group}");
        }
    }
}

#[test]
fn parquet_columns_have_their_json_values() {
    let row = |value: Value| json!({"text": "é", "count": 3, "share": 0.1, "flag": true, "list": value});
    let message = json!({"content": "c", "role": "user"});
    let mut rows = vec![row(json!([message, message])), row(json!([])), row(json!([message]))];
    rows.push(json!({"text": null, "count": null, "share": null, "flag": null, "list": null}));
    let file = file("rows.parquet", parquet(&rows, 3, Compression::SNAPPY));
    let records = read_records(&file.path).unwrap();
    let read: Vec<Value> = records.iter().map(|record| json!(record.columns)).collect();
    assert_eq!(read, rows);
    assert!(records[3].place.starts_with("Row 4 of ") && records[3].place.ends_with("rows.parquet"));
}

/// Columns as in UltraFeedback-binarized; the texts are made up.
fn ultrafeedback() -> Value {
    let turn = |role: &str, content: &str| json!({"content": content, "role": role});
    let chosen = json!([turn("user", "Name a prime."), turn("assistant", "Seven.")]);
    let rejected = json!([turn("user", "Name a prime."), turn("assistant", "Nine.")]);
    json!({"prompt": "Name a prime.", "prompt_id": "0f3a", "chosen": chosen, "rejected": rejected, "messages": chosen,
        "score_chosen": 8.5, "score_rejected": 2.0})
}

#[test]
fn ultrafeedback_is_known_by_its_columns() {
    let row = ultrafeedback();
    let expected = pair(chat(&[("user", "Name a prime.")]), "Seven.", "Nine.");
    for bytes in [lines(std::slice::from_ref(&row)).into_bytes(), parquet(&[row], 1, Compression::SNAPPY)] {
        let file = file("train_prefs", bytes);
        let read = read_pairs(&file.path, None, "helpfulness", false).unwrap();
        assert_eq!((read.format, read.rows), (Format::Trl, vec![expected.clone()]));
        let examples = read_examples(&file.path, None, "helpfulness", false).unwrap().rows;
        assert_eq!(examples.iter().map(|example| example.desirable).collect::<Vec<_>>(), [true, false]);
        assert_eq!(read_prompts(&file.path).unwrap(), [Prompt::Text("Name a prime.".into())]);
    }
}

#[test]
fn bad_rows_of_parquet_are_named_or_counted() {
    let mut rows = pairs(4);
    rows[2]["rejected"] = Value::Null;
    let file = file("rows.parquet", parquet(&rows, 2, Compression::SNAPPY));
    let error = read_pairs(&file.path, None, "helpfulness", false).unwrap_err().to_string();
    for part in ["Row 3 of ", "rows.parquet, column `rejected`", "found `null`", "skip_bad_rows"] {
        assert!(error.contains(part), "{part} is not in: {error}");
    }
    let skipped = read_pairs(&file.path, None, "helpfulness", true).unwrap();
    assert_eq!((skipped.skipped, skipped.rows.len(), skipped.places.of(skipped.rows[2].row)), {
        (1, 3, format!("Row 4 of {}", file.path.display()))
    });
}

#[test]
fn unusable_parquet_files_are_errors_that_say_why() {
    let whole = parquet(&pairs(40), 20, Compression::SNAPPY);
    let mut corrupt = whole.clone();
    corrupt[40..200].fill(0xff);
    // values that are no text, where they are stored: the first page of a column is its dictionary, uncompressed
    let not_utf8 = |rows: &[Value], text: &str| {
        let mut bytes = parquet(rows, 1, Compression::UNCOMPRESSED);
        let at = bytes.windows(text.len()).position(|found| found == text.as_bytes()).unwrap();
        bytes[at] = 0xff;
        bytes
    };
    let latin = not_utf8(&pairs(2), "yes 1");
    let message = |content: &str| json!([{"content": content, "role": "assistant"}]);
    let nested =
        not_utf8(&[json!({"prompt": "p", "chosen": message("a"), "rejected": message("of no use")})], "of no use");
    let foreign = [json!({"image": "a", "caption": "b"})];
    let numbers = [json!({"prompt": "p", "chosen": 1, "rejected": 2})];
    #[rustfmt::skip]
    let cases = [
        ("cut.parquet", whole[..whole.len() - 9].to_vec(), &["cut.parquet cannot be read"][..]),
        ("header.parquet", whole[..9].to_vec(), &["header.parquet cannot be read"]),
        ("corrupt.parquet", corrupt, &["Row 1 of ", "corrupt.parquet, column `prompt`, cannot be read"]),
        ("latin.parquet", latin, &["Row 2 of ", "latin.parquet, column `chosen`, cannot be read", "String"]),
        ("nested.parquet", nested, &["Row 1 of ", "nested.parquet, column `rejected`, cannot be read", "String"]),
        ("foreign.parquet", parquet(&foreign, 1, Compression::SNAPPY), &["foreign.parquet are no preference pairs", "`image`, `caption`"]),
        ("numbers.parquet", parquet(&numbers, 1, Compression::SNAPPY), &["Row 1 of ", "column `chosen`", "found `1`"]),
        ("rows.parquet.gz", gzip(&whole), &["Parquet file inside gzip", "Decompress"]),
    ];
    for (name, bytes, parts) in cases {
        let error = error(&file(name, bytes).path);
        for part in parts {
            assert!(error.contains(part), "{part} is not in: {error}");
        }
    }
}

// ------------------------------------------------------------------------------------- several files

#[test]
fn folders_and_patterns_are_their_files_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let rows = pairs(6);
    std::fs::write(at("train-1.jsonl"), format!("\n{}", lines(&rows[2..4]))).unwrap();
    std::fs::write(at("train-0.parquet"), parquet(&rows[..2], 1, Compression::SNAPPY)).unwrap();
    std::fs::write(at("train-2.json.zst"), zstd(json!(&rows[4..]).to_string().as_bytes())).unwrap();
    std::fs::write(at("test-0.jsonl"), lines(&pairs(1))).unwrap();
    std::fs::write(at(".train-3.jsonl.part"), "{").unwrap();
    std::fs::create_dir(at("train-old")).unwrap();

    let train = read_pairs(&at("train-*"), None, "helpfulness", false).unwrap();
    let texts: Vec<&str> = train.rows.iter().map(|pair| pair.chosen.as_str()).collect();
    assert_eq!(texts, ["yes 0", "yes 1", "yes 2", "yes 3", "yes 4", "yes 5"]);
    // numbers differ, and lead back to the line
    assert_eq!(train.rows.iter().map(|pair| pair.row).collect::<Vec<_>>(), [1, 2, 4, 5, 6, 7]);
    let places: Vec<String> = train.rows.iter().map(|pair| train.places.of(pair.row)).collect();
    let place = |name: &str, unit: &str, row: usize| format!("{unit} {row} of {}", at(name).display());
    assert_eq!(
        places[1..5],
        [
            place("train-0.parquet", "Row", 2),
            place("train-1.jsonl", "Line", 2),
            place("train-1.jsonl", "Line", 3),
            place("train-2.json.zst", "Row", 1),
        ]
    );
    // files of two splits are not mixed unless a pattern says so
    let error = read_pairs(folder.path(), None, "helpfulness", false).unwrap_err().to_string();
    assert!(error.contains("several splits") && error.contains("test-0.jsonl") && error.contains("*train*"), "{error}");
    assert_eq!(read(&at("*")).len(), 7);
    std::fs::remove_file(at("test-0.jsonl")).unwrap();
    std::fs::write(at("README.md"), "about the data").unwrap();
    assert_eq!(read(folder.path()), train.rows);

    // a star may stand in a name
    std::fs::write(at("train-*"), lines(&pairs(1))).unwrap();
    assert_eq!(files(&at("train-*")).unwrap(), [at("train-*")]);
    std::fs::remove_file(at("train-*")).unwrap();

    std::fs::write(at("train-9.jsonl"), "\n{\"prompt\": \"p\"}\n").unwrap();
    let error = read_pairs(&at("train-*"), None, "helpfulness", false).unwrap_err().to_string();
    assert!(error.starts_with(&place("train-9.jsonl", "Line", 2)), "{error}");
    assert!(error.contains("column `chosen`"), "{error}");
    for (path, reason) in [("dev-*", "No file matches"), ("train-old", "holds no files"), ("none/*", "Check the path")]
    {
        let failed = read_pairs(&at(path), None, "helpfulness", true).unwrap_err();
        assert_eq!(failed.exit_code(), 2);
        let failed = failed.to_string();
        assert!(failed.contains(reason) && failed.contains(path.trim_end_matches("/*")), "{failed}");
    }
}

// ---------------------------------------------------------------------------------------------- CSV

#[test]
fn csv_files_hold_prompts() {
    let text = "\u{feff}id,prompt\r\n1,\"One, \"\"two\"\"?\r\nThree?\"\r\n\r\n2,Four?\r\n";
    let expected = ["One, \"two\"?\r\nThree?", "Four?"].map(|text| Prompt::Text(text.into()));
    assert_eq!(read_prompts(&file("p.csv", text).path).unwrap(), expected);
    assert_eq!(read_prompts(&file("P.CSV.gz", gzip(text.as_bytes())).path).unwrap(), expected);
    for (text, parts) in [
        (&b"question\nWhy?\n"[..], &["Line 2 of ", "column `prompt`", "the row has `question`"][..]),
        (b"id,prompt\n1,a\n2\n", &["Line 3 of ", "the row has 1 values, but the first row names 2"]),
        (b"id,prompt\n1,a\n2,\"b\n3,c\n", &["Line 3 of ", "quotation mark is not closed"]),
        (b"prompt\na\n\xff\n", &["Line 3 of ", "not UTF-8"]),
        (b"\xff\na\n", &["Line 1 of ", "not UTF-8"]),
        (b"prompt\n\" \"\n", &["Line 2 of ", "the prompt is empty"]),
        (b"prompt\n", &["no rows"]),
        (b"", &["no rows"]),
    ] {
        let error = read_prompts(&file("p.csv", text).path).unwrap_err().to_string();
        for part in [&["p.csv"], parts].concat() {
            assert!(error.contains(part), "{part} is not in: {error}");
        }
    }
    let error = error(&file("pairs.csv", "prompt,chosen,rejected\n").path);
    assert!(error.contains("pairs.csv is a CSV file") && error.contains("JSON lines or Parquet"), "{error}");
}

// ---------------------------------------------------------------------------------------- demonstrations

#[test]
fn responses_without_labels_are_demonstrations() {
    let user = json!({"role": "user", "content": "Hi"});
    let answer = json!({"role": "assistant", "content": "Yes"});
    let first = json!({"prompt": "Hi", "completion": [answer]});
    let rows = [
        first.clone(),
        json!({"messages": [user, answer]}),
        json!({"prompt": "The sky", "completion": " is blue."}),
        json!({"prompt": " Hi\n", "response": " Yes ", "label": null}),
        json!({"prompt": [user], "response": "Yes"}),
    ];
    let file_of = |rows: &[Value]| file("sft.jsonl", lines(rows));
    let read = read_examples(&file_of(&rows).path, None, "helpfulness", false).unwrap();
    assert_eq!(read.format, Format::Sft);
    let found: Vec<_> = read.rows.iter().map(|row| (&row.prompt, row.completion.as_str(), row.desirable)).collect();
    let (conversation, text) = (chat(&[("user", "Hi")]), Prompt::Text("The sky".into()));
    let yes = (&conversation, "Yes", true);
    assert_eq!(found, [yes, yes, (&text, " is blue.", true), yes, yes]);
    let error = read_pairs(&file_of(&rows).path, None, "helpfulness", false).unwrap_err().to_string();
    assert!(error.contains("single responses"), "{error}");

    for (bad, column, problem) in [
        (json!({"prompt": "p", "completion": "c", "label": false}), "label", "Give the format `unpaired`"),
        (json!({"prompt": "p", "completion": " "}), "completion", "empty"),
        (json!({"completion": "c"}), "prompt", "missing"),
        (json!({"prompt": "p", "response": "a", "label": true}), "label", "Give the format `unpaired`"),
        (json!({"prompt": "p", "response": "\n"}), "response", "empty"),
        (json!({"prompt": "p", "response": [answer]}), "response", "expected a string, found a list"),
        (json!({"response": "a"}), "prompt", "missing"),
        (json!({"messages": "text"}), "messages", "expected a list of messages, found a string"),
        (json!({"messages": [user]}), "messages", "does not end with"),
        (json!({"messages": [answer]}), "messages", "the prompt is empty"),
        (json!({"messages": [user, answer, answer]}), "messages", "nothing to answer"),
        (json!({"messages": [user, {"role": "assistant", "content": ""}]}), "messages", "the response is empty"),
        (json!({"prompt": "p"}), "messages", "missing"),
    ] {
        let file = file_of(&[first.clone(), bad]);
        let error = read_examples(&file.path, None, "helpfulness", false).unwrap_err().to_string();
        assert!(error.starts_with("Line 2 of ") && error.contains(&format!("column `{column}`")), "{error}");
        assert!(error.contains(problem), "{error}");
    }
}

#[test]
fn questions_with_a_response_are_known_by_their_columns() {
    let format = |row: Value| read_examples(&file("rows.jsonl", lines(&[row])).path, None, "helpfulness", false);
    let read = format(json!({"prompt": "p", "response": "a", "label": null})).unwrap();
    assert_eq!((read.format, read.rows[0].prompt.clone()), (Format::Sft, chat(&[("user", "p")])));
    // what a label says of a response, nobody knows
    let error = format(json!({"prompt": "p", "response": "a", "label": 1})).unwrap_err().to_string();
    assert!(error.contains("the columns are `prompt`, `response`, `label`"), "{error}");

    let Some(path) = shared("real-text/pku-safe-sft.train.jsonl.gz") else { return };
    let read = read_examples(&path, None, "harmlessness", false).unwrap();
    assert_eq!((read.format, read.rows.len()), (Format::Sft, 4215));
    assert!(
        read.rows.iter().all(|row| row.desirable && matches!(&row.prompt, Prompt::Chat(turns) if turns.len() == 1))
    );
}

// ----------------------------------------------------------------------------------------- mutations

#[derive(Debug, Clone)]
enum Mutation {
    /// The column of the second row is taken away, or has another value.
    Column(Option<Value>),
    /// The second row as text is broken.
    Text(&'static [u8]),
    /// Bytes are changed, then the file is cut to this share.
    Bytes(Vec<(prop::sample::Index, u8)>, f64),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let wrong = prop::sample::select(vec![json!(null), json!(1), json!(true), json!({}), json!([1]), json!(" ")]);
    prop_oneof![
        prop::option::of(wrong).prop_map(Mutation::Column),
        prop::sample::select(vec![
            &b"NaN"[..],
            b"{\"prompt\": NaN}",
            b"\xff\xfe",
            b"{\"prompt\": \"\xc3\"}",
            b"[",
            b"\0"
        ])
        .prop_map(Mutation::Text),
        (prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4), 0.0..1.0f64)
            .prop_map(|(damage, keep)| Mutation::Bytes(damage, (2.0 * keep).min(1.0))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Whatever is wrong with a file, the error names it, and the row and the column that are wrong.
    #[test]
    fn mutated_files_are_read_or_named(
        mutation in mutation(),
        kind in 0usize..6,
        column in prop::sample::select(vec!["prompt", "chosen", "rejected"]),
        huge in any::<bool>(),
    ) {
        let mut rows = pairs(4);
        if huge {
            rows[0]["chosen"] = "y".repeat(200_000).into();
        }
        let mut text = None;
        let mut of_row = None;
        match &mutation {
            // a column of Parquet has one type, so there only nulls
            Mutation::Column(value) if kind != 5 || value.as_ref().is_some_and(|value| value.is_null()) => {
                match value {
                    Some(value) => rows[1][column] = value.clone(),
                    None => _ = rows[1].as_object_mut().unwrap().remove(column),
                }
                // strings without a prompt are transcripts
                of_row = Some(Some(if value.is_none() && column == "prompt" { "chosen" } else { column }));
            }
            Mutation::Text(bad) if kind < 3 => {
                let line = |row: &Value| format!("{row}\n").into_bytes();
                text = Some([line(&rows[0]), bad.to_vec(), b"\n".to_vec(), line(&rows[2])].concat());
                of_row = Some(None);
            }
            _ => {}
        }
        let text = text.unwrap_or_else(|| lines(&rows).into_bytes());
        let mut bytes = match kind {
            0 => text,
            1 => gzip(&text),
            2 => zstd(&text),
            3 => json!(rows).to_string().into_bytes(),
            4 => gzip(json!(rows).to_string().as_bytes()),
            _ => parquet(&rows, 2, Compression::SNAPPY),
        };
        let mut cut = false;
        if let Mutation::Bytes(damage, keep) = &mutation {
            for (index, value) in damage {
                let index = index.index(bytes.len());
                bytes[index] = *value;
            }
            let length = (bytes.len() as f64 * keep) as usize;
            // without the end, these are never whole
            cut = damage.is_empty() && length < bytes.len() - 1 && length > 4 && kind != 0;
            bytes.truncate(length);
        }
        let file = file("mutated.data", bytes);
        let (strict, lax) =
            (read_pairs(&file.path, None, "helpfulness", false), read_pairs(&file.path, None, "helpfulness", true));
        if let Err(error) = &strict {
            let error = error.to_string();
            prop_assert!(error.contains("mutated.data"), "{error}");
        }
        if let Some(column) = of_row {
            let error = strict.unwrap_err().to_string();
            prop_assert!(error.starts_with("Line 2 of ") || error.starts_with("Row 2 of "), "{error}");
            prop_assert_eq!(error.contains(", column `"), column.is_some(), "{}", error);
            prop_assert!(column.is_none_or(|column| error.contains(&format!(", column `{column}`"))), "{error}");
            prop_assert_eq!(lax.unwrap().skipped, 1);
        } else if cut {
            prop_assert!(lax.is_err());
        }
        let _ = (read_prompts(&file.path), read_examples(&file.path, None, "safety", true), read_records(&file.path));
    }
}
