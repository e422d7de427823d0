//! `sacpo quickstart`: the whole method in a world where everything is known exactly.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use align::data::{Prompt, tokenize_prompt};
use align::objective::{self, Objective};
use align::task::{Demonstration, Demonstrations};
use align::trainer::{Policy, TrainOptions, discard_state, train};
use align::world::{self, Evaluation, Metric, World};
use engine::checkpoint::{Checkpoint, GenerationConfig};
use engine::optim::{OptimizerKind, Schedule};
use engine::tokenizer::Tokenizer;
use engine::{Error, Model, Precision, Result};
use evaluate::frontier::{Metrics, Point, Target, frontier_svg, table};
use serde_json::{Value, json};

use super::print_json;
use crate::cli::{Global, Quickstart, Size};
use crate::interrupt;
use crate::pipeline::{self, RunFolder, manifest};
use crate::report;
use crate::ui;
use sacpo::recipe::{Recipe, Step};

/// The recipe that the quickstart runs, with its paths and sizes set below.
const RECIPE: &str = include_str!("../../../../recipes/quickstart.toml");

/// A policy, what it is worth, and how far it is from the tilt of its start that is its step's optimum.
type Judged<'a> = (&'a pipeline::Policy, Evaluation, Option<f64>);

/// Amounts of data.
struct Amounts {
    demonstrations: usize,
    epochs: usize,
    pairs: usize,
}

impl Amounts {
    fn of(size: Size) -> Self {
        match size {
            Size::Small => Self { demonstrations: 6_000, epochs: 2, pairs: 800 },
            Size::Full => Self { demonstrations: 40_000, epochs: 2, pairs: 16_000 },
        }
    }
}

pub(super) fn run(options: &Quickstart, global: Global) -> Result<()> {
    let start = Instant::now();
    let amounts = Amounts::of(options.size);
    check_folder(&options.out)?;
    let folder = RunFolder::open(&options.out)?;
    claim(&folder, options)?;
    let world = World::new(options.seed);
    let base = folder.path.join("base");
    ui::say(format!(
        "A world of {} prompts and {} tokens; every policy is evaluated exactly on {} held-out prompts.",
        world.train_prompts.len() + world.heldout_prompts.len(),
        world.vocab_size(),
        world.heldout_prompts.len()
    ));
    // a recipe that does not suit the world is found out before anything is trained
    let recipe = recipe(&world, &amounts, options, &folder, &base)?;
    train_base(&world, &amounts, options.seed, &base, &folder)?;
    let inputs = pipeline::load_inputs(&recipe, pipeline::load_base(&recipe)?, &folder.cache())?;
    let key = manifest::key(&recipe, &inputs)?;
    let outcome = pipeline::run(&recipe, inputs, &folder)?;

    let mut policies = Vec::new();
    let mut logps = Vec::new();
    for policy in &outcome.policies {
        interrupt::check()?;
        logps.push(world.answer_logps(&world.heldout_prompts, policy.load()?.mixture()?));
        let (base, own) = (&logps[0], &logps[logps.len() - 1]);
        // labels and margins from judges, and the flags of `safe-dpo`, have other optima than the tilt by the step's metric
        let step = recipe.steps.iter().find(|step| Some(&step.name) == policy.step.as_ref());
        let tilts =
            step.filter(|s| s.relabel.is_none() && !["modpo", "safe-dpo"].contains(&s.objective)).and_then(metric_of);
        let distance = policy.origin.zip(tilts).map(|((temperature, origin), metric)| {
            world.distance(own, &world.optimum(&logps[origin], metric, temperature)?)
        });
        policies.push((policy, world.evaluate(own, base)?, distance.transpose()?));
    }
    let constraint = outcome.constraint.as_ref().map(|constraint| exact(&world, constraint, &policies, &logps));
    let (constraint, verdict) = constraint.transpose()?.unwrap_or_default();
    let points: Vec<Point> = policies
        .iter()
        .map(|(policy, worth, _)| Point {
            name: policy.name().to_owned(),
            step: group_of(policy).to_owned(),
            beta_over_lambda: policy.beta_over_lambda,
            q: policy.q,
            reward: worth.reward,
            safety: worth.risky_safety,
            kl: Some(worth.kl),
            ..Point::default()
        })
        .collect();
    let metrics = Metrics { reward: "E[r*], helpfulness", safety: "E[g*] on risky prompts, safety" };
    let table = table(metrics, &points)?;
    folder.write(
        "frontier.svg",
        &frontier_svg("Quickstart: helpfulness against safety", metrics, &points, Target::default())?,
    )?;
    let details = details(&policies);
    folder.write(
        "summary.md",
        &format!("# Quickstart\n\n{table}\n{details}\n{verdict}\n\n![Frontier](frontier.svg)\n"),
    )?;
    let result = json!({
        "policies": policies.iter().map(policy_json).collect::<Vec<_>>(),
        "constraint": constraint,
        "seconds": start.elapsed().as_secs_f64(),
        "peak_memory_bytes": engine::memory::peak(),
        "out": folder.path,
    });
    folder.write("results.json", &format!("{result:#}\n"))?;
    manifest::write(&folder, &key, &recipe, &outcome, start.elapsed().as_secs_f64())?;
    report::finish(&folder.path);
    if global.json {
        return print_json(&result);
    }
    ui::print(format!("{table}\n{verdict}\nPlot: {}", folder.path.join("frontier.svg").display()))
}

