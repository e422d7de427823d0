use std::path::PathBuf;

use engine::checkpoint::load_model;
use serde_json::Value;

use super::*;
use crate::data::TokenizedPair;
use crate::objective::Pairwise;
use crate::reference::pair_logps;
use crate::task::{Demonstration, Demonstrations, Preferences};

/// Watches nothing; asks to stop after the given step.
struct StopAfter(u64, u64);

impl Monitor for StopAfter {
    fn step(&mut self, _: u64, record: &StepRecord) {
        self.1 = record.step;
    }

    fn stop_requested(&self) -> bool {
        self.1 == self.0
    }
}

fn never() -> StopAfter {
    StopAfter(u64::MAX, 0)
}

fn options() -> TrainOptions {
    TrainOptions {
        learning_rate: 5e-3,
        schedule: Schedule::Linear,
        warmup_ratio: 0.2,
        epochs: 1,
        batch_size: 4,
        micro_batch_tokens: 1000,
        memory_bytes: None,
        max_grad_norm: 9.0,
        weight_decay: 0.1,
        seed: 3,
        save_every: 0,
    }
}

fn crates() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

fn tiny(name: &str) -> Model {
    load_model(&crates().join("engine/tests/fixtures/tiny").join(name)).unwrap()
}

fn fixture() -> Value {
    serde_json::from_str(&std::fs::read_to_string(crates().join("align/tests/fixtures/dpo_steps.json")).unwrap())
        .unwrap()
}

