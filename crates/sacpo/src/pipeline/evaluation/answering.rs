//! The answers of all policies to all sets of prompts.

use std::collections::HashSet;

use engine::checkpoint::atomic;
use engine::generate::Answer;
use engine::{Error, Result};

use super::{Answered, AnsweredSet, External, Set, Source, options};
use crate::pipeline::Run;
use crate::pipeline::drawing::Drawing;
use crate::policy::Policy;
use crate::ui;

/// Prompts whose answers are kept together: what is lost when a process is killed.
const BLOCK: usize = 32;

/// What of the answers to one set is there already.
pub(in crate::pipeline) struct Stage {
    pub(in crate::pipeline) name: String,
    /// Blocks of answers that are kept, and all.
    pub(in crate::pipeline) blocks: [usize; 2],
    /// Names of the policies that are not the run's own.
    pub(in crate::pipeline) externals: Vec<String>,
}

/// What of the answers is there, of the run's own policies with these hashes, as far as they are known, and of others.
pub(in crate::pipeline) fn stages(run: &Run<'_>, hashes: &[Option<String>]) -> Vec<Stage> {
    let inputs = run.evaluation;
    let of_set = |(number, set): (usize, &Set)| {
        let all = inputs.tokens[number].len().div_ceil(BLOCK);
        let mut blocks = [0, 0];
        let own = hashes.iter().map(|hash| hash.as_ref().map(|hash| Kind::own(run, hash)));
        let others = inputs.externals.iter().filter_map(|external| external.kind().map(Some));
        for kind in own.chain(others) {
            let [kept, of] = kind.map_or([0, all], |kind| kind.open(run, number).blocks());
            blocks = [blocks[0] + kept, blocks[1] + of];
        }
        let externals = inputs.externals.iter().map(|external| external.name.clone()).collect();
        Stage { name: set.name.clone(), blocks, externals }
    };
    inputs.sets.iter().enumerate().map(of_set).collect()
}

/// What the answers of a policy depend on beside the options of the recipe.
struct Kind<'a> {
    hash: &'a str,
    tokenizer: String,
    /// The prompts of every set, `[set][prompt]`.
    tokens: &'a [Vec<Vec<u32>>],
    end_tokens: &'a [u32],
}

impl<'a> Kind<'a> {
    /// The run's own policies have the base model's tokenizer.
    fn own(run: &'a Run<'_>, hash: &'a str) -> Self {
        Self {
            hash,
            tokenizer: run.base.tokenizer.hash(),
            tokens: &run.evaluation.tokens,
            end_tokens: &run.base.generation.eos_token_ids,
        }
    }

    /// What is kept of the answers to a set.
    fn open(&self, run: &Run<'_>, set: usize) -> Drawing<'a> {
        let identity = format!("{} {}", self.hash, self.tokenizer);
        let options = options(run.recipe, self.end_tokens.to_vec());
        Drawing::open(&run.folder.cache(), &identity, &self.tokens[set], BLOCK, &options)
    }
}

impl External {
    /// Nothing for a file of answers.
    fn kind(&self) -> Option<Kind<'_>> {
        match &self.source {
            Source::Model { hash, tokenizer, tokens, end_tokens, .. } => {
                Some(Kind { hash, tokenizer: tokenizer.clone(), tokens, end_tokens })
            }
            Source::Answers(_) => None,
        }
    }
}

/// Lets every policy answer every set, and writes the answers.
///
/// # Errors
/// Those of generating and writing; two policies of one name.
pub(super) fn answer_all(run: &Run<'_>) -> Result<Vec<AnsweredSet>> {
    let inputs = run.evaluation;
    check_names(run)?;
    let empty = |set: &Set| AnsweredSet { name: set.name.clone(), prompts: set.texts.clone(), policies: Vec::new() };
    let mut sets: Vec<AnsweredSet> = inputs.sets.iter().map(empty).collect();
    let mut add = |name: &str, answers: Vec<Vec<Answered>>| {
        for (set, answers) in sets.iter_mut().zip(answers) {
            write(run, &set.name, name, &answers)?;
            set.policies.push((name.to_owned(), answers));
        }
        Ok::<_, Error>(())
    };
    for policy in &run.policies {
        let kind = Kind::own(run, policy.hash());
        add(policy.name(), drawn(run, policy.name(), &kind, &|| policy.load())?)?;
    }
    for external in &inputs.externals {
        let answers = match (&external.source, external.kind()) {
            (Source::Model { name, hash, .. }, Some(kind)) => {
                let load = || {
                    let policy = Policy::load(name, false)?;
                    if policy.mixture()?.hash() == *hash {
                        return Ok(policy);
                    }
                    Err(Error::input(format!("The model {name} has changed since the run began. Start the run again.")))
                };
                drawn(run, &external.name, &kind, &load)?
            }
            (Source::Answers(file), _) => {
                inputs.sets.iter().map(|set| given(run, set, &file.answers_to(&set.texts)?)).collect::<Result<_>>()?
            }
            _ => Vec::new(),
        };
        add(&external.name, answers)?;
    }
    Ok(sets)
}

