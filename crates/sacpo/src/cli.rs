//! The command line: one struct per command.

mod bench;
mod data;
mod judge;
mod model;
mod train;

use std::path::PathBuf;

use align::data::{Format, TemplateTail};
use align::merge::Method;
use align::objective;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use engine::generate::Dtype;
use serde::Serialize;

use crate::policy::PolicyName;

pub(crate) use bench::{Bench, Scaling, Shape};
pub(crate) use data::{ConvertData, DataCommand, DataSource, InspectData};
pub(crate) use judge::{Judge, JudgeBudget, LocalJudge};
pub(crate) use model::{AddAdapter, ModelCommand};
pub(crate) use train::{TrainCommand, TrainScorer};

/// Align language models under safety constraints, step by step (SACPO, arXiv 2404.11049).
#[derive(Debug, Parser)]
#[command(name = "sacpo", version, max_term_width = 100)]
#[command(after_help = "Examples:\n  \
    sacpo quickstart                           the whole method in a small world, no files needed\n  \
    sacpo run recipes/hh-rlhf-smollm2.toml     both steps on a real model\n  \
    sacpo generate --model runs/hh/steps/helpful/checkpoint --prompt \"Who are you?\"\n\n\
    Exit codes: 0 done, 1 failed, 2 bad input.")]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Global {
    /// Print one JSON object on standard output instead of text.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Number of threads [default: physical cores].
    #[arg(long, global = true, value_name = "N", value_parser = positive)]
    pub(crate) threads: Option<usize>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Quickstart(Quickstart),
    Run(Run),
    Train(TrainCommand),
    Logps(Logps),
    Loss(Loss),
    Generate(Generate),
    Judge(Box<Judge>),
    Serve(Serve),
    Merge(Merge),
    Rate(Rate),
    Report(Report),
    Tabular(Tabular),
    Bench(Bench),
    /// Look at preference data, and convert them.
    #[command(subcommand)]
    Data(DataCommand),
    /// Look at models, convert them, and handle adapters.
    #[command(subcommand)]
    Model(ModelCommand),
}

/// Run the whole method in a small world where reward and safety are known exactly.
///
/// Trains a small model from scratch, aligns it on helpfulness, then on safety at several β/λ, and reports the exact
/// expected reward and safety of every policy on held-out prompts. Needs no file and no network.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  sacpo quickstart --out runs/quickstart\n  \
    sacpo quickstart --recipe recipes/baselines.toml --out runs/baselines\n\n\
    The folder then holds a report (report.html), a table (summary.md), a plot (frontier.svg), every policy, and the recipe that made them.")]
pub(crate) struct Quickstart {
    /// Folder for everything that is made.
    #[arg(long, default_value = "runs/quickstart", value_name = "FOLDER")]
    pub(crate) out: PathBuf,
    /// The loss of both steps. Losses of single responses (`kto`, `bco`) train on labelled answers instead of pairs.
    #[arg(long, default_value = "dpo", value_parser = PossibleValuesParser::new(WORLD_OBJECTIVES))]
    pub(crate) objective: String,
    /// The least E[g*] over all prompts. λ is chosen for it, a policy is trained at that λ, and its safety is certified.
    /// [default: the recipe's, 0]
    #[arg(long, value_parser = finite, allow_negative_numbers = true)]
    pub(crate) threshold: Option<f64>,
    /// Another recipe to run in the world: its base model, data and prompts are taken from there. Its steps are about
    /// `helpfulness` or `safety`.
    #[arg(long, value_name = "FILE", conflicts_with = "objective")]
    pub(crate) recipe: Option<PathBuf>,
    /// How much data and training: `small` is a smoke test of a minute or two, whose policies are not well trained and
    /// need not meet the threshold.
    #[arg(long, value_enum, default_value_t = Size::Full)]
    pub(crate) size: Size,
    /// Seed of all randomness.
    #[arg(long, default_value_t = 0, value_parser = seed())]
    pub(crate) seed: u64,
}

