//! The verdicts on one metric, with policies and prompts by number.

use std::collections::{BTreeMap, BTreeSet};

use engine::{Error, Result};

use super::share::Share;
use crate::verdict::Verdict;

/// The numbers of prompts, by their identity.
pub(super) type Prompts<'a> = BTreeMap<&'a str, usize>;

/// Verdicts on one metric, and who takes part.
#[derive(Debug)]
pub(super) struct Games<'a> {
    /// What was judged, where verdicts name it.
    pub(super) metric: Option<&'a str>,
    /// The policies' names in alphabetical order; their places are the policies' numbers.
    pub(super) names: Vec<&'a str>,
    /// The policy that win rates are against; all others if there is none.
    pub(super) baseline: Option<usize>,
    /// How many prompts there are in all metrics together: one more than the highest number.
    pub(super) prompts: usize,
    pub(super) games: Vec<Game<'a>>,
}

/// One verdict.
#[derive(Debug, Clone, Copy)]
pub(super) struct Game<'a> {
    pub(super) prompt: usize,
    /// The numbers of the policies A and B.
    pub(super) players: [usize; 2],
    pub(super) verdict: &'a Verdict,
}

/// A verdict as one of its two policies sees it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Side<'a> {
    pub(super) prompt: usize,
    pub(super) verdict: &'a Verdict,
    /// 0 if the policy is A, 1 if it is B.
    pub(super) place: usize,
}

impl Side<'_> {
    /// How well the policy did, from 0 to 1.
    pub(super) fn outcome(&self) -> Option<f64> {
        self.verdict.outcome.map(|outcome| if self.place == 0 { outcome } else { 1.0 - outcome })
    }

    /// The number of characters by which its answer is longer than the other one.
    pub(super) fn longer(&self) -> Option<f64> {
        self.verdict.lengths.map(|lengths| lengths[self.place] as f64 - lengths[1 - self.place] as f64)
    }
}

impl<'a> Games<'a> {
    /// From verdicts, at least one, all of whose prompts have numbers.
    ///
    /// # Errors
    /// [`Error::Input`] if there is no policy of the baseline's name.
    pub(super) fn new(
        metric: Option<&'a str>,
        verdicts: &[&'a Verdict],
        prompts: &Prompts<'_>,
        baseline: Option<&str>,
    ) -> Result<Self> {
        let names: BTreeSet<&str> = verdicts.iter().flat_map(|verdict| [&*verdict.a, &*verdict.b]).collect();
        let names: Vec<&str> = names.into_iter().collect();
        let number = |name: &str| names.binary_search(&name).ok();
        let baseline = match baseline {
            Some(name) => Some(number(name).ok_or_else(|| {
                let of_metric = metric.map(|metric| format!(" by the metric `{metric}`")).unwrap_or_default();
                Error::input(format!(
                    "There is no verdict on the baseline `{name}`{of_metric}. The policies are {}.",
                    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
                ))
            })?),
            None => common(verdicts).and_then(number),
        };
        let game = |verdict: &&'a Verdict| {
            let players = [number(&verdict.a)?, number(&verdict.b)?];
            Some(Game { prompt: *prompts.get(&*verdict.prompt)?, players, verdict })
        };
        let games = verdicts.iter().filter_map(game).collect();
        Ok(Self { metric, baseline, prompts: prompts.len(), games, names })
    }

    /// The verdicts on a policy, whoever the other one is.
    pub(super) fn of(&self, player: usize) -> impl Iterator<Item = Side<'a>> {
        let side = move |game: &Game<'a>| {
            let place = game.players.iter().position(|one| *one == player)?;
            Some(Side { prompt: game.prompt, verdict: game.verdict, place })
        };
        self.games.iter().filter_map(side)
    }

    /// The verdicts that a policy's win rate is made of: against the baseline, or against all where there is none.
    pub(super) fn against(&self, player: usize) -> impl Iterator<Item = Side<'a>> {
        let baseline = self.baseline.map(|baseline| self.names[baseline]);
        self.of(player).filter(move |side| {
            let other = if side.place == 0 { &side.verdict.b } else { &side.verdict.a };
            baseline.is_none_or(|baseline| other == baseline)
        })
    }

    /// The outcomes of those verdicts that were reached.
    pub(super) fn win_rate(&self, player: usize) -> Option<Share> {
        Share::new(self.against(player).filter_map(|side| Some((side.prompt, side.outcome()?))))
    }
}

/// The policy that takes part in every verdict; of two such policies the first verdict's B.
fn common<'a>(verdicts: &[&'a Verdict]) -> Option<&'a str> {
    let first = verdicts.first()?;
    let everywhere = |name: &&str| verdicts.iter().all(|verdict| verdict.a == **name || verdict.b == **name);
    [&*first.b, &*first.a].into_iter().find(everywhere)
}
