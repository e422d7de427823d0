//! Objectives of single responses that are desirable or not.

use serde::{Deserialize, Serialize};

use super::{Derivative, Response, log_sigmoid, sigmoid};

/// A response with its label.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Labelled {
    /// The response.
    pub response: Response,
    /// Whether it is desirable.
    pub desirable: bool,
}

/// What an objective says of one example.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LabelledLoss {
    /// The loss.
    pub loss: f64,
    /// Its derivative.
    pub derivative: Derivative,
    /// The implicit reward βρ.
    pub reward: f64,
}

/// A loss of single responses with its parameters. β > 0 is the temperature of the Kullback–Leibler penalty.
///
/// Some compare an example with what holds for its whole batch: the *shift*. It is a constant of the batch: no
/// derivative flows through it.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Unpaired {
    /// Kahneman–Tversky optimisation (equation 7 of arXiv 2402.01306, version 1):
    ///
    /// w_D·\[1 − σ(β(ρ − z₀))\] for desirable, w_U·\[1 − σ(β(z₀ − ρ))\] for undesirable responses
    ///
    /// The shift is z₀ = max(0, mean ρ of mismatched prompts and responses over the batch), an estimate of
    /// KL(π_θ ‖ π_ref). Theorem 1 of SACPO does not cover it: the loss is bounded, so its population optimum sends every
    /// log-ratio to one infinity or the other (bang-bang) instead of tilting by the value.
    Kto {
        /// β.
        beta: f64,
        /// The weight w_D > 0 of desirable examples.
        desirable_weight: f64,
        /// The weight w_U > 0 of undesirable examples.
        undesirable_weight: f64,
    },
    /// Binary classifier optimisation (arXiv 2404.04656), without its matching of prompt distributions:
    ///
    /// −log σ(βρ − δ) for desirable, −log σ(δ − βρ) for undesirable responses
    ///
    /// The shift δ is the running mean of βρ over all examples of the batches so far, the present one included, as in
    /// TRL; the paper averages the means of both classes. Covered by Theorem 1 of SACPO when responses are labelled
    /// desirable with probability σ(v − c): the optimum of βρ − δ is the logit v − c, a tilt by v/β. Exactly so where
    /// δ = c − β·log E_{π_ref}\[exp(v/β)\] for every prompt, which normalises the tilt. For the running mean that is: c
    /// is the mean of v in the data, and the normalising constant the same for all prompts; otherwise nearly.
    Bco {
        /// β.
        beta: f64,
    },
    /// Supervised fine-tuning on desirable responses: −log π_θ(y|x); undesirable ones do not count.
    ///
    /// Theorem 1 of SACPO does not cover it: there is no reference to tilt.
    Sft,
}

impl Unpaired {
    /// The name in recipes and reports.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Kto { .. } => "kto",
            Self::Bco { .. } => "bco",
            Self::Sft => "sft",
        }
    }

    /// The fewest examples that a batch may have: `kto` compares two of them.
    pub fn smallest_batch(&self) -> usize {
        if self.uses_mismatched() { 2 } else { 1 }
    }

    /// Whether the shift of a batch is estimated from mismatched prompts and responses.
    pub fn uses_mismatched(&self) -> bool {
        matches!(self, Self::Kto { .. })
    }

    /// See [`Objective::outside_theorem`](super::Objective::outside_theorem).
    pub(super) fn outside_theorem(&self) -> Option<&'static str> {
        match self {
            Self::Kto { .. } => Some(
                "Its optimum is all or nothing for every response, not a tilt; `bco` takes the same data and is covered.",
            ),
            Self::Bco { .. } => None,
            Self::Sft => Some("It has no reference, so it forgets what the steps before it have learned."),
        }
    }

    /// z₀ of KTO from the log-ratios ρ of a batch's mismatched prompts and responses; 0 for none.
    pub fn kl_estimate(mismatched: &[f64]) -> f64 {
        let mean = mismatched.iter().sum::<f64>() / mismatched.len().max(1) as f64;
        // f64::max would turn NaN into 0
        if mean < 0.0 { 0.0 } else { mean }
    }

    /// The loss of one example under the batch's shift (z₀ of `kto` in nats, δ of `bco`).
    ///
    /// Finite log-probabilities give finite results, however large. A NaN or infinite number that counts is not smoothed
    /// over: it makes the loss NaN or infinite.
    pub fn evaluate(&self, example: &Labelled, shift: f64) -> LabelledLoss {
        let rho = example.response.log_ratio();
        let sign = if example.desirable { 1.0 } else { -1.0 };
        // 0·gain: the limit at an infinite gain may be finite, such as 0
        let (loss, logp, reward) = match *self {
            Self::Kto { beta, desirable_weight, undesirable_weight } => {
                let weight = if example.desirable { desirable_weight } else { undesirable_weight };
                let gain = sign * beta * (rho - shift);
                let slope = -weight * sign * beta * sigmoid(gain) * sigmoid(-gain);
                (weight * sigmoid(-gain) + 0.0 * gain, slope, beta * rho)
            }
            Self::Bco { beta } => {
                let gain = sign * (beta * rho - shift);
                (-log_sigmoid(gain) + 0.0 * gain, -sign * beta * sigmoid(-gain), beta * rho)
            }
            Self::Sft if example.desirable => (-example.response.policy, -1.0, 0.0),
            Self::Sft => (0.0, 0.0, 0.0),
        };
        LabelledLoss { loss, derivative: Derivative { logp, kl: 0.0 }, reward }
    }
}

/// The mean of all numbers so far: δ of `bco` over the implicit rewards βρ of one batch after another, as TRL has it.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct RunningMean {
    /// The mean; 0 before the first batch.
    pub mean: f64,
    /// How many numbers it is the mean of.
    pub count: u64,
}

impl RunningMean {
    /// Takes in a batch and returns the new mean, the δ under which that batch is evaluated.
    pub fn update(&mut self, batch: &[f64]) -> f64 {
        if !batch.is_empty() {
            let n = batch.len() as f64;
            self.count += batch.len() as u64;
            self.mean += (batch.iter().sum::<f64>() / n - self.mean) * (n / self.count as f64);
        }
        self.mean
    }
}

/// The rule of the KTO paper for its two weights (equation 8 of arXiv 2402.01306, version 1), which TRL applies to the
/// whole training set too: w_D·n_D / (w_U·n_U) should lie in [1, 4/3].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WeightRule {
    /// w_D·n_D / (w_U·n_U); infinite or 0 where one class is missing.
    pub ratio: f64,
    /// The range of w_D, under the given w_U, that the rule allows; nothing where one class is missing.
    pub desirable_weight: Option<[f64; 2]>,
}

impl WeightRule {
    /// Applies the rule to numbers of desirable and undesirable examples and their weights.
    pub fn new([desirable, undesirable]: [usize; 2], [desirable_weight, undesirable_weight]: [f64; 2]) -> Self {
        let (n_d, n_u) = (desirable as f64, undesirable as f64);
        let balanced = undesirable_weight * n_u / n_d;
        let both = desirable > 0 && undesirable > 0;
        Self {
            ratio: desirable_weight * n_d / (undesirable_weight * n_u),
            desirable_weight: both.then_some([balanced, balanced * 4.0 / 3.0]),
        }
    }

    /// Whether the weights are as the rule asks.
    pub fn holds(&self) -> bool {
        // a ratio that meets a bound exactly may miss it by rounding
        (1.0 - 1e-9..=4.0 / 3.0 + 1e-9).contains(&self.ratio)
    }
}
