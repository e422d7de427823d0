//! `manifest.json`: what a finished run was made from and by.

use std::path::{Path, PathBuf};

use engine::checkpoint::load_model;
use engine::{Error, Result, memory};
use serde::Serialize;
use serde_json::Value;

use super::record::{Provenance, write_json};
use super::{Inputs, Outcome, RunFolder};
use sacpo::recipe::Recipe;

/// What a finished run was made from and by. It is written last.
#[derive(Debug, Serialize)]
struct Manifest<'a> {
    /// Names everything that the run's results depend on.
    key: &'a str,
    version: &'static str,
    seed: u64,
    machine: Machine,
    policies: Vec<Made<'a>>,
    /// Seconds of the call that finished the run.
    seconds: f64,
    peak_memory_bytes: Option<usize>,
}

#[derive(Debug, Serialize)]
struct Machine {
    system: &'static str,
    architecture: &'static str,
    instruction_set: String,
    threads: usize,
    memory_bytes: Option<usize>,
}

#[derive(Debug, Serialize)]
struct Made<'a> {
    /// Seconds of training or merging, also of the calls before the last one.
    seconds: f64,
    #[serde(flatten)]
    provenance: &'a Provenance,
}

/// Names everything that a run's results depend on: the recipe but for where, how fast and in what memory it runs, the base model, the data and
/// prompts, and the arithmetic.
///
/// # Errors
/// If a path of the recipe is not UTF-8, or a file of prompts cannot be read.
pub(crate) fn key(recipe: &Recipe, inputs: &Inputs) -> Result<String> {
    let mut recipe = recipe.clone();
    recipe.run.out = PathBuf::new();
    (recipe.run.threads, recipe.run.memory_gib) = (None, None);
    recipe.steps.iter_mut().for_each(|step| step.train.micro_batch_tokens = None);
    let mut hasher = blake3::Hasher::new();
    for part in [env!("CARGO_PKG_VERSION"), &engine::arithmetic(), &recipe.to_toml()?, &inputs.base.hash] {
        hasher.update(part.as_bytes()).update(b"\n");
    }
    hasher.update(inputs.base.tokenizer.hash().as_bytes());
    hasher.update(format!("{:?}", inputs.base.generation).as_bytes());
    for hash in inputs.scorers.values() {
        hasher.update(hash.as_bytes());
    }
    for data in &inputs.data {
        hasher.update(data.train.fingerprint().as_bytes()).update(data.validation.fingerprint().as_bytes());
    }
    let choice = recipe.constraints.first().and_then(|constraint| constraint.choice.as_ref());
    for prompts in choice.into_iter().flat_map(|choice| [&choice.prompts, &choice.held_out_prompts]).flatten() {
        for file in align::data::files(prompts.path())? {
            hasher.update(blake3::hash(&std::fs::read(&file).map_err(Error::io("read", &file))?).as_bytes());
        }
    }
    inputs.evaluation.hash_into(&mut hasher);
    Ok(hasher.finalize().to_hex().to_string())
}

/// The results of a run with this key, if the folder holds it finished and with all its checkpoints as they were made.
pub(crate) fn finished(folder: &RunFolder, key: &str) -> Option<Value> {
    let read =
        |name: &str| -> Option<Value> { serde_json::from_slice(&std::fs::read(folder.path.join(name)).ok()?).ok() };
    let (manifest, results) = (read("manifest.json")?, read("results.json")?);
    // the base model is part of the key
    let made = |policy: &Value| policy["made_by"] == "training" || policy["made_by"] == "merge";
    let whole = |policy: &Value| {
        let result = results["policies"].as_array()?.iter().find(|result| result["name"] == policy["policy"])?;
        let model = load_model(Path::new(result["checkpoint"].as_str()?)).ok()?;
        (policy["model"] == model.hash()).then_some(())
    };
    let mut policies = manifest["policies"].as_array()?.iter().filter(|policy| made(policy));
    (manifest["key"] == key && policies.all(|policy| whole(policy).is_some())).then_some(results)
}

/// Says that the run is finished, in its folder.
///
/// # Errors
/// If it cannot be written.
pub(crate) fn write(folder: &RunFolder, key: &str, recipe: &Recipe, outcome: &Outcome, seconds: f64) -> Result<()> {
    let policies = outcome.policies.iter();
    let manifest = Manifest {
        key,
        version: env!("CARGO_PKG_VERSION"),
        seed: recipe.run.seed,
        machine: Machine {
            system: std::env::consts::OS,
            architecture: std::env::consts::ARCH,
            instruction_set: engine::instruction_set(),
            threads: rayon::current_num_threads(),
            memory_bytes: memory::available(),
        },
        policies: policies.map(|policy| Made { seconds: policy.seconds, provenance: &policy.provenance }).collect(),
        seconds,
        peak_memory_bytes: memory::peak(),
    };
    write_json(&folder.path.join("manifest.json"), &manifest)
}
