//! Pairs as the tokens that the model sees.

use std::path::Path;

use engine::chat::Message;
use engine::tokenizer::Tokenizer;
use engine::{Error, Result};
use rayon::prelude::*;
use serde::Serialize;

use super::{PreferencePair, Prompt};

/// The tokens of a preference pair. Prompt followed by either response is a sequence for the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizedPair {
    /// At least one token; starts with BOS where the tokenizer adds one.
    pub prompt: Vec<u32>,
    /// At least one token; ends with EOS unless it was truncated.
    pub chosen: Vec<u32>,
    /// At least one token; ends with EOS unless it was truncated.
    pub rejected: Vec<u32>,
    /// The row of the file, as in [`PreferencePair`].
    pub row: usize,
}

/// What happens to what a chat template writes after the end of a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TemplateTail {
    /// It is not scored: the model never writes it.
    #[default]
    Drop,
    /// It is scored as part of the response, as TRL does.
    Keep,
}

/// What happens to a pair whose prompt leaves no room for a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LongPrompts {
    /// It is an error that names the row.
    #[default]
    Error,
    /// It is left out and counted.
    Drop,
}

/// How pairs become tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RenderOptions {
    /// The longest sequence, prompt and response together, in tokens; at least 2.
    pub max_length: usize,
    /// What happens to text after the end of a response.
    pub template_tail: TemplateTail,
    /// What happens to a prompt that leaves no room.
    pub long_prompts: LongPrompts,
}

/// Tokenised pairs, and what was cut to make them fit.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tokenized {
    /// The pairs in the order given.
    pub pairs: Vec<TokenizedPair>,
    /// How many responses (two a pair) were cut to `max_length`.
    pub truncated_responses: usize,
    /// How many pairs were left out since their prompt leaves no room.
    pub dropped_prompts: usize,
}

/// Tokenises pairs; `path` is the file they come from, for messages.
///
/// A response starts on a token boundary: the prompt's tokens are those that generation starts from.
/// It ends with exactly one EOS, unless it is truncated. Errors name the row: a conversation without a
/// chat template to render it, a template that fails or renders a prompt otherwise once it is answered,
/// a response that gives no tokens, and a prompt of `max_length` tokens or more unless those are dropped.
pub fn tokenize_pairs(
    pairs: &[PreferencePair],
    path: &Path,
    tokenizer: &Tokenizer,
    options: &RenderOptions,
) -> Result<Tokenized> {
    let all: Vec<Result<Fitted>> = pairs
        .par_iter()
        .map(|pair| {
            tokenize_pair(pair, tokenizer, options).map_err(|error| {
                Error::input(format!("Row {} of {} cannot be tokenised. {error}", pair.row, path.display()))
            })
        })
        .collect();
    let mut tokenized = Tokenized::default();
    // In the order of the rows, so that the first bad row is the one that is reported.
    for fitted in all {
        match fitted? {
            Fitted::Pair { tokens, truncated } => {
                tokenized.pairs.push(tokens);
                tokenized.truncated_responses += truncated;
            }
            Fitted::NoRoom => tokenized.dropped_prompts += 1,
        }
    }
    Ok(tokenized)
}

/// The tokens of a prompt that is to be answered, the same in training and in generation.
///
/// A conversation is rendered by the chat template, up to where the assistant's answer begins. BOS comes
/// first where the tokenizer adds one, and is not doubled where the text already starts with it.
pub fn tokenize_prompt(prompt: &Prompt, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    Ok(with_bos(tokenizer.encode(&prompt_text(prompt, tokenizer)?)?, tokenizer))
}

enum Fitted {
    Pair { tokens: TokenizedPair, truncated: usize },
    NoRoom,
}

