//! Data sets from files to tokens on disk: the same rows as in memory, whatever happens on the way.

#![allow(clippy::unwrap_used)]

mod common;

use std::ops::Range;
use std::path::Path;

use align::data::{
    HeldOut, LongPrompts, Preparation, Prepared, Progress, Prompt, RenderOptions, Source, TemplateTail, TokenizedPair,
    is_held_out, read_examples, read_pairs, tokenize_examples, tokenize_pairs,
};
use common::{TEMPLATE, characters, file, lines, shared};
use engine::checkpoint::Checkpoint;
use engine::{Error, Result, Tokenizer};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Pairs whose answers make several blocks of a few hundred of them; every fifth repeats the one before.
fn rows(numbers: Range<usize>) -> Vec<Value> {
    let row = |number: usize| {
        let number = if number % 5 == 4 { number - 1 } else { number };
        let long = format!("{number} ").repeat(400);
        json!({"prompt": [{"role": "user", "content": format!("q{}", number / 2)}],
            "chosen": [{"role": "assistant", "content": format!("a{long}")}],
            "rejected": [{"role": "assistant", "content": "b"}],
            "safe_chosen": number % 2 == 0, "safe_rejected": false, "margin": number as f64 / 7.0})
    };
    numbers.map(row).collect()
}

fn tokenizer() -> Tokenizer {
    characters(true, Some("$"), Some(TEMPLATE))
}

fn preparation<'a>(path: &'a Path, tokenizer: &'a Tokenizer) -> Preparation<'a> {
    Preparation {
        source: Source { path, format: None, metric: "harmlessness", skip_bad_rows: false },
        held_out: HeldOut::Share { fraction: 0.2, seed: 3 },
        excluded: Vec::new(),
        deduplicate: false,
        most: [None; 2],
        shuffle: None,
        tokenizer,
        render: RenderOptions { max_length: 1500, template_tail: TemplateTail::Drop, long_prompts: LongPrompts::Drop },
    }
}

fn pairs(preparation: &Preparation<'_>, cache: &Path) -> Prepared<TokenizedPair> {
    preparation.pairs(cache, "", &|_, _| Ok(true), &mut |_| Ok(())).unwrap()
}

fn numbers(rows: &[TokenizedPair]) -> Vec<usize> {
    rows.iter().map(|row| row.row).collect()
}

fn names(folder: &TempDir) -> usize {
    std::fs::read_dir(folder.path()).unwrap().count()
}

#[test]
fn rows_on_disk_are_those_in_memory() {
    let (tokenizer, cache) = (tokenizer(), tempfile::tempdir().unwrap());
    let data = file("pairs.jsonl", lines(&rows(0..3000)));
    let preparation = preparation(&data.path, &tokenizer);
    let mut calls = Vec::new();
    let Prepared { train, held_out, report } = preparation
        .pairs(cache.path(), "", &|_, _| Ok(true), &mut |progress| {
            calls.push(progress);
            Ok(())
        })
        .unwrap();
    assert!(calls.len() > 3, "one block of rows after the other");
    let all_bytes = std::fs::metadata(&data.path).unwrap().len();
    assert_eq!(calls.last(), Some(&Progress { rows: 3000, bytes: all_bytes, all_bytes }));

    let rows = read_pairs(&data.path, None, "harmlessness", false).unwrap().rows;
    let (own_held_out, own_train): (Vec<_>, Vec<_>) = rows.into_iter().partition(|row| is_held_out(row, 0.2, 3));
    let tokens = |rows: &[_]| tokenize_pairs(rows, &|_| String::new(), &tokenizer, &preparation.render).unwrap();
    let (own_train, own_held_out) = (tokens(&own_train), tokens(&own_held_out));
    assert!(train == own_train.rows && held_out == own_held_out.rows);
    assert!(held_out.len() > 400 && held_out.len() < 800);
    assert_eq!(report.truncated_responses, own_train.truncated_responses + own_held_out.truncated_responses);
    assert!(report.truncated_responses > 0 && !report.plain_text);
}

