//! The solution of the constrained problem: duality, optimality conditions, derivatives, and hard cases.

use align::tabular::{Description, Policy, Problem, Solution, expectation, kl};
use rand::RngExt;

use crate::problems::{description, problem, rng, table, uniform};

/// E\[r\] − β KL.
fn objective(problem: &Problem, policy: &Policy) -> f64 {
    let divergence = kl(problem.weights(), policy, problem.reference());
    expectation(problem.weights(), policy, problem.reward()) - problem.beta() * divergence
}

fn safety(problem: &Problem, policy: &Policy, constraint: usize) -> f64 {
    expectation(problem.weights(), policy, &problem.safety()[constraint])
}

fn assert_optimal(solution: &Solution, tolerance: f64) {
    assert!(solution.duality_gap.abs() <= tolerance, "duality gap {:e}", solution.duality_gap);
    assert!(solution.kkt_residual <= tolerance, "KKT residual {:e}", solution.kkt_residual);
    assert!(solution.lambda.iter().all(|lambda| *lambda >= 0.0 && lambda.is_finite()), "{:?}", solution.lambda);
}

#[test]
fn no_duality_gap_and_no_kkt_residual_for_one_to_five_constraints() {
    let mut rng = rng(10);
    let (mut gap, mut residual) = (0.0f64, 0.0f64);
    for constraints in 1..=5 {
        for _ in 0..300 {
            let solution = problem(&mut rng, constraints).solve().unwrap();
            gap = gap.max(solution.duality_gap.abs());
            residual = residual.max(solution.kkt_residual);
        }
    }
    println!("largest duality gap {gap:e}, largest KKT residual {residual:e}");
    assert!(gap <= 1e-10 && residual <= 1e-10, "{gap:e} {residual:e}");
}

/// Not by the dual: random policies that meet the thresholds, many of them near the optimum, have no more reward.
#[test]
fn no_feasible_policy_is_better() {
    let mut rng = rng(11);
    let mut feasible = 0;
    for _ in 0..50 {
        let problem = problem(&mut rng, 2);
        let solution = problem.solve().unwrap();
        let best = objective(&problem, &solution.policy);
        let shape: Vec<usize> = problem.reward().iter().map(Vec::len).collect();
        for trial in 0..400 {
            let scale = [0.001, 0.01, 0.1, 1.0][trial % 4];
            let noise = table(&mut rng, &shape, -scale, scale);
            let other = solution.policy.tilted(&noise, 1.0);
            if (0..2).all(|i| safety(&problem, &other, i) >= problem.thresholds()[i]) {
                feasible += 1;
                assert!(objective(&problem, &other) <= best + 1e-12);
            }
        }
    }
    assert!(feasible > 3000, "only {feasible}");
}

/// Two answers to one prompt, by hand: E\[g\] = p must be 0.8, so logit p = 0 + (0 − 1 + λ)/β.
#[test]
fn a_problem_solved_by_hand() {
    let problem = Problem::new(Description {
        reference: vec![vec![0.5, 0.5]],
        reward: vec![vec![0.0, 1.0]],
        safety: vec![vec![vec![1.0, 0.0]]],
        prompt_weights: None,
        beta: 0.5,
        thresholds: vec![0.8],
    });
    let solution = problem.unwrap().solve().unwrap();
    assert_optimal(&solution, 1e-15);
    let lambda = 1.0 + 0.5 * 4f64.ln();
    assert!((solution.lambda[0] - lambda).abs() < 1e-14, "{:?}", solution.lambda);
    assert!((solution.reward - 0.2).abs() < 1e-15 && (solution.safety[0] - 0.8).abs() < 1e-15);
    let kl = 0.8 * 1.6f64.ln() + 0.2 * 0.4f64.ln();
    assert!((solution.kl - kl).abs() < 1e-15);
}

#[test]
fn a_constraint_that_is_met_already_has_no_multiplier() {
    let mut rng = rng(12);
    for constraints in 1..=3 {
        let mut description = description(&mut rng, constraints);
        let free = Problem::new(description.clone()).unwrap().policy_at(&vec![0.0; constraints]);
        let problem = Problem::new(description.clone()).unwrap();
        description.thresholds = (0..constraints).map(|i| safety(&problem, &free, i) - 1e-9).collect();
        let solution = Problem::new(description).unwrap().solve().unwrap();
        assert_eq!(solution.lambda, vec![0.0; constraints]);
        assert_eq!(solution.policy, free);
    }
}

