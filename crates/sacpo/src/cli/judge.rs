//! The options of `sacpo judge`.

use std::path::PathBuf;

use align::data::TemplateTail;
use align::world::Metric;
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use evaluate::judge::Rubric;

use super::{positive, temperature, template_tail_parser};
use crate::policy::PolicyName;

/// Let a language model, a reward or cost model, or a policy judge answers in pairs: which of two to a prompt is better.
///
/// A language model is behind an OpenAI-compatible chat endpoint: a service, or a server of your own. It scores both answers to
/// a prompt from 0 to 10, in both orders. Every reply is kept in a store as soon as it is there and never asked for again, so a
/// judging that was stopped goes on when the same command is given again. A reply without two scores on its first line is
/// asked for again, and then counts as missing, never as a tie. Other judges are on this machine and score each answer by itself.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    sacpo judge base.json sacpo-0.1.json --rubric harmlessness \\\n    \
    --endpoint https://api.openai.com/v1 --model gpt-4.1-mini --out harmlessness.jsonl\n\n  \
    Several policies against one, with a budget; first what it would take:\n  \
    sacpo judge sacpo-0.1.json sacpo-0.01.json --against base.json --rubric helpfulness \\\n    \
    --endpoint https://api.openai.com/v1 --model gpt-4.1-mini --out helpfulness.jsonl \\\n    \
    --input-price 0.4 --output-price 1.6 --max-cost 5 --dry-run\n\n  \
    A judge on this machine:\n  \
    sacpo judge base.json sacpo-0.1.json --cost-model runs/cost/checkpoint --metric harmlessness --out harmlessness.jsonl\n  \
    sacpo judge base.json sacpo-0.1.json --implicit runs/hh/steps/safe/checkpoint --reference runs/hh/steps/helpful/checkpoint \\\n    \
    --beta 0.05 --metric harmlessness --out harmlessness.jsonl\n\n  \
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
    #[command(flatten)]
    pub(crate) local: LocalJudge,
    #[command(flatten)]
    pub(crate) scoring: LocalScoring,
}

/// The judging model and how it is asked.
#[derive(Debug, Args)]
#[command(next_help_heading = "A language model as the judge")]
pub(crate) struct JudgeEndpoint {
    /// URL of an OpenAI-compatible API, up to /v1.
    #[arg(long, value_name = "URL", required_unless_present = "local")]
    pub(crate) endpoint: Option<String>,
    /// The name that the endpoint knows the model by.
    #[arg(long, value_name = "NAME", required_unless_present = "local")]
    pub(crate) model: Option<String>,
    /// What answers are judged by.
    #[arg(long, value_parser = rubric_parser(), required_unless_present = "local")]
    pub(crate) rubric: Option<Rubric>,
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

/// A judge that scores each answer by itself, in the place of a language model.
#[derive(Debug, Args)]
#[command(next_help_heading = "A judge on this machine")]
#[group(id = "local", multiple = false, requires = "metric")]
#[group(conflicts_with_all = ["JudgeEndpoint", "JudgeBudget", "store", "dry_run"])]
pub(crate) struct LocalJudge {
    /// A reward model: folder or hf://OWNER/NAME of a sequence classification with one label. More is better.
    #[arg(long, value_name = "MODEL")]
    pub(crate) reward_model: Option<PathBuf>,
    /// A cost model, of the same kind. Less is better, and less than 0 is safe; scores in verdicts are costs times −1.
    #[arg(long, value_name = "MODEL")]
    pub(crate) cost_model: Option<PathBuf>,
    /// The implicit reward β log π/π_reference of a policy that was aligned to the metric.
    #[arg(long, value_name = "POLICY", requires_all = ["reference", "beta"])]
    pub(crate) implicit: Option<PolicyName>,
    /// The exact values of the quickstart's world, for answers to its prompts.
    #[arg(long, value_name = "METRIC", value_parser = world_metric_parser())]
    pub(crate) quickstart: Option<Metric>,
}

/// What such a judge needs besides.
#[derive(Debug, Args)]
#[command(next_help_heading = "A judge on this machine")]
pub(crate) struct LocalScoring {
    /// What the judge scores, such as helpfulness or harmlessness: the verdicts' metric.
    #[arg(long, requires = "local")]
    pub(crate) metric: Option<String>,
    /// What the policy was aligned from.
    #[arg(long, value_name = "POLICY", requires = "implicit")]
    pub(crate) reference: Option<PolicyName>,
    /// The temperature of that alignment: β in the first step of a chain, β/λ in a later one.
    #[arg(long, value_parser = temperature, allow_negative_numbers = true, requires = "implicit")]
    pub(crate) beta: Option<f64>,
    /// Whether what the template writes after the end of an answer is read too: as TRL does where it trains reward models.
    #[arg(long, default_value = "drop", value_parser = template_tail_parser(), requires = "local")]
    pub(crate) template_tail: TemplateTail,
}

fn world_metric_parser() -> impl TypedValueParser<Value = Metric> {
    PossibleValuesParser::new(["reward", "safety"])
        .map(|name| if name == "reward" { Metric::Reward } else { Metric::Safety })
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
