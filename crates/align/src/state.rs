//! The state of an unfinished training: weights, the optimizer's state, and what was seen on the way.

use std::collections::HashMap;
use std::path::Path;

use engine::checkpoint::{Mapped, TensorData, atomic, write_safetensors};
use engine::optim::{Optimizer, StateTensor, StateValues};
use engine::{Error, Result};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use crate::trainer::progress::Progress;

const FILE: &str = "training-state.safetensors";

/// Whether a training's folder has the state of one that was stopped.
pub(crate) fn is_in(folder: &Path) -> bool {
    folder.join(FILE).exists()
}

/// All that changes in a training.
pub(crate) struct TrainingState<'a> {
    pub(crate) weights: &'a mut [f32],
    pub(crate) optimizer: &'a mut Optimizer,
    pub(crate) progress: &'a mut Progress,
}

impl TrainingState<'_> {
    /// Writes `training-state.safetensors` in a training's folder; the previous one stays until this one is complete.
    pub(crate) fn save(&mut self, folder: &Path, identity: &str) -> Result<()> {
        let numbers = serde_json::to_string(&self.progress.counts)
            .map_err(|e| Error::Failed(format!("The training's numbers are no JSON: {e}.")))?;
        let metadata = HashMap::from([
            ("identity".to_owned(), identity.to_owned()),
            ("steps".to_owned(), self.optimizer.steps.to_string()),
            ("counts".to_owned(), numbers),
        ]);
        let tensors = self.tensors();
        let tensors: Vec<(&str, &[usize], TensorData<'_>)> = tensors
            .iter()
            .map(|tensor| {
                let values = match &tensor.values {
                    StateValues::F32(values) => TensorData::F32(values),
                    StateValues::U8(values) => TensorData::U8(values),
                };
                (tensor.name.as_str(), tensor.shape.as_slice(), values)
            })
            .collect();
        atomic::write_file(&folder.join(FILE), |out| write_safetensors(out, &tensors, metadata))
    }

    /// Restores a state of the same training; leaves all as it is when there is none.
    pub(crate) fn load(&mut self, folder: &Path, identity: &str) -> Result<()> {
        let path = folder.join(FILE);
        if !path.try_exists().map_err(Error::io("read", &path))? {
            return Ok(());
        }
        // mapped, since a training that fits may not fit beside its saved state
        let file = Mapped::open(&path)?;
        let refused = |what: &str| {
            Error::input(format!(
                "The training state {} {what}. Delete it to train from the start; to continue, put it, or the model, \
                 data and options, back as they were.",
                path.display()
            ))
        };
        let damaged = || refused("is damaged");
        let (_, header) = SafeTensors::read_metadata(&file).map_err(|_| damaged())?;
        let metadata = header.metadata().clone().unwrap_or_default();
        if metadata.get("identity").map(String::as_str) != Some(identity) {
            return Err(refused(
                "belongs to another training: the model, the data, the options, the version of sacpo or the kind of processor have \
                 changed",
            ));
        }
        let steps = metadata.get("steps").and_then(|steps| steps.parse().ok()).ok_or_else(damaged)?;
        let counts = metadata.get("counts").and_then(|counts| serde_json::from_str(counts).ok()).ok_or_else(damaged)?;
        let tensors = SafeTensors::deserialize(&file).map_err(|_| damaged())?;
        for tensor in self.tensors() {
            let data = tensors.tensor(&tensor.name).map_err(|_| damaged())?;
            restore(tensor.values, &data).ok_or_else(damaged)?;
            file.release(data.data());
        }
        self.optimizer.steps = steps;
        self.progress.counts = counts;
        Ok(())
    }

    /// Removes the state in a training's folder, if there is one.
    pub(crate) fn discard(folder: &Path) -> Result<()> {
        let path = folder.join(FILE);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", &path)(error)),
            _ => Ok(()),
        }
    }

    fn tensors(&mut self) -> Vec<StateTensor<'_>> {
        let shape = vec![self.weights.len()];
        let weights = StateTensor { name: "weights".into(), shape, values: StateValues::F32(self.weights) };
        let mut tensors = vec![weights];
        tensors.append(&mut self.progress.tensors());
        tensors.append(&mut self.optimizer.state());
        tensors
    }
}

/// Overwrites values by those of a file; nothing if their type or number differs.
fn restore(values: StateValues<'_>, from: &TensorView<'_>) -> Option<()> {
    let bytes = from.data();
    match (values, from.dtype()) {
        (StateValues::F32(to), Dtype::F32) if bytes.len() == size_of_val(to) => {
            to.iter_mut().zip(bytes.as_chunks::<4>().0).for_each(|(to, bytes)| *to = f32::from_le_bytes(*bytes));
        }
        (StateValues::U8(to), Dtype::U8) if bytes.len() == to.len() => to.copy_from_slice(bytes),
        _ => return None,
    }
    Some(())
}
