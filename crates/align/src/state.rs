//! The state of an unfinished training: weights, moments and the number of steps taken.

use std::collections::HashMap;
use std::path::Path;

use engine::checkpoint::{atomic, write_safetensors};
use engine::optim::AdamW;
use engine::{Error, Model, Result};
use safetensors::SafeTensors;

const FILE: &str = "training-state.safetensors";

/// Reads and writes `training-state.safetensors` in a training's folder.
pub(crate) struct TrainingState;

impl TrainingState {
    /// Writes the state; the previous one stays until the new one is complete.
    pub(crate) fn save(folder: &Path, identity: &str, policy: &Model, optimizer: &AdamW) -> Result<()> {
        let path = folder.join(FILE);
        let metadata = HashMap::from([
            ("identity".to_owned(), identity.to_owned()),
            ("steps".to_owned(), optimizer.steps.to_string()),
        ]);
        let shape = [policy.layout.len];
        let tensors = [("weights", &policy.weights), ("first", &optimizer.first), ("second", &optimizer.second)]
            .map(|(name, values)| (name, &shape[..], values.as_slice()));
        atomic::write_file(&path, |out| write_safetensors(out, &tensors, metadata))
    }

    /// Restores a state of the same training; leaves policy and optimizer as they are when there is none.
    pub(crate) fn load(folder: &Path, identity: &str, policy: &mut Model, optimizer: &mut AdamW) -> Result<()> {
        let path = folder.join(FILE);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(Error::io("read", &path)(error)),
        };
        let damaged = |what: &str| {
            Error::input(format!(
                "The training state {} {what}. Delete it to train from the start; to continue, put it, or the model, \
                 data and options, back as they were.",
                path.display()
            ))
        };
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|_| damaged("is damaged"))?;
        let metadata = header.metadata().clone().unwrap_or_default();
        if metadata.get("identity").map(String::as_str) != Some(identity) {
            return Err(damaged("belongs to another training: the model, the data or the options have changed"));
        }
        let steps = metadata.get("steps").and_then(|s| s.parse().ok()).ok_or_else(|| damaged("is damaged"))?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(|_| damaged("is damaged"))?;
        for (name, to) in
            [("weights", &mut policy.weights), ("first", &mut optimizer.first), ("second", &mut optimizer.second)]
        {
            let data = tensors.tensor(name).map_err(|_| damaged("is damaged"))?;
            if data.data().len() != to.len() * size_of::<f32>() {
                return Err(damaged("is of a model of another size"));
            }
            for (to, bytes) in to.iter_mut().zip(data.data().as_chunks::<4>().0) {
                *to = f32::from_le_bytes(*bytes);
            }
        }
        optimizer.steps = steps;
        Ok(())
    }

    /// Removes the state, if there is one.
    pub(crate) fn discard(folder: &Path) -> Result<()> {
        let path = folder.join(FILE);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", &path)(error)),
            _ => Ok(()),
        }
    }
}
