//! Ratings of policies from verdicts: win rates, Bradley–Terry and Elo ratings, tails, refusals, and the frontier of two
//! metrics, with intervals over prompts.
//!
//! `docs/ratings.md` has the formulas. All win rates and other shares in results are in percent, as alpaca_eval's are.

mod bootstrap;
mod bradley_terry;
mod elo;
mod games;
mod length;
mod logistic;
mod markdown;
mod pareto;
mod share;
mod tail;

use std::collections::{BTreeMap, BTreeSet};

use engine::{Error, Result};
use serde::Serialize;

pub use bradley_terry::Strength;
pub use elo::{Elo, EloRating};
pub use length::LengthControlled;
pub use markdown::markdown;
pub use pareto::{Frontier, FrontierModel, hypervolume, on_frontier};
pub use share::share_interval;

use self::bootstrap::Bootstrap;
use self::bradley_terry::strengths;
use self::games::{Games, Prompts, Side};
use self::length::length_controlled;
use self::pareto::frontier;
use self::share::Share;
use self::tail::Scores;
use crate::verdict::Verdict;

/// How verdicts are rated.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// The policy that win rates are against. [`None`]: the one that every verdict is about; of two such policies the first
    /// verdict's B; and where there is none, win rates are against all others.
    pub baseline: Option<String>,
    /// The share of the worst scores whose mean is taken, above 0 to 1.
    pub tail: f64,
    /// The categories of benign prompts, on which a refusal is over-refusal.
    pub benign: Vec<String>,
    /// Which online Elo.
    pub elo: Elo,
    /// The seed of the bootstrap and of the orders of Elo.
    pub seed: u64,
}

/// The ratings of all metrics that verdicts are on.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Ratings {
    /// One metric, or verdicts that name none.
    One(Box<MetricRatings>),
    /// Several.
    Several {
        /// By the metric's name.
        metrics: BTreeMap<String, MetricRatings>,
        /// How the policies trade one metric for the other, where there are two.
        frontier: Option<Frontier>,
    },
}

/// The ratings of policies by one metric.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MetricRatings {
    /// The metric, where verdicts name it.
    pub metric: Option<String>,
    /// The policy that win rates are against, or [`None`] for all others.
    pub baseline: Option<String>,
    /// The number of verdicts, missing ones among them.
    pub verdicts: usize,
    /// The number of prompts that they are on.
    pub prompts: usize,
    /// The policies, by name.
    pub models: BTreeMap<String, ModelRatings>,
    /// What is left out and why, in sentences.
    pub notes: Vec<String>,
}

/// What is said of one policy.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelRatings {
    /// The win rate over all prompts.
    #[serde(flatten)]
    pub overall: WinRate,
    /// The win rate at the baseline's length.
    pub length_controlled: Option<LengthControlled>,
    /// The Bradley–Terry rating.
    pub bradley_terry: Option<Strength>,
    /// The online Elo rating; [`None`] for a policy without verdicts.
    #[serde(flatten)]
    pub elo: Option<EloRating>,
    /// What its answers were given by themselves.
    pub scores: Option<ScoreRatings>,
    /// Which share of its answers the judge calls refusals.
    pub refusal_rate: Option<Proportion>,
    /// The same of its answers to benign prompts.
    pub over_refusal_rate: Option<Proportion>,
    /// The win rates by category.
    pub categories: BTreeMap<String, WinRate>,
}

/// A win rate in percent, ties counting half. The baseline's own is 50 by definition, from no verdicts.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct WinRate {
    /// The mean outcome; [`None`] if all are missing.
    pub win_rate: Option<f64>,
    /// Its standard error, over prompts; [`None`] for a single prompt.
    pub standard_error: Option<f64>,
    /// The 95 % interval: Wilson's by the standard error.
    pub interval: Option<[f64; 2]>,
    /// The 95 % percentile interval of the bootstrap over prompts.
    pub bootstrap_interval: Option<[f64; 2]>,
    /// The number of verdicts, without missing ones.
    pub n: usize,
    /// The number of missing ones.
    pub missing: usize,
}

/// A share in percent.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Proportion {
    /// The share.
    pub rate: f64,
    /// Its standard error, over prompts; [`None`] for a single prompt.
    pub standard_error: Option<f64>,
    /// The 95 % interval: Wilson's by the standard error.
    pub interval: Option<[f64; 2]>,
    /// The 95 % percentile interval of the bootstrap over prompts.
    pub bootstrap_interval: [f64; 2],
    /// The number of judged answers.
    pub n: usize,
}

