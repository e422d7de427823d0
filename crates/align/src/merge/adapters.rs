//! Merging adapters of one base into one adapter of it.

use std::path::{Path, PathBuf};

use engine::checkpoint::StreamedModel;
use engine::{Adapter, Error, Result, Tokenizer};

use super::stream::{Input, Inputs, Merged, MergedAdapter, not_finite};
use super::{Method, Options};

/// How far from 1 the sum of a mean's coefficients may be, by rounding.
const ROUNDING: f64 = 1e-9;

/// The base of which the merge is an adapter: that of the models, if all are adapters of it and the merge is
/// θ_base + Σ cᵢ·sᵢ·Bᵢ·Aᵢ.
///
/// DoRA scales the rows of its base, so what it does is no such sum; neither is a linear merge whose coefficients do not
/// add up to 1, since it scales the base.
pub(super) fn common_base(inputs: &Inputs, options: &Options) -> Option<PathBuf> {
    let (base, models) = inputs.models.split_at(inputs.models.len() - options.weights.len());
    let is_sum = match options.method {
        Method::Linear => (options.coefficients().iter().sum::<f64>() - 1.0).abs() < ROUNDING,
        Method::TaskArithmetic => base.iter().all(|base| base.model.adapter.is_none()),
        _ => false,
    };
    let is_sum_of = |adapter: &Option<Adapter>| adapter.as_ref().is_some_and(|adapter| !adapter.options.dora);
    if !is_sum || !models.iter().all(|model| is_sum_of(&model.model.adapter)) {
        return None;
    }
    let folder = inputs.models[0].model.folder.canonicalize().ok()?;
    let is_same = |other: &Path| other.canonicalize().is_ok_and(|other| other == folder);
    inputs.models.iter().all(|input| is_same(&input.model.folder)).then_some(folder)
}

/// Writes the merge of adapters of `base` to the new PEFT folder `out`, with a tokenizer if there is one to go before the
/// base's.
///
/// # Errors
/// As [`merge`](super::merge).
pub(super) fn merge(
    inputs: &Inputs,
    options: &Options,
    base: PathBuf,
    tokenizer: Option<&Tokenizer>,
    out: &Path,
) -> Result<Merged> {
    let with_adapters = inputs.models.iter().filter_map(|input| Some((&input.model, input.model.adapter.as_ref()?)));
    let (models, adapters): (Vec<_>, Vec<_>) = with_adapters.unzip();
    for (model, adapter) in models.iter().zip(&adapters) {
        let mut specs = adapter.layout.specs.iter();
        if let Some(spec) = specs.find(|spec| !adapter.weights[spec.range.clone()].iter().all(|w| w.is_finite())) {
            return Err(not_finite(&model.path, &spec.name));
        }
    }
    let merged = Adapter::weighted_sum(&models[0].config, &adapters, &options.coefficients())?;
    if !merged.weights.iter().all(|weight| weight.is_finite()) {
        return Err(Error::Failed(
            "Some numbers of the merged adapter are too large for f32. Give smaller weights.".into(),
        ));
    }
    merged.save_with(tokenizer, &base, out)?;
    let input =
        |(model, adapter): (&&StreamedModel, &&Adapter)| Input { path: model.path.clone(), hash: adapter.hash() };
    Ok(Merged {
        models: models.iter().zip(&adapters).map(input).collect(),
        base: None,
        tensors: merged.layout.specs.len(),
        parameters: merged.layout.len,
        adapter: Some(MergedAdapter { base, rank: merged.options.rank }),
    })
}
