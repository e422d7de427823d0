//! The objectives against finite differences, identities, and what Theorem 1 says of their population optimum.

#![allow(clippy::unwrap_used)]

use align::objective::{
    Labelled, NAMES, Objective, Options, Pair, Pairwise, Response, RunningMean, Unpaired, WeightRule,
};
use proptest::prelude::*;

fn response(policy: f64, reference: f64) -> Response {
    Response { policy, reference, len: 1, kl: 0.0 }
}

/// A pair by its log-probabilities: policy chosen and rejected, reference chosen and rejected.
fn pair(policy_chosen: f64, policy_rejected: f64, ref_chosen: f64, ref_rejected: f64) -> Pair {
    Pair {
        chosen: Response { len: 12, ..response(policy_chosen, ref_chosen) },
        rejected: Response { len: 7, ..response(policy_rejected, ref_rejected) },
        is_unsafe: [false; 2],
        margin: 0.0,
    }
}

fn pairwise(objective: Objective) -> Pairwise {
    let Objective::Pairwise(pairwise) = objective else { panic!("{objective:?} is not pairwise") };
    pairwise
}

fn build(name: &str, beta: f64) -> Objective {
    Options::default().build(name, beta).unwrap()
}

fn dpo(beta: f64, label_smoothing: f64) -> Pairwise {
    Pairwise::Dpo { beta, label_smoothing }
}

/// Options with one parameter.
fn with(parameter: &str, value: f64) -> Options {
    let mut options = Options::default();
    let field = match parameter {
        "label_smoothing" => &mut options.label_smoothing,
        "desirable_weight" => &mut options.desirable_weight,
        "undesirable_weight" => &mut options.undesirable_weight,
        "gamma" => &mut options.gamma,
        "alpha" => &mut options.alpha,
        "delta" => &mut options.delta,
        "weight" => &mut options.weight,
        _ => panic!("no parameter {parameter}"),
    };
    *field = Some(value);
    options
}

/// An objective of this name whose parameters follow from `part`, in [0, 1).
fn with_parameters(name: &str, beta: f64, part: f64) -> Objective {
    let options = match name {
        "dpo" | "robust-dpo" | "exo" => with("label_smoothing", 1e-6 + 0.49 * part),
        "ipo" => Options { sum_logps: Some(part < 0.5), ..Options::default() },
        "kto" => Options { undesirable_weight: Some(2.0 - part), ..with("desirable_weight", 0.1 + part) },
        "simpo" => with("gamma", 2.0 * part),
        "cpo" | "tdpo" => with("alpha", 2.0 * part),
        "safe-dpo" => with("delta", 10.0 * part),
        "modpo" => with("weight", 0.1 + 2.0 * part),
        _ => Options::default(),
    };
    options.build(name, beta).unwrap()
}

fn assert_close(actual: f64, expected: f64, tolerance: f64) {
    let scale = expected.abs().max(1.0);
    assert!((actual - expected).abs() <= tolerance * scale, "{actual} is not {expected} within {tolerance}");
}

// --- values

/// Calculated from the formula with Python's `decimal` at 50 digits (`ln` and `exp` of `Decimal`), not with this code.
#[test]
fn dpo_equals_values_of_50_digit_arithmetic() {
    #[rustfmt::skip]
    let cases = [
        // policy chosen, rejected, reference chosen, rejected, beta, epsilon; loss, d_chosen, rewards chosen, rejected
        (-10.0, -20.0, -10.0, -20.0, 0.1, 0.0, std::f64::consts::LN_2, -0.05, 0.0, 0.0),
        (-41.25, -57.5, -44.5, -50.75, 0.1, 0.0, 0.313_261_687_518_222_8, -0.026_894_142_136_999_513, 0.325, -0.675),
        (-41.25, -57.5, -44.5, -50.75, 0.1, 0.2, 0.513_261_687_518_222_8, -0.006_894_142_136_999_512, 0.325, -0.675),
        (-130.5, -88.75, -96.25, -101.5, 0.5, 0.0, 23.500_000_000_062_24, -0.499_999_999_968_879_3, -17.125, 6.375),
        (-130.5, -88.75, -96.25, -101.5, 0.5, 0.1, 21.150_000_000_062_24, -0.449_999_999_968_879_3, -17.125, 6.375),
        (-3.0, -9.0, -8.0, -2.0, 4.0, 0.05, 2.4, 0.2, 20.0, -28.0),
    ];
    for (pc, pr, rc, rr, beta, epsilon, loss, d_chosen, reward_chosen, reward_rejected) in cases {
        let got = dpo(beta, epsilon).evaluate(&pair(pc, pr, rc, rr));
        assert_close(got.loss, loss, 1e-14);
        assert_close(got.chosen.logp, d_chosen, 1e-14);
        assert_close(got.rejected.logp, -d_chosen, 1e-14);
        assert_close(got.reward_chosen, reward_chosen, 1e-14);
        assert_close(got.reward_rejected, reward_rejected, 1e-14);
    }
}

