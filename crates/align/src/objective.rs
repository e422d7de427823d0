//! Losses as pure functions of sequence log-probabilities.
//!
//! An objective never sees a tensor: it gets the log-probabilities of a pair's two responses under
//! policy and reference, and returns the loss with its derivatives with respect to the policy's
//! log-probabilities. The engine turns those derivatives into a backward pass.

use engine::{Error, Result};

/// The log-probabilities of one pair: sums over the response tokens, in nats, EOS included.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairLogps {
    /// log π_θ(y_chosen | x).
    pub policy_chosen: f64,
    /// log π_θ(y_rejected | x).
    pub policy_rejected: f64,
    /// log π_ref(y_chosen | x).
    pub ref_chosen: f64,
    /// log π_ref(y_rejected | x).
    pub ref_rejected: f64,
    /// Number of tokens in the chosen response, ≥ 1.
    pub len_chosen: usize,
    /// Number of tokens in the rejected response, ≥ 1.
    pub len_rejected: usize,
}

impl PairLogps {
    /// ρ_chosen = log π_θ(y_chosen | x) − log π_ref(y_chosen | x).
    pub fn log_ratio_chosen(&self) -> f64 {
        self.policy_chosen - self.ref_chosen
    }

    /// ρ_rejected = log π_θ(y_rejected | x) − log π_ref(y_rejected | x).
    pub fn log_ratio_rejected(&self) -> f64 {
        self.policy_rejected - self.ref_rejected
    }
}

/// What an objective says of one pair.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairLoss {
    /// The loss in nats.
    pub loss: f64,
    /// ∂loss / ∂ log π_θ(y_chosen | x).
    pub d_chosen: f64,
    /// ∂loss / ∂ log π_θ(y_rejected | x).
    pub d_rejected: f64,
    /// The implicit reward β·ρ_chosen.
    pub reward_chosen: f64,
    /// The implicit reward β·ρ_rejected.
    pub reward_rejected: f64,
}

/// A preference loss with its parameters.
///
/// In step k of a stepwise chain the reference is the policy of step k−1 and β is β/λ; see
/// [`Objective::at_temperature`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Objective {
    /// Direct preference optimisation (equation 7 of arXiv 2305.18290), with label smoothing ε (cDPO):
    ///
    /// −(1−ε) log σ(βh) − ε log σ(−βh),   h = ρ_chosen − ρ_rejected,   ρ = log π_θ − log π_ref.
    ///
    /// Theorem 1 of SACPO (arXiv 2404.11049) covers it: when labels follow Bradley–Terry with reward
    /// r, the population optimum at ε = 0 is the Gibbs tilt π_ref(y|x)·exp(r(x,y)/β), so that a
    /// second run that is referenced to the first, with safety labels and β/λ, ends at the tilt by
    /// r + λg.
    Dpo {
        /// The temperature of the Kullback–Leibler penalty, > 0.
        beta: f64,
        /// The share ε of labels taken to be flipped, 0 ≤ ε < 0.5.
        label_smoothing: f64,
    },
}

impl Objective {
    /// DPO with parameters that have been checked, as [`Objective::validated`] does.
    pub fn dpo(beta: f64, label_smoothing: f64) -> Result<Self> {
        Self::Dpo { beta, label_smoothing }.validated()
    }

    /// The name in recipes and reports.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Dpo { .. } => "dpo",
        }
    }

    /// The temperature β.
    pub fn beta(&self) -> f64 {
        match *self {
            Self::Dpo { beta, .. } => beta,
        }
    }

    /// The same objective at another temperature, such as β/λ for step k of a chain.
    ///
    /// Fails unless `beta` is positive and finite.
    pub fn at_temperature(self, beta: f64) -> Result<Self> {
        match self {
            Self::Dpo { label_smoothing, .. } => Self::dpo(beta, label_smoothing),
        }
    }

    /// Returns the objective if its parameters are within their ranges, else [`Error::Input`].
    pub fn validated(self) -> Result<Self> {
        let Self::Dpo { beta, label_smoothing } = self;
        if !(beta > 0.0 && beta.is_finite()) {
            return Err(Error::input(format!(
                "The temperature beta of `{}` is {beta}, but it must be a positive number. \
                 Values between 0.01 and 1 are usual; a smaller one lets the policy move further from its reference.",
                self.name()
            )));
        }
        if !(0.0..0.5).contains(&label_smoothing) {
            return Err(Error::input(format!(
                "The label smoothing of `{}` is {label_smoothing}, but it must be at least 0 and less than 0.5. \
                 It is the share of labels that are taken to be wrong; 0 turns it off.",
                self.name()
            )));
        }
        Ok(self)
    }

    /// The loss of one pair, its derivatives, and the implicit rewards.
    ///
    /// A finite margin gives finite results, however large. A NaN or infinite log-probability is not
    /// smoothed over: it makes the loss NaN or infinite.
    pub fn evaluate(&self, logps: &PairLogps) -> PairLoss {
        let (chosen, rejected) = (logps.log_ratio_chosen(), logps.log_ratio_rejected());
        match *self {
            Self::Dpo { beta, label_smoothing: epsilon } => {
                let margin = beta * (chosen - rejected);
                let slope = epsilon * sigmoid(margin) - (1.0 - epsilon) * sigmoid(-margin);
                PairLoss {
                    loss: -(1.0 - epsilon) * log_sigmoid(margin) - epsilon * log_sigmoid(-margin),
                    d_chosen: beta * slope,
                    d_rejected: -beta * slope,
                    reward_chosen: beta * chosen,
                    reward_rejected: beta * rejected,
                }
            }
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
