//! The smallest λ that meets a threshold.

use engine::Result;

use super::samples::{largest, smallest};
use super::{Bootstrap, Estimate, Samples, check_threshold};

/// The average effective sample size below which an estimate is not trusted: a tenth of the distance to twice the tilt is
/// then its bias, and what remains of the samples is a handful of answers.
const FEWEST_EFFECTIVE: f64 = 10.0;

/// λ is found to this share of itself.
const TOLERANCE: f64 = 1e-6;

/// What samples say of a threshold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Choice {
    /// The estimate at the smallest λ whose lower bound meets the threshold.
    Chosen(Estimate),
    /// At the λ that seems to be needed the samples are worth fewer than ten answers per prompt, so that it is not to be
    /// trusted. Draw more answers per prompt, or realise the policy at `reachable`, draw from that, and choose again with
    /// it as λ₀.
    OutOfSupport {
        /// The estimate at the λ that seems to be needed.
        needed: Estimate,
        /// The λ nearest to it up to which the samples can be trusted; λ₀ if there are too few answers for any other.
        reachable: f64,
    },
    /// No weights on these answers meet the threshold.
    Unreachable {
        /// The lower bound for λ → ∞, where only the safest of the answers to each prompt count.
        lower_bound: f64,
    },
}

impl Samples {
    /// The smallest λ ≥ 0 for which the one-sided lower bound of Ĝ(λ) is at least `threshold`, to one part in a million
    /// and never below.
    ///
    /// # Errors
    /// [`engine::Error::Input`] if the threshold is not finite.
    pub fn choose(&self, threshold: f64, bootstrap: &Bootstrap) -> Result<Choice> {
        check_threshold(threshold)?;
        let Some(lambda) = self.smallest_meeting(threshold, bootstrap)? else {
            let safest: Vec<f64> = self.scores.iter().map(|scores| largest(scores)).collect();
            return Ok(Choice::Unreachable { lower_bound: bootstrap.lower_bound(&bootstrap.means(&safest)) });
        };
        let estimate = self.estimate(lambda, bootstrap)?;
        if self.trusts(lambda)? {
            return Ok(Choice::Chosen(estimate));
        }
        let mut reachable = self.drawn_at;
        let mut beyond = lambda;
        while (beyond - reachable).abs() > TOLERANCE * (lambda - self.drawn_at).abs() {
            let middle = 0.5 * (reachable + beyond);
            *(if self.trusts(middle)? { &mut reachable } else { &mut beyond }) = middle;
        }
        Ok(Choice::OutOfSupport { needed: estimate, reachable })
    }

    /// Whether enough of the samples counts at λ. At λ₀ itself they are draws from the policy in question, however few.
    fn trusts(&self, lambda: f64) -> Result<bool> {
        Ok(lambda == self.drawn_at || self.effective_sample_size(lambda)?.average >= FEWEST_EFFECTIVE)
    }

    fn smallest_meeting(&self, threshold: f64, bootstrap: &Bootstrap) -> Result<Option<f64>> {
        let meets = |lambda: f64| -> Result<bool> {
            Ok(bootstrap.lower_bound(&bootstrap.means(&self.by_prompt(lambda)?)) >= threshold)
        };
        if meets(0.0)? {
            return Ok(Some(0.0));
        }
        let spread = self.scores.iter().map(|scores| largest(scores) - smallest(scores)).fold(0.0, f64::max);
        // a tilt by e; if scores do not differ this is infinite, and no λ changes anything
        let unit = self.beta / spread;
        let (mut low, mut high) = (0.0, self.drawn_at.max(unit));
        loop {
            // long before this all weight is on the safest answers
            if !high.is_finite() || high / unit > 1e12 {
                return Ok(None);
            }
            if meets(high)? {
                break;
            }
            low = high;
            high *= 2.0;
        }
        while high - low > TOLERANCE * high {
            let middle = 0.5 * (low + high);
            *(if meets(middle)? { &mut high } else { &mut low }) = middle;
        }
        Ok(Some(high))
    }
}
