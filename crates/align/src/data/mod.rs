//! Preference pairs: from a file to tokens.
//!
//! ```text
//! file ──read──► rows ──schema──► PreferencePair ──split──► training, validation ──render──► TokenizedPair
//! ```
//!
//! `docs/data.md` describes the formats and the rules for users.

mod read;
mod render;
mod schema;
mod split;

use std::path::PathBuf;

use engine::chat::Message;
use serde_json::{Map, Value};

pub use read::{read_pairs, read_prompts, read_records};
pub use render::{LongPrompts, RenderOptions, TemplateTail, Tokenized, TokenizedPair, tokenize_pairs, tokenize_prompt};
pub use schema::Format;
pub use split::split;

/// What a response answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// Plain text that the response continues as it stands; no chat template is applied.
    Text(String),
    /// A conversation, at least one message, that the model's chat template renders.
    Chat(Vec<Message>),
}

/// Two responses to one prompt and which of them is preferred.
///
/// Neither response is blank, and the two differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreferencePair {
    /// What both responses answer.
    pub prompt: Prompt,
    /// The preferred response.
    pub chosen: String,
    /// The other response.
    pub rejected: String,
    /// The 1-based line of the file, or the 1-based element where the file is one JSON array.
    pub row: usize,
}

/// A row of a file, whatever its columns mean.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// The values by their column.
    pub columns: Map<String, Value>,
    /// The 1-based line of the file, or the 1-based element where the file is one JSON array.
    pub row: usize,
    /// Row and file, for messages: "Line 3 of logps.jsonl".
    pub place: String,
}

/// The preference pairs of a file, in its order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairFile {
    /// The file.
    pub path: PathBuf,
    /// The schema of its rows, found or given.
    pub format: Format,
    /// The pairs, at least one.
    pub pairs: Vec<PreferencePair>,
    /// How many bad rows were left out.
    pub skipped: usize,
    /// What is wrong with the first row that was left out, as a sentence that names it.
    pub first_skipped: Option<String>,
}
