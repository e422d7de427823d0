//! The decoder against independent programs: PyTorch with transformers, and plain numpy.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::path::Path;

use engine::chat::Message;
use engine::checkpoint::{Checkpoint, load_model, load_scorer};
use engine::generate::{SamplingOptions, generate};
use engine::{Decoder, Keep, Model, OutputHead, PackedBatch};
use serde_json::Value;

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

fn greedy(model: &Model, prompt: Vec<u32>, max_new_tokens: usize, end_tokens: Vec<u32>) -> Vec<u32> {
    let options = SamplingOptions { max_new_tokens, end_tokens, ..SamplingOptions::default() };
    generate(model, &[prompt], &options, &|_| Ok(String::new()), &mut |_| Ok(())).unwrap().remove(0).tokens
}

/// Tied and untied heads, grouped queries, linear and Llama-3 rope scaling.
#[test]
fn tiny_models_give_transformers_log_probabilities() {
    for name in ["tied", "untied_gqa", "linear_rope", "llama3_rope"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny").join(name);
        let model = load_model(&folder).unwrap();
        let fixture = json(&folder.join("logits.json"));
        let ids = ids(&fixture["ids"]);
        let mut decoder = Decoder::new(&model, ids.len());
        for (n, expected) in (1..ids.len()).zip(fixture["logps_float64"].as_array().unwrap()) {
            let mut batch = PackedBatch::default();
            batch.push(&ids[..n], &[&ids[n..=n]]);
            let (logp, expected) = (decoder.logps(&model.weights, &batch)[0], expected.as_f64().unwrap());
            assert!((logp - expected).abs() < 1e-4 * expected.abs().max(0.1), "{name} at {n}: {logp} not {expected}");
        }
        for position in fixture["logits"].as_array().unwrap() {
            let n = position["position"].as_u64().unwrap() as usize + 1;
            let logits: Vec<f64> = position["values"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
            let log_sum = logits.iter().map(|l| l.exp()).sum::<f64>().ln();
            let all: Vec<[u32; 1]> = (0..logits.len() as u32).map(|t| [t]).collect();
            let mut batch = PackedBatch::default();
            batch.push(&ids[..n], &all.iter().map(|t| &t[..]).collect::<Vec<_>>());
            for (logp, logit) in decoder.logps(&model.weights, &batch).iter().zip(&logits) {
                assert!((logp - (logit - log_sum)).abs() < 1e-4, "{name} at {n}: {logp} not {}", logit - log_sum);
            }
        }
    }
}

/// A `LlamaForSequenceClassification` as transformers saves it: scores, and gradients of a sum of them.
#[test]
fn a_tiny_score_model_gives_transformers_scores_and_gradients() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/score");
    let model = load_scorer(&folder).unwrap();
    let OutputHead::Score { pad_token_id: Some(pad) } = model.config.head else { panic!("{:?}", model.config.head) };
    let fixture = json(&folder.join("expected.json"));
    let floats =
        |value: &Value| -> Vec<f64> { value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect() };
    let mut batch = PackedBatch::for_scores();
    for sequence in fixture["sequences"].as_array().unwrap() {
        let mut response = ids(&sequence[1]);
        while response.last() == Some(&pad) {
            response.pop();
        }
        batch.push(&ids(&sequence[0]), &[&response]);
    }
    let mut decoder = Decoder::new(&model, batch.rows());
    let scores = decoder.forward(&model.weights, &batch, Keep::All);
    for (score, expected) in scores.iter().zip(floats(&fixture["scores"])) {
        assert!((score - expected).abs() < 1e-5 * expected.abs().max(1.0), "{score} not {expected}");
    }
    let mut gradient = vec![0.0; model.layout.len];
    decoder.backward(&model.weights, &batch, &floats(&fixture["d_scores"]), &mut gradient);
    assert_eq!(fixture["gradients"].as_object().unwrap().len(), model.layout.specs.len());
    for spec in &model.layout.specs {
        let (own, expected) = (&gradient[spec.range.clone()], &fixture["gradients"][&spec.name]);
        let (norm, expected_norm) =
            (own.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt(), expected["norm"].as_f64().unwrap());
        assert!((norm - expected_norm).abs() < 1e-5 * expected_norm, "{}: {norm} not {expected_norm}", spec.name);
        for (own, expected) in own.iter().zip(floats(&expected["first"])) {
            assert!((f64::from(*own) - expected).abs() < 1e-5 * expected_norm, "{}: {own} not {expected}", spec.name);
        }
    }
}

#[test]
fn the_story_model_writes_the_known_story() {
    let files = ["small/stories260K.bin", "small/stories260K.greedy.json"].map(common::shared);
    let [Some(stories), Some(expected)] = files else { return };
    let model = common::stories::load_stories(&stories);
    let expected = ids(&json(&expected)["greedy_ids"]);
    let story = greedy(&model, vec![expected[0]], expected.len() - 1, Vec::new());
    assert_eq!(story, expected[1..]);
}

#[test]
fn smollm2_answers_as_the_reference_does() {
    let reference = common::shared("real-text/smollm2-135m.reference.json");
    let (Some(reference), Some(gguf)) = (reference, common::smollm2()) else { return };
    let reference = json(&reference);
    let Checkpoint { model, tokenizer, generation } = Checkpoint::load(&gguf).unwrap();
    let system = Message::new("system", reference["system"].as_str().unwrap());
    for chat in reference["chat"].as_array().unwrap() {
        let user = Message::new("user", chat["user"].as_str().unwrap());
        let prompt = tokenizer.encode(&tokenizer.chat(&[system.clone(), user], true).unwrap()).unwrap();
        let answer = greedy(&model, prompt, 40, generation.eos_token_ids.clone());
        assert_eq!(tokenizer.decode(&answer).unwrap(), chat["greedy_40"].as_str().unwrap());
    }
    let nll = &reference["nll"];
    let ids = ids(&nll["ids"]);
    assert_eq!(tokenizer.encode(nll["text"].as_str().unwrap()).unwrap(), ids);
    let mut batch = PackedBatch::default();
    batch.push(&ids[..1], &[&ids[1..]]);
    let logp = Decoder::new(&model, ids.len()).logps(&model.weights, &batch)[0];
    let (mean, expected) = (-logp / (ids.len() - 1) as f64, nll["mean_nll_nats"].as_f64().unwrap());
    assert!((mean / expected - 1.0).abs() < 1e-4, "{mean} instead of {expected}");
}