fn tokens(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

/// The fixture's pairs, arranged so that the trainer's shuffle visits them in the fixture's order.
fn pairs(fixture: &Value) -> Vec<TokenizedPair> {
    let in_order: Vec<&Value> =
        fixture["batches"].as_array().unwrap().iter().flat_map(|b| b.as_array().unwrap()).collect();
    let mut pairs = vec![None; in_order.len()];
    for (pair, place) in in_order.iter().zip(epoch_order(in_order.len(), options().seed, 0)) {
        pairs[place] = Some(TokenizedPair {
            prompt: tokens(&pair["prompt"]),
            chosen: tokens(&pair["chosen"]),
            rejected: tokens(&pair["rejected"]),
            row: place + 1,
        });
    }
    pairs.into_iter().map(Option::unwrap).collect()
}

fn reference(model: &Model, pairs: &[TokenizedPair]) -> Vec<[f64; 2]> {
    pair_logps(model, pairs, 50, None, &mut |_| Ok(())).unwrap()
}

const DPO: Pairwise = Pairwise::Dpo { beta: 0.5, label_smoothing: 0.0 };

fn close(value: f64, expected: &Value, what: &str) {
    let expected = expected.as_f64().unwrap();
    assert!((value - expected).abs() <= 1e-4 * expected.abs(), "{what}: {value} instead of {expected}");
}

/// Mean loss and metrics of all examples.
fn evaluate(policy: &Model, task: &dyn Task, options: &TrainOptions) -> Means {
    let all: Vec<usize> = (0..task.len()).collect();
    Passes::new(policy, task, options).means(&policy.weights, task, &all)
}

#[test]
fn a_training_of_one_step_moves_the_weights() {
    let mut policy = tiny("tied");
    let start = policy.clone();
    let demonstrations = [Demonstration { prompt: vec![5, 6], response: vec![7, 8, 2] }];
    let folder = tempfile::tempdir().unwrap();
    train(&mut policy, &Demonstrations(&demonstrations), &options(), folder.path(), &mut never()).unwrap();
    assert_ne!(policy.weights, start.weights);
}

#[test]
fn ten_dpo_steps_equal_pytorchs() {
    let fixture = fixture();
    let pairs = pairs(&fixture);
    for name in ["tied", "untied_gqa"] {
        let mut policy = tiny(name);
        let expected = &fixture["models"][name];
        let reference = reference(&policy, &pairs);
        let folder = tempfile::tempdir().unwrap();
        let task = Preferences::new(&pairs, &reference, &DPO);
        let records = train(&mut policy, &task, &options(), folder.path(), &mut never()).unwrap();
        assert_eq!(records.len(), 10);
        for (record, expected) in records.iter().zip(expected["steps"].as_array().unwrap()) {
            close(record.loss, &expected["loss"], &format!("{name} loss of step {}", record.step));
            close(record.grad_norm, &expected["grad_norm"], &format!("{name} norm of step {}", record.step));
            close(record.metrics["logps/chosen"], &expected["logps_chosen"], "chosen");
            close(record.metrics["logps/rejected"], &expected["logps_rejected"], "rejected");
            assert!((record.learning_rate - expected["lr"].as_f64().unwrap()).abs() < 1e-12);
        }
        for spec in &policy.layout.specs {
            let weights = &policy.weights[spec.range.clone()];
            let total: f64 = weights.iter().map(|w| f64::from(w.abs())).sum();
            close(total, &expected["final_weights"][&spec.name]["abs_sum"], &spec.name);
        }
    }
}

#[test]
fn the_first_gradient_equals_pytorchs() {
    let fixture = fixture();
    let pairs = pairs(&fixture);
    for name in ["tied", "untied_gqa"] {
        let policy = tiny(name);
        let reference = reference(&policy, &pairs);
        let task = Preferences::new(&pairs, &reference, &DPO);
        let order = epoch_order(pairs.len(), options().seed, 0);
        let mut gradient = vec![0.0; policy.layout.len];
        Passes::new(&policy, &task, &options()).gradient(&policy.weights, &task, &order[..4], &mut gradient);
        for spec in &policy.layout.specs {
            let expected = &fixture["models"][name]["first_gradient"][&spec.name];
            let part = &gradient[spec.range.clone()];
            let norm = part.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
            close(norm, &expected["norm"], &spec.name);
            for (g, expected) in part.iter().zip(expected["head"].as_array().unwrap()) {
                assert!((f64::from(*g) - expected.as_f64().unwrap()).abs() < 1e-4 * norm, "{}", spec.name);
            }
        }
    }
}

#[test]
fn the_first_margin_is_exactly_zero_whatever_the_cut() {
    let pairs = pairs(&fixture());
    let policy = tiny("untied_gqa");
    let reference = reference(&policy, &pairs);
    let task = Preferences::new(&pairs, &reference, &DPO);
    for micro_batch_tokens in [1, 30, 10_000] {
        let means = evaluate(&policy, &task, &TrainOptions { micro_batch_tokens, ..options() });
        assert_eq!(means.metrics["rewards/margins"], 0.0);
        assert!((means.loss - std::f64::consts::LN_2).abs() < 1e-14);
    }
}

#[test]
fn loss_and_gradient_do_not_depend_on_the_cut_or_on_recomputing() {
    let pairs = pairs(&fixture());
    let policy = tiny("untied_gqa");
    let reference: Vec<[f64; 2]> = reference(&policy, &pairs).iter().map(|[c, r]| [c + 0.3, r - 0.2]).collect();
    let task = Preferences::new(&pairs, &reference, &DPO);
    let all: Vec<usize> = (0..pairs.len()).collect();
    let run = |options: TrainOptions| {
        let mut gradient = vec![0.0; policy.layout.len];
        let mut passes = Passes::new(&policy, &task, &options);
        let (means, _) = passes.gradient(&policy.weights, &task, &all, &mut gradient);
        (passes.keep, means, gradient)
    };
    let (keep, whole, gradient) = run(TrainOptions { micro_batch_tokens: 10_000, ..options() });
    assert_eq!(keep, Keep::All);
    for (micro_batch_tokens, memory_bytes) in [(1, None), (40, None), (10_000, Some(1))] {
        let (keep, means, other) = run(TrainOptions { micro_batch_tokens, memory_bytes, ..options() });
        assert_eq!(keep == Keep::Inputs, memory_bytes.is_some());
        assert!((means.loss - whole.loss).abs() < 1e-12);
        let norm = global_norm(&gradient);
        let difference: Vec<f32> = gradient.iter().zip(&other).map(|(a, b)| a - b).collect();
        assert!(global_norm(&difference) < 1e-5 * norm);
    }
}

#[test]
fn a_stopped_training_continues_bit_exactly() {
    let pairs = pairs(&fixture());
    let start = tiny("tied");
    let reference = reference(&start, &pairs);
    let task = Preferences::new(&pairs, &reference, &DPO);
    let options = TrainOptions { epochs: 2, ..options() };
    let whole_folder = tempfile::tempdir().unwrap();
    let mut whole = start.clone();
    train(&mut whole, &task, &options, whole_folder.path(), &mut never()).unwrap();

    let folder = tempfile::tempdir().unwrap();
    for stop in [3, 13, 17] {
        let mut policy = start.clone();
        let error = train(&mut policy, &task, &options, folder.path(), &mut StopAfter(stop, 0)).unwrap_err();
        assert!(matches!(error, Error::Interrupted(_)), "{error}");
    }
    let mut policy = start.clone();
    let rest = train(&mut policy, &task, &options, folder.path(), &mut never()).unwrap();
    assert_eq!(rest.len(), 3);
    assert_eq!(policy.weights, whole.weights);
    let losses = |folder: &Path| -> Vec<String> {
        let text = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
        text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()["loss"].to_string()).collect()
    };
    assert_eq!(losses(folder.path()), losses(whole_folder.path()));

    // a state of another training is refused
    let other = TrainOptions { learning_rate: 1e-3, ..options };
    train(&mut start.clone(), &task, &other, folder.path(), &mut never()).unwrap_err();
    discard_state(folder.path()).unwrap();
    train(&mut start.clone(), &task, &other, folder.path(), &mut never()).unwrap();
}

