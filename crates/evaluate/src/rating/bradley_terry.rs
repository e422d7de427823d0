//! Bradley–Terry ratings of policies by maximum likelihood.

use std::collections::{BTreeMap, BTreeSet};

use nalgebra::{DMatrix, DVector};
use serde::Serialize;

use super::bootstrap::Bootstrap;
use super::elo::CENTRE;
use super::games::Games;
use super::logistic::{Clustered, Outcomes, clustered, fit};

/// Points of Elo's scale per unit of log-odds.
const POINTS_PER_LOGIT: f64 = 400.0 / std::f64::consts::LN_10;

/// A policy's strength R on Elo's scale: P(i beats j) = 1/(1 + 10^((R_j − R_i)/400)).
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Strength {
    /// R, 1000 for the baseline, or for the mean of all policies where there is none.
    pub rating: f64,
    /// Its standard error over prompts; [`None`] for a single prompt.
    pub standard_error: Option<f64>,
    /// The 95 % interval by the standard error and Student's t.
    pub interval: Option<[f64; 2]>,
    /// The 95 % percentile interval of the bootstrap over prompts.
    pub bootstrap_interval: [f64; 2],
}

/// The strengths of the policies that have verdicts, by their numbers.
///
/// θ maximises Σ [s log σ(θ_a − θ_b) + (1 − s) log σ(θ_b − θ_a)] without regularisation, ties counting half (R. Bradley,
/// M. Terry, Biometrika 39, 1952); R = 1000 + 400/ln 10 · (θ − θ of the baseline).
///
/// # Errors
/// The reason, as a sentence, if there is no maximum: see [`check_comparable`].
pub(super) fn strengths(games: &Games<'_>, bootstrap: &Bootstrap) -> Result<BTreeMap<usize, Strength>, String> {
    let results = Results::of(games);
    results.check_comparable(&games.names)?;
    let failed = || "The fit of the ratings did not converge.".to_owned();
    let theta = results.fit(&vec![1.0; games.prompts], None).ok_or_else(failed)?;
    let contrast = results.contrast(games.baseline);
    let ratings = |theta: &DVector<f64>| (&contrast * theta).map(|theta| CENTRE + POINTS_PER_LOGIT * theta);

    // weights are above 0, so what exists for the sample exists for every replicate
    let replicate = |weights: &[f64]| match results.fit(weights, Some(&theta)) {
        Some(theta) => ratings(&theta).as_slice().to_vec(),
        None => vec![f64::NAN; results.policies.len()],
    };
    let bootstrapped = bootstrap.intervals(replicate);
    if bootstrapped.iter().flatten().any(|end| end.is_nan()) {
        return Err(failed());
    }
    let rows: Vec<(usize, Outcomes)> = results.games.iter().map(|game| (game.prompt, game.outcomes())).collect();
    let on_scale = |clustered: Clustered| Clustered {
        covariance: &contrast * clustered.covariance * contrast.transpose() * POINTS_PER_LOGIT.powi(2),
        ..clustered
    };
    let clustered = clustered(&rows, &theta).map(on_scale);
    let errors = clustered.as_ref().map(Clustered::errors);
    let rating = ratings(&theta);
    let strength = |i: usize| {
        let margin = clustered.as_ref().zip(errors.as_ref()).map(|(clustered, errors)| clustered.t * errors[i]);
        Strength {
            rating: rating[i],
            standard_error: errors.as_ref().map(|errors| errors[i]),
            interval: margin.map(|margin| [rating[i] - margin, rating[i] + margin]),
            bootstrap_interval: bootstrapped[i],
        }
    };
    Ok(results.policies.iter().enumerate().map(|(i, &policy)| (policy, strength(i))).collect())
}

/// What policies gained against each other.
struct Results {
    /// The numbers of the policies that have verdicts. θ is 0 for the first, and has a coefficient for each of the others.
    policies: Vec<usize>,
    /// One for every prompt and pair of policies.
    games: Vec<Pairing>,
}

/// The verdicts on two policies.
#[derive(Clone, Copy)]
struct Pairing {
    prompt: usize,
    /// Their places among [`Results::policies`], in rising order.
    pair: [usize; 2],
    /// What the first gained, and of how much.
    sum: f64,
    n: f64,
}

impl Pairing {
    fn outcomes(&self) -> Outcomes {
        let [i, j] = self.pair;
        let first = if i == 0 { (0, 0.0) } else { (i - 1, 1.0) };
        Outcomes { x: [first, (j - 1, -1.0)], sum: self.sum, n: self.n }
    }
}

