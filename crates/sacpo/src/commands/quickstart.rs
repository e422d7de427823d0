//! `sacpo quickstart`: the whole method in a world where everything is known exactly.

mod constraint;

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
use engine::{Decoder, Error, Model, ModelConfig, PackedBatch, Result, RopeScaling};
use evaluate::frontier::{Metrics, Point, frontier_svg, table};
use serde_json::{Value, json};

use super::{print_json, start_threads};
use crate::cli::{Global, Quickstart, Size};
use crate::interrupt;
use crate::pipeline::{self, RunFolder};
use crate::ui;
use sacpo::recipe::Recipe;

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
            Size::Full => Self { demonstrations: 20_000, epochs: 2, pairs: 8_000 },
        }
    }
}

pub(super) fn run(options: &Quickstart, global: Global) -> Result<()> {
    let start = Instant::now();
    start_threads(global, None)?;
    let amounts = Amounts::of(options.size);
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
    train_base(&world, &amounts, options.seed, &base, &folder)?;
    let mut recipe = recipe(&world, &amounts, options, &folder, &base)?;
    let chosen = choose(&world, &recipe, options, &folder)?;
    chosen.add_to(&mut recipe);
    let outcome = pipeline::run(&recipe, pipeline::prepare(&recipe)?, &folder)?;

    let mut policies = Vec::new();
    let mut logps = Vec::new();
    for policy in &outcome.policies {
        interrupt::check()?;
        logps.push(answer_logps(&world, &world.heldout_prompts, &Checkpoint::load(&policy.path)?)?);
        let (base, own) = (&logps[0], &logps[logps.len() - 1]);
        let distance = policy.origin.map(|(temperature, origin)| {
            let metric = if policy.beta_over_lambda.is_some() { Metric::Safety } else { Metric::Reward };
            world.distance(own, &world.optimum(&logps[origin], metric, temperature)?)
        });
        policies.push((policy, world.evaluate(own, base)?, distance.transpose()?));
    }
    let realised = outcome
        .policies
        .iter()
        .zip(&logps)
        .find(|(policy, _)| policy.origin.is_some() && chosen.is_realised_by(policy.beta_over_lambda));
    let realised = realised.map(|(policy, own)| {
        let start = policy.beta_over_lambda.and(policy.origin).map_or(own, |(_, origin)| &logps[origin]);
        constraint::Realised { policy: &policy.name, logps: own, start }
    });
    let (constraint, verdict) = chosen.report(&world, realised)?;
    let points: Vec<Point> = policies
        .iter()
        .map(|(policy, worth, _)| Point {
            name: policy.name.clone(),
            step: policy.step.clone().unwrap_or_else(|| "base".into()),
            beta_over_lambda: policy.beta_over_lambda,
            reward: worth.reward,
            safety: worth.risky_safety,
            kl: Some(worth.kl),
        })
        .collect();
    let metrics = Metrics { reward: "E[r*], helpfulness", safety: "E[g*] on risky prompts, safety" };
    let table = table(metrics, &points)?;
    folder.write("frontier.svg", &frontier_svg("Quickstart: helpfulness against safety", metrics, &points)?)?;
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
            policy.name, worth.safety, worth.risky_reward, worth.harmless_refusal, worth.outside
        );
    }
    table
}

fn policy_json((policy, worth, distance): &Judged<'_>) -> Value {
    json!({
        "name": policy.name,
        "step": policy.step,
        "beta_over_lambda": policy.beta_over_lambda,
        "q": Value::Null,
        "reward": worth.reward,
        "safety": worth.safety,
        "kl": worth.kl,
        "risky_reward": worth.risky_reward,
        "risky_safety": worth.risky_safety,
        "harmless_refusal": worth.harmless_refusal,
        "outside": worth.outside,
        "distance_to_optimum": distance,
        "checkpoint": policy.path,
    })
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
            folder.write("quickstart.json", &format!("{wanted:#}\n"))
        }
        Err(error) => Err(Error::io("read", &path)(error)),
    }
}

