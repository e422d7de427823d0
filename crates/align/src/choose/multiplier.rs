//! The multipliers that meet thresholds and no more.

use engine::Result;

use super::bounded::{Balance, Bounded};
use super::{Bootstrap, Estimate, Samples, check_thresholds};
use crate::tabular::{Description, Problem};

/// The average effective sample size below which an estimate is not trusted: a tenth of the distance to twice the tilt is
/// then its bias, and what remains of the samples is a handful of answers.
const FEWEST_EFFECTIVE: f64 = 10.0;

/// The λ that the samples reach is found to this share of its distance.
const TOLERANCE: f64 = 1e-6;

/// What samples say of thresholds.
#[derive(Debug, Clone, PartialEq)]
pub enum Choice {
    /// The estimate at the λ whose lower bounds meet the thresholds and no more.
    Chosen(Estimate),
    /// At the λ that seems to be needed the samples are worth fewer than ten answers per prompt, so that it is not to be
    /// trusted. Draw more answers per prompt, or realise the policy at `reachable`, draw from that, and choose again with
    /// it as λ⁰.
    OutOfSupport {
        /// The estimate at the λ that seems to be needed.
        needed: Estimate,
        /// The λ nearest to it, on the straight line from λ⁰, up to which the samples can be trusted; λ⁰ if there are too
        /// few answers for any other.
        reachable: Vec<f64>,
    },
    /// No weights on these answers meet all thresholds.
    Unreachable {
        /// The direction of λ, as shares that sum to 1, that shows it.
        weights: Vec<f64>,
        /// The lower bounds for λ → ∞ in this direction, where only the best of the answers to each prompt by the weighted
        /// sum of scores count. The weighted sum of these bounds is below that of the thresholds. With one constraint that
        /// is a proof; with several other weights might do whose bounds are nearer to their estimates.
        lower_bounds: Vec<f64>,
    },
}

impl Samples {
    /// The λ ≥ 0 that minimises the dual D(λ) = β E_x log Ê_x exp(o + Σ (λ_i − λ⁰_i) g_i/β) − Σ λ_i b_i: there Ĝ_i = b_i, or
    /// λ_i = 0 and Ĝ_i ≥ b_i. It leaves out that Ĝ is uncertain.
    ///
    /// # Errors
    /// [`engine::Error::Input`] for thresholds that are not as many as the constraints or not finite, and for those that no
    /// weights on these answers meet, with a proof.
    pub fn dual_minimum(&self, thresholds: &[f64]) -> Result<Vec<f64>> {
        check_thresholds(thresholds, self.scores.len())?;
        let value = |x: usize, y: usize| {
            let drawn: f64 = self.scores.iter().zip(&self.drawn_at).map(|(g, lambda)| lambda * g[x][y]).sum();
            self.offsets.as_ref().map_or(0.0, |offsets| self.beta * offsets[x][y]) - drawn
        };
        let shape = || self.scores[0].iter().map(Vec::len).enumerate();
        let problem = Problem::new(Description {
            reference: shape().map(|(_, answers)| vec![1.0 / answers as f64; answers]).collect(),
            reward: shape().map(|(x, answers)| (0..answers).map(|y| value(x, y)).collect()).collect(),
            safety: self.scores.clone(),
            prompt_weights: None,
            beta: self.beta,
            thresholds: thresholds.to_vec(),
        })?;
        Ok(problem.solve()?.lambda)
    }

    /// The λ ≥ 0 for which the one-sided lower bounds L_i of Ĝ_i(λ) meet the `thresholds` and no more: L_i = b_i, or λ_i = 0
    /// and L_i ≥ b_i, to one part in ten thousand million of the spread of the scores and never below. With one constraint
    /// it is the smallest λ whose lower bound meets the threshold.
    ///
    /// # Errors
    /// [`engine::Error::Input`] for thresholds that are not as many as the constraints or not finite, and for a confidence
    /// too high to be shared by so many constraints. [`engine::Error::Failed`] if several thresholds are so hardly met
    /// together that no λ is found, and none can be said not to exist.
    pub fn choose(&self, thresholds: &[f64], bootstrap: &Bootstrap) -> Result<Choice> {
        check_thresholds(thresholds, self.scores.len())?;
        let bounded = Bounded::new(self, thresholds, bootstrap.jointly(thresholds.len())?);
        let lambda = match bounded.balance()? {
            Balance::At(lambda) => lambda,
            Balance::Nowhere { weights, lower_bounds } => return Ok(Choice::Unreachable { weights, lower_bounds }),
        };
        let needed = self.estimate(&lambda, bootstrap)?;
        if self.trusts(&lambda)? {
            return Ok(Choice::Chosen(needed));
        }
        let between = |share: f64| -> Vec<f64> {
            self.drawn_at.iter().zip(&lambda).map(|(from, to)| from + share * (to - from)).collect()
        };
        let (mut reachable, mut beyond) = (0.0, 1.0);
        while beyond - reachable > TOLERANCE {
            let middle = 0.5 * (reachable + beyond);
            *(if self.trusts(&between(middle))? { &mut reachable } else { &mut beyond }) = middle;
        }
        Ok(Choice::OutOfSupport { needed, reachable: between(reachable) })
    }

    /// Whether enough of the samples counts at λ. At λ⁰ itself they are draws from the policy in question, however few,
    /// unless they have offsets.
    fn trusts(&self, lambda: &[f64]) -> Result<bool> {
        let drawn = self.offsets.is_none() && lambda == self.drawn_at;
        Ok(drawn || self.effective_sample_size(lambda)?.average >= FEWEST_EFFECTIVE)
    }
}