/// The objectives that need nothing but the world's preferences, and have a reference.
const WORLD_OBJECTIVES: [&str; 11] =
    ["dpo", "robust-dpo", "ipo", "hinge", "kto", "bco", "nca", "exo", "sppo", "apo-zero", "apo-down"];

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Size {
    Small,
    Full,
}

/// Run a recipe: all its alignment steps and the comparison of their policies.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    sacpo run recipes/hh-rlhf-smollm2.toml\n  \
    sacpo run recipes/hh-rlhf-smollm2.toml --set train.learning_rate=1e-6\n  \
    sacpo run recipes/hh-rlhf-smollm2.toml --set 'step.2.beta_over_lambda=[0.1, 0.05]'\n  \
    sacpo run recipes/hh-rlhf-smollm2.toml --dry-run\n\n\
    A run that was stopped continues where it was when the same command is given again. Steps that are finished are not \
    repeated.")]
pub(crate) struct Run {
    /// The recipe, a TOML file; docs/recipes.md lists its keys.
    pub(crate) recipe: PathBuf,
    /// Change a value of the recipe; steps are counted from 1.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
    /// Say what the run would do, what of it is there, and how long the rest would take. Nothing is written.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Seed of all randomness, instead of the recipe's.
    #[arg(long, value_parser = seed())]
    pub(crate) seed: Option<u64>,
}

/// Align a model on one metric; the model is start and reference.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    sacpo train --model models/SmolLM2 --data helpful.jsonl.gz --metric helpfulness \\\n    \
    --beta 0.1 --out runs/helpful\n\n  \
    The second step of a chain, whose --beta is β/λ:\n  \
    sacpo train --model runs/helpful/steps/helpfulness/checkpoint \\\n    \
    --data harmless.jsonl.gz --metric harmlessness --beta 0.05 --out runs/harmless\n\n  \
    An adapter instead of all weights, on labelled responses:\n  \
    sacpo train --model models/SmolLM2 --data ratings.jsonl --metric helpfulness --objective bco \\\n    \
    --beta 0.1 --set train.lora_rank=16 --set train.learning_rate=1e-4 --out runs/rated\n\n\
    A training that was stopped continues where it was when the same command is given again.")]
pub(crate) struct Train {
    /// Folder in Hugging Face's layout, .gguf file, or hf://OWNER/NAME: where training starts, and the reference.
    #[arg(long, value_name = "MODEL")]
    pub(crate) model: PathBuf,
    /// Preference pairs or single responses: .jsonl, .json or Parquet; a file, a folder, a pattern ('train-*.parquet'), or
    /// hf://datasets/OWNER/NAME/PATH.
    #[arg(long, value_name = "FILE")]
    pub(crate) data: PathBuf,
    /// What the preferences are about, such as helpfulness or harmlessness.
    #[arg(long)]
    pub(crate) metric: String,
    /// The loss.
    #[arg(long, default_value = "dpo", value_parser = PossibleValuesParser::new(align::objective::NAMES))]
    pub(crate) objective: String,
    /// Temperature: β in the first step of a chain, β/λ in a later one.
    #[arg(long, value_parser = temperature, allow_negative_numbers = true)]
    pub(crate) beta: f64,
    /// Folder for everything that is made.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) out: PathBuf,
    /// Seed of all randomness.
    #[arg(long, default_value_t = 0, value_parser = seed())]
    pub(crate) seed: u64,
    /// Set any other key of a recipe, such as train.learning_rate=1e-6 or data.max_length=256.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
    #[command(flatten)]
    pub(crate) parameters: Parameters,
}

