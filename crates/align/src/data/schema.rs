//! What the columns of a row mean.

use std::fmt::Display;
use std::path::Path;
use std::str::FromStr;

use engine::chat::Message;
use engine::{Error, Result};
use serde::Serialize;
use serde_json::{Map, Value};

use super::{LabelledExample, PreferencePair, Prompt};

pub(super) type Columns = Map<String, Value>;
pub(super) type RowResult<T> = std::result::Result<T, BadRow>;
/// Prompt, chosen response, rejected response.
type Answers = (Prompt, String, String);

/// The responses of a PKU-SafeRLHF row, and whether each is safe.
pub(super) const RESPONSES: [&str; 2] = ["response_0", "response_1"];
pub(super) const SAFE: [&str; 2] = ["is_response_0_safe", "is_response_1_safe"];

/// Whether the chosen and the rejected response are safe, in other formats.
pub(super) const SAFE_OF_PAIR: [&str; 2] = ["safe_chosen", "safe_rejected"];

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
    /// `prompt`, `completion`, `label`: single responses, desirable or not, as TRL reads them.
    Unpaired,
    /// `prompt` and `completion`, `prompt` and `response`, or `messages`: single responses to learn from.
    Sft,
}

impl Format {
    /// All formats.
    pub const ALL: [Self; 5] = [Self::Trl, Self::Pku, Self::Hh, Self::Unpaired, Self::Sft];