/// Fails if a constraint has made a policy that is called like one that is not the run's own.
fn check_names(run: &Run<'_>) -> Result<()> {
    let own: HashSet<&str> = run.policies.iter().map(|policy| policy.name()).collect();
    match run.evaluation.externals.iter().find(|external| own.contains(external.name.as_str())) {
        Some(External { name, .. }) => Err(Error::input(format!(
            "Two policies would be called `{name}`: one that the recipe's constraint asks for and one of `evaluate.policy`. Give the \
             latter another `name`."
        ))),
        None => Ok(()),
    }
}

/// The answers of a policy to every set, `[set][prompt]`. It is loaded if any are not kept.
fn drawn(run: &Run<'_>, name: &str, kind: &Kind<'_>, load: &dyn Fn() -> Result<Policy>) -> Result<Vec<Vec<Answered>>> {
    let mut loaded: Option<Policy> = None;
    let mut of_set = |(number, set): (usize, &Set)| {
        let drawing = kind.open(run, number);
        let answers = match drawing.kept() {
            Some(answers) => answers,
            None => {
                let policy = match loaded.take() {
                    Some(policy) => policy,
                    None => load()?,
                };
                let total = set.rows.len();
                ui::say(format!("Answers of {name} to {total} prompts of {}.", set.name));
                let bar = ui::bar(total as u64, &format!("answers of {name}"));
                let mut heartbeat = ui::Heartbeat::new();
                let mut advance = ui::advance(&bar);
                let tokenizer = &policy.first.tokenizer;
                let answers = drawing.complete(&policy.mixture()?, &|ids| tokenizer.decode(ids), &mut |done| {
                    heartbeat.beat(&bar, || format!("  {done} of {total} answers"));
                    advance(done)
                })?;
                bar.finish_and_clear();
                loaded = Some(policy);
                answers
            }
        };
        Ok(set
            .rows
            .iter()
            .zip(&set.texts)
            .zip(answers)
            .map(|((row, prompt), answer)| {
                let Answer { tokens, text, finish, .. } = answer;
                Answered {
                    prompt: prompt.clone(),
                    text,
                    tokens: tokens.len(),
                    finish: Some(finish),
                    category: row.category.clone(),
                }
            })
            .collect())
    };
    run.evaluation.sets.iter().enumerate().map(&mut of_set).collect()
}

/// The answers that a file has to a set.
fn given(run: &Run<'_>, set: &Set, answers: &[&crate::answer_files::Answer]) -> Result<Vec<Answered>> {
    let of_prompt =
        |((row, prompt), answer): ((&align::data::CategorisedPrompt, &String), &&crate::answer_files::Answer)| {
            let tokens = match answer.tokens {
                Some(tokens) => tokens,
                None => run.base.tokenizer.encode(&answer.text)?.len(),
            };
            Ok(Answered {
                prompt: prompt.clone(),
                text: answer.text.clone(),
                tokens,
                finish: answer.finish,
                category: row.category.clone(),
            })
        };
    set.rows.iter().zip(&set.texts).zip(answers).map(of_prompt).collect()
}

/// Writes the answers of a policy to a set.
fn write(run: &Run<'_>, set: &str, policy: &str, answers: &[Answered]) -> Result<()> {
    let folder = run.folder.path.join("answers").join(set);
    std::fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
    atomic::write_file(&folder.join(format!("{policy}.jsonl")), |out| {
        for answer in answers {
            serde_json::to_writer(&mut *out, answer)?;
            out.write_all(b"\n")?;
        }
        Ok(())
    })
}
