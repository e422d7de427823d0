//! Choosing λ from samples, against the exact G(λ).

mod several;

use align::choose::{Bootstrap, Certificate, Choice, Estimate, Samples, Verdict};
use align::tabular::{Description, Policy, Problem, Table};
use rand::Rng;

use crate::problems::{probabilities, problem, rng, table, uniform};

/// `answers` answers of π_λ to each of `prompts` prompts that are drawn by their weights, scored by these values; the
/// result is `[value][prompt][answer]`.
fn scored(
    problem: &Problem,
    policy: &Policy,
    values: &[&Table],
    [prompts, answers]: [usize; 2],
    rng: &mut impl Rng,
) -> Vec<Table> {
    let policy = policy.probabilities();
    let mut scored = vec![vec![Vec::new(); prompts]; values.len()];
    for prompt in 0..prompts {
        let x = draw(problem.weights(), rng);
        for _ in 0..answers {
            let y = draw(&policy[x], rng);
            scored.iter_mut().zip(values).for_each(|(scored, values)| scored[prompt].push(values[x][y]));
        }
    }
    scored
}

/// Answers of π_λ to a problem, scored by all its constraints.
fn samples(problem: &Problem, lambda: &[f64], size: [usize; 2], rng: &mut impl Rng) -> Samples {
    let constraints: Vec<&Table> = problem.safety().iter().collect();
    let scores = scored(problem, &problem.policy_at(lambda), &constraints, size, rng);
    Samples::new(scores, problem.beta()).unwrap().drawn_at(lambda.to_vec()).unwrap()
}

fn draw(probabilities: &[f64], rng: &mut impl Rng) -> usize {
    let mut left = uniform(rng, 0.0, 1.0);
    let hit = probabilities.iter().position(|p| {
        left -= p;
        left < 0.0
    });
    hit.unwrap_or(probabilities.len() - 1)
}

fn safety(problem: &Problem, lambda: f64) -> f64 {
    problem.at(vec![lambda]).safety[0]
}

/// A problem whose prompts all have answers of very different safety, so that thresholds are not near the best there is.
fn wide_problem(rng: &mut impl Rng, answers: &[usize], constraints: usize) -> Problem {
    Problem::new(Description {
        reference: probabilities(rng, answers),
        reward: table(rng, answers, -1.0, 1.0),
        safety: (0..constraints).map(|_| table(rng, answers, -2.0, 2.0)).collect(),
        prompt_weights: None,
        beta: 0.5,
        thresholds: vec![1.2; constraints],
    })
    .unwrap()
}

fn bootstrap(seed: u64) -> Bootstrap {
    Bootstrap::new(0.95, seed).unwrap()
}

/// A problem, λ, and the estimate at λ from answers drawn at λ₀; λ and λ₀ in units of β.
fn estimated(seed: u64, lambda: f64, drawn_at: f64, prompts: usize, answers: usize) -> (f64, Estimate) {
    let mut rng = rng(seed);
    let problem = problem(&mut rng, 1);
    let (lambda, drawn_at) = (lambda * problem.beta(), drawn_at * problem.beta());
    let samples = samples(&problem, &[drawn_at], [prompts, answers], &mut rng);
    (safety(&problem, lambda), samples.estimate(&[lambda], &bootstrap(seed)).unwrap())
}

