//! Training and validation rows, and rows that are neither.

use std::collections::HashSet;

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

/// Leaves out the rows whose conversations open with the same human turn as one of `prompts`, such as those of an evaluation,
/// and says how many; case and white space do not count.
pub fn without_prompts<T: Answered>(rows: Vec<T>, prompts: &[Prompt]) -> (Vec<T>, usize) {
    let plain =
        |prompt: &Prompt| first_turn(prompt).split_whitespace().map(str::to_lowercase).collect::<Vec<_>>().join(" ");
    let excluded: HashSet<String> = prompts.iter().map(plain).collect();
    let before = rows.len();
    let rows: Vec<T> = rows.into_iter().filter(|row| !excluded.contains(&plain(row.prompt()))).collect();
    let left_out = before - rows.len();
    (rows, left_out)
}

/// Leaves out the rows that say the same as one before them, and says how many.
pub fn without_repetitions<T: Answered>(mut rows: Vec<T>) -> (Vec<T>, usize) {
    let mut seen = HashSet::new();
    let mut is_new =
        rows.iter().map(|row| seen.insert((turns(row.prompt()), row.responses()))).collect::<Vec<_>>().into_iter();
    let before = rows.len();
    rows.retain(|_| is_new.next() == Some(true));
    let left_out = before - rows.len();
    (rows, left_out)
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
