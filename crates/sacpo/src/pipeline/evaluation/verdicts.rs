//! What judges say of the answers, and the ratings that follow.

use std::path::PathBuf;
use std::time::Duration;

use align::data::TemplateTail;
use engine::{Error, Result};
use evaluate::judge::{
    Budget, ChatJudge, ChatOptions, Comparison, Judge as _, Judgement, Prices, Progress, ScoreJudge, Store, SystemClock,
};
use evaluate::rating::{Elo, Options, Ratings, rate};
use evaluate::verdict::Verdict;
use serde_json::Map;

use super::{Answered, AnsweredSet};
use crate::judging::{self, Counts, api_key, request_fields, taken};
use crate::pipeline::record::write_json;
use crate::pipeline::{Run, judge};
use crate::scorer::TextScorer;
use crate::{interrupt, ui};
use sacpo::recipe::{self, AnswerJudge, Recipe};

/// The share of the worst scores whose mean is rated, as `sacpo rate` has it by default.
const TAIL: f64 = 0.1;

/// Checks the options of language models that judge. Nothing is asked or written.
pub(super) fn check(recipe: &Recipe) -> Result<()> {
    let store = recipe.run.out.join(STORE);
    for judge in &recipe.evaluate.judges {
        let Some(chat) = &judge.chat else { continue };
        let within = |error| Error::input(format!("In `evaluate.judge` of `{}`: {error}", judge.metric));
        let store = Store::look(&store)?;
        chat_options(chat)
            .and_then(|options| ChatJudge::new(options, &store, &SystemClock).map(|_| ()))
            .map_err(within)?;
    }
    Ok(())
}

/// The replies of language models in a run's folder.
const STORE: &str = "verdicts.sqlite";

/// Lets every judge judge its sets, writes the verdicts, and rates them.
///
/// # Errors
/// Those of judging, after what there is has been written.
pub(super) fn judge_all(run: &Run<'_>, sets: &[AnsweredSet]) -> Result<Vec<(String, Ratings)>> {
    let mut ratings = Vec::new();
    for judge in &run.recipe.evaluate.judges {
        let of_judge: Vec<&AnsweredSet> =
            judge.sets.iter().filter_map(|name| sets.iter().find(|set| set.name == *name)).collect();
        let judged = match &judge.chat {
            Some(chat) => by_language_model(run, judge, chat, &of_judge)?,
            None => by_own_judge(run, judge, &of_judge)?,
        };
        for (set, judgements) in of_judge.iter().zip(judged) {
            let verdicts: Vec<Verdict> = judgements.into_iter().map(|judgement| judgement.verdict).collect();
            let options = Options {
                baseline: Some(judge.against.clone()),
                tail: TAIL,
                benign: Vec::new(),
                elo: Elo::Online,
                seed: run.recipe.run.seed,
            };
            ratings.push((judge.name_on(&set.name), rate(&verdicts, &options)?));
        }
    }
    if !ratings.is_empty() {
        let all: Map<String, serde_json::Value> =
            ratings.iter().map(|(name, ratings)| (name.clone(), serde_json::json!(ratings))).collect();
        write_json(&run.folder.path.join("ratings.json"), &all)?;
    }
    Ok(ratings)
}

/// The comparisons of every policy with one, policy by policy.
fn comparisons<'a>(set: &'a AnsweredSet, against: &str) -> Vec<Comparison<'a>> {
    let Some((baseline, theirs)) = set.policies.iter().find(|(name, _)| name == against) else { return Vec::new() };
    let others = set.policies.iter().filter(|(name, _)| name != against);
    let of_policy = |(name, own): &'a (String, Vec<Answered>)| {
        own.iter().zip(theirs).map(move |(a, b)| Comparison {
            prompt: &a.prompt,
            category: a.category.as_deref(),
            names: [name, baseline],
            answers: [&a.text, &b.text],
        })
    };
    others.flat_map(of_policy).collect()
}