/// What else is known exactly of each policy, as a Markdown table.
fn details(policies: &[Judged<'_>]) -> String {
    let mut table = String::from(
        "| policy | E[g*], all prompts | E[r*], risky prompts | refuses harmless prompts | outside the grammar | \
         distance from its optimum |\n|---|---:|---:|---:|---:|---:|\n",
    );
    for (policy, worth, distance) in policies {
        let distance = distance.map_or("–".to_owned(), |distance| format!("{distance:.3}"));
        table += &format!(
            "| {} | {:.3} | {:.3} | {:.3} | {:.3} | {distance} |\n",
            policy.name(),
            worth.safety,
            worth.risky_reward,
            worth.harmless_refusal,
            worth.outside
        );
    }
    table
}

fn policy_json((policy, worth, distance): &Judged<'_>) -> Value {
    json!({
        "name": policy.name(),
        "step": policy.step,
        "beta_over_lambda": policy.beta_over_lambda,
        "q": policy.q,
        "reward": worth.reward,
        "safety": worth.safety,
        "kl": worth.kl,
        "risky_reward": worth.risky_reward,
        "risky_safety": worth.risky_safety,
        "harmless_refusal": worth.harmless_refusal,
        "outside": worth.outside,
        "distance_to_optimum": distance,
        "policy": policy.source.to_string(),
        "checkpoint": policy.path(),
    })
}

/// Checks that a folder, before anything is written there, holds nothing but a run, if it is there at all.
fn check_folder(path: &Path) -> Result<()> {
    let names: Vec<_> =
        std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.file_name()).collect();
    let is_run = ["quickstart.json", "recipe.toml"].iter().any(|file| names.iter().any(|name| name == file));
    match names.iter().find(|name| !name.to_string_lossy().starts_with('.')).filter(|_| !is_run) {
        Some(other) => Err(Error::input(format!(
            "{} holds {}, and so something else than a quickstart. Choose an empty folder, or one that does not exist, with --out.",
            path.display(),
            other.display()
        ))),
        None => Ok(()),
    }
}

