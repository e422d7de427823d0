//! Reading a JSON object field by field, with errors that name the file and the field.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The fields of a JSON object that nobody has asked for yet. A field that is `null` counts as absent.
pub(super) struct Fields {
    path: PathBuf,
    /// What stands before a field's name in messages: `rope_scaling.` for the fields of a nested object.
    prefix: String,
    rest: Map<String, Value>,
}

impl Fields {
    /// The fields of a JSON file's contents.
    pub(super) fn parse(json: &[u8], path: &Path) -> Result<Self> {
        let rest = serde_json::from_slice(json)
            .map_err(|e| Error::input(format!("{} is not a JSON object: {e}.", path.display())))?;
        Ok(Self { path: path.to_owned(), prefix: String::new(), rest })
    }

    /// Takes a nested object.
    pub(super) fn object(&mut self, name: &str) -> Result<Option<Self>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(rest)) => {
                let prefix = format!("{}{name}.", self.prefix);
                Ok(Some(Self { path: self.path.clone(), prefix, rest }))
            }
            Some(value) => Err(self.wrong(name, &value, "an object")),
        }
    }

    /// Takes a field of any type.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.rest.shift_remove(name).filter(|value| !value.is_null())
    }

    /// Whether a field is there, even as `null`.
    pub(super) fn mentions(&self, name: &str) -> bool {
        self.rest.contains_key(name)
    }

    /// Takes a whole number ≥ 0.
    pub(super) fn size(&mut self, name: &str) -> Result<Option<usize>> {
        self.convert(name, "a whole number", |v| v.as_u64().and_then(|n| usize::try_from(n).ok()))
    }

    /// Takes a finite number.
    pub(super) fn number(&mut self, name: &str) -> Result<Option<f64>> {
        self.convert(name, "a number", |v| v.as_f64().filter(|x| x.is_finite()))
    }

    /// Takes `true` or `false`.
    pub(super) fn flag(&mut self, name: &str) -> Result<Option<bool>> {
        self.convert(name, "true or false", Value::as_bool)
    }

    /// Takes a text.
    pub(super) fn text(&mut self, name: &str) -> Result<Option<String>> {
        self.convert(name, "a text", |v| v.as_str().map(str::to_owned))
    }

    /// Takes a token id.
    pub(super) fn token(&mut self, name: &str) -> Result<Option<u32>> {
        self.convert(name, "a token id", token)
    }

    /// Takes a token id or a list of them; empty when absent.
    pub(super) fn tokens(&mut self, name: &str) -> Result<Vec<u32>> {
        let ids = self.convert(name, "a token id or a list of them", |v| match v {
            Value::Array(ids) => ids.iter().map(token).collect(),
            one => token(one).map(|id| vec![id]),
        });
        Ok(ids?.unwrap_or_default())
    }

    /// Takes a field that must be there.
    pub(super) fn required<T>(&self, name: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| {
            Error::input(format!("{} lacks the field {}{name}, which is needed.", self.path.display(), self.prefix))
        })
    }

    /// Takes a field that changes the model's arithmetic unless it is absent or one of `allowed`.
    pub(super) fn must_be(&mut self, name: &str, allowed: &[Value]) -> Result<()> {
        match self.take(name) {
            Some(value) if !allowed.contains(&value) => Err(self.unsupported(name, &value)),
            _ => Ok(()),
        }
    }

    /// What is left.
    pub(super) fn into_rest(self) -> Map<String, Value> {
        self.rest
    }

    /// Refuses any field that is left and not `null`.
    pub(super) fn finish(self) -> Result<()> {
        match self.rest.iter().find(|(_, value)| !value.is_null()) {
            Some((name, value)) => Err(self.unsupported(name, value)),
            None => Ok(()),
        }
    }

    /// Refuses any field that is left and not `null`, `false` or empty.
    pub(super) fn refuse_switched_on(self) -> Result<()> {
        let off = [Value::Null, Value::Bool(false), Value::Array(Vec::new()), Value::Object(Map::new())];
        match self.rest.iter().find(|(_, value)| !off.contains(value)) {
            Some((name, value)) => Err(self.unsupported(name, value)),
            None => Ok(()),
        }
    }

    /// The error for a field that `reason` explains.
    pub(super) fn wrong_because(&self, name: &str, reason: &Error) -> Error {
        Error::input(format!("In {} the field {}{name} is wrong: {reason}", self.path.display(), self.prefix))
    }

    /// The error for a field whose value has the wrong type or range.
    pub(super) fn wrong(&self, name: &str, value: &Value, needs: &str) -> Error {
        let (path, prefix) = (self.path.display(), &self.prefix);
        Error::input(format!("In {path} the field {prefix}{name} is {}, but must be {needs}.", shortened(value)))
    }

    /// The error for a field that asks for arithmetic that the engine does not do.
    pub(super) fn unsupported(&self, name: &str, value: &Value) -> Error {
        let (path, prefix) = (self.path.display(), &self.prefix);
        Error::input(format!(
            "{path} sets {prefix}{name} to {}, which is not supported. Use another model; if you are sure that the field \
             changes nothing in what the model computes, remove it.",
            shortened(value)
        ))
    }

    fn convert<T>(&mut self, name: &str, needs: &str, convert: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.take(name) else { return Ok(None) };
        convert(&value).map(Some).ok_or_else(|| self.wrong(name, &value, needs))
    }
}

fn token(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

/// A value as JSON, cut where it would fill the screen.
fn shortened(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
