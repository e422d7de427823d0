//! `sacpo run` and `sacpo train`.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Instant;

use align::log::read_metric;
use engine::{Error, Result};
use evaluate::curves::{Series, curves_svg};
use evaluate::rating::markdown;
use serde_json::{Value, json};

use super::{on_threads, print_json};
use crate::cli::{Global, Run, Train};
use crate::hub::Hub;
use crate::pipeline::{self, AnsweredSet, Lengths, Outcome, Policy, RunFolder, dry_run, manifest};
use crate::report;
use crate::ui;
use sacpo::recipe::Recipe;

/// Prompts of a set whose answers a summary shows.
const SHOWN_PROMPTS: usize = 8;

pub(super) fn run(options: &Run, global: Global) -> Result<()> {
    let mut overrides = options.set.clone();
    overrides.extend(options.seed.map(|seed| format!("run.seed={seed}")));
    on_its_threads(Recipe::load(&options.recipe, &overrides)?, global, options.dry_run)
}

pub(super) fn train(options: &Train, global: Global) -> Result<()> {
    on_its_threads(recipe_of(options)?, global, false)
}

/// The recipe of one step that the options describe.
fn recipe_of(options: &Train) -> Result<Recipe> {
    let mut step = json!({
        "metric": options.metric,
        "objective": options.objective,
        "beta": options.beta,
        "data": text(&options.data)?,
    });
    if let (Value::Object(step), Value::Object(parameters)) = (&mut step, json!(options.parameters.options())) {
        step.extend(parameters.into_iter().filter(|(_, value)| !value.is_null()));
    }
    recipe_of_step(step, [&options.model, &options.out], options.seed, &options.set)
}

/// A recipe of one step on a model into a folder, changed as `set` says.
pub(super) fn recipe_of_step(step: Value, [model, out]: [&Path; 2], seed: u64, set: &[String]) -> Result<Recipe> {
    let document = json!({"model": {"base": text(model)?}, "run": {"out": text(out)?, "seed": seed}, "step": [step]});
    let toml = toml::to_string(&document)
        .map_err(|e| Error::input(format!("The options cannot be written as a recipe: {e}.")))?;
    Recipe::parse(&toml, Path::new("command line"), set)
}

/// A path as a text of a recipe.
pub(super) fn text(path: &Path) -> Result<String> {
    let text = path.to_str().map(str::to_owned);
    text.ok_or_else(|| Error::input(format!("The path {} is not UTF-8. Rename it.", path.display())))
}

fn on_its_threads(mut recipe: Recipe, global: Global, dry: bool) -> Result<()> {
    Hub::new().fetch_recipe(&mut recipe)?;
    on_threads(global.threads.or(recipe.run.threads), || carry_out(&recipe, global, dry))
}

