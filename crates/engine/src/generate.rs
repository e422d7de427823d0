//! Generation: cached keys and values, continuous batching, greedy and random sampling.

mod generator;
mod sequence;

use std::collections::HashMap;
use std::sync::Arc;

use rand::Rng;
use rand::distr::{Distribution, StandardUniform};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::mixture::Mixture;
use crate::ops::simd::{dispatch, max};
use crate::precision::Precision;

pub use generator::{Generator, Progress, SequenceId};

/// How the next token is chosen, and when an answer ends.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingOptions {
    /// The longest answer in tokens.
    pub max_new_tokens: usize,
    /// 0 takes the likeliest token; otherwise logits are divided by this.
    pub temperature: f64,
    /// Only this many likeliest tokens are eligible; 0 for all.
    pub top_k: usize,
    /// Only the likeliest tokens that together reach this probability are eligible; 1 for all.
    pub top_p: f64,
    /// Only tokens at least this likely relative to the likeliest are eligible; 0 for all.
    pub min_p: f64,
    /// Each prompt draws from its own stream of this seed, so answers do not depend on the batch size.
    pub seed: u64,
    /// Tokens that end an answer; they are not part of it.
    pub end_tokens: Vec<u32>,
    /// Texts that end an answer; the answer's text is cut before them.
    pub stop: Vec<String>,
    /// Answers that [`generate`] has in progress at once.
    pub batch_size: usize,
    /// What [`generate`] reads matrices in.
    pub dtype: Dtype,
}

/// What the matrices of a model are read in while answers are generated. One answer at a time reads all of them for every
/// token, so fewer bits are as much faster.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32 bits, as they are.
    #[default]
    F32,
    /// 16 bits; products and activations are as in training in bf16.
    Bf16,
    /// 8 bits, 32 weights of a row with a common scale as in GGUF's Q8_0; what they are multiplied with is brought to 8 bits alike.
    Int8,
}

impl Dtype {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::Int8];

    /// The name in options.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }

    /// The precision of what is not in these bits.
    fn precision(self) -> Precision {
        match self {
            Self::Bf16 => Precision::Bf16,
            Self::F32 | Self::Int8 => Precision::F32,
        }
    }
}

impl Default for SamplingOptions {
    fn default() -> Self {
        Self {
            max_new_tokens: 256,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            end_tokens: Vec::new(),
            stop: Vec::new(),
            batch_size: 16,
            dtype: Dtype::F32,
        }
    }
}

impl SamplingOptions {
    /// Checks the ranges of all options.
    ///
    /// # Errors
    /// [`Error::Input`] that names the option and its range.
    pub fn validate(&self) -> Result<()> {
        let wrong = |name: &str, value: f64, range: &str| {
            Err(Error::input(format!("{name} is {value}, but must be {range}. Choose a value in that range.")))
        };
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return wrong("temperature", self.temperature, "a finite number of at least 0");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return wrong("top_p", self.top_p, "above 0 and at most 1");
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return wrong("min_p", self.min_p, "from 0 to 1");
        }
        if self.max_new_tokens == 0 {
            return wrong("max_new_tokens", 0.0, "at least 1");
        }
        if self.batch_size == 0 {
            return wrong("batch_size", 0.0, "at least 1");
        }
        if self.stop.iter().any(String::is_empty) {
            return Err(Error::input("A stop text is empty and would end every answer at once. Remove it."));
        }
        Ok(())
    }
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// An end token or a stop text came.
    Stop,
    /// The answer reached its limit, or the context was full.
    Length,
}

/// One generated answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The generated tokens, without the end token.
    pub tokens: Vec<u32>,
    /// Their text, cut before the first stop text.
    pub text: String,
    /// Why the answer ended.
    pub finish: Finish,
    /// The end token, if one ended the answer.
    #[serde(skip)]
    pub end: Option<u32>,
}

/// Generates one answer per prompt, in the order of the prompts.
///
/// `decode` turns tokens into text. `progress` is called after each token of the answers at work with the number of answers that
/// are finished; an error from it stops the work and is returned.
///
/// # Errors
/// Options out of range, an empty prompt, or one that leaves no room in the model's context
/// ([`Error::Input`]); logits that are not numbers ([`Error::Failed`]).
pub fn generate<'a>(
    policy: impl Into<Mixture<'a>>,
    prompts: &[Vec<u32>],
    options: &SamplingOptions,
    decode: &dyn Fn(&[u32]) -> Result<String>,
    progress: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<Vec<Answer>> {
    let request = |(index, prompt)| Request { index, prompt, seed: options.seed, stream: index as u64 };
    let requests: Vec<Request<'_>> = prompts.iter().map(Vec::as_slice).enumerate().map(request).collect();
    let mut answers: Vec<Option<Answer>> = vec![None; prompts.len()];
    let mut done = 0;
    generate_each(policy, &requests, options, decode, &mut |finished| {
        done += finished.len();
        finished.into_iter().for_each(|(index, answer)| answers[index] = Some(answer));
        progress(done)
    })?;
    Ok(answers.into_iter().flatten().collect())
}

/// A prompt to answer, and the random numbers that its answer is drawn from.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// Its place among the prompts, from 0.
    pub index: usize,
    /// Its tokens.
    pub prompt: &'a [u32],
    /// Takes the place of [`SamplingOptions::seed`].
    pub seed: u64,
    /// The stream of that seed.
    pub stream: u64,
}