/// The pool's only thread is the one that waits for the reader.
#[test]
fn one_thread_is_enough() {
    let (tokenizer, cache) = (tokenizer(), tempfile::tempdir().unwrap());
    let data = file("pairs.jsonl", lines(&rows(0..3000)));
    let own = preparation(&data.path, &tokenizer);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let prepared = pool.install(|| pairs(&own, cache.path()));
    assert!(prepared == pairs(&own, tempfile::tempdir().unwrap().path()));
}

#[test]
fn labelled_responses_are_prepared_as_pairs_are() {
    let (tokenizer, cache) = (tokenizer(), tempfile::tempdir().unwrap());
    let row =
        |i: usize| json!({"prompt": format!("q{i}"), "completion": format!("a{i}"), "label": i.is_multiple_of(3)});
    let data = file("single.jsonl", lines(&(0..500).map(row).collect::<Vec<_>>()));
    let preparation =
        Preparation { held_out: HeldOut::Share { fraction: 0.0, seed: 0 }, ..preparation(&data.path, &tokenizer) };
    let prepared = preparation.examples(cache.path(), "", &|_, _| Ok(true), &mut |_| Ok(())).unwrap();
    let rows = read_examples(&data.path, None, "harmlessness", false).unwrap().rows;
    let own = tokenize_examples(&rows, &|_| String::new(), &tokenizer, &preparation.render).unwrap();
    assert!(prepared.train == own.rows && prepared.held_out.is_empty() && prepared.report.plain_text);
}

#[test]
fn tokens_are_made_once_and_again_when_anything_changes() {
    let (tokenizer, cache) = (tokenizer(), tempfile::tempdir().unwrap());
    let data = file("pairs.jsonl", lines(&rows(0..40)));
    let own = preparation(&data.path, &tokenizer);
    let first = pairs(&own, cache.path());
    let again = |preparation: &Preparation<'_>, rule: &str| {
        let mut never = |_| Err(Error::Failed("the tokens are made again".into()));
        preparation.pairs(cache.path(), rule, &|_, _| Ok(true), &mut never)
    };
    assert!(again(&own, "").unwrap() == first);
    assert_eq!(names(&cache), 2);

    let other_tokenizer = characters(false, Some("$"), Some(TEMPLATE));
    let metric = Source { metric: "helpfulness", ..own.source };
    let changed = [
        Preparation { deduplicate: true, ..own.clone() },
        Preparation { excluded: vec![Prompt::Text("q1".into())], ..own.clone() },
        Preparation { most: [Some(3), None], ..own.clone() },
        Preparation { held_out: HeldOut::Share { fraction: 0.2, seed: 4 }, ..own.clone() },
        Preparation { held_out: HeldOut::Path(&data.path), ..own.clone() },
        Preparation { render: RenderOptions { max_length: 1000, ..own.render }, ..own.clone() },
        Preparation { tokenizer: &other_tokenizer, ..own.clone() },
        Preparation { source: metric, ..own.clone() },
    ];
    for changed in changed {
        assert!(again(&changed, "").is_err(), "{changed:?}");
    }
    assert!(again(&own, "another objective").is_err());

    // where the same rows are does not matter, what they say does
    let moved = file("elsewhere.jsonl", lines(&rows(0..40)));
    assert!(again(&preparation(&moved.path, &tokenizer), "").unwrap() == first);
    std::fs::write(&moved.path, lines(&rows(1..41))).unwrap();
    assert!(again(&preparation(&moved.path, &tokenizer), "").is_err());
}

#[test]
fn a_damaged_file_of_tokens_is_made_again() {
    let (tokenizer, cache) = (tokenizer(), tempfile::tempdir().unwrap());
    let data = file("pairs.jsonl", lines(&rows(0..40)));
    let own = preparation(&data.path, &tokenizer);
    let first = pairs(&own, cache.path());
    let kept = || -> Vec<_> { std::fs::read_dir(cache.path()).unwrap().map(|entry| entry.unwrap().path()).collect() };
    for path in kept() {
        let bytes = std::fs::read(&path).unwrap();
        let mut changed = bytes.clone();
        changed[bytes.len() / 2] ^= 1;
        for damage in [&b""[..], &bytes[..bytes.len() - 1], &bytes[..bytes.len() / 2], &changed] {
            // a new file, for the rows of `first` are in the old one
            std::fs::remove_file(&path).unwrap();
            std::fs::write(&path, damage).unwrap();
            assert!(pairs(&own, cache.path()) == first, "{}", path.display());
        }
    }
    assert_eq!(kept().len(), 2);
}

