//! The multipliers at which bounds meet thresholds, by Newton steps.

use engine::{Error, Result};

use super::samples::{LARGEST, largest, smallest, weighted_mean};
use super::{Bootstrap, Samples};
use crate::tabular::{Table, solved};

/// How far above the thresholds the bounds are aimed, in spreads of the scores: rounding must not leave them below.
const ABOVE: f64 = 1e-10;

/// Newton steps, of which ten or so are usual.
const STEPS: usize = 200;

/// A sum of μ that puts all weight on the best answers.
const FAR: f64 = 1e12;

/// A sum of μ from which on it is asked whether all weight on the best answers would do. Much nearer, bounds that are wider
/// there than here could make it seem that it would not.
const FAR_ENOUGH: f64 = 100.0;

/// The one-sided lower bounds L_i of Ĝ_i as functions of μ_i = λ_i s_i/β, where s_i is the largest spread of scores among
/// the answers to a prompt: whatever the units, a step of 1 in μ is neither large nor small.
pub(super) struct Bounded<'a> {
    samples: &'a Samples,
    bootstrap: Bootstrap,
    /// b_i.
    thresholds: &'a [f64],
    /// b_i and a little more.
    targets: Vec<f64>,
    /// s_i.
    units: Vec<f64>,
}

/// Where the bounds meet the thresholds.
pub(super) enum Balance {
    /// λ.
    At(Vec<f64>),
    /// Nowhere: see [`Choice::Unreachable`](super::Choice::Unreachable).
    Nowhere { weights: Vec<f64>, lower_bounds: Vec<f64> },
}

struct Point {
    mu: Vec<f64>,
    /// f_i = (L_i − target)/s_i.
    excess: Vec<f64>,
    /// ∂f_i/∂μ_j = Σ_x c_ix Cov_x(g_i, g_j)/(s_i s_j), where c_ix is the share of prompt x in the draw whose mean is L_i.
    slopes: Vec<Vec<f64>>,
}

impl Point {
    /// The largest |min(μ_i, f_i)|, 0 exactly if μ ≥ 0, f ≥ 0 and μ_i f_i = 0 for all i.
    fn residual(&self) -> f64 {
        self.mu.iter().zip(&self.excess).map(|(mu, f)| mu.min(*f).abs()).fold(0.0, f64::max)
    }

    /// The Newton step for min(μ_i, f_i) = 0.
    fn step(&self) -> Vec<f64> {
        let all = 0..self.mu.len();
        let (free, fixed): (Vec<usize>, Vec<usize>) = all.partition(|&i| self.mu[i] > self.excess[i]);
        let mut step: Vec<f64> = self.mu.iter().map(|mu| -mu).collect();
        let right = |&i: &usize| fixed.iter().map(|&j| self.slopes[i][j] * self.mu[j]).sum::<f64>() - self.excess[i];
        // redundant constraints make the matrix singular; any of the solutions will do
        let ridge = 1e-12 * free.iter().map(|&i| self.slopes[i][i]).fold(1e-12, f64::max);
        let row = |&i: &usize| free.iter().map(|&j| self.slopes[i][j] + if i == j { ridge } else { 0.0 }).collect();
        let solution = solved(free.iter().map(row).collect(), free.iter().map(right).collect(), ridge);
        // beyond this the slopes say nothing any more
        let reach = 1.0 + self.mu.iter().copied().fold(0.0, f64::max);
        let longest = solution.iter().map(|s| s.abs()).fold(0.0, f64::max);
        for (i, s) in free.into_iter().zip(solution) {
            step[i] = s * (reach / longest).min(1.0);
        }
        step
    }
}

impl<'a> Bounded<'a> {
    pub(super) fn new(samples: &'a Samples, thresholds: &'a [f64], bootstrap: Bootstrap) -> Self {
        let spread = |table: &Table| table.iter().map(|row| largest(row) - smallest(row)).fold(0.0, f64::max);
        let spreads: Vec<f64> = samples.scores.iter().map(spread).collect();
        let targets = thresholds.iter().zip(&spreads).map(|(b, spread)| b + ABOVE * spread).collect();
        // where scores do not differ no λ changes anything, and any unit will do
        let units = spreads.into_iter().map(|spread| if spread > 0.0 { spread } else { LARGEST }).collect();
        Self { samples, bootstrap, thresholds, targets, units }
    }

    /// λ_i = μ_i β/s_i.
    fn lambda(&self, mu: &[f64]) -> Vec<f64> {
        mu.iter().zip(&self.units).map(|(mu, unit)| (mu * self.samples.beta / unit).min(LARGEST)).collect()
    }

