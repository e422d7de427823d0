//! What each objective learns from unlimited data, through the same code that trains language models.

use align::objective::{Objective, Options, Pairwise, Unpaired};
use align::tabular::{Description, Labels, Pairs, Policy, Problem, Table};
use align::world::{Answer, World};
use rand::RngExt;

use crate::problems::{probabilities, problem, rng, table, uniform};

fn pairwise(name: &str, beta: f64, options: Options) -> Pairwise {
    match options.build(name, beta).unwrap() {
        Objective::Pairwise(objective) => objective,
        Objective::Unpaired(_) => unreachable!(),
    }
}

fn unpaired(name: &str, beta: f64) -> Unpaired {
    match Options::default().build(name, beta).unwrap() {
        Objective::Unpaired(objective) => objective,
        Objective::Pairwise(_) => unreachable!(),
    }
}

/// A policy that answers are drawn from, and that differs from the reference.
fn sampling(rng: &mut impl RngExt, problem: &Problem) -> Policy {
    let answers: Vec<usize> = problem.reward().iter().map(Vec::len).collect();
    Policy::from_weights(&probabilities(rng, &answers))
}

/// Whatever the answers are drawn from, the minimum of the population loss is the Gibbs policy.
#[test]
fn population_dpo_is_the_gibbs_policy() {
    let mut rng = rng(50);
    let mut largest = 0.0f64;
    for _ in 0..100 {
        let problem = problem(&mut rng, 0);
        let (reference, values, beta) = (problem.reference(), problem.reward(), problem.beta());
        let pairs = Pairs::population(problem.weights(), &sampling(&mut rng, &problem), values);
        let learned = pairs.minimiser(&pairwise("dpo", beta, Options::default()), reference).unwrap();
        largest = largest.max(learned.max_difference(&reference.tilted(values, beta)));
    }
    println!("dpo: {largest:e}");
    assert!(largest <= 1e-8, "{largest:e}");
}

/// Labels flipped with a known probability: `robust-dpo` undoes it, `dpo` does not.
#[test]
fn population_robust_dpo_on_flipped_labels_is_the_gibbs_policy() {
    let mut rng = rng(51);
    let (mut largest, mut naive) = (0.0f64, 0.0f64);
    for _ in 0..50 {
        let problem = problem(&mut rng, 0);
        let (reference, values, beta) = (problem.reference(), problem.reward(), problem.beta());
        let share = uniform(&mut rng, 0.05, 0.3);
        let pairs = Pairs::population(problem.weights(), &sampling(&mut rng, &problem), values).flipped(share);
        let options = Options { label_smoothing: Some(share), ..Options::default() };
        let gibbs = reference.tilted(values, beta);
        let learned = pairs.minimiser(&pairwise("robust-dpo", beta, options), reference).unwrap();
        largest = largest.max(learned.max_difference(&gibbs));
        let learned = pairs.minimiser(&pairwise("dpo", beta, Options::default()), reference).unwrap();
        naive = naive.max(learned.max_difference(&gibbs));
    }
    println!("robust-dpo: {largest:e}; dpo on the same labels: {naive}");
    assert!(largest <= 1e-8 && naive > 0.05, "{largest:e} {naive}");
}

/// `ipo` with sums tilts by the probability to win against an answer of the data, p(y ≻ μ)/β.
#[test]
fn population_ipo_tilts_by_win_probability() {
    let mut rng = rng(52);
    let mut largest = 0.0f64;
    for _ in 0..50 {
        let problem = problem(&mut rng, 0);
        let (reference, values, beta) = (problem.reference(), problem.reward(), problem.beta());
        let sampling = sampling(&mut rng, &problem);
        let wins = |(row, p): (&Vec<f64>, Vec<f64>)| -> Vec<f64> {
            let win = |a: f64| row.iter().zip(&p).map(|(b, p)| p / (1.0 + (b - a).exp())).sum();
            row.iter().map(|value| win(*value)).collect()
        };
        let tilt: Table = values.iter().zip(sampling.probabilities()).map(wins).collect();
        let options = Options { sum_logps: Some(true), ..Options::default() };
        let pairs = Pairs::population(problem.weights(), &sampling, values);
        let learned = pairs.minimiser(&pairwise("ipo", beta, options), reference).unwrap();
        largest = largest.max(learned.max_difference(&reference.tilted(&tilt, beta)));
    }
    println!("ipo: {largest:e}");
    assert!(largest <= 1e-8, "{largest:e}");
}

