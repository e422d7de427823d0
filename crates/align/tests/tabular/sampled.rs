//! How fast policies learned from samples approach the exact ones.

use align::objective::{Objective, Options, Pairwise};
use align::tabular::{Description, Pairs, Policy, Problem};

use crate::problems::rng;

/// Numbers of pairs, over more than two decades.
const COUNTS: [usize; 5] = [500, 2_000, 8_000, 32_000, 128_000];

/// Data sets per number of pairs.
const SEEDS: u64 = 40;

/// Two prompts with five and three answers; the values are so near to each other that every answer wins and loses, and
/// the minimum of the empirical loss exists.
fn small_problem() -> Problem {
    Problem::new(Description {
        reference: vec![vec![0.1, 0.2, 0.3, 0.25, 0.15], vec![0.5, 0.2, 0.3]],
        reward: vec![vec![0.6, -0.4, 0.3, 0.0, -0.7], vec![0.5, -0.3, 0.1]],
        safety: vec![vec![vec![-0.5, 0.6, -0.2, 0.2, 0.5], vec![-0.6, 0.4, 0.3]]],
        prompt_weights: None,
        beta: 0.5,
        thresholds: vec![0.15],
    })
    .unwrap()
}

fn dpo(beta: f64) -> Pairwise {
    match Options::default().build("dpo", beta).unwrap() {
        Objective::Pairwise(objective) => objective,
        Objective::Unpaired(_) => unreachable!(),
    }
}

/// The slope of log error against log N, by least squares, with the root mean square error over the seeds for each N.
fn slope(error: impl Fn(usize, u64) -> f64) -> (f64, Vec<f64>) {
    let mean_square = |n: usize| (0..SEEDS).map(|seed| error(n, seed).powi(2)).sum::<f64>() / SEEDS as f64;
    let errors: Vec<f64> = COUNTS.iter().map(|n| mean_square(*n).sqrt()).collect();
    let points: Vec<(f64, f64)> = COUNTS.iter().zip(&errors).map(|(n, e)| ((*n as f64).ln(), e.ln())).collect();
    let n = points.len() as f64;
    let (x, y) = points.iter().fold((0.0, 0.0), |(a, b), (x, y)| (a + x / n, b + y / n));
    let (covariance, variance) =
        points.iter().fold((0.0, 0.0), |(c, v), (px, py)| (c + (px - x) * (py - y), v + (px - x).powi(2)));
    (covariance / variance, errors)
}

/// The error is the largest difference of a probability from the exact policy's.
#[test]
fn sampled_dpo_approaches_the_gibbs_policy_as_one_over_root_n() {
    let problem = small_problem();
    let (reference, beta) = (problem.reference(), problem.beta());
    let population = Pairs::population(problem.weights(), reference, problem.reward());
    let gibbs = reference.tilted(problem.reward(), beta);
    let (slope, errors) = slope(|n, seed| {
        let sample = population.sample(n, &mut rng(1000 * n as u64 + seed));
        sample.minimiser(&dpo(beta), reference).unwrap().max_difference(&gibbs)
    });
    println!("slope {slope:.3}, errors {errors:.4?}");
    assert!((-0.6..=-0.4).contains(&slope), "{slope} {errors:?}");
}

/// Both steps from samples, N reward pairs and then N safety pairs, against the constrained optimum.
#[test]
fn two_sampled_steps_approach_the_constrained_optimum_as_one_over_root_n() {
    let problem = small_problem();
    let optimum = problem.solve().unwrap();
    assert!(optimum.lambda[0] > 0.1, "{optimum:?}");
    let (reference, beta) = (problem.reference(), problem.beta());
    let population = |values| Pairs::population(problem.weights(), reference, values);
    let (rewards, safety) = (population(problem.reward()), population(&problem.safety()[0]));
    let (slope, errors) = slope(|n, seed| {
        let mut rng = rng(1000 * n as u64 + seed);
        let first: Policy = rewards.sample(n, &mut rng).minimiser(&dpo(beta), reference).unwrap();
        let second = safety.sample(n, &mut rng).minimiser(&dpo(beta / optimum.lambda[0]), &first).unwrap();
        second.max_difference(&optimum.policy)
    });
    println!("λ* {:.3}, slope {slope:.3}, errors {errors:.4?}", optimum.lambda[0]);
    assert!((-0.6..=-0.4).contains(&slope), "{slope} {errors:?}");
}
