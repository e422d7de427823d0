//! Judges on this machine, which score every answer by itself.

use std::path::{Path, PathBuf};
use std::time::Instant;

use align::judge::Judge;
use align::objective::ScoreLoss;
use align::world::{Metric, World};
use engine::{Error, Result, Tokenizer};
use evaluate::judge::{Comparison, Judge as _, ScoreJudge};
use serde::Serialize;

use super::{print_json, write};
use crate::cli::{self, Global, LocalJudge};
use crate::policy::Policy;
use crate::scorer::{self, TextScorer};
use crate::{interrupt, ui};

#[derive(Serialize)]
struct Output<'a> {
    comparisons: usize,
    verdicts: usize,
    seconds: f64,
    out: &'a Path,
}

/// Judges comparisons, and writes the verdicts.
pub(super) fn judge(command: &cli::Judge, comparisons: &[Comparison<'_>], global: Global) -> Result<()> {
    let start = Instant::now();
    let scoring = &command.scoring;
    let cache = kept_scores(&command.out);
    let by = |judge: Judge<'_>, tokenizer: &Tokenizer, context: usize, name: String| {
        let scorer =
            TextScorer { judge, tokenizer, context, template_tail: scoring.template_tail, cache: cache.clone() };
        let judge = ScoreJudge { scorer: &scorer, metric: scoring.metric.clone().unwrap_or_default(), name };
        let bar = ui::bar(comparisons.len() as u64, "verdicts");
        let mut heartbeat = ui::Heartbeat::new();
        let judged = judge.judge(comparisons, &mut |progress| {
            bar.set_position(progress.done as u64);
            heartbeat.beat(&bar, || format!("  {} of {} verdicts", progress.done, progress.total));
            interrupt::check()
        });
        bar.finish_and_clear();
        judged
    };
    let of_model = |path: &Path, loss: ScoreLoss| {
        let loaded = scorer::load(path, loss)?;
        let context = loaded.model.config.max_position_embeddings;
        let name = format!("{} model {}", loss.name(), path.display());
        by(Judge::Model { model: &loaded.model, loss }, &loaded.tokenizer, context, name)
    };
    let judged = match (&command.local, &scoring.reference, scoring.beta) {
        (LocalJudge { reward_model: Some(path), .. }, ..) => of_model(path, ScoreLoss::Reward)?,
        (LocalJudge { cost_model: Some(path), .. }, ..) => of_model(path, ScoreLoss::Cost)?,
        (LocalJudge { implicit: Some(policy), .. }, Some(reference), Some(temperature)) => {
            let name = format!("implicit reward of {policy} over {reference} at {temperature}");
            let (policy, start) = (Policy::load(policy, false)?, Policy::load(reference, false)?);
            let tokenizer = &policy.first.tokenizer;
            if tokenizer.hash() != start.first.tokenizer.hash() {
                return Err(Error::input(
                    "The tokenizers of --implicit and --reference differ, so one was not aligned from the other. Give the model that \
                     the policy was aligned from.",
                ));
            }
            let (policy, start) = (policy.mixture()?, start.mixture()?);
            let context = policy.context().min(start.context());
            by(Judge::Implicit { policy, start, temperature }, tokenizer, context, name)?
        }
        (LocalJudge { quickstart: Some(metric), .. }, ..) => {
            // which of its prompts are held out is all that a seed decides
            let world = World::new(0);
            let tokenizer = Tokenizer::from_json(&world.tokenizer_json(), Some("<s>"), Some("</s>"), None)?;
            let context = world.model_config().max_position_embeddings;
            let name = match metric {
                Metric::Reward => "quickstart reward",
                Metric::Safety => "quickstart safety",
            };
            by(Judge::Quickstart { world: &world, metric: *metric }, &tokenizer, context, name.into())?
        }
        _ => {
            return Err(Error::input(
                "A judge is needed. Give --reward-model, --cost-model, --implicit or --quickstart.",
            ));
        }
    };
    write(&command.out, &judged.judgements)?;
    // what was kept for the case of a stop is in the verdicts now
    let _ = std::fs::remove_dir_all(&cache);
    let verdicts = judged.judgements.len();
    ui::say(format!("{verdicts} verdicts, in {}.", command.out.display()));
    if !global.json {
        return Ok(());
    }
    let seconds = start.elapsed().as_secs_f64();
    print_json(&Output { comparisons: comparisons.len(), verdicts, seconds, out: &command.out })
}

/// The folder beside a file of verdicts where scores are kept until it is written.
fn kept_scores(out: &Path) -> PathBuf {
    let name = out.file_name().unwrap_or_default().to_string_lossy();
    out.with_file_name(format!(".{name}.scores"))
}
