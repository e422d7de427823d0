//! Rows as the columns of a format: what `schema` reads, written.

use engine::chat::Message;
use serde::Serialize;
use serde_json::{Value, json};

use super::schema::{BadRow, Columns, Format, RESPONSES, RowResult, SAFE, SAFE_OF_PAIR, transcript};
use super::{LabelledExample, PreferencePair, Prompt};

/// What rows are written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// `prompt`, `chosen`, `rejected`: strings, or lists of messages.
    Trl,
    /// `chosen`, `rejected`: transcripts of conversations.
    Hh,
    /// `prompt`, `response_0`, which is the preferred one, `response_1`, and the label of one metric.
    Pku,
    /// `prompt`, `completion`, `label`: strings, or lists of messages.
    Unpaired,
    /// `prompt`, `completion`: strings, or lists of messages.
    Sft,
    /// `prompt`: a string, or a list of messages.
    Prompts,
}

impl Target {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Trl, Self::Hh, Self::Pku, Self::Unpaired, Self::Sft, Self::Prompts];

    /// The name on the command line, which is that of the format.
    pub fn name(self) -> &'static str {
        match self {
            Self::Trl => Format::Trl.name(),
            Self::Hh => Format::Hh.name(),
            Self::Pku => Format::Pku.name(),
            Self::Unpaired => Format::Unpaired.name(),
            Self::Sft => Format::Sft.name(),
            Self::Prompts => "prompts",
        }
    }

    /// Whether it holds pairs.
    pub(super) fn is_pairs(self) -> bool {
        matches!(self, Self::Trl | Self::Hh | Self::Pku)
    }
}

/// The columns of a pair as `trl`, `hh` or `pku`; the last has its label in the column `label`.
pub(super) fn pair_columns(pair: &PreferencePair, target: Target, label: &str) -> RowResult<Columns> {
    let PreferencePair { prompt, chosen, rejected, is_unsafe, margin, row: _ } = pair;
    let (mut columns, flags) = match target {
        Target::Pku => (pku(prompt, [chosen, rejected], label)?, SAFE),
        Target::Hh => (hh(prompt, [chosen, rejected])?, SAFE_OF_PAIR),
        _ => {
            let mut columns = prompt_columns(prompt);
            columns.insert("chosen".into(), answer(prompt, chosen));
            columns.insert("rejected".into(), answer(prompt, rejected));
            (columns, SAFE_OF_PAIR)
        }
    };
    if let Some(is_unsafe) = is_unsafe {
        columns.extend(flags.iter().zip(is_unsafe).map(|(flag, is_unsafe)| ((*flag).to_owned(), (!is_unsafe).into())));
    }
    if let Some(margin) = margin {
        columns.insert("margin".into(), (*margin).into());
    }
    Ok(columns)
}

/// The columns of a labelled response as `unpaired`, or as `sft`, which have no label.
pub(super) fn example_columns(example: &LabelledExample, target: Target) -> Columns {
    let mut columns = prompt_columns(&example.prompt);
    columns.insert("completion".into(), answer(&example.prompt, &example.completion));
    if target == Target::Unpaired {
        columns.insert("label".into(), example.desirable.into());
    }
    columns
}

/// The column of a prompt.
pub(super) fn prompt_columns(prompt: &Prompt) -> Columns {
    let value = match prompt {
        Prompt::Text(text) => text.as_str().into(),
        Prompt::Chat(messages) => messages.iter().map(|Message { role, content }| message(role, content)).collect(),
    };
    Columns::from_iter([("prompt".to_owned(), value)])
}

/// A response of the kind of its prompt: a text, or a list of one message.
fn answer(prompt: &Prompt, response: &str) -> Value {
    match prompt {
        Prompt::Text(_) => response.into(),
        Prompt::Chat(_) => json!([message("assistant", response)]),
    }
}

fn message(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

/// The transcripts of a pair, if reading them gives the same conversations.
fn hh(prompt: &Prompt, responses: [&String; 2]) -> RowResult<Columns> {
    let messages = conversation(prompt, "hh")?;
    let column = |name: &'static str, response: &String| {
        let mut messages = messages.to_vec();
        messages.push(Message::new("assistant", response));
        let text: String = messages
            .iter()
            .map(|Message { role, content }| match role.as_str() {
                "assistant" => format!("\n\nAssistant: {content}"),
                _ => format!("\n\nHuman: {content}"),
            })
            .collect();
        if transcript(&text).is_ok_and(|read| read == messages) {
            Ok((name.to_owned(), text.into()))
        } else {
            Err(BadRow::at(
                name,
                "the conversation does not fit into a transcript of hh-rlhf, in which human and assistant take turns, the \
                 human first, no turn has white space at its ends, and none contains `\\n\\nHuman:` or `\\n\\nAssistant:`.",
            ))
        }
    };
    let [chosen, rejected] = responses;
    Ok(Columns::from_iter([column("chosen", chosen)?, column("rejected", rejected)?]))
}

/// The columns of a PKU-SafeRLHF row, if reading them gives the same texts.
fn pku(prompt: &Prompt, responses: [&String; 2], label: &str) -> RowResult<Columns> {
    let question = match conversation(prompt, "pku")? {
        [Message { role, content }] if role == "user" => content,
        _ => {
            return Err(BadRow::at("prompt", "`pku` holds one message of the user, but the prompt is a conversation."));
        }
    };
    for (name, text) in [("prompt", question), (RESPONSES[0], responses[0]), (RESPONSES[1], responses[1])] {
        if text.trim() != text {
            return Err(BadRow::at(name, "the text has white space at its ends, which readers of `pku` take away."));
        }
    }
    let mut columns = Columns::from_iter([("prompt".to_owned(), question.as_str().into())]);
    columns.extend(RESPONSES.iter().zip(responses).map(|(name, text)| ((*name).to_owned(), text.as_str().into())));
    columns.insert(label.into(), 0.into());
    Ok(columns)
}

/// The messages of a prompt for a format that holds conversations only.
fn conversation<'a>(prompt: &'a Prompt, format: &str) -> RowResult<&'a [Message]> {
    match prompt {
        Prompt::Chat(messages) => Ok(messages),
        Prompt::Text(_) => Err(BadRow::at(
            "prompt",
            format!(
                "the prompt is plain text, to which no chat template applies, but `{format}` holds conversations. Use `trl`, \
                 `unpaired` or `sft`."
            ),
        )),
    }
}