/// Print the log-probability of every response of a preference file.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  sacpo logps --model models/SmolLM2 --data pairs.jsonl --json")]
pub(crate) struct Logps {
    /// Folder in Hugging Face's layout, .gguf file, hf://OWNER/NAME, or two of them mixed at decode time: 'mix(A, B, q)'.
    #[arg(long, value_name = "MODEL")]
    pub(crate) model: PolicyName,
    /// Allow q outside 0 to 1 in mix(A, B, q), which leads beyond the models.
    #[arg(long)]
    pub(crate) extrapolate: bool,
    /// Preference pairs: .jsonl, .json or Parquet; a file, a folder, a pattern ('train-*.parquet'), or
    /// hf://datasets/OWNER/NAME/PATH.
    #[arg(long, value_name = "FILE")]
    pub(crate) data: PathBuf,
    /// Which preference to read from files that hold several.
    #[arg(long, default_value = "helpfulness")]
    pub(crate) metric: String,
    /// Schema of the file [default: found from its first row].
    #[arg(long, value_parser = format_parser())]
    pub(crate) format: Option<Format>,
    /// Only the first N pairs.
    #[arg(long, value_name = "N", value_parser = positive)]
    pub(crate) limit: Option<usize>,
    /// Longest prompt and response together, in tokens [default: the model's context].
    #[arg(long, value_name = "TOKENS", value_parser = positive)]
    pub(crate) max_length: Option<usize>,
    /// Whether what the template writes after the end of a response is scored.
    #[arg(long, default_value = "drop", value_parser = template_tail_parser())]
    pub(crate) template_tail: TemplateTail,
}

/// Print losses, gradients and metrics of an objective from given log-probabilities.
///
/// Each row of the file holds what the objective reads. Pairs: policy_chosen, policy_rejected, ref_chosen, ref_rejected;
/// len_chosen, len_rejected (tokens) for ipo without sums, simpo, orpo and cpo; safe_chosen, safe_rejected for safe-dpo;
/// margin for modpo; kl_chosen, kl_rejected for tdpo. Single responses (kto, bco, sft): policy, ref, desirable; policy_kl,
/// ref_kl of a mismatched pair for kto. Log-probabilities are sums over the tokens of a response, in nats.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    sacpo loss --objective dpo --beta 0.1 pairs.jsonl\n  \
    sacpo loss --objective kto --beta 0.1 --undesirable-weight 0.5 singles.jsonl.gz --json\n\n\
    The loss is the mean over the rows (sft: over the desirable ones), and gradients are those of the mean. docs/objectives.md lists the objectives.")]
pub(crate) struct Loss {
    /// Rows of log-probabilities: .jsonl, .json or Parquet.
    pub(crate) file: PathBuf,
    /// The loss.
    #[arg(long, value_parser = PossibleValuesParser::new(objective::NAMES))]
    pub(crate) objective: String,
    /// Temperature β: in a later step of a chain β/λ [not needed by sft].
    #[arg(long, allow_negative_numbers = true)]
    pub(crate) beta: Option<f64>,
    #[command(flatten)]
    pub(crate) parameters: Parameters,
}

/// The parameters of objectives beside β; what is not given has the objective's default.
#[derive(Debug, Args)]
#[command(next_help_heading = "Parameters of the objective")]
pub(crate) struct Parameters {
    /// Share of labels taken to be wrong, below 0.5: dpo [0], robust-dpo [0.1], exo [0.001].
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    pub(crate) label_smoothing: Option<f64>,
    /// Take sums of log-probabilities over tokens instead of means: ipo.
    #[arg(long)]
    pub(crate) sum_logps: bool,
    /// Weight of desirable examples: kto [1].
    #[arg(long, value_name = "WEIGHT", allow_negative_numbers = true)]
    pub(crate) desirable_weight: Option<f64>,
    /// Weight of undesirable examples: kto [1].
    #[arg(long, value_name = "WEIGHT", allow_negative_numbers = true)]
    pub(crate) undesirable_weight: Option<f64>,
    /// Target margin: simpo [0.5].
    #[arg(long, allow_negative_numbers = true)]
    pub(crate) gamma: Option<f64>,
    /// Weight of the likelihood: cpo [1]; of the divergence along a response: tdpo [0.5].
    #[arg(long, allow_negative_numbers = true)]
    pub(crate) alpha: Option<f64>,
    /// Margin of a safe response over an unsafe one: safe-dpo [0].
    #[arg(long, allow_negative_numbers = true)]
    pub(crate) delta: Option<f64>,
    /// Weight of the pairs' own metric: modpo [1].
    #[arg(long, allow_negative_numbers = true)]
    pub(crate) weight: Option<f64>,
}

