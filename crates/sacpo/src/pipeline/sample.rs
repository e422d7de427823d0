//! Prompts of a constraint, and answers that policies draw for them.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;

use align::data;
use align::judge::relative_to;
use align::sequences::Sequences;
use align::tabular::Table;
use engine::generate::SamplingOptions;
use engine::{Error, Result};

use super::drawing::Drawing;
use super::{Policy, Run, judge};
use crate::answers::{as_taken, tokenize};
use crate::ui;
use sacpo::recipe::ChoiceOptions;

/// Answers that are kept together: what is lost when a sampling is killed.
const BLOCK: usize = 1024;

/// Answers that are generated at once.
const BATCH: usize = 64;

/// Answers that are scored in one pass with their prompt.
const SCORED_TOGETHER: usize = 16;

/// Tokens of answers with the token that ended them, `[prompt][answer]`.
type Answers = Vec<Vec<Vec<u32>>>;

/// Prompts for which answers are drawn.
pub(super) struct Prompts {
    tokens: Vec<Vec<u32>>,
    options: SamplingOptions,
    /// Answers for each prompt.
    answers: usize,
}

impl Prompts {
    /// The prompts to choose from and those that are held out, as tokens: those of the files, or of the step's data.
    ///
    /// # Errors
    /// Files that cannot be read; fewer than two prompts of either kind; prompts that the model cannot answer.
    pub(super) fn both(run: &Run<'_>, choice: &ChoiceOptions, step: usize) -> Result<[Self; 2]> {
        let data = &run.data[step];
        let of_data = |sequences: Vec<Sequences<'_>>| sequences.iter().map(|item| item.prompt.to_vec()).collect();
        let choosing = match &choice.prompts {
            Some(prompts) => read(run, prompts.path(), data.plain_text)?,
            None => of_data(data.train.sequences()),
        };
        let held_out = match &choice.held_out_prompts {
            Some(prompts) => read(run, prompts.path(), data.plain_text)?,
            None => of_data(data.validation.sequences()),
        };
        let stopping = run.recipe.steps.iter().find(|step| step.train.patience.is_some());
        if let (Some(step), None) = (stopping, &choice.held_out_prompts) {
            return Err(Error::input(format!(
                "The step `{}` chooses its weights by the held-out rows (train.patience), so these cannot certify what becomes of \
                 it. Set constraint.held_out_prompts to a file of other prompts, or leave train.patience out.",
                step.name
            )));
        }
        let choosing = different(choosing, &[]);
        let all = held_out.len();
        let trained = run.data.iter().flat_map(|data| data.train.sequences()).map(|item| item.prompt.to_vec());
        let known: Vec<Vec<u32>> = trained.chain(choosing.iter().cloned()).collect();
        let held_out = different(held_out, &known);
        if let Some(prompts) = choice.held_out_prompts.as_ref().filter(|_| held_out.len() < 2 && all >= 2) {
            return Err(Error::input(format!(
                "Almost all prompts of {prompts} are among those that steps train on or that λ is chosen from, so nothing is held \
                 out. Give other prompts."
            )));
        }
        if held_out.len() < all {
            ui::say(format!(
                "Constraint: {} of {all} prompts are left out of the certificate, since they repeat others, or are trained on or \
                 chosen from.",
                all - held_out.len()
            ));
        }
        let kinds =
            [(choosing, "prompts", "choose λ from", 0), (held_out, "held_out_prompts", "judge the policy on", 1)];
        let checked = kinds.map(|(tokens, key, purpose, stream)| {
            let tokens = some_of(tokens, choice.max_prompts, run.recipe.run.seed);
            if tokens.len() < 2 {
                return Err(Error::input(format!(
                    "The constraint has {} different prompts to {purpose}, but needs two or more; a hundred are usual. Set \
                     constraint.{key} to a file of prompts.",
                    tokens.len()
                )));
            }
            let config = &run.base.config;
            engine::generate::check_prompts(config.vocab_size, config.max_position_embeddings, &tokens)?;
            let options = SamplingOptions {
                max_new_tokens: choice.max_new_tokens,
                temperature: 1.0,
                // other draws for prompts that are held out
                seed: run.recipe.run.seed.wrapping_mul(2).wrapping_add(stream),
                end_tokens: run.base.generation.eos_token_ids.clone(),
                batch_size: BATCH,
                ..SamplingOptions::default()
            };
            Ok(Self { tokens, options, answers: choice.answers })
        });
        let [choosing, held_out] = checked;
        Ok([choosing?, held_out?])
    }

    pub(super) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// What a policy's answers score by each metric, `[metric][prompt][answer]`. Of an implicit reward these are differences
    /// from the mean score of the base model's answers to the same prompt.
    pub(super) fn scores(&self, run: &Run<'_>, policy: &Policy, metrics: &[&str]) -> Result<Vec<Table>> {
        let answers = self.answers(run, policy)?;
        let base = &run.policies[0];
        let of_metric = |metric: &&str| {
            let mut table = self.judged(run, metric, &answers)?;
            if judge::is_relative(run, metric) {
                let of_base = if policy.name() == base.name() {
                    table.clone()
                } else {
                    self.judged(run, metric, &self.answers(run, base)?)?
                };
                relative_to(&mut table, &of_base);
            }
            Ok(table)
        };
        metrics.iter().map(of_metric).collect()
    }

