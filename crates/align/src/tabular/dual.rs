//! The dual function in units of its own, and its minimum over λ ≥ 0.

use engine::{Error, Result};

use super::policy::soft_max;
use super::{Problem, Table, gibbs};

/// Differences of scaled constraints, whose values are at most 1, below which they are rounding.
const ROUNDING: f64 = 1e-12;

/// D/β as a function of μ_i = λ_i s_i/β, with constraints (g_i − b_i)/s_i that lie in \[−1, 1\]: whatever the units of
/// the problem, a step of 1 in μ is neither large nor small. Constraints that every policy meets are left out.
pub(super) struct ScaledDual<'a> {
    problem: &'a Problem,
    /// Which constraints these are.
    pub(super) kept: Vec<usize>,
    /// s_i, the largest |g_i − b_i| of a possible answer.
    pub(super) scales: Vec<f64>,
    /// (g_i − b_i)/s_i.
    constraints: Vec<Table>,
    /// r/β.
    reward: Table,
}

/// D/β, its gradient and its Hessian.
pub(super) struct Point {
    value: f64,
    gradient: Vec<f64>,
    hessian: Vec<Vec<f64>>,
}

impl Point {
    /// The largest component of μ − max(0, μ − gradient) = min(μ, gradient): 0 exactly at the minimum over μ ≥ 0.
    pub(super) fn residual(&self, mu: &[f64]) -> f64 {
        mu.iter().zip(&self.gradient).map(|(m, g)| m.min(*g).abs()).fold(0.0, f64::max)
    }
}

impl<'a> ScaledDual<'a> {
    pub(super) fn new(problem: &'a Problem) -> Result<Self> {
        let reward = problem.reward.iter().map(|row| row.iter().map(|r| r / problem.beta).collect()).collect();
        let mut dual = Self { problem, kept: Vec::new(), scales: Vec::new(), constraints: Vec::new(), reward };
        for (i, (safety, &threshold)) in problem.safety.iter().zip(&problem.thresholds).enumerate() {
            let margins: Table = safety.iter().map(|row| row.iter().map(|g| g - threshold).collect()).collect();
            let relevant = problem.weights.iter().zip(problem.reference.logps().iter().zip(&margins));
            let scale = relevant
                .filter(|(weight, _)| **weight > 0.0)
                .flat_map(|(_, (logps, row))| logps.iter().zip(row))
                .filter(|(logp, _)| **logp > f64::NEG_INFINITY)
                .fold(0.0, |largest: f64, (_, margin)| largest.max(margin.abs()));
            if problem.extreme(&margins, -1.0) >= -ROUNDING * scale {
                continue;
            }
            let attainable = problem.extreme(safety, 1.0);
            let room = problem.extreme(&margins, 1.0);
            if room < -ROUNDING * scale {
                return Err(Error::input(format!(
                    "The threshold of constraint {} in `thresholds` is {threshold}, but the largest value that any policy \
                     attains is {attainable}. Lower the threshold below that.",
                    i + 1
                )));
            }
            if room <= ROUNDING * scale {
                return Err(Error::input(format!(
                    "The threshold of constraint {} in `thresholds` is {threshold}, which is the largest value that any \
                     policy attains: only the limit for λ → ∞ meets it. Lower the threshold a little.",
                    i + 1
                )));
            }
            dual.kept.push(i);
            dual.scales.push(scale);
            dual.constraints.push(margins.iter().map(|row| row.iter().map(|m| m / scale).collect()).collect());
        }
        Ok(dual)
    }

    /// Σ μ_i (g_i − b_i)/s_i, added to `start`.
    fn combined(&self, mut start: Table, mu: &[f64]) -> Table {
        for (mu, constraint) in mu.iter().zip(&self.constraints) {
            for (value, c) in start.iter_mut().flatten().zip(constraint.iter().flatten()) {
                *value += mu * c;
            }
        }
        start
    }

