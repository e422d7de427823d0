//! Preference pairs from JSON lines to tokens on disk, against the `tokenizers` crate alone, in turns.
//!
//! ```text
//! cargo bench -p sacpo-align --bench tokenize -- MODEL_DIR PAIRS.jsonl [--mib 1024] [--rounds 4] [--threads 2]
//! ```
//!
//! The pairs are repeated, each time with a number in the prompt, up to the size. First all of it is prepared once, which
//! gives the peak memory. Then both sides take turns on a part of it. "Alone" is given the rendered prompt, the chosen and the
//! rejected response of each pair as texts in memory, encodes each once on all threads, and keeps no result.

#![allow(clippy::expect_used)]

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use align::data::{
    HeldOut, LongPrompts, PreferencePair, Preparation, Prompt, RenderOptions, Source, TemplateTail, read_pairs,
    read_records,
};
use engine::{Result, Tokenizer, memory};
use rayon::prelude::*;

fn preparation<'a>(path: &'a Path, tokenizer: &'a Tokenizer) -> Preparation<'a> {
    Preparation {
        source: Source { path, format: None, metric: "harmlessness", skip_bad_rows: true },
        held_out: HeldOut::Share { fraction: 0.1, seed: 0 },
        excluded: Vec::new(),
        deduplicate: false,
        most: [None; 2],
        shuffle: None,
        tokenizer,
        render: RenderOptions { max_length: 2048, template_tail: TemplateTail::Drop, long_prompts: LongPrompts::Drop },
    }
}

/// Seconds that a file takes, and the number of its tokens.
fn ours(path: &Path, tokenizer: &Tokenizer) -> Result<(f64, usize)> {
    let cache = tempfile::tempdir().expect("a temporary folder");
    let start = Instant::now();
    let rows = preparation(path, tokenizer).pairs(cache.path(), "", &|_, _| Ok(true), &mut |_| Ok(()))?;
    let seconds = start.elapsed().as_secs_f64();
    let tokens = |pair: &align::data::TokenizedPair| pair.prompt.len() + pair.chosen.len() + pair.rejected.len();
    Ok((seconds, rows.train.iter().chain(&rows.held_out).map(tokens).sum()))
}

/// The prompts as the template renders them, and the responses.
fn texts(pairs: &[PreferencePair], tokenizer: &Tokenizer) -> Result<Vec<[String; 3]>> {
    let of_pair = |pair: &PreferencePair| {
        let prompt = match &pair.prompt {
            Prompt::Text(text) => text.clone(),
            Prompt::Chat(messages) => tokenizer.chat(messages, true)?,
        };
        Ok([prompt, pair.chosen.clone(), pair.rejected.clone()])
    };
    pairs.iter().map(of_pair).collect()
}

fn alone(texts: &[[String; 3]], tokenizer: &tokenizers::Tokenizer) -> (f64, usize) {
    let start = Instant::now();
    let tokens = AtomicUsize::new(0);
    texts.par_iter().flatten_iter().for_each(|text| {
        let ids = tokenizer.encode_fast(text.as_str(), false).map_or(0, |encoding| encoding.len());
        tokens.fetch_add(ids, Ordering::Relaxed);
    });
    (start.elapsed().as_secs_f64(), tokens.into_inner())
}

/// Writes rows over and over until the file has a size; returns it.
fn repeat(pairs: &Path, size: usize, out: &Path) -> Result<usize> {
    let records = read_records(pairs)?;
    let mut file = BufWriter::new(File::create(out).expect("a temporary file"));
    let mut written = 0;
    for round in 0.. {
        for record in &records {
            let mut columns = record.columns.clone();
            // hh-rlhf has no prompt of its own
            for column in if columns.contains_key("prompt") { &["prompt"][..] } else { &["chosen", "rejected"] } {
                if let Some(text) = columns.get(*column).and_then(|value| value.as_str()) {
                    let text = text.replacen("Human: ", &format!("Human: {round}. "), 1);
                    columns.insert((*column).to_owned(), text.into());
                }
            }
            let line = serde_json::to_string(&columns).expect("columns are JSON");
            writeln!(file, "{line}").expect("room on the disk");
            written += line.len() + 1;
            if written >= size {
                file.flush().expect("room on the disk");
                return Ok(written);
            }
        }
    }
    Ok(written)
}

fn main() -> Result<()> {
    let (mut paths, mut mib, mut rounds, mut threads) = (Vec::new(), 1024, 4, 2);
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    while let Some(argument) = arguments.next() {
        let mut number = || arguments.next().and_then(|text| text.parse().ok()).expect("a number");
        match argument.as_str() {
            "--mib" => mib = number(),
            "--rounds" => rounds = number(),
            "--threads" => threads = number(),
            _ => paths.push(argument),
        }
    }
    let [model, pairs] = paths.as_slice() else { panic!("Give MODEL_DIR and PAIRS.jsonl; see the head of this file.") };
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().expect("one pool");
    let tokenizer = Tokenizer::from_folder(Path::new(model))?;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let [whole, part] = ["whole.jsonl", "part.jsonl"].map(|name| folder.path().join(name));

    let bytes = repeat(Path::new(pairs), mib << 20, &whole)? as f64;
    let (seconds, tokens) = ours(&whole, &tokenizer)?;
    let peak = memory::peak().unwrap_or_default() as f64 / (1 << 20) as f64;
    println!(
        "{:.0} MiB of JSON lines in {seconds:.1} s: {:.2} MiB/s, {:.0} tokens/s, peak memory {peak:.0} MiB",
        bytes / (1 << 20) as f64,
        bytes / (1 << 20) as f64 / seconds,
        tokens as f64 / seconds
    );

    repeat(Path::new(pairs), (mib << 20) / 16, &part)?;
    let texts = texts(&read_pairs(&part, None, "harmlessness", true)?.rows, &tokenizer)?;
    let peer = tokenizers::Tokenizer::from_file(Path::new(model).join("tokenizer.json")).expect("a tokenizer");
    let mut ratios = Vec::new();
    for round in 1..=rounds {
        let (ours, _) = ours(&part, &tokenizer)?;
        let (alone, tokens) = alone(&texts, &peer);
        ratios.push(ours / alone);
        println!(
            "round {round}: ours {ours:.2} s, tokenizers alone {alone:.2} s ({tokens} tokens): {:.3}",
            ours / alone
        );
    }
    ratios.sort_unstable_by(f64::total_cmp);
    println!("median ratio {:.3}", ratios[ratios.len() / 2]);
    Ok(())
}