    /// The share of a policy's answers that did not end by themselves.
    pub(super) fn unfinished(&self, run: &Run<'_>, policy: &Policy) -> Result<f64> {
        let answers = self.answers(run, policy)?;
        let ends = |answer: &&Vec<u32>| answer.last().is_some_and(|last| self.options.end_tokens.contains(last));
        let ended = answers.iter().flatten().filter(ends).count();
        Ok(1.0 - ended as f64 / answers.iter().map(Vec::len).sum::<usize>() as f64)
    }

    /// The scores of answers, each different one judged once.
    fn judged(&self, run: &Run<'_>, metric: &str, answers: &Answers) -> Result<Table> {
        let different: Vec<Vec<&[u32]>> = answers.iter().map(|of_prompt| sorted(of_prompt)).collect();
        let mut items = Vec::new();
        for (row, (prompt, responses)) in self.tokens.iter().zip(&different).enumerate() {
            let parts = responses.chunks(SCORED_TOGETHER);
            items.extend(parts.map(|part| Sequences { prompt, responses: part.to_vec(), row: row + 1 }));
        }
        let scores = judge::scores(run, metric, &items, None)?;
        let mut scores = scores.into_iter().flatten();
        let of_prompt = |(answers, different): (&Vec<Vec<u32>>, &Vec<&[u32]>)| {
            let own: Vec<f64> = scores.by_ref().take(different.len()).collect();
            let score = |answer: &Vec<u32>| different.binary_search(&answer.as_slice()).map_or(f64::NAN, |at| own[at]);
            answers.iter().map(score).collect()
        };
        Ok(answers.iter().zip(&different).map(of_prompt).collect())
    }

    /// The policy's answers, drawn at temperature 1 and kept.
    fn answers(&self, run: &Run<'_>, policy: &Policy) -> Result<Answers> {
        let each = |prompt: &Vec<u32>| std::iter::repeat_n(prompt.clone(), self.answers);
        let repeated: Vec<Vec<u32>> = self.tokens.iter().flat_map(each).collect();
        let per_block = (BLOCK / self.answers).max(1) * self.answers;
        let drawing = Drawing::open(&run.folder.cache(), policy.hash(), &repeated, per_block, &self.options);
        let drawn = match drawing.kept() {
            Some(answers) => answers,
            None => {
                let (each, prompts) = (self.answers, self.tokens.len());
                ui::say(format!("  {each} answers of {} to each of {prompts} prompts.", policy.name()));
                let loaded = policy.load()?;
                let bar = ui::bar(repeated.len() as u64, &format!("answers of {}", policy.name()));
                // tokens are judged, and no text is needed
                let no_text = |_: &[u32]| Ok(String::new());
                let answers = drawing.complete(&loaded.mixture()?, &no_text, &mut ui::advance(&bar))?;
                bar.finish_and_clear();
                answers
            }
        };
        let tokens: Vec<Vec<u32>> = drawn.into_iter().map(|answer| ended(answer.tokens, answer.end)).collect();
        Ok(tokens.chunks(self.answers).map(<[_]>::to_vec).collect())
    }
}

/// An answer's tokens with the token that ended it.
fn ended(mut tokens: Vec<u32>, end: Option<u32>) -> Vec<u32> {
    tokens.extend(end);
    tokens
}

/// The prompts of a file as the model takes them: as plain text, or in the chat template if there is one.
fn read(run: &Run<'_>, path: &Path, plain_text: bool) -> Result<Vec<Vec<u32>>> {
    let tokenizer = &run.base.tokenizer;
    let prompts = data::read_prompts(path)?;
    let prompts = if plain_text { prompts } else { as_taken(prompts, tokenizer, None)? };
    let config = &run.base.config;
    tokenize(tokenizer, [config.vocab_size, config.max_position_embeddings], &prompts)
        .map_err(|error| Error::input(format!("In {}: {error}", path.display())))
}

/// Different prompts in their order, without those of `others`.
fn different(prompts: Vec<Vec<u32>>, others: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let mut seen: HashSet<Vec<u32>> = others.iter().cloned().collect();
    prompts.into_iter().filter(|prompt| seen.insert(prompt.clone())).collect()
}

/// So many prompts at most, drawn by `seed`, in their order: the first ones of a file may be of one kind.
fn some_of(mut prompts: Vec<Vec<u32>>, most: usize, seed: u64) -> Vec<Vec<u32>> {
    let drawn = |prompt: &Vec<u32>| blake3::hash(format!("{seed} {prompt:?}").as_bytes()).as_bytes().to_owned();
    if let Some(beyond) = prompts.iter().map(drawn).collect::<BTreeSet<_>>().into_iter().nth(most) {
        prompts.retain(|prompt| drawn(prompt) < beyond);
    }
    prompts
}

/// The different answers in order.
fn sorted(answers: &[Vec<u32>]) -> Vec<&[u32]> {
    let mut sorted: Vec<&[u32]> = answers.iter().map(Vec::as_slice).collect();
    sorted.sort_unstable();
    sorted.dedup();
    sorted
}
