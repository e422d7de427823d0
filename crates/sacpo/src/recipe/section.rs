//! Typed access to the keys of one table of a recipe, with errors that name key, place and allowed values.

use std::collections::BTreeMap;
use std::ops::{Bound, RangeBounds};

use engine::{Error, Result};

use super::tree::{Node, Table, Value};
use crate::suggest::nearest;

/// No count in a recipe is larger, so that sums and products of a few of them fit any integer.
const MAX_COUNT: usize = 1_000_000_000;

/// One table of a recipe.
#[derive(Clone)]
pub(super) struct Section<'a> {
    /// The path of the table: `train`, or `step.2`; empty for the whole document.
    path: String,
    table: &'a Table,
    /// Where the table begins.
    origin: String,
}

impl<'a> Section<'a> {
    /// The whole document.
    pub(super) fn root(table: &'a Table, origin: &str) -> Self {
        Self { path: String::new(), table, origin: origin.to_string() }
    }

    /// The table under `key`, or an empty one.
    pub(super) fn section(&self, key: &str) -> Result<Self> {
        static EMPTY: Table = Table::new();
        let path = self.path_of(key);
        match self.table.get(key) {
            None => Ok(Self { path, table: &EMPTY, origin: self.origin.clone() }),
            Some(Node { value: Value::Table(table), origin }) => Ok(Self { path, table, origin: origin.clone() }),
            Some(node) => Err(self.wrong(key, node, &format!("a section, written `[{key}]`"))),
        }
    }

    /// The tables of the list `[[key]]`, numbered from 1; none if the key is missing.
    pub(super) fn sections(&self, key: &str) -> Result<Vec<Self>> {
        let name = self.path_of(key);
        let expected = format!("a list of sections, each written `[[{name}]]` with two pairs of brackets");
        let Some(node) = self.table.get(key) else { return Ok(Vec::new()) };
        let Value::Array(items) = &node.value else { return Err(self.wrong(key, node, &expected)) };
        items
            .iter()
            .enumerate()
            .map(|(i, item)| match &item.value {
                Value::Table(table) => {
                    Ok(Self { path: format!("{}.{}", self.path_of(key), i + 1), table, origin: item.origin.clone() })
                }
                _ => Err(self.wrong(key, item, &expected)),
            })
            .collect()
    }

    /// The tables under `key`, written `[key]` or several times `[[key]]`; none if the key is missing.
    pub(super) fn one_or_more(&self, key: &str) -> Result<Vec<Self>> {
        match self.table.get(key) {
            Some(Node { value: Value::Array(_), .. }) => self.sections(key),
            Some(_) => Ok(vec![self.section(key)?]),
            None => Ok(Vec::new()),
        }
    }

    /// Whether the key is written `[[key]]`.
    pub(super) fn has_sections(&self, key: &str) -> bool {
        let is_table = |item: &Node| matches!(item.value, Value::Table(_));
        matches!(self.table.get(key), Some(Node { value: Value::Array(items), .. }) if items.iter().any(is_table))
    }

    /// Fails on the first key that is not one of `keys`, with the nearest of them.
    ///
    /// `elsewhere` are the other sections of a recipe and their keys: a key that belongs there is said to.
    pub(super) fn only(&self, keys: &[&str], elsewhere: &[(&str, &[&str])]) -> Result<()> {
        let Some((key, node)) = self.table.iter().find(|(key, _)| !keys.contains(&key.as_str())) else {
            return Ok(());
        };
        let home = elsewhere.iter().find(|(_, others)| others.contains(&key.as_str()));
        let advice = match (nearest(key, keys.iter().copied()), home) {
            (_, Some((section, _))) => format!("It belongs in `{section}`."),
            (Some(meant), None) => format!("Did you mean `{meant}`?"),
            (None, None) => format!("Known keys here are {}.", listed(keys)),
        };
        let path = self.path_of(&key.escape_debug().to_string());
        Err(Error::input(format!("The recipe has an unknown key `{path}` ({}). {advice}", node.origin)))
    }

    /// Fails if `key` is there; `why` says in full sentences why it cannot be.
    pub(super) fn forbid(&self, key: &str, why: &str) -> Result<()> {
        match self.table.get(key) {
            None => Ok(()),
            Some(node) => Err(Error::input(format!("The recipe has `{}` ({}). {why}", self.path_of(key), node.origin))),
        }
    }

    /// An error about this table as a whole; `message` is one or more full sentences.
    pub(super) fn error(&self, message: &str) -> Error {
        Error::input(format!("In the recipe's `{}` ({}): {message}", self.path, self.origin))
    }

    /// The value of a key that must be there; `example` shows how to write it.
    pub(super) fn required<T>(&self, key: &str, value: Option<T>, example: &str) -> Result<T> {
        value.ok_or_else(|| {
            let path = self.path_of(key);
            Error::input(format!("The recipe lacks `{path}` ({}). Add it, for example `{example}`.", self.origin))
        })
    }

    /// A text that is not blank.
    pub(super) fn text(&self, key: &str) -> Result<Option<String>> {
        self.get(key, as_text, "text in quotes, not empty")
    }

    /// A list of texts that are not blank.
    pub(super) fn texts(&self, key: &str) -> Result<Option<Vec<String>>> {
        let read = |node: &Node| match &node.value {
            Value::Array(items) => items.iter().map(as_text).collect(),
            _ => None,
        };
        self.get(key, read, "a list of texts in quotes, none of them empty")
    }