/// A threshold equal to what some λ attains gives back that λ.
#[test]
fn thresholds_at_attained_values_give_back_their_multipliers() {
    let mut rng = rng(13);
    for constraints in 1..=4 {
        for _ in 0..50 {
            let mut description = description(&mut rng, constraints);
            // more answers than constraints and a policy that is not all but deterministic, or λ is not unique
            if description.reference.iter().map(|row| row.len() - 1).sum::<usize>() <= constraints {
                continue;
            }
            description.beta = 2.0;
            let lambda: Vec<f64> =
                (0..constraints).map(|i| if i == 1 { 0.0 } else { uniform(&mut rng, 0.1, 3.0) }).collect();
            let attained = Problem::new(description.clone()).unwrap().at(lambda.clone());
            description.thresholds = attained.safety.clone();
            let solution = Problem::new(description).unwrap().solve().unwrap();
            assert_optimal(&solution, 1e-11);
            assert!(solution.policy.max_difference(&attained.policy) < 1e-7);
            for (found, true_one) in solution.lambda.iter().zip(&lambda) {
                assert!((found - true_one).abs() < 1e-5 * (1.0 + true_one), "{:?} {lambda:?}", solution.lambda);
            }
        }
    }
}

/// The projected Newton method agrees with bisection: the same constraint twice, or beside one that is implied.
#[test]
fn redundant_constraints_change_nothing() {
    let mut rng = rng(14);
    for case in 0..200 {
        let mut description = description(&mut rng, 1);
        let one = Problem::new(description.clone()).unwrap().solve().unwrap();
        let (g, b) = (description.safety[0].clone(), description.thresholds[0]);
        let (factor, slack) = [(1.0, 0.0), (3.7, 0.0), (1.0, 0.3), (1e6, 0.0), (1e-6, 1e-7)][case % 5];
        description.safety.push(g.iter().map(|row| row.iter().map(|v| factor * v).collect()).collect());
        description.thresholds.push(factor * b - slack);
        let both = Problem::new(description).unwrap().solve().unwrap();
        // in units of the larger constraint
        assert_optimal(&both, 1e-12 * f64::max(1.0, factor));
        let difference = both.policy.max_difference(&one.policy);
        assert!(difference < 1e-9, "case {case}: {difference:e}");
        assert!((both.lambda[0] + factor * both.lambda[1] - one.lambda[0]).abs() < 1e-7 * (1.0 + one.lambda[0]));
    }
}

/// E\[g\] ≥ b and E\[−g\] ≥ −b leave no room to spare, and still have multipliers.
#[test]
fn two_constraints_can_ask_for_equality() {
    let mut rng = rng(15);
    for _ in 0..100 {
        let mut description = description(&mut rng, 1);
        let free = Problem::new(description.clone()).unwrap().at(vec![0.0]).safety[0];
        let asked = free + uniform(&mut rng, -0.2, 0.2);
        description.safety.push(description.safety[0].iter().map(|row| row.iter().map(|v| -v).collect()).collect());
        description.thresholds = vec![asked, -asked];
        let Ok(problem) = Problem::new(description).unwrap().solve() else { continue };
        assert_optimal(&problem, 1e-10);
        assert!((problem.safety[0] - asked).abs() < 1e-12);
    }
}

/// Thresholds ever nearer to the largest attainable value, values of very different sizes, β from tiny to huge.
#[test]
fn badly_scaled_problems_are_solved() {
    let mut rng = rng(16);
    for _ in 0..300 {
        let mut description = description(&mut rng, 3);
        // a policy that all but maximises the first constraint meets all of them by little
        let temperature = 10f64.powf(uniform(&mut rng, -2.0, 0.0));
        let safe = Policy::from_weights(&description.reference).tilted(&description.safety[0], temperature);
        let before = Problem::new(description.clone()).unwrap();
        let slack = 10f64.powf(uniform(&mut rng, -7.0, -2.0));
        description.thresholds = (0..3).map(|i| safety(&before, &safe, i) - slack).collect();
        description.beta = 10f64.powf(uniform(&mut rng, -1.0, 3.0));
        for (i, size) in [1e-5, 1e5].into_iter().enumerate() {
            description.safety[i].iter_mut().flatten().for_each(|v| *v *= size);
            description.thresholds[i] *= size;
        }
        let solution = Problem::new(description).unwrap().solve().unwrap();
        assert_optimal(&solution, 1e-6 * (1.0 + solution.lambda.iter().copied().fold(0.0, f64::max)));
        assert!(solution.duality_gap.abs() <= 1e-9 * (1.0 + solution.reward.abs() + solution.lambda[0]));
    }
}

