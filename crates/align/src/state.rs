//! The state of an unfinished training: weights, moments and the number of steps taken.

use std::collections::HashMap;
use std::path::Path;

use engine::checkpoint::{TensorData, atomic, write_safetensors};
use engine::optim::{Optimizer, StateTensor, StateValues};
use engine::{Error, Model, Result};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

const FILE: &str = "training-state.safetensors";

/// Reads and writes `training-state.safetensors` in a training's folder.
pub(crate) struct TrainingState;

impl TrainingState {
    /// Writes the state; the previous one stays until the new one is complete.
    pub(crate) fn save(folder: &Path, identity: &str, policy: &Model, optimizer: &mut Optimizer) -> Result<()> {
        let path = folder.join(FILE);
        let metadata = HashMap::from([
            ("identity".to_owned(), identity.to_owned()),
            ("optimizer".to_owned(), optimizer.kind().name().to_owned()),
            ("steps".to_owned(), optimizer.steps.to_string()),
        ]);
        let shape = [policy.layout.len];
        let state = optimizer.state();
        let mut tensors = vec![("weights", &shape[..], TensorData::F32(&policy.weights))];
        tensors.extend(state.iter().map(|tensor| {
            let values = match &tensor.values {
                StateValues::F32(values) => TensorData::F32(values),
                StateValues::U8(codes) => TensorData::U8(codes),
            };
            (tensor.name.as_str(), tensor.shape.as_slice(), values)
        }));
        atomic::write_file(&path, |out| write_safetensors(out, &tensors, metadata))
    }

