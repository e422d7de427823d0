//! What estimation errors cost: the bounds of Theorems 2 and 3 of arXiv 2404.11049 as printed, and as they hold.

use engine::{Error, Result};

use super::{Problem, Solution, Table};

/// How uncertain the estimates r̂, ĝ and λ̂ are from which a policy π̂ ∝ π_ref·exp((r̂ + λ̂ĝ)/β) is made, for a problem
/// with one constraint.
#[derive(Debug, Clone, PartialEq)]
pub struct Uncertainty {
    /// α·U_r(x, y) ≥ |r − r̂|.
    pub reward: Table,
    /// α·U_g(x, y) ≥ |g − ĝ|.
    pub safety: Table,
    /// B ≥ |g| and ≥ |ĝ|.
    pub bound: f64,
    /// λ̂ ≥ 0.
    pub lambda: f64,
}

/// Bounds of the constraint violation b − E_π̂\[g\] of a policy with E_π̂\[ĝ\] ≥ b.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ViolationBounds {
    /// As Theorem 3 has it: E_{π*}\[αU_g·exp(2Γ/β)\]. It need not hold.
    pub printed: f64,
    /// E_x{E_{π*}\[exp(Γ/β)\]·E_{π*}\[αU_g·exp(Γ/β)\]}.
    pub corrected: f64,
    /// E_x{E_{π*}\[αU_g·exp(Γ/β)\] / E_{π*}\[exp(−Γ/β)\]}: at most `corrected`, by Jensen's inequality.
    pub tight: f64,
}

/// Bounds of the loss R(π*) − R(π̂) in R = E\[r\] − β KL.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OptimalityBounds {
    /// As Theorem 2 has it: −λ*b + E_{π*}\[Γ₀·exp(2Γ/β)\] + β log E_{π*}\[exp(Γ/β)\]. It tends to λ*(B − b) instead of 0
    /// for ever better estimates.
    pub printed: f64,
    /// With A(x) = E_{π*}\[exp(Γ/β)\]: E_x{A·E_{π*}\[Γ·exp(Γ/β)\] + β log A + λ*B·(A² − 1)}. It tends to 0.
    pub corrected: f64,
}

/// Expectations under π* for one prompt, from which all the bounds are made.
struct Moments {
    /// E\[exp(Γ/β)\].
    up: f64,
    /// E\[exp(−Γ/β)\].
    down: f64,
    /// E\[Γ·exp(Γ/β)\].
    gamma: f64,
    /// E\[αU_g·exp(Γ/β)\].
    safety: f64,
    /// E\[αU_g·exp(2Γ/β)\].
    safety_twice: f64,
    /// E\[Γ₀·exp(2Γ/β)\].
    gamma_zero_twice: f64,
}

impl Uncertainty {
    /// Bounds of the violation, where `optimum` solves `problem`.
    ///
    /// # Errors
    /// [`Error::Input`] unless the problem has exactly one constraint.
    pub fn violation_bounds(&self, problem: &Problem, optimum: &Solution) -> Result<ViolationBounds> {
        let (_, moments) = self.moments(problem, optimum)?;
        let mean = |f: fn(&Moments) -> f64| mean(problem, &moments, f);
        Ok(ViolationBounds {
            printed: mean(|m| m.safety_twice),
            corrected: mean(|m| m.up * m.safety),
            tight: mean(|m| m.safety / m.down),
        })
    }

    /// Bounds of the loss, where `optimum` solves `problem`.
    ///
    /// # Errors
    /// [`Error::Input`] unless the problem has exactly one constraint.
    pub fn optimality_bounds(&self, problem: &Problem, optimum: &Solution) -> Result<OptimalityBounds> {
        let (lambda, moments) = self.moments(problem, optimum)?;
        let mean = |f: fn(&Moments) -> f64| mean(problem, &moments, f);
        let (beta, threshold) = (problem.beta, problem.thresholds[0]);
        Ok(OptimalityBounds {
            printed: beta * mean(|m| m.up).ln() + mean(|m| m.gamma_zero_twice) - lambda * threshold,
            corrected: mean(|m| m.up * m.gamma)
                + beta * mean(|m| m.up.ln())
                + lambda * self.bound * (mean(|m| m.up * m.up) - 1.0),
        })
    }

    /// λ*, and the expectations for every prompt, with Γ(c) = αU_r + c·αU_g + |c − λ̂|·B (equation 13), Γ = Γ(λ*) and
    /// Γ₀ = Γ(0).
    fn moments(&self, problem: &Problem, optimum: &Solution) -> Result<(f64, Vec<Moments>)> {
        let [lambda] = optimum.lambda[..] else {
            return Err(Error::input(format!(
                "The bounds are for problems with one constraint, but this one has {}. Ask for one constraint at a time.",
                optimum.lambda.len()
            )));
        };
        let gamma = |c: f64, r: f64, g: f64| r + c * g + (c - self.lambda).abs() * self.bound;
        let rows = optimum.policy.logps().iter().zip(self.reward.iter().zip(&self.safety));
        let of_prompt = |(logps, (reward, safety)): (&Vec<f64>, (&Vec<f64>, &Vec<f64>))| {
            let mut moments =
                Moments { up: 0.0, down: 0.0, gamma: 0.0, safety: 0.0, safety_twice: 0.0, gamma_zero_twice: 0.0 };
            for (logp, (&r, &g)) in logps.iter().zip(reward.iter().zip(safety)) {
                let (p, now) = (logp.exp(), gamma(lambda, r, g));
                let factor = (now / problem.beta).exp();
                moments.up += p * factor;
                moments.down += p / factor;
                moments.gamma += p * now * factor;
                moments.safety += p * g * factor;
                moments.safety_twice += p * g * factor * factor;
                moments.gamma_zero_twice += p * gamma(0.0, r, g) * factor * factor;
            }
            moments
        };
        Ok((lambda, rows.map(of_prompt).collect()))
    }
}

/// E_x\[f\].
fn mean(problem: &Problem, moments: &[Moments], f: fn(&Moments) -> f64) -> f64 {
    problem.weights.iter().zip(moments).map(|(weight, moments)| weight * f(moments)).sum()
}