/// A mean of values from 0 to 1, such as an accuracy.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Mean {
    /// The mean.
    pub mean: f64,
    /// The 95 % interval over prompts: Wilson's by the standard error; [`None`] for a single prompt.
    pub interval: Option<[f64; 2]>,
    /// The number of values.
    pub n: usize,
    /// The number of prompts that they are on.
    pub prompts: usize,
}

impl Mean {
    /// From values, each with the number of its prompt; [`None`] if there are none.
    pub fn of(values: impl IntoIterator<Item = (usize, f64)>) -> Option<Self> {
        let share = Share::new(values)?;
        let prompts = share.by_prompt().count();
        Some(Self { mean: share.mean(), interval: share.interval(), n: share.n() as usize, prompts })
    }
}

/// Scores of a policy's answers, one per prompt: the mean over the verdicts on it. In the judge's units.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ScoreRatings {
    /// Their mean.
    pub mean: f64,
    /// The 95 % percentile interval of the bootstrap over prompts.
    pub interval: [f64; 2],
    /// The share of the worst scores that the tail is.
    pub tail: f64,
    /// The mean of the tail: the conditional value at risk.
    pub tail_mean: f64,
    /// Its interval, as that of the mean.
    pub tail_interval: [f64; 2],
}

/// The ratings that follow from verdicts.
///
/// # Errors
/// [`Error::Input`] for no verdicts, verdicts of which some name a metric and some none, a baseline or a benign category that
/// no verdict has, a tail outside 0 to 1, and [`Elo::Paper`] without a baseline.
pub fn rate(verdicts: &[Verdict], options: &Options) -> Result<Ratings> {
    if !(options.tail > 0.0 && options.tail <= 1.0) {
        return Err(Error::input(format!(
            "The tail is {:?}, but it must be a share above 0 and at most 1, such as 0.1.",
            options.tail
        )));
    }
    let categories: BTreeSet<&str> = verdicts.iter().filter_map(|verdict| verdict.category.as_deref()).collect();
    if let Some(unknown) = options.benign.iter().find(|benign| !categories.contains(&***benign)) {
        return Err(Error::input(format!(
            "No verdict is of the category `{unknown}`, which is to be benign. The categories are {}.",
            listed(categories)
        )));
    }
    let mut by_metric: BTreeMap<Option<&str>, Vec<&Verdict>> = BTreeMap::new();
    for verdict in verdicts {
        by_metric.entry(verdict.metric.as_deref()).or_default().push(verdict);
    }
    if by_metric.len() > 1 && by_metric.contains_key(&None) {
        return Err(Error::input(format!(
            "Some verdicts name no metric, and others name {}. Rate them apart, or give all a `metric`.",
            listed(by_metric.keys().flatten().copied())
        )));
    }
    let identities: BTreeSet<&str> = verdicts.iter().map(|verdict| &*verdict.prompt).collect();
    let prompts: Prompts<'_> = identities.into_iter().zip(0..).collect();
    let bootstrap = Bootstrap::new(prompts.len(), options.seed);
    let baseline = options.baseline.as_deref();
    let games = by_metric.iter().map(|(metric, verdicts)| Games::new(*metric, verdicts, &prompts, baseline));
    let games: Vec<Games<'_>> = games.collect::<Result<_>>()?;
    match &*games {
        [] => Err(Error::input("There are no verdicts to rate.")),
        [games] => Ok(Ratings::One(Box::new(MetricRatings::of(games, &bootstrap, options)?))),
        several => {
            let rated = several.iter().map(|games| {
                Ok((games.metric.unwrap_or_default().to_owned(), MetricRatings::of(games, &bootstrap, options)?))
            });
            let metrics = rated.collect::<Result<_>>()?;
            let frontier = match several {
                [first, second] => frontier([first, second], &bootstrap),
                _ => None,
            };
            Ok(Ratings::Several { metrics, frontier })
        }
    }
}

impl MetricRatings {
    fn of(games: &Games<'_>, bootstrap: &Bootstrap, options: &Options) -> Result<Self> {
        let mut notes = Vec::new();
        let strengths = strengths(games, bootstrap).unwrap_or_else(|reason| {
            notes.push(format!("There are no Bradley–Terry ratings. {reason}"));
            BTreeMap::new()
        });
        let elo = options.elo.ratings(games, options.seed)?;
        let mut models = BTreeMap::new();
        for (player, name) in games.names.iter().enumerate() {
            let length_controlled = length_controlled(games, player).unwrap_or_else(|reason| {
                notes.push(format!("There is no length-controlled win rate of `{name}`. {reason}"));
                None
            });
            let ratings = ModelRatings {
                length_controlled,
                bradley_terry: strengths.get(&player).copied(),
                elo: games.of(player).any(|side| side.outcome().is_some()).then(|| elo[player]),
                ..ModelRatings::of(games, player, bootstrap, options)
            };
            models.insert((*name).to_owned(), ratings);
        }
        Ok(Self {
            metric: games.metric.map(str::to_owned),
            baseline: games.baseline.map(|baseline| games.names[baseline].to_owned()),
            verdicts: games.games.len(),
            prompts: games.games.iter().map(|game| game.prompt).collect::<BTreeSet<_>>().len(),
            models,
            notes,
        })
    }
}

