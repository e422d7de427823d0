//! A TOML document in which every value knows where it was written.

use std::collections::BTreeMap;

use engine::{Error, Result};
use toml::de::{DeTable, DeValue};
use toml::{Spanned, value::Datetime};

/// Keys and values of one table.
pub(super) type Table = BTreeMap<String, Node>;

/// A value and the place that it comes from.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) value: Value,
    /// `recipe.toml:12`, or the override `--set step.1.beta=0.05`.
    pub(super) origin: String,
}

/// A TOML value.
#[derive(Debug, Clone)]
pub(super) enum Value {
    String(String),
    Integer(i64),
    Float(f64),
    Boolean(bool),
    Datetime(Datetime),
    Array(Vec<Node>),
    Table(Table),
}

/// The value as a message shows it.
impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::String(v) if v.chars().count() > 60 => {
                write!(f, "the text {:?}…", v.chars().take(60).collect::<String>())
            }
            Self::String(v) => write!(f, "the text {v:?}"),
            Self::Integer(v) => write!(f, "{v}"),
            Self::Float(v) => write!(f, "{v}"),
            Self::Boolean(v) => write!(f, "{v}"),
            Self::Datetime(v) => write!(f, "the date {v}"),
            Self::Array(v) if v.is_empty() => write!(f, "an empty list"),
            Self::Array(v) if v.len() > 10 => write!(f, "a list of {} values", v.len()),
            Self::Array(v) => {
                let items: Vec<String> = v.iter().map(|item| item.value.to_string()).collect();
                write!(f, "the list [{}]", items.join(", "))
            }
            Self::Table(_) => write!(f, "a table"),
        }
    }
}

/// The tree of a TOML document; `name` is the file's name for messages.
pub(super) fn parse(text: &str, name: &str) -> Result<Table> {
    let line_ends: Vec<usize> = text.match_indices('\n').map(|(position, _)| position).collect();
    let place = |position: usize| format!("{name}:{}", 1 + line_ends.partition_point(|end| *end < position));
    let document = DeTable::parse(text).map_err(|error| {
        let position = error.span().map_or(text.len(), |span| span.start);
        Error::input(format!(
            "The recipe {} is not valid TOML: {}. Correct that line and run the command again.",
            place(position),
            error.message()
        ))
    })?;
    table_from(document.get_ref(), &place)
}

/// Puts the value of an override, `KEY=VALUE`, in its place.
///
/// A key is a path such as `train.epochs` or `step.1.beta`, steps counted from 1. A value is read as TOML,
/// and as plain text when it is none, so that paths need no quotes. A table that is not there is added, a
/// step is not.
pub(super) fn apply_override(root: &mut Table, setting: &str) -> Result<()> {
    let origin = format!("--set {setting}");
    let Some((path, text)) = setting.split_once('=') else {
        return Err(Error::input(format!(
            "The override `{origin}` has no `=`. Write a key and its value, for example `--set step.1.beta=0.05`."
        )));
    };
    let keys: Vec<&str> = path.split('.').map(str::trim).collect();
    let [parents @ .., last] = keys.as_slice() else { return Err(no_such_place(&origin, path)) };
    // no place in a recipe lies deeper than `step.1.relabel.helpfulness`
    if keys.len() > 4 || keys.iter().any(|key| key.is_empty()) {
        return Err(no_such_place(&origin, path));
    }
    let value = match DeValue::parse(text.trim()) {
        Ok(value) => node_from(&value, &|_| origin.clone())?.value,
        Err(_) => Value::String(text.trim().to_string()),
    };

    let mut table = root;
    let mut parents = parents.iter();
    while let Some(parent) = parents.next() {
        let node = table
            .entry((*parent).to_string())
            .or_insert_with(|| Node { value: Value::Table(Table::new()), origin: origin.clone() });
        table = match &mut node.value {
            Value::Table(inner) => inner,
            Value::Array(items) => {
                let count = items.len();
                let index = parents.next().and_then(|number| number.parse::<usize>().ok());
                let item = index.and_then(|number| items.get_mut(number.checked_sub(1)?));
                match item.map(|item| &mut item.value) {
                    Some(Value::Table(inner)) => inner,
                    _ => {
                        return Err(Error::input(format!(
                            "The override `{origin}` names no `{parent}` of the recipe, which has {count}, numbered from 1. \
                             Write for example `--set step.1.beta=0.05`."
                        )));
                    }
                }
            }
            _ => return Err(no_such_place(&origin, path)),
        };
    }
    table.insert((*last).to_string(), Node { value, origin });
    Ok(())
}

fn no_such_place(origin: &str, path: &str) -> Error {
    Error::input(format!(
        "The override `{origin}` names the key `{path}`, which is no place in a recipe. \
         Write a section and a key, for example `--set train.epochs=2`, or a step's number between them, \
         for example `--set step.1.beta=0.05`."
    ))
}

fn table_from(table: &DeTable<'_>, place: &dyn Fn(usize) -> String) -> Result<Table> {
    table
        .iter()
        .map(|(key, value)| {
            let mut node = node_from(value, place)?;
            // the key's line, since a value may start further down
            node.origin = place(key.span().start);
            Ok((key.get_ref().to_string(), node))
        })
        .collect()
}

fn node_from(spanned: &Spanned<DeValue<'_>>, place: &dyn Fn(usize) -> String) -> Result<Node> {
    let origin = place(spanned.span().start);
    let too_large = |text: &str| Error::input(format!("The number {text} ({origin}) is too large for a computer."));
    let value = match spanned.get_ref() {
        DeValue::String(v) => Value::String(v.to_string()),
        DeValue::Integer(v) => {
            Value::Integer(i64::from_str_radix(v.as_str(), v.radix()).map_err(|_| too_large(v.as_str()))?)
        }
        DeValue::Float(v) => Value::Float(v.as_str().parse().map_err(|_| too_large(v.as_str()))?),
        DeValue::Boolean(v) => Value::Boolean(*v),
        DeValue::Datetime(v) => Value::Datetime(*v),
        DeValue::Array(v) => Value::Array(v.iter().map(|item| node_from(item, place)).collect::<Result<_>>()?),
        DeValue::Table(v) => Value::Table(table_from(v, place)?),
    };
    Ok(Node { value, origin })
}
