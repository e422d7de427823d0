//! Objectives of pairs: a chosen and a rejected response to one prompt.

use super::{Derivative, Response, log_sigmoid, sigmoid};

/// Two responses to one prompt.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pair {
    /// The preferred response.
    pub chosen: Response,
    /// The other response.
    pub rejected: Response,
    /// Whether the chosen and the rejected response are unsafe; only `safe-dpo` reads it.
    pub is_unsafe: [bool; 2],
    /// Σ_j w_j (m_j(y_chosen) − m_j(y_rejected)) over the metrics aligned before; only `modpo` reads it.
    pub margin: f64,
}

/// What an objective says of one pair.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairLoss {
    /// The loss.
    pub loss: f64,
    /// Its derivative with respect to the chosen response.
    pub chosen: Derivative,
    /// Its derivative with respect to the rejected response.
    pub rejected: Derivative,
    /// The implicit reward of the chosen response: βρ, or what stands for it in an objective without reference.
    pub reward_chosen: f64,
    /// The implicit reward of the rejected response.
    pub reward_rejected: f64,
}

/// A loss of pairs with its parameters. β > 0 is the temperature of the Kullback–Leibler penalty unless said otherwise.
///
/// "Covered" means that Theorem 1 of SACPO (arXiv 2404.11049) holds for a chain of such steps: when labels follow
/// Bradley–Terry with value v (the chosen response wins with probability p = σ(v_chosen − v_rejected)), the population
/// optimum of a step is the Gibbs tilt π_ref(y|x)·exp(v(x,y)/β), up to normalisation, whatever pairs are compared.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Pairwise {
    /// Direct preference optimisation (equation 7 of arXiv 2305.18290), with label smoothing ε (cDPO, equation 3 of
    /// the note on conservative DPO by E. Mitchell):
    ///
    /// −(1−ε) log σ(βh) − ε log σ(−βh)
    ///
    /// Covered at ε = 0. With ε > 0 every pair pulls βh to the logit of (1−ε)p + ε(1−p) instead of that of p: the
    /// margins are compressed, and no longer the differences of a value.
    Dpo {
        /// β.
        beta: f64,
        /// The share ε of labels taken to be flipped, 0 ≤ ε < 0.5.
        label_smoothing: f64,
    },
    /// Provably robust DPO (arXiv 2403.00409), unbiased when a share ε of labels is flipped:
    ///
    /// \[−(1−ε) log σ(βh) + ε log σ(−βh)\] / (1−2ε)
    ///
    /// Covered when labels are flipped with probability ε: its expectation is then the loss of DPO on clean labels. On
    /// labels that are cleaner than that it stretches the margins.
    RobustDpo {
        /// β.
        beta: f64,
        /// The share ε of flipped labels, 0 ≤ ε < 0.5.
        label_smoothing: f64,
    },
    /// Identity preference optimisation (equation 17 of arXiv 2310.12036), whose τ is β:
    ///
    /// (h̄ − 1/(2β))²
    ///
    /// h̄ is the difference of ρ/|y|, as the authors of IPO and TRL have it, or h itself with `sum`.
    ///
    /// Covered with `sum` for the win probability as value: if both responses of a pair are drawn independently from one
    /// policy μ, the optimum is the tilt by P(y beats μ)/β (section 5 of the paper). Averages over tokens bend that tilt
    /// by the lengths.
    Ipo {
        /// β.
        beta: f64,
        /// Whether to take h as it is, instead of averages over tokens.
        sum: bool,
    },
    /// The hinge loss of sequence likelihood calibration (arXiv 2305.10425) on log-ratios, as in arXiv 2309.06657
    /// ("hinge-norm"):
    ///
    /// max(0, 1 − βh)
    ///
    /// Not covered: a pair pulls βh to 1 or −1, by which response wins more often, however often it does.
    Hinge {
        /// β.
        beta: f64,
    },
    /// Noise contrastive alignment of two responses with hard labels (arXiv 2402.05369; `nca_pair` in TRL):
    ///
    /// −log σ(βρ_c) − ½ log σ(−βρ_c) − ½ log σ(−βρ_r)
    ///
    /// Not covered: every response is pulled to βρ = log 2w, w its probability to win against the responses that it is
    /// paired with. That is the logarithm of a probability instead of v, and it does not leave the normalisation free.
    Nca {
        /// β.
        beta: f64,
    },
    /// Efficient exact optimisation on pairs (equation 16 of arXiv 2402.00856): KL of the policy's preference from the
    /// smoothed label,
    ///
    /// σ(βh)·\[log σ(βh) − log(1−ε)\] + σ(−βh)·\[log σ(−βh) − log ε\]
    ///
    /// Not covered: a pair pulls βh to (2p − 1)·log((1−ε)/ε), which ε scales and which is not v's difference.
    Exo {
        /// β.
        beta: f64,
        /// The probability ε that the label is wrong, 0 < ε < 0.5.
        label_smoothing: f64,
    },
    /// Self-play preference optimisation with hard labels (equation 4.7 of arXiv 2405.00675, P ∈ {0, 1}):
    ///
    /// (ρ_c − 1/(2β))² + (ρ_r + 1/(2β))²
    ///
    /// Not covered: every response is pulled to ρ = (w − ½)/β, w its probability to win against the responses that it is
    /// paired with. That is ρ itself, not ρ up to a constant of the prompt, and normalisation bends it.
    Sppo {
        /// β, the inverse of the paper's step size η.
        beta: f64,
    },
    /// Anchored preference optimisation, zero (equation 7 of arXiv 2408.06266):
    ///
    /// \[1 − σ(βρ_c)\] + σ(βρ_r)
    ///
    /// Not covered: the loss is bounded, so its optimum sends log-ratios to infinity by which response wins more often.
    ApoZero {
        /// β.
        beta: f64,
    },
    /// Anchored preference optimisation, down (equation 8 of arXiv 2408.06266), which lowers both responses:
    ///
    /// σ(βρ_c) + \[1 − σ(βh)\]
    ///
    /// Not covered: the loss is bounded, so its optimum sends log-ratios to infinity by which response wins more often.
    ApoDown {
        /// β.
        beta: f64,
    },
    /// Simple preference optimisation (equation 6 of arXiv 2405.14734), on mean log-probabilities, without reference:
    ///
    /// −log σ(β·log π_θ(y_c|x)/|y_c| − β·log π_θ(y_r|x)/|y_r| − γ)
    ///
    /// Not covered: there is no reference to tilt. The rewards are β·log π_θ(y|x)/|y|.
    SimPo {
        /// β > 0, the scale of the length-normalised reward.
        beta: f64,
        /// The target margin γ ≥ 0.
        gamma: f64,
    },
    /// Odds ratio preference optimisation (equations 6 and 7 of arXiv 2403.07691), without reference:
    ///
    /// −log π̄_c − β·log σ(log odds_c − log odds_r),   log odds = log π̄ − log(1 − π̄),   log π̄ = log π_θ(y|x)/|y|
    ///
    /// Log-probabilities must be below 0, or the odds are infinite. TRL's likelihood term is over prompt and response;
    /// here, as in the paper, over the response. Not covered: there is no reference to tilt. The rewards are β·log π̄.
    Orpo {
        /// The weight of the odds ratio (λ in the paper, β in TRL), > 0.
        beta: f64,
    },
    /// Contrastive preference optimisation (equation 3 of arXiv 2401.08417, with the likelihood of the chosen response),
    /// without reference:
    ///
    /// −log σ(β·\[log π_θ(y_c|x) − log π_θ(y_r|x)\]) − α·log π_θ(y_c|x)/|y_c|
    ///
    /// The likelihood is averaged over the tokens of the response; the paper has its sum, and TRL the average over all
    /// tokens of a batch, which is the same for a batch of one pair. Not covered: there is no reference to tilt. The
    /// rewards are β·log π_θ(y|x).
    Cpo {
        /// β > 0.
        beta: f64,
        /// The weight α ≥ 0 of the likelihood of the chosen response.
        alpha: f64,
    },
    /// Direct preference optimisation under a hard safety constraint (SafeDPO, arXiv 2505.20065): an unsafe chosen
    /// response changes places with a safe rejected one, pairs of two unsafe responses have loss 0, and
    ///
    /// −log σ(βh − (u_r − u_c)·Δ),   u = 1 for an unsafe response, else 0
    ///
    /// Derivatives belong to the responses as the pair has them; the rewards are in the new order, so that a positive
    /// margin is what the loss asks for. Not covered: safe responses always win against unsafe ones, so the optimum
    /// forbids these.
    SafeDpo {
        /// β.
        beta: f64,
        /// The additional margin Δ ≥ 0 of a safe response over an unsafe one.
        delta: f64,
    },
    /// Multi-objective DPO (arXiv 2310.03708): with w the weight of the pairs' own metric and the margins of the metrics
    /// aligned before,
    ///
    /// −log σ((1/w)·\[βh − Σ_j w_j (m_j(y_c) − m_j(y_r))\])
    ///
    /// Covered: the optimum is the tilt by (w·v + Σ w_j m_j)/β. With w = λ, the implicit margins
    /// β·log(π_r/π_ref) of a first step and π_ref as reference it is DPO of the second step, at β/λ with reference π_r.
    Modpo {
        /// β.
        beta: f64,
        /// The weight w > 0 of the pairs' own metric.
        weight: f64,
    },
    /// Token-level DPO (TDPO₂ of arXiv 2404.11999), with D = Σₜ KL(π_ref ‖ π_θ) along each response:
    ///
    /// −log σ(βh − αβ·\[D_r − sg(D_c)\]),   sg: the derivative stops
    ///
    /// Not covered: the divergence along a response shifts the margin at the tilt away from v's.
    Tdpo {
        /// β.
        beta: f64,
        /// The weight α ≥ 0 of the sequential divergence.
        alpha: f64,
    },
}

