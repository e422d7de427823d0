//! Pairs as the tokens that the model sees.

use std::borrow::{Borrow, Cow};

use engine::chat::Message;
use engine::tokenizer::Tokenizer;
use engine::{Error, Result};
use rayon::prelude::*;
use serde::Serialize;

use super::tokens::{Stored, Tokens};
use super::{LabelledExample, PreferencePair, Prompt};

/// The tokens of a preference pair. Prompt followed by either response is a sequence for the model.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenizedPair {
    /// At least one token; starts with BOS where the tokenizer adds one.
    pub prompt: Tokens,
    /// At least one token; ends with EOS unless it was truncated.
    pub chosen: Tokens,
    /// At least one token; ends with EOS unless it was truncated.
    pub rejected: Tokens,
    /// As in [`PreferencePair`].
    pub is_unsafe: Option<[bool; 2]>,
    /// As in [`PreferencePair`].
    pub margin: Option<f64>,
    /// The row of the file, as in [`PreferencePair`].
    pub row: usize,
}

/// The tokens of a labelled response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizedExample {
    /// At least one token; starts with BOS where the tokenizer adds one.
    pub prompt: Tokens,
    /// At least one token; ends with EOS unless it was truncated.
    pub response: Tokens,
    /// Whether it is a response to learn from.
    pub desirable: bool,
    /// The row of the file, as in [`LabelledExample`].
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

/// What happens to a row whose prompt leaves no room for a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LongPrompts {
    /// It is an error that names the row.
    #[default]
    Error,
    /// It is left out and counted.
    Drop,
    /// Its first tokens are cut and counted, but for BOS: as many as the longest response needs, and no more than half of
    /// `max_length`.
    KeepEnd,
}

/// How text becomes tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RenderOptions {
    /// The longest sequence, prompt and response together, in tokens; at least 2.
    pub max_length: usize,
    /// What happens to text after the end of a response.
    pub template_tail: TemplateTail,
    /// What happens to a prompt that leaves no room.
    pub long_prompts: LongPrompts,
}

/// Tokenised rows, and what was cut to make them fit.
#[derive(Debug, Clone, PartialEq)]
pub struct Tokenized<T> {
    /// The rows in the order given.
    pub rows: Vec<T>,
    /// How many responses (two a pair) were cut to `max_length`.
    pub truncated_responses: usize,
    /// How many rows were left out since their prompt leaves no room.
    pub dropped_prompts: usize,
    /// How many prompts lost their first tokens.
    pub cut_prompts: usize,
}

/// Names a row in messages, from its number: [`Places::of`](super::Places::of).
type Place<'a> = &'a (dyn Fn(usize) -> String + Sync);

/// A row of text that can become a row of tokens.
pub(super) trait Tokenizable: Sync {
    type Tokenized: Stored + Send;

    /// The number of the row in the data set.
    fn row(&self) -> usize;

    /// Its tokens.
    fn tokens(&self, tokenizer: &Tokenizer, options: &RenderOptions) -> Result<Fitted<Self::Tokenized>>;
}

/// The tokens of a row and what was cut of it, or nothing if its prompt leaves no room.
pub(super) type Fitted<T> = Option<(T, Cuts)>;

impl Tokenizable for PreferencePair {
    type Tokenized = TokenizedPair;

    fn row(&self) -> usize {
        self.row
    }

    fn tokens(&self, tokenizer: &Tokenizer, options: &RenderOptions) -> Result<Fitted<TokenizedPair>> {
        let responses = [("chosen response", &*self.chosen), ("rejected response", &self.rejected)];
        let fitted = tokenize_responses(&self.prompt, responses, tokenizer, options)?;
        Ok(fitted.map(|Sequence { prompt, responses, cuts }| {
            let [chosen, rejected] = responses.map(Tokens::from);
            let Self { is_unsafe, margin, row, .. } = *self;
            (TokenizedPair { prompt: prompt.into(), chosen, rejected, is_unsafe, margin, row }, cuts)
        }))
    }
}

impl Tokenizable for LabelledExample {
    type Tokenized = TokenizedExample;

    fn row(&self) -> usize {
        self.row
    }

