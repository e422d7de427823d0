//! Alignment step by step: each policy is the Gibbs tilt of the one before.

use super::{Policy, Problem, Table};

/// One alignment step: the previous policy, as reference, tilted by exp(values/temperature).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step<'a> {
    /// The metric.
    pub values: &'a Table,
    /// β for the reward, β/λ_i for a constraint; ∞ for λ_i = 0, which changes nothing.
    pub temperature: f64,
}

impl Problem {
    /// The steps of a stepwise chain in the usual order: reward, then constraint by constraint. In any other order each
    /// metric keeps its temperature, so that swapping two steps swaps their temperatures.
    pub fn steps(&self, lambda: &[f64]) -> Vec<Step<'_>> {
        let reward = Step { values: &self.reward, temperature: self.beta };
        let safety = self.safety.iter().zip(lambda);
        let safety = safety.map(|(values, lambda)| Step { values, temperature: self.beta / lambda });
        std::iter::once(reward).chain(safety).collect()
    }

    /// The policy after each of these steps, from π_ref (Algorithm 1 and Theorem 4 of arXiv 2404.11049, with exact
    /// alignment).
    pub fn stepwise(&self, steps: &[Step<'_>]) -> Vec<Policy> {
        let tilt = |policy: &mut Policy, step: &Step<'_>| {
            *policy = policy.tilted(step.values, step.temperature);
            Some(policy.clone())
        };
        steps.iter().scan(self.reference.clone(), tilt).collect()
    }
}

/// The largest difference of a probability in `target` from the policy after `steps` from `start`, over all orders of
/// the steps. There are n! orders of n steps.
pub fn largest_difference_over_orders(start: &Policy, steps: &[Step<'_>], target: &Policy) -> f64 {
    if steps.is_empty() {
        return start.max_difference(target);
    }
    let mut largest = 0.0f64;
    for first in 0..steps.len() {
        let mut rest = steps.to_vec();
        let Step { values, temperature } = rest.remove(first);
        let after = start.tilted(values, temperature);
        largest = largest.max(largest_difference_over_orders(&after, &rest, target));
    }
    largest
}
