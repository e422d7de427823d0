//! `sacpo train reward` and `sacpo train cost`.

use std::collections::HashMap;
use std::path::PathBuf;

use align::data::{Dataset, TokenizedPair};
use align::judge::Judge;
use align::log::read_metric;
use align::objective::ScoreLoss;
use align::reward;
use align::trainer::{Monitor, discard_state};
use engine::checkpoint::{Checkpoint, GenerationConfig};
use engine::{Error, Result};
use evaluate::rating::Mean;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::run::{recipe_of_step, text};
use super::{on_threads, print_json};
use crate::cli::{Global, TrainScorer};
use crate::hub::Hub;
use crate::pipeline::{self, RunFolder};
use crate::tracking::{About, tracked};
use crate::ui;
use sacpo::recipe::Recipe;

/// `results.json`, written last: the model is complete.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// Names everything that the model and its numbers depend on.
    key: String,
    kind: String,
    metric: String,
    /// The share of held-out pairs whose chosen response has the higher reward, or the lower cost; ties count half. Nothing
    /// where no pair is held out.
    accuracy: Option<f64>,
    /// The 95 % interval of the accuracy, over prompts.
    interval: Option<[f64; 2]>,
    pairs: usize,
    prompts: usize,
    /// The mean difference of the rewards of chosen and rejected responses.
    margin: Option<f64>,
    /// The share of held-out responses whose cost has the right sign, and its interval.
    sign_accuracy: Option<f64>,
    sign_interval: Option<[f64; 2]>,
    /// Pairs that were trained on, and the seconds that it took.
    trained_on: usize,
    seconds: f64,
    checkpoint: PathBuf,
}

pub(super) fn run(loss: ScoreLoss, options: &TrainScorer, global: Global) -> Result<()> {
    let mut recipe = recipe_of(options)?;
    Hub::new().fetch_recipe(&mut recipe)?;
    on_threads(global.threads.or(recipe.run.threads), || carry_out(loss, &recipe, global))
}

/// The recipe of one step whose data and options of training are those of the command.
fn recipe_of(options: &TrainScorer) -> Result<Recipe> {
    let sections = ["data.", "train.", "run."];
    if let Some(other) = options.set.iter().find(|set| !sections.iter().any(|section| set.starts_with(section))) {
        return Err(Error::input(format!(
            "--set {other} is not about data., train. or run., which is all that a reward or cost model takes of a recipe."
        )));
    }
    let mut step = json!({"metric": options.metric, "beta": 1.0, "data": text(&options.data)?});
    if let Some(path) = &options.validation_data {
        step["validation_data"] = text(path)?.into();
    }
    if let Some(format) = options.format {
        step["format"] = format.name().into();
    }
    recipe_of_step(step, [&options.model, &options.out], options.seed, &options.set)
}

fn carry_out(loss: ScoreLoss, recipe: &Recipe, global: Global) -> Result<()> {
    let (step, seed) = (&recipe.steps[0], recipe.run.seed);
    let base = Checkpoint::load(recipe.model.base.path())?;
    if let Some(lora) = step.train.lora() {
        lora.validate(&base.model.config)?;
    }
    let folder = RunFolder::open(&recipe.run.out)?;
    if folder.path.join("recipe.toml").exists() {
        return Err(Error::input(format!(
            "{} is the folder of a run of a recipe. Choose another folder with --out.",
            folder.path.display()
        )));
    }
    let pairs = match pipeline::load_scored_pairs(step, loss, &base, seed, &folder.cache()) {
        Ok(pairs) => pairs,
        Err(error) => {
            // what was tokenised before a stop is of use
            if !matches!(error, Error::Interrupted(_)) {
                folder.discard_if_new();
            }
            return Err(error);
        }
    };
    let options = pipeline::train_options(step, seed, recipe.run.memory_gib);
    let base_hash = base.model.hash();
    let start = base.into_scorer();
    let [train, held_out] = pairs.each_ref().map(|pairs| Dataset::Pairs(pairs.clone()).fingerprint());
    let parts = [
        &*start.model.hash(),
        &start.tokenizer.hash(),
        loss.name(),
        &step.metric,
        &options.course(),
        &train,
        &held_out,
    ];
    let key = blake3::hash(parts.join("\n").as_bytes()).to_hex().to_string();
    let record = match finished(&folder, &key)? {
        Some(record) => {
            ui::say(format!("The {} model in {} is complete. Nothing is done.", loss.name(), folder.path.display()));
            record
        }
        None => {
            let trained_on = [&*base_hash, &train].map(str::to_owned);
            train_and_judge(loss, recipe, &folder, start, &pairs, trained_on, key)?
        }
    };
    if global.json { print_json(&record) } else { ui::print(in_words(&record)) }
}

/// The record of a model that is complete.
///
/// # Errors
/// One that depends on something else than is asked for.
fn finished(folder: &RunFolder, key: &str) -> Result<Option<Record>> {
    let path = folder.path.join("results.json");
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("read", &path)(error)),
    };
    match serde_json::from_slice::<Record>(&bytes) {
        Ok(record) if record.key == key => Ok(Some(record)),
        _ => Err(Error::input(format!(
            "{} holds what was made from another model, from other data, or by other options. Choose another folder with --out, or \
             delete that one.",
            folder.path.display()
        ))),
    }
}

