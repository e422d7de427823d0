//! `sacpo data`: rows as the model sees them, what a file holds in numbers, and files written again.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::path::Path;

use common::*;
use serde_json::{Value, json};

/// Pairs of the world: the third repeats the first, the fourth contradicts it.
fn pairs(folder: &tempfile::TempDir) -> String {
    let row = |chosen: &str, rejected: &str| json!({"prompt": "how do i", "chosen": chosen, "rejected": rejected});
    let (long, short) = ("read a book . good luck !", "it depends .");
    let rows = [row(long, short), row("ask a friend .", short), row(long, short), row(short, long)];
    let lines: Vec<String> = rows.iter().map(Value::to_string).chain(["{\"prompt\": \"x\"}".into()]).collect();
    file(folder, "pairs.jsonl", lines.join("\n"))
}

#[test]
fn rows_are_shown_as_the_model_sees_them() {
    let folder = folder();
    let path = pairs(&folder);
    let base = material().base();
    let outcome = done(&["data", "inspect", &path, "--model", &base]);
    says(&outcome.stderr, &["1 rows are bad", "Line 5 of", "column `chosen`"]);
    says(&outcome.stdout, &["row 1", "row 3"]);
    let arguments = ["data", "inspect", &path, "--model", &base, "--from", "2", "--rows", "1", "--max-length", "7"];
    let shown = json(&arguments);
    assert_eq!(shown["rows"].as_array().unwrap().len(), 1, "{shown}");
    let row = &shown["rows"][0];
    assert_eq!(row["row"], 2);
    let part = |index: usize| {
        let part = &row["parts"][index];
        let tokens = part["tokens"].as_array().unwrap().len();
        (part["role"].as_str().unwrap(), part["text"].as_str().unwrap(), tokens, part["complete"].as_bool().unwrap())
    };
    // <s> how do i | ask a friend (. </s> are cut) | it depends . (</s> is cut)
    assert_eq!(part(0), ("prompt", "<s> how do i", 4, false));
    assert_eq!(part(1), ("chosen", "ask a friend", 3, false));
    assert_eq!(part(2), ("rejected", "it depends .", 3, false));
    let page = done(&arguments).stdout;
    says(&page, &["row 2", "prompt (4 tokens)\n    <s> how do i", "chosen (3 tokens, without end)\n    ask a friend"]);
    assert!(!page.contains('\u{1b}'), "colours where nobody sees them: {page:?}");

    let single = json(&["data", "inspect", &path, "--model", &base, "--objective", "kto", "--rows", "2"]);
    let labels = |index: usize| single["rows"][index]["parts"][1]["role"].clone();
    assert_eq!([labels(0), labels(1)], [json!("desirable"), json!("undesirable")]);
    assert_eq!(single["rows"][1]["parts"][1]["text"], "it depends . </s>");
    says(&fails(2, &["data", "inspect", &path, "--model", &base, "--from", "9"]), &["no row from row 9 on", "--from"]);
}

#[test]
fn a_file_is_counted() {
    let folder = folder();
    let path = pairs(&folder);
    let counts = json(&["data", "stats", &path]);
    assert_eq!(
        counts["counts"],
        json!({"rows": 4, "prompts": 1, "duplicates": 1, "contradictions": 1, "chosen_is_longer": 3, "flagged": 0,
            "safe": [0, 0]})
    );
    assert_eq!(
        (&counts["format"], &counts["bad_rows"], &counts["unit"]),
        (&json!("trl"), &json!(1), &json!("characters"))
    );
    says(counts["first_bad_row"].as_str().unwrap(), &["Line 5 of"]);
    assert_eq!(counts["lengths"]["chosen"]["quantiles"], json!([12, 14, 25, 25, 25]));

    let counts = json(&["data", "stats", &path, "--model", &material().base()]);
    assert_eq!(counts["lengths"]["prompt"]["quantiles"], json!([4, 4, 4, 4, 4]));
    assert_eq!(
        counts["lengths"]["chosen"]["histogram"].as_array().unwrap().iter().filter_map(Value::as_u64).sum::<u64>(),
        4
    );
    // four prompts of 4 tokens; responses of 8, 5 and 4 tokens, </s> included
    let responses = 3 * (8 + 4) + (5 + 4);
    let (once, apart) = (4 * 4 + responses, 2 * 4 * 4 + responses);
    let saved = counts["saved_by_sharing_prompts"].as_f64().unwrap();
    assert!((saved - (1.0 - f64::from(once) / f64::from(apart))).abs() < 1e-12, "{saved}");
    let page = done(&["data", "stats", &path, "--model", &material().base()]).stdout;
    says(
        &page,
        &[
            "pairs                        4",
            "chosen has more characters   3 (75.0 %)",
            "tokens saved by sharing prompts",
        ],
    );

    let single = json(&["data", "stats", &path, "--objective", "kto"]);
    assert_eq!(
        single["counts"],
        json!({"rows": 8, "prompts": 1, "desirable": 4, "duplicates": 3, "contradictions": 2})
    );
}

