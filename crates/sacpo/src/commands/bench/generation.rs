//! Greedy answers to prompts of random tokens.

use std::sync::Arc;
use std::time::Instant;

use engine::generate::{Generator, SamplingOptions};
use engine::{Model, Result};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::training::tokens;
use super::{Roofline, check};
use crate::ui;

/// Tokens of a prompt, the mean of PKU-SafeRLHF's; models of short contexts get half of theirs.
const PROMPT: usize = 49;

/// Tokens of an answer, as far as the context has room.
const ANSWER: usize = 64;

/// The speed of generation by the number of answers in progress.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) batch_1: Speed,
    pub(super) batch_16: Speed,
}

/// The speed of generation.
#[derive(Debug, Serialize)]
pub(super) struct Speed {
    /// New tokens over all the time, that of the prompts included.
    pub(super) tokens_per_second: f64,
    /// New tokens after the first of each answer, over the time after it.
    pub(super) decode_tokens_per_second: f64,
    /// Bytes of weights that are read in decoding, once for all answers, over what the machine reads in that time at best.
    pub(super) bandwidth_utilisation: f64,
}

/// Generates answers one at a time and sixteen at a time.
pub(super) fn measure(model: &Model, roofline: Roofline, seed: u64) -> Result<Report> {
    Ok(Report { batch_1: speed(model, 1, roofline, seed)?, batch_16: speed(model, 16, roofline, seed)? })
}

fn speed(model: &Model, batch: usize, roofline: Roofline, seed: u64) -> Result<Speed> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let length = PROMPT.min(model.config.max_position_embeddings / 2);
    let prompts: Vec<_> = (0..batch).map(|_| tokens(&mut rng, length, model.config.vocab_size)).collect();
    // a few tokens warm up
    timed(model, &prompts, 4)?;
    let Times { steps, first, whole } = timed(model, &prompts, ANSWER)?;
    let decoded = (steps - 1) as f64 / (whole - first);
    Ok(Speed {
        tokens_per_second: (batch * steps) as f64 / whole,
        decode_tokens_per_second: batch as f64 * decoded,
        bandwidth_utilisation: decoded * weight_bytes(model) / roofline.bandwidth,
    })
}

struct Times {
    /// Tokens of each answer.
    steps: usize,
    /// Seconds until every answer has its first token.
    first: f64,
    /// Seconds until all answers are complete.
    whole: f64,
}

/// Answers the prompts by `answer` tokens each.
fn timed(model: &Model, prompts: &[Vec<u32>], answer: usize) -> Result<Times> {
    let options = Arc::new(SamplingOptions { max_new_tokens: answer, ..SamplingOptions::default() });
    let decode = |_: &[u32]| Ok(String::new());
    let mut generator = Generator::new(model, PROMPT + answer, prompts.len(), &decode);
    for prompt in prompts {
        generator.add(prompt, options.clone(), 0)?;
    }
    let bar = ui::bar(answer as u64, "generation");
    let (start, mut times) = (Instant::now(), Times { steps: 0, first: 0.0, whole: 0.0 });
    while !generator.is_empty() {
        generator.step().into_iter().try_for_each(|(_, progress)| progress.map(|_| ()))?;
        times.steps += 1;
        times.whole = start.elapsed().as_secs_f64();
        if times.steps == 1 {
            times.first = times.whole;
        }
        bar.inc(1);
        check()?;
    }
    bar.finish_and_clear();
    Ok(times)
}

/// Bytes of the weights that a new token reads: all, but for an embedding that is not the head too.
fn weight_bytes(model: &Model) -> f64 {
    let layout = &model.layout;
    let unread = if layout.head == layout.embedding { 0 } else { layout.embedding.len() };
    (size_of::<f32>() * (layout.len - unread)) as f64
}
