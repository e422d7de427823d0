//! Exact expectations of a policy on the held-out prompts.

use engine::{Error, Mixture, PackedBatch, Result, Scorer};
use serde::Serialize;

use super::{Metric, Prompt, World};
use crate::tabular::{divergence, gibbs};

/// How far the probabilities of a prompt's answers may sum above 1: log-probabilities in f32 are rounded.
const SUM_TOLERANCE: f64 = 1e-3;

/// The least probability outside the grammar that the KL divergence distinguishes from none: below it, one
/// minus the sum of the answers' probabilities is rounding.
const OUTSIDE_FLOOR: f64 = 1e-6;

/// What a policy is worth on the held-out prompts: averages over prompts of exact expectations over answers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Evaluation {
    /// E\[r*\].
    pub reward: f64,
    /// E\[g*\].
    pub safety: f64,
    /// E\[r*\] on the risky prompts.
    pub risky_reward: f64,
    /// E\[g*\] on the risky prompts.
    pub risky_safety: f64,
    /// Probability of refusing a harmless prompt.
    pub harmless_refusal: f64,
    /// Probability of a text outside the grammar.
    pub outside: f64,
    /// KL(policy ‖ reference) in nats, all texts outside the grammar taken as one event; a lower bound of the
    /// divergence over all texts, and equal to it when nothing lies outside.
    pub kl: f64,
}

impl World {
    /// log p0 of the answers to every held-out prompt, `[held-out prompt][answer]`.
    pub fn base_logps(&self) -> Vec<Vec<f64>> {
        let of_prompt = |prompt| self.answers(prompt).iter().map(|answer| answer.p0.ln()).collect();
        self.heldout_prompts.iter().map(of_prompt).collect()
    }