/// The shape of the world's language model.
fn shape(world: &World) -> ModelConfig {
    ModelConfig {
        vocab_size: world.vocab_size(),
        hidden_size: 96,
        intermediate_size: 256,
        num_hidden_layers: 3,
        num_attention_heads: 3,
        num_key_value_heads: 3,
        head_dim: 32,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::Default,
        tie_word_embeddings: true,
        model_type: "llama".into(),
        bos_token_id: Some(world::BOS),
        eos_token_ids: vec![world::EOS],
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
        micro_batch_tokens: 2048,
        memory_bytes: None,
        max_grad_norm: 1.0,
        weight_decay: 0.0,
        seed,
        save_every: 0,
        validate_every: 0,
        patience: None,
        ema_decay: None,
    };
    let model = Model::random(shape(world), 0.05, seed);
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

/// Writes the world's preference pairs as files and points the recipe at them.
fn recipe(world: &World, amounts: &Amounts, options: &Quickstart, folder: &RunFolder, base: &Path) -> Result<Recipe> {
    let data = folder.path.join("data");
    std::fs::create_dir_all(&data).map_err(Error::io("create", &data))?;
    let mut overrides =
        vec![setting("model.base", base)?, setting("run.out", &folder.path)?, format!("run.seed={}", options.seed)];
    let objective = &options.objective;
    let pairwise = matches!(objective::Options::default().build(objective, 1.0)?, Objective::Pairwise(_));
    for (step, name, metric) in [(1, "helpfulness", Metric::Reward), (2, "safety", Metric::Safety)] {
        let file = format!("data/{name}.jsonl");
        let rows = if pairwise {
            world::json_lines(&world.preference_pairs(metric, amounts.pairs, options.seed))
        } else {
            // as many answers as the pairs have
            world::json_lines(&world.labelled_completions(metric, 2 * amounts.pairs, options.seed))
        };
        folder.write(&file, &rows?)?;
        overrides.push(format!("step.{step}.objective={objective}"));
        overrides.push(setting(&format!("step.{step}.data"), &folder.path.join(file))?);
    }
    Recipe::parse(RECIPE, Path::new("recipes/quickstart.toml"), &overrides)
}

/// An override whose value is a path, quoted as TOML.
fn setting(key: &str, path: &Path) -> Result<String> {
    let path: PathBuf = path.into();
    let text = path.to_str().ok_or_else(|| {
        Error::input(format!("The folder {} is not UTF-8. Choose another with --out.", path.display()))
    })?;
    Ok(format!("{key}={}", toml::Value::String(text.to_owned())))
}

/// Trains the first step's policy and chooses the λ of the second by its answers to training prompts.
fn choose(world: &World, recipe: &Recipe, options: &Quickstart, folder: &RunFolder) -> Result<constraint::Chosen> {
    let mut first = recipe.clone();
    first.steps.truncate(1);
    let outcome = pipeline::run(&first, pipeline::prepare(&first)?, folder)?;
    let (Some(policy), [beta]) = (outcome.policies.last(), first.steps[0].temperature.values()) else {
        return Err(Error::Failed("The quickstart's first step has not made one policy.".into()));
    };
    let logps = answer_logps(world, &world.train_prompts, &Checkpoint::load(&policy.path)?)?;
    constraint::Chosen::new(world, &logps, *beta, options.threshold, options.seed)
}

/// The log-probability of every answer to these prompts, `[prompt][answer]`.
fn answer_logps(world: &World, prompts: &[world::Prompt], checkpoint: &Checkpoint) -> Result<Vec<Vec<f64>>> {
    let mut decoder = Decoder::new(&checkpoint.model, checkpoint.model.config.max_position_embeddings);
    let of_prompt = |prompt| {
        let answers: Vec<Vec<u32>> = world.answers(prompt).iter().map(|a| world.answer_tokens(a)).collect();
        let mut batch = PackedBatch::default();
        batch.push(&world.prompt_tokens(prompt), &answers.iter().map(Vec::as_slice).collect::<Vec<_>>());
        decoder.logps(&checkpoint.model.weights, &batch)
    };
    Ok(prompts.iter().map(of_prompt).collect())
}