#[test]
fn a_policy_equal_to_its_reference_has_margin_zero_exactly() {
    for (chosen, rejected) in [(-0.1, -0.3), (-164.511_505_980_522_83, -180.681_102_372_895_8), (-1e5 / 3.0, -7e-7)] {
        let got = dpo(0.1, 0.0).evaluate(&pair(chosen, rejected, chosen, rejected));
        assert_eq!((got.reward_chosen, got.reward_rejected), (0.0, 0.0));
        assert_eq!(got.loss, std::f64::consts::LN_2);
        assert_eq!((got.chosen.logp, got.rejected.logp), (-0.05, 0.05));
    }
}

/// Far out, −log σ(z) is −z or e^−z to the last bit, and the slope is β or e^−z·β.
#[test]
fn the_tails_neither_overflow_nor_lose_precision() {
    let logistic = ["dpo", "safe-dpo", "modpo", "tdpo", "cpo", "simpo", "orpo", "bco", "kto", "nca", "apo-zero"];
    let small = (-50.0f64).exp();
    let precise = |got: f64, expected: f64, name: &str| {
        assert!((got / expected - 1.0).abs() < 1e-14, "{name}: {got} is not {expected}");
    };
    for name in logistic {
        match with_zero(name) {
            Objective::Pairwise(objective) => {
                let at = |chosen: f64, rejected: f64| {
                    let unit = |policy| Response { len: 1, ..response(policy, 0.0) };
                    objective.evaluate(&Pair { chosen: unit(chosen), rejected: unit(rejected), ..pair(0., 0., 0., 0.) })
                };
                match name {
                    // log odds of nearly impossible responses are their log-probabilities
                    "orpo" => precise(at(-50.0, -100.0).loss - 50.0 + 1.0, 1.0 + small, name),
                    "nca" => precise(at(0.0, -50.0).rejected.logp, 0.5 * small, name),
                    "apo-zero" => precise(at(50.0, -50.0).loss, 2.0 * small, name),
                    _ => {
                        precise(at(50.0, 0.0).loss, small, name);
                        precise(at(50.0, 0.0).chosen.logp, -small, name);
                        assert_eq!((at(-1e6, 0.0).loss, at(-1e6, 0.0).chosen.logp), (1e6, -1.0), "{name}");
                        assert_eq!((at(1e6, 0.0).loss, at(1e6, 0.0).rejected.logp), (0.0, 0.0), "{name}");
                    }
                }
            }
            Objective::Unpaired(objective) => {
                let at =
                    |policy| objective.evaluate(&Labelled { response: response(policy, 0.0), desirable: true }, 0.0);
                precise(at(50.0).loss, small, name);
                precise(at(50.0).derivative.logp, -small, name);
                precise(at(-50.0).derivative.logp, if name == "kto" { -small } else { -1.0 }, name);
                precise(at(-1e6).loss, if name == "kto" { 1.0 } else { 1e6 }, name);
            }
        }
    }
    let smoothed = dpo(1.0, 0.25).evaluate(&pair(1e6, 0.0, 0.0, 0.0));
    assert_eq!((smoothed.loss, smoothed.chosen.logp), (0.25e6, 0.25));
}