/// The second step by `dpo`, from π_r at β/λ, is `modpo` from π_ref at β with weight λ and the implicit margins
/// β log(π_r/π_ref) of the first step: the same loss for every policy, hence the same minimum. Primal–dual DPO at a
/// fixed multiplier is this loss too.
#[test]
fn the_second_step_of_dpo_is_modpo_with_implicit_margins() {
    let mut rng = rng(53);
    for _ in 0..50 {
        let problem = problem(&mut rng, 1);
        let (reference, beta, g) = (problem.reference(), problem.beta(), &problem.safety()[0]);
        let lambda = uniform(&mut rng, 0.2, 3.0);
        let sampling = sampling(&mut rng, &problem);
        let pairs = |values| Pairs::population(problem.weights(), &sampling, values);
        let first = pairs(problem.reward()).minimiser(&pairwise("dpo", beta, Options::default()), reference).unwrap();

        let implicit = |(p, q): (&Vec<f64>, &Vec<f64>)| p.iter().zip(q).map(|(p, q)| beta * (p - q)).collect();
        let margins: Table = first.logps().iter().zip(reference.logps()).map(implicit).collect();
        let with_margins = pairs(g).with_margins(&margins);
        let modpo = pairwise("modpo", beta, Options { weight: Some(lambda), ..Options::default() });
        let dpo = pairwise("dpo", beta / lambda, Options::default());

        let answers: Vec<usize> = g.iter().map(Vec::len).collect();
        let anywhere = Policy::from_logits(table(&mut rng, &answers, -3.0, 3.0));
        let a = pairs(g).loss(&dpo, &anywhere, &first);
        let b = with_margins.loss(&modpo, &anywhere, reference);
        assert!((a.loss - b.loss).abs() < 1e-12 * (1.0 + a.loss));
        let mut derivatives = a.gradient.iter().flatten().zip(b.gradient.iter().flatten());
        assert!(derivatives.all(|(a, b)| (a - b).abs() < 1e-12), "{a:?} {b:?}");

        let stepwise = pairs(g).minimiser(&dpo, &first).unwrap();
        let at_once = with_margins.minimiser(&modpo, reference).unwrap();
        assert!(stepwise.max_difference(&at_once) < 1e-8);
        assert!(stepwise.max_difference(&problem.policy_at(&[lambda])) < 1e-8);
    }
}

/// The cuts c(x) at which `bco`, with one shift for all prompts, can fit all of them: β log E_ref exp(v/β) plus the
/// constant that makes E\[v − c\] = 0.
fn balanced_cuts(weights: &[f64], sampling: &Policy, reference: &Policy, values: &Table, beta: f64) -> Vec<f64> {
    let soft = |(logps, row): (&Vec<f64>, &Vec<f64>)| {
        beta * logps.iter().zip(row).map(|(logp, v)| (logp + v / beta).exp()).sum::<f64>().ln()
    };
    let soft: Vec<f64> = reference.logps().iter().zip(values).map(soft).collect();
    let mean: f64 = align::tabular::expectation(weights, sampling, values);
    let offset = mean - weights.iter().zip(&soft).map(|(w, s)| w * s).sum::<f64>();
    soft.iter().map(|s| s + offset).collect()
}

/// Labels desirable with probability σ(v − c): `bco` is the Gibbs policy where its shift can be right for all prompts.
#[test]
fn population_bco_is_the_gibbs_policy() {
    let mut rng = rng(54);
    let mut largest = 0.0f64;
    for _ in 0..30 {
        let problem = problem(&mut rng, 0);
        let (reference, values, beta) = (problem.reference(), problem.reward(), problem.beta());
        let (weights, sampling) = (problem.weights(), sampling(&mut rng, &problem));
        let cuts = balanced_cuts(weights, &sampling, reference, values, beta);
        let labels = Labels::population(weights, &sampling, values, &cuts);
        let learned = labels.minimiser(&unpaired("bco", beta), reference).unwrap();
        largest = largest.max(learned.max_difference(&reference.tilted(values, beta)));
    }
    println!("bco: {largest:e}");
    assert!(largest <= 1e-8, "{largest:e}");
}

