//! Preference data over finite policies, unlimited or sampled, and the policies that objectives learn from them.
//!
//! The losses are those of [`crate::objective`], evaluated at the log-probabilities of a tabular policy; their
//! derivatives go through the softmax to its logits.

use engine::{Error, Result};
use rand::{Rng, RngExt};

use super::minimise::{Evaluated, minimised};
use super::{Policy, Table, kl};
use crate::objective::{Labelled, Pair, Pairwise, Response, Unpaired};

/// A gradient this small beside the terms that it is the sum of counts as 0.
const STATIONARY: f64 = 1e-9;

/// The expectation of a loss over preference data.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpectedLoss {
    /// The loss.
    pub loss: f64,
    /// Its derivative with respect to every log-probability of the policy.
    pub gradient: Table,
    /// The size of the terms that the derivatives are sums of.
    scale: f64,
}

impl ExpectedLoss {
    fn none(policy: &Policy) -> Self {
        let gradient = policy.logps().iter().map(|row| vec![0.0; row.len()]).collect();
        Self { loss: 0.0, gradient, scale: 0.0 }
    }

    fn add(&mut self, prompt: usize, answer: usize, derivative: f64) {
        self.gradient[prompt][answer] += derivative;
        self.scale += derivative.abs();
    }
}

/// Preference pairs over a tabular policy's answers, each with its share of the data.
#[derive(Debug, Clone, PartialEq)]
pub struct Pairs(Vec<WeightedPair>);

#[derive(Debug, Clone, Copy, PartialEq)]
struct WeightedPair {
    prompt: usize,
    chosen: usize,
    rejected: usize,
    share: f64,
    /// See [`Pair::margin`].
    margin: f64,
}

impl Pairs {
    /// All pairs with their probabilities: a prompt by `weights`, two different answers from `sampling`, and the
    /// Bradley–Terry label P(y ≻ y') = σ(v(y) − v(y')).
    pub fn population(weights: &[f64], sampling: &Policy, values: &Table) -> Self {
        let mut pairs = Vec::new();
        for (prompt, ((weight, logps), values)) in weights.iter().zip(sampling.logps()).zip(values).enumerate() {
            let different = 1.0 - logps.iter().map(|logp| (2.0 * logp).exp()).sum::<f64>();
            for (chosen, a) in logps.iter().enumerate() {
                for (rejected, b) in logps.iter().enumerate().filter(|(rejected, _)| *rejected != chosen) {
                    let label = win_probability(values[chosen], values[rejected]);
                    let share = weight * (a + b).exp() / different * label;
                    if share > 0.0 {
                        pairs.push(WeightedPair { prompt, chosen, rejected, share, margin: 0.0 });
                    }
                }
            }
        }
        Self(pairs)
    }

    /// `count` pairs drawn from [`Pairs::population`].
    pub fn sample(&self, count: usize, rng: &mut impl Rng) -> Self {
        let mut cumulative = Vec::with_capacity(self.0.len());
        let mut sum = 0.0;
        for pair in &self.0 {
            sum += pair.share;
            cumulative.push(sum);
        }
        let mut drawn: Vec<WeightedPair> = self.0.iter().map(|pair| WeightedPair { share: 0.0, ..*pair }).collect();
        for _ in 0..count {
            let at = sum * rng.random::<f64>();
            let index = cumulative.partition_point(|c| *c <= at).min(drawn.len() - 1);
            drawn[index].share += 1.0 / count as f64;
        }
        drawn.retain(|pair| pair.share > 0.0);
        Self(drawn)
    }

    /// The pairs after each label has been turned round with probability `share`.
    pub fn flipped(&self, share: f64) -> Self {
        let kept = self.0.iter().map(|pair| WeightedPair { share: (1.0 - share) * pair.share, ..*pair });
        let turned = self.0.iter().map(|pair| WeightedPair {
            chosen: pair.rejected,
            rejected: pair.chosen,
            share: share * pair.share,
            margin: -pair.margin,
            ..*pair
        });
        Self(kept.chain(turned).collect())
    }

