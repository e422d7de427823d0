//! Losses of reward and cost models: of the scores of a chosen and a rejected response, instead of log-probabilities.

use super::{Pair, Pairwise, Response, log_sigmoid, sigmoid};

/// A loss of a model that scores responses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScoreLoss {
    /// Bradley–Terry on rewards r: −log σ(r_c − r_r).
    ///
    /// The loss of DPO at β = 1, with scores in the place of log-ratios.
    Reward,
    /// The cost model of Safe RLHF (equation 6 of arXiv 2310.12773) on costs C, which are above 0 for unsafe responses. The
    /// rejected response is the more harmful one:
    ///
    /// −log σ(C_r − C_c) − log σ(s_c·C_c) − log σ(s_r·C_r),   s = 1 for an unsafe response, −1 for a safe one
    Cost,
}

/// What a loss says of one pair.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScorePairLoss {
    /// The loss.
    pub loss: f64,
    /// Its derivatives with respect to the scores of the chosen and the rejected response.
    pub derivatives: [f64; 2],
}

impl ScoreLoss {
    /// The name in commands and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Reward => "reward",
            Self::Cost => "cost",
        }
    }

    /// What a score counts in the reward that is to be high: 1 for a reward, −1 for a cost.
    pub fn sign(self) -> f64 {
        match self {
            Self::Reward => 1.0,
            Self::Cost => -1.0,
        }
    }

    /// The loss of the scores of a chosen and a rejected response. Only costs read whether these are unsafe.
    ///
    /// Finite scores give finite results; a NaN or infinite one makes the loss NaN or infinite.
    pub fn evaluate(self, scores: [f64; 2], is_unsafe: [bool; 2]) -> ScorePairLoss {
        let sign = self.sign();
        let [chosen, rejected] = scores.map(|score| Response { policy: sign * score, reference: 0.0, len: 1, kl: 0.0 });
        let pair = Pair { chosen, rejected, is_unsafe, margin: 0.0 };
        let ranking = Pairwise::Dpo { beta: 1.0, label_smoothing: 0.0 }.evaluate(&pair);
        let mut result = ScorePairLoss {
            loss: ranking.loss,
            derivatives: [ranking.chosen, ranking.rejected].map(|derivative| sign * derivative.logp),
        };
        if self == Self::Cost {
            for ((score, is_unsafe), derivative) in scores.into_iter().zip(is_unsafe).zip(&mut result.derivatives) {
                let s = if is_unsafe { 1.0 } else { -1.0 };
                result.loss -= log_sigmoid(s * score);
                *derivative -= s * sigmoid(-s * score);
            }
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_are_those_of_the_formulas_and_derivatives_their_slopes() {
        let softplus = |x: f64| x.exp().ln_1p();
        for scores in [[0.0, 0.0], [1.5, -0.5], [-2.0, 0.7], [3.0, 3.5]] {
            let [c, r] = scores;
            assert!((ScoreLoss::Reward.evaluate(scores, [true, false]).loss - softplus(r - c)).abs() < 1e-12);
            for is_unsafe in [[false, false], [false, true], [true, false], [true, true]] {
                let [s_c, s_r] = is_unsafe.map(|is_unsafe| if is_unsafe { 1.0 } else { -1.0 });
                let expected = softplus(c - r) + softplus(-s_c * c) + softplus(-s_r * r);
                assert!((ScoreLoss::Cost.evaluate(scores, is_unsafe).loss - expected).abs() < 1e-12);
                for loss in [ScoreLoss::Reward, ScoreLoss::Cost] {
                    let at = |i: usize, step: f64| {
                        let mut moved = scores;
                        moved[i] += step;
                        loss.evaluate(moved, is_unsafe).loss
                    };
                    for (i, derivative) in loss.evaluate(scores, is_unsafe).derivatives.into_iter().enumerate() {
                        let slope = (at(i, 1e-5) - at(i, -1e-5)) / 2e-5;
                        assert!((slope - derivative).abs() < 1e-9, "{loss:?} {scores:?} {is_unsafe:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn extreme_scores_are_finite_and_broken_ones_show() {
        for loss in [ScoreLoss::Reward, ScoreLoss::Cost] {
            let ScorePairLoss { loss: value, derivatives } = loss.evaluate([-1e5, 1e5], [true, false]);
            assert!(value.is_finite() && derivatives.iter().all(|d| d.is_finite()));
            for broken in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                assert!(!loss.evaluate([broken, 0.0], [true, false]).loss.is_finite());
                assert!(!loss.evaluate([0.0, broken], [false, true]).loss.is_finite());
            }
        }
    }
}