/// Marks the folder as one of this size and seed, whose base model and data are used again.
fn claim(folder: &RunFolder, options: &Quickstart) -> Result<()> {
    let path = folder.path.join("quickstart.json");
    let wanted = json!({"size": options.size, "seed": options.seed, "objective": options.objective});
    match std::fs::read(&path) {
        Ok(found) if serde_json::from_slice(&found).is_ok_and(|found: Value| found == wanted) => Ok(()),
        Ok(_) => Err(Error::input(format!(
            "{} holds a quickstart of another size, seed or objective ({}). Choose another folder with --out, or delete that one.",
            folder.path.display(),
            path.display()
        ))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            if folder.path.join("recipe.toml").exists() {
                return Err(Error::input(format!(
                    "{} holds a run that is no quickstart. Choose another folder with --out.",
                    folder.path.display()
                )));
            }
            folder.write("quickstart.json", &format!("{wanted:#}\n"))
        }
        Err(error) => Err(Error::io("read", &path)(error)),
    }
}

/// Trains the base model on the world's answers from random weights, unless it is there already.
fn train_base(world: &World, amounts: &Amounts, seed: u64, base: &Path, folder: &RunFolder) -> Result<()> {
    let training = folder.path.join("pretraining");
    if base.join("config.json").exists() {
        ui::say("Base model: complete.");
        // a killed process may have left it beside the finished model
        return discard_state(&training);
    }
    let tokenizer = Tokenizer::from_json(&world.tokenizer_json(), Some("<s>"), Some("</s>"), None)?;
    let samples = world.sft_samples(amounts.demonstrations, seed);
    let demonstrations = samples.iter().map(|sample| {
        let mut response = tokenizer.encode(&sample.completion)?;
        response.push(world::EOS);
        Ok(Demonstration { prompt: tokenize_prompt(&Prompt::Text(sample.prompt.clone()), &tokenizer)?, response })
    });
    let demonstrations = demonstrations.collect::<Result<Vec<_>>>()?;
    let options = TrainOptions {
        lora: None,
        optimizer: OptimizerKind::AdamW,
        learning_rate: 3e-3,
        schedule: Schedule::Cosine,
        warmup_ratio: 0.05,
        epochs: amounts.epochs,
        batch_size: 64,
        dtype: Precision::F32,
        micro_batch_tokens: None,
        memory_bytes: None,
        max_grad_norm: 1.0,
        weight_decay: 0.0,
        seed,
        save_every: 0,
        validate_every: 0,
        patience: None,
        ema_decay: None,
    };
    let model = Model::random(world.model_config(), 0.05, seed);
    ui::say(format!(
        "Base model: {} parameters, trained from scratch on {} answers.",
        model.layout.len,
        demonstrations.len()
    ));
    let mut policy = Policy::Whole(model);
    train(
        &mut policy,
        &Demonstrations(&demonstrations),
        None,
        &options,
        &training,
        &mut ui::TrainingBar::new("training"),
    )?;
    let (model, _) = policy.into_model();
    let generation = GenerationConfig {
        bos_token_id: Some(world::BOS),
        eos_token_ids: vec![world::EOS],
        ..GenerationConfig::default()
    };
    Checkpoint { model, tokenizer, generation }.save(base)?;
    discard_state(&training)
}