    fn at(&self, mu: Vec<f64>) -> Result<Point> {
        let lambda = self.lambda(&mu);
        let weights = self.samples.weights(&lambda)?;
        let means = self.samples.by_prompt(&lambda)?;
        let k = mu.len();
        let mut point = Point { mu, excess: vec![0.0; k], slopes: vec![vec![0.0; k]; k] };
        let covariance = |x: usize, i: usize, j: usize| {
            let deviation = |i: usize, g: f64| (g - means[i][x]) / self.units[i];
            let rows = self.samples.scores[i][x].iter().zip(&self.samples.scores[j][x]);
            let products: Vec<f64> = rows.map(|(&a, &b)| deviation(i, a) * deviation(j, b)).collect();
            weighted_mean(&products, &weights[x])
        };
        for (i, by_prompt) in means.iter().enumerate() {
            let (bound, drawn) = self.bootstrap.lower_draw(by_prompt);
            point.excess[i] = (bound - self.targets[i]) / self.units[i];
            for (j, slope) in point.slopes[i].iter_mut().enumerate() {
                *slope = drawn.iter().map(|&x| covariance(x, i, j)).sum::<f64>() / drawn.len() as f64;
            }
        }
        Ok(point)
    }

    /// λ with L_i ≥ b_i for all i, and L_i = b_i where λ_i > 0.
    ///
    /// The steps start from the minimum of the dual, where Ĝ − b is its gradient. L − b is nearly a gradient too, and a
    /// step is judged by it as one towards the minimum of a convex function is.
    ///
    /// # Errors
    /// [`Error::Failed`] if the steps neither end nor show that there is no such λ.
    pub(super) fn balance(&self) -> Result<Balance> {
        let none = vec![0.0; self.thresholds.len()];
        if self.bounds(&none)?.iter().zip(self.thresholds).all(|(bound, b)| bound >= b) {
            return Ok(Balance::At(none));
        }
        for i in 0..none.len() {
            let mut alone = none.clone();
            alone[i] = 1.0;
            if let Some(nowhere) = self.obstacle(&alone)? {
                return Ok(nowhere);
            }
        }
        // if there is none, no weights meet the thresholds, and the steps will show it
        let start = self.samples.dual_minimum(self.thresholds).unwrap_or(none);
        let mut point =
            self.at(start.iter().zip(&self.units).map(|(lambda, unit)| lambda * unit / self.samples.beta).collect())?;
        for _ in 0..STEPS {
            if point.residual() <= 0.5 * ABOVE {
                return Ok(Balance::At(self.lambda(&point.mu)));
            }
            if point.mu.iter().sum::<f64>() > FAR_ENOUGH
                && let Some(nowhere) = self.obstacle(&point.mu)?
            {
                return Ok(nowhere);
            }
            let downhill: Vec<f64> = point.excess.iter().map(|f| -f).collect();
            let next = match self.after(&point, &point.step())? {
                None => self.after(&point, &downhill)?,
                newton => newton,
            };
            let Some(next) = next else { break };
            point = next;
        }
        Err(Error::Failed(
            "No multipliers λ were found that meet the thresholds together: they hardly can be met by weights on these \
             answers. Lower the thresholds a little, or draw more answers."
                .into(),
        ))
    }

    /// The point after the first of ever shorter steps that does not go too far: f along it has not changed sign, or is
    /// smaller. None if f along the step is not below 0 at first.
    fn after(&self, point: &Point, step: &[f64]) -> Result<Option<Point>> {
        let mut length = 1.0;
        while length > 1e-6 {
            let moved = point.mu.iter().zip(step).map(|(mu, step)| (mu + length * step).max(0.0)).collect();
            let next = self.at(moved)?;
            let along = |f: &[f64]| -> f64 {
                next.mu.iter().zip(&point.mu).zip(f).map(|((to, from), f)| (to - from) * f).sum()
            };
            let before = along(&point.excess);
            if before >= 0.0 {
                return Ok(None);
            }
            if along(&next.excess) <= -0.5 * before {
                return Ok(Some(next));
            }
            length *= 0.5;
        }
        Ok(None)
    }

    /// Whether the bounds miss the thresholds even in the limit for λ → ∞ in the direction of μ, all in all.
    fn obstacle(&self, mu: &[f64]) -> Result<Option<Balance>> {
        let sum: f64 = mu.iter().sum();
        let lambda = self.lambda(&mu.iter().map(|mu| mu * (FAR / sum)).collect::<Vec<_>>());
        let lower_bounds = self.bounds(&lambda)?;
        let missing = |(lambda, (bound, target)): (&f64, (&f64, &f64))| lambda * (target - bound);
        if lambda.iter().zip(lower_bounds.iter().zip(&self.targets)).map(missing).sum::<f64>() <= 0.0 {
            return Ok(None);
        }
        let sum: f64 = lambda.iter().sum();
        Ok(Some(Balance::Nowhere { weights: lambda.iter().map(|lambda| lambda / sum).collect(), lower_bounds }))
    }

    /// L(λ).
    fn bounds(&self, lambda: &[f64]) -> Result<Vec<f64>> {
        Ok(self.samples.by_prompt(lambda)?.iter().map(|values| self.bootstrap.lower_bound(values)).collect())
    }
}
