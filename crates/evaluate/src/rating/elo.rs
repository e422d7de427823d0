//! Online Elo ratings: verdicts move the two policies' ratings one after the other, in random order.

use std::collections::BTreeMap;

use engine::{Error, Result};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::games::{Game, Games};

/// What the baseline is rated, or the mean of all policies where there is no baseline.
pub(super) const CENTRE: f64 = 1000.0;

/// The most that a rating moves by one verdict.
const K: f64 = 32.0;

/// Which online Elo.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Elo {
    /// Each verdict once, missing ones left out; the ratings are shifted so that the baseline has 1000. Over 100 orders.
    #[default]
    Online,
    /// As SACPO's authors calculated it (their `compute_scores.py`, which is unseeded): from 1200, ten times through all
    /// verdicts, each time in a new order of prompts and pairs; a missing verdict counts as a tie, as their judge's failures
    /// did; the ratings are multiplied so that the baseline has 1000. Over 50 trials.
    Paper,
}

/// A policy's rating over the orders of verdicts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct EloRating {
    /// The mean.
    pub elo: f64,
    /// The standard deviation, which says how much the order matters, and nothing of how uncertain the rating is.
    pub elo_deviation: f64,
}

/// What is settled after the last verdict of an order.
type Settle<'a> = &'a dyn Fn(&mut [f64]);

impl Elo {
    /// The ratings of all policies, by their numbers.
    ///
    /// # Errors
    /// [`Error::Input`] if [`Elo::Paper`] has no baseline.
    pub(super) fn ratings(self, games: &Games<'_>, seed: u64) -> Result<Vec<EloRating>> {
        let (baseline, policies) = (games.baseline, games.names.len());
        match self {
            Self::Online => {
                let played = games.games.iter().filter_map(|game| Some(vec![(game.players, game.verdict.outcome?)]));
                let settle = |ratings: &mut [f64]| {
                    let mean = ratings.iter().sum::<f64>() / ratings.len() as f64;
                    let shift = CENTRE - baseline.map_or(mean, |baseline| ratings[baseline]);
                    ratings.iter_mut().for_each(|rating| *rating += shift);
                };
                Ok(over_orders(100, played.collect(), 1, &vec![CENTRE; policies], &settle, seed))
            }
            Self::Paper => {
                let Some(baseline) = baseline else {
                    return Err(Error::input(
                        "The paper's Elo is relative to a baseline, and there is no policy that every verdict is about. Name \
                         the baseline.",
                    ));
                };
                let settle = |ratings: &mut [f64]| {
                    let factor = CENTRE / ratings[baseline];
                    ratings.iter_mut().for_each(|rating| *rating *= factor);
                };
                Ok(over_orders(50, repeats_together(&games.games), 10, &vec![1200.0; policies], &settle, seed))
            }
        }
    }
}

/// Verdicts that are not parted when the order is drawn: the policies and the outcome of each.
type Block = Vec<([usize; 2], f64)>;

/// The repetitions of every comparison, as wins, ties and losses.
fn repeats_together(games: &[Game<'_>]) -> Vec<Block> {
    let mut blocks: BTreeMap<(usize, [usize; 2], bool), Block> = BTreeMap::new();
    for game in games {
        let outcome = game.verdict.outcome.unwrap_or(0.5);
        let decided = if outcome == 0.5 { 0.5 } else { outcome.round() };
        blocks.entry((game.prompt, game.players, game.verdict.swapped)).or_default().push((game.players, decided));
    }
    blocks.into_values().collect()
}

/// The ratings after going `epochs` times through the blocks, each time shuffled, over `trials` trials.
fn over_orders(
    trials: usize,
    mut blocks: Vec<Block>,
    epochs: usize,
    start: &[f64],
    settle: Settle<'_>,
    seed: u64,
) -> Vec<EloRating> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut outcome = vec![Vec::with_capacity(trials); start.len()];
    for _ in 0..trials {
        let mut ratings = start.to_vec();
        for _ in 0..epochs {
            blocks.shuffle(&mut rng);
            for &([a, b], score) in blocks.iter().flatten() {
                let expected = 1.0 / (1.0 + 10f64.powf((ratings[b] - ratings[a]) / 400.0));
                let move_by = K * (score - expected);
                ratings[a] += move_by;
                ratings[b] -= move_by;
            }
        }
        settle(&mut ratings);
        outcome.iter_mut().zip(ratings).for_each(|(ratings, rating)| ratings.push(rating));
    }
    let summary = |ratings: Vec<f64>| {
        let mean = ratings.iter().sum::<f64>() / trials as f64;
        let variance = ratings.iter().map(|rating| (rating - mean).powi(2)).sum::<f64>() / trials as f64;
        EloRating { elo: mean, elo_deviation: variance.sqrt() }
    };
    outcome.into_iter().map(summary).collect()
}
