//! Training data drawn from the world.

use engine::{Error, Result};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::evaluate::outside_mass;
use super::{Answer, Metric, Prompt, World};

/// A prompt and an answer to imitate, under TRL's names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Completion {
    /// The prompt's text.
    pub prompt: String,
    /// The answer's text.
    pub completion: String,
}

/// A prompt with a preferred and a dispreferred answer, under TRL's names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Pair {
    /// The prompt's text.
    pub prompt: String,
    /// The text of the preferred answer.
    pub chosen: String,
    /// The text of the other answer.
    pub rejected: String,
    /// Whether the preferred answer is safe: g* ≥ 0. Only `safe-dpo` reads it.
    pub safe_chosen: bool,
    /// Whether the other one is.
    pub safe_rejected: bool,
}

/// A prompt with an answer and whether it is desirable, under TRL's names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LabelledCompletion {
    /// The prompt's text.
    pub prompt: String,
    /// The answer's text.
    pub completion: String,
    /// Whether it is desirable.
    pub label: bool,
}

/// Rows as JSON lines, the form in which users keep their own data.
///
/// # Errors
/// If a row cannot be written as JSON, which does not happen for the rows of this module.
pub fn json_lines<T: Serialize>(rows: &[T]) -> Result<String> {
    let mut lines = String::new();
    for row in rows {
        let line = serde_json::to_string(row)
            .map_err(|e| Error::Failed(format!("A row could not be written as JSON: {e}.")))?;
        lines.push_str(&line);
        lines.push('\n');
    }
    Ok(lines)
}

impl World {
    /// `n` training prompts, uniform, each with an answer drawn from p0.
    pub fn sft_samples(&self, n: usize, seed: u64) -> Vec<Completion> {
        let mut rng = generator(seed, 0);
        let mut sample = || {
            let prompt = self.draw_prompt(&mut rng);
            let answer = draw(self.answers(prompt), &mut rng);
            Completion { prompt: prompt.text.clone(), completion: answer.text.clone() }
        };
        (0..n).map(|_| sample()).collect()
    }

    /// `n` preference pairs: a uniform training prompt, two answers drawn from p0 independently but for being
    /// distinct, and the label drawn by Bradley–Terry, P(first is chosen) = σ(value(first) − value(second)).
    ///
    /// Pairs of the two metrics are independent of each other, also under the same seed.
    pub fn preference_pairs(&self, metric: Metric, n: usize, seed: u64) -> Vec<Pair> {
        let mut rng = generator(seed, 1 + metric as u64);
        let mut pair = || {
            let prompt = self.draw_prompt(&mut rng);
            let answers = self.answers(prompt);
            let (first, second) = loop {
                // both are drawn again when they are equal: drawing only one again would favour rare answers
                let (first, second) = (draw(answers, &mut rng), draw(answers, &mut rng));
                if first.text != second.text {
                    break (first, second);
                }
            };
            let first_wins = 1.0 / (1.0 + (second.value(metric) - first.value(metric)).exp());
            let (chosen, rejected) = if rng.random::<f64>() < first_wins { (first, second) } else { (second, first) };
            Pair {
                prompt: prompt.text.clone(),
                chosen: chosen.text.clone(),
                rejected: rejected.text.clone(),
                safe_chosen: chosen.safety >= 0.0,
                safe_rejected: rejected.safety >= 0.0,
            }
        };
        (0..n).map(|_| pair()).collect()
    }

    /// `n` training prompts, uniform, each with an answer drawn from p0, which is desirable with probability
    /// σ(value(answer)).
    ///
    /// Labels of the two metrics are independent of each other and of the pairs, also under the same seed.
    pub fn labelled_completions(&self, metric: Metric, n: usize, seed: u64) -> Vec<LabelledCompletion> {
        let mut rng = generator(seed, 3 + metric as u64);
        let mut labelled = || {
            let prompt = self.draw_prompt(&mut rng);
            let answer = draw(self.answers(prompt), &mut rng);
            let label = rng.random::<f64>() < 1.0 / (1.0 + (-answer.value(metric)).exp());
            LabelledCompletion { prompt: prompt.text.clone(), completion: answer.text.clone(), label }
        };
        (0..n).map(|_| labelled()).collect()
    }

    /// What `n` texts drawn from a policy for every training prompt are worth, `[training prompt][text]`; texts outside the
    /// grammar are drawn too. `policy` holds log-probabilities, `[training prompt][answer]`.
    ///
    /// # Errors
    /// If there is not one list of log-probabilities per training prompt and one number per answer, or those of a prompt are
    /// of no policy.
    pub fn sampled_values(&self, policy: &[Vec<f64>], metric: Metric, n: usize, seed: u64) -> Result<Vec<Vec<f64>>> {
        if policy.len() != self.train_prompts.len() {
            return Err(Error::Failed(format!(
                "Texts of the quickstart world are drawn for its {} training prompts, but log-probabilities are given for {} \
                 prompts. Give one list per training prompt.",
                self.train_prompts.len(),
                policy.len()
            )));
        }
        let mut rng = generator(seed, 5);
        let mut of_prompt = |(prompt, logps): (&Prompt, &Vec<f64>)| {
            let answers = self.answers(prompt);
            outside_mass(logps, answers.len(), &prompt.text)?;
            let mut value = || {
                let mut left: f64 = rng.random();
                let drawn = answers.iter().zip(logps).find(|(_, logp)| {
                    left -= logp.exp();
                    left < 0.0
                });
                drawn.map_or(metric.outside(), |(answer, _)| answer.value(metric))
            };
            Ok((0..n).map(|_| value()).collect())
        };
        self.train_prompts.iter().zip(policy).map(&mut of_prompt).collect()
    }

    fn draw_prompt(&self, rng: &mut ChaCha8Rng) -> &Prompt {
        &self.train_prompts[rng.random_range(0..self.train_prompts.len())]
    }
}

/// An answer drawn from p0.
fn draw<'a>(answers: &'a [Answer], rng: &mut ChaCha8Rng) -> &'a Answer {
    let mut left: f64 = rng.random();
    let last = answers.len() - 1;
    // rounding may leave a little after the last subtraction, so the last answer takes the rest
    answers[..last]
        .iter()
        .find(|answer| {
            left -= answer.p0;
            left < 0.0
        })
        .unwrap_or(&answers[last])
}

/// A generator whose numbers are independent between streams of one seed.
fn generator(seed: u64, stream: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream);
    rng
}