/// G′(λ) = E_x Var(g)/β, and dR/dG = −λ along the frontier for R = E\[r\] − β KL.
///
/// E\[r\] alone has another slope, E_x Cov(r, g)/E_x Var(g).
#[test]
fn derivatives_along_the_frontier() {
    let mut rng = rng(17);
    for _ in 0..200 {
        let problem = problem(&mut rng, 1);
        let lambda = uniform(&mut rng, 0.05, 3.0);
        let step = 1e-4;
        let [before, after] = [lambda - step, lambda + step].map(|l| problem.at(vec![l]));
        let here = problem.at(vec![lambda]);
        let per_prompt = |f: &dyn Fn(usize, usize) -> f64| -> Vec<f64> {
            let rows = here.policy.probabilities();
            let mean = |(x, row): (usize, &Vec<f64>)| row.iter().enumerate().map(|(y, p)| p * f(x, y)).sum();
            rows.iter().enumerate().map(mean).collect()
        };
        let (r, g) = (problem.reward(), &problem.safety()[0]);
        let [mean_r, mean_g] = [r, g].map(|v| per_prompt(&|x, y| v[x][y]));
        let weighted = |rows: Vec<f64>| rows.iter().zip(problem.weights()).map(|(v, w)| v * w).sum::<f64>();
        let variance = weighted(per_prompt(&|x, y| (g[x][y] - mean_g[x]).powi(2)));
        let covariance = weighted(per_prompt(&|x, y| (r[x][y] - mean_r[x]) * (g[x][y] - mean_g[x])));

        let dg = (after.safety[0] - before.safety[0]) / (2.0 * step);
        let scale = (variance / problem.beta()).max(1e-3);
        assert!((dg - variance / problem.beta()).abs() < 1e-4 * scale, "{dg} {}", variance / problem.beta());
        let d_objective = (objective(&problem, &after.policy) - objective(&problem, &before.policy)) / (2.0 * step);
        assert!((d_objective + lambda * dg).abs() < 1e-4 * scale, "{d_objective} {}", -lambda * dg);
        let d_reward = (after.reward - before.reward) / (2.0 * step);
        assert!((d_reward - covariance / problem.beta()).abs() < 1e-4 * scale.max(covariance.abs() / problem.beta()));
    }
}

/// D is convex, bounds the objective of every feasible policy from above, and has E\[g\] − b as gradient.
#[test]
fn the_dual_function_bounds_the_problem_from_above() {
    let mut rng = rng(18);
    for _ in 0..100 {
        let problem = problem(&mut rng, 2);
        let best = objective(&problem, &problem.solve().unwrap().policy);
        let mut draw = || vec![uniform(&mut rng, 0.0, 4.0), uniform(&mut rng, 0.0, 4.0)];
        let (a, b) = (draw(), draw());
        let middle: Vec<f64> = a.iter().zip(&b).map(|(a, b)| 0.5 * (a + b)).collect();
        assert!(problem.dual(&a) >= best - 1e-12);
        assert!(problem.dual(&middle) <= 0.5 * (problem.dual(&a) + problem.dual(&b)) + 1e-12);
        let solution = problem.at(a.clone());
        for i in 0..2 {
            let moved = |by: f64| {
                let mut lambda = a.clone();
                lambda[i] += by;
                problem.dual(&lambda)
            };
            let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            assert!((slope - (solution.safety[i] - problem.thresholds()[i])).abs() < 1e-8);
        }
    }
}

fn two_answers(safety: &[[f64; 2]], thresholds: &[f64]) -> Problem {
    Problem::new(Description {
        reference: vec![vec![0.5, 0.5, 0.0]],
        reward: vec![vec![0.0, 1.0, 9.0]],
        // the third answer would be the safest, but it is impossible
        safety: safety.iter().map(|g| vec![vec![g[0], g[1], 100.0]]).collect(),
        prompt_weights: None,
        beta: 0.5,
        thresholds: thresholds.to_vec(),
    })
    .unwrap()
}

