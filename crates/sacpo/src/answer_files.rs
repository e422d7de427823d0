//! Files of policies' answers, and the comparisons that they make.

use std::collections::HashMap;
use std::path::Path;

use align::data::{self, Record};
use engine::generate::Finish;
use engine::{Error, Result};
use evaluate::judge::Comparison;
use serde::Deserialize as _;
use serde_json::{Map, Value};

/// The answers of one policy.
#[derive(Debug)]
pub(crate) struct AnswerFile {
    /// The policy's name.
    pub(crate) name: String,
    /// Where the answers stand, for messages.
    path: String,
    answers: Vec<Answer>,
}

/// An answer as a file has it.
#[derive(Debug)]
pub(crate) struct Answer {
    prompt: String,
    pub(crate) text: String,
    pub(crate) category: Option<String>,
    /// The number of its tokens, where the row says.
    pub(crate) tokens: Option<usize>,
    /// Why it ended, where the row says.
    pub(crate) finish: Option<Finish>,
}

/// The columns that hold the prompt and the answer, by who writes them.
const COLUMNS: [[&str; 2]; 3] = [
    // `sacpo generate --json`
    ["prompt", "text"],
    ["prompt", "answer"],
    // outputs of alpaca_eval
    ["instruction", "output"],
];

impl AnswerFile {
    /// Reads a file, given as `FILE` or `NAME=FILE`. Without a name it is that of the column `generator`, where all rows have the
    /// same, or else the file's without its endings.
    ///
    /// # Errors
    /// A file that cannot be read, and a row without prompt or answer.
    pub(crate) fn read(source: &str) -> Result<Self> {
        let (name, path) = match source.split_once('=') {
            Some((name, path)) if !Path::new(source).exists() => (Some(name.to_owned()), path),
            _ => (None, source),
        };
        let records = data::read_records(Path::new(path))?;
        let rows: Vec<(&Map<String, Value>, &str)> = records.iter().flat_map(rows_of).collect();
        let answers = rows.iter().map(|(row, place)| answer(row, place)).collect::<Result<Vec<_>>>()?;
        if answers.is_empty() {
            return Err(Error::input(format!("{path} holds no answers. Check that it was written completely.")));
        }
        let generators: Vec<Option<&str>> = rows.iter().map(|(row, _)| text(row, "generator")).collect();
        let same = generators.iter().all(|generator| *generator == generators[0]);
        let generator = generators[0].filter(|name| same && !name.is_empty());
        let name = name.or_else(|| generator.map(str::to_owned)).unwrap_or_else(|| stem(Path::new(path)));
        Ok(Self { name, path: path.to_owned(), answers })
    }

    /// The answers to these prompts, in their order. A prompt that is there several times is matched in order.
    ///
    /// # Errors
    /// Prompts without an answer.
    pub(crate) fn answers_to(&self, prompts: &[String]) -> Result<Vec<&Answer>> {
        let own: HashMap<(&str, usize), &Answer> = numbered(&self.answers, |answer| &answer.prompt).collect();
        let mut lacking = Vec::new();
        let mut answers = Vec::with_capacity(prompts.len());
        for (key, _) in numbered(prompts, String::as_str) {
            match own.get(&key) {
                Some(answer) => answers.push(*answer),
                None => lacking.push(key.0),
            }
        }
        if lacking.is_empty() {
            return Ok(answers);
        }
        Err(Error::input(format!(
            "{} of the {} prompts have no answer in {}: {}. It must hold an answer to every prompt, as often as it is asked and \
             to the letter.",
            lacking.len(),
            prompts.len(),
            self.path,
            first_of(&lacking)
        )))
    }

    /// The answers in their order.
    pub(crate) fn answers(&self) -> &[Answer] {
        &self.answers
    }

    /// The answers, each by its prompt and which of those to this prompt it is, from 1.
    pub(crate) fn numbered(&self) -> impl Iterator<Item = ((&str, usize), &Answer)> {
        numbered(&self.answers, |answer| &answer.prompt)
    }

