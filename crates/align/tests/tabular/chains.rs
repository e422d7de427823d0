//! Theorem 1 of arXiv 2404.11049 and what follows from it.

use align::tabular::{Policy, Step, expectation, largest_difference_over_orders};

use crate::problems::{problem, rng, uniform};

/// Theorem 1 (and Theorem 4 for several constraints): the optimum of the constrained problem is reached step by step,
/// in all 24 orders of the reward and three constraints.
#[test]
fn every_order_of_steps_ends_at_the_constrained_optimum() {
    let mut rng = rng(1);
    let (mut largest, mut binding) = (0.0f64, 0);
    for _ in 0..1000 {
        let problem = problem(&mut rng, 3);
        let solution = problem.solve().unwrap();
        binding += solution.lambda.iter().filter(|l| **l > 0.0).count();
        let steps = problem.steps(&solution.lambda);
        let difference = largest_difference_over_orders(problem.reference(), &steps, &solution.policy);
        largest = largest.max(difference);
        let last = problem.stepwise(&steps).pop().unwrap();
        assert!(last.max_difference(&solution.policy) <= difference);
    }
    println!("largest difference {largest:e}, {binding} of 3,000 constraints binding");
    assert!(largest <= 1e-12, "{largest:e}");
    assert!(binding > 500, "the test would not test much: {binding}");
}

/// The temperature belongs to the metric, not to the place in the chain: where only the places change, the end differs.
#[test]
fn swapping_two_steps_swaps_their_temperatures() {
    let mut rng = rng(2);
    let problem = problem(&mut rng, 1);
    let lambda = [3.0];
    let [reward, safety] = problem.steps(&lambda)[..] else { unreachable!() };
    assert_eq!(reward.temperature, problem.beta());
    assert_eq!(safety.temperature, problem.beta() / 3.0);
    let end = |steps: [Step<'_>; 2]| problem.stepwise(&steps).pop().unwrap();
    let optimum = problem.policy_at(&lambda);
    assert!(end([safety, reward]).max_difference(&optimum) < 1e-14);
    let misplaced =
        [Step { temperature: reward.temperature, ..safety }, Step { temperature: safety.temperature, ..reward }];
    assert!(end(misplaced).max_difference(&optimum) > 0.01);
}

/// λ = 0 is a step at an infinite temperature, which changes nothing.
#[test]
fn a_constraint_that_does_not_bind_is_a_step_that_changes_nothing() {
    let problem = problem(&mut rng(3), 2);
    let steps = problem.steps(&[0.0, 2.0]);
    let [reward, first, second] = &problem.stepwise(&steps)[..] else { unreachable!() };
    assert!(reward.max_difference(first) < 1e-15);
    assert!(first.max_difference(second) > 1e-3);
}

/// Mixing log-probabilities of π_r and π_{r+λ̄g} by q is λ = qλ̄ (what P-SACPO's merging of weights approximates).
#[test]
fn mixing_log_probabilities_by_q_is_lambda_times_q() {
    let mut rng = rng(4);
    for _ in 0..100 {
        let problem = problem(&mut rng, 1);
        let conservative = uniform(&mut rng, 0.1, 5.0);
        let ends = [problem.policy_at(&[0.0]), problem.policy_at(&[conservative])];
        for q in [0.0, 0.25, 0.5, 0.75, 1.0] {
            let mixed = ends[0].mixed(&ends[1], q);
            let direct = problem.policy_at(&[q * conservative]);
            assert!(mixed.max_difference(&direct) < 1e-13);
        }
        // mixing probabilities instead leaves the family
        let straight = |q: f64| {
            let [a, b] = [&ends[0], &ends[1]].map(Policy::probabilities);
            let rows = a.iter().zip(&b).map(|(a, b)| a.iter().zip(b).map(|(a, b)| (1.0 - q) * a + q * b).collect());
            Policy::from_weights(&rows.collect::<Vec<Vec<f64>>>())
        };
        let worth = |policy: &Policy| {
            let kl = align::tabular::kl(problem.weights(), policy, problem.reference());
            let value = |values| expectation(problem.weights(), policy, values);
            (value(problem.reward()) - problem.beta() * kl, value(&problem.safety()[0]))
        };
        // … and is no better than the Gibbs policy of the same safety
        let (objective, safety) = worth(&straight(0.5));
        let (mut low, mut high) = (0.0, conservative);
        for _ in 0..100 {
            let middle = 0.5 * (low + high);
            if worth(&problem.policy_at(&[middle])).1 < safety { low = middle } else { high = middle }
        }
        assert!(worth(&problem.policy_at(&[high])).0 >= objective - 1e-12);
    }
}
