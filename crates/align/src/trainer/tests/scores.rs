//! Training of reward and cost models.

use engine::checkpoint::load_scorer;
use engine::{LoraOptions, ModelConfig, OutputHead};

use super::*;
use crate::objective::ScoreLoss;
use crate::reward::{self, ScoredPairs};

fn scorer() -> Model {
    load_scorer(&crates().join("engine/tests/fixtures/score")).unwrap()
}

fn pairs(rows: &Value) -> Vec<TokenizedPair> {
    let tokens = |value: &Value| -> Vec<u32> {
        value.as_array().unwrap().iter().map(|token| token.as_u64().unwrap() as u32).collect()
    };
    let pair = |(row, number): (&Value, usize)| TokenizedPair {
        prompt: tokens(&row["prompt"]).into(),
        chosen: tokens(&row["chosen"]).into(),
        rejected: tokens(&row["rejected"]).into(),
        is_unsafe: Some([0, 1].map(|i| row["unsafe"][i].as_bool().unwrap())),
        margin: None,
        row: number,
    };
    rows.as_array().unwrap().iter().zip(1..).map(pair).collect()
}

fn fixture() -> Value {
    let path = crates().join("align/tests/fixtures/score_steps.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn steps_on_scores_equal_pytorchs() {
    let fixture = fixture();
    let (pairs, folder) = (pairs(&fixture["pairs"]), tempfile::tempdir().unwrap());
    for loss in [ScoreLoss::Reward, ScoreLoss::Cost] {
        let expected = fixture[loss.name()].as_array().unwrap();
        let options = TrainOptions {
            learning_rate: fixture["learning_rate"].as_f64().unwrap(),
            schedule: Schedule::Constant,
            warmup_ratio: 0.0,
            epochs: expected.len(),
            batch_size: pairs.len(),
            max_grad_norm: 1e9,
            weight_decay: 0.0,
            ..options()
        };
        let folder = folder.path().join(loss.name());
        let made = reward::train(scorer(), loss, [&pairs, &[]], &options, &folder, &mut never()).unwrap();
        assert_eq!(made.records.len(), expected.len());
        for (record, expected) in made.records.iter().zip(expected) {
            for (own, name) in [(record.loss, "loss"), (record.grad_norm, "grad_norm")] {
                let expected = expected[name].as_f64().unwrap();
                let error = (own - expected).abs() / expected;
                assert!(error < 1e-4, "{loss:?}, step {}: {name} {own} not {expected}", record.step);
            }
        }
    }
}

/// The metrics are those of the scores, and a stopped training ends with the same bits, adapter or not.
#[test]
fn a_stopped_training_of_scores_continues_bit_exactly() {
    let fixture = fixture();
    let pairs = pairs(&fixture["pairs"]);
    let start = Model::random(ModelConfig { head: OutputHead::Vocabulary, ..scorer().config }, 0.1, 1);
    let start = start.with_score_head(Some(3));
    for lora in [None, Some(LoraOptions { rank: 2, dropout: 0.1, ..LoraOptions::default() })] {
        for loss in [ScoreLoss::Reward, ScoreLoss::Cost] {
            let options = TrainOptions { lora: lora.clone(), epochs: 4, batch_size: 2, ..options() };
            let run = |folder: &Path, monitor: &mut dyn Monitor| {
                reward::train(start.clone(), loss, [&pairs, &[]], &options, folder, monitor)
            };
            let [whole, stopped] = [(); 2].map(|()| tempfile::tempdir().unwrap());
            let expected = run(whole.path(), &mut never()).unwrap();
            let metrics = &expected.records[0].metrics;
            assert_eq!((metrics["rewards/margins"], metrics["rewards/accuracies"]), (0.0, 0.0), "a new head scores 0");
            let terms = if loss == ScoreLoss::Cost { 3.0 } else { 1.0 };
            assert!((expected.records[0].loss - terms * std::f64::consts::LN_2).abs() < 1e-12);
            let error = run(stopped.path(), &mut StopAfter(3, 0)).unwrap_err();
            assert!(matches!(error, Error::Interrupted(_)), "{error}");
            let continued = run(stopped.path(), &mut never()).unwrap();
            assert_eq!(continued.records[0].step, 4);
            assert_eq!(continued.policy.weights, expected.policy.weights);
            let head = start.layout.head.clone();
            assert!(expected.policy.weights[head].iter().any(|w| *w != 0.0), "the head is trained");
        }
    }
}

#[test]
fn pairs_with_one_prompt_have_the_gradient_that_they_have_alone() {
    let pairs = with_two_prompts(pairs(&fixture()["pairs"]));
    let (policy, all) = (Policy::Whole(scorer()), (0..pairs.len()).collect::<Vec<_>>());
    for loss in [ScoreLoss::Reward, ScoreLoss::Cost] {
        let task = ScoredPairs::new(&pairs, loss);
        let [alone, together] = [1, 10_000].map(|tokens| gradient(&policy, &task, &all, cut(tokens, false)));
        assert_eq!(alone.means, together.means);
        assert_close(&together.gradient, &alone.gradient);
        assert!(together.tokens < alone.tokens);
    }
}

#[test]
fn losses_and_labels_tell_trainings_apart() {
    let fixture = fixture();
    let pairs = pairs(&fixture["pairs"]);
    let [reward, cost] = [ScoreLoss::Reward, ScoreLoss::Cost].map(|loss| ScoredPairs::new(&pairs, loss).parameters());
    assert_ne!(reward, cost);
    let policy = Policy::Whole(scorer());
    let own = identity(&policy, &[&ScoredPairs::new(&pairs, ScoreLoss::Cost)], &options());
    let mut other = pairs.clone();
    assert_eq!(other[1].is_unsafe, Some([false, true]));
    other[1].is_unsafe = Some([true, false]);
    assert_ne!(own, identity(&policy, &[&ScoredPairs::new(&other, ScoreLoss::Cost)], &options()));
}

#[test]
#[should_panic(expected = "which responses are unsafe")]
fn costs_need_labels() {
    let mut pairs = pairs(&fixture()["pairs"]);
    pairs[2].is_unsafe = None;
    ScoredPairs::new(&pairs, ScoreLoss::Cost);
}