impl Parameters {
    /// Only what is given.
    pub(crate) fn options(&self) -> objective::Options {
        objective::Options {
            label_smoothing: self.label_smoothing,
            sum_logps: self.sum_logps.then_some(true),
            desirable_weight: self.desirable_weight,
            undesirable_weight: self.undesirable_weight,
            gamma: self.gamma,
            alpha: self.alpha,
            delta: self.delta,
            weight: self.weight,
        }
    }
}

/// Answer prompts.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    sacpo generate --model models/SmolLM2 --prompt \"Write a haiku.\" --prompt \"Who are you?\"\n  \
    sacpo generate --model models/SmolLM2 --prompts prompts.jsonl --temperature 0.7 --top-p 0.9 --json\n\n  \
    Between a helpful and a safe policy, without training:\n  \
    sacpo generate --model 'mix(runs/hh/steps/helpful/checkpoint, runs/hh/steps/safe-0.01/checkpoint, 0.5)' \\\n    \
    --prompt \"How do I pick a lock?\"")]
pub(crate) struct Generate {
    /// Folder in Hugging Face's layout, .gguf file, hf://OWNER/NAME, or two of them mixed at decode time: 'mix(A, B, q)'.
    #[arg(long, value_name = "MODEL")]
    pub(crate) model: PolicyName,
    /// Allow q outside 0 to 1 in mix(A, B, q), which leads beyond the models.
    #[arg(long)]
    pub(crate) extrapolate: bool,
    /// A prompt; may be given several times.
    #[arg(long = "prompt", value_name = "TEXT", required_unless_present = "prompts")]
    pub(crate) prompt: Vec<String>,
    /// A file of prompts: .txt with one a line, or .jsonl, .json, .csv or Parquet with a column `prompt`; or
    /// hf://datasets/OWNER/NAME/PATH.
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    pub(crate) prompts: Option<PathBuf>,
    /// A system message before every prompt.
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    pub(crate) system: Option<String>,
    /// Continue the text as it stands, without the chat template.
    #[arg(long)]
    pub(crate) raw: bool,
    /// The longest answer in tokens.
    #[arg(long, default_value_t = 256, value_name = "N")]
    pub(crate) max_new_tokens: usize,
    /// 0 takes the likeliest token each time; higher is more random.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) temperature: f64,
    /// Draw only from this many likeliest tokens; 0 for all.
    #[arg(long, default_value_t = 0)]
    pub(crate) top_k: usize,
    /// Draw only from the likeliest tokens that together have this probability.
    #[arg(long, default_value_t = 1.0)]
    pub(crate) top_p: f64,
    /// Draw only from tokens at least this likely relative to the likeliest.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) min_p: f64,
    /// A text that ends an answer; may be given several times.
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
    /// Answers generated at once.
    #[arg(long, default_value_t = 16)]
    pub(crate) batch_size: usize,
    /// What the matrices are read in: fewer bits are faster, and move the answers. A copy of them is made beside the weights in f32.
    #[arg(long, default_value = "f32", value_parser = dtype_parser())]
    pub(crate) dtype: Dtype,
    /// Seed of the random draws.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
}