    /// The dual at `temperature`·β, divided by β, with its derivatives with respect to μ.
    fn warmed(&self, mu: &[f64], temperature: f64) -> Point {
        let values = self.combined(self.reward.clone(), mu);
        let n = self.constraints.len();
        let mut point = Point { value: 0.0, gradient: vec![0.0; n], hessian: vec![vec![0.0; n]; n] };
        for (x, (&weight, logps)) in self.problem.weights.iter().zip(self.problem.reference.logps()).enumerate() {
            point.value += weight * soft_max(logps, &values[x], temperature);
            let policy: Vec<f64> = gibbs(logps, &values[x], temperature).iter().map(|logp| logp.exp()).collect();
            let mean = |i: usize| -> f64 { policy.iter().zip(&self.constraints[i][x]).map(|(p, c)| p * c).sum() };
            let means: Vec<f64> = (0..n).map(mean).collect();
            for i in 0..n {
                point.gradient[i] += weight * means[i];
                for j in 0..n {
                    let rows = self.constraints[i][x].iter().zip(&self.constraints[j][x]);
                    let covariance = policy.iter().zip(rows).map(|(p, (a, b))| p * (a - means[i]) * (b - means[j]));
                    point.hessian[i][j] += weight * covariance.sum::<f64>() / temperature;
                }
            }
        }
        point
    }

    /// The minimum for one constraint: 0, or where the derivative, which rises with μ, passes through 0. Of the two
    /// neighbouring numbers the one that meets the constraint.
    pub(super) fn bisected(&self) -> Vec<f64> {
        let met = |mu: f64| self.at(&[mu]).gradient[0] >= 0.0;
        let (mut low, mut high) = (0.0, 1.0);
        if met(low) {
            return vec![low];
        }
        // there is room above the threshold, so the constraint is met in the end
        while !met(high) && high < f64::MAX / 2.0 {
            (low, high) = (high, 2.0 * high);
        }
        loop {
            let middle = 0.5 * (low + high);
            if middle <= low || middle >= high {
                return vec![high];
            }
            if met(middle) { high = middle } else { low = middle }
        }
    }

    /// D/β, its gradient and its Hessian at μ.
    pub(super) fn at(&self, mu: &[f64]) -> Point {
        self.warmed(mu, 1.0)
    }

    /// The minimum for any number of constraints, by projected Newton steps (D. Bertsekas, "Projected Newton methods for
    /// optimization problems with simple constraints", 1982).
    ///
    /// Where β is small beside the rewards, D is all but piecewise linear, and Newton steps lead nowhere. So the minimum
    /// is first found at a higher temperature, and followed as that falls to β.
    pub(super) fn minimised(&self) -> Result<Vec<f64>> {
        let mut mu = vec![0.0; self.constraints.len()];
        let (low, high) = self.reward.iter().flatten().fold((0.0f64, 0.0f64), |(l, h), r| (l.min(*r), h.max(*r)));
        let mut temperature = (high - low).max(1.0);
        loop {
            let at_last = temperature == 1.0;
            mu = self.newton(mu, temperature, if at_last { 1e-15 } else { 1e-3 })?;
            if at_last {
                return Ok(mu);
            }
            temperature = (0.5 * temperature).max(1.0);
        }
    }

    /// The minimum at one temperature, up to a residual, from `mu` on.
    fn newton(&self, mut mu: Vec<f64>, temperature: f64, tolerance: f64) -> Result<Vec<f64>> {
        let mut point = self.warmed(&mu, temperature);
        for _ in 0..1000 {
            self.check_feasible(&mu)?;
            let residual = point.residual(&mu);
            if residual <= tolerance {
                break;
            }
            let direction = newton_direction(&mu, &point, residual, temperature);
            let Some(next) = self.line_search(&mu, &point, &direction, temperature) else { break };
            (mu, point) = next;
        }
        Ok(mu)
    }

    /// The first of ever shorter steps that lowers D enough, or, where only rounding is left of D, the residual.
    fn line_search(&self, mu: &[f64], point: &Point, direction: &[f64], temperature: f64) -> Option<(Vec<f64>, Point)> {
        let mut length = 1.0;
        while length > 1e-14 {
            let next: Vec<f64> = mu.iter().zip(direction).map(|(m, d)| (m + length * d).max(0.0)).collect();
            let slope: f64 = next.iter().zip(mu).zip(&point.gradient).map(|((n, m), g)| g * (n - m)).sum();
            let at_next = self.warmed(&next, temperature);
            let change = at_next.value - point.value;
            let rounding = 1e-13 * (1.0 + point.value.abs());
            if change <= 1e-4 * slope && change < -rounding
                || change.abs() <= rounding && at_next.residual(&next) < point.residual(mu)
            {
                return Some((next, at_next));
            }
            length *= 0.5;
        }
        None
    }

    /// E_x max_y Σ μ_i (g_i − b_i)/s_i, relative to Σ μ_i: below 0 it proves that no policy meets all thresholds.
    fn room(&self, mu: &[f64]) -> f64 {
        let zero = self.reward.iter().map(|row| vec![0.0; row.len()]).collect();
        self.problem.extreme(&self.combined(zero, mu), 1.0) / mu.iter().sum::<f64>()
    }

