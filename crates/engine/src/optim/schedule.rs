//! Learning-rate schedules.

use serde::{Deserialize, Serialize};

/// How the learning rate falls after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Stays.
    Constant,
    /// Falls in a straight line to zero after the last step.
    Linear,
    /// Falls along half a cosine to zero after the last step.
    Cosine,
}

impl Schedule {
    /// The factor on the learning rate at `step` (from 0) of `total`, after `warmup` steps of linear rise.
    ///
    /// The same values as the schedulers of Hugging Face transformers: step 0 of a warm-up has factor 0.
    pub fn factor(self, step: u64, warmup: u64, total: u64) -> f64 {
        if step < warmup {
            return step as f64 / warmup as f64;
        }
        let progress = (step - warmup) as f64 / (total.saturating_sub(warmup)).max(1) as f64;
        match self {
            Self::Constant => 1.0,
            Self::Linear => (1.0 - progress).max(0.0),
            Self::Cosine => (0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos())).max(0.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_rise_and_fall() {
        let all = |s: Schedule| (0..=10).map(|i| s.factor(i, 2, 10)).collect::<Vec<_>>();
        assert_eq!(all(Schedule::Linear), [0.0, 0.5, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0]);
        assert_eq!(all(Schedule::Constant)[2..], [1.0; 9]);
        let cosine = all(Schedule::Cosine);
        assert!((cosine[6] - 0.5).abs() < 1e-12 && cosine[10].abs() < 1e-12 && cosine[2] == 1.0);
    }
}
