//! The exact solution of the constrained problem, by its dual.
//!
//! D(λ) = max_π E\[r\] − β KL + Σ λ_i (E\[g_i\] − b_i) = β E_x log E_ref exp((r + Σ λ_i g_i)/β) − Σ λ_i b_i is convex,
//! with ∂D/∂λ_i = E\[g_i\] − b_i and ∂²D/∂λ_i∂λ_j = E_x Cov(g_i, g_j)/β under the Gibbs policy at λ. Its minimum over
//! λ ≥ 0 is the value of the problem when a policy meets all thresholds with room to spare (Slater's condition).

use engine::{Error, Result};

use super::dual::ScaledDual;
use super::policy::{largest_possible, soft_max};
use super::{Policy, Problem, Table, expectation, kl};

/// The largest accepted distance from the optimality conditions, for scaled constraints.
const ACCEPTED: f64 = 1e-9;

/// Multipliers, their policy, and how good both are.
#[derive(Debug, Clone, PartialEq)]
pub struct Solution {
    /// λ ≥ 0, one per constraint.
    pub lambda: Vec<f64>,
    /// The Gibbs policy ∝ π_ref·exp((r + Σ λ_i g_i)/β).
    pub policy: Policy,
    /// E\[r\].
    pub reward: f64,
    /// E\[g_i\].
    pub safety: Vec<f64>,
    /// KL(policy ‖ π_ref) in nats.
    pub kl: f64,
    /// D(λ) − (E\[r\] − β KL): how much better than this policy any other could at most be. 0 at the optimum.
    pub duality_gap: f64,
    /// The largest violation of the optimality conditions, in units of reward and safety: stationarity (r + Σ λ_i g_i −
    /// β log π/π_ref is the same for all answers to a prompt), E\[g_i\] ≥ b_i, and λ_i (E\[g_i\] − b_i) = 0.
    pub kkt_residual: f64,
}

impl Problem {
    /// The Gibbs policy ∝ π_ref·exp((r + Σ λ_i g_i)/β), which maximises the Lagrangian at λ ≥ 0.
    pub fn policy_at(&self, lambda: &[f64]) -> Policy {
        self.reference.tilted(&self.weighted_value(lambda), self.beta)
    }

    /// D(λ).
    pub fn dual(&self, lambda: &[f64]) -> f64 {
        let values = self.weighted_value(lambda);
        let rows = self.reference.logps().iter().zip(&values);
        let soft: f64 = self.weights.iter().zip(rows).map(|(w, (logps, v))| w * soft_max(logps, v, self.beta)).sum();
        soft - lambda.iter().zip(&self.thresholds).map(|(l, b)| l * b).sum::<f64>()
    }

    /// The policy at λ ≥ 0 and how far it is from the optimum.
    pub fn at(&self, lambda: Vec<f64>) -> Solution {
        let policy = self.policy_at(&lambda);
        let reward = expectation(&self.weights, &policy, &self.reward);
        let safety: Vec<f64> = self.safety.iter().map(|g| expectation(&self.weights, &policy, g)).collect();
        let kl = kl(&self.weights, &policy, &self.reference);
        let duality_gap = self.dual(&lambda) - (reward - self.beta * kl);
        let constraints = lambda.iter().zip(safety.iter().zip(&self.thresholds));
        let violations = constraints.map(|(l, (g, b))| (b - g).max((l * (g - b)).abs()));
        let kkt_residual = violations.fold(self.stationarity(&lambda, &policy), f64::max);
        Solution { lambda, policy, reward, safety, kl, duality_gap, kkt_residual }
    }

    /// The optimal multipliers and policy.
    ///
    /// # Errors
    /// [`Error::Input`] if no policy meets the thresholds, or only the limit of policies for λ → ∞ does, with what is
    /// attainable; or if β is too small for the values in double precision.
    pub fn solve(&self) -> Result<Solution> {
        let dual = ScaledDual::new(self)?;
        let mu = if dual.scales.len() == 1 { dual.bisected() } else { dual.minimised()? };
        dual.check_room(&mu)?;
        let residual = dual.at(&mu).residual(&mu);
        if residual.is_nan() || residual > ACCEPTED {
            return Err(Error::input(format!(
                "`beta` is {}, so small beside the differences in `reward` and `safety` that double precision cannot \
                 balance them: a constraint stays {residual:.1e} of its range from its threshold. Raise `beta`, or move \
                 `thresholds`.",
                self.beta
            )));
        }
        let mut lambda = vec![0.0; self.safety.len()];
        for ((&i, mu), scale) in dual.kept.iter().zip(mu).zip(&dual.scales) {
            lambda[i] = mu * self.beta / scale;
        }
        Ok(self.at(lambda))
    }

    /// r + Σ λ_i g_i.
    pub(super) fn weighted_value(&self, lambda: &[f64]) -> Table {
        let mut values = self.reward.clone();
        for (l, safety) in lambda.iter().zip(&self.safety) {
            for (value, g) in values.iter_mut().flatten().zip(safety.iter().flatten()) {
                *value += l * g;
            }
        }
        values
    }

    /// The largest spread of r + Σ λ_i g_i − β log π/π_ref over the possible answers to a prompt.
    fn stationarity(&self, lambda: &[f64], policy: &Policy) -> f64 {
        let values = self.weighted_value(lambda);
        let mut largest = 0.0f64;
        for ((values, p), q) in values.iter().zip(policy.logps()).zip(self.reference.logps()) {
            let possible = values.iter().zip(p.iter().zip(q)).filter(|(_, (p, _))| **p > f64::NEG_INFINITY);
            let rest = possible.map(|(v, (p, q))| v - self.beta * (p - q));
            let (low, high) = rest.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
            largest = largest.max(high - low);
        }
        largest
    }

    /// E_x of the largest (`sign` 1) or smallest (`sign` −1) value of a possible answer.
    pub(super) fn extreme(&self, values: &Table, sign: f64) -> f64 {
        let rows = self.reference.logps().iter().zip(values);
        let of_prompt = |(logps, row): (&Vec<f64>, &Vec<f64>)| {
            let signed: Vec<f64> = row.iter().map(|value| sign * value).collect();
            largest_possible(logps, &signed)
        };
        sign * self.weights.iter().zip(rows).map(|(weight, rows)| weight * of_prompt(rows)).sum::<f64>()
    }
}
