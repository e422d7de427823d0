//! The optimizers against PyTorch's in float64, and 8-bit moments against bitsandbytes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use engine::ParamSpec;
use engine::optim::{Optimizer, OptimizerKind, OptimizerOptions, StateValues};
use serde_json::Value;

fn fixture() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/optimizers.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

fn singles(value: &Value) -> impl Iterator<Item = f32> {
    numbers(value).into_iter().map(|v| v as f32)
}

fn shape(value: &Value) -> Vec<usize> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as usize).collect()
}

fn optimizer(kind: OptimizerKind, weight_decay: &Value, specs: &[ParamSpec]) -> Optimizer {
    let weight_decay = weight_decay.as_f64().unwrap();
    Optimizer::new(kind, OptimizerOptions { weight_decay, ..kind.defaults() }, specs)
}

#[test]
fn six_steps_equal_pytorchs() {
    let fixture = fixture();
    let (mut specs, mut start) = (Vec::new(), Vec::new());
    for tensor in fixture["tensors"].as_array().unwrap() {
        let begin = start.len();
        start.extend(singles(&tensor["weights"]));
        let name = tensor["name"].as_str().unwrap().to_owned();
        specs.push(ParamSpec { name, shape: shape(&tensor["shape"]), range: begin..start.len() });
    }
    for kind in [OptimizerKind::AdamW, OptimizerKind::Lion, OptimizerKind::Muon] {
        let mut optimizer = optimizer(kind, &fixture["weight_decay"], &specs);
        let mut weights: Vec<f32> = start.clone();
        for step in fixture["steps"].as_array().unwrap() {
            let mut gradient: Vec<f32> = step["gradients"].as_array().unwrap().iter().flat_map(singles).collect();
            let learning_rate = step["learning_rate"].as_f64().unwrap();
            optimizer.step(&mut weights, &mut gradient, learning_rate, step["scale"].as_f64().unwrap());
        }
        for (spec, expected) in specs.iter().zip(fixture["final"][kind.name()].as_array().unwrap()) {
            let expected = numbers(expected);
            let largest = expected.iter().fold(0.0, |most: f64, e| most.max(e.abs()));
            let differences = weights[spec.range.clone()].iter().zip(&expected).map(|(&w, e)| (f64::from(w) - e).abs());
            let worst = differences.fold(0.0, f64::max) / largest;
            assert!(worst <= 1e-5, "{} {}: {worst:e}", kind.name(), spec.name);
        }
    }
}

/// The numbers that the fixture's maker computes from the same integers.
fn pseudorandom(len: usize, step: usize) -> Vec<f32> {
    let number = |i: usize| {
        let k = (i * 7919 + step * 104_729) % 1009;
        let sign = if k % 2 == 1 { 1.0 } else { -1.0 };
        (0.5 + k as f32 / 1009.0) * sign * 0.5f32.powi((i % 9) as i32)
    };
    (0..len).map(number).collect()
}

#[test]
fn eight_bit_moments_equal_those_of_bitsandbytes() {
    let fixture = &fixture()["eight_bit"];
    let shape = shape(&fixture["shape"]);
    let len = shape.iter().product();
    let specs = [ParamSpec { name: "w".into(), shape, range: 0..len }];
    let mut optimizer = optimizer(OptimizerKind::AdamW8bit, &fixture["weight_decay"], &specs);
    let mut weights = pseudorandom(len, 0);
    for step in 1..=fixture["steps"].as_u64().unwrap() as usize {
        let mut gradient = pseudorandom(len, step);
        optimizer.step(&mut weights, &mut gradient, fixture["learning_rate"].as_f64().unwrap(), 1.0);
    }
    for (weight, expected) in weights.iter().step_by(16).zip(singles(&fixture["every_16th_weight"])) {
        assert!((weight - expected).abs() < 1e-5, "{weight} instead of {expected}");
    }
    for tensor in optimizer.state() {
        let [_, moment, what] = tensor.name.split('.').collect::<Vec<_>>()[..] else { panic!("{}", tensor.name) };
        let expected = &fixture[moment][what];
        match tensor.values {
            StateValues::F32(absmax) => {
                assert_eq!(tensor.shape, [len.div_ceil(256)]);
                assert!(absmax.iter().zip(singles(expected)).all(|(a, e)| (a / e - 1.0).abs() < 1e-5));
            }
            StateValues::U8(codes) => {
                let hex = expected.as_str().unwrap();
                let expected = (0..len).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap());
                // roundings differ in the last bit, so a number half-way between two codes may take either
                let different = codes.iter().zip(expected).filter(|(c, e)| **c != *e).count();
                assert!(different <= len / 1000, "{moment}: {different} of {len} codes differ");
            }
        }
    }
}
