//! Answers that a policy gives, a block of prompts after the other; every block is kept as soon as it is complete.

use std::path::{Path, PathBuf};

use engine::checkpoint::atomic;
use engine::generate::{Answer, SamplingOptions, generate};
use engine::{Error, Mixture, Result};

/// The answers of one policy to a list of prompts, of which some blocks may be kept.
#[derive(Debug)]
pub(super) struct Drawing<'a> {
    blocks: Vec<&'a [Vec<u32>]>,
    options: SamplingOptions,
    places: Vec<PathBuf>,
    kept: Vec<Option<Vec<Answer>>>,
}

impl<'a> Drawing<'a> {
    /// Looks at what the folder `cache` has of the answers to `prompts`, which are kept `per_block` together. `policy` names all
    /// that answers depend on beside prompts and options: the hash of the policy's weights, and of the tokenizer where answers
    /// are decoded.
    pub(super) fn open(
        cache: &Path,
        policy: &str,
        prompts: &'a [Vec<u32>],
        per_block: usize,
        options: &SamplingOptions,
    ) -> Self {
        let blocks: Vec<&[Vec<u32>]> = prompts.chunks(per_block).collect();
        let place = |(number, block): (usize, &&[Vec<u32>])| cache.join(file_name(policy, block, number, options));
        let places: Vec<PathBuf> = blocks.iter().enumerate().map(place).collect();
        let kept = places.iter().map(|place| read_kept(place)).collect();
        Self { blocks, options: options.clone(), places, kept }
    }

    /// The number of blocks that are kept, and of all.
    pub(super) fn blocks(&self) -> [usize; 2] {
        [self.kept.iter().flatten().count(), self.blocks.len()]
    }

    /// The answers, in the order of the prompts, if all are kept.
    pub(super) fn kept(&self) -> Option<Vec<Answer>> {
        let kept: Option<Vec<&[Answer]>> = self.kept.iter().map(Option::as_deref).collect();
        Some(kept?.concat())
    }

    /// Draws and keeps the answers that are not kept yet, and returns all. `decode` turns tokens into the text of an answer;
    /// `finished` is told how many there are, and may end the work with an error.
    ///
    /// # Errors
    /// Those of [`generate`], and of writing.
    pub(super) fn complete(
        mut self,
        policy: &Mixture<'_>,
        decode: &dyn Fn(&[u32]) -> Result<String>,
        finished: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<Answer>> {
        let mut before = 0;
        for (number, block) in self.blocks.iter().enumerate() {
            if self.kept[number].is_none() {
                // every block has its own stream of random numbers
                let seed = self.options.seed.wrapping_add((number as u64) << 32);
                let options = SamplingOptions { seed, ..self.options.clone() };
                let answers = generate(policy.clone(), block, &options, decode, &mut |done| finished(before + done))?;
                keep(&self.places[number], &answers)?;
                self.kept[number] = Some(answers);
            }
            before += block.len();
        }
        Ok(self.kept.into_iter().flatten().flatten().collect())
    }
}

fn file_name(policy: &str, prompts: &[Vec<u32>], block: usize, options: &SamplingOptions) -> String {
    // answers do not depend on how many are drawn at once
    let options = SamplingOptions { batch_size: 1, ..options.clone() };
    let (version, arithmetic) = (env!("CARGO_PKG_VERSION"), engine::arithmetic());
    let text = format!("{version} {arithmetic} {policy} {prompts:?} {block} {options:?}");
    format!("answers-{}.json", blake3::hash(text.as_bytes()).to_hex())
}

/// Kept answers, or nothing when the file is missing or damaged (they are then drawn again).
fn read_kept(path: &Path) -> Option<Vec<Answer>> {
    let kept: Vec<(Answer, Option<u32>)> = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    Some(kept.into_iter().map(|(answer, end)| Answer { end, ..answer }).collect())
}

/// Keeps answers, with the tokens that ended them, which the form of an answer for users leaves out.
fn keep(path: &Path, answers: &[Answer]) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    }
    let kept: Vec<(&Answer, Option<u32>)> = answers.iter().map(|answer| (answer, answer.end)).collect();
    atomic::write_file(path, |out| Ok(serde_json::to_writer(out, &kept)?))
}
