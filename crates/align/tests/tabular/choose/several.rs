//! Several constraints, and answers of another policy.

use align::choose::{Bootstrap, Certificate, Choice, Estimate, Samples, Verdict};
use align::tabular::{Problem, Table};
use rand::Rng;

use super::{bootstrap, samples, scored, wide_problem};
use crate::problems::{problem, rng, table, uniform};

fn chosen(choice: Choice) -> Estimate {
    let Choice::Chosen(estimate) = choice else { panic!("{choice:?}") };
    estimate
}

/// A problem of 5 prompts and 8 answers, λ between 0.1 β and 0.5 β, and the thresholds whose solution λ is.
fn solved(constraints: usize, rng: &mut impl Rng) -> (Problem, Vec<f64>, Vec<f64>) {
    let problem = wide_problem(rng, &[8; 5], constraints);
    let lambda: Vec<f64> = (0..constraints).map(|_| problem.beta() * uniform(rng, 0.1, 0.5)).collect();
    let thresholds = problem.at(lambda.clone()).safety;
    (problem, lambda, thresholds)
}

/// Every answer once, with its log-probability under π_λ⁰ as offset: what is estimated from these is exact.
#[test]
fn all_answers_weighted_by_their_probabilities_are_the_exact_problem() {
    let mut worst = [0.0f64; 2];
    for seed in 0..60 {
        let mut rng = rng(seed);
        let (problem, exact, thresholds) = solved(1 + seed as usize % 4, &mut rng);
        let drawn_at: Vec<f64> = exact.iter().map(|lambda| lambda * uniform(&mut rng, 0.0, 3.0)).collect();
        let samples = Samples::new(problem.safety().to_vec(), problem.beta()).unwrap();
        let samples = samples.drawn_at(drawn_at.clone()).unwrap();
        let samples = samples.with_offsets(problem.policy_at(&drawn_at).logps().clone()).unwrap();
        let estimate = samples.estimate(&exact, &bootstrap(0)).unwrap();
        for (found, b) in estimate.safety.iter().zip(&thresholds) {
            worst[0] = worst[0].max((found.value - b).abs());
        }
        let lambda = samples.dual_minimum(&thresholds).unwrap();
        worst[1] = lambda.iter().zip(&exact).map(|(a, b)| (a - b).abs()).fold(worst[1], f64::max);
    }
    println!("from all answers: G off by {:.1e}, λ by {:.1e}", worst[0], worst[1]);
    assert!(worst[0] < 1e-12 && worst[1] < 1e-9);
}

#[test]
fn more_samples_bring_the_chosen_multipliers_to_the_exact_ones() {
    let error = |prompts: usize| {
        let mut distances = Vec::new();
        for seed in 0..4 {
            let mut rng = rng(seed);
            let (problem, exact, thresholds) = solved(3, &mut rng);
            let samples = samples(&problem, &[0.0; 3], [prompts, 200], &mut rng);
            let lambda = chosen(samples.choose(&thresholds, &bootstrap(seed)).unwrap()).lambda;
            distances.extend(lambda.iter().zip(&exact).map(|(a, b)| (a - b).abs() / problem.beta()));
        }
        distances.iter().sum::<f64>() / distances.len() as f64
    };
    let errors = [error(100), error(1600)];
    println!("three constraints, |λ − λ*|/β from 100 and 1,600 prompts: {errors:.3?}");
    // a quarter is expected
    assert!(errors[1] < 0.4 * errors[0]);
}

