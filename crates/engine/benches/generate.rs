//! Greedy generation, one sequence and sixteen at a time, against `generate` of transformers in turns.
//!
//! ```text
//! cargo bench -p sacpo-engine --bench generate -- --model MODEL
//! cargo bench -p sacpo-engine --bench generate -- --model MODEL --peer "python benches/peer_generate.py --model MODEL"
//! cargo bench -p sacpo-engine --bench generate -- --model MODEL --dtype bf16 --prompt-tokens 49 --new-tokens 256 \
//!     --peer "python benches/peer_generate.py --model MODEL --dtype bf16"
//! ```
//!
//! Every sequence is a prompt of `--prompt-tokens` (128) drawn tokens and `--new-tokens` (64) more; no token ends it. A turn is
//! timed as a whole, prompts included. `--rounds`, `--threads` and `--batch` default to 5, 2 and `1,16`. The share of the
//! roofline is that of reading every matrix once for every token of a batch of one, at the bandwidth at which this program reads
//! memory and does nothing else.

mod common;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use common::{Peer, median};
use engine::checkpoint::Checkpoint;
use engine::generate::{Dtype, Generator, Progress, SamplingOptions};
use serde_json::json;

/// Answers to prompts, and the seconds that they took.
struct Turn {
    seconds: f64,
    tokens: Vec<Vec<u32>>,
}

/// A turn of another program.
fn theirs(peer: &mut Peer, prompts: &[Vec<u32>], new_tokens: usize) -> Turn {
    let answer = peer.ask(&json!({"prompts": prompts, "new_tokens": new_tokens}).to_string());
    let seconds = answer["seconds"].as_f64().unwrap_or_else(|| panic!("no seconds: {answer}"));
    let tokens = serde_json::from_value(answer["tokens"].clone()).unwrap_or_else(|e| panic!("{e}: {answer}"));
    Turn { seconds, tokens }
}

fn ours(generator: &mut Generator<'_>, prompts: &[Vec<u32>], new_tokens: usize) -> Turn {
    let options = Arc::new(SamplingOptions { max_new_tokens: new_tokens, ..SamplingOptions::default() });
    let start = Instant::now();
    let ids: Vec<_> = prompts
        .iter()
        .map(|prompt| generator.add(prompt.clone(), options.clone(), 0).unwrap_or_else(|e| panic!("{e}")))
        .collect();
    let mut tokens = vec![Vec::new(); prompts.len()];
    while !generator.is_empty() {
        for (id, progress) in generator.step() {
            if let Progress::Finished(answer) = progress.unwrap_or_else(|e| panic!("{e}")) {
                ids.iter()
                    .zip(&mut tokens)
                    .filter(|(of, _)| **of == id)
                    .for_each(|(_, to)| to.clone_from(&answer.tokens));
            }
        }
    }
    Turn { seconds: start.elapsed().as_secs_f64(), tokens }
}

/// Tokens that no text explains, the same in every run.
fn prompts(count: usize, length: usize, vocab: usize) -> Vec<Vec<u32>> {
    let mut state = 12_345u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        // the first ids are often those of special tokens
        256 + (state >> 8) % (vocab as u32 - 256)
    };
    (0..count).map(|_| (0..length).map(|_| next()).collect()).collect()
}