#[test]
fn thresholds_that_cannot_be_met_are_named_with_what_can() {
    let message = |problem: Problem| {
        let error = problem.solve().unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    };
    let first = message(two_answers(&[[1.0, 0.0], [0.0, 1.5]], &[0.5, 2.5]));
    assert!(first.contains("constraint 2") && first.contains("2.5") && first.contains("1.5"), "{first}");
    let limit = message(two_answers(&[[1.0, 0.0]], &[1.0]));
    assert!(limit.contains("λ → ∞") && limit.contains("constraint 1"), "{limit}");
    // p ≥ 0.7 and 1 − p ≥ 0.7
    let joint = message(two_answers(&[[1.0, 0.0], [0.0, 2.0]], &[0.7, 1.4]));
    for part in ["No policy", "1.0000·E[safety 1]", "E[safety 2]", "is at most 1.0 for any", "ask for 1."] {
        assert!(joint.contains(part), "`{part}` is missing: {joint}");
    }
    // p ≥ 0.5 and 1 − p ≥ 0.5 can be met, and p ≥ 0.6 and 1 − p ≥ 0.4 too
    for asked in [[0.5, 0.5], [0.6, 0.4]] {
        let solution = two_answers(&[[1.0, 0.0], [0.0, 1.0]], &asked).solve().unwrap();
        assert!((solution.safety[0] - asked[0]).abs() < 1e-12, "{solution:?}");
    }
    // a constraint that every policy meets with equality
    let solution = two_answers(&[[2.0, 2.0]], &[2.0]).solve().unwrap();
    assert_eq!(solution.lambda, [0.0]);
    // nearly impossible together
    let close = two_answers(&[[1.0, 0.0], [0.0, 1.0]], &[0.5, 0.5 + 1e-6]);
    assert!(message(close).contains("No policy"));
    // only the corner is left: three constraints on three possible answers that pin one of them
    let corner = Problem::new(Description {
        reference: vec![vec![0.2, 0.3, 0.5]],
        reward: vec![vec![0.0, 1.0, 2.0]],
        safety: vec![vec![vec![1.0, -1.0, 2.0]], vec![vec![1.0, 2.0, -1.0]]],
        prompt_weights: None,
        beta: 1.0,
        thresholds: vec![1.0, 1.0],
    });
    let corner = corner.unwrap().solve();
    assert!(corner.is_err() || corner.as_ref().is_ok_and(|s| s.kkt_residual < 1e-9), "{corner:?}");
}

#[test]
fn impossible_answers_stay_impossible() {
    let solution = two_answers(&[[1.0, 0.0]], &[0.9]).solve().unwrap();
    assert_eq!(solution.policy.probabilities()[0][2], 0.0);
    assert_optimal(&solution, 1e-14);
}

#[test]
fn a_beta_beyond_double_precision_is_refused_with_a_reason() {
    let mut description = description(&mut rng(19), 1);
    description.thresholds[0] = -0.1;
    description.beta = 1e-40;
    match Problem::new(description).unwrap().solve() {
        Ok(solution) => assert_optimal(&solution, 1e-9),
        Err(error) => assert!(error.to_string().contains("`beta`"), "{error}"),
    }
}

/// Whatever the numbers, the solver ends, and its answer is optimal or says why not.
#[test]
fn hostile_numbers_end_in_a_solution_or_a_message() {
    let mut rng = rng(20);
    let hostile = [0.0, 1.0, -1.0, 1e-300, -1e-17, 1e100, -1e100, 3e50, 0.1, 0.1 + 1e-17, 1e16];
    let (mut solved, mut refused) = (0, 0);
    for _ in 0..3000 {
        let constraints = rng.random_range(0..4);
        let mut draw = |_| hostile[rng.random_range(0..hostile.len())];
        let mut row = |n: usize| (0..n).map(&mut draw).collect::<Vec<f64>>();
        let problem = Problem::new(Description {
            reference: vec![vec![0.5, 0.25, 0.25], vec![1.0, 0.0, 0.0]],
            reward: vec![row(3), row(3)],
            safety: (0..constraints).map(|_| vec![row(3), row(3)]).collect(),
            prompt_weights: None,
            beta: 10f64.powf(row(1)[0].clamp(-50.0, 50.0)),
            thresholds: row(constraints),
        });
        match problem.unwrap().solve() {
            Ok(solution) => {
                solved += 1;
                assert!(solution.policy.probabilities().iter().flatten().all(|p| (0.0..=1.0 + 1e-12).contains(p)));
                assert!(solution.lambda.iter().all(|lambda| *lambda >= 0.0 && lambda.is_finite()), "{solution:?}");
                assert!(solution.kkt_residual.is_finite() && solution.duality_gap.is_finite(), "{solution:?}");
            }
            Err(error) => {
                refused += 1;
                assert_eq!(error.exit_code(), 2, "{error}");
            }
        }
    }
    assert!(solved > 300 && refused > 300, "{solved} solved, {refused} refused");
}

