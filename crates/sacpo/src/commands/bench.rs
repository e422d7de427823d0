//! `sacpo bench`.

mod generation;
mod scaling;
mod table;
mod training;

use engine::checkpoint::Checkpoint;
use engine::{Error, Model, Precision, Result, roofline};
use serde::Serialize;

use super::print_json;
use crate::cli::{Bench, Global, Shape};
use crate::{interrupt, ui};

/// What is measured; the keys that the command promises, and others.
#[derive(Debug, Serialize)]
struct Output {
    gemm_f32_gflops: f64,
    /// Nothing where the processor has no instructions for it.
    gemm_bf16_gflops: Option<f64>,
    bandwidth_gbs: f64,
    threads: usize,
    model: String,
    parameters: usize,
    train: training::Report,
    generate: generation::Report,
    scaling: scaling::Report,
}

/// What the machine does at best with the current pool of threads.
#[derive(Debug, Clone, Copy)]
struct Roofline {
    /// Floating-point operations per second of matrix products in the precision of training.
    flops: f64,
    /// Bytes read per second.
    bandwidth: f64,
}

pub(super) fn run(options: &Bench, global: Global) -> Result<()> {
    let (name, model) = match &options.model {
        Some(path) => (path.display().to_string(), Checkpoint::load(path)?.model),
        None => (options.shape.name().to_owned(), drawn(options.shape, options.seed)),
    };
    // first, so that the peak memory is that of a training
    ui::say(format!("{name}: {} weights, {} threads.", model.layout.len, rayon::current_num_threads()));
    let (steps, model) = training::measure(model, &training::Pairs::new(options), options)?;
    check()?;
    let peak_f32 = roofline::peak(Precision::F32);
    let peak_bf16 = Precision::Bf16.is_native().then(|| roofline::peak(Precision::Bf16));
    let flops = match options.dtype {
        Precision::F32 => peak_f32,
        Precision::Bf16 => peak_bf16.unwrap_or_else(|| roofline::peak(Precision::Bf16)),
    };
    let roofline = Roofline { flops, bandwidth: roofline::bandwidth() };
    check()?;
    let output = Output {
        gemm_f32_gflops: peak_f32 / 1e9,
        gemm_bf16_gflops: peak_bf16.map(|peak| peak / 1e9),
        bandwidth_gbs: roofline.bandwidth / 1e9,
        threads: rayon::current_num_threads(),
        model: name,
        parameters: model.layout.len,
        train: steps.report(options.dtype, roofline),
        generate: generation::measure(&model, roofline, options)?,
        scaling: scaling::measure(&model, roofline, options)?,
    };
    if global.json { print_json(&output) } else { ui::print(table::of(&output)) }
}

/// A model with random weights.
fn drawn(shape: Shape, seed: u64) -> Model {
    Model::random(shape.config(), 0.02, seed)
}

/// An error when Ctrl-C was pressed.
fn check() -> Result<()> {
    interrupt::check().map_err(|_| Error::Interrupted("Stopped, as you asked. A benchmark keeps nothing.".into()))
}
