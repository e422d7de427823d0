//! The expected safeties at every λ, from scored answers of one policy.

use engine::{Error, Result};
use serde::Serialize;

use super::{Bootstrap, Mean, average};
use crate::tabular::Table;

/// The largest accepted score, offset and λ; together with the range of β it keeps every exponent finite.
pub(super) const LARGEST: f64 = 1e100;

/// Answers to prompts, drawn from one policy and scored by one or more safeties g_i.
///
/// With the weights w = exp(o + Σ_i (λ_i − λ⁰_i) g_i/β) they stand for answers of π_λ ∝ π_r·exp(Σ λ_i g_i/β). If they were
/// drawn from π_λ⁰, as they are taken to be, the offsets o are 0: see [`Samples::with_offsets`] for others. Prompts weigh
/// the same, whatever their numbers of answers.
#[derive(Debug, Clone, PartialEq)]
pub struct Samples {
    /// `[constraint][prompt][answer]`.
    pub(super) scores: Vec<Table>,
    /// o, `[prompt][answer]`, if not all are 0.
    pub(super) offsets: Option<Table>,
    pub(super) beta: f64,
    /// λ⁰.
    pub(super) drawn_at: Vec<f64>,
}

/// How many independent draws from the policy at λ the weighted answers to a prompt are worth: (Σw)²/Σw², from 1 to
/// the number of answers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct EffectiveSampleSize {
    /// The harmonic mean over prompts. It is the harmonic one since bias and variance of a prompt's estimate are in
    /// proportion to 1/size.
    pub average: f64,
    /// The smallest of any prompt.
    pub smallest: f64,
}

/// An estimate of G(λ) and how far it can be trusted.
#[derive(Debug, Clone, PartialEq)]
pub struct Estimate {
    /// λ, one per constraint.
    pub lambda: Vec<f64>,
    /// Ĝ_i(λ) of every constraint. The intervals, over prompts and answers, hold together with the confidence of the
    /// bootstrap, and so do the lower bounds: each is at the level that Bonferroni's inequality asks for.
    pub safety: Vec<Mean>,
    /// Estimates of E\[Ĝ_i(λ)\] − G_i(λ), which the intervals do not contain: see [`Samples::bias`].
    pub bias: Vec<f64>,
    /// See there.
    pub effective_sample_size: EffectiveSampleSize,
}

impl Samples {
    /// `scores` holds g_i of every answer, `[constraint][prompt][answer]`; `beta` is the temperature of the reward step, from
    /// 1e-100 to 1e100. The answers were drawn from π_r, unless one of the following methods says otherwise.
    ///
    /// # Errors
    /// [`Error::Input`] that names constraint, prompt and answer, counted from 1, for a score that is not finite or beyond
    /// 1e100, constraints with different numbers of prompts or answers, and a prompt without answers; for no constraint,
    /// fewer than two prompts and β out of its range.
    pub fn new(scores: Vec<Table>, beta: f64) -> Result<Self> {
        if !(1.0 / LARGEST..=LARGEST).contains(&beta) {
            return Err(Error::input(format!(
                "The temperature β is {beta:?}, but it must be a number above 0, from 1e-100 to 1e100."
            )));
        }
        let Some(first) = scores.first() else {
            return Err(Error::input("There are no scores. Give those of one or more constraints."));
        };
        if first.len() < 2 {
            return Err(Error::input(format!(
                "There are scored answers to {} prompts, but how much prompts differ can be seen from two of them on. Score \
                 answers to more prompts: a hundred or more are usual.",
                first.len()
            )));
        }
        if let Some(x) = first.iter().position(Vec::is_empty) {
            return Err(Error::input(format!(
                "Prompt {} has no scored answer. Score at least one, or leave the prompt out.",
                x + 1
            )));
        }
        for (i, table) in scores.iter().enumerate() {
            check_table(&format!("score of constraint {}", i + 1), table, first)?;
        }
        let drawn_at = vec![0.0; scores.len()];
        Ok(Self { scores, offsets: None, beta, drawn_at })
    }

