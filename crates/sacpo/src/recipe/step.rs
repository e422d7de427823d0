//! `[[step]]`: one alignment of a policy on one metric.

use std::collections::BTreeMap;

use align::data::Format;
use align::objective::{self, Objective};
use engine::Result;
use serde::{Serialize, Serializer};

use super::POSITIVE;
use super::location::Location;
use super::options::{DataOptions, TrainOptions};
use super::section::Section;
use crate::suggest::nearest;

/// The keys of a step beside those of `[data]` and `[train]`, which a step may override.
pub(super) const STEP_KEYS: &[&str] = &[
    "name",
    "metric",
    "from",
    "objective",
    "label_smoothing",
    "sum_logps",
    "desirable_weight",
    "undesirable_weight",
    "gamma",
    "alpha",
    "delta",
    "weight",
    "beta",
    "beta_over_lambda",
    "data",
    "validation_data",
    "format",
    "relabel",
    "margin",
];

/// The base model's name among policies.
pub const BASE: &str = "base";

/// `[[step]]`: one preference alignment, which starts from and is referenced to the policies of one step above, or the
/// base model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Step {
    /// The name of the step and, with the value of a sweep, of its policies. Default: the metric.
    pub name: String,
    /// The metric that the data's preferences are about, such as `helpfulness` or `harmlessness`.
    pub metric: String,
    /// The step whose policies it starts from. Default: the one above, or the base model in the first step.
    pub from: Origin,
    /// The name of the loss. Default: `dpo`.
    pub objective: &'static str,
    /// The parameters of the loss beside its temperature.
    #[serde(flatten)]
    pub parameters: objective::Options,
    /// `beta` or `beta_over_lambda`.
    #[serde(flatten, skip_serializing_if = "Temperature::is_open")]
    pub temperature: Temperature,
    /// The file of preference pairs.
    pub data: Location,
    /// The file of pairs that are held out. Default: a share of `data` (`validation_fraction`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation_data: Option<Location>,
    /// The schema of the files. Default: found from their first rows.
    pub format: Option<Format>,
    /// The `[data]` options of this step.
    #[serde(flatten)]
    pub data_options: DataOptions,
    /// The `[train]` options of this step.
    #[serde(flatten)]
    pub train: TrainOptions,
    /// Weights of judged metrics: labels are drawn anew by Bradley–Terry from the weighted sum of their scores. Default:
    /// the data's own labels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub relabel: Option<BTreeMap<String, f64>>,
    /// `modpo`: weights of judged metrics, whose differences make the margin. Default: the data's own margins.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub margin: Option<BTreeMap<String, f64>>,
}

/// What a step starts from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// `base`, or the name of a step.
    pub name: String,
    /// The index of the step in [`Recipe::steps`](super::Recipe::steps), below the step's own; `None`: the base model.
    pub step: Option<usize>,
}

impl Serialize for Origin {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.name)
    }
}

/// The temperature of a step's objective: how strongly it is held to its reference.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Temperature {
    /// β of a step that starts from the base model, each > 0: one policy for each value.
    Beta(Vec<f64>),
    /// β/λ of a step that starts from another step, each > 0: one policy for each value. Empty only where a constraint
    /// gives the value.
    BetaOverLambda(Vec<f64>),
}

