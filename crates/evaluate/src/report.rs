//! The report of a run as one HTML page that needs nothing else: numbers and texts in, HTML out.
//!
//! Whatever is missing is left out of the page, or said to be. All texts are escaped, answers of models among them: those are
//! in the page as compressed JSON that its script shows as plain text.

mod page;

use engine::Result;
use serde::{Deserialize, Serialize};

use crate::curves::Series;
use crate::frontier::Point;
use crate::panels::Panel;

/// What a report shows.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Report {
    /// The heading of the page.
    pub title: String,
    /// What made it: name and value, as text.
    pub facts: Vec<Fact>,
    /// Policies on planes of two metrics.
    pub frontiers: Vec<Frontier>,
    /// What came of the constraints, if there are any.
    pub constraint: Option<Constraint>,
    /// Quantities over optimizer steps.
    pub curves: Vec<Curves>,
    /// Ratings from verdicts, one for each set of prompts and metric.
    pub ratings: Vec<Rating>,
    /// What policies answered, one for each set of prompts.
    pub answers: Vec<AnswerSet>,
    /// Where the policies came from.
    pub policies: Vec<Policy>,
    /// What it took: name and value, as text.
    pub cost: Vec<Fact>,
    /// What the page lacks and why, in sentences.
    pub missing: Vec<String>,
}

/// A name and what it is.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Fact {
    /// What is said.
    pub name: String,
    /// The value, for people.
    pub value: String,
}

/// Policies on the plane of two metrics, both better the larger they are.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Frontier {
    /// The heading.
    pub title: String,
    /// What the metrics are and how they were measured, in sentences.
    pub note: String,
    /// The names of the horizontal and the vertical metric, which are [`Point::reward`] and [`Point::safety`].
    pub metrics: [String; 2],
    /// The policies.
    pub points: Vec<Point>,
    /// Whether the values are shares in percent.
    pub in_percent: bool,
    /// The least value of the vertical metric that was asked for, if it is in the same units.
    pub at_least: Option<f64>,
    /// The policy that was made for the constraint.
    pub chosen: Option<String>,
}

/// A quantity over the optimizer steps of the policies of a step.
#[derive(Debug, Clone, PartialEq)]
pub struct Curves {
    /// The step of the recipe.
    pub step: String,
    /// The quantity, by its name in `metrics.jsonl`.
    pub metric: String,
    /// A curve for each policy.
    pub series: Vec<Series>,
}

/// What came of the constraints, as `results.json` has it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Constraint {
    /// Of all constraints together: `met`, `not met` or `undecided`.
    pub verdict: String,
    /// The level of the bounds, of all constraints together.
    pub confidence: f64,
    /// The policy that was judged.
    pub policy: Option<String>,
    /// Its β/λ.
    pub beta_over_lambda: Option<f64>,
    /// Why there is no policy, or why there may be a better one.
    pub reason: Option<String>,
    /// Numbers of prompts that λ was chosen from, and that were held out.
    pub prompts: [usize; 2],
    /// Answers to each prompt.
    pub answers: usize,
    /// The constraints, one by one.
    pub constraints: Vec<Certificate>,
    /// The λ that were tried.
    pub shots: Vec<Shot>,
    /// What is known exactly of the policy, in a world where all is known.
    pub exact: Option<Exact>,
}

/// One constraint and what the policy makes of it on held-out prompts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Certificate {
    /// What is constrained.
    pub metric: String,
    /// The least expectation.
    pub threshold: f64,
    /// The λ that the policy was made for.
    pub lambda: Option<f64>,
    /// The mean over the held-out prompts.
    pub safety: Option<f64>,
    /// Its one-sided lower bound.
    pub lower_bound: Option<f64>,
    /// Its one-sided upper bound.
    pub upper_bound: Option<f64>,
    /// `met`, `not met` or `undecided`.
    pub verdict: Option<String>,
}

/// One λ that was tried; lists have an item for each constraint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Shot {
    /// The policy that was made for it.
    pub policy: String,
    /// λ.
    pub lambda: Vec<f64>,
    /// What was predicted.
    pub estimate: Vec<Mean>,
    /// The bias of the prediction.
    pub bias: Vec<f64>,
    /// How many answers to a prompt the prediction rests on.
    pub effective_sample_size: f64,
    /// What the policy's own answers score.
    pub measured: Vec<Mean>,
}