#[test]
fn bounds_meet_all_thresholds_and_no_more() {
    for constraints in [1, 2, 3] {
        let (mut outcomes, mut met) = ([0; 3], 0);
        for seed in 0..100 {
            let mut rng = rng(seed);
            let problem = problem(&mut rng, constraints);
            let samples = samples(&problem, &vec![0.0; constraints], [60, 60], &mut rng);
            let thresholds = problem.thresholds();
            let estimate = match samples.choose(thresholds, &bootstrap(seed)).unwrap() {
                Choice::Chosen(estimate) => {
                    outcomes[0] += 1;
                    let exact = problem.at(estimate.lambda.clone()).safety;
                    met += usize::from(exact.iter().zip(thresholds).all(|(g, b)| g >= b));
                    estimate
                }
                Choice::OutOfSupport { needed, .. } => {
                    outcomes[1] += 1;
                    needed
                }
                Choice::Unreachable { weights, lower_bounds } => {
                    outcomes[2] += 1;
                    let missing = weights.iter().zip(lower_bounds.iter().zip(thresholds));
                    assert!(missing.map(|(v, (bound, b))| v * (b - bound)).sum::<f64>() > -1e-8);
                    assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-12);
                    continue;
                }
            };
            let mut raised = Vec::new();
            for ((safety, b), lambda) in estimate.safety.iter().zip(thresholds).zip(&estimate.lambda) {
                assert!(safety.lower_bound >= *b, "seed {seed}: {} for {b}", safety.lower_bound);
                assert!(*lambda == 0.0 || safety.lower_bound < b + 1e-8, "seed {seed}: {}", safety.lower_bound);
                raised.push(b + safety.value - safety.lower_bound);
            }
            // the dual with thresholds raised by the margins has its minimum there
            let again = samples.dual_minimum(&raised).unwrap();
            let close = |(a, b): (&f64, &f64)| (a - b).abs() < 1e-5 * (problem.beta() + b);
            assert!(again.iter().zip(&estimate.lambda).all(close), "seed {seed}: {again:?}, {:?}", estimate.lambda);
        }
        let [chosen, beyond, unreachable] = outcomes;
        println!("{constraints}: {chosen} chosen, {beyond} out of support, {unreachable} unreachable; met by {met}");
        assert!(10 * met >= 9 * chosen);
    }
}

#[test]
fn the_chosen_multipliers_meet_all_thresholds_at_the_level() {
    let (mut met, mut above) = (0, 0.0f64);
    for seed in 0..100 {
        let mut rng = rng(2000 + seed);
        let (problem, _, thresholds) = solved(3, &mut rng);
        let samples = samples(&problem, &[0.0; 3], [100, 100], &mut rng);
        let estimate = chosen(samples.choose(&thresholds, &bootstrap(seed)).unwrap());
        let exact = problem.at(estimate.lambda).safety;
        met += usize::from(exact.iter().zip(&thresholds).all(|(g, b)| g >= b));
        for ((g, b), safety) in exact.iter().zip(&thresholds).zip(&estimate.safety) {
            above = above.max((g - b) / (safety.interval[1] - safety.interval[0]));
        }
    }
    println!("three constraints: all met for {met} of 100, at most {above:.2} widths above");
    // 95 expected; fewer than 90 has a probability of 0.012
    assert!(met >= 90 && above < 2.0);
}

/// The smallest λ whose lower bound meets a threshold, by bisection.
#[test]
fn one_constraint_is_the_smallest_multiplier_that_does() {
    let mut worst = 0.0f64;
    for seed in 0..20 {
        let mut rng = rng(1000 + seed);
        let (problem, _, thresholds) = solved(1, &mut rng);
        let samples = samples(&problem, &[0.0], [100, 100], &mut rng);
        let bootstrap = bootstrap(seed);
        let (mut low, mut high) = (0.0, 10.0);
        while high - low > 1e-9 {
            let middle = 0.5 * (low + high);
            let met = samples.estimate(&[middle], &bootstrap).unwrap().safety[0].lower_bound >= thresholds[0];
            *(if met { &mut high } else { &mut low }) = middle;
        }
        let lambda = chosen(samples.choose(&thresholds, &bootstrap).unwrap()).lambda[0];
        worst = worst.max((lambda / high - 1.0).abs());
    }
    println!("one constraint: off bisection by {worst:.1e}");
    assert!(worst < 1e-7);
}

/// A constraint that another implies costs the level that it shares, and nothing else.
#[test]
fn redundant_and_repeated_constraints_leave_the_others_as_they_are() {
    for seed in 0..10 {
        let mut rng = rng(seed);
        let (problem, _, thresholds) = solved(1, &mut rng);
        let b = thresholds[0];
        let scores =
            scored(&problem, &problem.policy_at(&[0.0]), &[&problem.safety()[0]], [100, 100], &mut rng).remove(0);
        let samples = Samples::new(vec![scores.clone()], problem.beta()).unwrap();
        let alone = chosen(samples.choose(&[b], &Bootstrap::new(0.975, seed).unwrap()).unwrap()).lambda[0];
        assert!(alone > 0.0);
        let both = |other: Table, threshold: f64| {
            let samples = Samples::new(vec![scores.clone(), other], problem.beta()).unwrap();
            chosen(samples.choose(&[b, threshold], &bootstrap(seed)).unwrap()).lambda
        };
        let implied = both(scores.clone(), b - 0.1);
        assert!((implied[0] - alone).abs() < 1e-8 && implied[1] == 0.0, "{implied:?}, {alone}");
        let always = both(scores.iter().map(|row| vec![1.0; row.len()]).collect(), 1.0);
        assert!((always[0] - alone).abs() < 1e-8 && always[1] == 0.0, "{always:?}, {alone}");
        let twice = both(scores.clone(), b);
        assert!((twice[0] + twice[1] - alone).abs() < 1e-8, "{twice:?}, {alone}");
        // other units: λ₁ g + λ₂ (1000 g) must be the same tilt
        let scaled = both(scores.iter().map(|row| row.iter().map(|g| 1e3 * g).collect()).collect(), 1e3 * b);
        assert!((scaled[0] + 1e3 * scaled[1] - alone).abs() < 1e-8, "{scaled:?}, {alone}");
    }
}

