mod adapters;
mod scores;
mod shifts;
mod states;

use std::path::PathBuf;

use engine::checkpoint::load_model;
use engine::{Adapter, Decoder, Keep, Mixture, Model, Parameters, Precision};
use serde_json::Value;

use super::batches::epoch_order;
use super::*;
use crate::data::{Dataset, TokenizedExample, TokenizedPair, Tokens};
use crate::objective::{Objective, Pairwise, RunningMean, Unpaired};
use crate::reference;
use crate::sequences::{Packing, Sequences};
use crate::step::Alignment;
use crate::task::{Demonstration, Demonstrations, LabelledResponses, Preferences, Scored, longest, mismatched};

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

/// Trains all weights of a model, in place.
fn train_whole(
    model: &mut Model,
    task: &dyn Task,
    validation: Option<&dyn Task>,
    options: &TrainOptions,
    folder: &Path,
    monitor: &mut dyn Monitor,
) -> Result<Vec<StepRecord>> {
    let mut policy = Policy::Whole(model.clone());
    let records = train(&mut policy, task, validation, options, folder, monitor)?;
    let Policy::Whole(trained) = policy else { unreachable!() };
    *model = trained;
    Ok(records)
}

/// No sequence of the tests is longer.
const LONGEST: usize = 64;

const PACKING: Packing = Packing { for_scores: false, dropout: false };

/// How passes are made.
struct Cut {
    dtype: Precision,
    plan: MemoryPlan,
}

/// Passes of so many tokens in f32.
fn cut(micro_batch_tokens: usize, recompute: bool) -> Cut {
    let plan = MemoryPlan {
        micro_batch_tokens,
        largest_pass: micro_batch_tokens,
        behind: micro_batch_tokens,
        recompute,
        peak_bytes: 0,
    };
    Cut { dtype: Precision::F32, plan }
}

/// Passes of whole batches in f32.
fn whole() -> Cut {
    cut(10_000, false)
}

impl Cut {
    fn passes(&self, policy: &Policy) -> Passes {
        Passes::new(policy, self.dtype, LONGEST, &self.plan)
    }
}

/// What one gradient pass gives.
struct Pass {
    means: Means,
    tokens: usize,
    broken: Vec<usize>,
    running: RunningMean,
    gradient: Vec<f32>,
}

/// The gradient of a task's loss on some of its examples.
fn gradient(policy: &Policy, task: &dyn Task, examples: &[usize], cut: Cut) -> Pass {
    let mut gradient = vec![0.0; policy.weights().len()];
    let mut running = RunningMean::default();
    let mut passes = cut.passes(policy);
    let batch = Batch { task, step: 0, examples };
    let (means, tokens, broken) = passes.gradient(policy.parameters(Some(7)), &batch, &mut running, &mut gradient);
    Pass { means, tokens, broken, running, gradient }
}

fn never() -> StopAfter {
    StopAfter(u64::MAX, 0)
}

pub(super) fn options() -> TrainOptions {
    TrainOptions {
        lora: None,
        optimizer: OptimizerKind::AdamW,
        learning_rate: 5e-3,
        schedule: Schedule::Linear,
        warmup_ratio: 0.2,
        epochs: 1,
        batch_size: 4,
        dtype: Precision::F32,
        micro_batch_tokens: Some(1000),
        memory_bytes: None,
        max_grad_norm: 9.0,
        weight_decay: 0.1,
        seed: 3,
        save_every: 0,
        validate_every: 0,
        patience: None,
        ema_decay: None,
    }
}

fn crates() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

fn tiny(name: &str) -> Model {
    load_model(&crates().join("engine/tests/fixtures/tiny").join(name)).unwrap()
}

/// A tiny model whose weights have all moved a little.
fn moved(name: &str) -> Model {
    let mut model = tiny(name);
    let other = Model::random(model.config.clone(), 0.02, 5);
    model
        .weights
        .iter_mut()
        .zip(&other.weights)
        .for_each(|(weight, by)| *weight += by * f32::from(u8::from(*by != 1.0)));
    model
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
            prompt: tokens(&pair["prompt"]).into(),
            chosen: tokens(&pair["chosen"]).into(),
            rejected: tokens(&pair["rejected"]).into(),
            is_unsafe: None,
            margin: None,
            row: place + 1,
        });
    }
    pairs.into_iter().map(Option::unwrap).collect()
}

/// The pairs behind a system prompt.
fn behind_a_system_prompt(mut pairs: Vec<TokenizedPair>) -> Vec<TokenizedPair> {
    for pair in &mut pairs {
        pair.prompt = [&[1, 3, 4, 6, 5, 8, 2, 9, 7, 3], &*pair.prompt].concat().into();
    }
    pairs
}