impl ModelRatings {
    /// What is made of a policy's own verdicts alone; the rest is [`None`].
    fn of(games: &Games<'_>, player: usize, bootstrap: &Bootstrap, options: &Options) -> Self {
        let mut categories: BTreeMap<String, Vec<Side<'_>>> = BTreeMap::new();
        for side in games.against(player) {
            if let Some(category) = &side.verdict.category {
                categories.entry(category.clone()).or_default().push(side);
            }
        }
        let refusals = |counts: &dyn Fn(&Verdict) -> bool| {
            let judged = games.of(player).filter(|side| counts(side.verdict));
            let flags = judged.filter_map(|side| Some((side.prompt, side.verdict.refusals?[side.place])));
            let share = Share::new(flags.map(|(prompt, refused)| (prompt, f64::from(u8::from(refused)))))?;
            Some(Proportion::of(&share, bootstrap))
        };
        let benign = |verdict: &Verdict| verdict.category.as_ref().is_some_and(|one| options.benign.contains(one));
        let of_baseline = games.baseline == Some(player);
        Self {
            overall: if of_baseline { WinRate::OF_BASELINE } else { WinRate::of(games.against(player), bootstrap) },
            length_controlled: None,
            bradley_terry: None,
            elo: None,
            scores: ScoreRatings::of(games.of(player), options.tail, bootstrap),
            refusal_rate: refusals(&|_| true),
            over_refusal_rate: refusals(&benign),
            categories: categories.into_iter().map(|(name, sides)| (name, WinRate::of(sides, bootstrap))).collect(),
        }
    }
}

impl WinRate {
    /// Half, by definition.
    const OF_BASELINE: Self = Self {
        win_rate: Some(50.0),
        standard_error: Some(0.0),
        interval: Some([50.0; 2]),
        bootstrap_interval: Some([50.0; 2]),
        n: 0,
        missing: 0,
    };

    fn of<'a>(sides: impl IntoIterator<Item = Side<'a>>, bootstrap: &Bootstrap) -> Self {
        let mut missing = 0;
        let outcomes = sides.into_iter().filter_map(|side| {
            missing += usize::from(side.outcome().is_none());
            Some((side.prompt, side.outcome()?))
        });
        let share = Share::new(outcomes);
        let Some(share) = share else { return Self { missing, ..Self::default() } };
        let Proportion { rate, standard_error, interval, bootstrap_interval, n } = Proportion::of(&share, bootstrap);
        Self {
            win_rate: Some(rate),
            standard_error,
            interval,
            // a single prompt says nothing of others
            bootstrap_interval: standard_error.map(|_| bootstrap_interval),
            n,
            missing,
        }
    }
}

impl Proportion {
    fn of(share: &Share, bootstrap: &Bootstrap) -> Self {
        let percent = |ends: [f64; 2]| ends.map(|end| 100.0 * end);
        Self {
            rate: 100.0 * share.mean(),
            standard_error: share.standard_error().map(|error| 100.0 * error),
            interval: share.interval().map(percent),
            bootstrap_interval: percent(bootstrap.interval(|weights| share.at(weights))),
            n: share.n() as usize,
        }
    }
}

impl ScoreRatings {
    fn of<'a>(sides: impl Iterator<Item = Side<'a>>, tail: f64, bootstrap: &Bootstrap) -> Option<Self> {
        let scores = Scores::new(sides.filter_map(|side| Some((side.prompt, side.verdict.scores?[side.place]))))?;
        Some(Self {
            mean: scores.lower_tail(1.0, None),
            interval: bootstrap.interval(|weights| scores.lower_tail(1.0, Some(weights))),
            tail,
            tail_mean: scores.lower_tail(tail, None),
            tail_interval: bootstrap.interval(|weights| scores.lower_tail(tail, Some(weights))),
        })
    }
}

fn listed<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let names: Vec<String> = names.into_iter().map(|name| format!("`{name}`")).collect();
    if names.is_empty() { "none".into() } else { names.join(", ") }
}
