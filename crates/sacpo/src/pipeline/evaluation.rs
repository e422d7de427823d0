//! What policies answer when all are made, and what judges say of it.
//!
//! ```text
//! OUT/answers/SET/POLICY.jsonl      a row for each prompt of the set
//! OUT/verdicts/SET-METRIC.jsonl     what a judge says of them
//! OUT/verdicts.sqlite               every reply of a language model as the judge
//! OUT/ratings.json                  what follows for the policies
//! ```

mod answering;
mod verdicts;

use align::data::{self, CategorisedPrompt, Prompt};
use engine::checkpoint::Checkpoint;
use engine::generate::{Finish, SamplingOptions};
use engine::{Error, Mixture, Result, Tokenizer};
use evaluate::rating::Ratings;
use serde::Serialize;

use super::Run;
use crate::answer_files::AnswerFile;
use crate::answers::{as_taken, tokenize};
use crate::policy::{Policy, PolicyName};
use sacpo::recipe::{Evaluate, ExternalSource, PromptSet, PromptSource, Recipe};

pub(super) use answering::stages;

/// What an evaluation is given, read and checked before anything is made.
pub(crate) struct Inputs {
    sets: Vec<Set>,
    /// The tokens of every set's prompts for the run's own policies, `[set][prompt]`.
    tokens: Vec<Vec<Vec<u32>>>,
    externals: Vec<External>,
}

/// A set of prompts.
struct Set {
    name: String,
    rows: Vec<CategorisedPrompt>,
    /// The prompts as texts to read.
    texts: Vec<String>,
}

/// A policy that is not the run's own.
struct External {
    name: String,
    source: Source,
}

enum Source {
    Model {
        name: PolicyName,
        /// The hash of its weights.
        hash: String,
        tokenizer: String,
        /// The tokens of every set's prompts, `[set][prompt]`.
        tokens: Vec<Vec<Vec<u32>>>,
        end_tokens: Vec<u32>,
    },
    Answers(AnswerFile),
}

/// What came of an evaluation.
pub(crate) struct Evaluation {
    /// The answers, set by set.
    pub(crate) sets: Vec<AnsweredSet>,
    /// The ratings by the name of the verdicts, `SET-METRIC`.
    pub(crate) ratings: Vec<(String, Ratings)>,
}

/// The answers of all policies to a set of prompts.
pub(crate) struct AnsweredSet {
    pub(crate) name: String,
    pub(crate) prompts: Vec<String>,
    /// Every policy's name and its answers, in the order of the prompts.
    pub(crate) policies: Vec<(String, Vec<Answered>)>,
}

/// An answer, a row of a policy's file.
#[derive(Debug, Serialize)]
pub(crate) struct Answered {
    pub(crate) prompt: String,
    pub(crate) text: String,
    /// The number of its tokens without the one that ended it; where a file of answers does not say, those that the text has
    /// for the base model.
    pub(crate) tokens: usize,
    /// Why it ended; nothing where a file of answers does not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) finish: Option<Finish>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) category: Option<String>,
}

/// How long answers are.
#[derive(Debug, Serialize)]
pub(crate) struct Lengths {
    answers: usize,
    pub(crate) mean_tokens: f64,
    /// The share of those that did not end by themselves; nothing where it is not known of all.
    pub(crate) cut: Option<f64>,
}

impl Lengths {
    pub(crate) fn of(answers: &[Answered]) -> Self {
        let count = answers.len() as f64;
        let cut = |answer: &Answered| answer.finish.map(|finish| f64::from(u8::from(finish == Finish::Length)));
        Self {
            answers: answers.len(),
            mean_tokens: answers.iter().map(|answer| answer.tokens as f64).sum::<f64>() / count,
            cut: answers.iter().map(cut).sum::<Option<f64>>().map(|cut| cut / count),
        }
    }
}

impl Inputs {
    /// Reads the prompts, and looks at policies that are not the run's own and at the options of judges.
    ///
    /// # Errors
    /// Files that cannot be read, prompts that a policy cannot answer, answers that are lacking, an endpoint or a key that is
    /// none.
    pub(super) fn load(recipe: &Recipe, base: &Checkpoint) -> Result<Self> {
        let evaluate = &recipe.evaluate;
        let sets = evaluate.prompts.iter().map(Set::read).collect::<Result<Vec<_>>>()?;
        let system = evaluate.system.as_deref();
        let tokens = tokens(&sets, &evaluate.prompts, &base.tokenizer, &(&base.model).into(), system)?;
        options(recipe, Vec::new()).validate()?;
        verdicts::check(recipe)?;
        let mut externals = Vec::new();
        for external in &evaluate.policies {
            let within = |error: Error| match error {
                Error::Input(text) => Error::input(format!("In `evaluate.policy` `{}`: {text}", external.name)),
                other => other,
            };
            let source = Source::load(&external.source, &sets, evaluate).map_err(within)?;
            externals.push(External { name: external.name.clone(), source });
        }
        Ok(Self { sets, tokens, externals })
    }

