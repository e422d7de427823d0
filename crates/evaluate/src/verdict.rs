//! What a judge said of two policies' answers to one prompt: what judges write and ratings are made of.

mod rows;

pub use rows::{outcome_of, verdicts};

use engine::{Error, Result};
use serde::{Deserialize, Serialize};

/// One comparison of two policies' answers to one prompt by one judge. As JSON, one object a line:
///
/// ```json
/// {"prompt":"q17","category":"coding","metric":"helpfulness","a":"sacpo-0.1","b":"sft","outcome":1.0,"scores":[8,6]}
/// ```
///
/// Fields that are [`None`], false or 0 may be left out, except `outcome`, which is `null` where it is missing. Other fields are
/// ignored by those who read verdicts.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// The prompt's identity. Verdicts on one prompt, in both orders, repeated, or of other pairs of policies, are not
    /// independent of each other and are drawn together where an interval is made.
    pub prompt: String,
    /// The kind of prompt, for tables by category.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub category: Option<String>,
    /// What was judged: `helpfulness`, `harmlessness`. Verdicts on different metrics are never rated together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metric: Option<String>,
    /// The name of one policy.
    pub a: String,
    /// The name of the other policy, which is not `a`'s.
    pub b: String,
    /// How well A did against B, from 0 to 1: 1 where A's answer is better, 0 where B's is, ½ for a tie. [`None`] where no
    /// verdict was reached, which is never a tie.
    #[serde(deserialize_with = "Option::deserialize")]
    pub outcome: Option<f64>,
    /// What the answers of A and B were given by themselves, in the judge's own units, more being better.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scores: Option<[f64; 2]>,
    /// The lengths of the answers of A and B in characters (Unicode scalar values).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lengths: Option<[usize; 2]>,
    /// Whether the judge calls the answers of A and B refusals.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusals: Option<[bool; 2]>,
    /// Whether the judge saw B's answer first.
    #[serde(default, skip_serializing_if = "is_false")]
    pub swapped: bool,
    /// Which repetition of the same comparison in the same order this is, from 0.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub repeat: u32,
}

impl Verdict {
    /// Fails, in a sentence that names the field, unless the verdict is what its fields' documentation says.
    ///
    /// # Errors
    /// [`Error::Input`] for an empty prompt or name, a policy compared with itself, an outcome outside 0 to 1, and a score
    /// that is not finite.
    pub fn check(&self) -> Result<()> {
        for (field, text) in [("prompt", &self.prompt), ("a", &self.a), ("b", &self.b)] {
            if text.is_empty() {
                return Err(Error::input(format!("The verdict's `{field}` is empty. Give its name.")));
            }
        }
        if self.a == self.b {
            return Err(Error::input(format!(
                "The verdict compares `{}` with itself. `a` and `b` must be two policies.",
                self.a
            )));
        }
        if let Some(outcome) = self.outcome.filter(|outcome| !(0.0..=1.0).contains(outcome)) {
            return Err(Error::input(format!(
                "The verdict's `outcome` is {outcome:?}, but it must be from 0, B is better, to 1, A is better; null where \
                 there is none."
            )));
        }
        if let Some(score) = self.scores.into_iter().flatten().find(|score| !score.is_finite()) {
            return Err(Error::input(format!("A score in the verdict's `scores` is {score}, but it must be finite.")));
        }
        Ok(())
    }
}

fn is_false(value: &bool) -> bool {
    !value
}

fn is_zero(value: &u32) -> bool {
    *value == 0
}
