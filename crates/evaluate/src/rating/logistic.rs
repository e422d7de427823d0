//! Logistic regression with outcomes from 0 to 1, by maximum likelihood, and its errors where outcomes come in clusters.

use std::collections::BTreeMap;

use nalgebra::{Cholesky, DMatrix, DVector};

use super::share::{correction, student};

/// Newton steps, of which five or so are usual.
const MAX_STEPS: usize = 100;

/// Outcomes with the same regressors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Outcomes {
    /// The regressors that are not 0, with the numbers of their coefficients; a value of 0 fills an empty place.
    pub(super) x: [(usize, f64); 2],
    /// The sum of the outcomes.
    pub(super) sum: f64,
    /// How many they are; weights make it fractional.
    pub(super) n: f64,
}

impl Outcomes {
    /// η = x·θ.
    fn logit(&self, theta: &DVector<f64>) -> f64 {
        self.x.iter().map(|&(i, value)| value * theta[i]).sum()
    }

    /// The derivative of the log-likelihood by η, Σ (s − σ(η)).
    fn residual(&self, theta: &DVector<f64>) -> f64 {
        self.sum - self.n * logistic(self.logit(theta))
    }
}

/// 1/(1 + e^−η).
pub(super) fn logistic(logit: f64) -> f64 {
    1.0 / (1.0 + (-logit).exp())
}

/// The θ that maximises Σ [s log σ(x·θ) + (1 − s) log σ(−x·θ)], by Newton steps from `start`.
///
/// [`None`] if they do not converge or the regressors do not determine θ. Whether there is a maximum is the caller's to know.
pub(super) fn fit(outcomes: &[Outcomes], start: DVector<f64>) -> Option<DVector<f64>> {
    let likelihood = |theta: &DVector<f64>| outcomes.iter().map(|one| log_likelihood(one, theta)).sum::<f64>();
    let mut theta = start;
    let mut reached = likelihood(&theta);
    for _ in 0..MAX_STEPS {
        let mut gradient = DVector::zeros(theta.len());
        for one in outcomes {
            let residual = one.residual(&theta);
            one.x.iter().for_each(|&(i, value)| gradient[i] += value * residual);
        }
        let mut step = information(outcomes, &theta)?.solve(&gradient);
        // twice the rise of the likelihood that the step promises
        let promise = gradient.dot(&step);
        let mut next = &theta + &step;
        while likelihood(&next) < reached - 1e-12 * reached.abs() {
            step *= 0.5;
            next = &theta + &step;
        }
        reached = likelihood(&next);
        theta = next;
        // convergence is quadratic: the step just taken was the last that mattered
        if promise < 1e-12 {
            return Some(theta);
        }
    }
    None
}

/// How uncertain a fitted θ is where outcomes on one prompt depend on each other.
#[derive(Debug)]
pub(super) struct Clustered {
    pub(super) covariance: DMatrix<f64>,
    /// How many standard errors a two-sided 95 % interval reaches to either side.
    pub(super) t: f64,
}

impl Clustered {
    /// The standard errors of the coefficients.
    pub(super) fn errors(&self) -> DVector<f64> {
        self.covariance.diagonal().map(|variance| variance.max(0.0).sqrt())
    }
}

/// The covariance H⁻¹ (G/(G−1) Σ_g u_g u_gᵀ) H⁻¹, with the information H and the score u_g of each of G prompts (K.-Y. Liang,
/// S. Zeger, Biometrika 73, 1986). `outcomes` come with the numbers of their prompts. [`None`] for a single prompt.
pub(super) fn clustered(outcomes: &[(usize, Outcomes)], theta: &DVector<f64>) -> Option<Clustered> {
    let mut scores: BTreeMap<usize, DVector<f64>> = BTreeMap::new();
    for (prompt, one) in outcomes {
        let score = scores.entry(*prompt).or_insert_with(|| DVector::zeros(theta.len()));
        let residual = one.residual(theta);
        one.x.iter().for_each(|&(i, value)| score[i] += value * residual);
    }
    let mut middle = DMatrix::zeros(theta.len(), theta.len());
    scores.values().for_each(|score| middle.ger(1.0, score, score, 1.0));
    let all: Vec<Outcomes> = outcomes.iter().map(|(_, one)| *one).collect();
    let inverse = information(&all, theta)?.inverse();
    let covariance = &inverse * middle * &inverse * correction(scores.len())?;
    Some(Clustered { covariance, t: student(scores.len())? })
}

/// s η − log(1 + e^η), without overflow.
fn log_likelihood(one: &Outcomes, theta: &DVector<f64>) -> f64 {
    let logit = one.logit(theta);
    one.sum * logit - one.n * (logit.max(0.0) + (-logit.abs()).exp().ln_1p())
}

/// H = Σ σ(η)(1 − σ(η)) x xᵀ, factored; [`None`] if it is singular.
fn information(outcomes: &[Outcomes], theta: &DVector<f64>) -> Option<Cholesky<f64, nalgebra::Dyn>> {
    let mut information = DMatrix::zeros(theta.len(), theta.len());
    for one in outcomes {
        let p = logistic(one.logit(theta));
        let weight = one.n * p * (1.0 - p);
        for (i, a) in one.x {
            for (j, b) in one.x {
                information[(i, j)] += weight * a * b;
            }
        }
    }
    information.cholesky()
}