    /// The name in recipes and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Trl => "trl",
            Self::Pku => "pku",
            Self::Hh => "hh",
            Self::Unpaired => "unpaired",
            Self::Sft => "sft",
        }
    }

    pub(super) fn of_row(row: &Columns) -> Option<Self> {
        let has = |column| row.contains_key(column);
        if has("response_0") && has("response_1") {
            Some(Self::Pku)
        } else if has("completion") && has("label") {
            Some(Self::Unpaired)
        } else if !has("chosen") || !has("rejected") {
            let has_no_label = row.get("label").is_none_or(Value::is_null);
            let question_and_answer = has("prompt") && has("response") && has_no_label;
            (has("completion") || has("messages") || question_and_answer).then_some(Self::Sft)
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

    /// A problem of one column.
    pub(super) fn at(column: &'static str, problem: impl Into<String>) -> Self {
        Self { column: Some(column), problem: problem.into() }
    }

    /// A sentence that names file, row and column; `place` is the first two.
    pub(super) fn describe(&self, place: &str) -> String {
        let column = self.column.map(|column| format!(", column `{column}`")).unwrap_or_default();
        format!("{place}{column}: {}", self.problem)
    }
}

/// How the rows of one file are read.
#[derive(Clone, Copy)]
pub(super) enum Schema {
    Trl,
    Pku {
        label: &'static str,
    },
    /// PKU-SafeRLHF rows whose responses are labelled one by one.
    PkuFlags,
    Hh,
    Unpaired,
    Sft,
}

impl Schema {
    /// The schema of a file, from its first row and what the user asked for.
    pub(super) fn find(first: &Columns, path: &Path, format: Option<Format>, metric: &str) -> Result<Self> {
        let columns = || list(first.keys());
        let format = format.or_else(|| Format::of_row(first)).ok_or_else(|| {
            Error::input(format!(
                "The rows of {} are no preference pairs: the columns are {}. Expected are `prompt`, `chosen`, `rejected` \
                 (TRL), `chosen`, `rejected` (hh-rlhf transcripts or message lists), or `prompt`, `response_0`, \
                 `response_1` with `better_response_id` or `safer_response_id` (PKU-SafeRLHF). Single responses have \
                 `prompt`, `completion` and perhaps `label`, or `prompt` and `response`, or `messages`.",
                path.display(),
                columns()
            ))
        })?;
        match format {
            Format::Trl => Ok(Self::Trl),
            Format::Hh => Ok(Self::Hh),
            Format::Unpaired | Format::Sft => Err(Error::input(format!(
                "The rows of {} are single responses, but the objective compares the two responses of a \
                 pair. Choose an objective of single responses (`kto`, `bco`, `sft`), or data with `chosen` and `rejected`.",
                path.display()
            ))),
            Format::Pku => {
                let label = pku_label(metric).ok_or_else(|| {
                    Error::input(format!(
                        "The rows of {} have no label for the metric `{metric}`. Use `helpfulness` \
                         (column `better_response_id`) or `harmlessness` (column `safer_response_id`).",
                        path.display()
                    ))
                })?;
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

    /// As [`find`](Self::find), for single responses with a label.
    pub(super) fn find_labelled(first: &Columns, path: &Path, format: Option<Format>, metric: &str) -> Result<Self> {
        match format.or_else(|| Format::of_row(first)) {
            Some(Format::Unpaired) => Ok(Self::Unpaired),
            Some(Format::Sft) => Ok(Self::Sft),
            Some(Format::Pku)
                if matches!(metric, "harmlessness" | "safety") && SAFE.iter().all(|flag| first.contains_key(*flag)) =>
            {
                Ok(Self::PkuFlags)
            }
            _ => Self::find(first, path, format, metric),
        }
    }

    pub(super) fn format(&self) -> Format {
        match self {
            Self::Trl => Format::Trl,
            Self::Pku { .. } | Self::PkuFlags => Format::Pku,
            Self::Hh => Format::Hh,
            Self::Unpaired => Format::Unpaired,
            Self::Sft => Format::Sft,
        }
    }

    /// The columns of which pairs, or labelled responses, are made.
    pub(super) fn columns(&self, pairs: bool) -> Vec<&'static str> {
        let (texts, flags): (&[&str], _) = match self {
            Self::Trl | Self::Hh => (&["prompt", "chosen", "rejected"], SAFE_OF_PAIR),
            Self::Pku { label } => (&["prompt", RESPONSES[0], RESPONSES[1], label], SAFE),
            Self::PkuFlags => return [&["prompt"], &RESPONSES[..], &SAFE].concat(),
            Self::Unpaired => return vec!["prompt", "completion", "label"],
            Self::Sft => return vec!["prompt", "completion", "response", "messages"],
        };
        if pairs { [texts, &flags, &["margin"]].concat() } else { texts.to_vec() }
    }

    /// The pair that a row holds; its `row` is still to be set.
    pub(super) fn pair(&self, row: &Columns) -> RowResult<PreferencePair> {
        let (columns, (prompt, chosen, rejected)) = match self {
            Self::Trl => (["chosen", "rejected"], trl(row)?),
            Self::Hh => (["chosen", "rejected"], hh(row)?),
            Self::Pku { label } => pku(row, label)?,
            Self::PkuFlags | Self::Unpaired | Self::Sft => return Err(BadRow::whole("the row holds no pair.")),
        };
        for (column, answer) in columns.iter().zip([&chosen, &rejected]) {
            not_blank(answer, column)?;
        }
        if chosen.trim() == rejected.trim() {
            return Err(BadRow::at(
                columns[1],
                "the chosen and the rejected response are the same, so that there is no preference to learn.",
            ));
        }
        let flags = if columns[0] == RESPONSES[0] {
            SAFE
        } else if columns[0] == RESPONSES[1] {
            [SAFE[1], SAFE[0]]
        } else {
            SAFE_OF_PAIR
        };
        // files that pad their rows write null where there is nothing
        let given = |name: &str| row.get(name).filter(|value| !value.is_null());
        let is_unsafe = match flags.map(|name| given(name).is_some()) {
            [true, true] => Some([!flag(row, flags[0])?, !flag(row, flags[1])?]),
            _ => None,
        };
        let margin = given("margin").map(|value| number(value, "margin")).transpose()?;
        Ok(PreferencePair { prompt, chosen, rejected, is_unsafe, margin, row: 0 })
    }

    /// The labelled responses that a row holds.
    pub(super) fn examples(&self, columns: &Columns, row: usize) -> RowResult<Vec<LabelledExample>> {
        let example = |prompt, completion, desirable| LabelledExample { prompt, completion, desirable, row };
        match self {
            Self::Unpaired => {
                let (prompt, completion) = unpaired(columns)?;
                not_blank(&completion, "completion")?;
                Ok(vec![example(prompt, completion, flag(columns, "label")?)])
            }
            Self::Sft => {
                let (prompt, completion) = demonstration(columns)?;
                Ok(vec![example(prompt, completion, true)])
            }
            Self::PkuFlags => {
                let (prompt, responses) = pku_responses(columns)?;
                let responses = responses.into_iter().zip(RESPONSES).zip(SAFE);
                responses
                    .map(|((response, name), safe)| {
                        not_blank(&response, name)?;
                        Ok(example(prompt.clone(), response, flag(columns, safe)?))
                    })
                    .collect()
            }
            _ => {
                let pair = self.pair(columns)?;
                Ok(vec![example(pair.prompt.clone(), pair.chosen, true), example(pair.prompt, pair.rejected, false)])
            }
        }
    }
}

/// The column of PKU-SafeRLHF that says which response a metric prefers.
pub(super) fn pku_label(metric: &str) -> Option<&'static str> {
    match metric {
        "helpfulness" => Some("better_response_id"),
        "harmlessness" | "safety" => Some("safer_response_id"),
        _ => None,
    }
}

fn not_blank(response: &str, column: &'static str) -> RowResult<()> {
    if response.trim().is_empty() { Err(BadRow::at(column, "the response is empty.")) } else { Ok(()) }
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

/// The columns of the chosen and the rejected response, and the pair.
fn pku(row: &Columns, label: &'static str) -> RowResult<([&'static str; 2], Answers)> {
    let swap = match column(row, label)?.as_u64() {
        Some(0) => false,
        Some(1) => true,
        _ => return Err(BadRow::at(label, format!("the label is {}, but must be 0 or 1.", short(&row[label])))),
    };
    let (prompt, [first, second]) = pku_responses(row)?;
    let (columns, chosen, rejected) =
        if swap { ([RESPONSES[1], RESPONSES[0]], second, first) } else { (RESPONSES, first, second) };
    Ok((columns, (prompt, chosen, rejected)))
}

/// The prompt and both responses of a PKU-SafeRLHF row.
fn pku_responses(row: &Columns) -> RowResult<(Prompt, [String; 2])> {
    let response = |name| Ok(text(column(row, name)?, name)?.trim().to_owned());
    let prompt = user_prompt(non_blank_prompt(text(column(row, "prompt")?, "prompt")?)?.trim());
    Ok((prompt, [response(RESPONSES[0])?, response(RESPONSES[1])?]))
}

/// A conversation of one message of the user.
fn user_prompt(content: &str) -> Prompt {
    Prompt::Chat(vec![Message::new("user", content)])
}

/// The prompt and the response of a row of single responses.
fn unpaired(row: &Columns) -> RowResult<(Prompt, String)> {
    match column(row, "completion")? {
        Value::Array(list) => {
            let completion = only_answer(messages(list, "completion")?, "completion")?;
            let prompt = match prompt_of(row)? {
                Prompt::Text(content) => user_prompt(&content),
                chat => chat,
            };
            Ok((prompt, completion))
        }
        value => Ok((prompt_of(row)?, text(value, "completion")?.to_owned())),
    }
}

/// The prompt and the response of a row of single responses without labels.
fn demonstration(row: &Columns) -> RowResult<(Prompt, String)> {
    if row.get("label").is_some_and(|label| !label.is_null()) {
        return Err(BadRow::at(
            "label",
            "the row has a label, but the rows are read as `sft`, which have none. Give the format `unpaired`.",
        ));
    }
    if row.contains_key("completion") {
        let (prompt, completion) = unpaired(row)?;
        not_blank(&completion, "completion")?;
        return Ok((prompt, completion));
    }
    if row.contains_key("response") && !row.contains_key("messages") {
        let answer = text(column(row, "response")?, "response")?.trim();
        not_blank(answer, "response")?;
        let prompt = match prompt_of(row)? {
            Prompt::Text(question) => user_prompt(question.trim()),
            chat => chat,
        };
        return Ok((prompt, answer.to_owned()));
    }
    let mut conversation = match column(row, "messages")? {
        Value::Array(list) => messages(list, "messages")?,
        other => return Err(BadRow::at("messages", format!("expected a list of messages, found {}.", short(other)))),
    };
    let answer = pop_answer(&mut conversation, "messages")?;
    not_blank(&answer, "messages")?;
    Ok((Prompt::Chat(prompt_messages(conversation, "messages")?), answer))
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

fn flag(row: &Columns, name: &'static str) -> RowResult<bool> {
    let value = column(row, name)?;
    value.as_bool().ok_or_else(|| BadRow::at(name, format!("expected true or false, found {}.", short(value))))
}

fn number(value: &Value, column: &'static str) -> RowResult<f64> {
    value.as_f64().ok_or_else(|| BadRow::at(column, format!("expected a number, found {}.", short(value))))
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
