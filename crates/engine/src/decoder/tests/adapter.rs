//! Passes with an adapter.

use std::cell::RefCell;

use super::*;
use crate::Parameters;
use crate::lora::{Adapter, LoraOptions, Projection};
use crate::ops::finite_difference::random;

const D_LOGPS: [f64; 5] = [0.7, -0.4, 1.1, 0.3, -0.9];

/// As [`batch`](super::batch), with keys for dropout; `examples` says which.
fn keyed(examples: &[u64]) -> PackedBatch {
    let mut batch = PackedBatch::default();
    for &example in examples {
        match example {
            0 => batch.push_keyed(0, &[1, 5, 3], &[&[4, 2], &[9, 9, 10, 2]]),
            1 => batch.push_keyed(1, &[1, 7], &[&[8, 2]]),
            _ => batch.push_keyed(2, &[1], &[&[2], &[6, 0]]),
        }
    }
    batch
}

/// Every matrix, some of them, with other scales, with dropout, and with DoRA.
fn kinds() -> Vec<LoraOptions> {
    let all = LoraOptions { rank: 3, alpha: 5.0, ..LoraOptions::default() };
    let some = vec![Projection::DownProj, Projection::VProj, Projection::QProj, Projection::UpProj];
    vec![
        all.clone(),
        LoraOptions { rank: 1, rank_stabilized: true, targets: some.clone(), ..all.clone() },
        LoraOptions { dropout: 0.3, ..all.clone() },
        LoraOptions { dora: true, ..all.clone() },
        LoraOptions { dora: true, targets: some, ..all },
    ]
}

/// An adapter as training leaves it: B is not zero, and m no longer the norms.
fn trained(model: &Model, options: LoraOptions) -> Adapter {
    let mut adapter = Adapter::new(model, options, 5).unwrap();
    for (seed, spec) in adapter.layout.specs.iter().enumerate() {
        let noise = random(spec.range.len(), seed as u64);
        for (weight, noise) in adapter.weights[spec.range.clone()].iter_mut().zip(noise) {
            *weight += 0.3 * noise;
        }
    }
    adapter
}

fn with<'a>(model: &'a Model, adapter: &'a Adapter) -> Parameters<'a> {
    Parameters { base: &model.weights, adapter: Some(adapter), dropout_seed: Some(11) }
}

fn gradient(decoder: &mut Decoder, parameters: Parameters<'_>, batch: &PackedBatch, d_logps: &[f64]) -> Vec<f32> {
    let mut gradient = vec![0.0; parameters.adapter.unwrap().layout.len];
    decoder.forward(parameters, batch, Keep::All);
    decoder.backward(parameters, batch, d_logps, &mut gradient);
    gradient
}

#[test]
fn a_fresh_adapter_gives_the_bits_of_the_model() {
    for model in models() {
        let mut decoder = Decoder::new(&model, 16);
        let base = decoder.logps(&model.weights, &keyed(&[0, 1, 2]));
        for options in kinds() {
            let adapter = Adapter::new(&model, options, 5).unwrap();
            assert_eq!(base, decoder.logps(with(&model, &adapter), &keyed(&[0, 1, 2])));
            let mut folded = model.clone();
            adapter.fold_into(&mut folded);
            assert_eq!(model.weights, folded.weights);
        }
    }
}

/// What a target's gradients must be by the chain rule, from the gradient of the folded matrix `d_w`: with
/// V = W + s·B·A and c = m/‖V‖ (1 without DoRA), for A s·(c·B)ᵀ·dW, for B s·c·dW·Aᵀ, for m Σ dW·V/‖V‖.
fn by_chain_rule(model: &Model, adapter: &Adapter, module: &str, d_folded: &[f32]) -> Vec<(String, Vec<f64>)> {
    let factor = |name: &str| -> Vec<f64> {
        let name = format!("base_model.model.{module}.{name}");
        let spec = adapter.layout.specs.iter().find(|spec| spec.name == name);
        spec.map_or(Vec::new(), |spec| adapter.weights[spec.range.clone()].iter().map(|&x| x.into()).collect())
    };
    let (a, b, m) = (factor("lora_A.weight"), factor("lora_B.weight"), factor("lora_magnitude_vector"));
    let w = model.layout.specs.iter().find(|spec| spec.name == format!("{module}.weight")).unwrap();
    let ([outputs, inputs], rank) = ([w.shape[0], w.shape[1]], adapter.options.rank);
    let scale = adapter.options.scale();
    let (mut d_a, mut d_b, mut d_m) = (vec![0.0; a.len()], vec![0.0; b.len()], vec![0.0; m.len()]);
    for row in 0..outputs {
        let d_w: Vec<f64> = (0..inputs).map(|i| d_folded[w.range.start + row * inputs + i].into()).collect();
        let update = |i: usize| -> f64 { (0..rank).map(|k| b[row * rank + k] * a[k * inputs + i]).sum() };
        let weight = |i: usize| f64::from(model.weights[w.range.start + row * inputs + i]);
        let v: Vec<f64> = (0..inputs).map(|i| weight(i) + scale * update(i)).collect();
        let norm = v.iter().map(|v| v * v).sum::<f64>().sqrt();
        let c = m.get(row).map_or(1.0, |m| m / norm);
        for i in 0..inputs {
            for k in 0..rank {
                d_a[k * inputs + i] += scale * c * b[row * rank + k] * d_w[i];
                d_b[row * rank + k] += scale * c * d_w[i] * a[k * inputs + i];
            }
            if let Some(d_m) = d_m.get_mut(row) {
                *d_m += d_w[i] * v[i] / norm;
            }
        }
    }
    let named = [("lora_A.weight", d_a), ("lora_B.weight", d_b), ("lora_magnitude_vector", d_m)];
    named.into_iter().map(|(name, d)| (format!("base_model.model.{module}.{name}"), d)).collect()
}

