//! Training and validation rows.

use engine::chat::Message;

use super::schema::transcript;
use super::{LabelledExample, PreferencePair, Prompt};

/// A row that answers a prompt.
pub trait Answered {
    /// What is answered.
    fn prompt(&self) -> &Prompt;
}

impl Answered for PreferencePair {
    fn prompt(&self) -> &Prompt {
        &self.prompt
    }
}

impl Answered for LabelledExample {
    fn prompt(&self) -> &Prompt {
        &self.prompt
    }
}

/// Splits rows into training and validation rows, each in the order given.
///
/// Rows whose conversations open with the same human turn go to the same side, so that no opening
/// is seen in training and again in validation. A hash of that turn and `seed` decides, so the side of
/// a row depends neither on its position nor on the other rows. `validation_fraction` is the
/// probability (0 ≤ fraction < 1) that a turn is held out; the share of rows is near it.
pub fn split<T: Answered>(rows: Vec<T>, validation_fraction: f64, seed: u64) -> (Vec<T>, Vec<T>) {
    let draw = |row: &T| {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes()).update(first_turn(row.prompt()).as_bytes());
        uniform(&hasher)
    };
    rows.into_iter().partition(|row| draw(row) >= validation_fraction)
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