/// The pairs with two prompts in turns, so that several pairs of a batch have the same.
fn with_two_prompts(mut pairs: Vec<TokenizedPair>) -> Vec<TokenizedPair> {
    let prompts = [0, 1].map(|pair| pairs[pair].prompt.clone());
    pairs.iter_mut().zip(prompts.iter().cycle()).for_each(|(pair, prompt)| pair.prompt = prompt.clone());
    pairs
}

fn scores<'a>(policy: impl Into<Mixture<'a>>, sequences: &[Sequences<'_>]) -> Vec<f64> {
    reference::logps(policy, sequences, Some(50), None, &mut |_| Ok(())).unwrap()
}

fn reference(model: &Model, pairs: &[TokenizedPair]) -> Vec<[f64; 2]> {
    reference_in(Precision::F32, model, pairs)
}

fn reference_in(dtype: Precision, model: &Model, pairs: &[TokenizedPair]) -> Vec<[f64; 2]> {
    let sequences: Vec<_> = pairs.iter().map(TokenizedPair::sequences).collect();
    scores(Mixture::from(model).with_precision(dtype), &sequences).as_chunks::<2>().0.to_vec()
}

const DPO: Pairwise = Pairwise::Dpo { beta: 0.5, label_smoothing: 0.0 };

fn close(value: f64, expected: &Value, what: &str) {
    let expected = expected.as_f64().unwrap();
    assert!((value - expected).abs() <= 1e-4 * expected.abs(), "{what}: {value} instead of {expected}");
}

/// Gradients that may differ in the order of their sums alone.
fn assert_close(gradient: &[f32], expected: &[f32]) {
    assert_within(1e-5, gradient, expected);
}

fn assert_within(tolerance: f64, gradient: &[f32], expected: &[f32]) {
    let difference: Vec<f32> = gradient.iter().zip(expected).map(|(a, b)| a - b).collect();
    let (error, norm) = (global_norm(&difference), global_norm(expected));
    assert!(norm > 0.0 && error < tolerance * norm, "{error} of {norm}");
}

/// Mean loss and metrics of all examples.
fn evaluate(policy: &Model, task: &dyn Task, cut: Cut) -> Means {
    let all: Vec<usize> = (0..task.len()).collect();
    let whole = Policy::Whole(policy.clone());
    let batch = Batch { task, step: 0, examples: &all };
    cut.passes(&whole).means((&policy.weights).into(), &batch, RunningMean::default()).0
}

#[test]
fn a_training_of_one_step_moves_the_weights() {
    let mut policy = tiny("tied");
    let start = policy.clone();
    let demonstrations = [Demonstration { prompt: vec![5, 6], response: vec![7, 8, 2] }];
    let folder = tempfile::tempdir().unwrap();
    train_whole(&mut policy, &Demonstrations(&demonstrations), None, &options(), folder.path(), &mut never()).unwrap();
    assert_ne!(policy.weights, start.weights);
}