    /// The same answers, drawn from π_λ at this λ ≥ 0 instead of π_r, or from a policy that was trained for it.
    ///
    /// Answers of a policy that was trained for λ⁰ are not quite those of π_λ⁰. What is estimated from them is that policy
    /// tilted by Σ (λ_i − λ⁰_i) g_i/β, which is what a further step would aim at.
    ///
    /// # Errors
    /// [`Error::Input`] unless `lambda` is one number per constraint, from 0 to 1e100.
    pub fn drawn_at(self, lambda: Vec<f64>) -> Result<Self> {
        self.check_lambda(&lambda)?;
        Ok(Self { drawn_at: lambda, ..self })
    }

    /// The same answers with offsets o in nats, `[prompt][answer]`, up to a constant per prompt: log π_λ⁰/μ if they were
    /// drawn from a policy μ.
    ///
    /// With answers of the base model and o = r/β, G is estimated for π_r, and for all π_λ, before even π_r is trained: the
    /// one-shot dualisation of arXiv 2405.19544. There r and the g_i are the scores of models (MoCAN), or β log π/π_ref of
    /// policies that were trained for each alone (PeCAN).
    ///
    /// # Errors
    /// [`Error::Input`] that names prompt and answer, counted from 1, for offsets that are not as many as the answers, not
    /// finite or beyond 1e100.
    pub fn with_offsets(self, offsets: Table) -> Result<Self> {
        check_table("offset", &offsets, &self.scores[0])?;
        Ok(Self { offsets: Some(offsets), ..self })
    }

    /// Ĝ_x(λ) = Σ_y w g_i / Σ_y w of every constraint and prompt, `[constraint][prompt]`. It does not fall with λ_i.
    ///
    /// # Errors
    /// [`Error::Input`] unless λ is one number per constraint, from 0 to 1e100.
    pub fn by_prompt(&self, lambda: &[f64]) -> Result<Vec<Vec<f64>>> {
        let weights = self.weights(lambda)?;
        let of_constraint = |table: &Table| table.iter().zip(&weights).map(|(row, w)| weighted_mean(row, w)).collect();
        Ok(self.scores.iter().map(of_constraint).collect())
    }

    /// Ĝ(λ), the mean of [`Samples::by_prompt`], with everything that says how good it is.
    ///
    /// # Errors
    /// As [`Samples::by_prompt`]; or a confidence too high to be shared by so many constraints.
    pub fn estimate(&self, lambda: &[f64], bootstrap: &Bootstrap) -> Result<Estimate> {
        let bootstrap = bootstrap.jointly(self.scores.len())?;
        Ok(Estimate {
            lambda: lambda.to_vec(),
            safety: self.by_prompt(lambda)?.iter().map(|values| bootstrap.mean(values)).collect::<Result<_>>()?,
            bias: self.bias(lambda)?,
            effective_sample_size: self.effective_sample_size(lambda)?,
        })
    }

    /// The bias of every Ĝ_i(λ) to first order: the mean over prompts of (Ĝ − Ĝ with squared weights)/N_eff.
    ///
    /// A quotient of two means is biased, here towards the policy that was drawn from: with one constraint and λ > λ⁰ the
    /// estimate is too low, and a bound on it errs on the safe side. More prompts do not help, more answers per prompt do.
    /// Where N_eff is near 1, one answer is all that is left, and this number is too small as well.
    ///
    /// # Errors
    /// As [`Samples::by_prompt`].
    pub fn bias(&self, lambda: &[f64]) -> Result<Vec<f64>> {
        let weights = self.weights(lambda)?;
        let squares: Table = weights.iter().map(|row| row.iter().map(|w| w * w).collect()).collect();
        let of_prompt = |scores: &[f64], x: usize| {
            (weighted_mean(scores, &weights[x]) - weighted_mean(scores, &squares[x])) / effective(&weights[x])
        };
        let of_constraint = |table: &Table| {
            let biases: Vec<f64> = table.iter().enumerate().map(|(x, scores)| of_prompt(scores, x)).collect();
            average(&biases)
        };
        Ok(self.scores.iter().map(of_constraint).collect())
    }

