//! What policies answered, and the verdicts on it.

use std::collections::HashMap;
use std::path::Path;

use engine::Result;
use engine::generate::Finish;
use evaluate::report::{Answer, AnswerSet, AnsweredPrompt, Judged};
use evaluate::verdict::Verdict;

use super::{entries, name_of};
use crate::answer_files::{self, AnswerFile};
use crate::commands::read_verdicts;

/// A file of verdicts: `SET-METRIC.jsonl` in a run.
#[derive(Debug)]
pub(super) struct VerdictFile {
    /// Its name without ending.
    pub(super) name: String,
    pub(super) verdicts: Vec<Verdict>,
}

impl VerdictFile {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let name = answer_files::stem(path);
        Ok(Self { name, verdicts: read_verdicts(&[path.to_owned()])? })
    }

    /// Those of a run folder.
    pub(super) fn all(run: &Path, missing: &mut Vec<String>) -> Vec<Self> {
        let mut kept = |file: Result<Self>| file.map_err(|error| missing.push(error.to_string())).ok();
        entries(&run.join("verdicts")).iter().filter_map(|path| kept(Self::read(path))).collect()
    }
}

/// The answers of a run, by sets of prompts.
#[derive(Debug, Default)]
pub(super) struct Answers {
    sets: Vec<(String, Vec<AnswerFile>)>,
}

impl Answers {
    /// Those of a run folder, whose policies are in this order.
    pub(super) fn read(run: &Path, order: &[String], missing: &mut Vec<String>) -> Self {
        let mut kept = |file: Result<AnswerFile>| file.map_err(|error| missing.push(error.to_string())).ok();
        let mut sets = Vec::new();
        for folder in entries(&run.join("answers")) {
            let Some(name) = name_of(&folder) else { continue };
            let read = |path: &std::path::PathBuf| AnswerFile::read(&path.to_string_lossy());
            sets.push((name, entries(&folder).iter().filter_map(|path| kept(read(path))).collect::<Vec<_>>()));
        }
        sets.retain(|(_, files)| !files.is_empty());
        for (_, files) in &mut sets {
            files.sort_by_key(|file| order.iter().position(|name| *name == file.name).unwrap_or(usize::MAX));
        }
        if sets.is_empty() {
            missing.push("There are no answers: the policies of the run have not been asked anything.".into());
        }
        Self { sets }
    }

    /// Adds files, given as `FILE` or `NAME=FILE`, as a set of their own.
    pub(super) fn add(&mut self, files: &[String]) -> Result<()> {
        if !files.is_empty() {
            let files = files.iter().map(|file| AnswerFile::read(file)).collect::<Result<Vec<_>>>()?;
            self.sets.push(("answers".into(), files));
        }
        Ok(())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.sets.is_empty()
    }

    /// The numbers of answers and of their tokens, as far as these are known.
    pub(super) fn amount(&self) -> (usize, usize) {
        let all = || self.sets.iter().flat_map(|(_, files)| files).flat_map(AnswerFile::answers);
        (all().count(), all().filter_map(|answer| answer.tokens).sum())
    }

    /// The sets with the verdicts on them; those on other prompts or policies are counted.
    pub(super) fn sets(
        self,
        verdicts: &[VerdictFile],
        chosen: Option<&str>,
        missing: &mut Vec<String>,
    ) -> Vec<AnswerSet> {
        let names: Vec<String> = self.sets.iter().map(|(name, _)| format!("{name}-")).collect();
        let sets = self.sets.into_iter().zip(&names).map(|((name, files), prefix)| {
            // a file that is named after no set may be about any of them
            let is_about =
                |file: &&VerdictFile| file.name.starts_with(prefix) || !names.iter().any(|name| file.name.starts_with(name));
            let mut set = set_of(name, &files, chosen);
            let mut unknown = 0;
            let places = Places::of(&set);
            let mut judged = Vec::new();
            for verdict in verdicts.iter().filter(is_about).flat_map(|file| &file.verdicts) {
                match places.judged(verdict) {
                    Some(verdict) => judged.push(verdict),
                    None => unknown += 1,
                }
            }
            if unknown > 0 {
                missing.push(format!(
                    "{unknown} verdicts are not beside the answers of {}: they are on prompts or policies that it does not have.",
                    set.name
                ));
            }
            set.verdicts = judged;
            set
        });
        sets.collect()
    }
}

/// The answers side by side; a prompt that is there several times is matched in order.
fn set_of(name: String, files: &[AnswerFile], chosen: Option<&str>) -> AnswerSet {
    let policies: Vec<String> = files.iter().map(|file| file.name.clone()).collect();
    let mut prompts: Vec<AnsweredPrompt> = Vec::new();
    let mut places: HashMap<(&str, usize), usize> = HashMap::new();
    for (policy, file) in files.iter().enumerate() {
        for (key, answer) in file.numbered() {
            let place = *places.entry(key).or_insert_with(|| {
                let text = key.0.to_owned();
                prompts.push(AnsweredPrompt { text, category: None, answers: vec![None; files.len()] });
                prompts.len() - 1
            });
            let prompt = &mut prompts[place];
            prompt.category = prompt.category.take().or_else(|| answer.category.clone());
            prompt.answers[policy] = Some(Answer {
                text: answer.text.clone(),
                tokens: answer.tokens,
                cut: answer.finish == Some(Finish::Length),
            });
        }
    }
    // the base model, what was made of it first, and the policy for the constraint or else the last one
    let last =
        chosen.and_then(|name| policies.iter().position(|policy| policy == name)).or(policies.len().checked_sub(1));
    let mut shown: Vec<usize> = (0..policies.len().min(2)).chain(last).collect();
    shown.dedup();
    AnswerSet { name, policies, shown, prompts, verdicts: Vec::new() }
}

/// Where prompts and policies of a set are.
struct Places<'a> {
    prompts: HashMap<&'a str, usize>,
    policies: HashMap<&'a str, usize>,
}

impl<'a> Places<'a> {
    fn of(set: &'a AnswerSet) -> Self {
        // of a prompt that is there several times the first
        let prompts =
            set.prompts.iter().enumerate().rev().map(|(place, prompt)| (prompt.text.as_str(), place)).collect();
        Self { prompts, policies: set.policies.iter().map(String::as_str).zip(0..).collect() }
    }

    fn judged(&self, verdict: &Verdict) -> Option<Judged> {
        Some(Judged {
            prompt: *self.prompts.get(&*verdict.prompt)?,
            metric: verdict.metric.clone().unwrap_or_else(|| "verdict".into()),
            pair: [*self.policies.get(&*verdict.a)?, *self.policies.get(&*verdict.b)?],
            outcome: verdict.outcome,
            scores: verdict.scores,
        })
    }
}
