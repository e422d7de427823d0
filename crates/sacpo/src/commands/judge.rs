//! `sacpo judge`.

mod local;

use std::path::Path;
use std::time::{Duration, Instant};

use align::data;
use engine::{Error, Result};
use evaluate::judge::{Budget, ChatJudge, ChatOptions, Comparison, Plan, Prices, Store, SystemClock, Usage};
use serde::Serialize;

use super::{on_threads, print_json};
use crate::answer_files::AnswerFile;
use crate::cli::{Global, Judge, JudgeBudget};
use crate::judging::{Counts, api_key, describe, judge_all, request_fields, taken, write};
use crate::ui;

#[derive(Serialize)]
struct Output<'a> {
    comparisons: usize,
    verdicts: usize,
    /// Those without scores.
    unreadable: usize,
    #[serde(flatten)]
    usage: Usage,
    cost: Option<f64>,
    seconds: f64,
    out: &'a Path,
    store: &'a Path,
}

#[derive(Serialize)]
struct DryRun {
    comparisons: usize,
    verdicts: usize,
    kept: usize,
    /// Calls that are needed.
    calls: usize,
    /// What they take at most.
    most: Option<Usage>,
    most_cost: Option<f64>,
    /// What the store's calls for these verdicts took.
    used: Usage,
    used_cost: Option<f64>,
}

pub(super) fn run(command: &Judge, global: Global) -> Result<()> {
    let files = command.answers.iter().map(|source| AnswerFile::read(source)).collect::<Result<Vec<_>>>()?;
    let against = command.against.as_ref().map(|source| AnswerFile::read(source)).transpose()?;
    let comparisons = comparisons(&files, against.as_ref())?;
    check_out(&command.out)?;
    match command.scoring.metric {
        Some(_) => on_threads(global.threads, || local::judge(command, &comparisons, global)),
        None => by_endpoint(command, &comparisons, global),
    }
}

/// Checks before anything is judged that verdicts can be written and replace nothing but verdicts.
fn check_out(out: &Path) -> Result<()> {
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !folder.is_dir() || out.is_dir() {
        let what = if out.is_dir() { "it is a folder" } else { "its folder does not exist" };
        return Err(Error::input(format!(
            "{} cannot be written: {what}. Give the path of a file with --out.",
            out.display()
        )));
    }
    let holds_something = out.metadata().is_ok_and(|file| file.len() > 0);
    let is_verdict =
        |record: &data::Record| ["a", "b", "outcome"].iter().all(|column| record.columns.contains_key(*column));
    if holds_something && !data::read_records(out).is_ok_and(|records| records.iter().all(is_verdict)) {
        return Err(Error::input(format!(
            "{} exists and holds something else than verdicts, which would be lost. Choose another path for --out.",
            out.display()
        )));
    }
    Ok(())
}