/// As [`generate`], with answers handed to `progress` as soon as they are complete, each with its request's index; after many tokens
/// there are none.
///
/// # Errors
/// Those of [`generate`], and that of `progress`.
pub fn generate_each<'a>(
    policy: impl Into<Mixture<'a>>,
    requests: &[Request<'_>],
    options: &SamplingOptions,
    decode: &dyn Fn(&[u32]) -> Result<String>,
    progress: &mut dyn FnMut(Vec<(usize, Answer)>) -> Result<()>,
) -> Result<()> {
    options.validate()?;
    let policy = policy.into();
    let (vocab_size, context) = (policy.vocab_size(), policy.context());
    requests.iter().try_for_each(|request| check_numbered(request.index, request.prompt, vocab_size, context))?;
    let longest = requests.iter().map(|request| request.prompt.len()).max().unwrap_or(0);
    let positions = longest.saturating_add(options.max_new_tokens);
    let mut generator = Generator::new(policy, positions, options.batch_size, decode).with_dtype(options.dtype);
    let ids = requests.iter().map(|&Request { index, prompt, seed, stream }| {
        let options = SamplingOptions { seed, ..options.clone() };
        Ok((generator.add(prompt, Arc::new(options), stream)?, index))
    });
    let indices: HashMap<SequenceId, usize> = ids.collect::<Result<_>>()?;
    while !generator.is_empty() {
        let mut finished = Vec::new();
        for (id, of_sequence) in generator.step() {
            let index = indices[&id];
            let of_sequence = of_sequence.map_err(|error| match error {
                Error::Failed(message) => Error::Failed(format!("For prompt {}: {message}", index + 1)),
                other => other,
            });
            if let Progress::Finished(answer) = of_sequence? {
                finished.push((index, answer));
            }
        }
        progress(finished)?;
    }
    Ok(())
}

/// Refuses prompts that the policy cannot continue.
///
/// # Errors
/// [`Error::Input`] that gives the number, from 1, of the first prompt that is empty, that leaves no room in the
/// model's context, or that holds a token which the model does not know.
pub fn check_prompts(vocab_size: usize, context: usize, prompts: &[Vec<u32>]) -> Result<()> {
    prompts.iter().enumerate().try_for_each(|(index, prompt)| check_numbered(index, prompt, vocab_size, context))
}

fn check_numbered(index: usize, prompt: &[u32], vocab_size: usize, context: usize) -> Result<()> {
    check_prompt(prompt, vocab_size, context).map_err(|fault| Error::input(format!("Prompt {} {fault}", index + 1)))
}

/// What is wrong with a prompt, as a sentence without its subject.
fn check_prompt(prompt: &[u32], vocab_size: usize, context: usize) -> std::result::Result<(), String> {
    if prompt.is_empty() {
        return Err("has no tokens. Give a prompt of at least one token.".into());
    }
    if prompt.len() >= context {
        return Err(format!(
            "has {} tokens, which leaves no room for an answer in the model's context of {context} tokens. Shorten the \
             prompt.",
            prompt.len()
        ));
    }
    match prompt.iter().find(|&&t| t as usize >= vocab_size) {
        Some(token) => Err(format!(
            "contains token {token}, but the model knows only {vocab_size} tokens. The tokenizer belongs to another model."
        )),
        None => Ok(()),
    }
}

/// The next token, or nothing when a logit is not a number.
pub(crate) fn choose(logits: &[f32], options: &SamplingOptions, rng: &mut impl Rng) -> Option<u32> {
    let (highest, is_none) = dispatch(
        #[inline(always)]
        || (max(logits), logits.iter().fold(false, |is_none, l| is_none | l.is_nan())),
    );
    if is_none {
        return None;
    }
    if options.temperature == 0.0 {
        // of equals the first
        return logits.iter().position(|&l| l == highest).map(|token| token as u32);
    }
    let highest = f64::from(highest);
    let mut candidates: Vec<(u32, f64)> = logits
        .iter()
        .enumerate()
        .map(|(i, &l)| (i as u32, ((f64::from(l) - highest) / options.temperature).exp()))
        .collect();
    let by_weight = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if options.top_k > 0 && options.top_k < candidates.len() {
        candidates.select_nth_unstable_by(options.top_k - 1, by_weight);
        candidates.truncate(options.top_k);
    }
    if options.top_p < 1.0 || options.min_p > 0.0 {
        candidates.sort_unstable_by(by_weight);
        let total: f64 = candidates.iter().map(|c| c.1).sum();
        let mut before = 0.0;
        // the likeliest token has weight 1, so min_p compares with the weights themselves
        candidates.retain(|c| {
            let eligible = before < options.top_p * total && c.1 >= options.min_p;
            before += c.1;
            eligible
        });
    }
    let total: f64 = candidates.iter().map(|c| c.1).sum();
    let uniform: f64 = StandardUniform.sample(rng);
    let mut left = uniform * total;
    for &(token, weight) in &candidates {
        left -= weight;
        if left < 0.0 {
            return Some(token);
        }
    }
    candidates.last().map(|c| c.0)
}

#[cfg(test)]
mod tests;