#[test]
fn thresholds_out_of_reach_together_say_in_which_direction() {
    let mut rng = rng(0);
    let g = table(&mut rng, &[30; 60], -1.0, 1.0);
    let opposite: Table = g.iter().map(|row| row.iter().map(|g| -g).collect()).collect();
    let samples = Samples::new(vec![g, opposite], 0.5).unwrap();
    let bootstrap = bootstrap(0);
    // either can be met alone, and both without room for what is uncertain
    let slack = samples.estimate(&[0.0; 2], &bootstrap).unwrap().safety[0].value;
    for thresholds in [[0.3, -0.2], [slack, -slack]] {
        let Choice::Unreachable { weights, lower_bounds } = samples.choose(&thresholds, &bootstrap).unwrap() else {
            panic!()
        };
        assert!((weights[0] - 0.5).abs() < 0.1, "{weights:?}");
        let missing = |i: usize| weights[i] * (thresholds[i] - lower_bounds[i]);
        assert!(missing(0) + missing(1) > 0.0);
    }
    assert!(samples.dual_minimum(&[0.3, -0.2]).unwrap_err().to_string().contains("No policy meets all"));
    assert!(samples.dual_minimum(&[slack - 1e-3, -slack - 1e-3]).is_ok());
    let alone = samples.choose(&[-5.0, 5.0], &bootstrap).unwrap();
    assert!(matches!(alone, Choice::Unreachable { weights, .. } if weights == [0.0, 1.0]));
    let estimate = chosen(samples.choose(&[slack + 0.1, -slack - 0.3], &bootstrap).unwrap());
    assert!(estimate.lambda[0] > 0.0 && estimate.lambda[1] == 0.0);
}

/// Answers of the base model with offsets r/β: everything about π_r and its tilts without drawing from π_r.
#[test]
fn answers_of_the_base_model_with_offsets_stand_for_those_of_the_reward_step() {
    for share in [0.0, 0.5] {
        let (mut base_covers, mut own_covers, mut agree, mut held) = (0, 0, 0, 0);
        for seed in 0..100 {
            let mut rng = rng(seed);
            let (problem, lambda, _) = solved(2, &mut rng);
            let lambda: Vec<f64> = lambda.iter().map(|lambda| share * lambda).collect();
            let exact = problem.at(lambda.clone()).safety;
            let own = samples(&problem, &[0.0; 2], [100, 200], &mut rng).estimate(&lambda, &bootstrap(seed)).unwrap();
            let base = of_base(&problem, [100, 200], &mut rng).estimate(&lambda, &bootstrap(seed)).unwrap();
            let all = |holds: &dyn Fn(usize) -> bool| usize::from((0..2).all(holds));
            let covers = |estimate: &Estimate, i: usize| {
                (estimate.safety[i].interval[0]..=estimate.safety[i].interval[1]).contains(&exact[i])
            };
            base_covers += all(&|i| covers(&base, i));
            own_covers += all(&|i| covers(&own, i));
            held += all(&|i| base.safety[i].lower_bound <= exact[i]);
            agree += all(&|i| {
                let [a, b] = [base.safety[i].interval, own.safety[i].interval];
                a[0] <= b[1] && b[0] <= a[1]
            });
            assert!(base.effective_sample_size.average < own.effective_sample_size.average);
        }
        println!(
            "λ/λ* {share}: both intervals from π_ref cover {base_covers}, from π_r {own_covers} of 100; from π_ref both \
             bounds hold {held}"
        );
        // 95 expected; fewer than 90 has a probability of 0.012
        assert!(base_covers >= 90 && own_covers >= 90 && held >= 90 && agree == 100);
    }
}

