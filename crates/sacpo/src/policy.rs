//! Policies as people name them: a model, or two mixed at decode time.

use std::path::PathBuf;
use std::str::FromStr;

use engine::checkpoint::Checkpoint;
use engine::{Error, Mixture, Result};

/// The name of a policy: a path, or `mix(A, B, q)`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum PolicyName {
    /// A folder in Hugging Face's layout, an adapter folder, or a GGUF file.
    Model(PathBuf),
    /// Logits (1 − q)·A + q·B.
    Mix { a: PathBuf, b: PathBuf, q: f64 },
}

impl FromStr for PolicyName {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        let Some(inner) = name.trim().strip_prefix("mix(").and_then(|rest| rest.strip_suffix(')')) else {
            return Ok(Self::Model(name.into()));
        };
        // from the end, so that a path may hold a comma
        let parts: Vec<&str> = inner.rsplitn(3, ',').map(str::trim).collect();
        let [q, b, a] = parts[..] else {
            return Err("a mixture is written mix(A, B, q), for example mix(runs/helpful, runs/safe, 0.5)".into());
        };
        match q.parse() {
            Ok(q) if (0.0..=1.0).contains(&q) && !a.is_empty() && !b.is_empty() => {
                Ok(Self::Mix { a: a.into(), b: b.into(), q })
            }
            _ => Err(format!("in mix(A, B, q), A and B must be models and q a number from 0 to 1, not `{q}`")),
        }
    }
}

/// A policy with all that is needed to use it.
pub(crate) struct Policy {
    /// The model, or A of a mixture, whose tokenizer and defaults of generation are the policy's.
    pub(crate) first: Checkpoint,
    /// B and q of a mixture.
    second: Option<(Checkpoint, f64)>,
}

impl From<Checkpoint> for Policy {
    fn from(first: Checkpoint) -> Self {
        Self { first, second: None }
    }
}

impl Policy {
    /// Loads the models.
    ///
    /// # Errors
    /// Those of [`Checkpoint::load`]; models of different tokenizers.
    pub(crate) fn load(name: &PolicyName) -> Result<Self> {
        let (a, b, q) = match name {
            PolicyName::Model(path) => return Ok(Checkpoint::load(path)?.into()),
            PolicyName::Mix { a, b, q } => (a, b, *q),
        };
        let (first, second) = (Checkpoint::load(a)?, Checkpoint::load(b)?);
        if first.tokenizer.hash() != second.tokenizer.hash() {
            return Err(Error::input(format!(
                "The tokenizers of {} and {} differ, so the models do not mean the same by a token and cannot be mixed. Use \
                 policies of one base model.",
                a.display(),
                b.display()
            )));
        }
        let policy = Self { first, second: Some((second, q)) };
        policy.mixture()?;
        Ok(policy)
    }

    /// The policy as the engine takes it.
    ///
    /// # Errors
    /// Models whose logits cannot be mixed.
    pub(crate) fn mixture(&self) -> Result<Mixture<'_>> {
        match &self.second {
            None => Ok((&self.first.model).into()),
            Some((second, q)) => Mixture::new(&self.first.model, &second.model, *q),
        }
    }
}
