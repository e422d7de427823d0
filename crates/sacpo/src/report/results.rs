//! `results.json`.

use std::path::{Path, PathBuf};

use evaluate::frontier::Point;
use evaluate::rating::share_interval;
use evaluate::report::{Constraint, Frontier};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::read_json;

/// The comparison that a run ends with.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Results {
    pub(super) policies: Vec<Policy>,
    pub(super) constraint: Option<Constraint>,
    pub(super) seconds: Option<f64>,
    pub(super) peak_memory_bytes: Option<usize>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Policy {
    pub(super) name: String,
    step: Option<String>,
    beta_over_lambda: Option<f64>,
    q: Option<f64>,
    reward: Option<f64>,
    safety: Option<f64>,
    kl: Option<f64>,
    /// How it ranks held-out pairs, by metric in the order of the steps.
    #[serde(default)]
    validation: Map<String, Value>,
    checkpoint: Option<PathBuf>,
}

impl Policy {
    /// What policies are drawn as one line for.
    fn group(&self) -> &str {
        match (&self.step, self.q, &self.checkpoint) {
            (Some(step), ..) => step,
            (None, Some(_), Some(_)) => "merge",
            (None, Some(_), None) => "mix",
            (None, None, _) => &self.name,
        }
    }

    /// The share of held-out pairs of a metric that it ranks right, with its interval.
    fn accuracy(&self, metric: &str) -> Option<(f64, Option<[f64; 2]>)> {
        let report = self.validation.get(metric)?;
        let pairs = usize::try_from(report["pairs"].as_u64()?).ok()?;
        let accuracy = report["accuracy"].as_f64()?;
        (pairs > 0).then(|| (accuracy, share_interval(accuracy, pairs)))
    }
}

impl Results {
    pub(super) fn read(run: &Path, missing: &mut Vec<String>) -> Self {
        let path = run.join("results.json");
        read_json(&path, missing).unwrap_or_else(|| {
            if !path.exists() {
                missing.push("There is no results.json: the run has not ended.".into());
            }
            Self::default()
        })
    }

    /// The policy that was made for the constraints.
    pub(super) fn chosen(&self) -> Option<&str> {
        self.constraint.as_ref()?.policy.as_deref()
    }

    /// The place of a policy in the order of the run; the end for one that it does not have.
    pub(super) fn place(&self, name: &str) -> usize {
        self.policies.iter().position(|policy| policy.name == name).unwrap_or(usize::MAX)
    }

    /// What the first step is about.
    pub(super) fn first_metric(&self) -> Option<&str> {
        self.policies.first()?.validation.keys().next().map(String::as_str)
    }

    fn policy(&self, name: &str) -> Option<&Policy> {
        self.policies.iter().find(|policy| policy.name == name)
    }

    /// The step that trained a policy.
    pub(super) fn step_of(&self, name: &str) -> Option<&str> {
        self.policy(name)?.step.as_deref()
    }

    /// A policy by these two values.
    pub(super) fn point(&self, name: &str, values: [(f64, Option<[f64; 2]>); 2]) -> Point {
        let policy = self.policy(name);
        let [(reward, reward_interval), (safety, safety_interval)] = values;
        Point {
            name: name.to_owned(),
            step: policy.map_or(name, Policy::group).to_owned(),
            beta_over_lambda: policy.and_then(|policy| policy.beta_over_lambda),
            q: policy.and_then(|policy| policy.q),
            reward,
            reward_interval,
            safety,
            safety_interval,
            kl: None,
        }
    }

    /// What the results themselves say of two metrics: exact values, and held-out pairs.
    pub(super) fn frontiers(&self) -> Vec<Frontier> {
        self.exact().into_iter().chain(self.held_out()).collect()
    }

    fn exact(&self) -> Option<Frontier> {
        let points: Vec<Point> = self
            .policies
            .iter()
            .filter_map(|policy| {
                let values = [(policy.reward?, None), (policy.safety?, None)];
                Some(Point { kl: policy.kl, ..self.point(&policy.name, values) })
            })
            .collect();
        let constraint = self.constraint.as_ref();
        let threshold = constraint.filter(|constraint| constraint.constraints.len() == 1);
        (!points.is_empty()).then(|| Frontier {
            title: "Reward against safety".into(),
            note: "Expectations over all held-out prompts, which are exact in this world: nothing is sampled. KL is from the \
                   base model, in nats."
                .into(),
            metrics: ["E[r*], helpfulness".into(), "E[g*], safety".into()],
            points,
            in_percent: false,
            at_least: threshold.map(|constraint| constraint.constraints[0].threshold),
            chosen: self.chosen().map(str::to_owned),
        })
    }

    /// The first metric against each of the others.
    fn held_out(&self) -> Vec<Frontier> {
        let Some(policy) = self.policies.first() else { return Vec::new() };
        let mut metrics = policy.validation.keys();
        let Some(first) = metrics.next() else { return Vec::new() };
        let plane = |second: &String| {
            let points = self.policies.iter().filter_map(|policy| {
                Some(self.point(&policy.name, [policy.accuracy(first)?, policy.accuracy(second)?]))
            });
            let points: Vec<Point> = points.collect();
            (!points.is_empty()).then(|| Frontier {
                title: format!("Held-out pairs: {first} against {second}"),
                note: "The share of held-out pairs of whose responses the policy's implicit reward, log π − log π_base, prefers \
                       the chosen one, ties counting half; the base model's own is ½ by definition. It says what the policy \
                       prefers, and not how good its answers are. Intervals of 95 % (Wilson) take the pairs as independent."
                    .into(),
                metrics: [format!("accuracy, {first}"), format!("accuracy, {second}")],
                points,
                in_percent: false,
                at_least: None,
                chosen: self.chosen().map(str::to_owned),
            })
        };
        metrics.filter_map(plane).collect()
    }
}