/// Offer a policy as a chat endpoint in the form of OpenAI's API.
///
/// Requests are answered together, a token of each at a time; what is answered beside a request changes nothing of its
/// answer. Stops on Ctrl-C.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    sacpo serve models/SmolLM2 --name smollm2\n  \
    sacpo serve 'mix(runs/helpful, runs/safe, 0.5)' --name half --port 0\n\n  \
    curl http://127.0.0.1:8000/v1/chat/completions -d '{\"model\": \"smollm2\", \"stream\": true,\n    \
    \"messages\": [{\"role\": \"user\", \"content\": \"Who are you?\"}]}'\n\n  \
    In Python, with the package openai:\n  \
    client = openai.OpenAI(base_url=\"http://127.0.0.1:8000/v1\", api_key=\"none\")\n  \
    messages = [{\"role\": \"user\", \"content\": \"Who are you?\"}]\n  \
    client.chat.completions.create(model=\"smollm2\", messages=messages)\n\n\
    docs/serving.md lists what is understood of a request.")]
pub(crate) struct Serve {
    /// Folder in Hugging Face's layout, .gguf file, or two of them mixed at decode time: 'mix(A, B, q)'.
    pub(crate) model: PolicyName,
    /// Allow q outside 0 to 1 in mix(A, B, q), which leads beyond the models.
    #[arg(long)]
    pub(crate) extrapolate: bool,
    /// The model's name in requests [default: MODEL as it is written].
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Address to listen at; 0.0.0.0 for everybody who can reach this machine.
    #[arg(long, default_value = "127.0.0.1")]
    pub(crate) host: String,
    /// Port to listen at; 0 takes a free one and says which.
    #[arg(long, default_value_t = 8000)]
    pub(crate) port: u16,
    /// Environment variable with the key that clients must send [default: none is needed].
    #[arg(long, value_name = "VAR")]
    pub(crate) api_key_env: Option<String>,
    /// The longest answer in tokens, where a request has no max_tokens.
    #[arg(long, default_value_t = 1024, value_name = "N", value_parser = positive)]
    pub(crate) max_new_tokens: usize,
    /// Answers generated at once; each takes memory for its keys and values.
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = positive)]
    pub(crate) batch_size: usize,
    /// What the matrices are read in: fewer bits are faster, and move the answers. A copy of them is made beside the weights in f32.
    #[arg(long, default_value = "f32", value_parser = dtype_parser())]
    pub(crate) dtype: Dtype,
    /// Answers that may wait for their turn; a request beyond gets status 503.
    #[arg(long, default_value_t = 256, value_name = "N")]
    pub(crate) queue: usize,
}

/// Merge models of the same shape into one, a part of a tensor at a time.
///
/// linear is the weighted mean, with --q the interpolation of P-SACPO: (1 − q) of the first model and q of the second. slerp
/// goes from the first to the second along an arc. The others add to --base what the models have learnt over it: all of
/// it (task-arithmetic), its largest entries of the elected sign (ties), or random entries, rescaled (dare-linear; with
/// the elected sign: dare-ties).
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    sacpo merge --q 0.5 runs/hh/steps/helpful/checkpoint runs/hh/steps/harmless/checkpoint merged\n  \
    sacpo merge --weight 2 --weight 1 --weight 1 A B C merged\n  \
    sacpo merge --method ties --base models/SmolLM2 --density 0.2 A B merged\n\n\
    Models are folders in Hugging Face's layout, hf://OWNER/NAME, or adapters of one; `sacpo model convert` makes one of a \
    .gguf file. \
    Adapters of one base make an adapter by linear and task-arithmetic, without DoRA, and else a model. Tokenizer and \
    config are those of the base, or of the first model. docs/merging.md has the formulas.")]
