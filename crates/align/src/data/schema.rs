//! What the columns of a row mean.

use std::fmt::Display;
use std::path::Path;
use std::str::FromStr;

use engine::chat::Message;
use engine::{Error, Result};
use serde::Serialize;
use serde_json::{Map, Value};

use super::Prompt;

type Columns = Map<String, Value>;
type RowResult<T> = std::result::Result<T, BadRow>;
/// Prompt, chosen response, rejected response.
type Answers = (Prompt, String, String);

/// The schema of a file of preference pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// `prompt`, `chosen`, `rejected`, or `chosen` and `rejected` with an implicit prompt, as TRL reads them.
    Trl,
    /// PKU-SafeRLHF: `prompt`, `response_0`, `response_1`, `better_response_id`, `safer_response_id`.
    Pku,
    /// hh-rlhf: `chosen` and `rejected` are transcripts that share all but their last turn.
    Hh,
}

impl Format {
    const ALL: [Self; 3] = [Self::Trl, Self::Pku, Self::Hh];

    /// The name in recipes and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Trl => "trl",
            Self::Pku => "pku",
            Self::Hh => "hh",
        }
    }

    fn of_row(row: &Columns) -> Option<Self> {
        let has = |column| row.contains_key(column);
        if has("response_0") && has("response_1") {
            Some(Self::Pku)
        } else if !has("chosen") || !has("rejected") {
            None
        } else if !has("prompt") && row["chosen"].is_string() {
            Some(Self::Hh)
        } else {
            Some(Self::Trl)
        }
    }
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name).ok_or_else(|| {
            let names = list(Self::ALL.iter().map(|format| format.name()));
            Error::input(format!("There is no data format `{name}`. Use one of {names}, or leave it out."))
        })
    }
}

/// Why a row is no usable pair.
pub(super) struct BadRow {
    column: Option<&'static str>,
    /// A sentence that starts with a lower-case letter.
    problem: String,
}

impl BadRow {
    /// A problem of the row as a whole.
    pub(super) fn whole(problem: impl Into<String>) -> Self {
        Self { column: None, problem: problem.into() }
    }

    fn at(column: &'static str, problem: impl Into<String>) -> Self {
        Self { column: Some(column), problem: problem.into() }
    }

    /// A sentence that names file, row and column.
    pub(super) fn describe(&self, path: &Path, unit: &str, number: usize) -> String {
        let column = self.column.map(|column| format!(", column `{column}`")).unwrap_or_default();
        format!("{unit} {number} of {}{column}: {}", path.display(), self.problem)
    }
}

/// How the rows of one file are read.
#[derive(Clone, Copy)]
pub(super) enum Schema {
    Trl,
    Pku { label: &'static str },
    Hh,
}

impl Schema {
    /// The schema of a file, from its first row and what the user asked for.
    pub(super) fn find(first: &Columns, path: &Path, format: Option<Format>, metric: &str) -> Result<Self> {
        let columns = || list(first.keys());
        let format = format.or_else(|| Format::of_row(first)).ok_or_else(|| {
            Error::input(format!(
                "The rows of {} are no preference pairs: the columns are {}. Expected are `prompt`, `chosen`, `rejected` \
                 (TRL), `chosen`, `rejected` (hh-rlhf transcripts or message lists), or `prompt`, `response_0`, \
                 `response_1` with `better_response_id` or `safer_response_id` (PKU-SafeRLHF).",
                path.display(),
                columns()
            ))
        })?;
        match format {
            Format::Trl => Ok(Self::Trl),
            Format::Hh => Ok(Self::Hh),
            Format::Pku => {
                let label = match metric {
                    "helpfulness" => "better_response_id",
                    "harmlessness" | "safety" => "safer_response_id",
                    _ => {
                        return Err(Error::input(format!(
                            "The rows of {} have no label for the metric `{metric}`. Use `helpfulness` \
                             (column `better_response_id`) or `harmlessness` (column `safer_response_id`).",
                            path.display()
                        )));
                    }
                };
                if !first.contains_key(label) {
                    return Err(Error::input(format!(
                        "The metric `{metric}` needs the column `{label}`, which {} does not have: its columns are {}. \
                         Use a file that has this label, or a metric that the file has labels for.",
                        path.display(),
                        columns()
                    )));
                }
                Ok(Self::Pku { label })
            }
        }
    }

