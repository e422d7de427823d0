//! The command line of `sacpo model`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::seed;

#[derive(Debug, Subcommand)]
pub(crate) enum ModelCommand {
    /// Describe a model without loading its weights.
    Inspect {
        /// Folder in Hugging Face's layout, .gguf file, or hf://OWNER/NAME.
        model: PathBuf,
    },
    /// Write a model as a folder in Hugging Face's layout, with f32 weights.
    #[command(after_help = "Example:\n  sacpo model convert models/SmolLM2.gguf models/SmolLM2")]
    Convert {
        /// Folder in Hugging Face's layout, .gguf file, or hf://OWNER/NAME.
        from: PathBuf,
        /// Folder to write.
        to: PathBuf,
    },
    /// Give a model the chat template of a plain text, as a chat_template.jinja in its folder.
    #[command(after_help = "Example:\n  sacpo model set-template models/alpaca-7b-reproduced \\\n    \
        'BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:'")]
    SetTemplate {
        /// Folder in Hugging Face's layout.
        model: PathBuf,
        /// The text, with {prompt} where the user's message stands. The answer follows it, and EOS.
        text: String,
    },
    AddAdapter(AddAdapter),
    /// Write the model that an adapter makes of its base, as a folder in Hugging Face's layout.
    #[command(after_help = "Example:\n  sacpo model fold-adapter models/SmolLM2 adapters/helpful models/helpful")]
    FoldAdapter {
        /// The base: folder in Hugging Face's layout, .gguf file, or hf://OWNER/NAME.
        model: PathBuf,
        /// Folder in PEFT's layout, or hf://OWNER/NAME.
        adapter: PathBuf,
        /// Folder to write.
        to: PathBuf,
    },
    /// Write one adapter that does what several adapters of one base do together.
    ///
    /// The ranks add up. Adapters with DoRA cannot be stacked, only folded.
    #[command(after_help = "Example:\n  \
        sacpo model stack-adapters models/SmolLM2 adapters/helpful adapters/harmless adapters/both")]
    StackAdapters {
        /// The base: folder in Hugging Face's layout, .gguf file, or hf://OWNER/NAME.
        model: PathBuf,
        /// Folders in PEFT's layout, or hf://OWNER/NAME.
        #[arg(num_args = 2.., required = true)]
        adapters: Vec<PathBuf>,
        /// Folder to write.
        to: PathBuf,
    },
}

/// Write a fresh low-rank adapter for a model (LoRA), as a folder in PEFT's layout; it changes nothing yet.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    sacpo model add-adapter models/SmolLM2 adapters/fresh --rank 16 --alpha 32\n  \
    sacpo model add-adapter models/SmolLM2 adapters/fresh --targets q_proj,v_proj --rank-stabilized")]
pub(crate) struct AddAdapter {
    /// The base: folder in Hugging Face's layout, .gguf file, or hf://OWNER/NAME.
    pub(crate) model: PathBuf,
    /// Folder to write.
    pub(crate) to: PathBuf,
    /// Rank of the update of each matrix.
    #[arg(long, default_value_t = 16, value_name = "N")]
    pub(crate) rank: usize,
    /// The update is scaled by alpha/rank.
    #[arg(long, default_value_t = 32.0, allow_negative_numbers = true)]
    pub(crate) alpha: f64,
    /// Probability that an input of the adapter is dropped in training.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    pub(crate) dropout: f64,
    /// Names of the adapted matrices, such as q_proj,v_proj; or all.
    #[arg(long, default_value = "all", value_name = "NAMES")]
    pub(crate) targets: String,
    /// Scale by alpha/√rank instead (rsLoRA).
    #[arg(long)]
    pub(crate) rank_stabilized: bool,
    /// Learn the lengths of the matrices' rows by themselves (DoRA).
    #[arg(long)]
    pub(crate) dora: bool,
    /// Seed of the first values.
    #[arg(long, default_value_t = 0, value_parser = seed())]
    pub(crate) seed: u64,
}
