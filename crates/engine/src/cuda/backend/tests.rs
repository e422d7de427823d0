use half::bf16;

use super::*;
use crate::batch::PackedBatch;
use crate::config::{ModelConfig, OutputHead};
use crate::cuda::low_rank::AdapterOn;
use crate::cuda::pass::Rows;
use crate::cuda::tested::{Tested, devices};
use crate::cuda::weights::Weights;
use crate::decoder::{Decoder, DecoderOn, Keep, Parameters};
use crate::lora::{Adapter, LoraOptions, Projection};
use crate::model::tests::tiny_config;
use crate::model::{Model, ParamSpec};
use crate::ops::finite_difference::random;

const D_LOGPS: [f64; 3] = [0.7, -0.4, 1.1];

/// A batch, and the same with responses behind it.
fn batches(for_scores: bool) -> [PackedBatch; 2] {
    let mut own = if for_scores { PackedBatch::for_scores() } else { PackedBatch::default() };
    own = own.with_common(&[1, 6]);
    own.push(&[1, 6, 5, 3], &[&[4, 2], &[9, 9, 10, 2]]);
    own.push(&[1, 6, 7], &[&[8, 2]]);
    let mut whole = own.clone();
    whole.push_response(1, &[9, 9, 10, 2]);
    whole.push_response(0, &[8, 2, 6]);
    [own, whole]
}

fn decoder<T: Number>(device: &Arc<Tested>, model: &Model) -> DecoderOn<Cuda<Tested, T>> {
    let (shape, table) = (Arc::new(Shape::new(model)), RopeTable::new(&model.config, 16));
    DecoderOn::new(Cuda::new(device.clone(), shape.clone(), &table).unwrap(), shape)
}

/// How far gradients may be from those of the CPU in f32, by their norm: all of them, and those of a tensor. Where derivatives
/// cancel, those of the CPU in bf16 are eight hundredths apart.
const F32: [f64; 2] = [1e-4, 1e-4];
const BF16: [f64; 2] = [2e-2, 0.15];

/// Asserts that a gradient, and each of its tensors, differs from another by at most a share of its norm.
fn assert_near(specs: &[ParamSpec], got: &[f32], expected: &[f32], shares: [f64; 2]) {
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let difference = |range: Range<usize>| {
        let (got, expected) = (&got[range.clone()], &expected[range]);
        norm(&mut got.iter().zip(expected).map(|(a, b)| a - b)) / norm(&mut expected.iter().copied())
    };
    let of_all = difference(0..expected.len());
    assert!(of_all <= shares[0], "{of_all}");
    for spec in specs {
        let of_tensor = difference(spec.range.clone());
        assert!(of_tensor <= shares[1], "{}: {of_tensor}", spec.name);
    }
}

fn check<T: Number>(device: &Arc<Tested>, model: &Model, shares: [f64; 2]) {
    let [own, whole] = batches(model.config.head.is_score());
    let mut cpu = Decoder::new(model, 16);
    let expected = cpu.logps(&model.weights, &whole);
    let mut expected_gradient = vec![0.0; model.layout.len];
    cpu.forward_backward(&model.weights, &own, &D_LOGPS, Keep::All, &mut expected_gradient);
    let close = |got: &[f64], expected: &[f64]| {
        assert_eq!(got.len(), expected.len());
        let largest = expected.iter().fold(0f64, |most, x| most.max(x.abs()));
        assert!(got.iter().zip(expected).all(|(a, b)| (a - b).abs() <= shares[0] * largest), "{got:?}, {expected:?}");
    };

    let weights = Weights::<Tested, T>::new(device, &model.weights).unwrap();
    let [of_own, of_whole] =
        [&own, &whole].map(|batch| Rows::new(&**device, batch, batch.rows() == own.rows()).unwrap());
    let [own_pass, whole_pass] =
        [&of_own, &of_whole].map(|rows| Pass { weights: &weights, adapter: None, dropout_seed: None, rows });
    let mut decoder = decoder::<T>(device, model);
    let zeros = || Buffer::<Tested, f32>::zeros(device, model.layout.len).unwrap();
    let mut gradients = Vec::new();
    for keep in [Keep::All, Keep::Inputs] {
        close(&decoder.forward(&whole_pass, &whole, keep).unwrap(), &expected);
        let mut gradient = zeros();
        decoder.backward(&own_pass, &own, &D_LOGPS, &mut own_pass.gradient(gradient.view_mut())).unwrap();
        gradients.push(gradient.to_vec(device).unwrap());
        close(&decoder.logps(&own_pass, &own).unwrap(), &expected[..3]);
    }
    let mut gradient = zeros();
    let d_gradient = &mut own_pass.gradient(gradient.view_mut());
    let logps = decoder.forward_backward(&own_pass, &own, &D_LOGPS, Keep::All, d_gradient).unwrap();
    close(&logps, &expected[..3]);
    gradients.push(gradient.to_vec(device).unwrap());
    for gradient in &gradients {
        assert_near(&model.layout.specs, gradient, &expected_gradient, shares);
    }
    let mut again = zeros();
    let d_gradient = &mut own_pass.gradient(again.view_mut());
    decoder.forward_backward(&own_pass, &own, &D_LOGPS, Keep::All, d_gradient).unwrap();
    assert!(again.to_vec(device).unwrap() == gradients[2], "the same pass gives the same bits");
}