    /// Adds all that the evaluation depends on, beside the recipe and the run's own policies, to a hash.
    pub(super) fn hash_into(&self, hasher: &mut blake3::Hasher) {
        hasher.update(format!("{:?}", self.tokens).as_bytes());
        for set in &self.sets {
            hasher.update(format!("{:?}", set.rows).as_bytes());
        }
        for external in &self.externals {
            match &external.source {
                Source::Model { hash, tokenizer, tokens, end_tokens, .. } => {
                    hasher.update(format!("{hash} {tokenizer} {tokens:?} {end_tokens:?}").as_bytes())
                }
                Source::Answers(file) => hasher.update(format!("{file:?}").as_bytes()),
            };
        }
    }
}

impl Set {
    fn read(set: &PromptSet) -> Result<Self> {
        let plain = |text: &String| CategorisedPrompt { prompt: Prompt::Text(text.clone()), category: None };
        let rows: Vec<CategorisedPrompt> = match &set.source {
            PromptSource::File(file) => data::read_categorised_prompts(file.path())?,
            PromptSource::Texts(texts) => texts.iter().map(plain).collect(),
        };
        let texts = rows.iter().map(|row| row.prompt.text()).collect();
        Ok(Self { name: set.name.clone(), rows, texts })
    }
}

impl Source {
    fn load(source: &ExternalSource, sets: &[Set], evaluate: &Evaluate) -> Result<Self> {
        match source {
            ExternalSource::Model { given, fetched } => {
                let name = fetched.as_ref().unwrap_or(given).clone();
                let policy = Policy::load(&name, false)?;
                let mixture = policy.mixture()?;
                let tokenizer = &policy.first.tokenizer;
                Ok(Self::Model {
                    name,
                    hash: mixture.hash(),
                    tokenizer: tokenizer.hash(),
                    tokens: tokens(sets, &evaluate.prompts, tokenizer, &mixture, evaluate.system.as_deref())?,
                    end_tokens: policy.first.generation.eos_token_ids.clone(),
                })
            }
            ExternalSource::Answers(file) => {
                let file = AnswerFile::read(&file.path().to_string_lossy())?;
                for set in sets {
                    file.answers_to(&set.texts)?;
                }
                Ok(Self::Answers(file))
            }
        }
    }
}

/// The tokens of every set's prompts as a policy takes them, `[set][prompt]`.
fn tokens(
    sets: &[Set],
    planned: &[PromptSet],
    tokenizer: &Tokenizer,
    policy: &Mixture<'_>,
    system: Option<&str>,
) -> Result<Vec<Vec<Vec<u32>>>> {
    let of_set = |(set, planned): (&Set, &PromptSet)| {
        let place = match &planned.source {
            PromptSource::File(file) => file.to_string(),
            PromptSource::Texts(_) => format!("`evaluate.prompts` of the recipe, set `{}`", set.name),
        };
        as_taken(set.rows.iter().map(|row| row.prompt.clone()), tokenizer, system)
            .and_then(|prompts| tokenize(tokenizer, [policy.vocab_size(), policy.context()], &prompts))
            .map_err(|error| Error::input(format!("In {place}: {error}")))
    };
    sets.iter().zip(planned).map(of_set).collect()
}

/// How a policy with these end tokens answers.
fn options(recipe: &Recipe, end_tokens: Vec<u32>) -> SamplingOptions {
    let evaluate = &recipe.evaluate;
    SamplingOptions {
        max_new_tokens: evaluate.max_new_tokens,
        temperature: evaluate.temperature,
        top_p: evaluate.top_p,
        seed: evaluate.seed.unwrap_or(recipe.run.seed),
        end_tokens,
        stop: evaluate.stop.clone(),
        batch_size: evaluate.batch_size,
        dtype: evaluate.dtype,
        ..SamplingOptions::default()
    }
}

/// Lets all policies answer, and judges judge.
///
/// # Errors
/// Those of generating, judging and writing. What there is by then is kept.
pub(super) fn carry_out(run: &Run<'_>) -> Result<Evaluation> {
    run.folder.remove_evaluation()?;
    let sets = answering::answer_all(run)?;
    let ratings = verdicts::judge_all(run, &sets)?;
    Ok(Evaluation { sets, ratings })
}