/// The objective at β = 1 with those parameters at 0 that add something to −log σ(βh).
fn with_zero(name: &str) -> Objective {
    let options = match name {
        "simpo" => with("gamma", 0.0),
        "cpo" | "tdpo" => with("alpha", 0.0),
        _ => Options::default(),
    };
    options.build(name, 1.0).unwrap()
}

#[test]
fn a_broken_number_shows_in_the_loss() {
    let whole = Pair { margin: 0.3, is_unsafe: [true, false], ..pair(-3.0, -4.0, -3.5, -3.0) };
    for name in NAMES {
        let objective = build(name, 0.1);
        for broken in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            match objective {
                Objective::Pairwise(pairwise) => {
                    let mut pairs = vec![whole; 4];
                    pairs[0].chosen.policy = broken;
                    pairs[1].rejected.policy = broken;
                    pairs[2].chosen.reference = broken;
                    pairs[3].rejected.reference = broken;
                    let read = if objective.uses_reference() { 4 } else { 2 };
                    for (i, pair) in pairs.iter().enumerate() {
                        assert_eq!(pairwise.evaluate(pair).loss.is_finite(), i >= read, "{name} {pair:?}");
                    }
                    let margin = pairwise.evaluate(&Pair { margin: broken, ..whole }).loss;
                    assert_eq!(margin.is_finite(), *name != "modpo", "{name}");
                    let kl = Response { kl: broken, ..whole.rejected };
                    assert_eq!(pairwise.evaluate(&Pair { rejected: kl, ..whole }).loss.is_finite(), *name != "tdpo");
                }
                Objective::Unpaired(unpaired) => {
                    for desirable in [true, false] {
                        let at = |policy, reference, shift| {
                            let example = Labelled { response: response(policy, reference), desirable };
                            unpaired.evaluate(&example, shift).loss.is_finite()
                        };
                        let counts = objective.uses_reference() || desirable;
                        assert_eq!(at(broken, -3.0, 0.1), !counts, "{name} {broken} {desirable}");
                        assert_eq!(at(-3.0, broken, 0.1), !objective.uses_reference(), "{name} {broken} {desirable}");
                        assert_eq!(at(-3.0, -3.5, broken), !objective.uses_reference(), "{name} {broken} {desirable}");
                    }
                }
            }
        }
    }
    assert!(Unpaired::kl_estimate(&[1.0, f64::NAN]).is_nan());
}

// --- derivatives

/// The derivative of `f` at 0 by seven points, and how far rounding of `f` may put it off.
fn slope(step: f64, f: impl Fn(f64) -> f64) -> (f64, f64) {
    let values: Vec<f64> = (-3..=3).map(|k| f(f64::from(k) * step)).collect();
    let weights = [-1.0, 9.0, -45.0, 0.0, 45.0, -9.0, 1.0];
    let sum: f64 = values.iter().zip(weights).map(|(value, weight)| value * weight).sum();
    let size = values.iter().fold(0.0f64, |size, value| size.max(value.abs()));
    // numbers near 1e-308 have few digits
    (sum / (60.0 * step), 4.0 * f64::EPSILON * size / step + 1e-300)
}

fn assert_slope(got: f64, (expected, rounding): (f64, f64), what: &dyn std::fmt::Debug) -> Result<(), TestCaseError> {
    let bar = 1e-6 * expected.abs() + rounding;
    prop_assert!((got - expected).abs() <= bar, "{what:?}: {got} is not {expected} within {bar}");
    Ok(())
}

/// A step of a response's log-probability over which the loss is smooth.
fn step(objective: &Objective, beta: f64, response: &Response) -> f64 {
    match objective {
        // log odds vary with the logarithm of the log-probability
        Objective::Pairwise(Pairwise::Orpo { .. }) => (0.004 * response.policy.abs()).min(0.01 * response.len as f64),
        Objective::Pairwise(Pairwise::Modpo { weight, .. }) => 0.01 * weight / beta,
        Objective::Pairwise(Pairwise::Tdpo { alpha, .. }) => 0.01 / (beta * alpha.max(1.0)),
        _ => 0.01 / beta,
    }
}

