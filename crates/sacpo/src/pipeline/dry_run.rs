//! What a run would do, what of it is there, and what the rest would take.

use std::time::Instant;

use align::data::Dataset;
use align::reference;
use align::sequences::Sequences;
use align::step::Alignment;
use align::trainer::{MemoryPlan, TrainOptions, has_state};
use engine::{Error, Mixture, Result};
use serde::Serialize;

use super::train::options;
use super::{Inputs, Run, RunFolder, constraint, evaluation, manifest};
use crate::ui;
use sacpo::recipe::{Recipe, Step};

/// What a run would do.
#[derive(Debug, Serialize)]
pub(crate) struct Forecast {
    stages: Vec<Stage>,
    /// Of all trainings that are still to be done, as far as they are known.
    seconds: f64,
    /// Of the largest of these trainings, foretold; nothing without any.
    peak_memory_bytes: Option<usize>,
}

/// One thing to make.
#[derive(Debug, Serialize)]
struct Stage {
    name: String,
    kind: &'static str,
    /// The policies that it is made from.
    from: Vec<String>,
    state: State,
    /// How long it would take; nothing if it is complete or not estimated.
    seconds: Option<f64>,
    /// How a training would use the memory; nothing if it is complete.
    memory: Option<MemoryPlan>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Complete,
    /// A training was stopped and will go on.
    Begun,
    Open,
}

/// Seconds per token of training and of scoring under the reference.
#[derive(Debug, Clone, Copy)]
struct Rates {
    training: f64,
    reference: f64,
}

/// What a run of the recipe in its folder would do; nothing is written there. Two optimizer steps on a micro-batch of each kind of
/// training that is open are taken elsewhere, to measure.
///
/// # Errors
/// A folder that holds policies of another recipe; a training that does not fit in the memory; those of training.
pub(crate) fn forecast(recipe: &Recipe, inputs: &Inputs) -> Result<Forecast> {
    let folder = RunFolder::unlocked(&recipe.run.out);
    let run = Run::new(recipe, inputs, &folder);
    let hashes = run.complete()?;
    let memory = run.plan_memory(&hashes)?;
    let mut complete = hashes[1..].iter().map(Option::is_some);
    constraint::prompts(&run)?;
    let mut measured: Vec<(String, Rates)> = Vec::new();
    let mut scored: Vec<(usize, usize)> = Vec::new();
    let mut stages = Vec::new();
    let blends = run.plan.blends.iter().map(|blend| &blend.name);
    let names: Vec<&String> = run.plan.steps.iter().map(|step| &step.name).chain(blends).collect();
    let name = |planned: Option<usize>| planned.map_or("base", |i| names[i]).to_owned();
    for (planned, complete) in run.plan.steps.iter().zip(complete.by_ref()) {
        let training = run.training(planned);
        let state = match complete {
            true => State::Complete,
            false if has_state(&training.folder(&run)) => State::Begun,
            false => State::Open,
        };
        let memory = memory[planned.step].filter(|_| state != State::Complete);
        let seconds = match memory {
            None => None,
            Some(memory) => {
                let step = &recipe.steps[planned.step];
                let train = &step.train;
                let kind = format!(
                    "{} {:?} {:?} {:?} {:?}",
                    step.objective,
                    train.lora(),
                    train.dtype,
                    train.optimizer,
                    train.micro_batch_tokens
                );
                let rates = match measured.iter().find(|(other, _)| *other == kind) {
                    Some((_, rates)) => *rates,
                    None => {
                        let rates = measure(&run, step, planned.step, memory)?;
                        measured.push((kind, rates));
                        rates
                    }
                };
                let tokens = tokens(&inputs.data[planned.step].train.sequences());
                let first = !scored.contains(&(planned.step, training.parent));
                scored.push((planned.step, training.parent));
                let reference = if first { rates.reference } else { 0.0 };
                Some(tokens * (rates.training * step.train.epochs as f64 + reference))
            }
        };
        let from = vec![name(planned.parent)];
        stages.push(Stage { name: planned.name.clone(), kind: "training", from, state, seconds, memory });
    }
    for (planned, complete) in run.plan.blends.iter().zip(complete) {
        let kind = if planned.merging.is_some() { "merge" } else { "mix" };
        let state = if complete { State::Complete } else { State::Open };
        let from = planned.ends.map(name).to_vec();
        stages.push(Stage { name: planned.name.clone(), kind, from, state, seconds: None, memory: None });
    }
    // what is not known before is there in a finished run
    let when_finished = if manifest::finished(&folder, &manifest::key(recipe, inputs)?).is_some() {
        State::Complete
    } else {
        State::Open
    };
    if let Some(choice) = recipe.constraints.first().and_then(|constraint| constraint.choice.as_ref()) {
        let names: Vec<&str> = recipe.constraints.iter().map(|constraint| constraint.metric.as_str()).collect();
        let name = format!(
            "{} answers to at most {} prompts, at most {} policies",
            choice.answers, choice.max_prompts, choice.shots
        );
        let from = vec![run.start_name(recipe.constraints[0].step.index)];
        stages.push(Stage {
            name: format!("{}: {name}", names.join(", ")),
            kind: "constraint",
            from,
            state: when_finished,
            seconds: None,
            memory: None,
        });
    }
    let own: Vec<String> = (0..hashes.len()).map(|index| name(index.checked_sub(1))).collect();
    for set in evaluation::stages(&run, &hashes) {
        let from = own.iter().chain(&set.externals).cloned().collect();
        let state = match set.blocks {
            // a constraint asks for policies that are not known before
            _ if !recipe.constraints.is_empty() => when_finished,
            [kept, all] if kept == all => State::Complete,
            [0, _] => State::Open,
            _ => State::Begun,
        };
        stages.push(Stage { name: set.name, kind: "answers", from, state, seconds: None, memory: None });
    }
    for judge in &recipe.evaluate.judges {
        for set in &judge.sets {
            let (name, from) = (judge.name_on(set), vec![format!("answers to {set}")]);
            stages.push(Stage { name, kind: "judging", from, state: when_finished, seconds: None, memory: None });
        }
    }
    Ok(Forecast {
        // the sum of nothing would be −0
        seconds: stages.iter().filter_map(|stage| stage.seconds).fold(0.0, |sum, seconds| sum + seconds),
        peak_memory_bytes: stages.iter().filter_map(|stage| Some(stage.memory?.peak_bytes)).max(),
        stages,
    })
}