#[test]
fn gradients_follow_from_those_of_the_folded_model() {
    let batch = keyed(&[0, 1, 2]);
    for (model, options) in models().iter().flat_map(|model| kinds().into_iter().map(move |kind| (model, kind))) {
        if options.dropout > 0.0 {
            continue;
        }
        let adapter = trained(model, options);
        let mut decoder = Decoder::new(model, 16);
        let gradient = gradient(&mut decoder, with(model, &adapter), &batch, &D_LOGPS);
        let mut folded = model.clone();
        adapter.fold_into(&mut folded);
        let mut d_folded = vec![0.0; model.layout.len];
        decoder.forward_backward(&folded.weights, &batch, &D_LOGPS, Keep::All, &mut d_folded);
        let mut checked = 0;
        for spec in adapter.layout.specs.iter().filter(|spec| spec.name.ends_with("lora_A.weight")) {
            let module = spec.name.strip_prefix("base_model.model.").unwrap().strip_suffix(".lora_A.weight").unwrap();
            for (name, expected) in by_chain_rule(model, &adapter, module, &d_folded) {
                let Some(spec) = adapter.layout.specs.iter().find(|spec| spec.name == name) else { continue };
                let largest = expected.iter().fold(0f64, |m, g| m.max(g.abs()));
                for (g, expected) in gradient[spec.range.clone()].iter().zip(&expected) {
                    assert!((f64::from(*g) - expected).abs() < 1e-4 * largest, "{name}: {g}, not {expected}");
                }
                checked += 1;
            }
        }
        assert_eq!(checked, adapter.layout.specs.len());
    }
}

/// Along one direction for each factor: where most components are small, f32 drowns their differences.
#[test]
fn gradients_match_finite_differences() {
    let (batch, weights_of_logps) = (keyed(&[0, 1, 2]), D_LOGPS.map(|d| d as f32));
    for (model, options) in models().iter().flat_map(|model| kinds().into_iter().map(move |kind| (model, kind))) {
        if options.dora {
            // not the derivative of the log-probabilities: the norms count as constants
            continue;
        }
        let adapter = trained(model, options);
        let decoder = RefCell::new(Decoder::new(model, 16));
        let gradient = gradient(&mut decoder.borrow_mut(), with(model, &adapter), &batch, &D_LOGPS);
        for (seed, spec) in adapter.layout.specs.iter().enumerate() {
            let along = &gradient[spec.range.clone()];
            let norm = |v: &[f32]| v.iter().map(|v| v * v).sum::<f32>().sqrt();
            let noise = random(along.len(), seed as u64);
            let unit = |v: &[f32], i: usize| v[i] / norm(v) / 2.0;
            let direction: Vec<f32> = (0..along.len()).map(|i| unit(along, i) + unit(&noise, i)).collect();
            let slope: f32 = along.iter().zip(&direction).map(|(g, d)| g * d).sum();
            check(&[0.0], &[slope], &weights_of_logps, |step| {
                let mut moved = adapter.clone();
                for (weight, d) in moved.weights[spec.range.clone()].iter_mut().zip(&direction) {
                    *weight += step[0] * d;
                }
                decoder.borrow_mut().logps(with(model, &moved), &batch)
            });
        }
    }
}

#[test]
fn every_way_to_the_gradient_gives_the_same_bits() {
    let batch = keyed(&[0, 1, 2]);
    for (model, options) in models().iter().flat_map(|model| kinds().into_iter().map(move |kind| (model, kind))) {
        let adapter = trained(model, options);
        let parameters = with(model, &adapter);
        let mut decoder = Decoder::new(model, 16);
        let kept = gradient(&mut decoder, parameters, &batch, &D_LOGPS);
        let logps = decoder.logps(parameters, &batch);
        let (mut recomputed, mut fused) = (vec![0.0; kept.len()], vec![0.0; kept.len()]);
        assert_eq!(logps, decoder.forward(parameters, &batch, Keep::Inputs));
        decoder.backward(parameters, &batch, &D_LOGPS, &mut recomputed);
        assert_eq!(kept, recomputed);
        assert_eq!(logps, decoder.forward_backward(parameters, &batch, &D_LOGPS, Keep::All, &mut fused));
        assert_eq!(kept, fused);
    }
}

