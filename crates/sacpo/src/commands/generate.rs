//! `sacpo generate`.

use align::data::{self, Prompt};
use engine::chat::Message;
use engine::checkpoint::Checkpoint;
use engine::generate::{Answer, SamplingOptions, check_prompts, generate};
use engine::{Error, Mixture, Result, Tokenizer};
use serde::Serialize;

use super::{print_json, start_threads};
use crate::cli::{Generate, Global};
use crate::policy::Policy;
use crate::{interrupt, ui};

#[derive(Serialize)]
struct Output<'a> {
    answers: Vec<Answered<'a>>,
}

#[derive(Serialize)]
struct Answered<'a> {
    prompt: String,
    #[serde(flatten)]
    answer: &'a Answer,
}

pub(super) fn run(options: &Generate, global: Global) -> Result<()> {
    start_threads(global, None)?;
    let sampling = SamplingOptions {
        max_new_tokens: options.max_new_tokens,
        temperature: options.temperature,
        top_k: options.top_k,
        top_p: options.top_p,
        min_p: options.min_p,
        seed: options.seed,
        end_tokens: Vec::new(),
        stop: options.stop.clone(),
        batch_size: options.batch_size,
    };
    sampling.validate()?;
    let prompts = match &options.prompts {
        Some(path) => data::read_prompts(path)?,
        None => options.prompt.iter().map(|text| Prompt::Text(text.clone())).collect(),
    };
    let policy = Policy::load(&options.model, options.extrapolate)?;
    let has_template = policy.first.tokenizer.has_chat_template();
    if options.system.is_some() && !has_template {
        return Err(Error::input(
            "--system needs a chat template, and this model has none. Leave --system out, or write the text into the \
             prompt.",
        ));
    }
    let chat = has_template && !options.raw;
    let prompts: Vec<Prompt> =
        prompts.into_iter().map(|p| if chat { as_chat(p, options.system.as_deref()) } else { p }).collect();
    let bar = ui::bar(prompts.len() as u64, "answers");
    let mut advance = ui::advance(&bar);
    let answers = answer(&policy, &prompts, &sampling, &mut advance)?;
    bar.finish_and_clear();
    if global.json {
        let answers = prompts.iter().zip(&answers).map(|(p, answer)| Answered { prompt: text_of(p), answer }).collect();
        return print_json(&Output { answers });
    }
    for (prompt, answer) in prompts.iter().zip(&answers) {
        ui::print(format!("> {}\n\n{}\n", text_of(prompt), answer.text.trim_end()))?;
    }
    Ok(())
}

/// Answers prompts with a policy; its model's own end tokens end an answer too.
pub(crate) fn answer(
    policy: &Policy,
    prompts: &[Prompt],
    sampling: &SamplingOptions,
    finished: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<Vec<Answer>> {
    let Checkpoint { tokenizer, generation, .. } = &policy.first;
    let mixture = policy.mixture()?;
    let tokens = tokenize(tokenizer, &mixture, prompts)?;
    let mut sampling = sampling.clone();
    sampling.end_tokens.extend(&generation.eos_token_ids);
    generate(mixture, &tokens, &sampling, &|ids| tokenizer.decode(ids), &mut |done| {
        interrupt::check()?;
        finished(done)
    })
}

/// The tokens of prompts, all of which the policy can answer.
pub(crate) fn tokenize(tokenizer: &Tokenizer, policy: &Mixture<'_>, prompts: &[Prompt]) -> Result<Vec<Vec<u32>>> {
    let numbered = prompts.iter().enumerate().map(|(index, prompt)| {
        data::tokenize_prompt(prompt, tokenizer)
            .map_err(|error| Error::input(format!("Prompt {} cannot be tokenised. {error}", index + 1)))
    });
    let tokens = numbered.collect::<Result<Vec<_>>>()?;
    check_prompts(policy, &tokens)?;
    Ok(tokens)
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

/// The text to show for a prompt: the last turn of a conversation.
fn text_of(prompt: &Prompt) -> String {
    match prompt {
        Prompt::Text(text) => text.clone(),
        Prompt::Chat(messages) => messages.last().map(|m| m.content.clone()).unwrap_or_default(),
    }
}