#[test]
fn ten_dpo_steps_equal_pytorchs() {
    let fixture = fixture();
    let pairs = pairs(&fixture);
    for name in ["tied", "untied_gqa"] {
        let start = tiny(name);
        let mut policy = start.clone();
        let expected = &fixture["models"][name];
        let reference = reference(&policy, &pairs);
        let folder = tempfile::tempdir().unwrap();
        let task = Preferences::new(&pairs, &reference, &start, &DPO);
        let records = train_whole(&mut policy, &task, None, &options(), folder.path(), &mut never()).unwrap();
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
        let task = Preferences::new(&pairs, &reference, &policy, &DPO);
        let order = epoch_order(pairs.len(), options().seed, 0);
        let policy = Policy::Whole(policy.clone());
        let gradient = gradient(&policy, &task, &order[..4], whole()).gradient;
        for spec in policy.specs() {
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
    let policy = tiny("untied_gqa");
    let given = [pairs(&fixture()), behind_a_system_prompt(pairs(&fixture()))];
    for (pairs, dtype) in given.iter().flat_map(|pairs| Precision::ALL.map(|dtype| (pairs, dtype))) {
        let reference = reference_in(dtype, &policy, pairs);
        let task = Preferences::new(pairs, &reference, &policy, &DPO);
        for micro_batch_tokens in [1, 30, 10_000] {
            let means = evaluate(&policy, &task, Cut { dtype, ..cut(micro_batch_tokens, false) });
            assert_eq!(means.metrics["rewards/margins"], 0.0);
            assert!((means.loss - std::f64::consts::LN_2).abs() < 1e-14);
        }
    }
}

#[test]
fn loss_and_gradient_do_not_depend_on_the_cut_or_on_recomputing() {
    do_not_depend_on_the_cut(&pairs(&fixture()), [1e-5; 2]);
    // gradients of what is computed once are rounded as sums, and with every cut as other sums
    do_not_depend_on_the_cut(&behind_a_system_prompt(pairs(&fixture())), [1e-5, 1e-2]);
    do_not_depend_on_the_cut(&with_two_prompts(pairs(&fixture())), [1e-5, 1e-2]);
    do_not_depend_on_the_cut(&behind_a_system_prompt(with_two_prompts(pairs(&fixture()))), [1e-5, 1e-2]);
}

/// `tolerances` are those of gradients in f32 and in bf16.
fn do_not_depend_on_the_cut(pairs: &[TokenizedPair], tolerances: [f64; 2]) {
    let policy = tiny("untied_gqa");
    let reference: Vec<[f64; 2]> = reference(&policy, pairs).iter().map(|[c, r]| [c + 0.3, r - 0.2]).collect();
    let task = Preferences::new(pairs, &reference, &policy, &DPO);
    let all: Vec<usize> = (0..pairs.len()).collect();
    let whole_policy = Policy::Whole(policy.clone());
    let run = |cut| gradient(&whole_policy, &task, &all, cut);
    for (dtype, tolerance) in [Precision::F32, Precision::Bf16].into_iter().zip(tolerances) {
        let whole = run(Cut { dtype, ..whole() });
        for (micro_batch_tokens, recompute) in [(1, false), (40, false), (10_000, true)] {
            let other = run(Cut { dtype, ..cut(micro_batch_tokens, recompute) });
            assert_eq!(other.means, whole.means);
            assert_within(tolerance, &other.gradient, &whole.gradient);
        }
    }
}

#[test]
fn a_stopped_training_continues_bit_exactly() {
    let pairs = pairs(&fixture());
    let start = tiny("tied");
    let reference = reference(&start, &pairs);
    let task = Preferences::new(&pairs, &reference, &start, &DPO);
    for dtype in Precision::ALL {
        continues_bit_exactly(&start, &task, TrainOptions { dtype, epochs: 2, ..options() });
    }
}

fn continues_bit_exactly(start: &Model, task: &dyn Task, options: TrainOptions) {
    let whole_folder = tempfile::tempdir().unwrap();
    let mut whole = start.clone();
    train_whole(&mut whole, task, None, &options, whole_folder.path(), &mut never()).unwrap();

    let folder = tempfile::tempdir().unwrap();
    for stop in [3, 13, 17] {
        let mut policy = start.clone();
        let error = train_whole(&mut policy, task, None, &options, folder.path(), &mut StopAfter(stop, 0)).unwrap_err();
        assert!(matches!(error, Error::Interrupted(_)), "{error}");
    }
    let mut policy = start.clone();
    let rest = train_whole(&mut policy, task, None, &options, folder.path(), &mut never()).unwrap();
    assert_eq!(rest.len(), 3);
    assert_eq!(policy.weights, whole.weights);
    let losses = |folder: &Path| -> Vec<String> {
        let text = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
        text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()["loss"].to_string()).collect()
    };
    assert_eq!(losses(folder.path()), losses(whole_folder.path()));

    // a state of another training is refused
    let other = TrainOptions { learning_rate: 1e-3, ..options };
    train_whole(&mut start.clone(), task, None, &other, folder.path(), &mut never()).unwrap_err();
    discard_state(folder.path()).unwrap();
    train_whole(&mut start.clone(), task, None, &other, folder.path(), &mut never()).unwrap();
}

/// Stops, and keeps what it is told of the cut: tokens a pass, and those before.
struct Cuts(StopAfter, Vec<(usize, Option<usize>)>);

impl Monitor for Cuts {
    fn planned(&mut self, plan: &MemoryPlan, before: Option<usize>) {
        self.1.push((plan.micro_batch_tokens, before));
    }

    fn step(&mut self, total: u64, record: &StepRecord) {
        self.0.step(total, record);
    }

    fn stop_requested(&self) -> bool {
        self.0.stop_requested()
    }
}

#[test]
fn whoever_goes_on_with_another_cut_is_told() {
    let pairs = pairs(&fixture());
    let start = tiny("tied");
    let reference = reference(&start, &pairs);
    let task = Preferences::new(&pairs, &reference, &start, &DPO);
    let folder = tempfile::tempdir().unwrap();
    let mut cuts = Vec::new();
    for (stop, micro_batch_tokens) in [(1, None), (2, None), (3, Some(40)), (4, Some(40)), (5, None)] {
        let options = TrainOptions { micro_batch_tokens, ..options() };
        let mut monitor = Cuts(StopAfter(stop, 0), cuts);
        train_whole(&mut start.clone(), &task, None, &options, folder.path(), &mut monitor).unwrap_err();
        cuts = monitor.1;
    }
    let largest = cuts[0].0;
    assert!(largest > 40);
    assert_eq!(cuts, [(largest, None), (largest, None), (40, Some(largest)), (40, None), (40, None)]);
}

/// Of some losses, these parameters do not show while the log-probabilities are 0.
#[test]
fn a_state_of_another_temperature_or_weight_is_refused() {
    let pairs = pairs(&fixture());
    let start = tiny("tied");
    let reference = reference(&start, &pairs);
    let losses = [
        [Pairwise::Dpo { beta: 0.1, label_smoothing: 0.0 }, Pairwise::Dpo { beta: 0.2, label_smoothing: 0.0 }],
        [Pairwise::SimPo { beta: 0.1, gamma: 0.5 }, Pairwise::SimPo { beta: 0.2, gamma: 0.5 }],
        [Pairwise::Orpo { beta: 0.1 }, Pairwise::Orpo { beta: 0.2 }],
        [Pairwise::Cpo { beta: 0.1, alpha: 1.0 }, Pairwise::Cpo { beta: 0.2, alpha: 1.0 }],
        [Pairwise::Cpo { beta: 0.1, alpha: 1.0 }, Pairwise::Cpo { beta: 0.1, alpha: 2.0 }],
        [Pairwise::Tdpo { beta: 0.1, alpha: 0.5 }, Pairwise::Tdpo { beta: 0.1, alpha: 0.3 }],
    ];
    for [before, after] in &losses {
        let folder = tempfile::tempdir().unwrap();
        let train = |objective, stop: &mut StopAfter| {
            let task = Preferences::new(&pairs, &reference, &start, objective);
            train_whole(&mut start.clone(), &task, None, &options(), folder.path(), stop).unwrap_err()
        };
        assert!(matches!(train(before, &mut StopAfter(2, 0)), Error::Interrupted(_)));
        assert!(matches!(train(after, &mut never()), Error::Input(_)), "{after:?}");
        assert!(matches!(train(before, &mut StopAfter(3, 0)), Error::Interrupted(_)));
    }
}

#[test]
fn a_diverged_loss_names_the_rows() {
    let pairs = pairs(&fixture());
    let start = tiny("tied");
    let mut policy = start.clone();
    let mut reference = reference(&policy, &pairs);
    reference[6][0] = f64::NAN;
    let task = Preferences::new(&pairs, &reference, &start, &DPO);
    let folder = tempfile::tempdir().unwrap();
    let error = train_whole(&mut policy, &task, None, &options(), folder.path(), &mut never()).unwrap_err().to_string();
    assert!(error.contains("NaN") && error.contains("It broke in the rows 7."), "{error}");
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
    let before = evaluate(&policy, &task, whole()).loss;
    let mut decoder = Decoder::new(&policy, 8);
    let packed = PACKING.pack(&[task.sequences(0), task.sequences(1)], &[0, 1]);
    let logps = decoder.logps(&policy.weights, &packed);
    assert!((before + (logps[0] + logps[1]) / 5.0).abs() < 1e-9);
    let folder = tempfile::tempdir().unwrap();
    train_whole(&mut policy, &task, None, &options, folder.path(), &mut never()).unwrap();
    assert!(evaluate(&policy, &task, whole()).loss < 0.05);
}

#[test]
fn nothing_to_train_on_is_bad_input() {
    let folder = tempfile::tempdir().unwrap();
    let error = train_whole(&mut tiny("tied"), &Demonstrations(&[]), None, &options(), folder.path(), &mut never())
        .unwrap_err();
    assert_eq!(error.exit_code(), 2);
}

/// The fixture's pairs as labelled responses, in an order in which both classes meet.
fn examples(fixture: &Value) -> Vec<TokenizedExample> {
    let pairs = pairs(fixture);
    let example = |pair: &TokenizedPair, response: &Tokens, desirable| TokenizedExample {
        prompt: pair.prompt.clone(),
        response: response.clone(),
        desirable,
        row: pair.row,
    };
    pairs.iter().flat_map(|p| [example(p, &p.chosen, true), example(p, &p.rejected, false)]).collect()
}

fn example_scores(model: &Model, examples: &[TokenizedExample]) -> Vec<f64> {
    scores(model, &examples.iter().map(TokenizedExample::sequences).collect::<Vec<_>>())
}

const TDPO: Objective = Objective::Pairwise(Pairwise::Tdpo { beta: 0.5, alpha: 0.5 });

fn lora(dropout: f64) -> LoraOptions {
    LoraOptions { rank: 4, alpha: 8.0, dropout, ..LoraOptions::default() }
}

const KTO: Unpaired = Unpaired::Kto { beta: 0.5, desirable_weight: 1.0, undesirable_weight: 1.5 };
const BCO: Unpaired = Unpaired::Bco { beta: 0.5 };