    pub(super) fn format(&self) -> Format {
        match self {
            Self::Trl => Format::Trl,
            Self::Pku { .. } => Format::Pku,
            Self::Hh => Format::Hh,
        }
    }

    /// The pair that a row holds.
    pub(super) fn pair(&self, row: &Columns) -> RowResult<Answers> {
        let (chosen_column, rejected_column, answers) = match self {
            Self::Trl => ("chosen", "rejected", trl(row)?),
            Self::Hh => ("chosen", "rejected", hh(row)?),
            Self::Pku { label } => pku(row, label)?,
        };
        let (_, chosen, rejected) = &answers;
        for (column, answer) in [(chosen_column, chosen), (rejected_column, rejected)] {
            if answer.trim().is_empty() {
                return Err(BadRow::at(column, "the response is empty."));
            }
        }
        if chosen.trim() == rejected.trim() {
            return Err(BadRow::at(
                rejected_column,
                "the chosen and the rejected response are the same, so that there is no preference to learn.",
            ));
        }
        Ok(answers)
    }
}

/// The prompt of a row that is to be answered.
pub(super) fn prompt_of(row: &Columns) -> RowResult<Prompt> {
    match column(row, "prompt")? {
        Value::Array(list) => Ok(Prompt::Chat(prompt_messages(messages(list, "prompt")?, "prompt")?)),
        value => Ok(Prompt::Text(non_blank_prompt(text(value, "prompt")?)?.to_owned())),
    }
}

fn trl(row: &Columns) -> RowResult<Answers> {
    match (column(row, "chosen")?, column(row, "rejected")?) {
        (Value::Array(chosen), Value::Array(rejected)) => {
            let chosen = messages(chosen, "chosen")?;
            let rejected = messages(rejected, "rejected")?;
            // Rows that repeat their first user turn as a `prompt` string beside whole conversations are
            // common; the conversations win.
            let whole_conversations = !row.get("prompt").is_some_and(Value::is_array) && chosen.len() > 1;
            if whole_conversations || !row.contains_key("prompt") {
                return conversation_pair(chosen, rejected);
            }
            let prompt = match prompt_of(row)? {
                Prompt::Text(content) => vec![Message { role: "user".into(), content }],
                Prompt::Chat(messages) => messages,
            };
            Ok((Prompt::Chat(prompt), only_answer(chosen, "chosen")?, only_answer(rejected, "rejected")?))
        }
        (chosen, rejected) if row.contains_key("prompt") => {
            Ok((prompt_of(row)?, text(chosen, "chosen")?.to_owned(), text(rejected, "rejected")?.to_owned()))
        }
        _ => hh(row),
    }
}

fn pku(row: &Columns, label: &'static str) -> RowResult<(&'static str, &'static str, Answers)> {
    const RESPONSES: [&str; 2] = ["response_0", "response_1"];
    let (chosen, rejected) = match column(row, label)?.as_u64() {
        Some(0) => (RESPONSES[0], RESPONSES[1]),
        Some(1) => (RESPONSES[1], RESPONSES[0]),
        _ => return Err(BadRow::at(label, format!("the label is {}, but must be 0 or 1.", short(&row[label])))),
    };
    let response = |name| Ok(text(column(row, name)?, name)?.trim().to_owned());
    let prompt = non_blank_prompt(text(column(row, "prompt")?, "prompt")?)?.trim().to_owned();
    let prompt = Prompt::Chat(vec![Message { role: "user".into(), content: prompt }]);
    Ok((chosen, rejected, (prompt, response(chosen)?, response(rejected)?)))
}

fn hh(row: &Columns) -> RowResult<Answers> {
    let turns = |name| transcript(text(column(row, name)?, name)?).map_err(|problem| BadRow::at(name, problem));
    conversation_pair(turns("chosen")?, turns("rejected")?)
}

/// Splits two conversations that share all but their last message, the response.
fn conversation_pair(mut chosen: Vec<Message>, mut rejected: Vec<Message>) -> RowResult<Answers> {
    let chosen_answer = pop_answer(&mut chosen, "chosen")?;
    let rejected_answer = pop_answer(&mut rejected, "rejected")?;
    if chosen != rejected {
        return Err(BadRow::at("rejected", "the conversation differs from that in `chosen` before its last turn."));
    }
    Ok((Prompt::Chat(prompt_messages(chosen, "chosen")?), chosen_answer, rejected_answer))
}

fn pop_answer(conversation: &mut Vec<Message>, column: &'static str) -> RowResult<String> {
    match conversation.pop() {
        Some(last) if last.role == "assistant" => Ok(last.content),
        _ => Err(BadRow::at(column, "the conversation does not end with a turn of the assistant.")),
    }
}

fn only_answer(mut conversation: Vec<Message>, column: &'static str) -> RowResult<String> {
    let answer = pop_answer(&mut conversation, column)?;
    if conversation.is_empty() {
        Ok(answer)
    } else {
        Err(BadRow::at(column, "beside a `prompt`, a response must be one message, but here are several."))
    }
}

/// Checks that a conversation is something to answer.
fn prompt_messages(conversation: Vec<Message>, column: &'static str) -> RowResult<Vec<Message>> {
    if conversation.iter().all(|message| message.content.trim().is_empty()) {
        return Err(BadRow::at(column, "the prompt is empty."));
    }
    if conversation.last().is_some_and(|last| last.role == "assistant") {
        return Err(BadRow::at(
            column,
            "the prompt ends with a turn of the assistant, so that there is nothing to answer.",
        ));
    }
    Ok(conversation)
}

fn non_blank_prompt(prompt: &str) -> RowResult<&str> {
    if prompt.trim().is_empty() { Err(BadRow::at("prompt", "the prompt is empty.")) } else { Ok(prompt) }
}

/// The turns of an hh-rlhf transcript, `\n\nHuman: … \n\nAssistant: …`, which must alternate.
pub(super) fn transcript(text: &str) -> std::result::Result<Vec<Message>, String> {
    const MARKERS: [(&str, &str); 2] = [("\n\nHuman:", "user"), ("\n\nAssistant:", "assistant")];
    let mut turns: Vec<(usize, usize, &str)> = MARKERS
        .iter()
        .flat_map(|(marker, role)| text.match_indices(marker).map(|(start, _)| (start, start + marker.len(), *role)))
        .collect();
    turns.sort_unstable();
    let preamble = &text[..turns.first().map_or(text.len(), |turn| turn.0)];
    if !preamble.trim().is_empty() || turns.is_empty() {
        return Err("the transcript does not start with `\\n\\nHuman:`, as hh-rlhf's do.".into());
    }
    for (index, (_, _, role)) in turns.iter().enumerate() {
        if *role != MARKERS[index % 2].1 {
            return Err(format!("the turns of the transcript do not alternate: turn {} is the {role}'s.", index + 1));
        }
    }
    let ends = turns.iter().skip(1).map(|turn| turn.0).chain([text.len()]);
    Ok(turns
        .iter()
        .zip(ends)
        .map(|((_, start, role), end)| Message { role: (*role).into(), content: text[*start..end].trim().into() })
        .collect())
}

fn messages(list: &[Value], column: &'static str) -> RowResult<Vec<Message>> {
    let field = |message: &Value, name: &str, index: usize| {
        message
            .get(name)
            .and_then(Value::as_str)
            .map(str::to_owned)
            .ok_or_else(|| BadRow::at(column, format!("message {} has no `{name}` that is a string.", index + 1)))
    };
    list.iter()
        .enumerate()
        .map(|(index, message)| {
            Ok(Message { role: field(message, "role", index)?, content: field(message, "content", index)? })
        })
        .collect()
}

fn column<'a>(row: &'a Columns, name: &'static str) -> RowResult<&'a Value> {
    row.get(name).ok_or_else(|| BadRow::at(name, format!("the column is missing; the row has {}.", list(row.keys()))))
}

fn text<'a>(value: &'a Value, column: &'static str) -> RowResult<&'a str> {
    value.as_str().ok_or_else(|| BadRow::at(column, format!("expected a string, found {}.", short(value))))
}

/// A value as a message can show it.
fn short(value: &Value) -> String {
    match value {
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
        Value::String(_) => "a string".into(),
        other => format!("`{other}`"),
    }
}

/// Names in backquotes, with commas; the first 12 of them.
fn list(names: impl ExactSizeIterator<Item = impl Display>) -> String {
    let total = names.len();
    let shown: Vec<String> = names.take(12).map(|name| format!("`{name}`")).collect();
    match total {
        0 => "none".into(),
        13.. => format!("{} and {} more", shown.join(", "), total - 12),
        _ => shown.join(", "),
    }
}
