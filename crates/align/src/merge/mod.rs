//! Merging: one model whose weights are computed from those of several of the same shape.
//!
//! P-SACPO (SACPO, arXiv 2404.11049) interpolates between the policy of the helpful step, θ_r, and that of
//! the safe step after it: (1 − q)·θ_r + q·θ_safe. [`Method`] lists the ways to merge, [`merge`] does it, a part of a
//! tensor at a time.

mod adapters;
mod arithmetic;
#[cfg(test)]
mod parity;
mod stream;
mod trim;

use engine::{Error, Result};

pub use stream::{Input, Merged, MergedAdapter, merge};

/// A way to merge. Below, wᵢ are the weights, θᵢ the models, and δᵢ = θᵢ − θ_base their task vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Σ wᵢ θᵢ (model soups, arXiv 2203.05482; with weights 1 − q and q, P-SACPO).
    Linear,
    /// Along the great circle between two models, one tensor at a time (Shoemake, SIGGRAPH 1985).
    Slerp,
    /// θ_base + Σ wᵢ δᵢ (arXiv 2212.04089).
    TaskArithmetic,
    /// Task vectors trimmed to their largest entries, of which those of the elected sign are merged (arXiv 2306.01708).
    Ties,
    /// Task vectors with random entries dropped and the others rescaled (arXiv 2311.03099).
    DareLinear,
    /// As [`Method::DareLinear`], then with the elected sign as in [`Method::Ties`].
    DareTies,
}

impl Method {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Linear, Self::Slerp, Self::TaskArithmetic, Self::Ties, Self::DareLinear, Self::DareTies];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::Slerp => "slerp",
            Self::TaskArithmetic => "task-arithmetic",
            Self::Ties => "ties",
            Self::DareLinear => "dare-linear",
            Self::DareTies => "dare-ties",
        }
    }

    /// Whether task vectors are merged, which need a base.
    pub fn needs_base(self) -> bool {
        !matches!(self, Self::Linear | Self::Slerp)
    }

    /// Whether only a part of each task vector is kept, which needs a density.
    pub fn is_sparse(self) -> bool {
        matches!(self, Self::Ties | Self::DareLinear | Self::DareTies)
    }

    /// Whether entries are kept at random, which needs a seed.
    pub fn is_random(self) -> bool {
        matches!(self, Self::DareLinear | Self::DareTies)
    }

    /// Whether only the entries of the elected sign are merged.
    fn elects(self) -> bool {
        matches!(self, Self::Ties | Self::DareTies)
    }

    /// Whether weights are divided by their sum where nobody says, as in mergekit.
    pub fn normalises(self) -> bool {
        matches!(self, Self::Linear | Self::Slerp | Self::Ties)
    }
}

/// How to merge.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// The way.
    pub method: Method,
    /// One weight for each model, the base not counted. [`Method::Slerp`] takes 1 − q and q.
    pub weights: Vec<f64>,
    /// Whether weights are divided by their sum; where signs are elected, by the sum of those that take part in an entry.
    pub normalise: bool,
    /// The share of each task vector's entries that is kept, in (0, 1]; read by sparse methods only.
    pub density: f64,
    /// Of the random choice of entries; read by random methods only.
    pub seed: u64,
    /// Whether a linear or spherical merge may lie beyond the models, by a weight below 0.
    pub extrapolate: bool,
}

impl Options {
    /// # Errors
    /// [`Error::Input`] when the options do not fit each other, or not this number of models with or without a base.
    pub fn validate(&self, models: usize, has_base: bool) -> Result<()> {
        let Self { method, ref weights, normalise, density, .. } = *self;
        let name = method.name();
        let wrong = |what: String| Err(Error::input(what));
        let least = if method.needs_base() { 1 } else { 2 };
        if method == Method::Slerp && models != 2 {
            return wrong(format!("slerp goes from one model to another, so it takes 2 models, not {models}."));
        }
        if models < least {
            return wrong(format!("{name} takes {least} or more models, but {models} is given."));
        }
        if method.needs_base() && !has_base {
            return wrong(format!(
                "{name} merges what each model has learnt over a common base, so it needs the base: give --base."
            ));
        }
        if !method.needs_base() && has_base {
            return wrong(format!("{name} knows no base. Leave --base out, or give the base as one of the models."));
        }
        if weights.len() != models {
            return wrong(format!(
                "{models} models need as many weights, in the same order, but {} are given.",
                weights.len()
            ));
        }
        if let Some(weight) = weights.iter().find(|weight| !weight.is_finite()) {
            return wrong(format!("The weight {weight} is not a number that can be computed with."));
        }
        if method.is_sparse() && !(density > 0.0 && density <= 1.0) {
            return wrong(format!("The density is {density}, but it must be above 0 and at most 1."));
        }
        let sum: f64 = weights.iter().sum();
        if normalise && sum.abs() < 1e-8 {
            return wrong(
                "The weights add up to 0, so they cannot be divided by their sum. Change them, or give \
                 --normalise false."
                    .into(),
            );
        }
        if method == Method::Slerp && !normalise {
            return wrong("slerp takes the shares 1 − q and q of a way, so its weights are always normalised.".into());
        }
        if !method.needs_base()
            && !self.extrapolate
            && let Some(weight) = self.coefficients().into_iter().find(|&weight| weight < 0.0)
        {
            return wrong(format!(
                "A weight of {weight} leads beyond the models (q must be from 0 to 1, weights at least 0). Give \
                 --extrapolate if you mean it."
            ));
        }
        Ok(())
    }

    /// The weights, divided by their sum if asked.
    fn coefficients(&self) -> Vec<f64> {
        let sum: f64 = if self.normalise { self.weights.iter().sum() } else { 1.0 };
        self.weights.iter().map(|weight| weight / sum).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(options: &Options, models: usize, has_base: bool, part: &str) {
        let message = options.validate(models, has_base).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }

    #[test]
    fn options_that_do_not_fit_are_refused() {
        let linear = Options {
            method: Method::Linear,
            weights: vec![0.5, 0.5],
            normalise: true,
            density: 1.0,
            seed: 0,
            extrapolate: false,
        };
        linear.validate(2, false).unwrap();
        refused(&linear, 3, false, "3 models need as many weights");
        refused(&linear, 2, true, "knows no base");
        refused(&Options { weights: vec![1.0], ..linear.clone() }, 1, false, "2 or more models");
        refused(&Options { weights: vec![1.0, f64::NAN], ..linear.clone() }, 2, false, "NaN");
        refused(&Options { weights: vec![1.0, -1.0], ..linear.clone() }, 2, false, "add up to 0");
        let beyond = Options { weights: vec![-0.5, 1.5], ..linear.clone() };
        refused(&beyond, 2, false, "--extrapolate");
        // both weights below 0, yet normalised to shares
        Options { weights: vec![-1.0, -1.0], ..linear.clone() }.validate(2, false).unwrap();
        Options { extrapolate: true, ..beyond }.validate(2, false).unwrap();
        let slerp = Options { method: Method::Slerp, ..linear.clone() };
        refused(&Options { weights: vec![1.0; 3], ..slerp.clone() }, 3, false, "2 models");
        refused(&Options { normalise: false, ..slerp }, 2, false, "always normalised");
        let ties = Options { method: Method::Ties, weights: vec![1.0, -0.5], ..linear };
        refused(&ties, 2, false, "--base");
        ties.validate(2, true).unwrap();
        for density in [0.0, 1.1, f64::NAN] {
            refused(&Options { density, ..ties.clone() }, 2, true, "density");
        }
    }
}
