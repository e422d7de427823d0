//! The λ that meets the constraints, the policy that is made of it, and whether that policy meets them.
//!
//! From answers of the policy that the first constrained step starts from, λ is chosen; a policy is made of it; and its own
//! answers to the same prompts say whether it meets the thresholds. If not, or if it is much safer than asked for, the next λ
//! is chosen from its answers, the step to it divided by the share of the last prediction that came true. The last word has
//! a certificate on prompts that were used for nothing else.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use align::choose::{Bootstrap, Certificate, Choice, Estimate, Mean, Samples, Verdict};
use engine::Result;
use serde::Serialize;

use super::Run;
use super::blend::Between;
use super::sample::Prompts;
use super::train::Training;
use crate::ui;
use sacpo::recipe::{ChoiceOptions, Merging, Realise, short};

/// The least share of a predicted gain that the next step reckons with; the greatest is its inverse.
const LEAST_GAIN: f64 = 0.1;

/// What came of the constraints.
#[derive(Debug, Serialize)]
pub(crate) struct Outcome {
    /// Those of the first constraint, as [`Met`] has them.
    threshold: f64,
    lambda: Option<f64>,
    lower_bound: Option<f64>,
    /// Of all constraints together.
    pub(crate) verdict: Verdict,
    confidence: f64,
    realise: Realise,
    /// The policy that was judged.
    pub(crate) policy: Option<String>,
    beta_over_lambda: Option<f64>,
    /// Why there is no policy, or why there may be a better one.
    reason: Option<String>,
    /// The share of the judged policy's answers to held-out prompts that did not end within their length.
    unfinished: Option<f64>,
    /// Numbers of prompts that λ was chosen from, and that were held out.
    prompts: [usize; 2],
    answers: usize,
    constraints: Vec<Met>,
    shots: Vec<Shot>,
}

/// One constraint and what the policy makes of it on held-out prompts.
#[derive(Debug, Serialize)]
struct Met {
    metric: String,
    threshold: f64,
    lambda: Option<f64>,
    #[serde(flatten)]
    certificate: Option<Certificate>,
}

/// One λ that was tried.
#[derive(Debug, Clone, Serialize)]
struct Shot {
    policy: String,
    lambda: Vec<f64>,
    /// What was predicted for it, from the answers of the policy before.
    estimate: Vec<Mean>,
    bias: Vec<f64>,
    effective_sample_size: f64,
    /// What its own answers to the same prompts score.
    measured: Vec<Mean>,
    #[serde(skip)]
    index: usize,
}

impl Shot {
    /// By how much the bounds of its own answers exceed the thresholds, at the worst constraint.
    fn margin(&self, thresholds: &[f64]) -> f64 {
        let margins = self.measured.iter().zip(thresholds).map(|(mean, b)| mean.lower_bound - b);
        margins.fold(f64::INFINITY, f64::min)
    }

    /// Whether a constraint that λ serves is exceeded by more than the width of its interval.
    fn is_needlessly_safe(&self, thresholds: &[f64]) -> bool {
        let exceeds = |(mean, b): (&Mean, &f64)| mean.lower_bound - b > mean.interval[1] - mean.interval[0];
        let served = self.lambda.iter().zip(self.measured.iter().zip(thresholds)).filter(|(lambda, _)| **lambda > 0.0);
        served.map(|(_, met)| met).any(exceeds)
    }
}

/// The search for λ.
struct Search<'s, 'r> {
    run: &'s mut Run<'r>,
    choice: ChoiceOptions,
    prompts: Prompts,
    thresholds: Vec<f64>,
    bootstrap: Bootstrap,
    /// The index of the policy that λ is relative to.
    start: usize,
    /// β of λ g/β.
    beta: f64,
    /// Other weights in the labels of the constrained step, if λ is one.
    label_weights: Option<BTreeMap<String, f64>>,
}

/// The prompts that λ is chosen from and those that are held out, if the recipe has constraints.
///
/// # Errors
/// Those of [`Prompts::both`].
pub(super) fn prompts(run: &Run<'_>) -> Result<Option<[Prompts; 2]>> {
    let Some(first) = run.recipe.constraints.first() else { return Ok(None) };
    first.choice.as_ref().map(|choice| Prompts::both(run, choice, first.step.index)).transpose()
}