impl Step {
    /// Reads a step; `above` are the steps before it.
    pub(super) fn read(
        section: &Section<'_>,
        above: &[Self],
        data: &DataOptions,
        train: &TrainOptions,
    ) -> Result<Self> {
        let metric = section.required("metric", section.text("metric")?, "metric = \"helpfulness\"")?;
        let name = section.text("name")?.unwrap_or_else(|| metric.clone());
        check_name(section, "step", &name)?;
        if let Some(other) = above.iter().position(|step| step.name == name) {
            return Err(section.error(&format!(
                "The name `{name}` is that of step {} too. Give each step a `name` of its own.",
                other + 1
            )));
        }
        let from = Origin::read(section, &name, above)?;
        let formats = Format::ALL.map(|format| (format.name(), format));
        let path = section.required("data", section.text("data")?, "data = \"data/pairs.jsonl.gz\"")?;
        let names: Vec<(&str, &'static str)> = objective::NAMES.iter().map(|name| (*name, *name)).collect();
        let step = Self {
            name,
            metric,
            objective: section.choice("objective", &names)?.unwrap_or("dpo"),
            parameters: objective::Options {
                label_smoothing: section.number("label_smoothing", 0.0..0.5)?,
                sum_logps: section.flag("sum_logps")?,
                desirable_weight: section.number("desirable_weight", POSITIVE)?,
                undesirable_weight: section.number("undesirable_weight", POSITIVE)?,
                gamma: section.number("gamma", 0.0..)?,
                alpha: section.number("alpha", 0.0..)?,
                delta: section.number("delta", 0.0..)?,
                weight: section.number("weight", POSITIVE)?,
            },
            temperature: Temperature::read(section, from.step.is_none())?,
            from,
            data: path.into(),
            validation_data: section.text("validation_data")?.map(Location::from),
            format: section.choice("format", &formats)?,
            data_options: DataOptions::read(section, data)?,
            train: TrainOptions::read(section, train)?,
            relabel: section.weights("relabel")?,
            margin: section.weights("margin")?,
        };
        // parameters decide, not temperatures
        let objective = step.objective_at(1.0).map_err(|error| section.error(&error.to_string()))?;
        if step.margin.is_some() && step.objective != "modpo" {
            return Err(section.error(&format!(
                "`margin` is for the objective `modpo`, but this step's is `{}`. Set `objective = \"modpo\"`, or remove \
                 `margin`.",
                step.objective
            )));
        }
        if step.relabel.is_some() && !matches!(objective, Objective::Pairwise(_)) {
            return Err(section.error(&format!(
                "`relabel` draws anew which response of a pair is chosen, but `{}` takes single responses. Choose an objective \
                 of pairs, such as `dpo`, or remove `relabel`.",
                step.objective
            )));
        }
        if step.relabel.is_some() && step.margin.is_some() {
            return Err(section.error(
                "It has both `relabel` and `margin`, but a pair's margin is for labels of another metric than those that are drawn \
                 anew. Keep one of them.",
            ));
        }
        Ok(step)
    }

    /// The loss at a temperature.
    ///
    /// # Errors
    /// A temperature that is not above 0; a parameter that the objective does not have, which no parsed recipe has.
    pub fn objective_at(&self, temperature: f64) -> Result<Objective> {
        self.parameters.build(self.objective, temperature)
    }
}

impl Origin {
    fn read(section: &Section<'_>, own: &str, above: &[Step]) -> Result<Self> {
        let names = || above.iter().map(|step| step.name.as_str());
        let Some(name) = section.text("from")? else {
            let last = above.last().map_or(BASE, |step| &step.name);
            return Ok(Self { name: last.to_owned(), step: above.len().checked_sub(1) });
        };
        let step = names().position(|step| step == name);
        if step.is_some() || name == BASE {
            return Ok(Self { name, step });
        }
        let why = if name == own {
            "which is this very step".to_owned()
        } else {
            let meant = nearest(&name, names()).map(|meant| format!("; did you mean `{meant}`?")).unwrap_or_default();
            format!("which is no step above this one{meant}")
        };
        Err(section.error(&format!(
            "`from` names `{name}`, {why}. A step starts from `base` or from a step that stands before it in the recipe."
        )))
    }
}

impl Temperature {
    fn read(section: &Section<'_>, from_base: bool) -> Result<Self> {
        if from_base {
            section.forbid(
                "beta_over_lambda",
                "A step that starts from the base model has no λ: it takes `beta`, the weight β of the KL term. Write for \
                 example `beta = 0.1`, or a list to train one policy for each value.",
            )?;
            let betas = section.sweep("beta", POSITIVE)?;
            Ok(Self::Beta(section.required("beta", betas, "beta = 0.1")?))
        } else {
            section.forbid(
                "beta",
                "Only a step that starts from the base model takes `beta`. One that starts from another step takes \
                 `beta_over_lambda`, the ratio β/λ of that step's β to the weight λ of the step's own metric: the \
                 smaller it is, the more the metric counts. Write for example `beta_over_lambda = 0.1`, or a list to \
                 train one policy for each value.",
            )?;
            Ok(Self::BetaOverLambda(section.sweep("beta_over_lambda", POSITIVE)?.unwrap_or_default()))
        }
    }

    /// The values, one for each policy that the step makes of each policy that it starts from.
    pub fn values(&self) -> &[f64] {
        match self {
            Self::Beta(values) | Self::BetaOverLambda(values) => values,
        }
    }

    /// Whether there is no value yet, and a constraint must give it.
    pub fn is_open(&self) -> bool {
        self.values().is_empty()
    }
}

/// Fails unless a name can name a folder on every system.
pub(super) fn check_name(section: &Section<'_>, what: &str, name: &str) -> Result<()> {
    if name == BASE {
        return Err(section.error("The name `base` is taken by the untrained model. Set another `name`."));
    }
    let safe = name.len() <= 64
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
    if safe {
        return Ok(());
    }
    Err(section.error(&format!(
        "The {what}'s name {name:?} cannot name a folder. Set a `name` of at most 64 letters, digits, `-`, `_` and `.` that \
         starts with a letter or digit."
    )))
}
