//! Comparisons judged by a language model behind an endpoint, with progress; what `sacpo judge` and recipes share.

use std::path::Path;
use std::time::{Duration, Instant};

use engine::checkpoint::atomic;
use engine::{Error, Result};
use evaluate::judge::{
    ApiKey, ChatJudge, Comparison, Judge as _, Judged, Judgement, Missing, Plan, Prices, Progress, Usage,
};
use serde_json::{Map, Value};

use crate::{interrupt, ui};

/// Judges comparisons, of which `plan` is what judging takes.
///
/// # Errors
/// What keeps the judge from judging anything.
pub(crate) fn judge_all(
    judge: &ChatJudge<'_>,
    plan: &Plan,
    comparisons: &[Comparison<'_>],
    prices: Option<Prices>,
) -> Result<Judged> {
    let start = Instant::now();
    ui::say(format!("{}.", describe(plan, comparisons.len())));
    let bar = ui::bar(plan.verdicts as u64, "verdicts");
    // only what is done from here counts for the rate
    bar.set_position(plan.kept as u64);
    bar.reset_eta();
    let mut heartbeat = ui::Heartbeat::new();
    let judged = judge.judge(comparisons, &mut |progress| {
        let message = message(progress, plan, prices, start.elapsed());
        bar.set_position(progress.done as u64);
        heartbeat.beat(&bar, || format!("  {} of {} verdicts, {message}", progress.done, progress.total));
        bar.set_message(message);
        interrupt::check()
    })?;
    bar.finish_and_clear();
    let counts = Counts::of(&judged.judgements);
    if counts.there > 0 && counts.unreadable == counts.there {
        let reply = judged.judgements.iter().find_map(|judgement| judgement.reply.as_deref()).unwrap_or_default();
        ui::say(format!(
            "Warning: no reply has scores, so nothing is judged. One reply is {:?}. Give the judge more room (--max-tokens), or take \
             another model.",
            reply.chars().take(200).collect::<String>()
        ));
    }
    Ok(judged)
}

/// Numbers of verdicts.
pub(crate) struct Counts {
    /// All.
    pub(crate) verdicts: usize,
    /// Those without scores.
    pub(crate) unreadable: usize,
    /// Those that the judge came to.
    pub(crate) there: usize,
}

impl Counts {
    pub(crate) fn of(judgements: &[Judgement]) -> Self {
        let count = |missing| judgements.iter().filter(|judgement| judgement.missing == Some(missing)).count();
        let verdicts = judgements.len();
        Self { verdicts, unreadable: count(Missing::Unreadable), there: verdicts - count(Missing::NotJudged) }
    }
}

/// The key in an environment variable, which must be set if it is named.
pub(crate) fn api_key(variable: Option<&str>) -> Result<ApiKey> {
    let key = ApiKey::from_env(variable.unwrap_or("OPENAI_API_KEY"))?;
    match variable {
        Some(variable) if !key.is_set() => {
            Err(Error::input(format!("The environment variable {variable} is not set. Put the API key into it.")))
        }
        _ => Ok(key),
    }
}

/// Fields of requests, each `KEY=VALUE`.
pub(crate) fn request_fields(fields: &[String]) -> Result<Map<String, Value>> {
    fields.iter().map(|field| parse_field(field)).collect()
}

/// A field of requests: JSON, or what is no JSON as a text.
fn parse_field(field: &str) -> Result<(String, Value)> {
    let Some((key, value)) = field.split_once('=').filter(|(key, _)| !key.is_empty()) else {
        return Err(Error::input(format!("--set {field} is no field and value. Write KEY=VALUE, such as seed=1.")));
    };
    Ok((key.to_owned(), serde_json::from_str(value).unwrap_or_else(|_| Value::from(value))))
}

/// What judging takes, in words.
pub(crate) fn describe(plan: &Plan, comparisons: usize) -> String {
    let Plan { verdicts, kept, calls, .. } = plan;
    format!(
        "{comparisons} comparisons make {verdicts} verdicts; the store has {kept}, and the others take {calls} calls"
    )
}

/// A usage in words, with its cost where prices are known.
pub(crate) fn taken(usage: Usage, prices: Option<Prices>) -> String {
    let Usage { calls, input_tokens, output_tokens } = usage;
    let cost = prices.map(|prices| format!(", which cost {:.4}", prices.cost(usage))).unwrap_or_default();
    format!("{calls} calls, {input_tokens} tokens in and {output_tokens} out{cost}")
}

/// What stands beside the bar.
fn message(progress: &Progress, plan: &Plan, prices: Option<Prices>, elapsed: Duration) -> String {
    let rate = (progress.done - plan.kept.min(progress.done)) as f64 / elapsed.as_secs_f64().max(1.0) * 60.0;
    let mut message = format!("{rate:.0} a minute, {} calls", progress.usage.calls);
    if let Some(prices) = prices {
        message += &format!(", cost {:.2}", prices.cost(progress.usage));
    }
    if progress.unreadable > 0 {
        message += &format!(", {} unreadable", progress.unreadable);
    }
    if let Some(trouble) = &progress.trouble {
        message += &format!("; again, since {trouble}");
    }
    message
}

/// Writes verdicts as JSON lines, atomically.
pub(crate) fn write(path: &Path, judgements: &[Judgement]) -> Result<()> {
    atomic::write_file(path, |out| {
        for judgement in judgements {
            serde_json::to_writer(&mut *out, judgement)?;
            out.write_all(b"\n")?;
        }
        Ok(())
    })
}
