//! What judging may take.

use std::iter::Sum;
use std::ops::{Add, AddAssign, SubAssign};

use serde::Serialize;

/// Calls of an endpoint and their tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Requests that were answered, or that may have been and are paid then: those that ran into the timeout, or whose
    /// connection broke.
    pub calls: u64,
    /// Tokens of the requests.
    pub input_tokens: u64,
    /// Tokens of the replies.
    pub output_tokens: u64,
}

impl Usage {
    /// One call.
    pub(super) fn call(input_tokens: u64, output_tokens: u64) -> Self {
        Self { calls: 1, input_tokens, output_tokens }
    }

    /// So many times this.
    pub(super) fn times(self, n: u64) -> Self {
        Self {
            calls: self.calls.saturating_mul(n),
            input_tokens: self.input_tokens.saturating_mul(n),
            output_tokens: self.output_tokens.saturating_mul(n),
        }
    }
}

impl Add for Usage {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            calls: self.calls.saturating_add(other.calls),
            input_tokens: self.input_tokens.saturating_add(other.input_tokens),
            output_tokens: self.output_tokens.saturating_add(other.output_tokens),
        }
    }
}

impl AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl SubAssign for Usage {
    fn sub_assign(&mut self, other: Self) {
        self.calls = self.calls.saturating_sub(other.calls);
        self.input_tokens = self.input_tokens.saturating_sub(other.input_tokens);
        self.output_tokens = self.output_tokens.saturating_sub(other.output_tokens);
    }
}

impl Sum for Usage {
    fn sum<I: Iterator<Item = Self>>(usages: I) -> Self {
        usages.fold(Self::default(), Add::add)
    }
}

/// Prices of a million tokens, in any currency.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prices {
    /// Of requests.
    pub input: f64,
    /// Of replies.
    pub output: f64,
}

impl Prices {
    /// What a usage costs.
    pub fn cost(self, usage: Usage) -> f64 {
        (usage.input_tokens as f64 * self.input + usage.output_tokens as f64 * self.output) / 1e6
    }
}

/// The most that judging may take.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Budget {
    /// The most calls.
    pub calls: Option<u64>,
    /// The most that they may cost, and their prices.
    pub cost: Option<(f64, Prices)>,
}

impl Budget {
    /// Whether so much is within the budget.
    pub(super) fn allows(&self, usage: Usage) -> bool {
        self.calls.is_none_or(|most| usage.calls <= most)
            && self.cost.is_none_or(|(most, prices)| prices.cost(usage) <= most)
    }
}