fn of_base(problem: &Problem, size: [usize; 2], rng: &mut impl Rng) -> Samples {
    let values: Vec<&Table> = problem.safety().iter().chain([problem.reward()]).collect();
    let mut scores = scored(problem, problem.reference(), &values, size, rng);
    let reward = scores.pop().unwrap();
    let offsets = reward.iter().map(|row| row.iter().map(|r| r / problem.beta()).collect()).collect();
    Samples::new(scores, problem.beta()).unwrap().with_offsets(offsets).unwrap()
}

#[test]
fn multipliers_from_the_base_model_are_near_the_exact_ones() {
    let mut error = 0.0;
    for seed in 0..8 {
        let mut rng = rng(seed);
        let (problem, exact, thresholds) = solved(2, &mut rng);
        let samples = of_base(&problem, [400, 200], &mut rng);
        let lambda = samples.dual_minimum(&thresholds).unwrap();
        error += lambda.iter().zip(&exact).map(|(a, b)| (a - b).abs() / problem.beta() / 16.0).sum::<f64>();
        let choice = chosen(samples.choose(&thresholds, &bootstrap(seed)).unwrap());
        assert!(choice.safety.iter().zip(&thresholds).all(|(safety, b)| safety.lower_bound >= *b));
    }
    println!("from 400 prompts of the base model, |λ − λ*|/β: {error:.3}");
    assert!(error < 0.03);
    // too few answers even for π_r: draw from π_r itself
    let mut rng = rng(0);
    let (problem, _, thresholds) = solved(2, &mut rng);
    let samples = of_base(&problem, [100, 10], &mut rng);
    let Choice::OutOfSupport { reachable, .. } = samples.choose(&thresholds, &bootstrap(0)).unwrap() else { panic!() };
    assert_eq!(reachable, [0.0; 2]);
}

#[test]
fn joint_certificates_are_wrong_together_as_often_as_one() {
    let (mut below, mut above, mut false_met) = (0, 0, 0);
    for seed in 0..2000 {
        let mut rng = rng(seed);
        let values: Vec<Vec<f64>> = (0..3).map(|_| (0..40).map(|_| uniform(&mut rng, -1.0, 1.0)).collect()).collect();
        let judge = |threshold: f64| Certificate::jointly(&values, &[threshold; 3], 0.95).unwrap();
        // E[g] is 0 for all three
        below += usize::from(judge(1e-9).iter().any(|certificate| certificate.verdict == Verdict::Met));
        above += usize::from(Verdict::of_all(&judge(-1e-9)) == Verdict::NotMet);
        false_met += usize::from(Verdict::of_all(&judge(1e-9)) == Verdict::Met);
    }
    println!(
        "of 2,000, three constraints: any met in error {below}, not met in error {above}, all met in error {false_met}"
    );
    // 98 expected, with a standard deviation of 9.7
    assert!((70..=130).contains(&below) && (70..=130).contains(&above) && false_met <= 2);

    let verdict = |values: &[[f64; 2]]| {
        let values: Vec<Vec<f64>> = values.iter().map(|values| values.to_vec()).collect();
        Verdict::of_all(&Certificate::jointly(&values, &vec![0.0; values.len()], 0.95).unwrap())
    };
    assert_eq!(verdict(&[[1.0; 2], [2.0; 2]]), Verdict::Met);
    assert_eq!(verdict(&[[1.0; 2], [-9.0, 9.0]]), Verdict::Undecided);
    assert_eq!(verdict(&[[-1.0; 2], [-9.0, 9.0], [1.0; 2]]), Verdict::NotMet);
    let one = [0.5, 1.0, 3.0];
    let alone = Certificate::new(&one, 0.2, 0.95).unwrap();
    assert_eq!(Certificate::jointly(&[one.to_vec()], &[0.2], 0.95).unwrap(), [alone]);
    let half = Certificate::new(&one, 0.2, 0.975).unwrap();
    let [first, second] = Certificate::jointly(&[one.to_vec(), one.to_vec()], &[0.2; 2], 0.95).unwrap()[..] else {
        panic!()
    };
    assert!(first == second && (first.lower_bound - half.lower_bound).abs() < 1e-12);
    assert!(Certificate::jointly(&[], &[], 0.95).is_err() && Certificate::jointly(&[one.to_vec()], &[], 0.95).is_err());
}