/// Finds and makes the policy that meets the recipe's constraints, if it has any.
///
/// # Errors
/// Those of training, merging and judging.
pub(super) fn meet(run: &mut Run<'_>, prompts: Option<[Prompts; 2]>) -> Result<Option<Outcome>> {
    let (Some(first), Some([prompts, held_out])) = (run.recipe.constraints.first(), prompts) else { return Ok(None) };
    let Some(choice) = first.choice.clone() else { return Ok(None) };
    let step = first.step.index;
    let thresholds: Vec<f64> = run.recipe.constraints.iter().map(|constraint| constraint.at_least).collect();
    let numbers = [prompts.len(), held_out.len()];
    let start = run.start_of(step);
    let label_weights = run.recipe.steps[step].relabel.clone();
    let beta = match &label_weights {
        Some(_) => run.recipe.steps[step].temperature.values()[0],
        None => run.first_beta(start),
    };
    let bootstrap = Bootstrap::new(choice.confidence, run.recipe.run.seed)?;
    ui::say(format!("Constraint: λ is chosen from answers of {}.", run.policies[start].name()));
    let mut search = Search {
        run,
        choice: choice.clone(),
        prompts,
        thresholds: thresholds.clone(),
        bootstrap,
        start,
        beta,
        label_weights,
    };
    let (shots, reason) = search.shots()?;
    let best = search.best(&shots).cloned();
    let certificates = match &best {
        Some(shot) => {
            let scores = held_out.scores(run, &run.policies[shot.index], &metrics(run))?;
            let means: Vec<Vec<f64>> = scores.iter().map(|table| table.iter().map(|row| mean(row)).collect()).collect();
            Certificate::jointly(&means, &thresholds, choice.confidence)?.into_iter().map(Some).collect()
        }
        None => vec![None; thresholds.len()],
    };
    let unfinished = best.as_ref().map(|shot| held_out.unfinished(run, &run.policies[shot.index])).transpose()?;
    let constraints: Vec<Met> = run
        .recipe
        .constraints
        .iter()
        .zip(certificates)
        .enumerate()
        .map(|(i, (c, certificate))| {
            let lambda = best.as_ref().map(|shot| shot.lambda[i]);
            Met { metric: c.metric.clone(), threshold: c.at_least, lambda, certificate }
        })
        .collect();
    let known: Vec<Certificate> = constraints.iter().filter_map(|met| met.certificate).collect();
    let policy = best.as_ref().map(|shot| &run.policies[shot.index]);
    let outcome = Outcome {
        threshold: thresholds[0],
        lambda: constraints[0].lambda,
        lower_bound: constraints[0].certificate.map(|certificate| certificate.lower_bound),
        verdict: if known.is_empty() { Verdict::Undecided } else { Verdict::of_all(&known) },
        confidence: choice.confidence,
        realise: choice.realise,
        policy: policy.map(|policy| policy.name().to_owned()),
        beta_over_lambda: policy.and_then(|policy| policy.beta_over_lambda),
        reason,
        unfinished,
        prompts: numbers,
        answers: choice.answers,
        constraints,
        shots,
    };
    ui::say(outcome.text());
    Ok(Some(outcome))
}

/// The constrained metrics.
fn metrics<'r>(run: &Run<'r>) -> Vec<&'r str> {
    run.recipe.constraints.iter().map(|constraint| constraint.metric.as_str()).collect()
}