/// Trains the model, keeps it, and says how it ranks the held-out pairs. The hashes are those of base model and data.
fn train_and_judge(
    loss: ScoreLoss,
    recipe: &Recipe,
    folder: &RunFolder,
    start: Checkpoint,
    [pairs, held_out]: &[Vec<TokenizedPair>; 2],
    [base_hash, data_hash]: [String; 2],
    key: String,
) -> Result<Record> {
    let step = &recipe.steps[0];
    let options = pipeline::train_options(step, recipe.run.seed, recipe.run.memory_gib);
    let sides = [pairs.as_slice(), held_out];
    let about = About {
        name: format!("{} model", loss.name()),
        parameters: pipeline::parameters(step, &options, recipe.model.base.to_string(), pairs.len()),
    };
    let Checkpoint { model, tokenizer, .. } = start;
    let train = |monitor: &mut dyn Monitor| reward::train(model, loss, sides, &options, &folder.path, monitor);
    let made = tracked(&folder.path, &about, train)?;
    let checkpoint = folder.path.join("checkpoint");
    let scorer = Checkpoint { model: made.policy, tokenizer, generation: GenerationConfig::default() };
    scorer.save(&checkpoint)?;
    let provenance = json!({
        "kind": loss.name(),
        "metric": step.metric,
        "model": scorer.model.hash(),
        "base": {"path": recipe.model.base, "commit": recipe.model.base.commit(), "hash": base_hash},
        "data": {"path": step.data, "commit": step.data.commit(), "hash": data_hash, "pairs": pairs.len()},
        "seed": recipe.run.seed,
        "version": env!("CARGO_PKG_VERSION"),
    });
    pipeline::write_json(&checkpoint.join("provenance.json"), &provenance)?;
    let seconds = read_metric(&folder.path.join("metrics.jsonl"), "seconds")?.into_iter().map(|(_, s)| s).sum();

    let items: Vec<_> = held_out.iter().map(TokenizedPair::sequences).collect();
    let bar = ui::bar(items.len() as u64, "held-out pairs");
    let judge = Judge::Model { model: &scorer.model, loss };
    let rewards = judge.scores(&items, options.micro_batch_tokens, Some(&folder.cache()), &mut ui::advance(&bar))?;
    bar.finish_and_clear();
    let mut numbers: HashMap<&[u32], usize> = HashMap::new();
    let prompts: Vec<usize> = items
        .iter()
        .map(|item| {
            let next = numbers.len();
            *numbers.entry(item.prompt).or_insert(next)
        })
        .collect();
    let margins: Vec<f64> = rewards.iter().map(|rewards| rewards[0] - rewards[1]).collect();
    let wins = margins.iter().map(|&margin| if margin == 0.0 { 0.5 } else { f64::from(u8::from(margin > 0.0)) });
    let accuracy = Mean::of(prompts.iter().copied().zip(wins));
    let signs = || {
        let of_pair = |((rewards, pair), &prompt): ((&Vec<f64>, &TokenizedPair), &usize)| {
            let responses = rewards.iter().zip(pair.is_unsafe?);
            let right = responses.filter(|(reward, is_unsafe)| (**reward < 0.0) == *is_unsafe).count();
            Some((prompt, right as f64 / 2.0))
        };
        Mean::of(rewards.iter().zip(held_out).zip(&prompts).filter_map(of_pair))
    };
    let signs = if loss == ScoreLoss::Cost { signs() } else { None };
    let record = Record {
        key,
        kind: loss.name().into(),
        metric: step.metric.clone(),
        accuracy: accuracy.map(|accuracy| accuracy.mean),
        interval: accuracy.and_then(|accuracy| accuracy.interval),
        pairs: held_out.len(),
        prompts: numbers.len(),
        margin: accuracy.map(|_| margins.iter().sum::<f64>() / margins.len() as f64),
        sign_accuracy: signs.map(|signs| signs.mean),
        sign_interval: signs.and_then(|signs| signs.interval),
        trained_on: pairs.len(),
        seconds,
        checkpoint,
    };
    pipeline::write_json(&folder.path.join("results.json"), &record)?;
    discard_state(&folder.path)?;
    Ok(record)
}

fn in_words(record: &Record) -> String {
    let between = |interval: Option<[f64; 2]>| {
        interval.map(|[low, high]| format!(", 95 % interval {low:.3} to {high:.3}")).unwrap_or_default()
    };
    let mut text = match record.accuracy {
        Some(accuracy) => format!(
            "Accuracy on {} held-out pairs of {} prompts: {accuracy:.3}{}. Mean margin {:.3}.",
            record.pairs,
            record.prompts,
            between(record.interval),
            record.margin.unwrap_or_default()
        ),
        None => "No pair is held out, so the accuracy is not known.".to_owned(),
    };
    if let Some(signs) = record.sign_accuracy {
        text += &format!(" Responses whose cost has the right sign: {signs:.3}{}.", between(record.sign_interval));
    }
    format!("{text}\nModel: {}", record.checkpoint.display())
}