#[test]
fn descriptions_that_are_none_are_refused_by_field() {
    let good = description(&mut rng(21), 2);
    assert!(Problem::new(good.clone()).is_ok());
    type Change = fn(&mut Description);
    let cases: [(Change, &[&str]); 20] = [
        (|d| d.beta = 0.0, &["`beta` is 0", "above 0"]),
        (|d| d.beta = -1.0, &["`beta` is -1"]),
        (|d| d.beta = f64::NAN, &["`beta` is NaN"]),
        (|d| d.beta = f64::INFINITY, &["`beta` is inf"]),
        (|d| d.reference.clear(), &["`ref`", "no prompts"]),
        (|d| d.reference[0].clear(), &["`ref` of prompt 1 is empty"]),
        (|d| d.reference[0][1] = -0.1, &["`ref` of prompt 1, answer 2 is -0.1"]),
        (|d| d.reference[0][0] = f64::NAN, &["`ref` of prompt 1, answer 1 is NaN"]),
        (|d| d.reference[0][0] += 1e-4, &["`ref` of prompt 1", "must sum to 1"]),
        (|d| d.reward.push(vec![1.0]), &["`reward` has", "prompts, but `ref` has"]),
        (|d| d.reward[0].push(1.0), &["`reward` has", "answers to prompt 1"]),
        (|d| d.reward[0][1] = f64::NAN, &["`reward` of prompt 1, answer 2 is NaN", "finite"]),
        (|d| d.safety[1][0].push(1.0), &["Constraint 2 of `safety` has", "answers to prompt 1"]),
        (|d| d.safety[1][0][0] = f64::INFINITY, &["Constraint 2 of `safety` of prompt 1, answer 1 is inf"]),
        (|d| d.thresholds.push(0.0), &["`thresholds` has 3 numbers, but `safety` has 2"]),
        (|d| d.thresholds[1] = f64::NAN, &["Number 2 of `thresholds` is NaN"]),
        (|d| d.prompt_weights = Some(vec![]), &["`prompt_weights` has 0 numbers"]),
        (|d| d.prompt_weights.as_mut().unwrap()[0] = -1.0, &["Number 1 of `prompt_weights` is -1"]),
        (|d| d.prompt_weights.as_mut().unwrap()[0] = f64::NAN, &["Number 1 of `prompt_weights` is NaN"]),
        (|d| d.prompt_weights.as_mut().unwrap().fill(0.0), &["All `prompt_weights` are 0"]),
    ];
    for (change, parts) in cases {
        let mut description = good.clone();
        change(&mut description);
        let error = Problem::new(description).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        for part in parts {
            assert!(error.to_string().contains(part), "`{part}` is missing: {error}");
        }
    }
    // rounding in the last digits is none of these; weights are relative
    let mut rounded = good.clone();
    rounded.reference[0][0] += 5e-7;
    rounded.prompt_weights.as_mut().unwrap().iter_mut().for_each(|w| *w *= 7.0);
    let problem = Problem::new(rounded).unwrap();
    assert!((problem.weights().iter().sum::<f64>() - 1.0).abs() < 1e-15);
    assert!((problem.reference().probabilities()[0].iter().sum::<f64>() - 1.0).abs() < 1e-15);
}

/// Policies from all but deterministic to all but the reference.
#[test]
fn temperatures_over_six_decades_are_solved() {
    let mut rng = rng(22);
    for exponent in -3..=3 {
        let mut largest = 0.0f64;
        for case in 0..200 {
            let mut description = description(&mut rng, 1 + case % 5);
            description.beta = 10f64.powi(exponent);
            let solution = Problem::new(description).unwrap().solve().unwrap();
            largest = largest.max(solution.kkt_residual).max(solution.duality_gap.abs());
        }
        println!("β = 1e{exponent}: {largest:.1e}");
        assert!(largest < 1e-10, "β = 1e{exponent}: {largest:e}");
    }
}