    /// The pairs with the margins m(y_chosen) − m(y_rejected) of metrics aligned before, for `modpo`.
    pub fn with_margins(&self, metric: &Table) -> Self {
        let margin = |pair: &WeightedPair| metric[pair.prompt][pair.chosen] - metric[pair.prompt][pair.rejected];
        Self(self.0.iter().map(|pair| WeightedPair { margin: margin(pair), ..*pair }).collect())
    }

    /// Every chosen response as a desirable one, and every rejected response as an undesirable one.
    pub fn unpaired(&self) -> Labels {
        let labels = |pair: &WeightedPair| {
            [(pair.chosen, true), (pair.rejected, false)].map(|(answer, desirable)| WeightedLabel {
                prompt: pair.prompt,
                answer,
                desirable,
                share: 0.5 * pair.share,
            })
        };
        Labels(self.0.iter().flat_map(labels).collect())
    }

    /// The expected loss of a policy.
    pub fn loss(&self, objective: &Pairwise, policy: &Policy, reference: &Policy) -> ExpectedLoss {
        let mut expected = ExpectedLoss::none(policy);
        for &WeightedPair { prompt, chosen, rejected, share, margin } in &self.0 {
            let pair = Pair {
                chosen: response(policy, reference, prompt, chosen),
                rejected: response(policy, reference, prompt, rejected),
                is_unsafe: [false; 2],
                margin,
            };
            let of_pair = objective.evaluate(&pair);
            expected.loss += share * of_pair.loss;
            expected.add(prompt, chosen, share * of_pair.chosen.logp);
            expected.add(prompt, rejected, share * of_pair.rejected.logp);
        }
        expected
    }

    /// The policy that minimises the expected loss, from the reference on.
    ///
    /// # Errors
    /// If no stationary point is found, as for a loss with kinks.
    pub fn minimiser(&self, objective: &Pairwise, reference: &Policy) -> Result<Policy> {
        let (policy, found) = descended(reference, |policy| self.loss(objective, policy, reference));
        check(found, objective.name())?;
        Ok(policy)
    }
}

/// Answers labelled desirable or undesirable, each with its share of the data.
#[derive(Debug, Clone, PartialEq)]
pub struct Labels(Vec<WeightedLabel>);

#[derive(Debug, Clone, Copy, PartialEq)]
struct WeightedLabel {
    prompt: usize,
    answer: usize,
    desirable: bool,
    share: f64,
}

impl Labels {
    /// All answers with the probabilities of their labels: a prompt by `weights`, an answer from `sampling`, desirable
    /// with probability σ(v(y) − c), c given per prompt.
    pub fn population(weights: &[f64], sampling: &Policy, values: &Table, cuts: &[f64]) -> Self {
        let mut labels = Vec::new();
        for (prompt, ((weight, logps), values)) in weights.iter().zip(sampling.logps()).zip(values).enumerate() {
            for (answer, (logp, &value)) in logps.iter().zip(values).enumerate() {
                let share = weight * logp.exp();
                for (desirable, label) in
                    [(true, win_probability(value, cuts[prompt])), (false, win_probability(cuts[prompt], value))]
                {
                    if share * label > 0.0 {
                        labels.push(WeightedLabel { prompt, answer, desirable, share: share * label });
                    }
                }
            }
        }
        Self(labels)
    }

    /// The expected loss of a policy under its own shift, through which no derivative flows.
    pub fn loss(&self, objective: &Unpaired, policy: &Policy, reference: &Policy) -> ExpectedLoss {
        self.loss_under(objective, policy, reference, self.shift(objective, policy, reference))
    }

    fn loss_under(&self, objective: &Unpaired, policy: &Policy, reference: &Policy, shift: f64) -> ExpectedLoss {
        let mut expected = ExpectedLoss::none(policy);
        for &WeightedLabel { prompt, answer, desirable, share } in &self.0 {
            let example = Labelled { response: response(policy, reference, prompt, answer), desirable };
            let of_example = objective.evaluate(&example, shift);
            expected.loss += share * of_example.loss;
            expected.add(prompt, answer, share * of_example.derivative.logp);
        }
        expected
    }