/// `kto` is all or nothing: answers more often undesirable than not lose all their probability, by however little and
/// whatever β.
#[test]
fn population_kto_is_bang_bang() {
    let (weights, reference) = ([1.0], Policy::from_weights(&[vec![0.25; 4]]));
    // values that hardly differ, so that every tilt at these temperatures keeps all four answers
    let values = vec![vec![0.02, 0.01, -0.01, -0.02]];
    for beta in [0.25, 0.5, 1.0, 4.0] {
        let labels = Labels::population(&weights, &reference, &values, &[0.0]);
        let learned = labels.minimiser(&unpaired("kto", beta), &reference).unwrap().probabilities();
        let gibbs = reference.tilted(&values, beta).probabilities();
        println!("beta {beta}: kto {learned:.3?}, gibbs {gibbs:.3?}");
        assert!(learned[0][2] < 1e-2 && learned[0][3] < 1e-2, "{learned:?}");
        assert!(gibbs[0].iter().all(|p| (0.22..0.28).contains(p)), "{gibbs:?}");
    }
}

/// Gradient descent on logits from the reference, with the shift that each policy has itself: what a trainer does with
/// all data in every batch.
fn trained(labels: &Labels, objective: &Unpaired, reference: &Policy, rate: f64, steps: usize) -> Policy {
    let mut policy = reference.clone();
    for _ in 0..steps {
        let by_logp = labels.loss(objective, &policy, reference).gradient;
        let mut logits = policy.logps().clone();
        for (row, derivatives) in logits.iter_mut().zip(&by_logp) {
            let sum: f64 = derivatives.iter().sum();
            row.iter_mut().zip(derivatives).for_each(|(theta, d)| *theta -= rate * (d - theta.exp() * sum));
        }
        policy = Policy::from_logits(logits);
    }
    policy
}

fn example() -> Problem {
    let text = include_str!("../../../../docs/examples/two-prompts.json");
    Problem::new(serde_json::from_str::<Description>(text).unwrap()).unwrap()
}

/// The safety step from π_r at β/λ by several objectives and kinds of labels, with the largest difference of a
/// probability from the exact policy and E\[g\]. Printed as a table, in the columns of `docs/theory.md`.
fn safety_steps(problem: &Problem, lambda: f64) -> [(f64, f64); 7] {
    let (weights, reference, beta) = (problem.weights(), problem.reference(), problem.beta());
    let g = &problem.safety()[0];
    let temperature = beta / lambda;
    let first = problem.policy_at(&[0.0]);
    let exact = problem.policy_at(&[lambda]);
    let pairs = Pairs::population(weights, reference, g);
    let unpaired_pairs = pairs.unpaired();
    let cuts = balanced_cuts(weights, reference, &first, g, temperature);
    let balanced = Labels::population(weights, reference, g, &cuts);
    let at_zero = Labels::population(weights, reference, g, &vec![0.0; weights.len()]);
    let (bco, kto) = (unpaired("bco", temperature), unpaired("kto", temperature));
    let dpo = pairwise("dpo", temperature, Options::default());
    [
        ("`dpo`, pairs", pairs.minimiser(&dpo, &first)),
        ("`bco`, balanced labels", balanced.minimiser(&bco, &first)),
        ("`bco`, labels cut at 0", at_zero.minimiser(&bco, &first)),
        ("`bco`, unpaired pairs", unpaired_pairs.minimiser(&bco, &first)),
        ("`kto`, balanced labels", balanced.minimiser(&kto, &first)),
        ("`kto`, labels cut at 0", at_zero.minimiser(&kto, &first)),
        ("`kto`, unpaired pairs", unpaired_pairs.minimiser(&kto, &first)),
    ]
    .map(|(name, policy)| {
        let policy = policy.unwrap();
        let value = |values| align::tabular::expectation(weights, &policy, values);
        let kl = align::tabular::kl(weights, &policy, reference);
        let (difference, r, g) = (policy.max_difference(&exact), value(problem.reward()), value(g));
        println!("| {lambda:.3} | {name} | {r:.3} | {g:.3} | {kl:.3} | {difference:.1e} |");
        (difference, g)
    })
}

