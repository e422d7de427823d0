//! Prompts as a policy takes them, and its answers.

use align::data::{self, Prompt};
use engine::chat::Message;
use engine::checkpoint::Checkpoint;
use engine::generate::{Answer, SamplingOptions, check_prompts, generate};
use engine::{Error, Result, Tokenizer};

use crate::interrupt;
use crate::policy::Policy;

/// Answers prompts with a policy; its model's own end tokens end an answer too.
pub(crate) fn answer(
    policy: &Policy,
    prompts: &[Prompt],
    sampling: &SamplingOptions,
    progress: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<Vec<Answer>> {
    let Checkpoint { tokenizer, generation, .. } = &policy.first;
    let mixture = policy.mixture()?;
    let tokens = tokenize(tokenizer, [mixture.vocab_size(), mixture.context()], prompts)?;
    let mut sampling = sampling.clone();
    sampling.end_tokens.extend(&generation.eos_token_ids);
    generate(mixture, &tokens, &sampling, &|ids| tokenizer.decode(ids), &mut |done| {
        interrupt::check()?;
        progress(done)
    })
}

/// The tokens of prompts, all of which a policy of this vocabulary and context can answer.
pub(crate) fn tokenize(
    tokenizer: &Tokenizer,
    [vocab_size, context]: [usize; 2],
    prompts: &[Prompt],
) -> Result<Vec<Vec<u32>>> {
    let numbered = prompts.iter().enumerate().map(|(index, prompt)| {
        data::tokenize_prompt(prompt, tokenizer)
            .map_err(|error| Error::input(format!("Prompt {} cannot be tokenised. {error}", index + 1)))
    });
    let tokens = numbered.collect::<Result<Vec<_>>>()?;
    check_prompts(vocab_size, context, &tokens)?;
    Ok(tokens)
}

/// Prompts as a model takes them: as conversations if its tokenizer has a chat template, after the system message if there is one.
///
/// # Errors
/// A system message without a chat template.
pub(crate) fn as_taken(
    prompts: impl IntoIterator<Item = Prompt>,
    tokenizer: &Tokenizer,
    system: Option<&str>,
) -> Result<Vec<Prompt>> {
    let chat = tokenizer.has_chat_template();
    if system.is_some() && !chat {
        return Err(Error::input(
            "A system message needs a chat template, and this model has none. Leave the message out, or write the text into \
             the prompt.",
        ));
    }
    Ok(prompts.into_iter().map(|prompt| if chat { as_chat(prompt, system) } else { prompt }).collect())
}

/// A plain prompt as the user's turn of a conversation; conversations stay, but for the system message.
pub(crate) fn as_chat(prompt: Prompt, system: Option<&str>) -> Prompt {
    let message = |role: &str, content: String| Message { role: role.into(), content };
    let mut messages = match prompt {
        Prompt::Text(text) => vec![message("user", text)],
        Prompt::Chat(messages) => messages,
    };
    if let Some(system) = system {
        messages.retain(|m| m.role != "system");
        messages.insert(0, message("system", system.to_owned()));
    }
    Prompt::Chat(messages)
}
