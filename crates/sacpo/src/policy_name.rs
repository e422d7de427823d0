//! Policies as people name them: a model, or two mixed at decode time.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// The name of a policy: a path, or `mix(A, B, q)`.
#[derive(Debug, Clone, PartialEq)]
pub enum PolicyName {
    /// A folder in Hugging Face's layout, an adapter folder, or a GGUF file.
    Model(PathBuf),
    /// Logits (1 − q)·A + q·B.
    Mix {
        /// The policy at q = 0.
        a: PathBuf,
        /// The policy at q = 1.
        b: PathBuf,
        /// The share of B.
        q: f64,
    },
}

impl fmt::Display for PolicyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Model(path) => write!(f, "{}", path.display()),
            Self::Mix { a, b, q } => write!(f, "mix({}, {}, {q})", a.display(), b.display()),
        }
    }
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
            Ok(q) if f64::is_finite(q) && !a.is_empty() && !b.is_empty() => {
                Ok(Self::Mix { a: a.into(), b: b.into(), q })
            }
            _ => Err(format!("in mix(A, B, q), A and B must be models and q a number from 0 to 1, not `{q}`")),
        }
    }
}

impl PolicyName {
    /// The models that it is made of.
    pub fn models_mut(&mut self) -> Vec<&mut PathBuf> {
        match self {
            Self::Model(path) => vec![path],
            Self::Mix { a, b, .. } => vec![a, b],
        }
    }
}