#[test]
fn an_adapter_is_its_folded_model() {
    for (model, options) in models().iter().flat_map(|model| kinds().into_iter().map(move |kind| (model, kind))) {
        let adapter = trained(model, options);
        let mut folded = model.clone();
        adapter.fold_into(&mut folded);
        let mut decoder = Decoder::new(model, 16);
        let batch = batch();
        let base = decoder.logps(&model.weights, &batch);
        let evaluated = decoder.logps(Parameters { dropout_seed: None, ..with(model, &adapter) }, &batch);
        for ((a, b), base) in evaluated.iter().zip(decoder.logps(&folded.weights, &batch)).zip(base) {
            assert!((a / b - 1.0).abs() < 1e-5 && (a / base - 1.0).abs() > 1e-4, "{a}, folded {b}, base {base}");
        }
    }
}

#[test]
fn adapters_stack_into_one() {
    for model in models() {
        let [first, second] = [0, 1].map(|kind| trained(&model, kinds().remove(kind)));
        let stacked = Adapter::stack(&model.config, &[&first, &second]).unwrap();
        assert_eq!((stacked.options.rank, stacked.options.scale()), (4, 1.0));
        let mut folded = model.clone();
        first.fold_into(&mut folded);
        second.fold_into(&mut folded);
        let mut at_once = model.clone();
        stacked.fold_into(&mut at_once);
        for (a, b) in folded.weights.iter().zip(&at_once.weights) {
            assert!((a - b).abs() < 1e-6, "{a} one after the other, {b} stacked");
        }
    }
}

#[test]
fn results_do_not_depend_on_how_a_batch_is_cut() {
    for (model, options) in models().iter().flat_map(|model| kinds().into_iter().map(move |kind| (model, kind))) {
        let adapter = trained(model, options);
        let mut decoder = Decoder::new(model, 16);
        let whole = gradient(&mut decoder, with(model, &adapter), &keyed(&[0, 1, 2]), &D_LOGPS);
        let logps = decoder.logps(with(model, &adapter), &keyed(&[0, 1, 2]));
        let mut summed = vec![0.0; whole.len()];
        for (examples, responses) in [(&[2][..], 3..5), (&[0, 1], 0..3)] {
            let batch = keyed(examples);
            for (a, b) in decoder.logps(with(model, &adapter), &batch).iter().zip(&logps[responses.clone()]) {
                assert!((a / b - 1.0).abs() < 1e-5, "{a} in another batch, {b} together");
            }
            let part = gradient(&mut decoder, with(model, &adapter), &batch, &D_LOGPS[responses]);
            summed.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
        let largest = whole.iter().fold(0f32, |m, g| m.max(g.abs()));
        for (a, b) in summed.iter().zip(&whole) {
            assert!((a - b).abs() < 1e-5 * largest, "{a} in parts, {b} together");
        }
    }
}

#[test]
fn dropout_changes_with_the_seed_and_needs_one() {
    let model = &models()[0];
    let adapter = trained(model, kinds().remove(2));
    let mut decoder = Decoder::new(model, 16);
    let batch = keyed(&[0, 1, 2]);
    let seeds = [None, Some(11), Some(12)];
    let [evaluated, one, other] =
        seeds.map(|dropout_seed| decoder.logps(Parameters { dropout_seed, ..with(model, &adapter) }, &batch));
    assert!(one != other && one != evaluated && other != evaluated);
    let mut without = adapter.clone();
    without.options.dropout = 0.0;
    assert_eq!(evaluated, decoder.logps(with(model, &without), &batch));
}

#[test]
#[should_panic(expected = "dropout needs examples with keys")]
fn dropout_without_keys_is_refused() {
    let model = &models()[0];
    let adapter = trained(model, kinds().remove(2));
    Decoder::new(model, 16).logps(with(model, &adapter), &batch());
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let config = ModelConfig { hidden_size: 96, intermediate_size: 160, head_dim: 32, ..tiny_config() };
    let model = Model::random(config, 0.1, 3);
    let prompt: Vec<u32> = (0..60).map(|i| i % 11).collect();
    let mut batch = PackedBatch::default();
    (0..4).for_each(|key| batch.push_keyed(key, &prompt, &[&prompt, &prompt[7..]]));
    for options in kinds() {
        let adapter = trained(&model, options);
        let [one, three] = [1, 3].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| gradient(&mut Decoder::new(&model, 128), with(&model, &adapter), &batch, &[0.5; 8]))
        });
        assert_eq!(one, three);
    }
}
