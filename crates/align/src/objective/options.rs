//! From names and numbers, as recipes and command lines give them, to an objective.

use engine::{Error, Result};
use serde::Serialize;

use super::{Objective, Pairwise, Unpaired};

/// The names of all objectives.
pub const NAMES: &[&str] = &[
    "dpo",
    "robust-dpo",
    "ipo",
    "hinge",
    "kto",
    "bco",
    "nca",
    "exo",
    "sppo",
    "apo-zero",
    "apo-down",
    "simpo",
    "orpo",
    "cpo",
    "safe-dpo",
    "modpo",
    "tdpo",
    "sft",
];

/// The parameters of objectives beside β. What is not given has the objective's default.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Options {
    /// ε of `dpo` (default 0), `robust-dpo` (0.1) and `exo` (0.001): the share of labels taken to be wrong.
    pub label_smoothing: Option<f64>,
    /// Whether `ipo` takes sums of log-probabilities over tokens instead of means (default: no).
    pub sum_logps: Option<bool>,
    /// The weight of desirable examples in `kto`, > 0 (default 1).
    pub desirable_weight: Option<f64>,
    /// The weight of undesirable examples in `kto`, > 0 (default 1).
    pub undesirable_weight: Option<f64>,
    /// The target margin γ of `simpo`, ≥ 0 (default 0.5).
    pub gamma: Option<f64>,
    /// α of `cpo`, the weight of the likelihood (default 1), and of `tdpo`, the weight of the divergence (0.5); ≥ 0.
    pub alpha: Option<f64>,
    /// The margin Δ of a safe response over an unsafe one in `safe-dpo`, ≥ 0 (default 0).
    pub delta: Option<f64>,
    /// The weight w of the pairs' own metric in `modpo`, > 0 (default 1).
    pub weight: Option<f64>,
}

impl Options {
    /// The objective of this name at temperature `beta`.
    ///
    /// # Errors
    /// [`Error::Input`] for an unknown name, a parameter that the objective does not have, or a value out of its range.
    pub fn build(&self, name: &str, beta: f64) -> Result<Objective> {
        if !NAMES.contains(&name) {
            return Err(Error::input(format!(
                "There is no objective `{name}`. The objectives are {}.",
                NAMES.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
            )));
        }
        if !(beta > 0.0 && beta.is_finite()) {
            return Err(Error::input(format!(
                "The temperature beta of `{name}` is {beta}, but it must be a positive number. Values between 0.01 and 1 \
                 are usual; a smaller one lets the policy move further from its reference."
            )));
        }
        self.refuse_foreign(name)?;
        let at_least_0 =
            |what, value: Option<f64>, default| self.number(name, what, value, default, |v| v >= 0.0, "at least 0");
        let positive =
            |what, value: Option<f64>, default| self.number(name, what, value, default, |v| v > 0.0, "above 0");
        let smoothing = |default| {
            let value = self.label_smoothing;
            self.number(
                name,
                "label_smoothing",
                value,
                default,
                |v| (0.0..0.5).contains(&v),
                "at least 0 and less than 0.5",
            )
        };
        Ok(match name {
            "dpo" => Objective::Pairwise(Pairwise::Dpo { beta, label_smoothing: smoothing(0.0)? }),
            "robust-dpo" => Objective::Pairwise(Pairwise::RobustDpo { beta, label_smoothing: smoothing(0.1)? }),
            "ipo" => Objective::Pairwise(Pairwise::Ipo { beta, sum: self.sum_logps.unwrap_or(false) }),
            "hinge" => Objective::Pairwise(Pairwise::Hinge { beta }),
            "nca" => Objective::Pairwise(Pairwise::Nca { beta }),
            "exo" => {
                let label_smoothing = smoothing(1e-3)?;
                if label_smoothing == 0.0 {
                    return Err(Error::input(
                        "The label smoothing of `exo` is 0, but it must be greater than 0: the loss holds its logarithm. \
                         The default is 0.001.",
                    ));
                }
                Objective::Pairwise(Pairwise::Exo { beta, label_smoothing })
            }
            "sppo" => Objective::Pairwise(Pairwise::Sppo { beta }),
            "apo-zero" => Objective::Pairwise(Pairwise::ApoZero { beta }),
            "apo-down" => Objective::Pairwise(Pairwise::ApoDown { beta }),
            "simpo" => Objective::Pairwise(Pairwise::SimPo { beta, gamma: at_least_0("gamma", self.gamma, 0.5)? }),
            "orpo" => Objective::Pairwise(Pairwise::Orpo { beta }),
            "cpo" => Objective::Pairwise(Pairwise::Cpo { beta, alpha: at_least_0("alpha", self.alpha, 1.0)? }),
            "safe-dpo" => Objective::Pairwise(Pairwise::SafeDpo { beta, delta: at_least_0("delta", self.delta, 0.0)? }),
            "modpo" => Objective::Pairwise(Pairwise::Modpo { beta, weight: positive("weight", self.weight, 1.0)? }),
            "tdpo" => Objective::Pairwise(Pairwise::Tdpo { beta, alpha: at_least_0("alpha", self.alpha, 0.5)? }),
            "kto" => Objective::Unpaired(Unpaired::Kto {
                beta,
                desirable_weight: positive("desirable_weight", self.desirable_weight, 1.0)?,
                undesirable_weight: positive("undesirable_weight", self.undesirable_weight, 1.0)?,
            }),
            "bco" => Objective::Unpaired(Unpaired::Bco { beta }),
            _ => Objective::Unpaired(Unpaired::Sft),
        })
    }

    /// A parameter that is given although the objective has none of this name.
    fn refuse_foreign(&self, name: &str) -> Result<()> {
        let given = [
            ("label_smoothing", self.label_smoothing.is_some(), &["dpo", "robust-dpo", "exo"][..]),
            ("sum_logps", self.sum_logps.is_some(), &["ipo"]),
            ("desirable_weight", self.desirable_weight.is_some(), &["kto"]),
            ("undesirable_weight", self.undesirable_weight.is_some(), &["kto"]),
            ("gamma", self.gamma.is_some(), &["simpo"]),
            ("alpha", self.alpha.is_some(), &["cpo", "tdpo"]),
            ("delta", self.delta.is_some(), &["safe-dpo"]),
            ("weight", self.weight.is_some(), &["modpo"]),
        ];
        let foreign = given.iter().find(|(_, given, of)| *given && !of.contains(&name));
        foreign.map_or(Ok(()), |(parameter, _, of)| {
            let of: Vec<String> = of.iter().map(|name| format!("`{name}`")).collect();
            Err(Error::input(format!(
                "`{parameter}` is given, but the objective `{name}` has no such parameter; it belongs to {}. Remove it, or \
                 choose another objective.",
                of.join(", ")
            )))
        })
    }

    /// A parameter or its default, checked.
    fn number(
        &self,
        name: &str,
        what: &str,
        value: Option<f64>,
        default: f64,
        allowed: impl Fn(f64) -> bool,
        range: &str,
    ) -> Result<f64> {
        let value = value.unwrap_or(default);
        if value.is_finite() && allowed(value) {
            return Ok(value);
        }
        Err(Error::input(format!("`{what}` of the objective `{name}` is {value}, but it must be a number {range}.")))
    }
}
