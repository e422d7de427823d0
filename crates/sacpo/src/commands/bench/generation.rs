//! Greedy answers to prompts of random tokens.

use std::sync::Arc;
use std::time::Instant;

use engine::generate::{Dtype, Generator, SamplingOptions};
use engine::{Model, Result};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::training::tokens;
use super::{Roofline, check};
use crate::cli::Bench;
use crate::ui;

/// Tokens of a prompt, the mean of PKU-SafeRLHF's; models of short contexts get half of theirs.
const PROMPT: usize = 49;

/// Tokens of an answer, as far as the context has room.
const ANSWER: usize = 64;

/// The speed of generation by the number of answers in progress.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) dtype: Dtype,
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
    /// Bytes of matrices that are read in decoding, once for all answers, over what the machine reads in that time at best.
    pub(super) bandwidth_utilisation: f64,
}

/// Generates answers one at a time and sixteen at a time.
pub(super) fn measure(model: &Model, roofline: Roofline, options: &Bench) -> Result<Report> {
    let [batch_1, batch_16] = [1, 16].map(|batch| speed(model, batch, roofline, options));
    Ok(Report { dtype: options.generation_dtype(), batch_1: batch_1?, batch_16: batch_16? })
}

fn speed(model: &Model, batch: usize, roofline: Roofline, options: &Bench) -> Result<Speed> {
    let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
    let length = PROMPT.min(model.config.max_position_embeddings / 2);
    let prompts: Vec<_> = (0..batch).map(|_| tokens(&mut rng, length, model.config.vocab_size)).collect();
    let decode = |_: &[u32]| Ok(String::new());
    let generator = Generator::new(model, PROMPT + ANSWER, batch, &decode);
    let mut generator = generator.with_dtype(options.generation_dtype());
    // a few tokens warm up
    timed(&mut generator, &prompts, 4)?;
    let Times { steps, first, whole } = timed(&mut generator, &prompts, ANSWER)?;
    let decoded = (steps - 1) as f64 / (whole - first);
    Ok(Speed {
        tokens_per_second: (batch * steps) as f64 / whole,
        decode_tokens_per_second: batch as f64 * decoded,
        bandwidth_utilisation: decoded * generator.weight_bytes() as f64 / roofline.bandwidth,
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
fn timed(generator: &mut Generator<'_>, prompts: &[Vec<u32>], answer: usize) -> Result<Times> {
    let options = Arc::new(SamplingOptions { max_new_tokens: answer, ..SamplingOptions::default() });
    for prompt in prompts {
        generator.add(prompt.clone(), options.clone(), 0)?;
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