    fn tokens(&self, tokenizer: &Tokenizer, options: &RenderOptions) -> Result<Fitted<TokenizedExample>> {
        let fitted = tokenize_responses(&self.prompt, [("response", &*self.completion)], tokenizer, options)?;
        Ok(fitted.map(|Sequence { prompt, responses: [response], cuts }| {
            let Self { desirable, row, .. } = *self;
            (TokenizedExample { prompt: prompt.into(), response: response.into(), desirable, row }, cuts)
        }))
    }
}

/// Tokenises pairs; `place` gives file and line of a row from its number, for messages.
///
/// A response starts on a token boundary: the prompt's tokens are those that generation starts from.
/// It ends with exactly one EOS, unless it is truncated. Errors name the row: a conversation without a
/// chat template to render it, a template that fails or renders a prompt otherwise once it is answered,
/// a response that gives no tokens, and a prompt of `max_length` tokens or more unless those are dropped.
pub fn tokenize_pairs(
    pairs: &[PreferencePair],
    place: Place<'_>,
    tokenizer: &Tokenizer,
    options: &RenderOptions,
) -> Result<Tokenized<TokenizedPair>> {
    Ok(Tokenized::of(tokenize_rows::<PreferencePair, _>(pairs, place, tokenizer, options)?))
}

/// Tokenises labelled responses, as [`tokenize_pairs`] does pairs.
pub fn tokenize_examples(
    examples: &[LabelledExample],
    place: Place<'_>,
    tokenizer: &Tokenizer,
    options: &RenderOptions,
) -> Result<Tokenized<TokenizedExample>> {
    Ok(Tokenized::of(tokenize_rows::<LabelledExample, _>(examples, place, tokenizer, options)?))
}

/// Tokenises rows, a list or a slice of them, in parallel. Of several errors it is the first row's.
pub(super) fn tokenize_rows<R: Tokenizable, I: Borrow<R> + Send>(
    rows: impl IntoParallelIterator<Item = I, Iter: IndexedParallelIterator>,
    place: Place<'_>,
    tokenizer: &Tokenizer,
    options: &RenderOptions,
) -> Result<Vec<Fitted<R::Tokenized>>> {
    let tokenize = |row: I| {
        let row: &R = row.borrow();
        row.tokens(tokenizer, options)
            .map_err(|error| Error::input(format!("{} cannot be tokenised. {error}", place(row.row()))))
    };
    let all: Vec<Result<_>> = rows.into_par_iter().map(tokenize).collect();
    all.into_iter().collect()
}

impl<T> Tokenized<T> {
    fn of(rows: Vec<Fitted<T>>) -> Self {
        let count = rows.len();
        let (rows, cuts): (Vec<T>, Vec<Cuts>) = rows.into_iter().flatten().unzip();
        Self {
            truncated_responses: cuts.iter().map(|cuts| cuts.responses).sum(),
            dropped_prompts: count - rows.len(),
            cut_prompts: cuts.iter().filter(|cuts| cuts.prompt).count(),
            rows,
        }
    }
}

/// The tokens of a prompt that is to be answered, the same in training and in generation.
///
/// A conversation is rendered by the chat template, up to where the assistant's answer begins. BOS comes
/// first where the tokenizer adds one, and is not doubled where the text already starts with it.
pub fn tokenize_prompt(prompt: &Prompt, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    Ok(with_bos(tokenizer.encode(&prompt_text(prompt, tokenizer)?)?, tokenizer))
}

/// The tokens of a conversation that is to be answered, as [`tokenize_prompt`] makes them, but that special tokens which are
/// written out in messages are text: for messages of people who must not end their turn.
pub fn tokenize_messages(messages: &[Message], tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    Ok(with_bos(tokenizer.encode_chat_as_text(messages, true)?, tokenizer))
}

/// What was cut of a row to make it fit.
#[derive(Clone, Copy)]
pub(super) struct Cuts {
    /// How many responses lost their end.
    pub(super) responses: usize,
    /// Whether the prompt lost its beginning.
    pub(super) prompt: bool,
}

/// A prompt and its responses within `max_length`.
struct Sequence<const N: usize> {
    prompt: Vec<u32>,
    responses: [Vec<u32>; N],
    cuts: Cuts,
}