impl Results {
    fn of(games: &Games<'_>) -> Self {
        let reached = || games.games.iter().filter_map(|game| Some((game, game.verdict.outcome?)));
        let policies: BTreeSet<usize> = reached().flat_map(|(game, _)| game.players).collect();
        let policies: Vec<usize> = policies.into_iter().collect();
        let mut sums: BTreeMap<(usize, [usize; 2]), (f64, f64)> = BTreeMap::new();
        for (game, outcome) in reached() {
            let [a, b] = game.players.map(|player| policies.partition_point(|policy| *policy < player));
            let (pair, outcome) = if a < b { ([a, b], outcome) } else { ([b, a], 1.0 - outcome) };
            let (sum, n) = sums.entry((game.prompt, pair)).or_default();
            *sum += outcome;
            *n += 1.0;
        }
        let pairing = |((prompt, pair), (sum, n))| Pairing { prompt, pair, sum, n };
        Self { policies, games: sums.into_iter().map(pairing).collect() }
    }

    /// θ of all policies but the first, with a weight for every prompt.
    fn fit(&self, weights: &[f64], start: Option<&DVector<f64>>) -> Option<DVector<f64>> {
        let mut pooled: BTreeMap<[usize; 2], Pairing> = BTreeMap::new();
        for game in &self.games {
            let all = pooled.entry(game.pair).or_insert(Pairing { sum: 0.0, n: 0.0, ..*game });
            all.sum += weights[game.prompt] * game.sum;
            all.n += weights[game.prompt] * game.n;
        }
        let rows: Vec<Outcomes> = pooled.values().map(Pairing::outcomes).collect();
        fit(&rows, start.cloned().unwrap_or_else(|| DVector::zeros(self.policies.len() - 1)))
    }

    /// The matrix that takes the fitted θ to θ of all policies less that of the baseline, or less the mean of all.
    fn contrast(&self, baseline: Option<usize>) -> DMatrix<f64> {
        let baseline = baseline.and_then(|baseline| self.policies.binary_search(&baseline).ok());
        let one = |holds: bool| if holds { 1.0 } else { 0.0 };
        DMatrix::from_fn(self.policies.len(), self.policies.len() - 1, |i, j| {
            let subtracted = match baseline {
                Some(baseline) => one(baseline == j + 1),
                None => 1.0 / self.policies.len() as f64,
            };
            one(i == j + 1) - subtracted
        })
    }

    /// Fails, in a sentence, unless the ratings exist: if and only if there is no way to part the policies in two groups of which the first
    /// gained nothing against the second (L. Ford, Amer. Math. Monthly 64, 1957).
    fn check_comparable(&self, names: &[&str]) -> Result<(), String> {
        if self.games.is_empty() {
            return Err("No verdict was reached.".into());
        }
        let group = |inside: &[bool], of: bool| {
            let members = self.policies.iter().zip(inside).filter(|(_, inside)| **inside == of);
            members.map(|(&policy, _)| format!("`{}`", names[policy])).collect::<Vec<_>>().join(", ")
        };
        // who gained something against whom
        let gained = |game: &Pairing, place: usize| if place == 0 { game.sum > 0.0 } else { game.sum < game.n };
        let connected = self.reach(|_, _| true);
        if connected.contains(&false) {
            let (first, second) = (group(&connected, true), group(&connected, false));
            return Err(format!("No verdict compares {first} with {second}, so they have no common scale."));
        }
        // those that the first gained something against, themselves or through others; then those that did against the first
        let beaten = self.reach(gained);
        let beating = self.reach(|game, place| gained(game, 1 - place));
        let (losing, winning) = match (beaten.contains(&false), beating.contains(&false)) {
            (false, false) => return Ok(()),
            (true, _) => (group(&beaten, true), group(&beaten, false)),
            (false, true) => (group(&beating, false), group(&beating, true)),
        };
        Err(format!(
            "No verdict gives {losing} anything against {winning}, so the ratings would be infinitely far apart."
        ))
    }

    /// Which policies are reached from the first by steps between the two of a pairing, from either place, that are allowed.
    fn reach(&self, allowed: impl Fn(&Pairing, usize) -> bool) -> Vec<bool> {
        let mut reached = vec![false; self.policies.len()];
        reached[0] = true;
        loop {
            let mut grown = false;
            for game in &self.games {
                for place in [0, 1] {
                    let [from, to] = [game.pair[place], game.pair[1 - place]];
                    if reached[from] && !reached[to] && allowed(game, place) {
                        reached[to] = true;
                        grown = true;
                    }
                }
            }
            if !grown {
                return reached;
            }
        }
    }
}
