//! Labels that are drawn again: how often, what they depend on, and what `dpo` learns from them.

use align::data::{TokenizedPair, margins, relabel};
use align::objective::{Pair, Pairwise, Response};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const PAIRS: usize = 20_000;

fn pair(chosen: u32, rejected: u32, row: usize) -> TokenizedPair {
    TokenizedPair {
        prompt: [1, 7].into(),
        chosen: [chosen, 2].into(),
        rejected: [rejected, 2].into(),
        is_unsafe: Some([true, false]),
        margin: Some(chosen as f64),
        row,
    }
}

/// Pairs of which every other has the same two texts.
fn pairs() -> Vec<TokenizedPair> {
    (0..PAIRS)
        .map(|i| if i % 2 == 0 { pair(9, 8, i) } else { pair(3 + i as u32, 3 + 31 * i as u32 % 997, i) })
        .collect()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

#[test]
fn labels_follow_bradley_terry() {
    for (seed, margin) in [-4.0, -1.0, -0.1, 0.0, 0.3, 2.0].into_iter().enumerate() {
        let (before, mut after) = (pairs(), pairs());
        let swapped = relabel(&mut after, &[margin; PAIRS], seed as u64);
        let p = sigmoid(-margin);
        for remainder in 0..2 {
            let rows = before.iter().zip(&after).skip(remainder).step_by(2);
            let n = rows.len() as f64;
            let share = rows.filter(|(before, after)| before.chosen != after.chosen).count() as f64 / n;
            assert!((share - p).abs() < 4.0 * (p * (1.0 - p) / n).sqrt(), "margin {margin}: {share} swapped for {p}");
        }
        assert_eq!(swapped, before.iter().zip(&after).filter(|(before, after)| before != after).count());
    }
}

#[test]
fn a_swapped_pair_takes_its_flags_and_its_margin_along() {
    let mut one = [pair(5, 6, 1)];
    assert_eq!(relabel(&mut one, &[f64::INFINITY], 0), 0);
    assert_eq!(one[0], pair(5, 6, 1));
    assert_eq!(relabel(&mut one, &[f64::NEG_INFINITY], 0), 1);
    assert_eq!(one[0], TokenizedPair { is_unsafe: Some([false, true]), margin: Some(-5.0), ..pair(6, 5, 1) });
}

#[test]
fn the_outcome_depends_neither_on_labels_nor_on_other_rows() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let given: Vec<f64> = (0..PAIRS).map(|_| 4.0 * rng.random::<f64>() - 2.0).collect();
    let mut once = pairs();
    relabel(&mut once, &given, 3);

    let turned = |pair: &TokenizedPair| TokenizedPair {
        chosen: pair.rejected.clone(),
        rejected: pair.chosen.clone(),
        is_unsafe: Some([false, true]),
        margin: pair.margin.map(|margin| -margin),
        ..pair.clone()
    };
    let mut other: Vec<TokenizedPair> = pairs().iter().map(turned).collect();
    relabel(&mut other, &given.iter().map(|margin| -margin).collect::<Vec<_>>(), 3);
    assert!(once == other, "labels given the other way round change the outcome");

    // rows of other texts, and the numbers of rows, change nothing
    let different = |shift: usize| -> Vec<TokenizedPair> {
        (0..PAIRS).map(|row| pair(2 * row as u32, 2 * row as u32 + 1, row + shift)).collect()
    };
    let mut all = different(1);
    relabel(&mut all, &given, 3);
    let mut last = different(7).split_off(PAIRS - 100);
    relabel(&mut last, &given[PAIRS - 100..], 3);
    let labels = |pairs: &[TokenizedPair]| pairs.iter().map(|pair| pair.chosen.clone()).collect::<Vec<_>>();
    assert!(labels(&all).ends_with(&labels(&last)), "rows before change the outcome");

    let mut seeded = pairs();
    relabel(&mut seeded, &given, 4);
    assert!(once != seeded, "the seed changes nothing");
}

#[test]
fn margins_are_weighted_differences_of_the_first_and_the_second_response() {
    let reward = vec![vec![2.0, 0.5], vec![0.0, 1.0]];
    let cost = vec![vec![-1.0, 3.0], vec![4.0, 4.0]];
    assert_eq!(margins(&[reward.clone(), cost], &[1.0, -0.5]), [1.5 + 2.0, -1.0]);
    assert_eq!(margins(&[reward], &[2.0]), [3.0, -2.0]);
}

/// At the reference tilted by (r + λg)/β the gradient of `dpo` on pairs relabelled by r + λg is that of noise, though all
/// labels were wrong before; at the tilt by r alone it is not.
#[test]
fn dpo_on_relabelled_pairs_is_stationary_at_the_tilt_by_the_weighted_sum() {
    let (beta, lambda) = (0.5, 0.8);
    let (r, g) = ([0.9, -0.4, 0.3, -1.2], [-1.0, 0.7, 0.2, 0.5]);
    let sum: [f64; 4] = std::array::from_fn(|y| r[y] + lambda * g[y]);
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let mut pairs: Vec<TokenizedPair> = (0..PAIRS)
        .map(|row| {
            let first = rng.random_range(0..4);
            let second = (first + rng.random_range(1..4)) % 4;
            let better = if sum[first] > sum[second] { first } else { second };
            pair((first + second - better) as u32, better as u32, row)
        })
        .collect();
    let answer = |tokens: &[u32]| tokens[0] as usize;
    let scores = |metric: [f64; 4]| {
        pairs.iter().map(|pair| vec![metric[answer(&pair.chosen)], metric[answer(&pair.rejected)]]).collect()
    };
    let margins = margins(&[scores(r), scores(g)], &[1.0, lambda]);
    relabel(&mut pairs, &margins, 0);

    let dpo = Pairwise::Dpo { beta, label_smoothing: 0.0 };
    // the largest derivative by an answer's log-ratio, in standard errors
    let largest = |tilt: [f64; 4]| {
        let (mut sums, mut squares) = ([0.0; 4], [0.0; 4]);
        for pair in &pairs {
            let response =
                |tokens: &[u32]| Response { policy: tilt[answer(tokens)] / beta, reference: 0.0, len: 2, kl: 0.0 };
            let (chosen, rejected) = (response(&pair.chosen), response(&pair.rejected));
            let got = dpo.evaluate(&Pair { chosen, rejected, is_unsafe: [false; 2], margin: 0.0 });
            for (tokens, derivative) in [(&pair.chosen, got.chosen), (&pair.rejected, got.rejected)] {
                sums[answer(tokens)] += derivative.logp;
                squares[answer(tokens)] += derivative.logp.powi(2);
            }
        }
        (0..4).map(|y| (sums[y] / f64::sqrt(squares[y])).abs()).fold(0.0, f64::max)
    };
    let (at_sum, at_reward) = (largest(sum), largest(r));
    assert!(at_sum < 4.0 && at_reward > 20.0, "{at_sum} {at_reward}");
}