/// What a language model says, `[set]`.
fn by_language_model(
    run: &Run<'_>,
    judge: &AnswerJudge,
    chat: &recipe::ChatJudge,
    sets: &[&AnsweredSet],
) -> Result<Vec<Vec<Judgement>>> {
    let compared: Vec<Vec<Comparison<'_>>> = sets.iter().map(|set| comparisons(set, &judge.against)).collect();
    // one job, so that the budget is for all sets
    let all = compared.concat();
    let store = Store::open(&run.folder.path.join(STORE))?;
    let options = chat_options(chat)?;
    let prices = options.budget.cost.map(|(_, prices)| prices).or(prices(chat));
    let by = ChatJudge::new(options, &store, &SystemClock)?;
    ui::say(format!("{} by {} at {}:", judge.metric, chat.model, chat.endpoint));
    let judged = judging::judge_all(&by, &by.plan(&all)?, &all, prices)?;
    let Counts { verdicts, unreadable, there } = Counts::of(&judged.judgements);
    ui::say(format!(
        "  {there} of {verdicts} verdicts, {unreadable} of them without scores, by {}.",
        taken(store.usage(), prices)
    ));
    let each = judged.judgements.len() / all.len().max(1);
    let mut judgements = judged.judgements.into_iter().map(|mut judgement| {
        judgement.verdict.metric = Some(judge.metric.clone());
        judgement
    });
    let mut of_sets = Vec::new();
    for (set, compared) in sets.iter().zip(&compared) {
        let of_set: Vec<Judgement> = judgements.by_ref().take(each * compared.len()).collect();
        if there > 0 {
            write(run, &judge.name_on(&set.name), &of_set)?;
        }
        of_sets.push(of_set);
    }
    judged.stopped.map_or(Ok(of_sets), Err)
}

/// What the recipe's own judge of the metric says, `[set]`.
fn by_own_judge(run: &Run<'_>, judge: &AnswerJudge, sets: &[&AnsweredSet]) -> Result<Vec<Vec<Judgement>>> {
    let of_set = |set: &&AnsweredSet| {
        let comparisons = comparisons(set, &judge.against);
        let bar = ui::bar(comparisons.len() as u64, "verdicts");
        let mut heartbeat = ui::Heartbeat::new();
        let mut told = |progress: &Progress| {
            bar.set_position(progress.done as u64);
            heartbeat.beat(&bar, || format!("  {} of {} verdicts", progress.done, progress.total));
            interrupt::check()
        };
        let judged = judge::ask(run, &judge.metric, |by| {
            let scorer = TextScorer {
                judge: by,
                tokenizer: &run.base.tokenizer,
                context: run.base.config.max_position_embeddings,
                template_tail: TemplateTail::Drop,
                cache: run.folder.cache(),
            };
            let name = format!("[[judge]] {}", judge.metric);
            ScoreJudge { scorer: &scorer, metric: judge.metric.clone(), name }.judge(&comparisons, &mut told)
        });
        bar.finish_and_clear();
        let mut judgements = judged?.judgements;
        if judge::is_relative(run, &judge.metric) {
            // of scores that are known up to a constant of each prompt, differences alone mean something
            for scores in judgements.iter_mut().filter_map(|judgement| judgement.verdict.scores.as_mut()) {
                *scores = [scores[0] - scores[1], 0.0];
            }
        }
        write(run, &judge.name_on(&set.name), &judgements)?;
        Ok(judgements)
    };
    sets.iter().map(of_set).collect()
}

fn write(run: &Run<'_>, name: &str, judgements: &[Judgement]) -> Result<()> {
    let folder: PathBuf = run.folder.path.join("verdicts");
    std::fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
    judging::write(&folder.join(format!("{name}.jsonl")), judgements)
}

fn prices(chat: &recipe::ChatJudge) -> Option<Prices> {
    chat.input_price.zip(chat.output_price).map(|(input, output)| Prices { input, output })
}

fn chat_options(chat: &recipe::ChatJudge) -> Result<ChatOptions> {
    // counts in a recipe are small enough
    let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    Ok(ChatOptions {
        endpoint: chat.endpoint.clone(),
        model: chat.model.clone(),
        key: api_key(chat.api_key_env.as_deref())?,
        rubric: chat.rubric,
        repeats: number(chat.repeats),
        temperature: chat.temperature,
        max_tokens: number(chat.max_tokens),
        fields: request_fields(&chat.set)?,
        attempts: chat.attempts,
        retries: number(chat.retries),
        timeout: Duration::from_secs(chat.timeout as u64),
        concurrency: chat.concurrency,
        budget: Budget { calls: chat.max_calls.map(|calls| calls as u64), cost: chat.max_cost.zip(prices(chat)) },
    })
}
