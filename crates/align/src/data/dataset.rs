//! The tokens that a step trains on.

use super::{TokenizedExample, TokenizedPair};
use crate::sequences::Sequences;

/// Tokenised rows: pairs for objectives that compare two responses, labelled responses for those that do not.
#[derive(Debug, Clone, PartialEq)]
pub enum Dataset {
    /// Preference pairs.
    Pairs(Vec<TokenizedPair>),
    /// Responses that are desirable or not.
    Examples(Vec<TokenizedExample>),
}

impl Dataset {
    /// Number of pairs or labelled responses.
    pub fn len(&self) -> usize {
        match self {
            Self::Pairs(pairs) => pairs.len(),
            Self::Examples(examples) => examples.len(),
        }
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What its rows are, for messages.
    pub fn unit(&self) -> &'static str {
        match self {
            Self::Pairs(_) => "pairs",
            Self::Examples(_) => "labelled responses",
        }
    }

    /// The prompts and responses, in order.
    pub fn sequences(&self) -> Vec<Sequences<'_>> {
        match self {
            Self::Pairs(pairs) => pairs.iter().map(TokenizedPair::sequences).collect(),
            Self::Examples(examples) => examples.iter().map(TokenizedExample::sequences).collect(),
        }
    }

    /// A hash of every token and label, in order: 64 hexadecimal digits.
    pub fn fingerprint(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        self.sequences().iter().for_each(|sequences| sequences.hash_into(&mut hasher));
        match self {
            Self::Pairs(pairs) => pairs.iter().for_each(|pair| {
                hasher.update(format!("{:?} {:?}", pair.is_unsafe, pair.margin).as_bytes());
            }),
            Self::Examples(examples) => examples.iter().for_each(|example| {
                hasher.update(&[u8::from(example.desirable)]);
            }),
        }
        hasher.finalize().to_hex().to_string()
    }
}

impl TokenizedPair {
    /// The prompt with the chosen and the rejected response.
    pub fn sequences(&self) -> Sequences<'_> {
        Sequences { prompt: &self.prompt, responses: vec![&self.chosen, &self.rejected], row: self.row }
    }
}

impl TokenizedExample {
    /// The prompt with the response.
    pub fn sequences(&self) -> Sequences<'_> {
        Sequences { prompt: &self.prompt, responses: vec![&self.response], row: self.row }
    }
}