fn main() {
    let (mut model, mut peers, mut batches) = (PathBuf::new(), Vec::new(), vec![1usize, 16]);
    let mut dtype = Dtype::F32;
    let (mut rounds, mut threads, mut prompt_tokens, mut new_tokens) = (5usize, 2usize, 128usize, 64usize);
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_else(|| panic!("{name} needs a value"));
        let number = |text: String| text.parse().unwrap_or_else(|e| panic!("{name}: {e}"));
        match name.as_str() {
            "--model" => model = value().into(),
            "--peer" => peers.push(Peer::start(&value())),
            "--batch" => batches = value().split(',').map(|text| number(text.to_owned())).collect(),
            "--dtype" => {
                let name = value();
                let known = Dtype::ALL.into_iter().find(|dtype| dtype.name() == name);
                dtype = known.unwrap_or_else(|| panic!("unknown dtype {name}"));
            }
            "--rounds" => rounds = number(value()),
            "--threads" => threads = number(value()),
            "--prompt-tokens" => prompt_tokens = number(value()),
            "--new-tokens" => new_tokens = number(value()),
            "--bench" => {}
            other => panic!("unknown option {other}"),
        }
    }
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .unwrap_or_else(|e| panic!("could not start threads: {e}"));
    let checkpoint = Checkpoint::load(&model).unwrap_or_else(|e| panic!("{e}"));
    let most = batches.iter().copied().max().unwrap_or(1);
    let prompts = prompts(most, prompt_tokens, checkpoint.model.config.vocab_size);
    let decode = |_: &[u32]| Ok(String::new());
    // work belongs on a thread of the pool
    rayon::scope(|_| {
        let mut first: Option<Vec<Vec<u32>>> = None;
        for &batch in &batches {
            let prompts = &prompts[..batch];
            let generator = Generator::new(&checkpoint.model, prompt_tokens + new_tokens, batch, &decode);
            let mut generator = generator.with_dtype(dtype);
            // the first turn of each warms up and is not counted
            let warm = ours(&mut generator, prompts, new_tokens);
            let of_warm: Vec<Turn> = peers.iter_mut().map(|peer| theirs(peer, prompts, new_tokens)).collect();
            let (mut seconds, mut of_peers) = (Vec::new(), vec![Vec::new(); peers.len()]);
            let (mut bandwidths, mut shares) = (Vec::new(), Vec::new());
            for round in 0..rounds {
                let before = engine::roofline::bandwidth();
                let turn = ours(&mut generator, prompts, new_tokens);
                let bandwidth = before.midpoint(engine::roofline::bandwidth());
                // a pass over the prompt, which is not in it, is another reading of the weights
                shares.push((new_tokens * generator.weight_bytes()) as f64 / turn.seconds / bandwidth);
                bandwidths.push(bandwidth);
                assert_eq!(turn.tokens, warm.tokens, "greedy tokens differ between two turns");
                seconds.push(turn.seconds);
                for (peer, seconds) in peers.iter_mut().zip(&mut of_peers) {
                    seconds.push(theirs(peer, prompts, new_tokens).seconds);
                }
                eprint!("\rbatch {batch}: round {}/{rounds} ", round + 1);
            }
            eprintln!();
            let first = first.get_or_insert_with(|| warm.tokens.clone());
            let shared = first.len().min(batch);
            assert_eq!(warm.tokens[..shared], first[..shared], "greedy tokens depend on the batch size");
            let tokens = (batch * new_tokens) as f64;
            println!("batch {batch}, {prompt_tokens} tokens of prompt and {new_tokens} new ones each");
            let report = |name: &str, seconds: &[f64]| {
                let best = seconds.iter().copied().fold(f64::INFINITY, f64::min);
                println!("{:7.1} tokens/s median, {:7.1} best   {name}", tokens / median(seconds), tokens / best);
            };
            report(&format!("sacpo, {}", dtype.name()), &seconds);
            for ((peer, of_peer), theirs) in peers.iter().zip(&of_peers).zip(&of_warm) {
                report(&peer.command, of_peer);
                let equal = warm.tokens.iter().zip(&theirs.tokens).filter(|(ours, theirs)| ours == theirs).count();
                let ratio = median(of_peer) / median(&seconds);
                println!("        ratio of medians {ratio:.2}; {equal} of {batch} answers have the same tokens");
            }
            if batch == 1 {
                let (bandwidth, share) = (median(&bandwidths) / 1e9, 100.0 * median(&shares));
                println!(
                    "        {bandwidth:.1} GB/s are read before and after; {share:.0} % of this roofline, medians"
                );
            }
        }
    });
}
