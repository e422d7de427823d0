//! `[[judge]]`: who scores answers by a metric.

use align::world::Metric;
use engine::Result;
use serde::{Serialize, Serializer};

use super::blend::PolicyRef;
use super::plan::Sweep;
use super::section::Section;

pub(super) const JUDGE_KEYS: &[&str] = &["metric", "policy", "quickstart"];

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
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum JudgeSource {
    /// The implicit reward β log π/π_start of a trained policy, relative to its mean over answers of the base model.
    Policy(PolicyRef),
    /// What the quickstart world says exactly.
    #[serde(serialize_with = "metric_name")]
    Quickstart(Metric),
}

const WORLD_METRICS: [(&str, Metric); 2] = [("reward", Metric::Reward), ("safety", Metric::Safety)];

fn metric_name<S: Serializer>(metric: &Metric, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    let name = WORLD_METRICS.iter().find(|(_, other)| other == metric).map_or("", |(name, _)| name);
    serializer.serialize_str(name)
}

impl Judge {
    pub(super) fn read(section: &Section<'_>, above: &[Self], trained: &Sweep<'_>) -> Result<Self> {
        let metric = section.required("metric", section.text("metric")?, "metric = \"harmlessness\"")?;
        if above.iter().any(|judge| judge.metric == metric) {
            return Err(section.error(&format!("The metric `{metric}` has another judge above. Keep one of them.")));
        }
        let source = match (section.text("policy")?, section.choice("quickstart", &WORLD_METRICS)?) {
            (Some(name), None) => {
                let policy = trained.policy(section, "policy", &name)?;
                if policy.planned.is_none() {
                    return Err(section.error(
                        "The base model is where implicit rewards are 0, so it is no judge. Name a policy that was trained on \
                         the metric.",
                    ));
                }
                JudgeSource::Policy(policy)
            }
            (None, Some(metric)) => JudgeSource::Quickstart(metric),
            (None, None) => {
                return Err(section.error(
                    "It must say who judges: `policy`, a policy of this recipe that was trained on the metric, or `quickstart`, in \
                     the quickstart's world.",
                ));
            }
            (Some(_), Some(_)) => return Err(section.error("It has both `policy` and `quickstart`. Keep one of them.")),
        };
        Ok(Self { metric, source })
    }
}