/// Log-probabilities from near certain to −10⁴, and references from equal to far away.
fn responses() -> impl Strategy<Value = Response> {
    (-3.0f64..4.0, -3.0f64..3.0, -1.0f64..1.0, 1usize..300, 0.0f64..1.0).prop_map(|(size, distance, sign, len, kl)| {
        let policy = -10f64.powf(size);
        let distance = 10f64.powf(distance);
        Response { policy, reference: -(policy + sign * distance).abs(), len, kl: kl * distance }
    })
}

fn any_pair() -> impl Strategy<Value = Pair> {
    let flags = prop_oneof![Just([false, false]), Just([false, true]), Just([true, false]), Just([true, true])];
    (responses(), responses(), flags, -30.0f64..30.0).prop_map(|(chosen, rejected, is_unsafe, margin)| Pair {
        chosen,
        rejected,
        is_unsafe,
        margin,
    })
}

fn any_objective() -> impl Strategy<Value = (Objective, f64)> {
    (prop::sample::select(NAMES), -3.0f64..1.0, 0.0f64..1.0).prop_map(|(name, beta, part)| {
        let beta = 10f64.powf(beta);
        (with_parameters(name, beta, part), beta)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn derivatives_equal_finite_differences((objective, beta) in any_objective(), pair in any_pair(), shift in -5.0f64..5.0) {
        let what = (objective, pair);
        match objective {
            Objective::Pairwise(pairwise) => {
                let got = pairwise.evaluate(&pair);
                if let Pairwise::Hinge { .. } = pairwise {
                    // no derivative at the kink
                    prop_assume!((got.reward_chosen - got.reward_rejected - 1.0).abs() > 0.1);
                }
                let loss = |change: &dyn Fn(&mut Pair)| {
                    let mut moved = pair;
                    change(&mut moved);
                    pairwise.evaluate(&moved).loss
                };
                let [at_chosen, at_rejected] = [pair.chosen, pair.rejected].map(|r| step(&objective, beta, &r));
                let chosen = slope(at_chosen, |by| loss(&|pair| pair.chosen.policy += by));
                let rejected = slope(at_rejected, |by| loss(&|pair| pair.rejected.policy += by));
                assert_slope(got.chosen.logp, chosen, &what)?;
                assert_slope(got.rejected.logp, rejected, &what)?;
                assert_slope(got.rejected.kl, slope(at_rejected, |by| loss(&|pair| pair.rejected.kl += by)), &what)?;
                // no derivative flows through the divergence of the chosen response
                prop_assert_eq!(got.chosen.kl, 0.0);
            }
            Objective::Unpaired(unpaired) => {
                for desirable in [true, false] {
                    let at = |by: f64| {
                        let response = Response { policy: pair.chosen.policy + by, ..pair.chosen };
                        unpaired.evaluate(&Labelled { response, desirable }, shift)
                    };
                    let expected = slope(step(&objective, beta, &pair.chosen), |by| at(by).loss);
                    assert_slope(at(0.0).derivative.logp, expected, &what)?;
                }
            }
        }
    }

    #[test]
    fn finite_numbers_give_finite_results((objective, _) in any_objective(), pair in any_pair(), shift in -1e6f64..1e6) {
        match objective {
            Objective::Pairwise(pairwise) => {
                for stretch in [1.0, 1e3, 1e8] {
                    let scaled = |r: Response| Response { policy: r.policy * stretch, reference: r.reference / stretch, ..r };
                    let pair = Pair { chosen: scaled(pair.chosen), rejected: scaled(pair.rejected), ..pair };
                    let got = pairwise.evaluate(&pair);
                    let all = [got.loss, got.chosen.logp, got.rejected.logp, got.rejected.kl, got.reward_chosen];
                    prop_assert!(all.iter().all(|x| x.is_finite()), "{pairwise:?} {pair:?} {got:?}");
                }
            }
            Objective::Unpaired(unpaired) => {
                for desirable in [true, false] {
                    let got = unpaired.evaluate(&Labelled { response: pair.chosen, desirable }, shift);
                    prop_assert!([got.loss, got.derivative.logp, got.reward].iter().all(|x| x.is_finite()));
                }
            }
        }
    }

    /// Adding the same to policy and reference changes nothing but rounding.
    #[test]
    fn only_log_ratios_count((objective, _) in any_objective(), pair in any_pair(), by in -50.0f64..50.0) {
        if let (Objective::Pairwise(pairwise), true) = (objective, objective.uses_reference()) {
            let mut moved = pair;
            moved.chosen.policy += by;
            moved.chosen.reference += by;
            let (here, there) = (pairwise.evaluate(&pair), pairwise.evaluate(&moved));
            let bar = 1e-10 * (1.0 + pair.chosen.policy.abs()) * (1.0 + here.chosen.logp.abs());
            prop_assert!((here.loss - there.loss).abs() <= bar, "{pairwise:?} {pair:?}");
        }
    }

    // --- identities

    /// ℓ(−h) − ℓ(h) = βh without smoothing, and smoothing by ε is a share ε of swapped pairs.
    #[test]
    fn smoothing_is_a_share_of_swapped_pairs(beta in 0.005f64..5.0, epsilon in 0.0f64..0.499, pair in any_pair()) {
        let swapped = Pair { chosen: pair.rejected, rejected: pair.chosen, ..pair };
        let (here, there) = (dpo(beta, 0.0).evaluate(&pair), dpo(beta, 0.0).evaluate(&swapped));
        let margin = here.reward_chosen - here.reward_rejected;
        let bar = 1e-13 * (1.0 + margin.abs());
        prop_assert!((there.loss - here.loss - margin).abs() <= bar);
        prop_assert!((here.chosen.logp + there.chosen.logp + beta).abs() <= 1e-13 * beta);
        let smoothed = dpo(beta, epsilon).evaluate(&pair);
        prop_assert!((smoothed.loss - ((1.0 - epsilon) * here.loss + epsilon * there.loss)).abs() <= bar);
        let slope = (1.0 - epsilon) * here.chosen.logp + epsilon * there.rejected.logp;
        prop_assert!((smoothed.chosen.logp - slope).abs() <= 1e-13 * beta);
    }

    /// The expectation of robust DPO over labels that are flipped with probability ε is DPO on clean labels.
    #[test]
    fn robust_dpo_on_flipped_labels_is_dpo_on_clean_ones(beta in 0.005f64..5.0, epsilon in 0.0f64..0.45, pair in any_pair()) {
        let robust = Pairwise::RobustDpo { beta, label_smoothing: epsilon };
        let swapped = Pair { chosen: pair.rejected, rejected: pair.chosen, ..pair };
        let (right, wrong, clean) = (robust.evaluate(&pair), robust.evaluate(&swapped), dpo(beta, 0.0).evaluate(&pair));
        let bar = 1e-12 * (1.0 + (clean.reward_chosen - clean.reward_rejected).abs());
        prop_assert!(((1.0 - epsilon) * right.loss + epsilon * wrong.loss - clean.loss).abs() <= bar);
        let slope = (1.0 - epsilon) * right.chosen.logp + epsilon * wrong.rejected.logp;
        prop_assert!((slope - clean.chosen.logp).abs() <= 1e-12 * beta);
    }

    /// DPO of the second step (reference π_r, temperature β/λ) is MODPO with the first step's implicit margins and weight
    /// λ under π_ref, and that is primal–dual DPO at a fixed multiplier λ: the label follows
    /// [β·log(π/π_ref) − β·log(π_r/π_ref)]/λ, the constraint's value that the Lagrangian's optimum implies.
    #[test]
    fn step_two_is_modpo_is_primal_dual_dpo(
        beta in 0.01f64..2.0, lambda in 0.05f64..20.0,
        policy in [-200.0f64..0.0, -200.0f64..0.0], first in [-200.0f64..0.0, -200.0f64..0.0],
        base in [-200.0f64..0.0, -200.0f64..0.0],
    ) {
        let step_two = dpo(beta / lambda, 0.0).evaluate(&pair(policy[0], policy[1], first[0], first[1]));

        let implicit = |i: usize| beta * (first[i] - base[i]);
        let under_base = Pair { margin: implicit(0) - implicit(1), ..pair(policy[0], policy[1], base[0], base[1]) };
        let modpo = Pairwise::Modpo { beta, weight: lambda }.evaluate(&under_base);

        let value = |i: usize| (beta * (policy[i] - base[i]) - implicit(i)) / lambda;
        let x = value(0) - value(1);
        let primal_dual = if x > 0.0 { (-x).exp().ln_1p() } else { x.exp().ln_1p() - x };
        let primal_dual_slope = -(beta / lambda) / (1.0 + x.exp());

        let bar = 1e-12 * (1.0 + beta / lambda * 400.0);
        for (loss, slopes) in [
            (modpo.loss, [modpo.chosen.logp, modpo.rejected.logp]),
            (primal_dual, [primal_dual_slope, -primal_dual_slope]),
        ] {
            prop_assert!((step_two.loss - loss).abs() <= bar, "{} {}", step_two.loss, loss);
            prop_assert!((step_two.chosen.logp - slopes[0]).abs() <= bar * beta / lambda);
            prop_assert!((step_two.rejected.logp - slopes[1]).abs() <= bar * beta / lambda);
        }
    }

    #[test]
    fn safe_dpo_prefers_the_safe_response(beta in 0.01f64..2.0, delta in 0.0f64..10.0, pair in any_pair()) {
        let safe = Pairwise::SafeDpo { beta, delta };
        let flagged = |is_unsafe| Pair { is_unsafe, ..pair };
        let swapped = Pair { chosen: pair.rejected, rejected: pair.chosen, is_unsafe: [false, true], ..pair };
        let (mirrored, expected) = (safe.evaluate(&flagged([true, false])), safe.evaluate(&swapped));
        prop_assert_eq!(mirrored.loss, expected.loss);
        prop_assert_eq!((mirrored.chosen, mirrored.rejected), (expected.rejected, expected.chosen));
        prop_assert_eq!(safe.evaluate(&flagged([false, false])), dpo(beta, 0.0).evaluate(&pair));
        let neither = safe.evaluate(&flagged([true, true]));
        prop_assert_eq!((neither.loss, neither.chosen.logp, neither.rejected.logp), (0.0, 0.0, 0.0));
    }

    #[test]
    fn kto_stays_finite_and_bounded(
        beta in -3.0f64..1.0, weights in [0.01f64..100.0, 0.01f64..100.0],
        ratios in prop::collection::vec(-1e4f64..1e4, 1..40), labels in 0..3, mismatched in prop::collection::vec(-1e4f64..1e4, 0..40),
    ) {
        let kto = Unpaired::Kto { beta: 10f64.powf(beta), desirable_weight: weights[0], undesirable_weight: weights[1] };
        let shift = Unpaired::kl_estimate(&mismatched);
        prop_assert!(shift.is_finite() && shift >= 0.0);
        for (i, ratio) in ratios.into_iter().enumerate() {
            // all desirable, all undesirable, and one undesirable example among many
            let desirable = [true, false, i > 0][labels as usize];
            let got = kto.evaluate(&Labelled { response: response(ratio, 0.0), desirable }, shift);
            let weight = weights[usize::from(!desirable)];
            prop_assert!((0.0..=weight).contains(&got.loss) && got.derivative.logp.abs() <= weight * 10f64.powf(beta) / 4.0);
            // a desirable response is never made less likely, an undesirable one never more
            let towards = if desirable { -got.derivative.logp } else { got.derivative.logp };
            prop_assert!(towards >= 0.0);
        }
    }

    #[test]
    fn a_running_mean_is_the_mean_of_everything(batches in prop::collection::vec(prop::collection::vec(-1e3f64..1e3, 0..9), 0..9)) {
        let mut running = RunningMean::default();
        let last = batches.iter().map(|batch| running.update(batch)).last().unwrap_or(0.0);
        let all = batches.concat();
        prop_assert_eq!((running.mean, running.count), (last, all.len() as u64));
        prop_assert!((running.mean - all.iter().sum::<f64>() / all.len().max(1) as f64).abs() <= 1e-11);
    }
}

// --- names and parameters

#[test]
fn the_weight_rule_is_that_of_the_paper() {
    let rule = |counts, weights| WeightRule::new(counts, weights);
    // balanced data need no weights
    assert_eq!(rule([500, 500], [1.0, 1.0]), WeightRule { ratio: 1.0, desirable_weight: Some([1.0, 4.0 / 3.0]) });
    assert!(rule([500, 500], [1.0, 1.0]).holds());
    // one desirable example to ten undesirable ones
    let imbalanced = rule([100, 1000], [1.0, 1.0]);
    assert!(!imbalanced.holds());
    let [low, high] = imbalanced.desirable_weight.unwrap();
    assert_close(low, 10.0, 1e-15);
    assert_close(high, 40.0 / 3.0, 1e-15);
    for (weight, holds) in [(low, true), (high, true), (0.99 * low, false), (1.01 * high, false)] {
        assert_eq!(rule([100, 1000], [weight, 1.0]).holds(), holds, "{weight}");
    }
    // what counts is the product of weight and number
    assert!(rule([1000, 100], [1.0, 10.0]).holds() && !rule([1000, 100], [1.0, 11.0]).holds());
    for counts in [[0, 10], [10, 0], [0, 0]] {
        let one_class = rule(counts, [1.0, 1.0]);
        assert!(!one_class.holds() && one_class.desirable_weight.is_none(), "{one_class:?}");
    }
}

#[test]
fn every_name_builds_the_objective_of_that_name() {
    for name in NAMES {
        assert_eq!(build(name, 0.1).name(), *name);
    }
    assert_eq!(pairwise(build("dpo", 0.1)), dpo(0.1, 0.0));
    assert_eq!(pairwise(build("simpo", 2.0)), Pairwise::SimPo { beta: 2.0, gamma: 0.5 });
    assert!(Options { label_smoothing: Some(0.499), ..Options::default() }.build("dpo", f64::MIN_POSITIVE).is_ok());
}

fn refused(options: &Options, name: &str, beta: f64, words: &[&str]) {
    let error = options.build(name, beta).unwrap_err();
    assert!(matches!(error, engine::Error::Input(_)), "{error:?}");
    for word in words {
        assert!(error.to_string().contains(word), "`{word}` is not in: {error}");
    }
}

#[test]
fn parameters_out_of_range_are_input_errors() {
    let none = Options::default();
    for beta in [0.0, -0.1, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for name in NAMES {
            refused(&none, name, beta, &["beta", name, "positive"]);
        }
    }
    refused(&none, "ppo", 0.1, &["no objective `ppo`", "`dpo`", "`sft`"]);
    let all: [(&str, &[&str], &[f64]); 7] = [
        ("label_smoothing", &["dpo", "robust-dpo", "exo"], &[-0.01, 0.5, 1.0]),
        ("desirable_weight", &["kto"], &[0.0, -1.0]),
        ("undesirable_weight", &["kto"], &[0.0, -1.0]),
        ("gamma", &["simpo"], &[-0.1]),
        ("alpha", &["cpo", "tdpo"], &[-0.1]),
        ("delta", &["safe-dpo"], &[-0.1]),
        ("weight", &["modpo"], &[0.0, -1.0]),
    ];
    for (parameter, owners, bad) in all {
        for name in NAMES {
            if !owners.contains(name) {
                refused(&with(parameter, 0.3), name, 0.1, &[parameter, name, "no such parameter", owners[0]]);
                continue;
            }
            assert!(with(parameter, 0.3).build(name, 0.1).is_ok(), "{parameter} of {name}");
            for value in bad.iter().chain(&[f64::NAN, f64::INFINITY]) {
                refused(&with(parameter, *value), name, 0.1, &[parameter, name]);
            }
        }
    }
    refused(&with("label_smoothing", 0.0), "exo", 0.1, &["smoothing", "`exo`", "0.001"]);
    for name in NAMES.iter().filter(|name| **name != "ipo") {
        refused(&Options { sum_logps: Some(true), ..none.clone() }, name, 0.1, &["sum_logps", name, "`ipo`"]);
    }
}
