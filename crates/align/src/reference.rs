//! Log-probabilities of pairs under a fixed model, computed once and kept on disk.
//!
//! The key of a cache file is a hash of everything that the values depend on: the model's weights and shape,
//! every token of every pair, the arithmetic's version and the processor's instruction set. Template, tokenizer and truncation show in the tokens.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use engine::checkpoint::atomic;
use engine::{Decoder, Error, Model, Result};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use crate::data::TokenizedPair;
use crate::objective::Pairwise;
use crate::task::{Preferences, Task};
use crate::trainer::{micro_batches, pack};

/// Changes whenever the engine's f32 results may change.
const ARITHMETIC: &str = "f32 v1";

/// Log-probabilities of each pair's chosen and rejected response under `model`.
///
/// Read from `cache` if it holds them, else computed and kept there. `progress` gets the number of pairs done and may
/// end the work with an error.
///
/// # Errors
/// Log-probabilities that are not numbers ([`Error::Failed`], which names the row), a cache folder that cannot be
/// written, or the error of `progress`.
pub fn pair_logps(
    model: &Model,
    pairs: &[TokenizedPair],
    micro_batch_tokens: usize,
    cache: Option<&Path>,
    progress: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<Vec<[f64; 2]>> {
    let place = cache.map(|folder| cache_file(folder, model, pairs));
    if let Some(path) = &place
        && let Some(logps) = read(path, pairs.len())
    {
        progress(pairs.len())?;
        return Ok(logps);
    }
    let logps = compute(model, pairs, micro_batch_tokens, progress)?;
    if let Some((pair, _)) = pairs.iter().zip(&logps).find(|(_, logps)| !logps.iter().all(|logp| logp.is_finite())) {
        return Err(Error::Failed(format!(
            "The log-probabilities of the responses in row {} are not numbers. The model's weights are damaged, or its \
             training diverged: use another checkpoint, or train it again with a lower learning rate.",
            pair.row
        )));
    }
    if let Some(path) = &place {
        write(path, &logps)?;
    }
    Ok(logps)
}

fn compute(
    model: &Model,
    pairs: &[TokenizedPair],
    micro_batch_tokens: usize,
    progress: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<Vec<[f64; 2]>> {
    let longest = pairs.iter().map(|p| p.prompt.len() + p.chosen.len().max(p.rejected.len())).max().unwrap_or(0);
    let mut decoder = Decoder::new(model, longest);
    let unknown = vec![[0.0; 2]; pairs.len()];
    let task = Preferences::new(pairs, &unknown, &Pairwise::Dpo { beta: 1.0, label_smoothing: 0.0 });
    let all: Vec<usize> = (0..task.len()).collect();
    let mut logps: Vec<f64> = Vec::with_capacity(2 * pairs.len());
    for part in micro_batches(&task, &all, micro_batch_tokens) {
        logps.extend(decoder.logps(&model.weights, &pack(&task, &all[part.clone()])));
        progress(part.end)?;
    }
    Ok(logps.as_chunks::<2>().0.to_vec())
}

fn cache_file(folder: &Path, model: &Model, pairs: &[TokenizedPair]) -> PathBuf {
    let key = format!("{ARITHMETIC} {} {} {}", engine::instruction_set(), model.hash(), fingerprint(pairs));
    folder.join(format!("{}.safetensors", blake3::hash(key.as_bytes()).to_hex()))
}

/// A hash of every token of the pairs, in their order: 64 hexadecimal digits.
pub fn fingerprint(pairs: &[TokenizedPair]) -> String {
    let mut hasher = blake3::Hasher::new();
    for pair in pairs {
        for tokens in [&pair.prompt, &pair.chosen, &pair.rejected] {
            hasher.update(&(tokens.len() as u64).to_le_bytes());
            let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
            hasher.update(&bytes);
        }
    }
    hasher.finalize().to_hex().to_string()
}

/// The cached values, or nothing when the file is missing or damaged (they are then computed again).
fn read(path: &Path, pairs: usize) -> Option<Vec<[f64; 2]>> {
    let bytes = std::fs::read(path).ok()?;
    let tensors = SafeTensors::deserialize(&bytes).ok()?;
    let logps = tensors.tensor("logps").ok()?;
    let values = logps.data().as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b));
    let values: Vec<[f64; 2]> = values.collect::<Vec<f64>>().as_chunks::<2>().0.to_vec();
    (values.len() == pairs).then_some(values)
}

fn write(path: &Path, logps: &[[f64; 2]]) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    }
    let bytes: Vec<u8> = logps.as_flattened().iter().flat_map(|v| v.to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F64, vec![logps.len(), 2], &bytes)
        .map_err(|e| Error::Failed(format!("Could not lay out the reference log-probabilities: {e}.")))?;
    atomic::write_file(path, |out| {
        let metadata: Option<HashMap<String, String>> = None;
        out.write_all(&safetensors::serialize([("logps", view)], metadata).map_err(std::io::Error::other)?)
    })
}