#[test]
fn nothing_unfinished_stays() {
    let (tokenizer, cache) = (tokenizer(), tempfile::tempdir().unwrap());
    let mut bad = rows(0..3000);
    bad[2500]["chosen"] = json!(7);
    let data = file("pairs.jsonl", lines(&bad));
    let own = preparation(&data.path, &tokenizer);
    let fail = |keep: &(dyn Fn(&TokenizedPair) -> Result<bool> + Sync),
                progress: &mut dyn FnMut(Progress) -> Result<()>| {
        let error = own.pairs(cache.path(), "", &|row, _| keep(row), progress).unwrap_err().to_string();
        assert_eq!(names(&cache), 0);
        error
    };
    assert!(fail(&|_| Ok(true), &mut |_| Ok(())).starts_with(&format!("Line 2501 of {}", data.path.display())));
    assert_eq!(fail(&|_| Ok(true), &mut |_| Err(Error::Interrupted("stopped".into()))), "stopped");
    assert_eq!(
        fail(&|row| if row.row < 900 { Ok(true) } else { Err(Error::input("no label")) }, &mut |_| Ok(())),
        "no label"
    );

    let short = Preparation {
        render: RenderOptions { max_length: 4, long_prompts: LongPrompts::Error, ..own.render },
        ..own.clone()
    };
    let error = short.pairs(cache.path(), "", &|_, _| Ok(true), &mut |_| Ok(())).unwrap_err().to_string();
    assert!(error.starts_with(&format!("Line 1 of {} cannot be tokenised.", data.path.display())), "{error}");
    assert_eq!(names(&cache), 0);
}

#[test]
fn rows_behind_the_last_that_is_needed_are_not_read() {
    let (tokenizer, cache) = (tokenizer(), tempfile::tempdir().unwrap());
    let mut bad = rows(0..3000);
    bad[2990]["chosen"] = json!(7);
    let data = file("pairs.jsonl", lines(&bad));
    let whole = file("whole.jsonl", lines(&rows(0..3000)));
    let own = preparation(&data.path, &tokenizer);
    for _ in 0..5 {
        let cache = tempfile::tempdir().unwrap();
        let some = pairs(&Preparation { most: [Some(70), Some(10)], ..own.clone() }, cache.path());
        let all = pairs(&preparation(&whole.path, &tokenizer), cache.path());
        assert!(some.train == all.train[..70] && some.held_out == all.held_out[..10]);
        // what is cut is counted up to there
        let cut = some.train.iter().chain(&some.held_out).filter(|row| row.chosen.last() != Some(&1)).count();
        assert_eq!(some.report.truncated_responses, cut);
    }
    let endless = Preparation { most: [Some(70), None], ..own };
    let error = endless.pairs(cache.path(), "", &|_, _| Ok(true), &mut |_| Ok(())).unwrap_err();
    assert!(error.to_string().contains("Line 2991"), "{error}");
    // in the block of the last row that is needed
    let mut bad = rows(0..60);
    bad[50]["chosen"] = json!(7);
    let data = file("few.jsonl", lines(&bad));
    let few = Preparation { most: [Some(20), Some(1)], ..preparation(&data.path, &tokenizer) };
    assert_eq!(pairs(&few, tempfile::tempdir().unwrap().path()).train.len(), 20);
}

