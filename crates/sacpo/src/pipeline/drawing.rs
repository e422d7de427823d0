//! Answers that a policy gives, a block of prompts after the other; every block is kept as soon as it is complete.

use std::path::{Path, PathBuf};

use engine::checkpoint::atomic;
use engine::generate::{Answer, Request, SamplingOptions, generate_each};
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
    /// Those of [`generate_each`], and of writing.
    pub(super) fn complete(
        self,
        policy: &Mixture<'_>,
        decode: &dyn Fn(&[u32]) -> Result<String>,
        progress: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<Answer>> {
        let Self { blocks, options, places, mut kept } = self;
        let per_block = blocks.first().map_or(1, |block| block.len());
        let mut requests = Vec::new();
        for (number, block) in blocks.iter().enumerate().filter(|(number, _)| kept[*number].is_none()) {
            // every block has its own streams of random numbers
            let seed = options.seed.wrapping_add((number as u64) << 32);
            requests.extend(block.iter().enumerate().map(|(place, prompt)| {
                let (index, stream) = (number * per_block + place, place as u64);
                Request { index, prompt, seed, stream }
            }));
        }
        let mut drawn: Vec<Vec<Option<Answer>>> = blocks.iter().map(|block| vec![None; block.len()]).collect();
        let mut done = kept.iter().flatten().map(Vec::len).sum();
        generate_each(policy.clone(), &requests, &options, decode, &mut |answers| {
            done += answers.len();
            for (index, answer) in answers {
                let number = index / per_block;
                let block = &mut drawn[number];
                block[index % per_block] = Some(answer);
                if block.iter().all(Option::is_some) {
                    let answers: Vec<Answer> = std::mem::take(block).into_iter().flatten().collect();
                    keep(&places[number], &answers)?;
                    kept[number] = Some(answers);
                }
            }
            progress(done)
        })?;
        Ok(kept.into_iter().flatten().flatten().collect())
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

#[cfg(test)]
mod tests {
    use engine::checkpoint::load_model;
    use engine::generate::generate;

    use super::*;

    #[test]
    fn what_is_drawn_together_is_what_blocks_have_by_themselves_and_whole_blocks_outlive_a_stop() {
        let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/../engine/tests/fixtures/tiny/tied");
        let model = load_model(Path::new(tiny)).unwrap();
        let policy = Mixture::from(&model);
        let no_text = |_: &[u32]| Ok(String::new());
        let options = SamplingOptions {
            max_new_tokens: 5,
            temperature: 1.0,
            seed: 7,
            batch_size: 4,
            ..SamplingOptions::default()
        };
        let prompts: Vec<Vec<u32>> = (0..8).map(|i| vec![1, 3 + i]).collect();
        let by_itself = |(number, block): (u64, &[Vec<u32>])| {
            let options = SamplingOptions { seed: 7 + (number << 32), ..options.clone() };
            generate(policy.clone(), block, &options, &no_text, &mut |_| Ok(())).unwrap()
        };
        let expected: Vec<Answer> = (0..).zip(prompts.chunks(3)).flat_map(by_itself).collect();

        let folder = tempfile::tempdir().unwrap();
        let open = || Drawing::open(folder.path(), "policy", &prompts, 3, &options);
        let stop = &mut |done| if done < 4 { Ok(()) } else { Err(Error::Interrupted("stopped".into())) };
        open().complete(&policy, &no_text, stop).unwrap_err();
        // of four answers that ended at once three are a block
        assert_eq!((open().blocks(), open().kept()), ([1, 3], None));
        let mut counts = Vec::new();
        let progress = &mut |done| {
            counts.push(done);
            Ok(())
        };
        assert_eq!(open().complete(&policy, &no_text, progress).unwrap(), expected);
        // what was kept is not drawn again, and every token asks whether to stop
        assert!(counts[0] == 3 && counts.len() > 5 && counts.last() == Some(&8), "{counts:?}");
        assert_eq!(open().kept(), Some(expected));
    }
}
