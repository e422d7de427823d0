//! Policies that are loaded: a model, or two mixed at decode time.

use std::path::{Path, PathBuf};

use engine::checkpoint::{Checkpoint, describe};
use engine::{Adapted, Adapter, Error, Mixture, Result, Tokenizer};
pub(crate) use sacpo::policy_name::PolicyName;

/// A policy with all that is needed to use it.
pub(crate) struct Policy {
    /// The model, or A of a mixture, whose tokenizer and defaults of generation are the policy's. Where A and B share a base,
    /// its weights are the base's.
    pub(crate) first: Checkpoint,
    /// What a mixture adds, and its q.
    mixed: Option<(Mixed, f64)>,
}

enum Mixed {
    /// B.
    Apart(Box<Checkpoint>),
    /// What makes A and B of the one base in memory; none for the base itself.
    Shared(Box<[Option<Adapter>; 2]>),
}

impl From<Checkpoint> for Policy {
    fn from(first: Checkpoint) -> Self {
        Self { first, mixed: None }
    }
}

impl Policy {
    /// Loads the models; of adapters of one base, the base once. `extrapolate` allows q below 0 and above 1.
    ///
    /// # Errors
    /// Those of [`Checkpoint::load`]; models of different tokenizers; q out of its range.
    pub(crate) fn load(name: &PolicyName, extrapolate: bool) -> Result<Self> {
        let (a, b, q) = match name {
            PolicyName::Model(_) if extrapolate => {
                return Err(Error::input(
                    "--extrapolate allows a q outside 0 to 1 in mix(A, B, q). Leave it out for a model.",
                ));
            }
            PolicyName::Model(path) => return Ok(Checkpoint::load(path)?.into()),
            PolicyName::Mix { a, b, q } => (a, b, *q),
        };
        if !extrapolate && !(0.0..=1.0).contains(&q) {
            return Err(Error::input(format!(
                "In mix(A, B, q), q is {q}, but must be a number from 0 to 1: beyond it the mixture lies beyond the models. \
                 Give --extrapolate if you mean it."
            )));
        }
        let (policy, tokenizer) = match common_base(a, b)? {
            Some(base) => Self::load_shared(&base, a, b, q)?,
            None => {
                let (first, second) = (Checkpoint::load(a)?, Checkpoint::load(b)?);
                let tokenizer = second.tokenizer.hash();
                (Self { first, mixed: Some((Mixed::Apart(Box::new(second)), q)) }, tokenizer)
            }
        };
        if policy.first.tokenizer.hash() != tokenizer {
            return Err(Error::input(format!(
                "The tokenizers of {} and {} differ, so the models do not mean the same by a token and cannot be mixed. Use \
                 policies of one base model.",
                a.display(),
                b.display()
            )));
        }
        policy.mixture()?;
        Ok(policy)
    }

    /// The model B of a mixture that has one in memory.
    pub(crate) fn second(&self) -> Option<&engine::Model> {
        match &self.mixed {
            Some((Mixed::Apart(second), _)) => Some(&second.model),
            _ => None,
        }
    }

    /// The mixture of two policies over `base`, and the hash of B's tokenizer.
    fn load_shared(base: &Path, a: &Path, b: &Path, q: f64) -> Result<(Self, String)> {
        let mut first = Checkpoint::load(base)?;
        let tokenizer = Tokenizer::found_in(b)?.as_ref().unwrap_or(&first.tokenizer).hash();
        let is_base = |path: &Path| path.canonicalize().is_ok_and(|path| path == base);
        let second = if is_base(b) { None } else { Some(Adapter::load(b, &first.model.config)?) };
        let adapters = [if is_base(a) { None } else { Some(first.adapt(a)?) }, second];
        Ok((Self { first, mixed: Some((Mixed::Shared(Box::new(adapters)), q)) }, tokenizer))
    }

    /// The policy as the engine takes it.
    ///
    /// # Errors
    /// Models whose logits cannot be mixed.
    pub(crate) fn mixture(&self) -> Result<Mixture<'_>> {
        let model = &self.first.model;
        match &self.mixed {
            None => Ok(model.into()),
            Some((Mixed::Apart(second), q)) => Mixture::new(model, &second.model, *q),
            Some((Mixed::Shared(adapters), q)) => {
                let [a, b] = adapters.each_ref().map(|adapter| Adapted { model, adapter: adapter.as_ref() });
                Mixture::new(a, b, *q)
            }
        }
    }
}

/// The model of which both are adapters, or which one of them is, where one pass can compute both: not with DoRA, which
/// is folded into its model instead.
fn common_base(a: &Path, b: &Path) -> Result<Option<PathBuf>> {
    let below = |path: &Path| -> Result<Option<PathBuf>> {
        let base = match describe(path)?.adapter {
            None => path.to_owned(),
            Some(adapter) if adapter.options.dora => return Ok(None),
            Some(adapter) => adapter.base.into(),
        };
        base.canonicalize().map(Some).map_err(Error::io("find", &base))
    };
    let other = below(b)?;
    Ok(below(a)?.filter(|base| other.as_ref() == Some(base)))
}