/// All openings of held-out rows are left out, though blocks of them are read ahead of those that are written.
#[test]
fn the_same_rows_are_left_out_however_many_are_held_out() {
    let (tokenizer, held_out) = (tokenizer(), file("held-out.jsonl", lines(&rows(0..3000))));
    let data = file("pairs.jsonl", lines(&rows(2990..3010)));
    let own = Preparation { held_out: HeldOut::Path(&held_out.path), ..preparation(&data.path, &tokenizer) };
    let few = pairs(&Preparation { most: [None, Some(5)], ..own }, tempfile::tempdir().unwrap().path());
    assert_eq!((few.held_out.len(), few.report.excluded), (5, 10));
}

#[test]
fn a_shuffle_draws_rows_from_the_whole_file() {
    let (tokenizer, cache) = (tokenizer(), tempfile::tempdir().unwrap());
    let data = file("pairs.jsonl", lines(&rows(0..300)));
    let own = preparation(&data.path, &tokenizer);
    let all = pairs(&own, cache.path());
    let drawn = |most, seed| {
        let drawn = Preparation { most: [Some(most), Some(5)], shuffle: Some(seed), ..own.clone() };
        pairs(&drawn, cache.path())
    };
    let (few, more) = (drawn(20, 1), drawn(60, 1));
    assert_eq!((few.train.len(), few.held_out.len(), more.train.len()), (20, 5, 60));
    assert!(few.train.is_sorted_by_key(|row| row.row) && few.train.iter().any(|row| row.row > 200));
    assert!(few.train.iter().all(|row| more.train.contains(row)), "more rows are the same ones and others");
    assert!(more.train.iter().all(|row| all.train.contains(row)));
    assert_ne!(numbers(&drawn(20, 2).train), numbers(&few.train));
    assert_eq!(numbers(&drawn(1000, 2).train), numbers(&all.train));
}

#[test]
fn rows_that_repeat_others_or_open_as_excluded_prompts_are_counted() {
    let (tokenizer, cache) = (tokenizer(), tempfile::tempdir().unwrap());
    let data = file("pairs.jsonl", lines(&rows(0..100)));
    let excluded = vec![Prompt::Text(" Q0\n".into()), Prompt::Text("q7".into()), Prompt::Text("q700".into())];
    let own = Preparation {
        excluded,
        deduplicate: true,
        held_out: HeldOut::Share { fraction: 0.0, seed: 0 },
        ..preparation(&data.path, &tokenizer)
    };
    let Prepared { train, report, .. } = pairs(&own, cache.path());
    // q0 in rows 0 and 1; q7 in row 15 alone, for row 14 repeats row 13
    assert_eq!((report.excluded, report.repeated), (3, 20));
    let numbers = numbers(&train);
    assert!(numbers.len() == 77 && [1, 2, 5, 10, 15, 16].iter().all(|row| !numbers.contains(row)), "{numbers:?}");
}

#[test]
fn a_file_that_is_held_out_shares_no_opening_with_training() {
    let (tokenizer, cache) = (tokenizer(), tempfile::tempdir().unwrap());
    let (data, validation) = (file("train.jsonl", lines(&rows(0..100))), file("test.jsonl", lines(&rows(90..120))));
    let own = Preparation { held_out: HeldOut::Path(&validation.path), ..preparation(&data.path, &tokenizer) };
    let Prepared { train, held_out, report } = pairs(&own, cache.path());
    assert_eq!(numbers(&held_out), (1..=30).collect::<Vec<_>>());
    assert_eq!((numbers(&train), report.excluded), ((1..=90).collect(), 10));
    let some = pairs(&Preparation { most: [Some(7), Some(5)], ..own }, cache.path());
    assert_eq!((numbers(&some.held_out), numbers(&some.train)), ((1..=5).collect(), (1..=7).collect()));
    let missing = Preparation { held_out: HeldOut::Path(Path::new("no.jsonl")), ..preparation(&data.path, &tokenizer) };
    let error = missing.pairs(cache.path(), "", &|_, _| Ok(true), &mut |_| Ok(())).unwrap_err();
    assert!(error.to_string().contains("no.jsonl"), "{error}");
}

