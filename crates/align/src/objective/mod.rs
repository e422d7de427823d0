//! Losses as pure functions of sequence log-probabilities.
//!
//! An objective never sees a tensor: it gets the log-probabilities of responses under policy and reference, and
//! returns the loss with its derivatives with respect to the policy's log-probabilities. The engine turns those
//! derivatives into a backward pass, and a tabular policy trains through the same functions.
//!
//! Throughout, ρ = log π_θ(y|x) − log π_ref(y|x) and h = ρ_chosen − ρ_rejected; σ is the logistic function. In step
//! k of a stepwise chain π_ref is the policy of step k − 1 and β is β/λ.

mod options;
mod pairwise;
mod score;
mod unpaired;

pub use options::{NAMES, Options};
pub use pairwise::{Pair, PairLoss, Pairwise};
pub use score::{ScoreLoss, ScorePairLoss};
pub use unpaired::{Labelled, LabelledLoss, RunningMean, Unpaired, WeightRule};

/// The log-probabilities of one response: sums over its tokens, in nats, EOS included.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Response {
    /// log π_θ(y | x).
    pub policy: f64,
    /// log π_ref(y | x); objectives without a reference do not read it.
    pub reference: f64,
    /// Number of tokens, ≥ 1.
    pub len: usize,
    /// Σₜ KL(π_ref(·|x,y₍<t₎) ‖ π_θ(·|x,y₍<t₎)) ≥ 0 over the response's positions; only `tdpo` reads it.
    pub kl: f64,
}

impl Response {
    /// ρ = log π_θ(y | x) − log π_ref(y | x).
    pub fn log_ratio(&self) -> f64 {
        self.policy - self.reference
    }

    /// log π_θ(y | x) / |y|, the mean over tokens.
    fn mean_logp(&self) -> f64 {
        self.policy / self.len as f64
    }
}

/// The derivative of a loss with respect to what the policy says of one response.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Derivative {
    /// ∂loss / ∂ log π_θ(y | x); of a model with a score head ∂loss / ∂ score.
    pub logp: f64,
    /// ∂loss / ∂ Σₜ KL(π_ref ‖ π_θ); 0 but for `tdpo`.
    pub kl: f64,
}

/// A loss with its parameters, by the kind of data that it takes. Made by [`Options::build`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Objective {
    /// Takes a chosen and a rejected response to one prompt.
    Pairwise(Pairwise),
    /// Takes single responses, desirable or undesirable.
    Unpaired(Unpaired),
}

impl Objective {
    /// The name in recipes and reports.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Pairwise(objective) => objective.name(),
            Self::Unpaired(objective) => objective.name(),
        }
    }

    /// Whether the loss depends on the log-probabilities of the reference.
    pub fn uses_reference(&self) -> bool {
        !matches!(
            self,
            Self::Pairwise(Pairwise::SimPo { .. } | Pairwise::Orpo { .. } | Pairwise::Cpo { .. })
                | Self::Unpaired(Unpaired::Sft)
        )
    }

    /// Whether the loss depends on the number of tokens of a response.
    pub fn uses_lengths(&self) -> bool {
        matches!(
            self,
            Self::Pairwise(
                Pairwise::Ipo { sum: false, .. }
                    | Pairwise::SimPo { .. }
                    | Pairwise::Orpo { .. }
                    | Pairwise::Cpo { .. }
            )
        )
    }

    /// Why Theorem 1 of SACPO (arXiv 2404.11049) does not cover a chain with this objective, as a sentence; nothing
    /// where it does: where the population optimum of a step is the reference tilted by exp(value/β).
    pub fn outside_theorem(&self) -> Option<&'static str> {
        match self {
            Self::Pairwise(objective) => objective.outside_theorem(),
            Self::Unpaired(objective) => objective.outside_theorem(),
        }
    }
}

/// log σ(x) = −log(1 + e^−x), without overflow or cancellation for any finite x.
fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

/// σ(x) = 1 / (1 + e^−x), with full relative precision in both tails.
fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 {
        1.0 / (1.0 + (-x).exp())
    } else {
        let e = x.exp();
        e / (1.0 + e)
    }
}