impl Pairwise {
    /// The name in recipes and reports.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Dpo { .. } => "dpo",
            Self::RobustDpo { .. } => "robust-dpo",
            Self::Ipo { .. } => "ipo",
            Self::Hinge { .. } => "hinge",
            Self::Nca { .. } => "nca",
            Self::Exo { .. } => "exo",
            Self::Sppo { .. } => "sppo",
            Self::ApoZero { .. } => "apo-zero",
            Self::ApoDown { .. } => "apo-down",
            Self::SimPo { .. } => "simpo",
            Self::Orpo { .. } => "orpo",
            Self::Cpo { .. } => "cpo",
            Self::SafeDpo { .. } => "safe-dpo",
            Self::Modpo { .. } => "modpo",
            Self::Tdpo { .. } => "tdpo",
        }
    }

    /// Whether the loss depends on the divergence from the reference along each response.
    pub fn uses_divergence(&self) -> bool {
        matches!(self, Self::Tdpo { .. })
    }

    /// See [`Objective::outside_theorem`](super::Objective::outside_theorem).
    pub(super) fn outside_theorem(&self) -> Option<&'static str> {
        match self {
            Self::Dpo { label_smoothing: 0.0, .. } | Self::RobustDpo { .. } | Self::Modpo { .. } => None,
            Self::Dpo { .. } => Some("Label smoothing compresses the margins, by more the clearer a preference is."),
            Self::Ipo { sum: true, .. } => None,
            Self::Ipo { .. } => {
                Some("Averages over tokens bend the tilt by the lengths of the responses; sums would not.")
            }
            Self::Hinge { .. } => Some("The hinge only decides which response wins, not by how much."),
            Self::Nca { .. } | Self::Sppo { .. } => Some(
                "It sets each log-ratio by a win probability against the data's own responses, not by the metric's value.",
            ),
            Self::Exo { .. } => {
                Some("Its margins are win probabilities scaled by the label smoothing, not the metric's.")
            }
            Self::ApoZero { .. } | Self::ApoDown { .. } => {
                Some("A bounded loss drives probabilities to 0 or 1 instead of to a tilt.")
            }
            Self::SimPo { .. } | Self::Orpo { .. } | Self::Cpo { .. } => {
                Some("It has no reference, so its optimum does not depend on the steps before it.")
            }
            Self::SafeDpo { .. } => Some("It forbids unsafe responses altogether, so there is no λ to speak of."),
            Self::Tdpo { .. } => Some("The divergence along each response shifts the tilt."),
        }
    }

    /// The loss of one pair, its derivatives, and the implicit rewards.
    ///
    /// Finite inputs give finite results, however large the margin, as long as its square does not overflow. A NaN or
    /// infinite input that the objective reads is not smoothed over: it makes the loss NaN or infinite.
    pub fn evaluate(&self, pair: &Pair) -> PairLoss {
        let (c, r) = (&pair.chosen, &pair.rejected);
        let mut result = self.finite(pair);
        // the limit at an infinite margin may be finite, such as 0
        let read = match self {
            Self::Modpo { .. } => pair.margin,
            Self::Tdpo { .. } => c.kl - r.kl,
            _ => 0.0,
        };
        result.loss += 0.0 * (result.reward_chosen + result.reward_rejected + read);
        result
    }

    /// The loss of a pair of finite numbers; infinite ones may give a finite limit.
    fn finite(&self, pair: &Pair) -> PairLoss {
        let (c, r) = (&pair.chosen, &pair.rejected);
        match *self {
            Self::Dpo { beta, label_smoothing: e } => of_margin(pair, beta, |m| {
                let slope = e * sigmoid(m) - (1.0 - e) * sigmoid(-m);
                (-(1.0 - e) * log_sigmoid(m) - e * log_sigmoid(-m), slope)
            }),
            Self::RobustDpo { beta, label_smoothing: e } => of_margin(pair, beta, |m| {
                let loss = -(1.0 - e) * log_sigmoid(m) + e * log_sigmoid(-m);
                let slope = -(1.0 - e) * sigmoid(-m) - e * sigmoid(m);
                (loss / (1.0 - 2.0 * e), slope / (1.0 - 2.0 * e))
            }),
            Self::Ipo { beta, sum } => {
                let scale = |response: &Response| if sum { 1.0 } else { 1.0 / response.len as f64 };
                let (scale_c, scale_r) = (scale(c), scale(r));
                let error = c.log_ratio() * scale_c - r.log_ratio() * scale_r - 0.5 / beta;
                of_log_ratios(pair, beta, error * error, [2.0 * error * scale_c, -2.0 * error * scale_r])
            }
            Self::Hinge { beta } => of_margin(pair, beta, |m| ((1.0 - m).max(0.0), if m < 1.0 { -1.0 } else { 0.0 })),
            Self::Nca { beta } => {
                let (x, y) = (beta * c.log_ratio(), beta * r.log_ratio());
                let loss = -log_sigmoid(x) - 0.5 * log_sigmoid(-x) - 0.5 * log_sigmoid(-y);
                let slopes = [0.5 * sigmoid(x) - sigmoid(-x), 0.5 * sigmoid(y)];
                of_log_ratios(pair, beta, loss, slopes.map(|slope| beta * slope))
            }
            Self::Exo { beta, label_smoothing: e } => of_margin(pair, beta, |m| {
                let (win, lose) = (sigmoid(m), sigmoid(-m));
                let (log_right, log_wrong) = ((-e).ln_1p(), e.ln());
                let loss = win * (log_sigmoid(m) - log_right) + lose * (log_sigmoid(-m) - log_wrong);
                (loss, win * lose * (m - log_right + log_wrong))
            }),
            Self::Sppo { beta } => {
                let (x, y) = (c.log_ratio() - 0.5 / beta, r.log_ratio() + 0.5 / beta);
                of_log_ratios(pair, beta, x * x + y * y, [2.0 * x, 2.0 * y])
            }
            Self::ApoZero { beta } => {
                let (x, y) = (beta * c.log_ratio(), beta * r.log_ratio());
                let slopes = [-beta * sigmoid(x) * sigmoid(-x), beta * sigmoid(y) * sigmoid(-y)];
                of_log_ratios(pair, beta, sigmoid(-x) + sigmoid(y), slopes)
            }
            Self::ApoDown { beta } => {
                let (x, m) = (beta * c.log_ratio(), beta * (c.log_ratio() - r.log_ratio()));
                let (anchor, slope) = (beta * sigmoid(x) * sigmoid(-x), beta * sigmoid(m) * sigmoid(-m));
                of_log_ratios(pair, beta, sigmoid(x) + sigmoid(-m), [anchor - slope, slope])
            }
            Self::SimPo { beta, gamma } => {
                let (reward_chosen, reward_rejected) = (beta * c.mean_logp(), beta * r.mean_logp());
                let margin = reward_chosen - reward_rejected - gamma;
                let slope = -beta * sigmoid(-margin);
                PairLoss {
                    loss: -log_sigmoid(margin),
                    chosen: Derivative { logp: slope / c.len as f64, kl: 0.0 },
                    rejected: Derivative { logp: -slope / r.len as f64, kl: 0.0 },
                    reward_chosen,
                    reward_rejected,
                }
            }
            Self::Orpo { beta } => {
                let margin = log_odds(c.mean_logp()) - log_odds(r.mean_logp());
                let slope = -beta * sigmoid(-margin);
                let d_chosen = slope * d_log_odds(c.mean_logp()) - 1.0;
                let d_rejected = -slope * d_log_odds(r.mean_logp());
                PairLoss {
                    loss: -c.mean_logp() - beta * log_sigmoid(margin),
                    chosen: Derivative { logp: d_chosen / c.len as f64, kl: 0.0 },
                    rejected: Derivative { logp: d_rejected / r.len as f64, kl: 0.0 },
                    reward_chosen: beta * c.mean_logp(),
                    reward_rejected: beta * r.mean_logp(),
                }
            }
            Self::Cpo { beta, alpha } => {
                let margin = beta * (c.policy - r.policy);
                let slope = -beta * sigmoid(-margin);
                PairLoss {
                    loss: -log_sigmoid(margin) - alpha * c.mean_logp(),
                    chosen: Derivative { logp: slope - alpha / c.len as f64, kl: 0.0 },
                    rejected: Derivative { logp: -slope, kl: 0.0 },
                    reward_chosen: beta * c.policy,
                    reward_rejected: beta * r.policy,
                }
            }
            Self::SafeDpo { beta, delta } => match pair.is_unsafe {
                [true, true] => of_log_ratios(pair, beta, 0.0, [0.0; 2]),
                [true, false] => {
                    let ordered = Pair { chosen: *r, rejected: *c, is_unsafe: [false, true], ..*pair };
                    let loss = self.finite(&ordered);
                    PairLoss { chosen: loss.rejected, rejected: loss.chosen, ..loss }
                }
                [false, rejected_unsafe] => {
                    let extra = if rejected_unsafe { delta } else { 0.0 };
                    of_margin(pair, beta, |m| (-log_sigmoid(m - extra), -sigmoid(extra - m)))
                }
            },
            Self::Modpo { beta, weight } => of_margin(pair, beta, |m| {
                let own = (m - pair.margin) / weight;
                (-log_sigmoid(own), -sigmoid(-own) / weight)
            }),
            Self::Tdpo { beta, alpha } => {
                let shift = alpha * beta * (r.kl - c.kl);
                let mut loss = of_margin(pair, beta, |m| (-log_sigmoid(m - shift), -sigmoid(shift - m)));
                // the chosen response's divergence is held fixed
                loss.rejected.kl = -alpha * loss.chosen.logp;
                loss
            }
        }
    }
}