    /// Restores a state of the same training; leaves policy and optimizer as they are when there is none.
    pub(crate) fn load(folder: &Path, identity: &str, policy: &mut Model, optimizer: &mut Optimizer) -> Result<()> {
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
        let (kind, saved_kind) = (optimizer.kind().name(), metadata.get("optimizer").map_or("none", String::as_str));
        if saved_kind != kind {
            return Err(damaged(&format!("was written with the optimizer `{saved_kind}`, not `{kind}`")));
        }
        let steps = metadata.get("steps").and_then(|s| s.parse().ok()).ok_or_else(|| damaged("is damaged"))?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(|_| damaged("is damaged"))?;
        let weights = StateTensor {
            name: "weights".to_owned(),
            shape: vec![policy.layout.len],
            values: StateValues::F32(&mut policy.weights),
        };
        for tensor in std::iter::once(weights).chain(optimizer.state()) {
            let name = &tensor.name;
            let saved = tensors.tensor(name).map_err(|_| damaged(&format!("has no tensor `{name}`")))?;
            fill(tensor, &saved).map_err(|what| damaged(&what))?;
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

/// Copies what was saved into a tensor; says what is wrong when it does not fit.
fn fill(tensor: StateTensor, saved: &TensorView) -> std::result::Result<(), String> {
    let dtype = if matches!(tensor.values, StateValues::F32(_)) { Dtype::F32 } else { Dtype::U8 };
    if (saved.dtype(), saved.shape()) != (dtype, &tensor.shape) {
        let StateTensor { name, shape, .. } = tensor;
        let (saved_dtype, saved_shape) = (saved.dtype(), saved.shape());
        return Err(format!("holds `{name}` as {saved_dtype:?} {saved_shape:?}, where {dtype:?} {shape:?} is needed"));
    }
    match tensor.values {
        StateValues::F32(to) => {
            for (to, bytes) in to.iter_mut().zip(saved.data().as_chunks::<4>().0) {
                *to = f32::from_le_bytes(*bytes);
            }
        }
        StateValues::U8(to) => to.copy_from_slice(saved.data()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use engine::ModelConfig;
    use engine::RopeScaling;
    use engine::optim::OptimizerKind;

    use super::*;

    const KINDS: [OptimizerKind; 4] =
        [OptimizerKind::AdamW, OptimizerKind::AdamW8bit, OptimizerKind::Lion, OptimizerKind::Muon];

    /// A model whose embedding is large enough for 8-bit moments, and whose norms are not.
    fn model(vocab_size: usize) -> Model {
        let config = ModelConfig {
            vocab_size,
            hidden_size: 16,
            intermediate_size: 24,
            num_hidden_layers: 1,
            num_attention_heads: 2,
            num_key_value_heads: 1,
            head_dim: 8,
            max_position_embeddings: 16,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::Default,
            tie_word_embeddings: true,
            model_type: "llama".into(),
            bos_token_id: None,
            eos_token_ids: Vec::new(),
        };
        Model::random(config, 0.1, 1)
    }

    fn optimizer(kind: OptimizerKind, model: &Model) -> Optimizer {
        Optimizer::new(kind, kind.defaults(), &model.layout.specs)
    }

    /// Steps on a gradient that depends on the number of the step alone.
    fn take_steps(optimizer: &mut Optimizer, model: &mut Model, steps: u64) {
        for _ in 0..steps {
            let number = optimizer.steps as usize;
            let mut gradient: Vec<f32> =
                (0..model.layout.len).map(|i| ((i * 7919 + number * 104_729) % 1009) as f32 - 504.0).collect();
            optimizer.step(&mut model.weights, &mut gradient, 1e-3, 0.01);
        }
    }

    #[test]
    fn every_optimizer_continues_bit_exactly() {
        for kind in KINDS {
            let folder = tempfile::tempdir().unwrap();
            let mut policy = model(260);
            let mut whole = optimizer(kind, &policy);
            take_steps(&mut whole, &mut policy, 3);
            TrainingState::save(folder.path(), "this", &policy, &mut whole).unwrap();
            take_steps(&mut whole, &mut policy, 3);

            let mut resumed_policy = model(260);
            let mut resumed = optimizer(kind, &resumed_policy);
            TrainingState::load(folder.path(), "this", &mut resumed_policy, &mut resumed).unwrap();
            assert_eq!(resumed.steps, 3);
            take_steps(&mut resumed, &mut resumed_policy, 3);
            assert_eq!(resumed_policy.weights, policy.weights, "{kind:?}");
        }
    }

    #[test]
    fn a_state_that_does_not_fit_is_refused_with_its_reason() {
        let folder = tempfile::tempdir().unwrap();
        let policy = model(260);
        TrainingState::save(folder.path(), "this", &policy, &mut optimizer(OptimizerKind::Lion, &policy)).unwrap();
        let refused = |kind, mut policy: Model| {
            let mut optimizer = optimizer(kind, &policy);
            let error = TrainingState::load(folder.path(), "this", &mut policy, &mut optimizer).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            error.to_string()
        };
        let message = refused(OptimizerKind::Muon, policy);
        assert!(message.contains("optimizer `lion`, not `muon`"), "{message}");
        let message = refused(OptimizerKind::Lion, model(261));
        assert!(message.contains("`weights` as F32 [") && message.contains("is needed"), "{message}");

        // moments in another precision
        let metadata = [("identity", "this"), ("optimizer", "lion"), ("steps", "1")];
        let metadata = metadata.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        let (mut policy, len) = (model(260), model(260).layout.len);
        let tensors: [(&str, &[usize], TensorData); 2] = [
            ("weights", &[len], TensorData::F32(&policy.weights)),
            ("model.embed_tokens.weight.momentum", &[260, 16], TensorData::U8(&[0; 260 * 16])),
        ];
        atomic::write_file(&folder.path().join(FILE), |out| write_safetensors(out, &tensors, metadata)).unwrap();
        let mut optimizer = optimizer(OptimizerKind::Lion, &policy);
        let error = TrainingState::load(folder.path(), "this", &mut policy, &mut optimizer).unwrap_err().to_string();
        assert!(error.contains("momentum` as U8 [260, 16], where F32 [260, 16] is needed"), "{error}");
    }
}