fn carry_out(recipe: &Recipe, global: Global, dry: bool) -> Result<()> {
    let start = Instant::now();
    let out = &recipe.run.out;
    if out.join("quickstart.json").exists() {
        return Err(Error::input(format!(
            "{} is the folder of a quickstart, whose exact results this run would write over. Set another run.out.",
            out.display()
        )));
    }
    let base = pipeline::load_base(recipe)?;
    if dry {
        RunFolder::check_writable(out)?;
        let cache = tempfile::tempdir().map_err(Error::io("create a folder in", &std::env::temp_dir()))?;
        let forecast = dry_run::forecast(recipe, &pipeline::load_inputs(recipe, base, cache.path())?)?;
        return if global.json { print_json(&forecast) } else { ui::print(forecast.text()) };
    }
    let folder = RunFolder::open(out)?;
    let inputs = match pipeline::load_inputs(recipe, base, &folder.cache()) {
        Ok(inputs) => inputs,
        Err(error) => {
            // what was tokenised before a stop is of use
            if !matches!(error, Error::Interrupted(_)) {
                folder.discard_if_new();
            }
            return Err(error);
        }
    };
    let key = manifest::key(recipe, &inputs)?;
    if let Some(results) = manifest::finished(&folder, &key) {
        ui::say(format!("The run in {} is finished. Nothing is done.", folder.path.display()));
        if !folder.path.join("report.html").exists() {
            report::finish(&folder.path);
        }
        if global.json {
            return print_json(&results);
        }
        return ui::print(format!("Its results: {}", folder.path.join("summary.md").display()));
    }
    let outcome = pipeline::run(recipe, inputs, &folder)?;
    let metrics = ranked(recipe);
    for (file, title, metric) in
        [("loss.svg", "Training loss", "loss"), ("margins.svg", "Reward margin in training", "rewards/margins")]
    {
        let curves = curves(&outcome, &folder, metric)?;
        // not every objective has margins
        if curves.is_empty() {
            continue;
        }
        // the results matter more than their picture
        match curves_svg(title, metric, &curves) {
            Ok(plot) => folder.write(file, &plot)?,
            Err(error) => ui::say(format!("Warning: {file} is not drawn. {error}")),
        }
    }
    let table = validation_table(&metrics, &outcome.policies);
    let seconds = start.elapsed().as_secs_f64();
    folder.write("summary.md", &summary(recipe, &outcome, &table, seconds))?;
    let result = json!({
        "policies": outcome.policies.iter().map(|p| policy_json(p, &metrics)).collect::<Vec<_>>(),
        "constraint": outcome.constraint,
        "answers": lengths_json(&outcome.evaluation.sets),
        "seconds": seconds,
        "peak_memory_bytes": engine::memory::peak(),
        "out": folder.path,
    });
    folder.write("results.json", &format!("{result:#}\n"))?;
    manifest::write(&folder, &key, recipe, &outcome, seconds)?;
    report::finish(&folder.path);
    if global.json {
        return print_json(&result);
    }
    let verdict = outcome.constraint.map(|outcome| format!("\n{}\n", outcome.text())).unwrap_or_default();
    ui::print(format!(
        "{table}{verdict}\nAll of it, with answers side by side: {}",
        folder.path.join("summary.md").display()
    ))
}

/// What the held-out pairs of each step are called: its metric, or its name where another step has the same metric.
fn ranked(recipe: &Recipe) -> Vec<&str> {
    let shared = |metric: &str| recipe.steps.iter().filter(|step| step.metric == metric).count() > 1;
    recipe.steps.iter().map(|step| if shared(&step.metric) { &*step.name } else { &*step.metric }).collect()
}

fn policy_json(policy: &Policy, metrics: &[&str]) -> Value {
    let validation: serde_json::Map<String, Value> =
        metrics.iter().zip(&policy.validation).map(|(metric, report)| ((*metric).to_owned(), json!(report))).collect();
    json!({
        "name": policy.name(),
        "step": policy.step,
        "beta_over_lambda": policy.beta_over_lambda,
        "q": policy.q,
        "reward": Value::Null,
        "safety": Value::Null,
        "kl": Value::Null,
        "validation": validation,
        "policy": policy.source.to_string(),
        "checkpoint": policy.path(),
        "seconds": policy.seconds,
    })
}

/// How every policy ranks the held-out pairs, as a Markdown table.
fn validation_table(metrics: &[&str], policies: &[Policy]) -> String {
    let mut table = String::from("| policy |");
    for metric in metrics {
        let _ = write!(table, " {metric}: accuracy | margin | likelihood accuracy |");
    }
    table.push_str(" training |\n|---|");
    table.push_str(&"---:|".repeat(3 * metrics.len() + 1));
    for policy in policies {
        let _ = write!(table, "\n| {} |", policy.name());
        for report in &policy.validation {
            let (accuracy, margin, likelihood) = (report.accuracy, report.margin, report.likelihood_accuracy);
            let _ = match report.pairs {
                0 => write!(table, " – | – | – |"),
                _ => write!(table, " {accuracy:.3} | {margin:+.3} | {likelihood:.3} |"),
            };
        }
        let _ = write!(table, " {} |", ui::duration(policy.seconds));
    }
    table.push('\n');
    table
}

/// How long every policy's answers to every set of prompts are.
fn lengths_json(sets: &[AnsweredSet]) -> Value {
    let of_set = |set: &AnsweredSet| {
        let of_policy = |(name, answers): &(String, Vec<_>)| (name.clone(), json!(Lengths::of(answers)));
        let lengths: serde_json::Map<String, Value> = set.policies.iter().map(of_policy).collect();
        (set.name.clone(), Value::Object(lengths))
    };
    Value::Object(sets.iter().map(of_set).collect())
}

