//! The frontier of two metrics: policies of which none is better in both.

use std::collections::BTreeMap;

use serde::Serialize;

use super::bootstrap::Bootstrap;
use super::games::Games;
use super::share::Share;

/// The policies that are rated by both of two metrics, on the plane of their win rates.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Frontier {
    /// The metrics.
    pub metrics: [String; 2],
    /// The policies, by name.
    pub models: BTreeMap<String, FrontierModel>,
    /// The hypervolume above win rates of 0 %, in the square of all win rates: from 0 to 1.
    pub hypervolume: f64,
    /// The 95 % percentile interval of the bootstrap over prompts.
    pub interval: [f64; 2],
}

/// Where a policy is on the plane.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct FrontierModel {
    /// The win rates in percent, in the order of the metrics.
    pub win_rates: [f64; 2],
    /// Whether it is on the Pareto frontier.
    pub on_frontier: bool,
    /// In which share of the bootstrap's replicates it is, from 0 to 1.
    pub support: f64,
}

/// The frontier of the policies that have verdicts in both metrics; [`None`] if there is no such policy.
pub(super) fn frontier(metrics: [&Games<'_>; 2], bootstrap: &Bootstrap) -> Option<Frontier> {
    let [first, second] = metrics;
    let rates = |name: &&str| Some([Rate::of(first, name)?, Rate::of(second, name)?]);
    let (names, rates): (Vec<&str>, Vec<[Rate; 2]>) =
        first.names.iter().filter_map(|name| Some((*name, rates(name)?))).unzip();
    if names.is_empty() {
        return None;
    }
    let at = |weights: &[f64]| -> Vec<[f64; 2]> {
        rates.iter().map(|rates| rates.each_ref().map(|rate| rate.at(weights))).collect()
    };
    let points = at(&vec![1.0; first.prompts]);
    let (members, support) = (on_frontier(&points), bootstrap.shares(|weights| on_frontier(&at(weights))));
    let model = |i: usize| FrontierModel {
        win_rates: points[i].map(|rate| 100.0 * rate),
        on_frontier: members[i],
        support: support[i],
    };
    Some(Frontier {
        metrics: metrics.map(|games| games.metric.unwrap_or_default().to_owned()),
        models: names.iter().enumerate().map(|(i, name)| ((*name).to_owned(), model(i))).collect(),
        hypervolume: hypervolume(&points, [0.0; 2]),
        interval: bootstrap.interval(|weights| hypervolume(&at(weights), [0.0; 2])),
    })
}

/// A win rate as a function of the prompts' weights.
enum Rate {
    /// The baseline's, ½ by definition.
    Baseline,
    Verdicts(Share),
}

impl Rate {
    fn of(games: &Games<'_>, name: &str) -> Option<Self> {
        let player = games.names.binary_search(&name).ok()?;
        if games.baseline == Some(player) { Some(Self::Baseline) } else { games.win_rate(player).map(Self::Verdicts) }
    }

    fn at(&self, weights: &[f64]) -> f64 {
        match self {
            Self::Baseline => 0.5,
            Self::Verdicts(share) => share.at(weights),
        }
    }
}

/// Whether each point is on the Pareto frontier: no other point is at least as high in both coordinates and higher in one.
pub fn on_frontier(points: &[[f64; 2]]) -> Vec<bool> {
    let dominates = |[a, b]: &[f64; 2], [x, y]: &[f64; 2]| a >= x && b >= y && (a > x || b > y);
    points.iter().map(|point| !points.iter().any(|other| dominates(other, point))).collect()
}

/// The hypervolume of two metrics: the area of what is at least `worst` in both coordinates and at most some point in both
/// (E. Zitzler, L. Thiele, IEEE Trans. Evol. Comput. 3, 1999).
pub fn hypervolume(points: &[[f64; 2]], worst: [f64; 2]) -> f64 {
    let mut points = points.to_vec();
    points.sort_by(|a, b| b[0].total_cmp(&a[0]));
    let (mut area, mut top) = (0.0, worst[1]);
    for [x, y] in points {
        area += (x - worst[0]).max(0.0) * (y - top).max(0.0);
        // a point left of the worst covers nothing, and hides nothing either
        if x > worst[0] {
            top = top.max(y);
        }
    }
    area
}

#[cfg(test)]
mod tests {
    use super::{hypervolume, on_frontier};

    #[test]
    fn points_that_no_other_beats_are_on_the_frontier() {
        let points = [[0.9, 0.1], [0.5, 0.5], [0.5, 0.4], [0.1, 0.9], [0.1, 0.9], [0.0, 0.0]];
        assert_eq!(on_frontier(&points), [true, true, false, true, true, false]);
        assert_eq!(on_frontier(&[]), [false; 0]);
    }

    #[test]
    fn the_hypervolume_is_the_area_of_the_staircase() {
        // by inclusion and exclusion of the rectangles
        let points = [[3.0, 1.0], [1.0, 3.0], [2.0, 2.0], [1.0, 1.0]];
        assert_eq!(hypervolume(&points, [0.0, 0.0]), 6.0);
        assert_eq!(hypervolume(&points, [1.0, 1.0]), 1.0);
        assert_eq!(hypervolume(&points, [-1.0, 0.0]), 9.0);
        assert_eq!(hypervolume(&[[-1.0, 5.0], [1.0, 1.0]], [0.0, 0.0]), 1.0);
        assert_eq!(hypervolume(&[[2.0, -1.0]], [0.0, 0.0]), 0.0);
        assert_eq!(hypervolume(&[], [0.0, 0.0]), 0.0);
    }
}