/// The tokens of a prompt and of its responses, each named for messages; nothing if the prompt leaves no room.
fn tokenize_responses<const N: usize>(
    prompt: &Prompt,
    responses: [(&str, &str); N],
    tokenizer: &Tokenizer,
    options: &RenderOptions,
) -> Result<Option<Sequence<N>>> {
    let text = prompt_text(prompt, tokenizer)?;
    let bare_prompt = tokenizer.encode(&text)?;
    let mut tokens = with_bos(bare_prompt.clone(), tokenizer);
    if tokens.is_empty() {
        return Err(Error::input("Its prompt gives no tokens. Correct or remove the row."));
    }
    let max_length = options.max_length;
    match options.long_prompts {
        LongPrompts::Drop if tokens.len() >= max_length => return Ok(None),
        _ if tokens.len() >= max_length && (options.long_prompts == LongPrompts::Error || max_length < 2) => {
            return Err(Error::input(format!(
                "Its prompt has {} tokens and max_length is {max_length}, which leaves no room for a response. Raise \
                 it if the model's context allows it, shorten or remove the row, or let a recipe cut such prompts \
                 (data.long_prompts = \"keep-end\") or leave such rows out (data.long_prompts = \"drop\"), and count them.",
                tokens.len(),
            )));
        }
        _ => {}
    }
    let context = Context::of(&text, &bare_prompt, tokenizer)?;
    let mut encoded = [const { Vec::new() }; N];
    for (encoded, (name, answer)) in encoded.iter_mut().zip(responses) {
        let rest = response_text(prompt, &text, answer, tokenizer)?;
        *encoded = encode_after(&context, &rest, tokenizer)?;
        end_response(encoded, tokenizer.eos(), options.template_tail);
        if encoded.first().is_none_or(|first| Some(*first) == tokenizer.eos()) {
            return Err(Error::input(format!("Its {name} gives no tokens. Correct or remove the row.")));
        }
    }
    let mut cuts = Cuts { responses: 0, prompt: false };
    if options.long_prompts == LongPrompts::KeepEnd {
        let longest = encoded.iter().map(Vec::len).max().unwrap_or(0);
        let kept = max_length.saturating_sub(longest).max(max_length / 2);
        cuts.prompt = tokens.len() > kept;
        cut_beginning(&mut tokens, kept, tokenizer);
    }
    let room = max_length - tokens.len();
    for tokens in &mut encoded {
        cuts.responses += usize::from(tokens.len() > room);
        tokens.truncate(room);
    }
    Ok(Some(Sequence { prompt: tokens, responses: encoded, cuts }))
}

/// Keeps the last tokens of a prompt, at least one, behind its BOS if it has one.
fn cut_beginning(tokens: &mut Vec<u32>, kept: usize, tokenizer: &Tokenizer) {
    let surplus = tokens.len().saturating_sub(kept);
    let has_bos = tokenizer.bos().is_some() && tokens.first().copied() == tokenizer.bos() && kept > 1;
    let from = usize::from(has_bos);
    tokens.drain(from..from + surplus);
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
/// boundary, `rest` is encoded on its own: behind a line end, since tokenizers of the SentencePiece kind
/// write a space before the first word of every text.
fn encode_after(prompt: &Context<'_>, rest: &str, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    if let Some(tokens) = prompt.followed_by(rest, tokenizer)? {
        return Ok(tokens);
    }
    let line_end = Context { text: "\n", tokens: tokenizer.encode("\n")?.into() };
    match line_end.followed_by(rest, tokenizer)? {
        Some(tokens) => Ok(tokens),
        None => tokenizer.encode(rest),
    }
}

/// The end of a prompt, as much of it as the tokens of a response depend on.
struct Context<'a> {
    text: &'a str,
    tokens: Cow<'a, [u32]>,
}

impl<'a> Context<'a> {
    /// Of a prompt and its tokens without BOS.
    fn of(text: &'a str, tokens: &'a [u32], tokenizer: &Tokenizer) -> Result<Self> {
        if let Some(start) = tokenizer.last_divider(text, tokens) {
            let end = tokenizer.encode(&text[start..])?;
            // not so where the token that was found is not where its text was found
            if tokens.ends_with(&end) {
                return Ok(Self { text: &text[start..], tokens: Cow::Owned(end) });
            }
        }
        Ok(Self { text, tokens: Cow::Borrowed(tokens) })
    }

    /// The tokens of what follows, unless some would merge with those before.
    fn followed_by(&self, rest: &str, tokenizer: &Tokenizer) -> Result<Option<Vec<u32>>> {
        let whole = tokenizer.encode(&format!("{}{rest}", self.text))?;
        Ok(whole.strip_prefix(&*self.tokens).map(<[u32]>::to_vec))
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
