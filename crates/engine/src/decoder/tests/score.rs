//! Passes of models with a score head.

use std::cell::RefCell;

use super::*;
use crate::Parameters;
use crate::lora::{Adapter, LoraOptions};
use crate::ops::finite_difference::random;

const D_SCORES: [f64; 5] = [0.7, -0.4, 1.1, 0.3, -0.9];

fn batch() -> PackedBatch {
    let mut batch = PackedBatch::for_scores();
    batch.push_keyed(0, &[1, 5, 3], &[&[4, 2], &[9, 9, 10, 2], &[]]);
    batch.push_keyed(1, &[1, 7], &[&[8, 2]]);
    batch.push_keyed(2, &[1], &[&[]]);
    batch
}

/// A model whose head is not zero.
fn scorer() -> Model {
    let mut model = Model::random(tiny_config(), 0.4, 3).with_score_head(Some(0));
    let head = model.layout.head.clone();
    model.weights[head.clone()].copy_from_slice(&random(head.len(), 4));
    model
}

fn with<'a>(model: &'a Model, adapter: &'a Adapter) -> Parameters<'a> {
    Parameters { base: &model.weights, adapter: Some(adapter), dropout_seed: None }
}

#[test]
fn a_new_head_scores_everything_0_over_the_same_blocks() {
    for tie_word_embeddings in [false, true] {
        let model = Model::random(ModelConfig { tie_word_embeddings, ..tiny_config() }, 0.4, 1);
        let head = model.layout.final_norm.end;
        let scorer = model.clone().with_score_head(None);
        assert_eq!(scorer.weights[..head], model.weights[..head]);
        assert_eq!(scorer.layout.specs.last().unwrap().name, "score.weight");
        assert_eq!(Decoder::new(&scorer, 16).logps(&scorer.weights, &batch()), [0.0; 5]);
    }
}

#[test]
fn gradients_match_finite_differences() {
    let (model, batch) = (scorer(), batch());
    let weights_of_scores: Vec<f32> = D_SCORES.iter().map(|&d| d as f32).collect();
    let mut decoder = Decoder::new(&model, 16);
    let mut gradient = vec![0.0; model.layout.len];
    let scores = decoder.forward(&model.weights, &batch, Keep::All);
    decoder.backward(&model.weights, &batch, &D_SCORES, &mut gradient);
    assert_eq!(scores, decoder.logps(&model.weights, &batch));
    let mut recomputed = vec![0.0; model.layout.len];
    assert_eq!(scores, decoder.forward_backward(&model.weights, &batch, &D_SCORES, Keep::Inputs, &mut recomputed));
    assert_eq!(gradient, recomputed);
    let decoder = RefCell::new(decoder);
    for spec in &model.layout.specs {
        let range = spec.range.clone();
        check(&model.weights[range.clone()], &gradient[range.clone()], &weights_of_scores, |part| {
            let mut weights = model.weights.clone();
            weights[range.clone()].copy_from_slice(part);
            decoder.borrow_mut().logps(&weights, &batch)
        });
    }
}

#[test]
fn an_adapter_trains_the_head_whole() {
    let (model, batch) = (scorer(), batch());
    let mut adapter = Adapter::new(&model, LoraOptions { rank: 2, alpha: 2.0, ..LoraOptions::default() }, 5).unwrap();
    let mut decoder = Decoder::new(&model, 16);
    assert_eq!(decoder.logps(with(&model, &adapter), &batch), decoder.logps(&model.weights, &batch));
    adapter.weights = adapter.weights.iter().zip(random(adapter.weights.len(), 6)).map(|(w, r)| w + 0.3 * r).collect();
    let mut gradient = vec![0.0; adapter.layout.len];
    let scores = decoder.forward(with(&model, &adapter), &batch, Keep::All);
    decoder.backward(with(&model, &adapter), &batch, &D_SCORES, &mut gradient);
    let mut folded = model.clone();
    adapter.fold_into(&mut folded);
    for (adapted, folded) in scores.iter().zip(decoder.logps(&folded.weights, &batch)) {
        assert!((adapted - folded).abs() < 1e-5 * folded.abs().max(1.0), "{adapted} adapted, {folded} folded");
    }
    let weights_of_scores: Vec<f32> = D_SCORES.iter().map(|&d| d as f32).collect();
    let decoder = RefCell::new(decoder);
    for spec in &adapter.layout.specs {
        let range = spec.range.clone();
        check(&adapter.weights[range.clone()], &gradient[range.clone()], &weights_of_scores, |part| {
            let mut moved = adapter.clone();
            moved.weights[range.clone()].copy_from_slice(part);
            decoder.borrow_mut().logps(with(&model, &moved), &batch)
        });
    }
}

#[test]
fn a_score_is_that_of_the_last_token_however_it_is_packed() {
    let model = scorer();
    let mut decoder = Decoder::new(&model, 16);
    let packed = decoder.logps(&model.weights, &batch());
    let texts: [&[u32]; 5] = [&[1, 5, 3, 4, 2], &[1, 5, 3, 9, 9, 10, 2], &[1, 5, 3], &[1, 7, 8, 2], &[1]];
    for (packed, text) in packed.iter().zip(texts) {
        for prompt in 1..=text.len() {
            let mut alone = PackedBatch::for_scores();
            alone.push(&text[..prompt], &[&text[prompt..]]);
            let alone = decoder.logps(&model.weights, &alone)[0];
            assert!((packed - alone).abs() < 1e-5 * packed.abs().max(1.0), "{packed} packed, {alone} alone");
        }
    }
}