#[test]
fn log_probabilities_and_gradients_are_those_of_the_cpu() {
    let base = tiny_config();
    let configs = [
        base.clone(),
        ModelConfig { tie_word_embeddings: true, num_key_value_heads: 1, ..base.clone() },
        ModelConfig { head: OutputHead::Score { pad_token_id: None }, ..base },
    ];
    for device in devices().map(Arc::new) {
        for (seed, config) in configs.iter().enumerate() {
            check::<f32>(&device, &Model::random(config.clone(), 0.4, seed as u64), F32);
            // larger weights would magnify the rounding
            check::<bf16>(&device, &Model::random(config.clone(), 0.1, seed as u64), BF16);
        }
    }
}
fn check_adapted<T: Number>(device: &Arc<Tested>, model: &Model, options: LoraOptions, shares: [f64; 2]) {
    let mut adapter = Adapter::new(model, options, 5).unwrap();
    let noise = random(adapter.weights.len(), 6);
    adapter.weights.iter_mut().zip(noise).for_each(|(weight, noise)| *weight += 0.1 * noise);
    let for_scores = model.config.head.is_score();
    let mut batch = if for_scores { PackedBatch::for_scores() } else { PackedBatch::default() };
    batch.push_keyed(0, &[1, 5, 3], &[&[4, 2], &[9, 9, 10, 2]]);
    batch.push_keyed(1, &[1, 7], &[&[8, 2]]);
    let parameters = Parameters { base: &model.weights, adapter: Some(&adapter), dropout_seed: Some(11) };
    let mut expected = vec![0.0; adapter.layout.len];
    let mut cpu = Decoder::new(model, 16);
    let expected_logps = cpu.forward_backward(parameters, &batch, &D_LOGPS, Keep::All, &mut expected);

    let weights = Weights::<Tested, T>::new(device, &model.weights).unwrap();
    let (on_device, rows) = (AdapterOn::new(&**device, &adapter).unwrap(), Rows::new(&**device, &batch, true).unwrap());
    let pass = Pass { weights: &weights, adapter: Some(&on_device), dropout_seed: Some(11), rows: &rows };
    let mut decoder = decoder::<T>(device, model);
    for keep in [Keep::All, Keep::Inputs] {
        let mut gradient = Buffer::<Tested, f32>::zeros(device, adapter.layout.len).unwrap();
        let logps = decoder.forward(&pass, &batch, keep).unwrap();
        decoder.backward(&pass, &batch, &D_LOGPS, &mut pass.gradient(gradient.view_mut())).unwrap();
        let largest = expected_logps.iter().fold(0f64, |most, x| most.max(x.abs()));
        let near = |(a, b): (&f64, &f64)| (a - b).abs() <= shares[0] * largest;
        assert!(logps.iter().zip(&expected_logps).all(near), "{logps:?}, {expected_logps:?}");
        assert_near(&adapter.layout.specs, &gradient.to_vec(device).unwrap(), &expected, shares);
    }
}

#[test]
fn passes_with_an_adapter_are_those_of_the_cpu() {
    let all = LoraOptions { rank: 3, alpha: 5.0, ..LoraOptions::default() };
    let some = vec![Projection::DownProj, Projection::VProj, Projection::QProj, Projection::UpProj];
    let score = ModelConfig { head: OutputHead::Score { pad_token_id: None }, ..tiny_config() };
    let cases = [
        (tiny_config(), all.clone()),
        (tiny_config(), LoraOptions { rank: 1, rank_stabilized: true, targets: some, ..all.clone() }),
        (tiny_config(), LoraOptions { dropout: 0.3, ..all.clone() }),
        (score, all.clone()),
    ];
    for device in devices().map(Arc::new) {
        for (config, options) in &cases {
            check_adapted::<f32>(&device, &Model::random(config.clone(), 0.4, 1), options.clone(), F32);
            check_adapted::<bf16>(&device, &Model::random(config.clone(), 0.1, 1), options.clone(), BF16);
        }
        let model = Model::random(tiny_config(), 0.4, 1);
        let dora = Adapter::new(&model, LoraOptions { dora: true, ..all.clone() }, 1).unwrap();
        let refused = AdapterOn::<Tested, f32>::new(&device, &dora).unwrap_err().to_string();
        assert!(refused.contains("DoRA runs on the CPU only"), "{refused}");
    }
}
