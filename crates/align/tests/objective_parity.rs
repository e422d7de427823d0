//! The objectives against the losses and gradients of TRL's trainers (`scripts/make_objective_fixture.py`).

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use align::objective::{Labelled, NAMES, Objective, Options, Pair, Pairwise, Response, RunningMean, Unpaired};
use serde_json::Value;

/// Losses of squares (`sppo`, `ipo` on sums) are as large as 3e5 here, and differ by rounding alone.
const ABSOLUTE: f64 = 1e-9;

fn fixture() -> Value {
    serde_json::from_str(include_str!("fixtures/objectives.json")).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

fn flags(value: &Value) -> Vec<bool> {
    value.as_array().unwrap().iter().map(|flag| flag.as_bool().unwrap()).collect()
}

fn objective(case: &Value) -> Objective {
    let option = |name: &str| case["options"][name].as_f64();
    let options = Options {
        label_smoothing: option("label_smoothing"),
        desirable_weight: option("desirable_weight"),
        undesirable_weight: option("undesirable_weight"),
        gamma: option("gamma"),
        alpha: option("alpha"),
        delta: option("delta"),
        weight: option("weight"),
        sum_logps: case["options"]["sum_logps"].as_bool(),
    };
    options.build(case["objective"].as_str().unwrap(), case["beta"].as_f64().unwrap()).unwrap()
}

fn pairs(inputs: &Value) -> Vec<Pair> {
    let response = |side: &str, i: usize| Response {
        policy: inputs[format!("policy_{side}")][i].as_f64().unwrap(),
        reference: inputs[format!("ref_{side}")][i].as_f64().unwrap(),
        len: inputs[format!("len_{side}")][i].as_u64().unwrap() as usize,
        kl: inputs[format!("kl_{side}")][i].as_f64().unwrap(),
    };
    let is_unsafe = |side: &str, i: usize| inputs[format!("unsafe_{side}")][i].as_bool().unwrap();
    (0..numbers(&inputs["margin"]).len())
        .map(|i| Pair {
            chosen: response("chosen", i),
            rejected: response("rejected", i),
            is_unsafe: [is_unsafe("chosen", i), is_unsafe("rejected", i)],
            margin: inputs["margin"][i].as_f64().unwrap(),
        })
        .collect()
}

/// Loss, and derivatives of chosen and rejected log-probability and KL.
fn evaluate(objective: &Objective, pair: &Pair) -> (f64, [f64; 4]) {
    match objective {
        Objective::Pairwise(pairwise) => {
            let got = pairwise.evaluate(pair);
            (got.loss, [got.chosen.logp, got.rejected.logp, got.chosen.kl, got.rejected.kl])
        }
        Objective::Unpaired(sft) => {
            assert_eq!(*sft, Unpaired::Sft);
            // TRL's is a mean over tokens
            let got = sft.evaluate(&Labelled { response: pair.chosen, desirable: true }, 0.0);
            let tokens = pair.chosen.len as f64;
            (got.loss / tokens, [got.derivative.logp / tokens, 0.0, 0.0, 0.0])
        }
    }
}

/// The largest absolute deviation of a case's losses and gradients.
fn pairwise_deviation(case: &Value, pairs: &[Pair]) -> f64 {
    let objective = objective(case);
    let expected = ["losses", "grad_chosen", "grad_rejected"].map(|key| numbers(&case[key]));
    let expected_kl = ["grad_kl_chosen", "grad_kl_rejected"].map(|key| case.get(key).map(numbers));
    assert_eq!(expected_kl[0].is_some(), matches!(objective, Objective::Pairwise(Pairwise::Tdpo { .. })));
    let mut largest = 0.0f64;
    for (i, pair) in pairs.iter().enumerate() {
        let (loss, derivatives) = evaluate(&objective, pair);
        let [loss_expected, chosen, rejected] = [0, 1, 2].map(|k| expected[k][i]);
        let [kl_chosen, kl_rejected] = [0, 1].map(|k| expected_kl[k].as_ref().map_or(0.0, |kl| kl[i]));
        largest = largest.max((loss - loss_expected).abs());
        for (got, expected) in derivatives.iter().zip([chosen, rejected, kl_chosen, kl_rejected]) {
            // not f64::max, which passes over NaN
            largest = if (got - expected).abs() <= largest { largest } else { (got - expected).abs() };
        }
        assert!(largest <= ABSOLUTE, "{} β {}, pair {i}: off by {largest}", case["objective"], case["beta"]);
    }
    largest
}

fn unpaired_deviation(case: &Value, batches: &[Value]) -> f64 {
    let Objective::Unpaired(objective) = objective(case) else { panic!("{case} is not unpaired") };
    let beta = case["beta"].as_f64().unwrap();
    let mut delta = RunningMean::default();
    let mut largest = 0.0f64;
    let expected = case["batches"].as_array().unwrap();
    assert_eq!(batches.len(), expected.len());
    for (number, (batch, expected)) in batches.iter().zip(expected).enumerate() {
        let [policy, reference, policy_kl, ref_kl] =
            ["policy", "ref", "policy_kl", "ref_kl"].map(|key| numbers(&batch[key]));
        let ratios = |policy: &[f64], reference: &[f64]| -> Vec<f64> {
            policy.iter().zip(reference).map(|(policy, reference)| policy - reference).collect()
        };
        let shift = match objective {
            Unpaired::Kto { .. } => Unpaired::kl_estimate(&ratios(&policy_kl, &ref_kl)),
            _ => delta.update(&ratios(&policy, &reference).iter().map(|ratio| beta * ratio).collect::<Vec<_>>()),
        };
        let (losses, grads) = (numbers(&expected["losses"]), numbers(&expected["grad"]));
        let mut deviations = vec![(shift - expected["shift"].as_f64().unwrap()).abs()];
        for (i, desirable) in flags(&batch["desirable"]).into_iter().enumerate() {
            let response = Response { policy: policy[i], reference: reference[i], len: 1, kl: 0.0 };
            let got = objective.evaluate(&Labelled { response, desirable }, shift);
            deviations.extend([(got.loss - losses[i]).abs(), (got.derivative.logp - grads[i]).abs()]);
        }
        for deviation in deviations {
            assert!(deviation <= ABSOLUTE, "{} β {beta}, batch {number}: off by {deviation}", case["objective"]);
            largest = largest.max(deviation);
        }
    }
    largest
}

#[test]
fn losses_and_gradients_equal_trl() {
    let fixture = fixture();
    let pairs = pairs(&fixture["pairs"]);
    let batches = fixture["batches"].as_array().unwrap();
    let mut seen = BTreeSet::new();
    let mut sources = BTreeSet::new();
    let mut largest = 0.0f64;
    for (key, unpaired) in [("pairwise", false), ("unpaired", true)] {
        for case in fixture[key].as_array().unwrap() {
            let deviation = if unpaired { unpaired_deviation(case, batches) } else { pairwise_deviation(case, &pairs) };
            println!(
                "{} β {} {} ({}): {deviation:.1e}",
                case["objective"], case["beta"], case["options"], case["source"]
            );
            largest = largest.max(deviation);
            seen.insert(case["objective"].as_str().unwrap());
            sources.insert(case["source"].as_str().unwrap());
        }
    }
    println!("largest deviation: {largest:.1e}");
    assert_eq!(seen, NAMES.iter().copied().collect());
    assert_eq!(sources.into_iter().collect::<Vec<_>>(), ["TRL 0.8.6", "TRL 1.13.0", "TRL 1.16.0", "formula"]);
}
