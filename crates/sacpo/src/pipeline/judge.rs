//! The recipe's judges, asked.

use std::collections::BTreeMap;

use align::data::TokenizedPair;
use align::judge::Judge;
use align::sequences::Sequences;
use align::tabular::Table;
use align::world::World;
use engine::checkpoint::Checkpoint;
use engine::{Error, Result};

use super::{Run, index_of};
use crate::{scorer, ui};
use sacpo::recipe::{JudgeSource, Recipe};

/// The hashes of the reward and cost models that judge, by metric. All of them are loaded once, to be checked.
///
/// # Errors
/// Models that cannot be read, or that do not take the base model's tokens.
pub(super) fn scorers(recipe: &Recipe, base: &Checkpoint) -> Result<BTreeMap<String, String>> {
    let mut hashes = BTreeMap::new();
    for judge in &recipe.judges {
        let JudgeSource::Model(location, loss) = &judge.source else { continue };
        let loaded = scorer::load(location.path(), *loss)?;
        if loaded.tokenizer.hash() != base.tokenizer.hash() {
            return Err(Error::input(format!(
                "The tokenizer of {location}, the judge of `{}`, is not that of the base model, whose answers it would read as \
                 tokens. Train one from this base model, or from another with its tokenizer, by `sacpo train {}`.",
                judge.metric,
                loss.name()
            )));
        }
        hashes.insert(judge.metric.clone(), loaded.model.hash());
    }
    Ok(hashes)
}

/// Names everything that a metric's scores depend on; `hash` gives those of policies by their index, as far as they are
/// known.
pub(super) fn identity(run: &Run<'_>, metric: &str, hash: &dyn Fn(usize) -> Option<String>) -> Option<String> {
    match &run.recipe.judge(metric)?.source {
        JudgeSource::Policy(policy) => {
            let planned = &run.plan.steps[policy.planned?];
            let start = index_of(planned.parent);
            Some(format!("implicit {} {} {}", planned.beta, hash(index_of(policy.planned))?, hash(start)?))
        }
        JudgeSource::Model(_, loss) => Some(format!("{} {}", loss.name(), run.scorers.get(metric)?)),
        JudgeSource::Quickstart(metric) => Some(format!("quickstart {} {metric:?}", run.recipe.run.seed)),
    }
}

/// What `ask` makes of the judge of a metric. Scores of an implicit reward are known up to a constant per prompt.
///
/// # Errors
/// A metric without a judge; one that cannot be read; those of `ask`.
pub(super) fn ask<T>(run: &Run<'_>, metric: &str, ask: impl FnOnce(Judge<'_>) -> Result<T>) -> Result<T> {
    let Some(judge) = run.recipe.judge(metric) else {
        return Err(Error::input(format!("The metric `{metric}` has no judge. Add a `[[judge]]` for it.")));
    };
    match &judge.source {
        JudgeSource::Policy(policy) => {
            let Some(planned) = policy.planned else {
                return Err(Error::input("The base model is no judge. Name a trained policy."));
            };
            let &sacpo::recipe::PlannedStep { beta, parent, .. } = &run.plan.steps[planned];
            let model = run.policies[index_of(Some(planned))].load()?.first.model;
            let start = run.policies[index_of(parent)].load()?.first.model;
            ask(Judge::Implicit { policy: (&model).into(), start: (&start).into(), temperature: beta })
        }
        JudgeSource::Model(location, loss) => {
            let model = scorer::load(location.path(), *loss)?.model;
            if run.scorers.get(metric) != Some(&model.hash()) {
                return Err(Error::input(format!(
                    "The judge {location} of `{metric}` is no longer the model that it was when the run began. Put it back, and run \
                     the same command again."
                )));
            }
            ask(Judge::Model { model: &model, loss: *loss })
        }
        JudgeSource::Quickstart(metric) => {
            ask(Judge::Quickstart { world: &World::new(run.recipe.run.seed), metric: *metric })
        }
    }
}

/// The scores of responses by a metric, `[item][response]`.
///
/// # Errors
/// Prompts that the judge does not know; those of [`ask`] and [`Judge::scores`].
pub(super) fn scores(
    run: &Run<'_>,
    metric: &str,
    items: &[Sequences<'_>],
    micro_batch_tokens: Option<usize>,
) -> Result<Table> {
    let bar = ui::bar(items.len() as u64, &format!("{metric} judged"));
    let scores = ask(run, metric, |judge| {
        judge.scores(items, micro_batch_tokens, Some(&run.folder.cache()), &mut ui::advance(&bar))
    });
    bar.finish_and_clear();
    scores
}

/// Whether scores of a metric are comparable between prompts only relative to the base model's own answers.
pub(super) fn is_relative(run: &Run<'_>, metric: &str) -> bool {
    run.recipe.judge(metric).is_some_and(|judge| matches!(judge.source, JudgeSource::Policy(_)))
}

/// Σ_m w_m (score_m(chosen) − score_m(rejected)) of every pair.
pub(super) fn margins(
    run: &Run<'_>,
    weights: &BTreeMap<String, f64>,
    pairs: &[TokenizedPair],
    micro_batch_tokens: Option<usize>,
) -> Result<Vec<f64>> {
    let items: Vec<Sequences<'_>> = pairs.iter().map(TokenizedPair::sequences).collect();
    let scores = weights.keys().map(|metric| scores(run, metric, &items, micro_batch_tokens));
    Ok(align::data::margins(&scores.collect::<Result<Vec<_>>>()?, &weights.values().copied().collect::<Vec<_>>()))
}
