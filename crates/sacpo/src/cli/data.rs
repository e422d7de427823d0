//! The command line of `sacpo data`.

use std::path::PathBuf;

use align::data::{Format, Target, TemplateTail};
use align::objective;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Subcommand};

use super::{format_parser, positive, template_tail_parser};

#[derive(Debug, Subcommand)]
pub(crate) enum DataCommand {
    Convert(ConvertData),
    Inspect(InspectData),
    /// Count what a file of preference data holds: labels, repetitions, contradictions, lengths.
    ///
    /// Bad rows are left out and counted.
    #[command(after_help = "Examples:\n  sacpo data stats pairs.jsonl\n  \
        sacpo data stats pku.jsonl.gz --metric harmlessness --model models/SmolLM2\n  \
        sacpo data stats 'hf://datasets/HuggingFaceH4/ultrafeedback_binarized/data/train_prefs-*'\n\n\
        docs/data.md says how addresses on the Hugging Face Hub (hf://) are written and which variables it heeds.")]
    Stats {
        #[command(flatten)]
        source: DataSource,
        /// Count lengths in this model's tokens, prompts in its chat template, instead of characters.
        #[arg(long, value_name = "MODEL")]
        model: Option<PathBuf>,
    },
}

/// Write preference data in another format, or into another kind of file.
///
/// Texts stay as they are: a conversation never becomes plain text, nor plain text a conversation. From pairs can be made
/// labelled responses (unpaired), demonstrations (sft: the preferred responses) and lists of prompts (each once); from single
/// responses no pairs, and from responses without labels none with.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    sacpo data convert helpful-base/train.jsonl.gz helpful.parquet --skip-bad-rows\n  \
    sacpo data convert pku.jsonl.gz safe.jsonl --metric harmlessness\n  \
    sacpo data convert 'ultrafeedback/train_prefs-*.parquet' prompts.jsonl.zst --to prompts\n\n\
    trl, pku, hh, unpaired and sft are the formats of docs/data.md. What has no place in the new one, such as other columns \
    and PKU-SafeRLHF's other label, is left out and named.")]
pub(crate) struct ConvertData {
    /// Preference data or prompts: .jsonl, .json or Parquet, prompts .txt or .csv too; a file, a folder or a pattern.
    pub(crate) from: PathBuf,
    /// File to write: .jsonl or .json, perhaps with .gz or .zst behind, or .parquet.
    pub(crate) out: PathBuf,
    /// What the rows are written as [default: pairs as trl, others as what they are].
    #[arg(long, value_name = "FORMAT", value_parser = target_parser())]
    pub(crate) to: Option<Target>,
    /// Schema of the data [default: found from the first row].
    #[arg(long, value_parser = format_parser())]
    pub(crate) format: Option<Format>,
    /// Which preference to read from files that hold several, and to label in pku.
    #[arg(long, default_value = "helpfulness")]
    pub(crate) metric: String,
    /// Leave out and count rows that cannot be read, or that the new format cannot hold.
    #[arg(long)]
    pub(crate) skip_bad_rows: bool,
}

/// Show rows as the model sees them in training: the text of its tokens, prompts in its chat template.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  sacpo data inspect pairs.jsonl --model models/SmolLM2 --from 120 --rows 1")]
pub(crate) struct InspectData {
    #[command(flatten)]
    pub(crate) source: DataSource,
    /// Folder in Hugging Face's layout, .gguf file, or hf://OWNER/NAME, whose tokenizer and template are used.
    #[arg(long, value_name = "MODEL")]
    pub(crate) model: PathBuf,
    /// The first row to show, counted from 1 as in messages.
    #[arg(long, value_name = "ROW", default_value_t = 1, value_parser = positive)]
    pub(crate) from: usize,
    /// The number of rows to show.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = positive)]
    pub(crate) rows: usize,
    /// Longest prompt and response together, in tokens [default: no limit].
    #[arg(long, value_name = "TOKENS", value_parser = positive)]
    pub(crate) max_length: Option<usize>,
    /// Whether what the template writes after the end of a response is scored.
    #[arg(long, default_value = "drop", value_parser = template_tail_parser())]
    pub(crate) template_tail: TemplateTail,
}

/// A file of preference data and how to read it.
#[derive(Debug, Args)]
pub(crate) struct DataSource {
    /// Preference pairs or single responses: .jsonl, .json or Parquet; a file, a folder, a pattern ('train-*.parquet'), or
    /// hf://datasets/OWNER/NAME/PATH.
    pub(crate) file: PathBuf,
    /// Read the file as this objective would: `kto`, `bco` and `sft` take single responses, all others pairs.
    #[arg(long, default_value = "dpo", value_parser = PossibleValuesParser::new(objective::NAMES))]
    pub(crate) objective: String,
    /// Which preference to read from files that hold several.
    #[arg(long, default_value = "helpfulness")]
    pub(crate) metric: String,
    /// Schema of the file [default: found from its first row].
    #[arg(long, value_parser = format_parser())]
    pub(crate) format: Option<Format>,
}

fn target_parser() -> impl TypedValueParser<Value = Target> {
    PossibleValuesParser::new(Target::ALL.map(Target::name))
        .map(|name| Target::ALL.into_iter().find(|target| target.name() == name).unwrap_or(Target::Trl))
}