pub(crate) struct Merge {
    /// The models, two or more (one or more with a base), then the folder to write.
    #[arg(num_args = 2.., required = true, value_names = ["MODEL", "OUT"])]
    pub(crate) models_and_out: Vec<PathBuf>,
    /// The way to merge.
    #[arg(long, default_value = "linear", value_parser = method_parser())]
    pub(crate) method: Method,
    /// Share of the second of two models, from 0 to 1: linear, slerp.
    #[arg(long, conflicts_with = "weight", allow_negative_numbers = true)]
    pub(crate) q: Option<f64>,
    /// Weight of a model, given once for each in the same order [default: 1 each].
    #[arg(long, allow_negative_numbers = true)]
    pub(crate) weight: Vec<f64>,
    /// Whether weights are divided by their sum [default: true for linear, slerp and ties, else false].
    #[arg(long, value_name = "BOOL")]
    pub(crate) normalise: Option<bool>,
    /// The model that the others were trained from: task-arithmetic, ties, dare-linear, dare-ties.
    #[arg(long, value_name = "MODEL")]
    pub(crate) base: Option<PathBuf>,
    /// Share of what was learnt that is kept, above 0, at most 1: ties, dare-linear, dare-ties.
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    pub(crate) density: Option<f64>,
    /// Allow q outside 0 to 1, or weights below 0, which lead beyond the models: linear, slerp.
    #[arg(long)]
    pub(crate) extrapolate: bool,
    /// Seed of the random choice of dare-linear and dare-ties.
    #[arg(long, default_value_t = 0, value_parser = seed())]
    pub(crate) seed: u64,
}

