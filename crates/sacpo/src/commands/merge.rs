//! `sacpo merge`.

use std::path::Path;
use std::time::Instant;

use align::merge::{self, Merged, MergedAdapter, Options};
use engine::{Error, Result, memory};
use serde::Serialize;

use super::{print_json, refuse_existing};
use crate::cli::{Global, Merge};
use crate::ui;

#[derive(Serialize)]
struct Output<'a> {
    method: &'static str,
    weights: &'a [f64],
    normalise: bool,
    /// Of sparse methods.
    density: Option<f64>,
    /// Of random methods.
    seed: Option<u64>,
    #[serde(flatten)]
    merged: &'a Merged,
    seconds: f64,
    peak_memory_bytes: Option<usize>,
    out: &'a Path,
}

pub(super) fn run(command: &Merge, global: Global) -> Result<()> {
    let Some((out, models)) = command.models_and_out.split_last() else {
        return Err(Error::input("Give the models to merge and the folder to write."));
    };
    let options = options(command, models.len())?;
    options.validate(models.len(), command.base.is_some())?;
    refuse_existing(out)?;
    let start = Instant::now();
    let bar = ui::bar(0, "weights");
    let merged = merge::merge(models, command.base.as_deref(), &options, out, &mut |done, total| {
        bar.set_length(total as u64);
        ui::advance(&bar)(done)
    })?;
    bar.finish_and_clear();
    let seconds = start.elapsed().as_secs_f64();
    let Merged { tensors, parameters, ref adapter, .. } = merged;
    let what = match adapter {
        None => "a model".to_owned(),
        Some(MergedAdapter { base, rank }) => format!("an adapter of rank {rank} on {}", base.display()),
    };
    let method = options.method;
    ui::say(format!(
        "Merged {} models by {} into {}, {what}: {parameters} parameters in {tensors} tensors, {seconds:.1} s.",
        models.len(),
        method.name(),
        out.display()
    ));
    if !global.json {
        return Ok(());
    }
    print_json(&Output {
        method: method.name(),
        weights: &options.weights,
        normalise: options.normalise,
        density: command.density,
        seed: method.is_random().then_some(options.seed),
        merged: &merged,
        seconds,
        peak_memory_bytes: memory::peak(),
        out,
    })
}

/// What the command line says about a merge of so many models.
fn options(command: &Merge, models: usize) -> Result<Options> {
    let method = command.method;
    if command.q.is_some() && (models != 2 || method.needs_base()) {
        return Err(Error::input(
            "--q divides between two models merged by linear or slerp. Give --weight once for each model instead.",
        ));
    }
    let density = match (method.is_sparse(), command.density) {
        (true, Some(density)) => density,
        (false, None) => 1.0,
        (true, None) => {
            return Err(Error::input(format!(
                "{} keeps a share of what each model has learnt: give it by --density, such as --density 0.5.",
                method.name()
            )));
        }
        (false, Some(_)) => {
            return Err(Error::input(format!("{} keeps everything. Leave --density out.", method.name())));
        }
    };
    if command.extrapolate && method.needs_base() {
        return Err(Error::input(format!("{} takes any weights. Leave --extrapolate out.", method.name())));
    }
    let weights = match (command.q, command.weight.as_slice()) {
        (Some(q), _) => vec![1.0 - q, q],
        (None, []) => vec![1.0; models],
        (None, weights) => weights.to_vec(),
    };
    let normalise = command.normalise.unwrap_or(method.normalises());
    Ok(Options { method, weights, normalise, density, seed: command.seed, extrapolate: command.extrapolate })
}
