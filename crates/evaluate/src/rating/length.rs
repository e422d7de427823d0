//! Length-controlled win rates.

use nalgebra::DVector;
use serde::Serialize;

use super::games::Games;
use super::logistic::{Outcomes, clustered, fit, logistic};

/// What the win rate would be if the answers were as long as the baseline's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LengthControlled {
    /// 100·σ(θ), in percent.
    pub win_rate: f64,
    /// Its standard error over prompts.
    pub standard_error: Option<f64>,
    /// The 95 % interval, by Student's t for θ.
    pub interval: Option<[f64; 2]>,
    /// φ: the log-odds that an answer gains by being longer by one standard deviation or so; below 0 if shorter answers win.
    pub length_coefficient: f64,
}

/// The length-controlled win rate of a policy against the baseline; [`None`] if there is no baseline, or a verdict does not
/// know the lengths of its answers.
///
/// log-odds of winning = θ + φ·tanh(Δ/s), with the difference Δ of the lengths and its standard deviation s over the
/// verdicts, by maximum likelihood; the win rate is that of Δ = 0. This is the model of Y. Dubois et al. (arXiv 2404.04475) without its term for the difficulty of the instruction, which needs verdicts on many other models, and
/// without their regularisation.
///
/// # Errors
/// The reason, as a sentence, if the verdicts do not determine θ and φ.
pub(super) fn length_controlled(games: &Games<'_>, player: usize) -> Result<Option<LengthControlled>, String> {
    let reached = games.against(player).filter_map(|side| Some((side.prompt, side.longer(), side.outcome()?)));
    let verdicts: Option<Vec<(usize, f64, f64)>> = reached.map(|(prompt, l, s)| Some((prompt, l?, s))).collect();
    let Some(verdicts) = verdicts.filter(|verdicts| games.baseline.is_some() && !verdicts.is_empty()) else {
        return Ok(None);
    };
    let n = verdicts.len() as f64;
    let mean = verdicts.iter().map(|(_, longer, _)| longer).sum::<f64>() / n;
    let deviation = (verdicts.iter().map(|(_, longer, _)| (longer - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt();
    // NaN for a single verdict
    if deviation.is_nan() || deviation == 0.0 {
        return Err("All its answers differ in length from the baseline's by the same number of characters.".into());
    }
    let lengths = verdicts.iter().map(|&(prompt, longer, outcome)| (prompt, (longer / deviation).tanh(), outcome));
    let lengths: Vec<(usize, f64, f64)> = lengths.collect();
    if separable(&lengths) {
        return Err(
            "Its wins and losses are parted by the lengths of the answers alone, or it has only one of them.".into()
        );
    }
    let outcomes = |&(prompt, length, outcome): &(usize, f64, f64)| {
        (prompt, Outcomes { x: [(0, 1.0), (1, length)], sum: outcome, n: 1.0 })
    };
    let rows: Vec<(usize, Outcomes)> = lengths.iter().map(outcomes).collect();
    let all: Vec<Outcomes> = rows.iter().map(|(_, one)| *one).collect();
    let theta = fit(&all, DVector::zeros(2)).ok_or("The fit did not converge.")?;
    let clustered = clustered(&rows, &theta);
    let rate = logistic(theta[0]);
    let ends = |margin: f64| [-margin, margin].map(|margin| 100.0 * logistic(theta[0] + margin));
    Ok(Some(LengthControlled {
        win_rate: 100.0 * rate,
        standard_error: clustered.as_ref().map(|one| 100.0 * rate * (1.0 - rate) * one.errors()[0]),
        interval: clustered.as_ref().map(|one| ends(one.t * one.errors()[0])),
        length_coefficient: theta[1],
    }))
}

/// Whether some threshold of the length parts what gained from what lost, so that the likelihood has no maximum
/// (A. Albert, J. Anderson, Biometrika 71, 1984).
fn separable(verdicts: &[(usize, f64, f64)]) -> bool {
    let range = |counts: fn(f64) -> bool| {
        let lengths = verdicts.iter().filter(|(.., outcome)| counts(*outcome)).map(|(_, length, _)| *length);
        lengths.fold([f64::INFINITY, f64::NEG_INFINITY], |[low, high], length| [low.min(length), high.max(length)])
    };
    let (gains, losses) = (range(|outcome| outcome > 0.0), range(|outcome| outcome < 1.0));
    losses[1] <= gains[0] || gains[1] <= losses[0]
}