#[test]
fn a_file_that_moves_from_training_to_what_is_held_out_is_noticed() {
    let (tokenizer, cache) = (tokenizer(), tempfile::tempdir().unwrap());
    let parts = [rows(0..10), rows(20..30), rows(40..50)].map(|rows| lines(&rows));
    // both have the same three files in the same order
    let [few, many] = [1, 2].map(|held_out| {
        let folder = tempfile::tempdir().unwrap();
        for (number, part) in parts.iter().enumerate() {
            let side = folder.path().join(if number < held_out { "held-out" } else { "data" });
            std::fs::create_dir_all(&side).unwrap();
            std::fs::write(side.join(format!("{number}.jsonl")), part).unwrap();
        }
        let (data, held_out) = (folder.path().join("data"), folder.path().join("held-out"));
        let own = Preparation { held_out: HeldOut::Path(&held_out), ..preparation(&data, &tokenizer) };
        let Prepared { train, held_out, .. } = pairs(&own, cache.path());
        [train.len(), held_out.len()]
    });
    assert_eq!((few, many), ([20, 10], [10, 20]));
}

#[test]
fn work_on_rows_that_are_left_out_can_be_stopped() {
    let tokenizer = tokenizer();
    let repeated = file("pairs.jsonl", lines(&rows(0..1)).repeat(3000));
    let bad = file("bad.jsonl", lines(&rows(0..1)) + &"{\"chosen\": 7}\n".repeat(30_000));
    for data in [repeated, bad] {
        let cache = tempfile::tempdir().unwrap();
        let mut own = Preparation { deduplicate: true, ..preparation(&data.path, &tokenizer) };
        own.source.skip_bad_rows = true;
        let mut calls = 0;
        let stop = &mut |_| {
            calls += 1;
            if calls < 3 { Ok(()) } else { Err(Error::Interrupted("stopped".into())) }
        };
        let error = own.pairs(cache.path(), "", &|_, _| Ok(true), stop).unwrap_err();
        assert_eq!(error.to_string(), "stopped");
    }
}

/// Responses are encoded behind the last special token of their prompt. That gives the tokens which they have behind all of it.
#[test]
fn the_end_of_a_prompt_is_context_enough() {
    let Some(gguf) = common::smollm2() else { return };
    let tokenizer = Checkpoint::load(&gguf).unwrap().tokenizer;
    let render =
        RenderOptions { max_length: usize::MAX, template_tail: TemplateTail::Drop, long_prompts: LongPrompts::Error };
    for name in ["hh-helpful-base", "pku-saferlhf-safety-pairs"] {
        let Some(path) = shared(&format!("real-text/{name}.train.jsonl.gz")) else { continue };
        let mut rows = read_pairs(&path, None, "harmlessness", true).unwrap().rows;
        rows.truncate(300);
        // special tokens within texts, white space at the boundary
        for (row, text) in rows.iter_mut().zip(["a<|im_end|>", "\n\n", "<|im_start|>", " ", "<|im_start|>assistant\n"])
        {
            row.chosen = format!("{text}{}", row.chosen);
            let Prompt::Chat(messages) = &mut row.prompt else { panic!() };
            messages.last_mut().unwrap().content += text;
        }
        let tokenized = tokenize_pairs(&rows, &|_| String::new(), &tokenizer, &render).unwrap().rows;
        for (row, tokens) in rows.iter().zip(&tokenized) {
            let Prompt::Chat(messages) = &row.prompt else { panic!() };
            let prompt = tokenizer.chat(messages, true).unwrap();
            for (response, tokens) in [(&row.chosen, &tokens.chosen), (&row.rejected, &tokens.rejected)] {
                let whole = tokenizer.encode(&format!("{prompt}{response}<|im_end|>")).unwrap();
                let mut own = match whole.strip_prefix(&*tokenizer.encode(&prompt).unwrap()) {
                    Some(rest) => rest.to_vec(),
                    None => tokenizer.encode(&format!("{response}<|im_end|>")).unwrap(),
                };
                let end = own.iter().position(|id| Some(*id) == tokenizer.eos()).unwrap();
                own.truncate(end + 1);
                assert_eq!(*tokens, own, "{response:?}");
            }
        }
    }
}
