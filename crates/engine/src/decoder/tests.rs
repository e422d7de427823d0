mod adapter;
mod score;

use super::*;
use crate::config::ModelConfig;
use crate::model::tests::tiny_config;
use crate::ops::finite_difference::check;
use crate::ops::logprob;

fn batch() -> PackedBatch {
    let mut batch = PackedBatch::default();
    batch.push(&[1, 5, 3], &[&[4, 2], &[9, 9, 10, 2]]);
    batch.push(&[1, 7], &[&[8, 2]]);
    batch.push(&[1], &[&[2], &[6, 0]]);
    batch
}

fn models() -> Vec<Model> {
    let base = tiny_config();
    [
        base.clone(),
        ModelConfig { tie_word_embeddings: true, ..base.clone() },
        ModelConfig { num_key_value_heads: 4, ..base.clone() },
        ModelConfig { num_key_value_heads: 1, num_attention_heads: 3, head_dim: 6, ..base },
    ]
    .into_iter()
    .enumerate()
    .map(|(seed, config)| Model::random(config, 0.4, seed as u64))
    .collect()
}

fn in_both_precisions() -> Vec<(Model, Precision)> {
    models().into_iter().flat_map(|model| Precision::ALL.map(|precision| (model.clone(), precision))).collect()
}

#[test]
fn in_bf16_log_probabilities_and_gradients_are_those_of_f32_to_its_rounding() {
    let (batch, d_logps) = (batch(), [0.7, -0.4, 1.1, 0.3, -0.9]);
    // larger weights would magnify the rounding
    for model in models().into_iter().map(|model| Model::random(model.config, 0.1, 7)) {
        let [(logps, gradient), (rounded_logps, rounded_gradient)] = Precision::ALL.map(|precision| {
            let mut decoder = Decoder::new(&model, 16).with_precision(precision);
            let mut gradient = vec![0.0; model.layout.len];
            let logps = decoder.forward_backward(&model.weights, &batch, &d_logps, Keep::All, &mut gradient);
            (logps, gradient)
        });
        assert!(logps.iter().zip(&rounded_logps).all(|(a, b)| a != b && (a - b).abs() < 0.02 * a.abs()));
        for spec in &model.layout.specs {
            let [f32, bf16] = [&gradient, &rounded_gradient].map(|gradient| &gradient[spec.range.clone()]);
            let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            let difference = norm(&mut f32.iter().zip(bf16).map(|(a, b)| a - b)) / norm(&mut f32.iter().copied());
            assert!(difference < 0.03 && difference > 1e-4, "{}: {difference}", spec.name);
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    let (batch, d_logps) = (batch(), [0.7, -0.4, 1.1, 0.3, -0.9]);
    let weights_of_logps: Vec<f32> = d_logps.iter().map(|&d| d as f32).collect();
    for model in models() {
        let mut decoder = Decoder::new(&model, 16);
        let mut gradient = vec![0.0; model.layout.len];
        decoder.forward(&model.weights, &batch, Keep::All);
        decoder.backward(&model.weights, &batch, &d_logps, &mut gradient);
        let decoder = std::cell::RefCell::new(decoder);
        for spec in &model.layout.specs {
            let range = spec.range.clone();
            check(&model.weights[range.clone()], &gradient[range.clone()], &weights_of_logps, |part| {
                let mut weights = model.weights.clone();
                weights[range.clone()].copy_from_slice(part);
                decoder.borrow_mut().logps(&weights, &batch)
            });
        }
    }
}

#[test]
fn every_way_to_the_gradient_gives_the_same_bits() {
    let (batch, d_logps) = (batch(), [0.7, -0.4, 1.1, 0.3, -0.9]);
    for (model, precision) in in_both_precisions() {
        let mut decoder = Decoder::new(&model, 16).with_precision(precision);
        let mut kept = vec![0.0; model.layout.len];
        let logps = decoder.forward(&model.weights, &batch, Keep::All);
        decoder.backward(&model.weights, &batch, &d_logps, &mut kept);
        assert_eq!(logps, decoder.logps(&model.weights, &batch));
        let mut recomputed = vec![0.0; model.layout.len];
        decoder.forward(&model.weights, &batch, Keep::Inputs);
        decoder.backward(&model.weights, &batch, &d_logps, &mut recomputed);
        assert_eq!(kept, recomputed);
        let mut fused = vec![0.0; model.layout.len];
        assert_eq!(logps, decoder.forward_backward(&model.weights, &batch, &d_logps, Keep::All, &mut fused));
        assert_eq!(kept, fused);
    }
}

#[test]
fn packed_equals_one_sequence_at_a_time() {
    for (model, precision) in in_both_precisions() {
        let mut decoder = Decoder::new(&model, 16).with_precision(precision);
        let packed = decoder.logps(&model.weights, &batch());
        let sequences: [(&[u32], &[u32]); 5] =
            [(&[1, 5, 3], &[4, 2]), (&[1, 5, 3], &[9, 9, 10, 2]), (&[1, 7], &[8, 2]), (&[1], &[2]), (&[1], &[6, 0])];
        for (packed, (prompt, response)) in packed.iter().zip(sequences) {
            let mut alone = PackedBatch::default();
            alone.push(prompt, &[response]);
            let alone = decoder.logps(&model.weights, &alone)[0];
            assert!((packed / alone - 1.0).abs() < 1e-5, "{packed} packed, {alone} alone");
        }
    }
}

#[test]
fn a_small_batch_after_a_large_one_reads_nothing_stale() {
    let model = Model::random(tiny_config(), 0.4, 9);
    Precision::ALL.into_iter().for_each(|precision| reads_nothing_stale(&model, precision));
}

#[test]
fn buffers_of_announced_rows_stay_where_they_are_and_change_nothing() {
    let batch = batch();
    let mut small = PackedBatch::default();
    small.push(&[1, 2], &[&[3, 4]]);
    for (model, precision) in in_both_precisions() {
        for keep in [Keep::All, Keep::Inputs] {
            let run = |decoder: &mut Decoder, batch: &PackedBatch| {
                let mut gradient = vec![0.0; model.layout.len];
                let logps = decoder.forward(&model.weights, batch, keep);
                decoder.backward(&model.weights, batch, &vec![0.5; logps.len()], &mut gradient);
                (logps, gradient)
            };
            let decoder = || Decoder::new(&model, 16).with_precision(precision);
            for behind in [0, 5] {
                let mut roomy = decoder().with_rows(batch.rows() + 3, behind);
                assert_eq!(run(&mut roomy, &small), run(&mut decoder(), &small));
                let place = |decoder: &Decoder| typed!(&decoder.0, decoder => [&decoder.x, &decoder.inputs[1], &decoder.scratch.dx].map(|x| x.as_ptr()));
                let before = place(&roomy);
                assert_eq!(run(&mut roomy, &batch), run(&mut decoder(), &batch));
                assert_eq!(place(&roomy), before);
            }
        }
    }
}

fn reads_nothing_stale(model: &Model, precision: Precision) {
    let decoder = || Decoder::new(model, 16).with_precision(precision);
    let mut small = PackedBatch::default();
    small.push(&[1, 2], &[&[3, 4]]);
    let fresh = decoder().forward(&model.weights, &small, Keep::All);
    let mut of_both = decoder();
    of_both.forward(&model.weights, &batch(), Keep::All);
    assert_eq!(fresh, of_both.forward(&model.weights, &small, Keep::All));
    let mut after = vec![0.0; model.layout.len];
    of_both.backward(&model.weights, &small, &[1.0], &mut after);
    let mut decoder = decoder();
    let mut expected = vec![0.0; model.layout.len];
    decoder.forward(&model.weights, &small, Keep::All);
    decoder.backward(&model.weights, &small, &[1.0], &mut expected);
    assert_eq!(after, expected);
}

#[test]
fn the_softmax_of_rows_beyond_the_kept_ones_is_computed_again() {
    let vocab_size = 1 << 17;
    let model = Model::random(ModelConfig { vocab_size, ..tiny_config() }, 0.4, 9);
    let response: Vec<u32> = (0..200).map(|i| i * 997 % vocab_size as u32).collect();
    let (mut batch, d_logps) = (PackedBatch::default(), [0.7, -0.4, 1.1]);
    batch.push(&[1, 2], &[&response, &response[1..], &response[2..]]);
    for precision in Precision::ALL {
        let kept = logprob::kept_rows(true, batch.targets.len(), vocab_size);
        assert!(kept > 200 && kept < batch.targets.len(), "{kept} rows are kept");
        let mut decoder = Decoder::new(&model, 256).with_precision(precision);
        let [mut some_kept, mut none_kept] = [(); 2].map(|()| vec![0.0; model.layout.len]);
        let logps = decoder.forward(&model.weights, &batch, Keep::All);
        decoder.backward(&model.weights, &batch, &d_logps, &mut some_kept);
        assert_eq!(logps, decoder.forward_backward(&model.weights, &batch, &d_logps, Keep::All, &mut none_kept));
        assert_eq!(logps, decoder.logps(&model.weights, &batch));
        let largest = none_kept.iter().fold(0f32, |m, g| m.max(g.abs()));
        assert!(some_kept.iter().zip(&none_kept).all(|(a, b)| (a - b).abs() < 1e-6 * largest), "{precision:?}");
    }
}

#[test]
fn responses_behind_a_batch_change_nothing_before_them() {
    let d_logps = [0.7, -0.4, 1.1];
    for common in [&[][..], &[1, 6]] {
        let mut own = PackedBatch::default().with_common(common);
        // as responses to their prompts from the start
        let mut together = own.clone();
        own.push(&[1, 6, 5, 3], &[&[4, 2], &[9, 9, 10, 2]]);
        own.push(&[1, 6, 7], &[&[8, 2]]);
        let mut whole = own.clone();
        whole.push_response(1, &[9, 9, 10, 2]);
        whole.push_response(0, &[8, 2, 6]);
        together.push(&[1, 6, 5, 3], &[&[4, 2], &[9, 9, 10, 2], &[8, 2, 6]]);
        together.push(&[1, 6, 7], &[&[8, 2], &[9, 9, 10, 2]]);
        for (model, precision) in in_both_precisions() {
            let mut decoder = Decoder::new(&model, 16).with_precision(precision);
            let expected = decoder.logps(&model.weights, &together);
            for keep in [Keep::All, Keep::Inputs] {
                let [mut alone, mut before] = [(); 2].map(|()| vec![0.0; model.layout.len]);
                let logps = decoder.forward(&model.weights, &own, keep);
                decoder.backward(&model.weights, &own, &d_logps, &mut alone);
                assert_eq!(logps, [expected[0], expected[1], expected[3]]);
                let logps = decoder.forward(&model.weights, &whole, keep);
                decoder.backward(&model.weights, &own, &d_logps, &mut before);
                assert_eq!(logps, [0, 1, 3, 4, 2].map(|response| expected[response]));
                assert_eq!(alone, before);
            }
        }
    }
}

#[test]
fn what_all_prompts_begin_with_may_be_computed_once() {
    let (system, d_logps) = ([1, 3, 4, 6, 5, 8, 2, 9, 7, 3], [0.7, -0.4, 1.1]);
    let prompts = [[5, 3], [7, 7]].map(|own| [&system[..], &own].concat());
    let push = |mut batch: PackedBatch| {
        batch.push(&prompts[0], &[&[4, 2], &[9, 9, 10, 2]]);
        batch.push(&prompts[1], &[&[8, 2, 4]]);
        batch
    };
    let (apart, once) = (push(PackedBatch::default()), push(PackedBatch::default().with_common(&system)));
    assert_eq!(apart.rows() - once.rows(), system.len());
    for (model, precision) in in_both_precisions() {
        let mut decoder = Decoder::new(&model, 16).with_precision(precision);
        for keep in [Keep::All, Keep::Inputs] {
            let [mut expected, mut got] = [(); 2].map(|()| vec![0.0; model.layout.len]);
            let logps = decoder.forward(&model.weights, &apart, keep);
            decoder.backward(&model.weights, &apart, &d_logps, &mut expected);
            assert_eq!(decoder.forward(&model.weights, &once, keep), logps, "the bits are the same");
            decoder.backward(&model.weights, &once, &d_logps, &mut got);
            let largest = expected.iter().fold(0f32, |m, g| m.max(g.abs()));
            let tolerance = if precision == Precision::F32 { 1e-5 } else { 2e-2 } * largest;
            assert!(expected.iter().zip(&got).all(|(a, b)| (a - b).abs() < tolerance), "{precision:?}");
        }
    }
}