    /// Comparisons of this policy's answers (A) with another one's (B) to the same prompts, in this one's order. A prompt that is
    /// there several times is matched in order.
    ///
    /// # Errors
    /// Prompts that only one of the two has answered.
    pub(crate) fn compared_with<'a>(&'a self, other: &'a Self) -> Result<Vec<Comparison<'a>>> {
        let mut of_other: HashMap<(&str, usize), &Answer> = numbered(&other.answers, |answer| &answer.prompt).collect();
        let mut comparisons = Vec::new();
        let mut alone = Vec::new();
        for (key, answer) in numbered(&self.answers, |answer| &answer.prompt) {
            match of_other.remove(&key) {
                Some(match_) => comparisons.push(Comparison {
                    prompt: key.0,
                    category: answer.category.as_deref().or(match_.category.as_deref()),
                    names: [&self.name, &other.name],
                    answers: [&answer.text, &match_.text],
                }),
                None => alone.push(key.0),
            }
        }
        let left: Vec<&str> = numbered(&other.answers, |answer| &answer.prompt)
            .filter(|(key, _)| of_other.contains_key(key))
            .map(|(key, _)| key.0)
            .collect();
        for (prompts, has, lacks) in [(alone, self, other), (left, other, self)] {
            if !prompts.is_empty() {
                return Err(unanswered(&prompts, has, lacks));
            }
        }
        Ok(comparisons)
    }
}

/// A file's name without the endings of files of rows.
pub(crate) fn stem(path: &Path) -> String {
    let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let known = [".gz", ".zst", ".jsonl", ".json", ".parquet"];
    known.iter().fold(file, |name, ending| name.strip_suffix(ending).map(str::to_owned).unwrap_or(name))
}

fn unanswered(prompts: &[&str], has: &AnswerFile, lacks: &AnswerFile) -> Error {
    Error::input(format!(
        "{} of the prompts in {} have no answer in {}: {}. Both must hold answers to the same prompts, as often and to the \
         letter; answer those, or remove them.",
        prompts.len(),
        has.path,
        lacks.path,
        first_of(prompts)
    ))
}

/// The first of some prompts, shortened.
fn first_of(prompts: &[&str]) -> String {
    let shown: Vec<String> = prompts.iter().take(3).map(|prompt| format!("{:?}", shortened(prompt))).collect();
    let more = if prompts.len() > shown.len() { ", …" } else { "" };
    format!("{}{more}", shown.join(", "))
}

/// The start of a prompt.
pub(crate) fn shortened(prompt: &str) -> String {
    let mut start: String = prompt.chars().take(60).collect();
    if start.len() < prompt.len() {
        start.push('…');
    }
    start
}

/// Items by their prompt, and how often it was there before.
fn numbered<T>(items: &[T], prompt: impl Fn(&T) -> &str) -> impl Iterator<Item = ((&str, usize), &T)> {
    let mut seen: HashMap<&str, usize> = HashMap::new();
    items.iter().map(move |item| {
        let prompt = prompt(item);
        let count = seen.entry(prompt).or_default();
        *count += 1;
        ((prompt, *count), item)
    })
}

/// The answers of a row: itself, or the list of them in the one object that `sacpo generate --json` prints.
fn rows_of(record: &Record) -> Vec<(&Map<String, Value>, &str)> {
    let place = record.place.as_str();
    match record.columns.get("answers") {
        Some(Value::Array(rows)) => rows.iter().filter_map(Value::as_object).map(|row| (row, place)).collect(),
        _ => vec![(&record.columns, place)],
    }
}

fn answer(row: &Map<String, Value>, place: &str) -> Result<Answer> {
    let found = COLUMNS.iter().find_map(|[prompt, answer]| Some([text(row, prompt)?, text(row, answer)?]));
    let Some([prompt, answer]) = found else {
        let columns: Vec<String> = row.keys().map(|column| format!("`{column}`")).collect();
        return Err(Error::input(format!(
            "{place} is no answer to a prompt: it has the columns {}, but needs `prompt` and `answer` (or `text`), or `instruction` \
             and `output`, all of them texts.",
            columns.join(", ")
        )));
    };
    if prompt.trim().is_empty() {
        return Err(Error::input(format!("{place} has an empty prompt. Correct or remove the row.")));
    }
    let category = data::category_of(row).map(str::to_owned);
    let tokens = match row.get("tokens") {
        Some(Value::Array(tokens)) => Some(tokens.len()),
        Some(number) => number.as_u64().and_then(|number| usize::try_from(number).ok()),
        None => None,
    };
    let finish = row.get("finish").and_then(|finish| Finish::deserialize(finish).ok());
    Ok(Answer { prompt: prompt.to_owned(), text: answer.to_owned(), category, tokens, finish })
}

fn text<'a>(row: &'a Map<String, Value>, column: &str) -> Option<&'a str> {
    row.get(column)?.as_str()
}