/// Rate policies from judges' verdicts: win rates, Bradley–Terry and Elo ratings, tails, refusals, the frontier.
///
/// Prints Markdown tables. Intervals are of 95 % and over prompts: verdicts on one prompt, in both orders or repeated, count as
/// depending on each other. Ties count half, and missing verdicts are left out and counted.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    sacpo rate verdicts.jsonl --baseline sft\n  \
    sacpo rate annotations/*.json.gz --json\n  \
    sacpo rate helpfulness.json harmlessness.json --baseline alpaca-7b-reproduced --paper-elo\n  \
    sacpo rate verdicts.jsonl --benign xstest-safe --tail 0.05\n\n\
    A row is one verdict: {\"prompt\":\"q17\",\"category\":\"coding\",\"metric\":\"helpfulness\",\"a\":\"sacpo-0.1\",\"b\":\"sft\",\
    \"outcome\":1.0,\"scores\":[8,6],\"lengths\":[301,250]}, where only prompt, a, b and outcome (1: a is better, 0: b, 0.5: tie, \
    null: missing) are needed, or a `reply` with two scores instead of the outcome. alpaca_eval's annotations, and the results \
    of the SACPO paper's evaluation, are read as they are. docs/ratings.md has the forms and the formulas.")]
pub(crate) struct Rate {
    /// Verdicts: .jsonl, .json or Parquet; a file, a folder or a pattern ('*.json.gz'). Several are rated together.
    #[arg(required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    /// The policy that win rates are against [default: the one that every verdict is about, or else all others].
    #[arg(long, value_name = "POLICY")]
    pub(crate) baseline: Option<String>,
    /// Share of the worst scores whose mean is shown.
    #[arg(long, value_name = "SHARE", default_value_t = 0.1, allow_negative_numbers = true)]
    pub(crate) tail: f64,
    /// A category of benign prompts, on which refusals are over-refusals; may be given several times.
    #[arg(long, value_name = "CATEGORY")]
    pub(crate) benign: Vec<String>,
    /// Calculate Elo ratings as the SACPO paper did: missing verdicts are ties, ten passes from 1200, scaled to 1000.
    #[arg(long)]
    pub(crate) paper_elo: bool,
    /// Seed of the bootstrap and of the orders of Elo.
    #[arg(long, default_value_t = 0, value_parser = seed())]
    pub(crate) seed: u64,
}

/// Write the report of a run: one HTML page that opens anywhere and needs nothing else.
///
/// It shows the frontier, the constraint and its certificate, ratings, answers side by side with verdicts, training curves,
/// provenance and cost, as far as the run has them, and says what is missing. `sacpo run` and `sacpo quickstart` write it as
/// OUT/report.html.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    sacpo report runs/quickstart\n  \
    sacpo report runs/hh --answers gpt-4=gpt4.json --verdicts harmlessness.jsonl --out hh.html\n\n  \
    Answers and verdicts without a run:\n  \
    sacpo report --answers base.json --answers safe=sacpo.json --verdicts harmlessness.jsonl --out report.html\n\n\
    docs/report.md describes the page.")]
pub(crate) struct Report {
    /// Folder of a run.
    #[arg(value_name = "RUN", required_unless_present_any = ["answers", "verdicts"])]
    pub(crate) run: Option<PathBuf>,
    /// File to write [default: RUN/report.html].
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// Other answers, in the forms that `sacpo judge` reads; may be given several times.
    #[arg(long, value_name = "[NAME=]FILE")]
    pub(crate) answers: Vec<String>,
    /// Other verdicts, in the forms that `sacpo rate` reads; may be given several times.
    #[arg(long, value_name = "FILE")]
    pub(crate) verdicts: Vec<PathBuf>,
}

/// Solve a finite problem exactly: the best reward for its KL divergence, subject to safety.
///
/// Finds the multipliers λ and the policy that maximise E[r] − β KL(policy ‖ ref) with every E[g] at or above its
/// threshold, and compares the policy with the one that alignment step by step ends at, in any order of steps.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  sacpo tabular docs/examples/two-prompts.json --json\n\n\
    The file holds one JSON object:\n  \
    ref             [[…], …]         probabilities of the answers to each prompt; 0: impossible\n  \
    reward          [[…], …]         r of the same answers\n  \
    safety          [[[…], …], …]    g of the same answers, one table per constraint\n  \
    prompt_weights  […]              relative frequency of each prompt [default: all the same]\n  \
    beta            0.1              weight of the KL divergence\n  \
    thresholds      […]              the least E[g] of each constraint")]
pub(crate) struct Tabular {
    /// The problem, a .json file.
    #[arg(value_name = "PROBLEM")]
    pub(crate) problem: PathBuf,
}

fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".into()),
        Ok(n) => Ok(n),
        Err(_) => Err("must be a whole number of at least 1".into()),
    }
}

/// A seed that a recipe can hold too: TOML's integers have a sign.
fn seed() -> impl TypedValueParser<Value = u64> {
    clap::value_parser!(u64).range(..=i64::MAX as u64)
}

fn finite(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|value: &f64| value.is_finite()).ok_or_else(|| "must be a number, such as 0.2".into())
}

fn temperature(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(value) if f64::is_finite(value) && value > 0.0 => Ok(value),
        _ => Err("must be a number greater than 0, such as 0.1".into()),
    }
}

fn method_parser() -> impl TypedValueParser<Value = Method> {
    PossibleValuesParser::new(Method::ALL.map(Method::name))
        .map(|name| Method::ALL.into_iter().find(|method| method.name() == name).unwrap_or(Method::Linear))
}

fn format_parser() -> impl TypedValueParser<Value = Format> {
    PossibleValuesParser::new(Format::ALL.map(Format::name))
        .map(|name| Format::ALL.into_iter().find(|f| f.name() == name).unwrap_or(Format::Trl))
}

fn dtype_parser() -> impl TypedValueParser<Value = Dtype> {
    PossibleValuesParser::new(Dtype::ALL.map(Dtype::name))
        .map(|name| Dtype::ALL.into_iter().find(|dtype| dtype.name() == name).unwrap_or_default())
}

fn template_tail_parser() -> impl TypedValueParser<Value = TemplateTail> {
    PossibleValuesParser::new(["drop", "keep"])
        .map(|name| if name == "keep" { TemplateTail::Keep } else { TemplateTail::Drop })
}
