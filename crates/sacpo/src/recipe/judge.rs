//! `[[judge]]`: who scores answers by a metric.

use align::objective::ScoreLoss;
use align::world::Metric;
use engine::Result;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use super::blend::PolicyRef;
use super::location::Location;
use super::plan::Sweep;
use super::section::Section;

pub(super) const JUDGE_KEYS: &[&str] = &["metric", "policy", "reward_model", "cost_model", "quickstart"];

/// `[[judge]]`: scores of answers by one metric.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Judge {
    /// The metric that it judges.
    pub metric: String,
    /// Where its scores come from.
    #[serde(flatten)]
    pub source: JudgeSource,
}

/// Where a judge's scores come from.
#[derive(Debug, Clone, PartialEq)]
pub enum JudgeSource {
    /// The implicit reward β log π/π_start of a trained policy, relative to its mean over answers of the base model.
    Policy(PolicyRef),
    /// The score of a reward model, or the cost by a cost model times −1, so that at least 0 is safe: folders of a sequence
    /// classification with one label.
    Model(Location, ScoreLoss),
    /// What the quickstart world says exactly.
    Quickstart(Metric),
}

const WORLD_METRICS: [(&str, Metric); 2] = [("reward", Metric::Reward), ("safety", Metric::Safety)];

/// One key and its value, as recipes have them.
impl Serialize for JudgeSource {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(1))?;
        match self {
            Self::Policy(policy) => map.serialize_entry("policy", policy)?,
            Self::Model(location, ScoreLoss::Reward) => map.serialize_entry("reward_model", location)?,
            Self::Model(location, ScoreLoss::Cost) => map.serialize_entry("cost_model", location)?,
            Self::Quickstart(metric) => {
                let name = WORLD_METRICS.iter().find(|(_, other)| other == metric).map_or("", |(name, _)| name);
                map.serialize_entry("quickstart", name)?;
            }
        }
        map.end()
    }
}

impl Judge {
    pub(super) fn read(section: &Section<'_>, above: &[Self], trained: &Sweep<'_>) -> Result<Self> {
        let metric = section.required("metric", section.text("metric")?, "metric = \"harmlessness\"")?;
        if above.iter().any(|judge| judge.metric == metric) {
            return Err(section.error(&format!("The metric `{metric}` has another judge above. Keep one of them.")));
        }
        let policy = section.text("policy")?.map(|name| {
            let policy = trained.policy(section, "policy", &name)?;
            check_implicit(section, &metric, &policy, trained)?;
            Ok(JudgeSource::Policy(policy))
        });
        let model = |key: &str, loss: ScoreLoss| -> Result<Option<JudgeSource>> {
            Ok(section.text(key)?.map(|path| JudgeSource::Model(path.into(), loss)))
        };
        let given = [
            policy.transpose()?,
            model("reward_model", ScoreLoss::Reward)?,
            model("cost_model", ScoreLoss::Cost)?,
            section.choice("quickstart", &WORLD_METRICS)?.map(JudgeSource::Quickstart),
        ];
        let mut given = given.into_iter().flatten();
        let source = match (given.next(), given.next()) {
            (Some(source), None) => source,
            (None, _) => {
                return Err(section.error(
                    "It must say who judges: `policy`, a policy of this recipe that was trained on the metric; `reward_model` or \
                     `cost_model`, a folder; or `quickstart`, in the quickstart's world.",
                ));
            }
            (Some(_), Some(_)) => {
                return Err(section.error(
                    "It has several of `policy`, `reward_model`, `cost_model` and `quickstart`. Keep one of them.",
                ));
            }
        };
        Ok(Self { metric, source })
    }
}

/// Fails unless a policy's log-ratio to its start says what responses are worth by the metric.
fn check_implicit(section: &Section<'_>, metric: &str, policy: &PolicyRef, trained: &Sweep<'_>) -> Result<()> {
    let Some(planned) = policy.planned else {
        return Err(section.error(
            "The base model is where implicit rewards are 0, so it is no judge. Name a policy that was trained on the metric.",
        ));
    };
    let step = &trained.steps[trained.plan[planned].step];
    if step.metric != metric && trained.steps.iter().any(|other| other.metric == metric) {
        return Err(section.error(&format!(
            "The policy `{}` was trained on `{}`, and not on `{metric}`, on which there is another step. Name a policy of that one.",
            policy.name, step.metric
        )));
    }
    // parameters decide, not temperatures
    let has_none = if !step.objective_at(1.0)?.uses_reference() {
        Some(format!("`{}`, which has no reference", step.objective))
    } else if step.objective == "modpo" {
        Some("`modpo`, whose margins are in it too".to_owned())
    } else if step.relabel.is_some() {
        Some("labels that were drawn anew from several metrics".to_owned())
    } else {
        None
    };
    has_none.map_or(Ok(()), |how| {
        Err(section.error(&format!(
            "The policy `{}` was trained by {how}, so its log-ratio to its start is not the metric alone. Name a policy that was \
             trained by `dpo` or another objective with a reference, on the data's own labels.",
            policy.name
        )))
    })
}
