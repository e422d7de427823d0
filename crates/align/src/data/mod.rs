//! Preference data: from a file to tokens.
//!
//! ```text
//! files ──source──► rows ──schema──► PreferencePair ──split──► training, validation ──render──► TokenizedPair
//!                                    LabelledExample                                           TokenizedExample
//! └───────────────────────────────────── prepare, a block at a time ───────────────────────────────────► tokens on disk
//! files ◄──write─── rows ◄──layout── Prompt
//! ```
//!
//! `docs/data.md` describes the formats and the rules for users.

mod convert;
mod dataset;
mod layout;
mod prepare;
mod read;
mod relabel;
mod render;
mod schema;
mod source;
mod split;
mod statistics;
mod tokens;
mod write;

use engine::chat::Message;
use serde_json::{Map, Value};

pub use convert::{Conversion, Converted};
pub use dataset::Dataset;
pub use layout::Target;
pub use prepare::{Keep, Preparation, Prepared, Progress, Report};
pub use read::{Source, category_of, read_categorised_prompts, read_examples, read_pairs, read_prompts, read_records};
pub use relabel::{margins, relabel, set_margins};
pub use render::{
    LongPrompts, RenderOptions, TemplateTail, Tokenized, TokenizedExample, TokenizedPair, tokenize_examples,
    tokenize_messages, tokenize_pairs, tokenize_prompt,
};
pub use schema::Format;
pub use source::{Places, Shard, choose, files, is_about_data, patterns_of_splits, shard};
pub use split::{Answered, HeldOut, is_held_out};
pub use statistics::{ExampleCounts, Lengths, PairCounts, RowCounts, disagreement};
pub use tokens::Tokens;

/// What a response answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// Plain text that the response continues as it stands; no chat template is applied.
    Text(String),
    /// A conversation, at least one message, that the model's chat template renders.
    Chat(Vec<Message>),
}

impl Prompt {
    /// The prompt as a text to read: of a conversation that is one message of the user's, with a system message or without, that
    /// message, and of a longer one all turns, each below who speaks.
    pub fn text(&self) -> String {
        let messages = match self {
            Self::Text(text) => return text.clone(),
            Self::Chat(messages) => messages.iter().filter(|message| message.role != "system").collect::<Vec<_>>(),
        };
        match messages[..] {
            [message] => message.content.clone(),
            _ => messages.iter().map(|m| format!("{}:\n{}", m.role, m.content)).collect::<Vec<_>>().join("\n\n"),
        }
    }
}

/// A prompt and what kind of prompt it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CategorisedPrompt {
    /// The prompt.
    pub prompt: Prompt,
    /// Its kind, where the row names one.
    pub category: Option<String>,
}

/// Two responses to one prompt and which of them is preferred.
///
/// Neither response is blank, and the two differ.
#[derive(Debug, Clone, PartialEq)]
pub struct PreferencePair {
    /// What both responses answer.
    pub prompt: Prompt,
    /// The preferred response.
    pub chosen: String,
    /// The other response.
    pub rejected: String,
    /// Whether the chosen and the rejected response are unsafe, where the row says so.
    pub is_unsafe: Option<[bool; 2]>,
    /// Σ_j w_j (m_j(chosen) − m_j(rejected)) of other metrics, where the row has it.
    pub margin: Option<f64>,
    /// The 1-based line of the file, or row where it is a JSON array or Parquet; of several files, after those of the files
    /// before. [`Places::of`] says which file and line that is.
    pub row: usize,
}

/// A row of a file, whatever its columns mean.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// The values by their column.
    pub columns: Map<String, Value>,
    /// The 1-based number of the row in the data set, as in [`PreferencePair::row`].
    pub row: usize,
    /// Row and file, for messages: "Line 3 of logps.jsonl".
    pub place: String,
}

/// One response to a prompt, desirable or not. The response is not blank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelledExample {
    /// What the response answers.
    pub prompt: Prompt,
    /// The response.
    pub completion: String,
    /// Whether it is a response to learn from, instead of one to avoid.
    pub desirable: bool,
    /// The 1-based number of the row in the data set, as in [`PreferencePair::row`].
    pub row: usize,
}

/// The rows of a file, or of several, as pairs or as labelled examples, in their order.
#[derive(Debug, Clone, PartialEq)]
pub struct DataFile<T> {
    /// Where the rows stand.
    pub places: Places,
    /// The schema of the rows, found or given.
    pub format: Format,
    /// What the usable rows hold, at least one.
    pub rows: Vec<T>,
    /// How many bad rows were left out.
    pub skipped: usize,
    /// What is wrong with the first row that was left out, as a sentence that names it.
    pub first_skipped: Option<String>,
}