/// A mean over prompts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Mean {
    /// The mean.
    pub value: f64,
    /// Its two-sided interval.
    pub interval: [f64; 2],
    /// Its one-sided lower bound.
    pub lower_bound: f64,
}

/// Exact expectations on held-out prompts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Exact {
    /// Of the policy that was judged.
    pub safety: f64,
    /// Of the optimum for its λ.
    pub optimum_safety: Option<f64>,
}

/// Ratings by one metric on one set of prompts; shares in percent.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Rating {
    /// The heading: the set and the metric.
    pub name: String,
    /// The policy that win rates are against, or nothing for all others.
    pub baseline: Option<String>,
    /// The number of verdicts.
    pub verdicts: usize,
    /// The number of prompts.
    pub prompts: usize,
    /// The policies.
    pub rows: Vec<RatingRow>,
    /// The win rates by category, in the order of the rows.
    pub categories: Vec<Panel>,
    /// What is left out and why, in sentences.
    pub notes: Vec<String>,
}

/// The ratings of one policy.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct RatingRow {
    /// The policy.
    pub policy: String,
    /// Its win rate.
    pub win_rate: Measured,
    /// Its win rate at the baseline's length.
    pub length_controlled: Measured,
    /// Its Bradley–Terry rating.
    pub bradley_terry: Measured,
    /// Its online Elo rating.
    pub elo: Option<f64>,
    /// The mean score.
    pub score: Measured,
    /// The mean of its worst scores.
    pub tail: Measured,
    /// The share of answers that are refusals.
    pub refusals: Measured,
    /// The number of verdicts.
    pub n: usize,
    /// The number of missing ones.
    pub missing: usize,
}

/// A value that may be there, with an interval that may be.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Measured {
    /// The value.
    pub value: Option<f64>,
    /// Its 95 % interval.
    pub interval: Option<[f64; 2]>,
}

/// Where a policy came from.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Policy {
    /// Its name.
    pub name: String,
    /// The way to it from the base model, such as `base → helpfulness → safety-0.5`.
    pub chain: String,
    /// How it was made, in words.
    pub made: String,
    /// β, β/λ or q, with its name.
    pub parameter: Option<String>,
    /// The data that it was trained on.
    pub data: Option<String>,
    /// The hash of the tokens and labels of the data.
    pub data_hash: Option<String>,
    /// The hash of its weights.
    pub weights: String,
    /// Seconds of training or merging.
    pub seconds: Option<f64>,
}

/// What policies answered to a set of prompts, and what judges said.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AnswerSet {
    /// The set's name.
    pub name: String,
    /// The policies.
    pub policies: Vec<String>,
    /// The policies that are shown at first, by their place in `policies`.
    pub shown: Vec<usize>,
    /// The prompts.
    pub prompts: Vec<AnsweredPrompt>,
    /// The verdicts.
    pub verdicts: Vec<Judged>,
}

/// A prompt and the answers to it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AnsweredPrompt {
    /// The prompt.
    pub text: String,
    /// Its kind.
    pub category: Option<String>,
    /// The answers in the order of the policies; nothing where there is none.
    pub answers: Vec<Option<Answer>>,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Answer {
    /// The text.
    pub text: String,
    /// Its length.
    pub tokens: Option<usize>,
    /// Whether it did not end by itself.
    pub cut: bool,
}

/// A verdict on two answers to a prompt.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Judged {
    /// The prompt, by its place in [`AnswerSet::prompts`].
    pub prompt: usize,
    /// What was judged.
    pub metric: String,
    /// The policies A and B, by their places in [`AnswerSet::policies`].
    pub pair: [usize; 2],
    /// 1 where A's answer is better, 0 where B's is, ½ for a tie; nothing where it is missing.
    pub outcome: Option<f64>,
    /// What the answers of A and B were given by themselves.
    pub scores: Option<[f64; 2]>,
}

impl Report {
    /// The page.
    ///
    /// A plot that cannot be drawn, for a number is NaN or infinite, is replaced by the reason.
    ///
    /// # Errors
    /// [`engine::Error::Failed`] if the page cannot be put together, which does not occur in practice.
    pub fn html(&self) -> Result<String> {
        page::html(self)
    }
}
