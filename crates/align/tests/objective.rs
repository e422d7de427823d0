//! The objectives against values calculated elsewhere, finite differences, and identities.

#![allow(clippy::unwrap_used)]

use align::objective::{Objective, PairLogps, PairLoss};
use proptest::prelude::*;

fn pair(policy_chosen: f64, policy_rejected: f64, ref_chosen: f64, ref_rejected: f64) -> PairLogps {
    PairLogps { policy_chosen, policy_rejected, ref_chosen, ref_rejected, len_chosen: 12, len_rejected: 7 }
}

fn dpo(beta: f64, label_smoothing: f64) -> Objective {
    Objective::dpo(beta, label_smoothing).unwrap()
}

fn assert_close(actual: f64, expected: f64, tolerance: f64) {
    let scale = expected.abs().max(1.0);
    assert!((actual - expected).abs() <= tolerance * scale, "{actual} is not {expected} within {tolerance}");
}

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
        assert_close(got.d_chosen, d_chosen, 1e-14);
        assert_close(got.d_rejected, -d_chosen, 1e-14);
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
        assert_eq!((got.d_chosen, got.d_rejected), (-0.05, 0.05));
    }
}

/// Far out, −log σ(z) is −z or e^−z to the last bit, and the slope is β or e^−z·β.
#[test]
fn the_tails_neither_overflow_nor_lose_precision() {
    let at = |h: f64| dpo(1.0, 0.0).evaluate(&pair(h, 0.0, 0.0, 0.0));
    assert_eq!((at(-1e6).loss, at(-1e6).d_chosen), (1e6, -1.0));
    assert_eq!((at(1e6).loss, at(1e6).d_chosen), (0.0, 0.0));
    let expected = (-50.0f64).exp();
    assert!((at(50.0).loss / expected - 1.0).abs() < 1e-15);
    assert!((at(50.0).d_chosen / -expected - 1.0).abs() < 1e-15);
    let smoothed = dpo(1.0, 0.25).evaluate(&pair(1e6, 0.0, 0.0, 0.0));
    assert_eq!((smoothed.loss, smoothed.d_chosen), (0.25e6, 0.25));
}

#[test]
fn a_broken_log_probability_shows_in_the_loss() {
    for broken in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for logps in [pair(broken, -1.0, -1.0, -1.0), pair(-1.0, broken, -1.0, -1.0), pair(-1.0, -1.0, broken, -1.0)] {
            for epsilon in [0.0, 0.1] {
                assert!(!dpo(0.1, epsilon).evaluate(&logps).loss.is_finite(), "{logps:?}");
            }
        }
    }
}

#[test]
fn parameters_out_of_range_are_input_errors() {
    for beta in [0.0, -0.1, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let error = Objective::dpo(beta, 0.0).unwrap_err();
        assert!(matches!(error, engine::Error::Input(_)) && error.to_string().contains("beta"), "{error}");
        assert!(dpo(0.1, 0.0).at_temperature(beta).is_err());
    }
    for epsilon in [-0.01, 0.5, 1.0, f64::NAN] {
        let error = Objective::dpo(0.1, epsilon).unwrap_err();
        assert!(matches!(error, engine::Error::Input(_)) && error.to_string().contains("label smoothing"), "{error}");
    }
    assert!(Objective::dpo(f64::MIN_POSITIVE, 0.499).is_ok());
}

#[test]
fn a_temperature_changes_beta_alone() {
    let cooler = dpo(0.1, 0.2).at_temperature(0.025).unwrap();
    assert_eq!(cooler, Objective::Dpo { beta: 0.025, label_smoothing: 0.2 });
    assert_eq!((cooler.name(), cooler.beta()), ("dpo", 0.025));
}

fn objectives() -> impl Strategy<Value = Objective> {
    (0.005f64..5.0, 0.0f64..0.499).prop_map(|(beta, epsilon)| dpo(beta, epsilon))
}

fn logps(bound: f64) -> impl Strategy<Value = PairLogps> {
    let one = move || -bound..0.0;
    (one(), one(), one(), one()).prop_map(|(pc, pr, rc, rr)| pair(pc, pr, rc, rr))
}

/// Central difference of the loss as `change` moves a log-probability by ±`step`.
fn slope(objective: &Objective, logps: PairLogps, step: f64, change: fn(&mut PairLogps, f64)) -> f64 {
    let loss = |by| {
        let mut moved = logps;
        change(&mut moved, by);
        objective.evaluate(&moved).loss
    };
    (loss(step) - loss(-step)) / (2.0 * step)
}

proptest! {
    #[test]
    fn derivatives_equal_finite_differences(objective in objectives(), logps in logps(20.0)) {
        let got = objective.evaluate(&logps);
        let step = 1e-4 / objective.beta().max(1.0);
        let chosen = slope(&objective, logps, step, |logps, by| logps.policy_chosen += by);
        let rejected = slope(&objective, logps, step, |logps, by| logps.policy_rejected += by);
        prop_assert!((got.d_chosen - chosen).abs() <= 1e-6, "{} {}", got.d_chosen, chosen);
        prop_assert!((got.d_rejected - rejected).abs() <= 1e-6, "{} {}", got.d_rejected, rejected);
    }

    #[test]
    fn all_is_finite_and_within_bounds(objective in objectives(), logps in logps(1e6)) {
        let PairLoss { loss, d_chosen, d_rejected, reward_chosen, reward_rejected } = objective.evaluate(&logps);
        prop_assert!([loss, d_chosen, d_rejected, reward_chosen, reward_rejected].iter().all(|x| x.is_finite()));
        prop_assert!(loss >= 0.0 && d_chosen.abs() <= objective.beta());
        prop_assert_eq!(d_chosen, -d_rejected);
    }

    /// ℓ(h) of flipped labels is ℓ(−h), and without smoothing ℓ(−h) − ℓ(h) = βh.
    #[test]
    fn swapping_the_responses_mirrors_the_loss(beta in 0.005f64..5.0, epsilon in 0.0f64..0.499, logps in logps(50.0)) {
        let swapped = pair(logps.policy_rejected, logps.policy_chosen, logps.ref_rejected, logps.ref_chosen);
        let (here, there) = (dpo(beta, 0.0).evaluate(&logps), dpo(beta, 0.0).evaluate(&swapped));
        let margin = here.reward_chosen - here.reward_rejected;
        prop_assert!((there.loss - here.loss - margin).abs() <= 1e-9);
        prop_assert!((here.d_chosen + there.d_chosen + beta).abs() <= 1e-12);
        // Smoothing by ε is a share ε of swapped pairs.
        let smoothed = dpo(beta, epsilon).evaluate(&logps);
        prop_assert!((smoothed.loss - ((1.0 - epsilon) * here.loss + epsilon * there.loss)).abs() <= 1e-9);
        prop_assert!((smoothed.d_chosen - ((1.0 - epsilon) * here.d_chosen + epsilon * there.d_rejected)).abs() <= 1e-12);
    }

    /// The same constant added to policy and reference changes nothing but rounding.
    #[test]
    fn only_log_ratios_count(objective in objectives(), logps in logps(50.0), shift in -50.0f64..50.0) {
        let moved = PairLogps {
            policy_chosen: logps.policy_chosen + shift,
            ref_chosen: logps.ref_chosen + shift,
            ..logps
        };
        prop_assert!((objective.evaluate(&logps).loss - objective.evaluate(&moved).loss).abs() <= 1e-10);
    }
}