fn tokenize_pair(pair: &PreferencePair, tokenizer: &Tokenizer, options: &RenderOptions) -> Result<Fitted> {
    let text = prompt_text(&pair.prompt, tokenizer)?;
    let bare_prompt = tokenizer.encode(&text)?;
    let mut truncated = 0;
    let mut response = |name: &str, answer: &str, room: usize| {
        let rest = response_text(&pair.prompt, &text, answer, tokenizer)?;
        let mut tokens = encode_after(&text, &bare_prompt, &rest, tokenizer)?;
        end_response(&mut tokens, tokenizer.eos(), options.template_tail);
        if tokens.first().is_none_or(|first| Some(*first) == tokenizer.eos()) {
            return Err(Error::input(format!("Its {name} response gives no tokens. Correct or remove the row.")));
        }
        if tokens.len() > room {
            tokens.truncate(room);
            truncated += 1;
        }
        Ok(tokens)
    };
    let prompt = with_bos(bare_prompt.clone(), tokenizer);
    let room = options.max_length.saturating_sub(prompt.len());
    if prompt.is_empty() {
        return Err(Error::input("Its prompt gives no tokens. Correct or remove the row."));
    }
    if room == 0 {
        return match options.long_prompts {
            LongPrompts::Drop => Ok(Fitted::NoRoom),
            LongPrompts::Error => Err(Error::input(format!(
                "Its prompt has {} tokens and max_length is {}, which leaves no room for a response. Raise \
                 it if the model's context allows it, shorten or remove the row, or let a recipe leave such \
                 pairs out and count them with data.long_prompts = \"drop\".",
                prompt.len(),
                options.max_length
            ))),
        };
    }
    let chosen = response("chosen", &pair.chosen, room)?;
    let rejected = response("rejected", &pair.rejected, room)?;
    Ok(Fitted::Pair { tokens: TokenizedPair { prompt, chosen, rejected, row: pair.row }, truncated })
}

fn prompt_text(prompt: &Prompt, tokenizer: &Tokenizer) -> Result<String> {
    match prompt {
        Prompt::Text(text) => Ok(text.clone()),
        Prompt::Chat(messages) if tokenizer.has_chat_template() => tokenizer.chat(messages, true),
        Prompt::Chat(_) => Err(Error::input(
            "It is a conversation, but the model has no chat template to render it with. Put a `chat_template.jinja` into \
             the model's folder, or give the data as plain text: rows with the strings `prompt`, `chosen` and `rejected`.",
        )),
    }
}

/// What follows the prompt's text when the prompt is answered.
fn response_text(prompt: &Prompt, prompt_text: &str, answer: &str, tokenizer: &Tokenizer) -> Result<String> {
    let Prompt::Chat(messages) = prompt else { return Ok(answer.to_owned()) };
    let mut conversation = messages.clone();
    conversation.push(Message { role: "assistant".into(), content: answer.to_owned() });
    let answered = tokenizer.chat(&conversation, false)?;
    answered.strip_prefix(prompt_text).map(str::to_owned).ok_or_else(|| {
        Error::input(
            "The model's chat template renders the prompt otherwise once it is answered than when it is to be answered, so \
             that no boundary between prompt and response can be drawn. Use a template whose rendering with the answer \
             starts with its rendering with add_generation_prompt.",
        )
    })
}

/// The tokens of `rest` after a prompt.
///
/// Usually the tokens of the whole text start with the prompt's. Where tokens would merge across the
/// boundary, `rest` is encoded on its own. Always doing that would be wrong for tokenizers of the
/// SentencePiece kind, which write a space before the first word of every text.
fn encode_after(prompt_text: &str, prompt: &[u32], rest: &str, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let whole = tokenizer.encode(&format!("{prompt_text}{rest}"))?;
    match whole.strip_prefix(prompt) {
        Some(tokens) => Ok(tokens.to_vec()),
        None => tokenizer.encode(rest),
    }
}

/// Lets a response end with exactly one EOS, which its text may already hold.
fn end_response(tokens: &mut Vec<u32>, eos: Option<u32>, tail: TemplateTail) {
    let Some(eos) = eos else { return };
    match tokens.iter().position(|token| *token == eos) {
        None => tokens.push(eos),
        // Generation stops at the first EOS, so what follows is never written.
        Some(end) if tail == TemplateTail::Drop => tokens.truncate(end + 1),
        Some(_) => {}
    }
}

fn with_bos(mut tokens: Vec<u32>, tokenizer: &Tokenizer) -> Vec<u32> {
    if let Some(bos) = tokenizer.bos().filter(|bos| tokenizer.adds_bos() && tokens.first() != Some(bos)) {
        tokens.insert(0, bos);
    }
    tokens
}
