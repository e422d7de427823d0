//! `sacpo generate`.

use align::data::{self, Prompt};
use engine::generate::{Answer, SamplingOptions};
use engine::{Error, Result};
use serde::Serialize;

use super::print_json;
use crate::answers::{answer, as_chat};
use crate::cli::{Generate, Global};
use crate::policy::Policy;
use crate::ui;

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

/// The text to show for a prompt: the last turn of a conversation.
fn text_of(prompt: &Prompt) -> String {
    match prompt {
        Prompt::Text(text) => text.clone(),
        Prompt::Chat(messages) => messages.last().map(|m| m.content.clone()).unwrap_or_default(),
    }
}
