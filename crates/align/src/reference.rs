//! Log-probabilities under a fixed model, computed once and kept on disk.
//!
//! They are kept in blocks, so that a scoring that was stopped goes on where it was. The key of a block is a hash of
//! everything that its values depend on: the model's weights and shape, every token, the arithmetic's version and the
//! processor's instruction set. Template, tokenizer and truncation show in the tokens.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use engine::checkpoint::atomic;
use engine::{Error, Mixture, Result, Scorer};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use crate::sequences::{Packing, Sequences};

/// Tokens per forward pass where nothing else is asked for. Such a pass keeps little, so that it fits wherever its model
/// does.
pub(crate) const TOKENS: usize = 2048;

/// Prompts per block: some seconds of work on a small model.
pub(crate) const BLOCK: usize = 256;

/// The log-probability of every response under a policy, or its score by a model with a score head, in order.
///
/// `micro_batch_tokens` are the tokens of a forward pass, which change memory and speed only; without, 2048. Blocks that `cache` holds are read, the others computed and kept there. `progress` gets the number of prompts done
/// and may end the work with an error; finished blocks stay.
///
/// # Errors
/// Log-probabilities that are not numbers ([`Error::Failed`], which names the row), a cache folder that cannot be
/// written, or the error of `progress`.
pub fn logps<'p>(
    policy: impl Into<Mixture<'p>>,
    items: &[Sequences<'_>],
    micro_batch_tokens: Option<usize>,
    cache: Option<&Path>,
    progress: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<Vec<f64>> {
    let policy = policy.into();
    let packing = Packing { for_scores: policy.is_scorer(), dropout: false };
    let name = cache.map(|_| format!("{} {}", policy.precision().name(), policy.hash()));
    let tokens = micro_batch_tokens.unwrap_or(TOKENS);
    let mut scorer = Scorer::new(policy, items.iter().map(Sequences::longest).max().unwrap_or(0));
    let mut all = Vec::with_capacity(items.iter().map(|item| item.responses.len()).sum());
    let mut done = 0;
    for block in items.chunks(BLOCK) {
        let place = cache.zip(name.as_deref()).map(|(folder, name)| cache_file(folder, name, block));
        let responses = block.iter().map(|item| item.responses.len()).sum();
        if let Some(kept) = place.as_deref().and_then(|path| read(path, responses)) {
            all.extend(kept);
        } else {
            let start = all.len();
            for part in packing.micro_batches(block, tokens) {
                all.extend(scorer.logps(&packing.pack(&block[part.clone()], &[])));
                progress(done + part.end)?;
            }
            check_finite(block, &all[start..])?;
            if let Some(path) = &place {
                write(path, &all[start..])?;
            }
        }
        done += block.len();
        progress(done)?;
    }
    Ok(all)
}

fn check_finite(items: &[Sequences<'_>], logps: &[f64]) -> Result<()> {
    let mut rows = items.iter().flat_map(|item| std::iter::repeat_n(item.row, item.responses.len())).zip(logps);
    rows.find(|(_, logp)| !logp.is_finite()).map_or(Ok(()), |(row, _)| {
        Err(Error::Failed(format!(
            "The log-probabilities of the responses in row {row} are not numbers. The model's weights are damaged, or its \
             training diverged: use another checkpoint, or train it again with a lower learning rate."
        )))
    })
}

/// `policy` names the policy and its precision.
fn cache_file(folder: &Path, policy: &str, items: &[Sequences<'_>]) -> PathBuf {
    let mut hasher = blake3::Hasher::new();
    hasher.update(format!("{} {policy}", engine::arithmetic()).as_bytes());
    items.iter().for_each(|item| item.hash_into(&mut hasher));
    folder.join(format!("{}.safetensors", hasher.finalize().to_hex()))
}

/// The cached values, or nothing when the file is missing or damaged (they are then computed again).
fn read(path: &Path, responses: usize) -> Option<Vec<f64>> {
    let bytes = std::fs::read(path).ok()?;
    let tensors = SafeTensors::deserialize(&bytes).ok()?;
    let logps = tensors.tensor("logps").ok()?;
    let values: Vec<f64> = logps.data().as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect();
    (values.len() == responses).then_some(values)
}

fn write(path: &Path, logps: &[f64]) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    }
    let bytes: Vec<u8> = logps.iter().flat_map(|v| v.to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F64, vec![logps.len()], &bytes)
        .map_err(|e| Error::Failed(format!("Could not lay out the reference log-probabilities: {e}.")))?;
    atomic::write_file(path, |out| {
        let metadata: Option<HashMap<String, String>> = None;
        out.write_all(&safetensors::serialize([("logps", view)], metadata).map_err(std::io::Error::other)?)
    })
}

#[cfg(test)]
mod tests {
    use engine::Model;
    use engine::checkpoint::load_model;

    use super::*;

    fn model() -> Model {
        let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/../engine/tests/fixtures/tiny/tied");
        load_model(Path::new(tiny)).unwrap()
    }

    /// Prompts of three tokens with a response of two, all different.
    fn tokens(count: u32) -> Vec<[u32; 5]> {
        (0..count).map(|i| [1, 3 + i % 40, 3 + i / 40, 5, 2]).collect()
    }

    fn sequences(tokens: &[[u32; 5]]) -> Vec<Sequences<'_>> {
        let rows = tokens.iter().enumerate();
        rows.map(|(row, t)| Sequences { prompt: &t[..3], responses: vec![&t[3..]], row }).collect()
    }

    fn entries(folder: &Path) -> usize {
        std::fs::read_dir(folder).map_or(0, Iterator::count)
    }

    #[test]
    fn a_stopped_scoring_keeps_its_finished_blocks() {
        let (model, tokens, folder) = (model(), tokens(600), tempfile::tempdir().unwrap());
        let items = sequences(&tokens);
        let whole = logps(&model, &items, Some(100), None, &mut |_| Ok(())).unwrap();
        let stop = |most: usize| {
            move |done: usize| if done < most { Ok(()) } else { Err(Error::Interrupted("stopped".into())) }
        };
        logps(&model, &items, Some(100), Some(folder.path()), &mut stop(300)).unwrap_err();
        assert_eq!(entries(folder.path()), 1);
        let mut calls = Vec::new();
        let again = logps(&model, &items, Some(100), Some(folder.path()), &mut |done| {
            calls.push(done);
            Ok(())
        });
        assert_eq!(again.unwrap(), whole);
        assert_eq!((calls[0], entries(folder.path())), (256, 3), "the first block is read, not computed");
        let cached = logps(&model, &items, Some(1), Some(folder.path()), &mut |_| Ok(())).unwrap();
        assert_eq!(cached, whole, "the cut does not matter");
    }

    /// As with labelled responses that come from pairs.
    #[test]
    fn items_with_one_prompt_share_it_and_keep_their_bits() {
        let model = model();
        let item = |prompt, response| Sequences { prompt, responses: vec![response], row: 0 };
        let (first, second): (&[u32], &[u32]) = (&[1, 5, 9], &[1, 5]);
        let items = [item(first, &[7, 2]), item(first, &[8, 9, 10, 2]), item(second, &[9, 7, 2]), item(first, &[6, 2])];
        let packing = Packing { for_scores: false, dropout: false };
        assert_eq!(packing.pack(&items, &[]).rows(), 3 + 1 + 3 + 2 + 2 + 1);
        let score =
            |items: &[Sequences<'_>], tokens| logps(&model, items, Some(tokens), None, &mut |_| Ok(())).unwrap();
        let alone: Vec<f64> = items.iter().flat_map(|item| score(std::slice::from_ref(item), 100)).collect();
        assert_eq!(score(&items, 100), alone);
        assert_eq!(score(&items, 9), alone, "a cut between them does not matter");
    }

    #[test]
    fn the_key_sees_weights_and_tokens_and_damage_is_computed_again() {
        let (model, mut tokens, folder) = (model(), tokens(20), tempfile::tempdir().unwrap());
        let score = |model: &Model, tokens: &[[u32; 5]]| {
            logps(model, &sequences(tokens), Some(100), Some(folder.path()), &mut |_| Ok(())).unwrap()
        };
        let first = score(&model, &tokens);
        assert_eq!((score(&model, &tokens), entries(folder.path())), (first.clone(), 1));
        let path = std::fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
        for damage in [&b""[..], b"nonsense"] {
            std::fs::write(&path, damage).unwrap();
            assert_eq!((score(&model, &tokens), entries(folder.path())), (first.clone(), 1));
        }
        let mut other = model.clone();
        other.weights[0] += 0.01;
        assert_ne!(score(&other, &tokens), first);
        tokens[19][3] += 1;
        assert_ne!(score(&model, &tokens), first);
        assert_eq!(entries(folder.path()), 3);
    }

    #[test]
    fn broken_weights_are_named_by_the_row() {
        let (mut model, tokens, folder) = (model(), tokens(3), tempfile::tempdir().unwrap());
        model.weights.fill(f32::NAN);
        let error = logps(&model, &sequences(&tokens), Some(100), Some(folder.path()), &mut |_| Ok(())).unwrap_err();
        assert!(error.to_string().contains("row 0") && error.exit_code() == 1, "{error}");
        assert_eq!(entries(folder.path()), 0, "what is no number is not kept");
    }
}
