//! The options of `sacpo judge`.

use std::path::PathBuf;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use evaluate::judge::Rubric;

use super::positive;

/// Let a language model judge answers in pairs: which of two to a prompt is better, and by how much.
///
/// The judge is behind an OpenAI-compatible chat endpoint: a service, or a server of your own. It scores both answers to a
/// prompt from 0 to 10, in both orders. Every reply is kept in a store as soon as it is there and never asked for again, so a
/// judging that was stopped goes on when the same command is given again. A reply without two scores on its first line is
/// asked for again, and then counts as missing, never as a tie.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    sacpo judge base.json sacpo-0.1.json --rubric harmlessness \\\n    \
    --endpoint https://api.openai.com/v1 --model gpt-4.1-mini --out harmlessness.jsonl\n\n  \
    Several policies against one, with a budget; first what it would take:\n  \
    sacpo judge sacpo-0.1.json sacpo-0.01.json --against base.json --rubric helpfulness \\\n    \
    --endpoint https://api.openai.com/v1 --model gpt-4.1-mini --out helpfulness.jsonl \\\n    \
    --input-price 0.4 --output-price 1.6 --max-cost 5 --dry-run\n\n  \
    A reasoning model, which takes other fields:\n  \
    … --set temperature=null --set max_tokens=null --set max_completion_tokens=4096\n\n\
    The files hold answers as `sacpo generate --json` prints them, rows with `prompt` and `answer`, or alpaca_eval's \
    outputs. `sacpo rate` makes ratings of the verdicts. docs/judging.md has the rubrics and the rules.")]
pub(crate) struct Judge {
    /// Answers of policies, two or more files (one or more with --against); the name is the file's unless given.
    #[arg(required = true, value_name = "[NAME=]FILE")]
    pub(crate) answers: Vec<String>,
    /// Compare every policy with this one, instead of all with each other.
    #[arg(long, value_name = "[NAME=]FILE")]
    pub(crate) against: Option<String>,
    /// What answers are judged by.
    #[arg(long, value_parser = rubric_parser())]
    pub(crate) rubric: Rubric,
    /// File of verdicts to write, one JSON object a line.
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
    /// The judge's file of replies, a SQLite database; made if need be. Other commands may use it at the same time.
    #[arg(long, value_name = "FILE", default_value = "verdicts.sqlite")]
    pub(crate) store: PathBuf,
    /// Say how many calls would be made and what they could cost at most. Nothing is asked or written.
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) endpoint: JudgeEndpoint,
    #[command(flatten)]
    pub(crate) budget: JudgeBudget,
}

/// The judging model and how it is asked.
#[derive(Debug, Args)]
#[command(next_help_heading = "The judge")]
pub(crate) struct JudgeEndpoint {
    /// URL of an OpenAI-compatible API, up to /v1.
    #[arg(long, value_name = "URL")]
    pub(crate) endpoint: String,
    /// The name that the endpoint knows the model by.
    #[arg(long, value_name = "NAME")]
    pub(crate) model: String,
    /// The environment variable that holds the API key [default: OPENAI_API_KEY, if it is set].
    #[arg(long, value_name = "VARIABLE")]
    pub(crate) api_key_env: Option<String>,
    /// How often every pair is judged in each order; useful at a temperature above 0.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) repeats: u32,
    /// 0 takes the likeliest reply; higher is more random.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) temperature: f64,
    /// The longest reply in tokens.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_tokens: u32,
    /// Another field of the request, as JSON or text, such as seed=1 or reasoning_effort=low; null leaves a field out.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
    /// Replies that are asked for until one has two scores on its first line.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = positive)]
    pub(crate) attempts: usize,
    /// How often a request is made again in a row after a fault: a limit of rate, an error of the server, a timeout, a broken
    /// connection, an answer that is cut off.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub(crate) retries: u32,
    /// The longest that a request may take, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) timeout: u64,
    /// Requests that are made at once.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) concurrency: u16,
}

/// What the verdicts may take, counted from the first run of the command.
#[derive(Debug, Args)]
#[command(next_help_heading = "Budget, over all runs of the command")]
pub(crate) struct JudgeBudget {
    /// The most calls.
    #[arg(long, value_name = "N")]
    pub(crate) max_calls: Option<u64>,
    /// The most that the calls may cost, in the currency of the prices.
    #[arg(long, value_name = "AMOUNT", value_parser = not_negative, requires = "input_price")]
    pub(crate) max_cost: Option<f64>,
    /// Price of a million tokens of requests.
    #[arg(long, value_name = "PRICE", value_parser = not_negative, requires = "output_price")]
    pub(crate) input_price: Option<f64>,
    /// Price of a million tokens of replies.
    #[arg(long, value_name = "PRICE", value_parser = not_negative, requires = "input_price")]
    pub(crate) output_price: Option<f64>,
}

fn not_negative(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(value) if f64::is_finite(value) && value >= 0.0 => Ok(value),
        _ => Err("must be a number of at least 0, such as 2.5".into()),
    }
}

fn rubric_parser() -> impl TypedValueParser<Value = Rubric> {
    PossibleValuesParser::new(Rubric::ALL.map(Rubric::name))
        .map(|name| Rubric::ALL.into_iter().find(|rubric| rubric.name() == name).unwrap_or(Rubric::Helpfulness))
}