impl Search<'_, '_> {
    /// Tries λ after λ, until one is good; says why the last one is not, if it is not.
    fn shots(&mut self) -> Result<(Vec<Shot>, Option<String>)> {
        let mut samples = self.first_samples()?;
        // what the policy that answers are from scores itself
        let mut scored = samples.estimate(&vec![0.0; self.thresholds.len()], &self.bootstrap)?.safety;
        // of what was predicted for the last policy, the share by which it moved
        let mut gains = vec![1.0; self.thresholds.len()];
        let mut shots: Vec<Shot> = Vec::new();
        loop {
            // why no λ is nearer, if the policy for it is there already
            let mut limit = "no λ of three digits is nearer".to_owned();
            let wanted = match samples.choose(&self.thresholds, &self.bootstrap)? {
                Choice::Chosen(estimate) => estimate.lambda,
                Choice::OutOfSupport { needed, reachable } => {
                    limit = format!(
                        "λ = {} seems to be needed, but there {} answers are worth only {:.1} to a prompt, which is too few to \
                         trust; they reach to λ = {}. Draw more answers",
                        listed(&needed.lambda),
                        self.choice.answers,
                        needed.effective_sample_size.average,
                        listed(&reachable)
                    );
                    ui::say(format!("  {limit}, or a policy that is nearer."));
                    reachable
                }
                Choice::Unreachable { lower_bounds, .. } => {
                    let reason = format!(
                        "no λ meets the constraint with these answers: of {} answers to each prompt the best alone have the \
                         lower bounds {}. Draw more answers, or ask for less",
                        self.choice.answers,
                        listed(&lower_bounds)
                    );
                    return Ok((shots, Some(reason)));
                }
            };
            let from = shots.last().map_or_else(|| vec![0.0; wanted.len()], |shot| shot.lambda.clone());
            let steps = from.iter().zip(wanted.iter().zip(&gains));
            let wanted: Vec<f64> = steps.map(|(from, (to, gain))| (from + (to - from) / gain).max(0.0)).collect();
            let Realised { index, lambda, beyond } = self.realise(&wanted)?;
            let limit = beyond.unwrap_or(limit);
            if shots.iter().any(|shot| shot.index == index) {
                return Ok((shots, Some(limit)));
            }
            let Estimate { safety, bias, effective_sample_size, .. } = samples.estimate(&lambda, &self.bootstrap)?;
            samples = self.samples_of(index, &lambda)?;
            let measured = samples.estimate(&lambda, &self.bootstrap)?.safety;
            for (i, gain) in gains.iter_mut().enumerate() {
                let share = (measured[i].value - scored[i].value) / (safety[i].value - scored[i].value);
                *gain = if share.is_finite() { share.clamp(LEAST_GAIN, 1.0 / LEAST_GAIN) } else { 1.0 };
            }
            scored.clone_from(&measured);
            let shot = Shot {
                policy: self.run.policies[index].name().to_owned(),
                lambda,
                estimate: safety,
                bias,
                effective_sample_size: effective_sample_size.average,
                measured,
                index,
            };
            let bounds: Vec<f64> = shot.measured.iter().map(|mean| mean.lower_bound).collect();
            ui::say(format!(
                "  λ = {}: the policy {} scores at least {} on the prompts that λ is chosen from; {} is asked for.",
                listed(&shot.lambda),
                shot.policy,
                listed(&bounds),
                listed(&self.thresholds)
            ));
            let good = shot.margin(&self.thresholds) >= 0.0 && !shot.is_needlessly_safe(&self.thresholds);
            shots.push(shot);
            if good {
                return Ok((shots, None));
            }
            if shots.len() == self.choice.shots {
                let met = shots.iter().any(|shot| shot.margin(&self.thresholds) >= 0.0);
                let reason = format!(
                    "on the prompts that λ is chosen from, none of the policies made for it ({}) meets the constraint{}. Raise \
                     constraint.shots, or train longer",
                    shots.len(),
                    if met { " closely" } else { "" }
                );
                return Ok((shots, Some(reason)));
            }
        }
    }

    /// Answers of the policy that λ is relative to.
    fn first_samples(&self) -> Result<Samples> {
        let run = &*self.run;
        let start = &run.policies[self.start];
        let samples = Samples::new(self.prompts.scores(run, start, &metrics(run))?, self.beta)?;
        let Some(weights) = &self.label_weights else { return Ok(samples) };
        let others: Vec<&str> = weights.keys().map(String::as_str).collect();
        let mut tables = self.prompts.scores(run, start, &others)?.into_iter().zip(weights.values());
        let Some((mut offsets, weight)) = tables.next() else { return Ok(samples) };
        offsets.iter_mut().flatten().for_each(|value| *value *= weight / self.beta);
        for (table, weight) in tables {
            let values = offsets.iter_mut().flatten().zip(table.iter().flatten());
            values.for_each(|(offset, value)| *offset += value * weight / self.beta);
        }
        samples.with_offsets(offsets)
    }

