//! Training and validation rows, and rows that are neither.

use std::collections::HashSet;
use std::path::Path;

use engine::chat::Message;

use super::schema::transcript;
use super::{LabelledExample, PreferencePair, Prompt};

/// A row that answers a prompt.
pub trait Answered {
    /// What is answered.
    fn prompt(&self) -> &Prompt;

    /// The responses, each with whether it is preferred or desirable.
    fn responses(&self) -> Vec<(&str, bool)>;
}

impl Answered for PreferencePair {
    fn prompt(&self) -> &Prompt {
        &self.prompt
    }

    fn responses(&self) -> Vec<(&str, bool)> {
        vec![(&self.chosen, true), (&self.rejected, false)]
    }
}

impl Answered for LabelledExample {
    fn prompt(&self) -> &Prompt {
        &self.prompt
    }

    fn responses(&self) -> Vec<(&str, bool)> {
        vec![(&self.completion, self.desirable)]
    }
}

/// Whether a row is held out from training.
///
/// Rows whose conversations open with the same human turn are treated alike, so that no opening is seen in training and again
/// in validation. A hash of that turn and `seed` decides, so the side of a row depends neither on its position nor on the
/// other rows. `fraction` is the probability (0 ≤ fraction < 1) that a turn is held out; the share of rows is near it.
pub fn is_held_out(row: &impl Answered, fraction: f64, seed: u64) -> bool {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).update(first_turn(row.prompt()).as_bytes());
    uniform(&hasher) < fraction
}

/// Which rows are held out from training.
#[derive(Debug, Clone, Copy)]
pub enum HeldOut<'a> {
    /// This share of the openings of conversations, drawn by a hash of opening and seed: see [`is_held_out`].
    Share {
        /// 0 ≤ fraction < 1.
        fraction: f64,
        /// Another seed, another share.
        seed: u64,
    },
    /// All rows of other files, read alike. Rows to train on whose conversations open as one of theirs are left out.
    Path(&'a Path),
}

/// What becomes of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Taken {
        held_out: bool,
    },
    /// Its conversation opens with a human turn that is excluded, or held out.
    Excluded,
    /// It says the same as a row before it.
    Repeated,
}

/// Decides what becomes of rows, one by one. It remembers hashes of 16 bytes, not texts.
pub(super) struct Sieve {
    excluded: HashSet<Key>,
    /// The openings of rows from a source of their own, which is held out.
    held_out: HashSet<Key>,
    /// The rows so far, if repetitions are to be found.
    seen: Option<HashSet<Key>>,
}

/// The start of a hash: of 10¹² texts, two have the same with a probability below 10⁻¹⁴.
type Key = [u8; 16];

impl Sieve {
    /// `deduplicate`: rows that say the same as one before them are left out.
    pub(super) fn new(deduplicate: bool) -> Self {
        Self { excluded: HashSet::new(), held_out: HashSet::new(), seen: deduplicate.then(HashSet::new) }
    }

    /// Lets no row pass whose conversation opens with the same human turn as a prompt, such as one of an evaluation; case and
    /// white space do not count.
    pub(super) fn exclude(&mut self, prompt: &Prompt) {
        self.excluded.insert(opening(prompt));
    }

    /// What becomes of the next row. `side` says whether all rows of its source are held out, or none; rows of a source that
    /// is held out come first.
    pub(super) fn fate(&mut self, row: &impl Answered, side: Option<bool>, rule: &HeldOut<'_>) -> Fate {
        let apart = side == Some(false) && !self.held_out.is_empty();
        if apart || !self.excluded.is_empty() {
            let key = opening(row.prompt());
            if self.excluded.contains(&key) || (apart && self.held_out.contains(&key)) {
                return Fate::Excluded;
            }
        }
        if self.seen.as_mut().is_some_and(|seen| !seen.insert(content(row))) {
            return Fate::Repeated;
        }
        if side == Some(true) {
            self.held_out.insert(opening(row.prompt()));
        }
        let drawn = || match rule {
            HeldOut::Share { fraction, seed } => is_held_out(row, *fraction, *seed),
            HeldOut::Path(_) => false,
        };
        Fate::Taken { held_out: side.unwrap_or_else(drawn) }
    }
}

/// Stands for the first human turn, but for case and white space.
fn opening(prompt: &Prompt) -> Key {
    let turn = first_turn(prompt);
    let mut hasher = blake3::Hasher::new();
    for word in turn.split_whitespace() {
        hasher.update(word.to_lowercase().as_bytes()).update(b" ");
    }
    key(&hasher)
}

/// Stands for all that a row says.
fn content(row: &impl Answered) -> Key {
    let mut hasher = blake3::Hasher::new();
    let mut add = |text: &str| {
        hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
    };
    for [role, content] in turns(row.prompt()) {
        add(role);
        add(content);
    }
    for (response, preferred) in row.responses() {
        add(response);
        add(if preferred { "preferred" } else { "" });
    }
    key(&hasher)
}

fn key(hasher: &blake3::Hasher) -> Key {
    let mut key = Key::default();
    hasher.finalize_xof().fill(&mut key);
    key
}

/// Role and content of every message; a plain text has no role.
pub(super) fn turns(prompt: &Prompt) -> Vec<[&str; 2]> {
    match prompt {
        Prompt::Text(text) => vec![["", text]],
        Prompt::Chat(messages) => messages.iter().map(|Message { role, content }| [&**role, &**content]).collect(),
    }
}

/// What the human says first, or the whole text of a prompt that is no transcript.
fn first_turn(prompt: &Prompt) -> String {
    let turns = match prompt {
        Prompt::Text(text) => {
            &transcript(text).unwrap_or_else(|_| vec![Message { role: "user".into(), content: text.clone() }])
        }
        Prompt::Chat(messages) => messages,
    };
    let turn = turns.iter().find(|turn| turn.role == "user").or(turns.first());
    turn.map(|turn| turn.content.trim().to_owned()).unwrap_or_default()
}

/// A number in [0, 1) that is fixed by what was hashed.
pub(super) fn uniform(hasher: &blake3::Hasher) -> f64 {
    let mut word = [0; 8];
    hasher.finalize_xof().fill(&mut word);
    // The upper 53 bits, all that an f64 holds.
    (u64::from_le_bytes(word) >> 11) as f64 / (1u64 << 53) as f64
}
