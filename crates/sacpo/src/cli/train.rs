//! `sacpo train`: a policy, or by `sacpo train reward` and `sacpo train cost` a model that scores responses.

use std::path::PathBuf;

use align::data::Format;
use align::objective::ScoreLoss;
use clap::{ArgMatches, Args, Command, FromArgMatches};

use super::{Train, format_parser, seed};

/// What is trained.
#[derive(Debug)]
pub(crate) enum TrainCommand {
    Policy(Box<Train>),
    Scorer(ScoreLoss, Box<TrainScorer>),
}

const REWARD: &str = "Train a reward model: a decoder with a score head, on preference pairs (Bradley–Terry)";
const REWARD_EXAMPLES: &str = "Examples:\n  \
    sacpo train reward --model models/SmolLM2 --data helpful.jsonl.gz --metric helpfulness --out runs/reward\n  \
    sacpo train reward --model models/SmolLM2 --data 'pku/train-*.parquet' --metric helpfulness \\\n    \
    --set train.lora_rank=16 --set train.learning_rate=2e-4 --set data.max_length=256 --out runs/reward\n  \
    sacpo judge a.json b.json --reward-model runs/reward/checkpoint --metric helpfulness --out verdicts.jsonl\n\n\
    OUT/checkpoint is a Hugging Face folder of a sequence classification with one label. A training that was stopped \
    continues where it was when the same command is given again. docs/reward-models.md has the formulas.";

const COST: &str = "Train a cost model: a score above 0 for unsafe responses (Safe RLHF, arXiv 2310.12773)";
const COST_EXAMPLES: &str = "Examples:\n  \
    sacpo train cost --model models/SmolLM2 --data pku-saferlhf.jsonl.gz --metric harmlessness --out runs/cost\n  \
    sacpo judge a.json b.json --cost-model runs/cost/checkpoint --metric harmlessness --out verdicts.jsonl\n\n\
    Every row must say which responses are unsafe: PKU-SafeRLHF's columns is_response_0_safe and is_response_1_safe, or \
    safe_chosen and safe_rejected. The chosen response is the less harmful one. OUT/checkpoint is a Hugging Face folder of a \
    sequence classification with one label. A training that was stopped continues where it was when the same command is \
    given again. docs/reward-models.md has the formulas.";

/// A reward or cost model to train.
#[derive(Debug, Args)]
pub(crate) struct TrainScorer {
    /// Folder in Hugging Face's layout, .gguf file, or hf://OWNER/NAME: a language model, whose head is replaced.
    #[arg(long, value_name = "MODEL")]
    pub(crate) model: PathBuf,
    /// Preference pairs: .jsonl, .json or Parquet; a file, a folder, a pattern ('train-*.parquet'), or
    /// hf://datasets/OWNER/NAME/PATH.
    #[arg(long, value_name = "FILE")]
    pub(crate) data: PathBuf,
    /// What is held out, instead of a share of the data.
    #[arg(long, value_name = "FILE")]
    pub(crate) validation_data: Option<PathBuf>,
    /// What the preferences are about, such as helpfulness or harmlessness.
    #[arg(long)]
    pub(crate) metric: String,
    /// Schema of the files [default: found from their first rows].
    #[arg(long, value_parser = format_parser())]
    pub(crate) format: Option<Format>,
    /// Folder for everything that is made.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) out: PathBuf,
    /// Seed of all randomness.
    #[arg(long, default_value_t = 0, value_parser = seed())]
    pub(crate) seed: u64,
    /// Set a key of a recipe's [data], [train] or [run], such as train.learning_rate=1e-6 or data.max_length=256.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
}

// By hand, since `sacpo train` has required options of its own, which its subcommands do not have.
impl Args for TrainCommand {
    fn augment_args(command: Command) -> Command {
        let scorer = |loss: ScoreLoss, about: &'static str, examples: &'static str| {
            TrainScorer::augment_args(Command::new(loss.name())).about(about).after_help(examples)
        };
        Train::augment_args(command)
            .subcommand(scorer(ScoreLoss::Reward, REWARD, REWARD_EXAMPLES))
            .subcommand(scorer(ScoreLoss::Cost, COST, COST_EXAMPLES))
            .subcommand_negates_reqs(true)
            .args_conflicts_with_subcommands(true)
            .disable_help_subcommand(true)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for TrainCommand {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let loss = [ScoreLoss::Reward, ScoreLoss::Cost];
        match matches.subcommand() {
            Some((name, matches)) => {
                let loss = loss.into_iter().find(|loss| loss.name() == name).unwrap_or(ScoreLoss::Reward);
                Ok(Self::Scorer(loss, Box::new(TrainScorer::from_arg_matches(matches)?)))
            }
            None => Ok(Self::Policy(Box::new(Train::from_arg_matches(matches)?))),
        }
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