#[test]
fn a_model_can_be_given_the_template_of_a_text() {
    let folder = folder();
    let model = folder.path().join("model");
    std::fs::create_dir(&model).unwrap();
    for (name, bytes) in files(material().base()) {
        std::fs::write(model.join(name), bytes).unwrap();
    }
    let model = text(&model);
    let row = json!({"prompt": [{"role": "user", "content": "how do i"}], "chosen": [{"role": "assistant", "content": " ask a friend ."}],
        "rejected": [{"role": "assistant", "content": " it depends ."}]});
    let rows = file(&folder, "rows.jsonl", row.to_string());
    let inspect = ["data", "inspect", &rows, "--model", &model];
    says(&fails(2, &inspect), &["no chat template", "chat_template.jinja"]);
    let set = |template: &str| ["model", "set-template", &model, template].map(str::to_owned);
    let template = "hello ! {prompt} ?";
    done(&set(template));
    done(&set(template));
    let part = |index: usize| json(&inspect)["rows"][0]["parts"][index]["text"].clone();
    assert_eq!([part(0), part(1)], [json!("<s> hello ! how do i ?"), json!("ask a friend . </s>")]);
    says(&fails(2, &set("another {prompt}")), &["chat_template.jinja", "another template"]);
    says(&fails(2, &set("no place")), &["{prompt}", "once"]);
    let nowhere = ["model", "set-template", "nowhere", template];
    fails(2, &nowhere);
}

#[test]
fn a_step_leaves_out_what_repeats_and_what_is_evaluated() {
    let folder = folder();
    let row = |prompt: &str, chosen: &str| {
        json!({"prompt": prompt, "chosen": chosen, "rejected": "it depends ."}).to_string()
    };
    let one = [row("how do i", "ask a friend ."), row("how can i", "read a book ."), row("how do i", "ask a friend .")];
    let path = file(&folder, "rows.jsonl", one.join("\n"));
    let prompts = file(&folder, "evaluation.txt", "  How CAN  i\n");
    let base = material().base();
    let train = |out: &str, settings: &[&str]| {
        let out = at(&folder, out);
        let head = ["train", "--model", &base, "--data", &path, "--metric", "x", "--beta", "1", "--out", &out];
        let fixed = ["--set", "data.validation_fraction=0", "--set", "train.batch_size=1"];
        let settings: Vec<&str> = settings.iter().flat_map(|setting| ["--set", *setting]).collect();
        done(&[&head[..], &fixed, &settings].concat()).stderr
    };
    says(&train("all", &["data.max_length=40"]), &["3 pairs to train on"]);
    let exclude = format!("data.exclude_prompts=[{prompts:?}]");
    let told = train("some", &["data.max_length=40", "data.deduplicate=true", &exclude]);
    says(
        &told,
        &[
            "1 rows left out, since they repeat others",
            "1 rows left out, since their prompts are held out or among",
            "1 pairs to train on",
        ],
    );
}

#[test]
fn the_metrics_of_pku_rows_disagree_where_the_better_answer_is_not_the_safer_one() {
    let Some(path) = shared("small/pku-saferlhf-32rows.json") else { return };
    for (metric, other) in [("helpfulness", "harmlessness"), ("harmlessness", "helpfulness")] {
        let counts = json(&["data", "stats", &text(&path), "--metric", metric]);
        assert_eq!(counts["other_metric"], json!({"metric": other, "rows": 32, "prefer_another_response": 19}));
        assert_eq!(counts["counts"]["flagged"], 32);
    }
}

#[test]
fn data_are_written_in_another_format() {
    let folder = folder();
    let path = pairs(&folder);
    let to = |name: &str| at(&folder, name);
    let parquet = to("pairs.parquet");
    let arguments = ["data", "convert", &path, &parquet];
    says(&fails(2, &arguments), &["Line 5 of", "column `chosen`", "--skip-bad-rows"]);
    assert!(!Path::new(&parquet).exists());
    let outcome = done(&[&arguments[..], &["--skip-bad-rows"]].concat());
    assert_eq!(outcome.stdout, "");
    says(&outcome.stderr, &["1 rows are bad and left out. The first: Line 5 of", "Wrote 4 rows as `trl` to "]);
    let of = |path: &str| json(&["data", "stats", path])["counts"].clone();
    assert_eq!(of(&parquet), of(&path));
    says(&fails(2, &arguments), &["pairs.parquet exists", "lost"]);

    // a folder's files, of several kinds
    std::fs::create_dir(folder.path().join("shards")).unwrap();
    std::fs::copy(&parquet, folder.path().join("shards/1.parquet")).unwrap();
    let single = json!({"prompt": "how", "chosen": "so", "rejected": "no", "id": 7}).to_string();
    std::fs::write(folder.path().join("shards/0.json"), format!("[{single}]")).unwrap();
    let written = json(&["data", "convert", &to("shards"), &to("sft.jsonl.gz"), "--to", "sft"]);
    assert_eq!(written["out"], to("sft.jsonl.gz"));
    assert_eq!(
        written["converted"],
        json!({"from": "trl", "to": "sft", "rows": 5, "bad_rows": 0, "first_bad_row": null, "left_out": 5, "lost_columns": ["id"]})
    );
    let told = done(&["data", "convert", &to("shards"), &to("sft.jsonl"), "--to", "sft"]).stderr;
    says(&told, &["5 responses that are not to be learned from", "no place in `sft`: `id`.", "Wrote 5 rows as `sft`"]);
    let told = done(&["data", "convert", &to("sft.jsonl"), &to("prompts.json"), "--to", "prompts"]).stderr;
    says(&told, &["3 prompts are left out, since they are there already", "Wrote 2 rows as `prompts`"]);
    assert_eq!(
        std::fs::read_to_string(to("prompts.json")).unwrap(),
        "[\n{\"prompt\":\"how\"},\n{\"prompt\":\"how do i\"}\n]\n"
    );
    let refused = fails(2, &["data", "convert", &to("sft.jsonl"), &to("x.jsonl"), "--to", "trl"]);
    says(&refused, &["sft.jsonl holds single responses, from which no pairs can be made"]);
}