#[test]
fn a_diverged_loss_names_the_rows() {
    let pairs = pairs(&fixture());
    let mut policy = tiny("tied");
    let mut reference = reference(&policy, &pairs);
    reference[6][0] = f64::NAN;
    let task = Preferences::new(&pairs, &reference, &DPO);
    let folder = tempfile::tempdir().unwrap();
    let error = train(&mut policy, &task, &options(), folder.path(), &mut never()).unwrap_err().to_string();
    assert!(error.contains("NaN") && error.contains("rows") && error.contains('7'), "{error}");
}

#[test]
fn demonstrations_are_learned_and_weighted_by_tokens() {
    let mut policy = tiny("tied");
    let demonstrations = [
        Demonstration { prompt: vec![5, 6], response: vec![7, 8, 2] },
        Demonstration { prompt: vec![9], response: vec![10, 2] },
    ];
    let task = Demonstrations(&demonstrations);
    let options = TrainOptions { epochs: 60, batch_size: 2, weight_decay: 0.0, max_grad_norm: 1.0, ..options() };
    let before = evaluate(&policy, &task, &options).loss;
    let mut decoder = Decoder::new(&policy, 8);
    let logps = decoder.logps(&policy.weights, &pack(&task, &[0, 1]));
    assert!((before + (logps[0] + logps[1]) / 5.0).abs() < 1e-9);
    let folder = tempfile::tempdir().unwrap();
    train(&mut policy, &task, &options, folder.path(), &mut never()).unwrap();
    assert!(evaluate(&policy, &task, &options).loss < 0.05);
}

#[test]
fn nothing_to_train_on_is_bad_input() {
    let folder = tempfile::tempdir().unwrap();
    let error = train(&mut tiny("tied"), &Demonstrations(&[]), &options(), folder.path(), &mut never()).unwrap_err();
    assert_eq!(error.exit_code(), 2);
}
