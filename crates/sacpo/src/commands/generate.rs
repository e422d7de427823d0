//! `sacpo generate`.

use align::data::{self, CategorisedPrompt, Prompt};
use engine::generate::{Answer, SamplingOptions};
use engine::{Error, Result};
use serde::Serialize;

use super::print_json;
use crate::answers::{answer, as_taken};
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
    #[serde(skip_serializing_if = "Option::is_none")]
    category: Option<&'a str>,
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
        dtype: options.dtype,
    };
    sampling.validate()?;
    if sampling.temperature == 0.0 && (sampling.top_k > 0 || sampling.top_p < 1.0 || sampling.min_p > 0.0) {
        return Err(Error::input(
            "--top-k, --top-p and --min-p say which tokens are drawn from, but at temperature 0, the default, the likeliest token is \
             taken. Set --temperature above 0, or leave them out.",
        ));
    }
    let alone = |text: &String| CategorisedPrompt { prompt: Prompt::Text(text.clone()), category: None };
    let rows = match &options.prompts {
        Some(path) => data::read_categorised_prompts(path)?,
        None => options.prompt.iter().map(alone).collect(),
    };
    let policy = Policy::load(&options.model, options.extrapolate)?;
    let prompts: Vec<Prompt> = rows.iter().map(|row| row.prompt.clone()).collect();
    let prompts = match options.raw {
        true => prompts,
        false => as_taken(prompts, &policy.first.tokenizer, options.system.as_deref())?,
    };
    let bar = ui::bar(prompts.len() as u64, "answers");
    let mut heartbeat = ui::Heartbeat::new();
    let answers = answer(&policy, &prompts, &sampling, &mut |done| {
        bar.set_position(done as u64);
        heartbeat.beat(&bar, || format!("  {done} of {} answers", prompts.len()));
        Ok(())
    });
    let answers = answers.map_err(|error| match error {
        Error::Interrupted(_) => Error::Interrupted(
            "Stopped, as you asked. Nothing of the answers is kept; a recipe's [evaluate] keeps them as they come."
                .into(),
        ),
        other => other,
    })?;
    bar.finish_and_clear();
    let answered = rows.iter().zip(&answers).map(|(row, answer)| Answered {
        prompt: row.prompt.text(),
        answer,
        category: row.category.as_deref(),
    });
    if global.json {
        return print_json(&Output { answers: answered.collect() });
    }
    for Answered { prompt, answer, .. } in answered {
        ui::print(format!("> {prompt}\n\n{}\n", answer.text.trim_end()))?;
    }
    Ok(())
}