/// Lets a language model judge.
fn by_endpoint(command: &Judge, comparisons: &[Comparison<'_>], global: Global) -> Result<()> {
    let start = Instant::now();
    let prices = prices(&command.budget);
    let options = options(command, prices)?;
    let store = if command.dry_run { Store::look(&command.store)? } else { Store::open(&command.store)? };
    let judge = ChatJudge::new(options, &store, &SystemClock)?;
    let plan = judge.plan(comparisons)?;
    if command.dry_run {
        return tell_plan(&plan, comparisons.len(), prices, global);
    }
    let judged = judge_all(&judge, &plan, comparisons, prices)?;
    let Counts { verdicts, unreadable, there } = Counts::of(&judged.judgements);
    if there > 0 {
        write(&command.out, &judged.judgements)?;
    }
    let usage = store.usage();
    ui::say(format!(
        "{there} of {verdicts} verdicts, {unreadable} of them without scores, by {}{}.",
        taken(usage, prices),
        if there > 0 { format!(", in {}", command.out.display()) } else { String::new() }
    ));
    if let Some(error) = judged.stopped {
        return Err(error);
    }
    if !global.json {
        return Ok(());
    }
    print_json(&Output {
        comparisons: comparisons.len(),
        verdicts,
        unreadable,
        usage,
        cost: prices.map(|prices| prices.cost(usage)),
        seconds: start.elapsed().as_secs_f64(),
        out: &command.out,
        store: &command.store,
    })
}

/// All pairs of files, or each with the one that all are compared with.
fn comparisons<'a>(files: &'a [AnswerFile], against: Option<&'a AnswerFile>) -> Result<Vec<Comparison<'a>>> {
    let all: Vec<&AnswerFile> = files.iter().chain(against).collect();
    if all.len() < 2 {
        return Err(Error::input(
            "One file of answers has nothing to be compared with. Give another one, or --against.",
        ));
    }
    for (index, file) in all.iter().enumerate() {
        if file.name.is_empty() || all[..index].iter().any(|before| before.name == file.name) {
            return Err(Error::input(format!(
                "Two policies have the name {:?}, or it is empty. Give each a name of its own before its file, as in \
                 helpful=answers.jsonl.",
                file.name
            )));
        }
    }
    let pairs: Vec<[&AnswerFile; 2]> = match against {
        Some(against) => files.iter().map(|file| [file, against]).collect(),
        None => {
            let later = |index: usize| files[index + 1..].iter().map(move |other| [&files[index], other]);
            (0..files.len()).flat_map(later).collect()
        }
    };
    let compared = pairs.into_iter().map(|[a, b]| a.compared_with(b)).collect::<Result<Vec<_>>>()?;
    Ok(compared.concat())
}

fn prices(budget: &JudgeBudget) -> Option<Prices> {
    budget.input_price.zip(budget.output_price).map(|(input, output)| Prices { input, output })
}

fn options(command: &Judge, prices: Option<Prices>) -> Result<ChatOptions> {
    let judge = &command.endpoint;
    let budget = &command.budget;
    let (Some(endpoint), Some(model), Some(rubric)) = (&judge.endpoint, &judge.model, judge.rubric) else {
        return Err(Error::input(
            "A judge is needed. Give --endpoint, --model and --rubric, or a judge on this machine.",
        ));
    };
    Ok(ChatOptions {
        endpoint: endpoint.clone(),
        model: model.clone(),
        key: api_key(judge.api_key_env.as_deref())?,
        rubric,
        repeats: judge.repeats,
        temperature: judge.temperature,
        max_tokens: judge.max_tokens,
        fields: request_fields(&judge.set)?,
        attempts: judge.attempts,
        retries: judge.retries,
        timeout: Duration::from_secs(judge.timeout),
        concurrency: judge.concurrency.into(),
        budget: Budget { calls: budget.max_calls, cost: budget.max_cost.zip(prices) },
    })
}

fn tell_plan(plan: &Plan, comparisons: usize, prices: Option<Prices>, global: Global) -> Result<()> {
    let cost = |usage: Usage| prices.map(|prices| prices.cost(usage));
    let most_cost = plan.most.and_then(cost);
    if global.json {
        let &Plan { verdicts, kept, calls, used, most } = plan;
        return print_json(&DryRun {
            comparisons,
            verdicts,
            kept,
            calls,
            most,
            most_cost,
            used,
            used_cost: cost(used),
        });
    }
    let most = match plan.most {
        Some(most) => format!(
            " Every reply being unreadable and as long as it may be, and every byte a token (English has about four bytes in one), \
             it takes at most {}.",
            taken(most, prices)
        ),
        None => " Without max_tokens there is no limit to what it takes.".to_owned(),
    };
    let used =
        if plan.used.calls > 0 { format!(" So far it took {}.", taken(plan.used, prices)) } else { String::new() };
    ui::print(format!("{}.{used}{most}", describe(plan, comparisons)))
}