    /// Answers of a policy that was made for λ.
    fn samples_of(&self, index: usize, lambda: &[f64]) -> Result<Samples> {
        let scores = self.prompts.scores(self.run, &self.run.policies[index], &metrics(self.run))?;
        Samples::new(scores, self.beta)?.drawn_at(lambda.to_vec())
    }

    /// Makes the policy of a λ, or of one that is a little larger and has few digits.
    fn realise(&mut self, wanted: &[f64]) -> Result<Realised> {
        if wanted.iter().all(|lambda| *lambda == 0.0) && self.label_weights.is_none() {
            return Ok(Realised { index: self.start, lambda: wanted.to_vec(), beyond: None });
        }
        let steps: Vec<usize> = self.run.recipe.constraints.iter().map(|constraint| constraint.step.index).collect();
        if let Some(weights) = &self.label_weights {
            let lambda = rounded_up(wanted[0]);
            let metric = self.run.recipe.constraints[0].metric.clone();
            let relabel = weights.iter().map(|(m, w)| (m.clone(), *w)).chain([(metric, lambda)]).collect();
            let name = format!("{}-{}", self.run.recipe.steps[steps[0]].name, short(lambda));
            let training =
                Training { name, step: steps[0], parent: self.start, beta: self.beta, relabel: Some(relabel) };
            return Ok(Realised { index: self.run.make(training)?, lambda: vec![lambda], beyond: None });
        }
        let merging = match self.choice.realise {
            Realise::Train => {
                let mut index = self.start;
                let mut lambda = Vec::new();
                for (&step, &wanted) in steps.iter().zip(wanted) {
                    if wanted == 0.0 {
                        lambda.push(0.0);
                        continue;
                    }
                    let temperature = rounded_down(self.beta / wanted);
                    lambda.push(self.beta / temperature);
                    let prefix = if index == self.start {
                        String::new()
                    } else {
                        format!("{}-", self.run.policies[index].name())
                    };
                    let name = format!("{prefix}{}-{}", self.run.recipe.steps[step].name, short(temperature));
                    index = self.run.make(Training { name, step, parent: index, beta: temperature, relabel: None })?;
                }
                return Ok(Realised { index, lambda, beyond: None });
            }
            Realise::Mix => None,
            Realise::Merge => Some(Merging::P_SACPO),
        };
        let end = self.run.strongest(steps[0]);
        let strongest = &self.run.policies[end];
        let most = self.beta / strongest.beta_over_lambda.unwrap_or(self.beta);
        let q = rounded_up(wanted[0] / most);
        if q >= 1.0 {
            // the estimate may be wrong, so the strongest policy is measured before it is called too weak
            let beyond = format!(
                "λ = {} seems to be needed, but the strongest policy of the step, {}, has λ = {}. Train one at a smaller β/λ",
                short(rounded_up(wanted[0])),
                strongest.name(),
                short(rounded_up(most))
            );
            return Ok(Realised { index: end, lambda: vec![most], beyond: (q > 1.0).then_some(beyond) });
        }
        let kind = if merging.is_some() { "merge" } else { "mix" };
        let name = format!("{}-{kind}-{}", self.run.recipe.steps[steps[0]].name, short(q));
        let between = Between { name, ends: [self.start, end], q, extrapolate: false };
        Ok(Realised { index: self.run.add_between(between, merging)?, lambda: vec![q * most], beyond: None })
    }

    /// Of the policies that meet the constraints the one of the least λ; if none does, the one that misses them least.
    fn best<'a>(&self, shots: &'a [Shot]) -> Option<&'a Shot> {
        let total = |shot: &Shot| shot.lambda.iter().sum::<f64>();
        let meeting = shots.iter().filter(|shot| shot.margin(&self.thresholds) >= 0.0);
        let least = meeting.min_by(|a, b| total(a).total_cmp(&total(b)));
        least.or_else(|| shots.iter().max_by(|a, b| a.margin(&self.thresholds).total_cmp(&b.margin(&self.thresholds))))
    }
}