#[test]
fn the_interval_covers_the_exact_safety() {
    for (lambda, drawn_at) in [(0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (1.5, 1.0), (0.5, 1.0)] {
        let (mut covered, mut above) = (0, 0);
        for seed in 0..100 {
            let (exact, estimate) = estimated(seed, lambda, drawn_at, 100, 400);
            covered += usize::from((estimate.safety[0].interval[0]..=estimate.safety[0].interval[1]).contains(&exact));
            above += usize::from(estimate.safety[0].lower_bound <= exact);
            assert!(
                (estimate.safety[0].interval[0]..=estimate.safety[0].interval[1]).contains(&estimate.safety[0].value)
            );
        }
        println!("λ/β {lambda} from {drawn_at}: the interval covers {covered} of 100, the lower bound holds {above}");
        // 95 expected; fewer than 90 has a probability of 0.012
        assert!(covered >= 90 && above >= 90);
    }
}

#[test]
fn with_few_answers_the_estimate_errs_on_the_safe_side() {
    let (mut held, mut errors) = (0, 0.0);
    for seed in 0..100 {
        let (exact, estimate) = estimated(seed, 1.0, 0.0, 100, 8);
        held += usize::from(estimate.safety[0].lower_bound <= exact);
        errors += (estimate.safety[0].value - exact) / 100.0;
        assert!(estimate.bias[0] <= 0.0);
    }
    println!("8 answers per prompt: mean error {errors:.3}, the lower bound holds {held} of 100");
    assert!(held >= 95 && errors < 0.0);
}

/// The bias of 40,000 estimates of one prompt, which the formula says from the exact policies and each estimate from its own
/// answers.
#[test]
fn the_bias_is_what_first_order_says() {
    let reference = vec![vec![0.4, 0.3, 0.2, 0.1]; 2];
    let g = vec![vec![-1.0, 0.2, 0.5, 1.5]; 2];
    let (beta, lambda, answers) = (1.0, 0.8, 60);
    let zero: Table = vec![vec![0.0; 4]; 2];
    let problem = Problem::new(Description {
        reference,
        reward: zero,
        safety: vec![g],
        prompt_weights: None,
        beta,
        thresholds: vec![0.0],
    })
    .unwrap();
    let reference = &problem.reference().probabilities()[0];
    let tilted = &problem.policy_at(&[lambda]).probabilities()[0];
    // 1 + χ² = E_λ[π_λ/π_r]
    let variance_ratio: f64 = tilted.iter().zip(reference).map(|(p, q)| p * p / q).sum();
    let predicted = -variance_ratio * (safety(&problem, 2.0 * lambda) - safety(&problem, lambda)) / answers as f64;

    let mut rng = rng(0);
    let samples = samples(&problem, &[0.0], [40_000, answers], &mut rng);
    let estimates = samples.by_prompt(&[lambda]).unwrap().remove(0);
    let mean = estimates.iter().sum::<f64>() / estimates.len() as f64;
    let deviation = (estimates.iter().map(|e| (e - mean).powi(2)).sum::<f64>() / estimates.len() as f64).sqrt();
    let (measured, error) = (mean - safety(&problem, lambda), deviation / (estimates.len() as f64).sqrt());
    let own = samples.bias(&[lambda]).unwrap()[0];
    println!("bias {measured:.5} ± {error:.5}, predicted {predicted:.5}, from the samples {own:.5}");
    assert!(predicted < -10.0 * error, "the test cannot tell it from none");
    // second order is smaller by a factor of the number of answers
    let second = 3.0 * predicted.abs() / (answers as f64 / variance_ratio);
    assert!((measured - predicted).abs() < 3.0 * error + second);
    assert!((own - predicted).abs() < 0.1 * predicted.abs());
}

#[test]
fn estimates_rise_and_effective_sizes_fall_with_the_tilt() {
    for seed in 0..20 {
        let mut rng = rng(seed);
        let g = table(&mut rng, &[12; 30], -2.0, 2.0);
        let samples = Samples::new(vec![g], 0.7).unwrap().drawn_at(vec![0.5]).unwrap();
        let bootstrap = bootstrap(seed);
        let grid: Vec<Estimate> =
            (0..20).map(|i| samples.estimate(&[0.25 * f64::from(i)], &bootstrap).unwrap()).collect();
        for pair in grid.windows(2) {
            let [low, high] = [&pair[0], &pair[1]];
            let [g, higher] = [low.safety[0], high.safety[0]];
            assert!(g.value < higher.value && g.lower_bound < higher.lower_bound);
            assert!(g.interval[0] < higher.interval[0] && g.interval[1] < higher.interval[1]);
            let [before, after] = [low.effective_sample_size, high.effective_sample_size];
            assert_eq!(before.average < after.average, high.lambda[0] <= 0.5);
            assert!(after.smallest <= after.average && after.smallest >= 1.0);
        }
        assert!((grid[2].effective_sample_size.average - 12.0).abs() < 1e-12 && grid[2].bias == [0.0]);
    }
}

#[test]
fn the_chosen_multiplier_meets_the_threshold_without_much_more() {
    let (mut met, mut seeds) = (0, 0);
    for seed in 0..20 {
        let mut rng = rng(1000 + seed);
        let problem = wide_problem(&mut rng, &[8; 5], 1);
        let threshold = safety(&problem, 0.5 * problem.beta());
        let samples = samples(&problem, &[0.0], [300, 200], &mut rng);
        let choice = samples.choose(&[threshold], &bootstrap(seed)).unwrap();
        let Choice::Chosen(estimate) = choice else { panic!("seed {seed}: {choice:?}") };
        let exact = safety(&problem, estimate.lambda[0]);
        let [low, high] = estimate.safety[0].interval;
        seeds += 1;
        met += usize::from(exact >= threshold);
        assert!(exact - threshold <= 2.0 * (high - low), "seed {seed}: {exact} for {threshold}");
        assert!(estimate.safety[0].lower_bound >= threshold);
        let less = samples.estimate(&[estimate.lambda[0] * (1.0 - 1e-5)], &bootstrap(seed)).unwrap();
        assert!(less.safety[0].lower_bound < threshold, "a smaller λ would do");
    }
    println!("the chosen λ meets the threshold with {met} of {seeds} seeds");
    assert!(met * 20 >= seeds * 19);
}

#[test]
fn samples_that_do_not_reach_say_how_far_they_do_and_a_second_draw_goes_on_from_there() {
    let mut rng = rng(5);
    let problem = wide_problem(&mut rng, &[20; 4], 1);
    let (mut drawn_at, mut draws) = (vec![0.0], 0);
    let chosen = loop {
        draws += 1;
        let samples = samples(&problem, &drawn_at, [100, 40], &mut rng);
        match samples.choose(&[1.2], &bootstrap(0)).unwrap() {
            Choice::Chosen(estimate) => break estimate.lambda[0],
            Choice::OutOfSupport { needed, reachable } => {
                assert!(needed.effective_sample_size.average < 10.0 && needed.safety[0].lower_bound >= 1.2);
                assert!(drawn_at[0] < reachable[0] && reachable[0] < needed.lambda[0]);
                let sizes = samples.effective_sample_size(&reachable).unwrap();
                assert!((sizes.average - 10.0).abs() < 1e-3, "{sizes:?}");
                drawn_at = reachable;
            }
            unreachable => panic!("{unreachable:?}"),
        }
    };
    let exact = problem.solve().unwrap().lambda[0];
    println!("{draws} draws: λ = {chosen:.3}, exactly {exact:.3}, E[g] = {:.3}", safety(&problem, chosen));
    assert!(draws > 1 && safety(&problem, chosen) >= 1.2 && chosen < 1.5 * exact);
}

#[test]
fn samples_with_little_to_choose_from_have_clear_results() {
    let bootstrap = bootstrap(0);
    let samples = |scores: Table| Samples::new(vec![scores], 0.5).unwrap();
    // one answer per prompt, or equal ones: λ changes nothing
    for scores in [vec![vec![0.3]; 5], vec![vec![0.3; 4]; 5]] {
        let samples = samples(scores);
        let Choice::Chosen(estimate) = samples.choose(&[0.3], &bootstrap).unwrap() else { panic!() };
        assert_eq!((estimate.lambda[0], estimate.safety[0].interval), (0.0, [0.3; 2]));
        let Choice::Unreachable { weights, lower_bounds } = samples.choose(&[0.4], &bootstrap).unwrap() else {
            panic!()
        };
        assert!(weights == [1.0] && (lower_bounds[0] - 0.3).abs() < 1e-12);
    }
    // the threshold of the safest answers is met by no finite λ, one just below it by a large one
    let two = samples(vec![vec![0.0, 1.0]; 5]);
    for threshold in [1.0, 1.5] {
        let choice = two.choose(&[threshold], &bootstrap).unwrap();
        assert!(matches!(choice, Choice::Unreachable { lower_bounds, .. } if lower_bounds == [1.0]));
    }
    let Choice::OutOfSupport { needed, reachable } = two.choose(&[0.999], &bootstrap).unwrap() else { panic!() };
    assert!((needed.lambda[0] - 0.5 * 999f64.ln()).abs() < 1e-4 && reachable == [0.0]);
    // values of any size
    let large = Samples::new(vec![vec![vec![-1e100, 1e100]; 3]], 1e-3).unwrap().estimate(&[1e100], &bootstrap).unwrap();
    assert_eq!((large.safety[0].value, large.bias[0]), (1e100, 0.0));
}

#[test]
fn bad_samples_are_named() {
    let fails = |scores: Vec<Table>, beta: f64, part: &str| {
        let error = Samples::new(scores, beta).unwrap_err();
        assert!(matches!(error, engine::Error::Input(_)) && error.to_string().contains(part), "{error}");
    };
    let good = || vec![vec![0.0, 1.0]; 3];
    fails(vec![], 0.5, "no scores");
    fails(vec![vec![]], 0.5, "0 prompts");
    fails(vec![vec![vec![0.0, 1.0]]], 0.5, "1 prompts");
    fails(vec![vec![vec![0.0], vec![]]], 0.5, "Prompt 2");
    fails(vec![vec![vec![0.0], vec![0.0, f64::NAN]]], 0.5, "constraint 1 of prompt 2, answer 2 is NaN");
    fails(vec![vec![vec![f64::INFINITY], vec![0.0]]], 0.5, "prompt 1, answer 1 is inf");
    fails(vec![good(), vec![vec![0.0, 1.0]; 2]], 0.5, "constraint 2 is there for 2 prompts, but there are 3");
    fails(vec![good(), vec![vec![0.0]; 3]], 0.5, "constraint 2 is there for 1 answers to prompt 1, but there are 2");
    fails(vec![good()], 0.0, "β is 0.0");
    fails(vec![good()], f64::NAN, "β is NaN");
    let samples = Samples::new(vec![good()], 0.5).unwrap();
    let says = |error: engine::Error, part: &str| assert!(error.to_string().contains(part), "{error}");
    says(samples.clone().drawn_at(vec![-1.0]).unwrap_err(), "λ is -1.0");
    says(
        samples.clone().with_offsets(vec![vec![0.0, f64::NAN]; 3]).unwrap_err(),
        "offset of prompt 1, answer 2 is NaN",
    );
    says(samples.clone().with_offsets(vec![vec![0.0, 0.0]; 2]).unwrap_err(), "offset is there for 2 prompts");
    says(samples.estimate(&[f64::INFINITY], &bootstrap(0)).unwrap_err(), "λ is inf");
    says(samples.estimate(&[0.0; 2], &bootstrap(0)).unwrap_err(), "2 multipliers λ for 1 constraints");
    says(samples.choose(&[f64::NAN], &bootstrap(0)).unwrap_err(), "threshold of constraint 1 is NaN");
    says(samples.choose(&[], &bootstrap(0)).unwrap_err(), "0 thresholds for 1 constraints");
    says(samples.dual_minimum(&[2.0]).unwrap_err(), "largest value that any policy attains is 1");
    let many = Samples::new(vec![good(); 51], 0.5).unwrap();
    says(many.choose(&[0.0; 51], &bootstrap(0)).unwrap_err(), "51 constraints");
    assert!(Samples::new(vec![good(); 50], 0.5).unwrap().choose(&[0.0; 50], &bootstrap(0)).is_ok());
    says(bootstrap(0).mean(&[1.0]).unwrap_err(), "values of 1 prompts");
    says(bootstrap(0).mean(&[1.0, f64::NAN]).unwrap_err(), "prompt 2 is NaN");
    for confidence in [0.4, 1.0, f64::NAN] {
        assert!(Bootstrap::new(confidence, 0).unwrap_err().to_string().contains("confidence"));
    }
}

#[test]
fn a_certificate_is_wrong_as_often_as_it_may_be() {
    // values of a policy near the threshold: "met" where E[g] is just below it is an error, and the other way round
    let (mut false_met, mut false_not_met) = (0, 0);
    for seed in 0..2000 {
        let mut rng = rng(seed);
        let values: Vec<f64> = (0..40).map(|_| uniform(&mut rng, -1.0, 1.0)).collect();
        let judge = |threshold: f64| Certificate::new(&values, threshold, 0.95).unwrap().verdict;
        false_met += usize::from(judge(1e-9) == Verdict::Met);
        false_not_met += usize::from(judge(-1e-9) == Verdict::NotMet);
    }
    println!("of 2,000: {false_met} met in error, {false_not_met} not met in error");
    // 100 expected, with a standard deviation of 9.7
    assert!((70..=130).contains(&false_met) && (70..=130).contains(&false_not_met));

    let judge = |values: &[f64], threshold: f64| Certificate::new(values, threshold, 0.95).unwrap();
    let certificate = judge(&[0.0, 1.0, 2.0], 1.0);
    let margin = 2.919985580354 / 3f64.sqrt();
    assert_eq!((certificate.safety, certificate.verdict), (1.0, Verdict::Undecided));
    assert!((certificate.lower_bound - (1.0 - margin)).abs() < 1e-9);
    assert!((certificate.upper_bound - (1.0 + margin)).abs() < 1e-9);
    assert_eq!(judge(&[0.5; 4], 0.5).verdict, Verdict::Met);
    assert_eq!(judge(&[0.4; 4], 0.5).verdict, Verdict::NotMet);
    let fails = |values: &[f64], part: &str| {
        let error = Certificate::new(values, 0.0, 0.95).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    fails(&[], "values of 0 prompts");
    fails(&[1.0], "values of 1 prompts");
    fails(&[1.0, f64::NAN], "prompt 2 is NaN");
    assert!(Certificate::new(&[1.0, 2.0], f64::NAN, 0.95).is_err() && Certificate::new(&[1.0, 2.0], 0.0, 2.0).is_err());
}