/// A metric over the optimizer steps of every policy that has it.
fn curves(outcome: &Outcome, folder: &RunFolder, metric: &str) -> Result<Vec<Series>> {
    let trained = outcome.policies.iter().filter(|policy| policy.step.is_some());
    let series = trained.map(|policy| {
        let path = folder.path.join("steps").join(policy.name()).join("metrics.jsonl");
        Ok(Series { name: policy.name().to_owned(), points: read_metric(&path, metric)? })
    });
    let series: Vec<Series> = series.collect::<Result<_>>()?;
    Ok(series.into_iter().filter(|series| !series.points.is_empty()).collect())
}

/// The run as a page to read: policies, answers, and what it took.
fn summary(recipe: &Recipe, outcome: &Outcome, table: &str, seconds: f64) -> String {
    let mut page = String::from("# Results\n\n");
    let _ = writeln!(page, "Base model: `{}`. Seed {}.\n", recipe.model.base, recipe.run.seed);
    for (step, data) in recipe.steps.iter().zip(&outcome.data) {
        let _ = writeln!(
            page,
            "- Step `{}`: {} {} to train on, {} held out (`{}`).",
            step.name,
            data.train.len(),
            data.train.unit(),
            data.validation.len(),
            step.data.given.file_name().unwrap_or_default().display()
        );
    }
    let _ = write!(
        page,
        "\n## Held-out pairs\n\n{table}\nAccuracy: share of held-out pairs whose implicit reward, \
         log π − log π_base, prefers the chosen response (ties count half). Margin: mean difference of these rewards \
         in nats. Likelihood accuracy: share of pairs whose chosen response is likelier than the rejected one. Of labelled \
         responses, every desirable one makes a pair with every undesirable one.\n"
    );
    if let Some(constraint) = &outcome.constraint {
        let _ = writeln!(page, "\n## Constraint\n\n{}", constraint.text());
    }
    for (name, ratings) in &outcome.evaluation.ratings {
        // its own headings go below this one
        let ratings = markdown(ratings).replace("\n## ", "\n### ");
        let _ = write!(page, "\n## Ratings: {name}\n\n{ratings}");
    }
    for set in &outcome.evaluation.sets {
        write_answers(&mut page, set);
    }
    let memory = engine::memory::peak().map(|b| format!(", {:.2} GiB at most", b as f64 / (1u64 << 30) as f64));
    let threads = rayon::current_num_threads();
    let took = ui::duration(seconds);
    let _ = writeln!(page, "\n## Cost\n\nThis call took {took} on {threads} threads{}.", memory.unwrap_or_default());
    page
}

/// The answers to a set of prompts: how long they are, and the first of them side by side.
fn write_answers(page: &mut String, set: &AnsweredSet) {
    let _ =
        write!(page, "\n## Answers: {}\n\n| policy | answers | mean tokens | cut |\n|---|---:|---:|---:|\n", set.name);
    for (name, answers) in &set.policies {
        let Lengths { mean_tokens, cut, .. } = Lengths::of(answers);
        let cut = cut.map_or("–".to_owned(), |cut| format!("{:.1} %", 100.0 * cut));
        let _ = writeln!(page, "| {name} | {} | {mean_tokens:.1} | {cut} |", answers.len());
    }
    let _ = writeln!(page, "\nCut: share of answers that reached `evaluate.max_new_tokens` or the end of the context.");
    if set.prompts.len() > SHOWN_PROMPTS {
        let _ = writeln!(page, "The first {SHOWN_PROMPTS} prompts; all are in `answers/{}/`.", set.name);
    }
    for (number, prompt) in set.prompts.iter().enumerate().take(SHOWN_PROMPTS) {
        let _ = writeln!(page, "\n### {}\n", prompt.trim().replace('\n', " "));
        for (name, answers) in &set.policies {
            let text = answers[number].text.trim().replace('\n', "\n> ");
            let _ = writeln!(page, "**{name}**\n\n> {text}\n");
        }
    }
}