    /// A list of texts that are not empty, but may be white space alone.
    pub(super) fn stop_texts(&self, key: &str) -> Result<Option<Vec<String>>> {
        let text = |node: &Node| match &node.value {
            Value::String(text) if !text.is_empty() => Some(text.clone()),
            _ => None,
        };
        let read = |node: &Node| match &node.value {
            Value::Array(items) => items.iter().map(text).collect(),
            _ => None,
        };
        self.get(key, read, "a list of texts in quotes, none of them empty")
    }

    /// `true` or `false`.
    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>> {
        let read = |node: &Node| match node.value {
            Value::Boolean(value) => Some(value),
            _ => None,
        };
        self.get(key, read, "true or false")
    }

    /// A whole number from `least` to a thousand million.
    pub(super) fn count(&self, key: &str, least: usize) -> Result<Option<usize>> {
        let read = |node: &Node| match node.value {
            Value::Integer(value) => usize::try_from(value).ok().filter(|value| (least..=MAX_COUNT).contains(value)),
            _ => None,
        };
        self.get(key, read, &format!("a whole number from {least} to {MAX_COUNT}"))
    }

    /// A whole number from 0 that fits TOML's 64-bit signed integers.
    pub(super) fn seed(&self, key: &str) -> Result<Option<u64>> {
        let read = |node: &Node| match node.value {
            Value::Integer(value) => u64::try_from(value).ok(),
            _ => None,
        };
        self.get(key, read, &format!("a whole number from 0 to {}", i64::MAX))
    }

    /// A finite number in `range`.
    pub(super) fn number(&self, key: &str, range: impl RangeBounds<f64>) -> Result<Option<f64>> {
        self.get(key, |node| as_number(node, &range), &format!("a number{}", described(&range)))
    }

    /// A finite number in `range`, or a list of such numbers that is not empty and repeats none.
    pub(super) fn sweep(&self, key: &str, range: impl RangeBounds<f64>) -> Result<Option<Vec<f64>>> {
        let read = |node: &Node| match &node.value {
            Value::Array(items) => {
                let values: Vec<f64> = items.iter().map(|item| as_number(item, &range)).collect::<Option<_>>()?;
                let repeats = values.iter().enumerate().any(|(i, value)| values[..i].contains(value));
                (!values.is_empty() && !repeats).then_some(values)
            }
            _ => as_number(node, &range).map(|value| vec![value]),
        };
        let range = described(&range);
        self.get(key, read, &format!("a number{range}, or a list of different such numbers"))
    }

    /// Finite numbers under names of their own, at least one.
    pub(super) fn weights(&self, key: &str) -> Result<Option<BTreeMap<String, f64>>> {
        let read = |node: &Node| match &node.value {
            Value::Table(table) if !table.is_empty() => {
                table.iter().map(|(name, node)| Some((name.clone(), as_number(node, &..)?))).collect()
            }
            _ => None,
        };
        self.get(key, read, "a table of metrics and their weights, such as { helpfulness = 1.0 }")
    }

    /// One of the named choices.
    pub(super) fn choice<T: Copy>(&self, key: &str, choices: &[(&str, T)]) -> Result<Option<T>> {
        let names: Vec<String> = choices.iter().map(|(name, _)| format!("\"{name}\"")).collect();
        let read = |node: &Node| match &node.value {
            Value::String(text) => choices.iter().find(|(name, _)| name == text).map(|(_, choice)| *choice),
            _ => None,
        };
        self.get(key, read, &format!("the text {}", names.join(" or ")))
    }

    fn get<T>(&self, key: &str, read: impl Fn(&Node) -> Option<T>, expected: &str) -> Result<Option<T>> {
        let Some(node) = self.table.get(key) else { return Ok(None) };
        read(node).map(Some).ok_or_else(|| self.wrong(key, node, expected))
    }

    fn wrong(&self, key: &str, node: &Node, expected: &str) -> Error {
        let path = self.path_of(key);
        Error::input(format!("In the recipe, `{path}` ({}) is {}, but must be {expected}.", node.origin, node.value))
    }

    fn path_of(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_string() } else { format!("{}.{key}", self.path) }
    }
}

fn as_text(node: &Node) -> Option<String> {
    match &node.value {
        Value::String(text) if !text.trim().is_empty() => Some(text.clone()),
        _ => None,
    }
}

fn as_number(node: &Node, range: &impl RangeBounds<f64>) -> Option<f64> {
    let value = match node.value {
        Value::Integer(value) => value as f64,
        Value::Float(value) => value,
        _ => return None,
    };
    (value.is_finite() && range.contains(&value)).then_some(value)
}

/// A range in words: " of at least 0 and less than 1", or nothing.
fn described(range: &impl RangeBounds<f64>) -> String {
    let lower = match range.start_bound() {
        Bound::Included(least) => format!(" of at least {least}"),
        Bound::Excluded(least) => format!(" greater than {least}"),
        Bound::Unbounded => String::new(),
    };
    match range.end_bound() {
        Bound::Included(most) => format!("{lower} and at most {most}"),
        Bound::Excluded(most) => format!("{lower} and less than {most}"),
        Bound::Unbounded => lower,
    }
}

fn listed(names: &[&str]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}