    fn check_feasible(&self, mu: &[f64]) -> Result<()> {
        if mu.iter().sum::<f64>() > 1.0 && self.room(mu) < -ROUNDING {
            return Err(self.infeasible(mu, "No policy meets all `thresholds`"));
        }
        Ok(())
    }

    /// A minimum far out with no room in its direction is none: the infimum lies at infinity.
    pub(super) fn check_room(&self, mu: &[f64]) -> Result<()> {
        if mu.iter().sum::<f64>() > 20.0 && self.room(mu) <= ROUNDING {
            return Err(self.infeasible(mu, "Only the limit for λ → ∞ meets all `thresholds`"));
        }
        Ok(())
    }

    /// What the combination of constraints at μ says.
    fn infeasible(&self, mu: &[f64], what: &str) -> Error {
        let weights: Vec<f64> = mu.iter().zip(&self.scales).map(|(mu, scale)| mu / scale).collect();
        let largest = weights.iter().copied().fold(0.0, f64::max);
        let (mut terms, mut asked) = (Vec::new(), 0.0);
        let mut combined: Table = self.reward.iter().map(|row| vec![0.0; row.len()]).collect();
        for (&i, weight) in self.kept.iter().zip(weights.iter().map(|weight| weight / largest)) {
            if weight > 0.0 {
                let digits = if weight >= 1e-3 { format!("{weight:.4}") } else { format!("{weight:.3e}") };
                terms.push(format!("{digits}·E[safety {}]", i + 1));
            }
            asked += weight * self.problem.thresholds[i];
            for (value, g) in combined.iter_mut().flatten().zip(self.problem.safety[i].iter().flatten()) {
                *value += weight * g;
            }
        }
        let attainable = self.problem.extreme(&combined, 1.0);
        Error::input(format!(
            "{what}: {} is at most {attainable:?} for any policy, but the thresholds ask for {asked:?}. Lower the \
             thresholds of these constraints.",
            terms.join(" + ")
        ))
    }
}

/// The Newton step on the multipliers that are free to move, and a gradient step on those at 0 that should stay there.
fn newton_direction(mu: &[f64], point: &Point, residual: f64, temperature: f64) -> Vec<f64> {
    let near_zero = residual.min(1e-3);
    let free: Vec<usize> = (0..mu.len()).filter(|&i| mu[i] > near_zero || point.gradient[i] <= 0.0).collect();
    let largest = free.iter().map(|&i| point.hessian[i][i]).fold(f64::MIN_POSITIVE, f64::max);
    // redundant constraints make the Hessian singular; any of the minima will do
    let ridge = 1e-12 * largest;
    let mut matrix: Vec<Vec<f64>> = free.iter().map(|&i| free.iter().map(|&j| point.hessian[i][j]).collect()).collect();
    for (i, row) in matrix.iter_mut().enumerate() {
        row[i] += ridge;
    }
    let step = solved(matrix, free.iter().map(|&i| -point.gradient[i]).collect(), ridge);
    // beyond this the quadratic says nothing any more
    let reach = temperature + mu.iter().copied().fold(0.0, f64::max);
    let longest = step.iter().map(|s| s.abs()).fold(0.0, f64::max);
    let shrink = if longest > reach { reach / longest } else { 1.0 };
    let mut direction: Vec<f64> = point.gradient.iter().map(|g| -g).collect();
    for (&i, step) in free.iter().zip(step) {
        direction[i] = shrink * step;
    }
    direction
}

/// x with `matrix`·x = `right`, for a positive semidefinite matrix; pivots are held at `smallest` or above.
pub(crate) fn solved(mut matrix: Vec<Vec<f64>>, mut right: Vec<f64>, smallest: f64) -> Vec<f64> {
    let n = right.len();
    for k in 0..n {
        matrix[k][k] = matrix[k][k].max(smallest);
        let (above, below) = matrix.split_at_mut(k + 1);
        let (known, unknown) = right.split_at_mut(k + 1);
        for (row, right) in below.iter_mut().zip(unknown) {
            let factor = row[k] / above[k][k];
            row.iter_mut().zip(&above[k]).for_each(|(value, pivot)| *value -= factor * pivot);
            *right -= factor * known[k];
        }
    }
    for k in (0..n).rev() {
        let known: f64 = (k + 1..n).map(|j| matrix[k][j] * right[j]).sum();
        right[k] = (right[k] - known) / matrix[k][k];
    }
    right
}