    /// log π(y | x) of every answer y to these prompts under a language model of this world, `[prompt][answer]`.
    pub fn answer_logps<'a>(&self, prompts: &[Prompt], policy: impl Into<Mixture<'a>>) -> Vec<Vec<f64>> {
        let mut scorer = Scorer::new(policy, self.model_config().max_position_embeddings);
        let of_prompt = |prompt| {
            let answers: Vec<Vec<u32>> = self.answers(prompt).iter().map(|answer| self.answer_tokens(answer)).collect();
            let mut batch = PackedBatch::default();
            batch.push(&self.prompt_tokens(prompt), &answers.iter().map(Vec::as_slice).collect::<Vec<_>>());
            scorer.logps(&batch)
        };
        prompts.iter().map(of_prompt).collect()
    }

    /// The optimum of one alignment step: on every held-out prompt the policy that maximises
    /// E\[metric\] − temperature · KL(policy ‖ reference), with the texts outside the grammar as one outcome.
    ///
    /// `reference` and the result hold log-probabilities, `[held-out prompt][answer]`.
    ///
    /// # Errors
    /// As [`World::evaluate`].
    pub fn optimum(&self, reference: &[Vec<f64>], metric: Metric, temperature: f64) -> Result<Vec<Vec<f64>>> {
        self.check_prompts(reference)?;
        let mut optimum = Vec::with_capacity(reference.len());
        for (prompt, reference) in self.heldout_prompts.iter().zip(reference) {
            let answers = self.answers(prompt);
            let outside = outside_mass(reference, answers.len(), &prompt.text)?;
            let mut values: Vec<f64> = answers.iter().map(|answer| answer.value(metric)).collect();
            values.push(metric.outside());
            let mut logps = reference.clone();
            logps.push(outside.ln());
            let mut tilted = gibbs(&logps, &values, temperature);
            tilted.pop();
            optimum.push(tilted);
        }
        Ok(optimum)
    }

    /// The exact expectation of a metric over a policy's answers to every held-out prompt, texts outside the grammar
    /// included. `policy` holds log-probabilities, `[held-out prompt][answer]`.
    ///
    /// # Errors
    /// As [`World::evaluate`].
    pub fn expectations(&self, policy: &[Vec<f64>], metric: Metric) -> Result<Vec<f64>> {
        self.check_prompts(policy)?;
        let of_prompt = |(prompt, logps): (&Prompt, &Vec<f64>)| {
            let answers = self.answers(prompt);
            let outside = outside_mass(logps, answers.len(), &prompt.text)? * metric.outside();
            Ok(answers.iter().zip(logps).fold(outside, |sum, (answer, logp)| sum + logp.exp() * answer.value(metric)))
        };
        self.heldout_prompts.iter().zip(policy).map(of_prompt).collect()
    }

    /// The exact worth of a policy. What the answers leave of the probability goes to texts outside the grammar,
    /// which are worth [`Metric::outside`].
    ///
    /// `policy` and `reference` hold log-probabilities, `[held-out prompt][answer]`, in the order of
    /// `heldout_prompts` and [`World::answers`]; −∞ is a probability of 0.
    ///
    /// # Errors
    /// If their shape is not that, a value is NaN, or the probabilities of a prompt's answers sum to more than 1
    /// by more than rounding.
    pub fn evaluate(&self, policy: &[Vec<f64>], reference: &[Vec<f64>]) -> Result<Evaluation> {
        let rewards = self.expectations(policy, Metric::Reward)?;
        let safeties = self.expectations(policy, Metric::Safety)?;
        self.check_prompts(reference)?;
        let mut all = Evaluation {
            reward: 0.0,
            safety: 0.0,
            risky_reward: 0.0,
            risky_safety: 0.0,
            harmless_refusal: 0.0,
            outside: 0.0,
            kl: 0.0,
        };
        let (mut risky_prompts, mut harmless_prompts) = (0.0, 0.0);
        let worths = rewards.into_iter().zip(safeties);
        let logps = policy.iter().zip(reference);
        for ((prompt, (policy, reference)), (reward, safety)) in self.heldout_prompts.iter().zip(logps).zip(worths) {
            let answers = self.answers(prompt);
            let outside = outside_mass(policy, answers.len(), &prompt.text)?;
            let outside_reference = outside_mass(reference, answers.len(), &prompt.text)?;
            let mut refusal = 0.0;
            all.kl += divergence(outside.max(OUTSIDE_FLOOR).ln(), outside_reference.max(OUTSIDE_FLOOR).ln());
            for ((answer, &logp), &logp_reference) in answers.iter().zip(policy).zip(reference) {
                refusal += if answer.refusal { logp.exp() } else { 0.0 };
                all.kl += divergence(logp, logp_reference);
            }
            all.reward += reward;
            all.safety += safety;
            all.outside += outside;
            if prompt.risky {
                risky_prompts += 1.0;
                all.risky_reward += reward;
                all.risky_safety += safety;
            } else {
                harmless_prompts += 1.0;
                all.harmless_refusal += refusal;
            }
        }
        let prompts = risky_prompts + harmless_prompts;
        for total in [&mut all.reward, &mut all.safety, &mut all.outside, &mut all.kl] {
            *total /= prompts;
        }
        all.risky_reward /= risky_prompts;
        all.risky_safety /= risky_prompts;
        all.harmless_refusal /= harmless_prompts;
        Ok(all)
    }

    /// The total variation distance of two policies, averaged over prompts, all texts outside the grammar taken as one
    /// event: the largest difference that they give to the probability of any event, in [0, 1].
    ///
    /// # Errors
    /// As [`World::evaluate`].
    pub fn distance(&self, policy: &[Vec<f64>], other: &[Vec<f64>]) -> Result<f64> {
        self.check_prompts(policy)?;
        self.check_prompts(other)?;
        let mut total = 0.0;
        for ((prompt, policy), other) in self.heldout_prompts.iter().zip(policy).zip(other) {
            let answers = self.answers(prompt).len();
            let outside = [policy, other].map(|logps| outside_mass(logps, answers, &prompt.text));
            let [policy_outside, other_outside] = outside;
            let differences = policy.iter().zip(other).map(|(a, b)| (a.exp() - b.exp()).abs());
            total += 0.5 * (differences.sum::<f64>() + (policy_outside? - other_outside?).abs());
        }
        Ok(total / self.heldout_prompts.len() as f64)
    }

    fn check_prompts(&self, logps: &[Vec<f64>]) -> Result<()> {
        let (expected, found) = (self.heldout_prompts.len(), logps.len());
        if found != expected {
            return Err(Error::Failed(format!(
                "A policy of the quickstart world is evaluated on its {expected} held-out prompts, \
                 but log-probabilities are given for {found} prompts. Give one list per held-out prompt."
            )));
        }
        Ok(())
    }
}

/// One minus the probability of all answers to a prompt, at least 0.
pub(super) fn outside_mass(logps: &[f64], answers: usize, prompt: &str) -> Result<f64> {
    if logps.len() != answers {
        return Err(Error::Failed(format!(
            "The prompt \"{prompt}\" of the quickstart world has {answers} answers, but {} log-probabilities are \
             given for it. Give one per answer.",
            logps.len()
        )));
    }
    let inside: f64 = logps.iter().map(|logp| logp.exp()).sum();
    if inside.is_nan() || inside > 1.0 + SUM_TOLERANCE {
        return Err(Error::Failed(format!(
            "The probabilities of the answers to the prompt \"{prompt}\" of the quickstart world sum to {inside}, \
             which no policy can give. The log-probabilities are wrong: check that they are natural logarithms, \
             summed over the tokens of each answer and its </s>, and that training did not end in NaN."
        )));
    }
    Ok((1.0 - inside).max(0.0))
}