/// A policy for a λ.
struct Realised {
    /// Its index.
    index: usize,
    /// The λ that it was made for.
    lambda: Vec<f64>,
    /// Why it is not the one that was wanted.
    beyond: Option<String>,
}

impl Outcome {
    /// The outcome for people, without a line break.
    pub(crate) fn text(&self) -> String {
        let mut text = String::from("Constraint");
        for (number, met) in self.constraints.iter().enumerate() {
            let _ = write!(text, "{} E[{}] ≥ {}", if number == 0 { "" } else { "," }, met.metric, met.threshold);
        }
        let Some(policy) = &self.policy else {
            let _ =
                write!(text, ": undecided, no policy was made for it; {}.", self.reason.as_deref().unwrap_or_default());
            return text;
        };
        let _ = write!(text, ": {}. The policy {policy}", self.verdict.name());
        for met in &self.constraints {
            let (Some(certificate), Some(lambda)) = (met.certificate, met.lambda) else { continue };
            let _ = write!(
                text,
                ", made for λ = {lambda:.3}, has {:.3} of {} on {} held-out prompts (one-sided {} % bounds {:.3} and {:.3})",
                certificate.safety,
                met.metric,
                self.prompts[1],
                short((self.confidence * 1000.0).round() / 10.0),
                certificate.lower_bound,
                certificate.upper_bound
            );
        }
        text.push('.');
        if let Some(unfinished) = self.unfinished.filter(|share| *share >= 0.01) {
            let _ = write!(
                text,
                " Note: {:.0} % of its answers were cut before their end, and were judged so. Raise constraint.max_new_tokens.",
                100.0 * unfinished
            );
        }
        if let Some(reason) = &self.reason {
            let _ = write!(text, " Note: {reason}.");
        }
        text
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn listed(values: &[f64]) -> String {
    values.iter().map(|value| format!("{value:.3}")).collect::<Vec<_>>().join(", ")
}

/// The largest number of three significant digits that is not above a positive one: a smaller β/λ is a larger λ.
fn rounded_down(value: f64) -> f64 {
    rounded(value, f64::floor)
}

/// The smallest number of three significant digits that is not below a positive one.
fn rounded_up(value: f64) -> f64 {
    rounded(value, f64::ceil)
}

fn rounded(value: f64, whole: fn(f64) -> f64) -> f64 {
    if value == 0.0 {
        return value;
    }
    let decimals = 2 - value.log10().floor() as i32;
    let scaled = value * 10f64.powi(decimals);
    // a number of three digits stays as it is, though the product is rounded
    let is_whole = (scaled - scaled.round()).abs() < 1e-9 * scaled;
    let digits = if is_whole { scaled.round() } else { whole(scaled) };
    // by way of a text, whose nearest number reads as short as it is
    format!("{digits}e{}", -decimals).parse().unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::{rounded_down, rounded_up};

    #[test]
    fn rounding_keeps_three_digits() {
        for (value, down, up) in [
            (0.45678, 0.456, 0.457),
            (0.4, 0.4, 0.4),
            (1.999, 1.99, 2.0),
            (12345.0, 12300.0, 12400.0),
            (0.00098765, 0.000987, 0.000988),
        ] {
            assert_eq!((rounded_down(value), rounded_up(value)), (down, up));
        }
        assert_eq!(rounded_up(0.0), 0.0);
        for (digits, exponent) in
            (100..1000).flat_map(|digits| [-7, -4, -3, -2, 0, 3].map(|exponent| (digits, exponent)))
        {
            let value: f64 = format!("{digits}e{exponent}").parse().unwrap();
            assert_eq!((rounded_down(value), rounded_up(value)), (value, value), "{digits}e{exponent}");
            // as λ and back again
            assert_eq!(rounded_down(0.1 / (0.1 / value)), value, "{digits}e{exponent}");
        }
    }
}