/// The table of `docs/theory.md`, at three λ.
#[test]
fn a_safety_step_by_bco_is_the_constrained_optimum_and_by_kto_it_is_not() {
    let problem = example();
    let optimum = problem.solve().unwrap();
    let mut safety_by_kto = Vec::new();
    for factor in [0.5, 1.0, 2.0] {
        let lambda = factor * optimum.lambda[0];
        let exact = problem.at(vec![lambda]);
        println!("| {lambda:.3} | exact | {:.3} | {:.3} | {:.3} | 0 |", exact.reward, exact.safety[0], exact.kl);
        let [dpo, bco, bco_at_zero, bco_pairs, kto, kto_at_zero, kto_pairs] = safety_steps(&problem, lambda);
        assert!(dpo.0 <= 1e-8 && bco.0 <= 1e-8, "{dpo:?} {bco:?}");
        // one shift cannot be right for both prompts
        assert!([bco_at_zero, bco_pairs].iter().all(|(difference, _)| (0.01..0.3).contains(difference)));
        assert!([kto, kto_at_zero, kto_pairs].iter().all(|(difference, _)| *difference > 0.4));
        safety_by_kto.push(kto_at_zero.1);
    }
    // λ is no dial for it: from half to twice the multiplier E[g] should go from −0.11 to 0.42
    assert!(safety_by_kto.iter().all(|g| (0.5..0.6).contains(g)), "{safety_by_kto:?}");
}

/// What the minimiser finds for `kto` is where gradient descent goes, in the example at λ*.
#[test]
fn gradient_descent_takes_kto_to_the_same_policy() {
    let problem = example();
    let temperature = problem.beta() / problem.solve().unwrap().lambda[0];
    let first = problem.policy_at(&[0.0]);
    let labels = Labels::population(problem.weights(), problem.reference(), &problem.safety()[0], &[0.0; 2]);
    let kto = unpaired("kto", temperature);
    let found = labels.minimiser(&kto, &first).unwrap();
    let descended = trained(&labels, &kto, &first, 10.0, 20_000);
    assert!(found.max_difference(&descended) < 1e-3, "{:?} {:?}", found, descended);
}

/// The quickstart world with exact policies instead of transformers: one harmless and one risky prompt, since all
/// prompts of a kind have answers of the same worth.
fn world_problem() -> Problem {
    let world = World::new(0);
    let values = |value: fn(&Answer) -> f64| -> Table {
        let first = |risky| world.heldout_prompts.iter().find(|prompt| prompt.risky == risky).unwrap();
        [false, true].map(|risky| world.answers(first(risky)).iter().map(value).collect()).to_vec()
    };
    let description = Description {
        reference: values(|answer| answer.p0),
        reward: values(|answer| answer.reward),
        safety: vec![values(|answer| answer.safety)],
        prompt_weights: None,
        beta: 0.5,
        thresholds: vec![0.0],
    };
    Problem::new(description).unwrap()
}

/// `bco` is the optimum when its labels are balanced, and makes things worse when they are not; `kto` never is.
#[test]
fn in_the_quickstart_world_bco_needs_balanced_labels_and_kto_is_never_the_optimum() {
    let problem = world_problem();
    let lambda = 1.0;
    let (first, exact) = (problem.at(vec![0.0]), problem.at(vec![lambda]));
    for (name, policy) in [("π_r", &first), ("exact", &exact)] {
        println!("| {lambda:.3} | {name} | {:.3} | {:.3} | {:.3} | |", policy.reward, policy.safety[0], policy.kl);
    }
    let [dpo, bco, bco_at_zero, bco_pairs, kto, kto_at_zero, kto_pairs] = safety_steps(&problem, lambda);
    assert!(dpo.0 <= 1e-8 && bco.0 <= 1e-8, "{dpo:?} {bco:?}");
    assert!([kto, kto_at_zero, kto_pairs].iter().all(|(difference, _)| *difference > 0.1));
    let g = &problem.safety()[0];
    let cuts = balanced_cuts(problem.weights(), problem.reference(), &first.policy, g, problem.beta() / lambda);
    println!("harmless prompts are cut {:.2} higher than risky ones", cuts[0] - cuts[1]);
    assert!(cuts[0] - cuts[1] > 0.5, "{cuts:?}");
    assert!([bco_at_zero, bco_pairs].iter().all(|(_, safety)| *safety < first.safety[0]), "{bco_at_zero:?}");

    // that is where gradient descent goes, too
    let labels = Labels::population(problem.weights(), problem.reference(), g, &[0.0; 2]);
    let descended = trained(&labels, &unpaired("bco", problem.beta() / lambda), &first.policy, 10.0, 5_000);
    let safety = align::tabular::expectation(problem.weights(), &descended, g);
    assert!((safety - bco_at_zero.1).abs() < 0.01, "{safety} {bco_at_zero:?}");
}
