//! Random problems.

use align::tabular::{Description, Policy, Problem, Table};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub(crate) fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// Uniform on \[low, high\).
pub(crate) fn uniform(rng: &mut impl Rng, low: f64, high: f64) -> f64 {
    low + (high - low) * rng.random::<f64>()
}

/// Uniform values for prompts with these numbers of answers.
pub(crate) fn table(rng: &mut impl Rng, answers: &[usize], low: f64, high: f64) -> Table {
    answers.iter().map(|&n| (0..n).map(|_| uniform(rng, low, high)).collect()).collect()
}

/// Probabilities that differ by up to a factor of e² or so, prompt by prompt.
pub(crate) fn probabilities(rng: &mut impl Rng, answers: &[usize]) -> Table {
    Policy::from_logits(table(rng, answers, -1.0, 1.0)).probabilities()
}

/// 1 to 4 prompts with 2 to 8 answers each, β from 0.1 to 2, values in \[−2, 2\]; thresholds that a random policy meets
/// with some room, so that all of them together can be met.
pub(crate) fn description(rng: &mut impl Rng, constraints: usize) -> Description {
    let answers: Vec<usize> = (0..rng.random_range(1..5)).map(|_| rng.random_range(2..9)).collect();
    let reference = probabilities(rng, &answers);
    let reward = table(rng, &answers, -2.0, 2.0);
    let safety: Vec<Table> = (0..constraints).map(|_| table(rng, &answers, -2.0, 2.0)).collect();
    let prompt_weights: Vec<f64> = answers.iter().map(|_| uniform(rng, 0.2, 1.0)).collect();
    let safe = Policy::from_logits(table(rng, &answers, -2.0, 2.0));
    let weights: Vec<f64> = prompt_weights.iter().map(|w| w / prompt_weights.iter().sum::<f64>()).collect();
    let met = |g: &Table| align::tabular::expectation(&weights, &safe, g) - 0.05;
    let thresholds = safety.iter().map(met).collect();
    Description {
        reference,
        reward,
        safety,
        prompt_weights: Some(prompt_weights),
        beta: 0.1 * 20f64.powf(rng.random()),
        thresholds,
    }
}

pub(crate) fn problem(rng: &mut impl Rng, constraints: usize) -> Problem {
    Problem::new(description(rng, constraints)).unwrap()
}