    /// What a batch of all data would give: δ of `bco`, the mean of βρ; z₀ of `kto`, the KL divergence from the
    /// reference that its mismatched pairs estimate.
    fn shift(&self, objective: &Unpaired, policy: &Policy, reference: &Policy) -> f64 {
        match objective {
            Unpaired::Bco { beta } => {
                let rho = |label: &WeightedLabel| response(policy, reference, label.prompt, label.answer).log_ratio();
                self.0.iter().map(|label| label.share * beta * rho(label)).sum()
            }
            Unpaired::Kto { .. } => Unpaired::kl_estimate(&[kl(&self.weights(policy), policy, reference)]),
            _ => 0.0,
        }
    }

    /// The share of each prompt in the data.
    fn weights(&self, policy: &Policy) -> Vec<f64> {
        let mut weights = vec![0.0; policy.logps().len()];
        self.0.iter().for_each(|label| weights[label.prompt] += label.share);
        weights
    }

    /// The policy that minimises the expected loss, from the reference on, under the shift that it has itself.
    ///
    /// A bounded loss such as `kto`'s is lowest where probabilities are 0; the result then is as near as the gradient
    /// can be told from 0.
    ///
    /// # Errors
    /// If no stationary point is found.
    pub fn minimiser(&self, objective: &Unpaired, reference: &Policy) -> Result<Policy> {
        let under = |shift| descended(reference, |policy| self.loss_under(objective, policy, reference, shift));
        let excess = |shift| self.shift(objective, &under(shift).0, reference) - shift;
        let shift = falling_root(excess);
        let (policy, found) = under(shift);
        check(found, objective.name())?;
        Ok(policy)
    }
}

/// σ(value − other), exactly complementary to the reverse up to rounding.
fn win_probability(value: f64, other: f64) -> f64 {
    1.0 / (1.0 + (other - value).exp())
}

fn response(policy: &Policy, reference: &Policy, prompt: usize, answer: usize) -> Response {
    let [policy, reference] = [policy, reference].map(|p| p.logps()[prompt][answer]);
    Response { policy, reference, len: 1, kl: 0.0 }
}

/// The policy where minimisation over logits ends, and the relative size of the gradient there.
fn descended(reference: &Policy, loss: impl Fn(&Policy) -> ExpectedLoss) -> (Policy, f64) {
    let shaped = |logits: &[f64]| {
        let mut rest = logits;
        let rows = reference.logps().iter().map(|row| {
            let (row, tail) = rest.split_at(row.len());
            rest = tail;
            row.to_vec()
        });
        Policy::from_logits(rows.collect())
    };
    let evaluate = |logits: &[f64]| {
        let policy = shaped(logits);
        let ExpectedLoss { loss: value, gradient: by_logp, scale } = loss(&policy);
        // log π(y) = θ(y) − log Σ exp θ, so ∂/∂θ(y) = ∂/∂log π(y) − π(y)·Σ ∂/∂log π
        let mut gradient = Vec::with_capacity(logits.len());
        for (derivatives, logps) in by_logp.iter().zip(policy.logps()) {
            let sum: f64 = derivatives.iter().sum();
            gradient.extend(derivatives.iter().zip(logps).map(|(d, logp)| d - logp.exp() * sum));
        }
        Evaluated { value, gradient, scale }
    };
    let (logits, at) = minimised(reference.logps().concat(), evaluate);
    (shaped(&logits), at.relative_gradient())
}

fn check(relative_gradient: f64, objective: &str) -> Result<()> {
    if relative_gradient.is_nan() || relative_gradient > STATIONARY {
        return Err(Error::Failed(format!(
            "The population minimum of `{objective}` was not found: the gradient stays at {relative_gradient:.1e} of its \
             terms. Either the loss has kinks, or values and temperature are too far apart for double precision."
        )));
    }
    Ok(())
}

/// Where a function that falls through 0 does so, by bisection.
fn falling_root(f: impl Fn(f64) -> f64) -> f64 {
    let at_zero = f(0.0);
    if at_zero == 0.0 {
        return 0.0;
    }
    let (mut near, mut far) = (0.0, at_zero.signum());
    while f(far) * at_zero > 0.0 && far.abs() < 1e6 {
        (near, far) = (far, 2.0 * far);
    }
    while (far - near).abs() > 1e-14 * (1.0 + far.abs()) {
        let middle = 0.5 * (near + far);
        if f(middle) * at_zero > 0.0 { near = middle } else { far = middle }
    }
    0.5 * (near + far)
}