    /// The effective sample sizes at λ. Without offsets they fall with the distance of λ from λ⁰ in any direction.
    ///
    /// # Errors
    /// As [`Samples::by_prompt`].
    pub fn effective_sample_size(&self, lambda: &[f64]) -> Result<EffectiveSampleSize> {
        let sizes: Vec<f64> = self.weights(lambda)?.iter().map(|weights| effective(weights)).collect();
        let inverse = average(&sizes.iter().map(|size| 1.0 / size).collect::<Vec<_>>());
        Ok(EffectiveSampleSize { average: 1.0 / inverse, smallest: sizes.into_iter().fold(f64::INFINITY, f64::min) })
    }

    /// The weights, `[prompt][answer]`, of which the largest of every prompt is 1.
    pub(super) fn weights(&self, lambda: &[f64]) -> Result<Table> {
        self.check_lambda(lambda)?;
        let shape = self.scores[0].iter();
        let mut logs = self.offsets.clone().unwrap_or_else(|| shape.map(|row| vec![0.0; row.len()]).collect());
        for (table, (lambda, drawn_at)) in self.scores.iter().zip(lambda.iter().zip(&self.drawn_at)) {
            let shift = lambda - drawn_at;
            for (logs, scores) in logs.iter_mut().zip(table) {
                // relative to the heaviest answer, large scores that hardly differ keep their digits
                let heaviest = if shift < 0.0 { smallest(scores) } else { largest(scores) };
                logs.iter_mut().zip(scores).for_each(|(log, g)| *log += shift * (g - heaviest) / self.beta);
            }
        }
        for row in &mut logs {
            let heaviest = largest(row);
            row.iter_mut().for_each(|log| *log = (*log - heaviest).exp());
        }
        Ok(logs)
    }

    fn check_lambda(&self, lambda: &[f64]) -> Result<()> {
        if lambda.len() != self.scores.len() {
            return Err(Error::input(format!(
                "There are {} multipliers λ for {} constraints. Give one for each.",
                lambda.len(),
                self.scores.len()
            )));
        }
        match lambda.iter().find(|lambda| !(0.0..=LARGEST).contains(*lambda)) {
            None => Ok(()),
            Some(lambda) => Err(Error::input(format!(
                "The multiplier λ is {lambda:?}, but it must be a number that is at least 0 and at most 1e100."
            ))),
        }
    }
}

pub(super) fn largest(scores: &[f64]) -> f64 {
    scores.iter().copied().fold(f64::NEG_INFINITY, f64::max)
}

pub(super) fn smallest(scores: &[f64]) -> f64 {
    scores.iter().copied().fold(f64::INFINITY, f64::min)
}

pub(super) fn weighted_mean(values: &[f64], weights: &[f64]) -> f64 {
    values.iter().zip(weights).map(|(value, weight)| weight * value).sum::<f64>() / weights.iter().sum::<f64>()
}

/// The effective number of answers with these weights, the largest of which is 1.
fn effective(weights: &[f64]) -> f64 {
    let (sum, squares) = weights.iter().fold((0.0, 0.0), |(sum, squares), w| (sum + w, squares + w * w));
    sum * sum / squares
}

/// Fails unless a table has as many prompts and answers as `like` and numbers in the range.
fn check_table(what: &str, table: &Table, like: &Table) -> Result<()> {
    if table.len() != like.len() {
        return Err(Error::input(format!(
            "The {what} is there for {} prompts, but there are {}. Give one list per prompt.",
            table.len(),
            like.len()
        )));
    }
    for (x, (row, like)) in table.iter().zip(like).enumerate() {
        if row.len() != like.len() {
            return Err(Error::input(format!(
                "The {what} is there for {} answers to prompt {}, but there are {}. Give one per answer.",
                row.len(),
                x + 1,
                like.len()
            )));
        }
        if let Some(y) = row.iter().position(|value| value.is_nan() || value.abs() > LARGEST) {
            return Err(Error::input(format!(
                "The {what} of prompt {}, answer {} is {:?}, but it must be finite and at most 1e100 in size. Leave out \
                 answers that could not be scored.",
                x + 1,
                y + 1,
                row[y]
            )));
        }
    }
    Ok(())
}