/// Takes two optimizer steps on as many examples as fill a micro-batch, and scores these under the reference.
fn measure(run: &Run<'_>, step: &Step, number: usize, memory: MemoryPlan) -> Result<Rates> {
    let data = &run.data[number].train;
    let all = data.sequences();
    let mut filled = 0;
    let enough = all.iter().position(|item| {
        filled += item.computed(false);
        filled > memory.micro_batch_tokens
    });
    // batches of fewer than two have no shift
    let batch = enough.unwrap_or(all.len() / 2).clamp(2, (all.len() / 2).max(2)).min(all.len());
    let count = (2 * batch).min(all.len());
    ui::say(format!("Measuring: two optimizer steps of {} on {batch} {} each.", step.objective, data.unit()));
    let (some, none) = match data {
        Dataset::Pairs(pairs) => (Dataset::Pairs(pairs[..count].to_vec()), Dataset::Pairs(Vec::new())),
        Dataset::Examples(examples) => (Dataset::Examples(examples[..count].to_vec()), Dataset::Examples(Vec::new())),
    };
    let base = run.policies[0].load()?.first.model;
    let start = Instant::now();
    let policy = Mixture::from(&base).with_precision(step.train.dtype);
    reference::logps(policy, &some.sequences(), step.train.micro_batch_tokens, None, &mut |_| Ok(()))?;
    let reference = start.elapsed().as_secs_f64() / tokens(&some.sequences());
    let folder = tempfile::tempdir().map_err(Error::io("create a folder in", &std::env::temp_dir()))?;
    let options = TrainOptions {
        epochs: if count < 2 * batch { 2 } else { 1 },
        batch_size: batch,
        save_every: 0,
        validate_every: 0,
        patience: None,
        ..options(step, run.recipe.run.seed, run.recipe.run.memory_gib)
    };
    let alignment = Alignment {
        start: base,
        data: &some,
        validation: &none,
        objective: &step.objective_at(1.0)?,
        options: &options,
        folder: folder.path(),
        cache: folder.path(),
    };
    let aligned = alignment.run(&mut ui::TrainingBar::new("measuring"))?;
    // the first step also sets memory up
    let last = aligned.records.last().map_or(0.0, |record| record.seconds / record.tokens as f64);
    Ok(Rates { training: last, reference })
}

fn tokens(items: &[Sequences<'_>]) -> f64 {
    items.iter().map(|item| item.computed(false) as f64).sum()
}

impl Forecast {
    /// The forecast for people.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        for Stage { name, kind, from, state, seconds, memory } in &self.stages {
            let state = match state {
                State::Complete => "complete",
                State::Begun => "begun",
                State::Open => "to do",
            };
            let seconds = seconds.map(|seconds| format!(", about {seconds:.0} s")).unwrap_or_default();
            let memory = memory.map(|plan| format!(", {plan}")).unwrap_or_default();
            text += &format!("{kind:<10} {name} (from {}): {state}{seconds}{memory}\n", from.join(" and "));
        }
        text += &format!(
            "Open trainings: about {:.0} s, by two optimizer steps on this machine. Merging, judging, ranking, answers and \
             the trainings that a constraint asks for are not estimated. Nothing was written.",
            self.seconds
        );
        text
    }
}