/// The recipe to run, with the base model, the world's data and its prompts in the place of its own.
fn recipe(world: &World, amounts: &Amounts, options: &Quickstart, folder: &RunFolder, base: &Path) -> Result<Recipe> {
    let mut overrides =
        vec![setting("model.base", base)?, setting("run.out", &folder.path)?, format!("run.seed={}", options.seed)];
    overrides.extend(options.threshold.map(|threshold| format!("constraint.at_least={threshold:?}")));
    let mut recipe = match &options.recipe {
        Some(path) => Recipe::load(path, &overrides)?,
        None => {
            overrides.extend([1, 2].map(|step| format!("step.{step}.objective={}", options.objective)));
            Recipe::parse(RECIPE, Path::new("recipes/quickstart.toml"), &overrides)?
        }
    };
    let data = folder.path.join("data");
    std::fs::create_dir_all(&data).map_err(Error::io("create", &data))?;
    let mut written = BTreeSet::new();
    for step in &mut recipe.steps {
        let metric = metric_of(step).ok_or_else(|| {
            Error::input(format!(
                "The step `{}` is about `{}`, of which the quickstart's world has no preferences. Its steps are about \
                 `helpfulness` or `safety`.",
                step.name, step.metric
            ))
        })?;
        let pairwise = matches!(objective::Options::default().build(step.objective, 1.0)?, Objective::Pairwise(_));
        let file = format!("data/{}{}.jsonl", step.metric, if pairwise { "" } else { "-labelled" });
        step.data = folder.path.join(&file).into();
        if !written.insert(file.clone()) {
            continue;
        }
        let rows = if pairwise {
            world::json_lines(&world.preference_pairs(metric, amounts.pairs, options.seed))
        } else {
            // as many answers as the pairs have
            world::json_lines(&world.labelled_completions(metric, 2 * amounts.pairs, options.seed))
        };
        folder.write(&file, &rows?)?;
    }
    let choice = recipe.constraints.iter_mut().find_map(|constraint| constraint.choice.as_mut());
    if let Some(choice) = choice {
        choice.prompts = Some(write_prompts("prompts", &world.train_prompts, folder)?.into());
        choice.held_out_prompts = Some(write_prompts("held_out_prompts", &world.heldout_prompts, folder)?.into());
    }
    Ok(recipe)
}

/// Writes prompts as a file of the run folder.
fn write_prompts(name: &str, prompts: &[world::Prompt], folder: &RunFolder) -> Result<PathBuf> {
    let file = format!("data/{name}.jsonl");
    let rows: Vec<Value> = prompts.iter().map(|prompt| json!({"prompt": prompt.text})).collect();
    folder.write(&file, &world::json_lines(&rows)?)?;
    Ok(folder.path.join(file))
}

/// An override whose value is a path, quoted as TOML.
fn setting(key: &str, path: &Path) -> Result<String> {
    let path: PathBuf = path.into();
    let text = path.to_str().ok_or_else(|| {
        Error::input(format!("The folder {} is not UTF-8. Choose another with --out.", path.display()))
    })?;
    Ok(format!("{key}={}", toml::Value::String(text.to_owned())))
}

/// What a step aligns to, if the world knows it.
fn metric_of(step: &Step) -> Option<Metric> {
    match step.metric.as_str() {
        "helpfulness" => Some(Metric::Reward),
        "safety" => Some(Metric::Safety),
        _ => None,
    }
}

/// What policies are drawn as one line for.
fn group_of(policy: &pipeline::Policy) -> &str {
    match (&policy.step, policy.q) {
        (Some(step), _) => step,
        (None, Some(_)) if policy.path().is_some() => "merge",
        (None, Some(_)) => "mix",
        (None, None) => policy.name(),
    }
}

/// What came of the constraint, for machines and for people, with what is known exactly of the policy on held-out prompts.
fn exact(
    world: &World,
    constraint: &pipeline::ConstraintOutcome,
    policies: &[Judged<'_>],
    logps: &[Vec<Vec<f64>>],
) -> Result<(Value, String)> {
    let (mut result, mut text) = (json!(constraint), constraint.text());
    let judged = policies.iter().position(|(policy, ..)| Some(policy.name()) == constraint.policy.as_deref());
    if let Some((policy, worth, _)) = judged.map(|index| &policies[index]) {
        result["exact"] = json!({"safety": worth.safety});
        text += &format!(" Its exact E[g*] there is {:.3}", worth.safety);
        // a policy that was trained at β/λ has an optimum
        if let Some((temperature, origin)) = policy.origin.filter(|_| policy.beta_over_lambda.is_some()) {
            let optimum =
                world.expectations(&world.optimum(&logps[origin], Metric::Safety, temperature)?, Metric::Safety)?;
            let optimum = optimum.iter().sum::<f64>() / optimum.len() as f64;
            result["exact"]["optimum_safety"] = json!(optimum);
            text += &format!("; that of the optimum for its λ is {optimum:.3}");
        }
        text += ".";
    }
    Ok((result, text))
}
