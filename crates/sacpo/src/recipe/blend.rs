//! `[merge]` and `[mix]`: policies between two others.

use align::merge::Method;
use engine::Result;
use serde::{Serialize, Serializer};

use super::plan::Sweep;
use super::section::Section;
use super::step::{BASE, check_name};
use crate::suggest::nearest;

pub(super) const MIX_KEYS: &[&str] = &["name", "q", "from", "to", "extrapolate"];
pub(super) const MERGE_KEYS: &[&str] = &["name", "q", "from", "to", "extrapolate", "method", "density"];

/// `[merge]` or `[mix]`: one policy for each q, between two others.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Blend {
    /// Policies are named `{name}-{q}`. Default: `merge` or `mix`.
    pub name: String,
    /// The shares of `to`, 0 to 1 unless `extrapolate`.
    pub q: Vec<f64>,
    /// The policy at q = 0. Default: the one that `to` started from.
    pub from: PolicyRef,
    /// The policy at q = 1. Default: of the last step the one of the smallest temperature.
    pub to: PolicyRef,
    /// Whether q may lie outside 0 to 1. Default: no.
    pub extrapolate: bool,
    /// How weights are merged (default: linear, which makes it P-SACPO); nothing for `[mix]`, which mixes logits.
    #[serde(flatten)]
    pub merging: Option<Merging>,
}

/// How the weights of two policies are merged.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Merging {
    /// Those of task vectors take the base model as their base, and 1 − q and q as weights.
    #[serde(serialize_with = "method_name")]
    pub method: Method,
    /// The share of each task vector that is kept, in (0, 1], by sparse methods.
    pub density: Option<f64>,
}

/// A policy by its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyRef {
    /// `base`, or the name of a planned step.
    pub name: String,
    /// Its index in the plan's steps; `None`: the base model.
    pub planned: Option<usize>,
}

impl Serialize for PolicyRef {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.name)
    }
}

fn method_name<S: Serializer>(method: &Method, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.serialize_str(method.name())
}

impl Blend {
    /// Reads a `[merge]`, if `merges`, or a `[mix]`, between trained policies.
    pub(super) fn read(section: &Section<'_>, merges: bool, trained: &Sweep<'_>) -> Result<Self> {
        let name = section.text("name")?.unwrap_or_else(|| if merges { "merge" } else { "mix" }.into());
        check_name(section, if merges { "merge" } else { "mix" }, &name)?;
        let extrapolate = section.flag("extrapolate")?.unwrap_or(false);
        let q = section.required("q", section.sweep("q", ..)?, "q = [0.25, 0.5, 0.75]")?;
        if let Some(q) = q.iter().find(|q| !extrapolate && !(0.0..=1.0).contains(*q)) {
            return Err(section.error(&format!(
                "`q` is {q}, but must be from 0 to 1: beyond it a policy lies beyond the two others. Write `extrapolate = true` \
                 if you mean it."
            )));
        }
        let to = match section.text("to")? {
            Some(name) => trained.policy(section, "to", &name)?,
            None => trained.strongest(section, "to", trained.steps.len() - 1)?,
        };
        let from = match (section.text("from")?, to.planned) {
            (Some(name), _) => trained.policy(section, "from", &name)?,
            (None, Some(to)) => trained.reference(trained.plan[to].parent),
            (None, None) => {
                return Err(section.error("`to` is the base model, so `from` must be given: name the other policy."));
            }
        };
        if from == to {
            return Err(section.error(&format!(
                "`from` and `to` are both `{}`, and nothing lies between a policy and itself. Name two policies.",
                to.name
            )));
        }
        Ok(Self { name, q, from, to, extrapolate, merging: merges.then(|| Merging::read(section)).transpose()? })
    }
}

impl Merging {
    /// (1 − q)·θ + q·θ′ (SACPO, arXiv 2404.11049).
    pub const P_SACPO: Self = Self { method: Method::Linear, density: None };

    fn read(section: &Section<'_>) -> Result<Self> {
        let methods = Method::ALL.map(|method| (method.name(), method));
        let method = section.choice("method", &methods)?.unwrap_or(Self::P_SACPO.method);
        let density = section.number("density", (std::ops::Bound::Excluded(0.0), std::ops::Bound::Included(1.0)))?;
        match (method.is_sparse(), density) {
            (true, None) => Err(section.error(&format!(
                "`{}` keeps a share of what each policy has learnt. Set it by `density`, such as `density = 0.5`.",
                method.name()
            ))),
            (false, Some(_)) => Err(section.error(&format!("`{}` keeps everything. Remove `density`.", method.name()))),
            _ => Ok(Self { method, density }),
        }
    }
}

impl Sweep<'_> {
    /// The policy of this name, or the strongest of the step of this name.
    pub(super) fn policy(&self, section: &Section<'_>, key: &str, name: &str) -> Result<PolicyRef> {
        if name == BASE {
            return Ok(self.reference(None));
        }
        if let Some(planned) = self.plan.iter().position(|policy| policy.name == name) {
            return Ok(self.reference(Some(planned)));
        }
        if let Some(step) = self.steps.iter().position(|step| step.name == name) {
            return self.strongest(section, key, step);
        }
        let names =
            self.plan.iter().map(|policy| policy.name.as_str()).chain(self.steps.iter().map(|s| s.name.as_str()));
        let meant = nearest(name, names).map(|meant| format!(" Did you mean `{meant}`?")).unwrap_or_default();
        Err(section.error(&format!("`{key}` names `{name}`, which is no policy and no step of this recipe.{meant}")))
    }

    /// The policy of a step that has the smallest temperature.
    fn strongest(&self, section: &Section<'_>, key: &str, step: usize) -> Result<PolicyRef> {
        let own = || self.plan.iter().enumerate().filter(|(_, policy)| policy.step == step);
        let name = &self.steps[step].name;
        let Some((planned, strongest)) = own().min_by(|(_, a), (_, b)| a.beta.total_cmp(&b.beta)) else {
            return Err(section.error(&format!(
                "`{key}` is the step `{name}`, whose policies only a constraint will name. Give the step \
                 `beta_over_lambda`, or name a policy of another step."
            )));
        };
        if own().any(|(_, policy)| policy.parent != strongest.parent) {
            let names: Vec<String> = own().take(4).map(|(_, policy)| format!("`{}`", policy.name)).collect();
            return Err(section.error(&format!(
                "`{key}` is the step `{name}`, which starts from several policies, so it must be said which is meant: {}, ….",
                names.join(", ")
            )));
        }
        Ok(self.reference(Some(planned)))
    }

    pub(super) fn reference(&self, planned: Option<usize>) -> PolicyRef {
        let name = planned.map_or(BASE, |planned| &self.plan[planned].name);
        PolicyRef { name: name.to_owned(), planned }
    }
}