/// A loss that depends on the margin m = βh alone; `f` returns it with its derivative with respect to m.
fn of_margin(pair: &Pair, beta: f64, f: impl Fn(f64) -> (f64, f64)) -> PairLoss {
    let (loss, slope) = f(beta * (pair.chosen.log_ratio() - pair.rejected.log_ratio()));
    of_log_ratios(pair, beta, loss, [beta * slope, -beta * slope])
}

/// A loss of the log-ratios, with its derivatives with respect to ρ_chosen and ρ_rejected.
fn of_log_ratios(pair: &Pair, beta: f64, loss: f64, [d_chosen, d_rejected]: [f64; 2]) -> PairLoss {
    PairLoss {
        loss,
        chosen: Derivative { logp: d_chosen, kl: 0.0 },
        rejected: Derivative { logp: d_rejected, kl: 0.0 },
        reward_chosen: beta * pair.chosen.log_ratio(),
        reward_rejected: beta * pair.rejected.log_ratio(),
    }
}

/// log p − log(1 − p) for p = e^logp < 1.
fn log_odds(logp: f64) -> f64 {
    logp - log_one_minus_exp(logp)
}

/// The derivative of [`log_odds`]: 1/(1 − p).
fn d_log_odds(logp: f64) -> f64 {
    -1.0 / logp.exp_m1()
}

/// log(1 − e^x) for x < 0, precise near 0 and far from it (M. Mächler, "Accurately computing log(1 − exp(−|a|))").
fn log_one_minus_exp(x: f64) -> f64 {
    if x > -std::f64::consts::LN_2 { (-x.exp_m1()).ln() } else { (-x.exp()).ln_1p() }
}
