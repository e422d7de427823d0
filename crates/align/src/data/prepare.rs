//! From files of text to rows of tokens on disk, in memory that does not grow with the files.
//!
//! One thread reads rows and decides what becomes of them, and hands them on in blocks. The threads of the pool tokenise a block,
//! and meanwhile the rows of the one before go to the end of a file. Blocks are cut by the rows' size and taken in their order,
//! so that the same data always give the same file.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};

use engine::checkpoint::atomic;
use engine::tokenizer::Tokenizer;
use engine::{Error, Result};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::read::{Source, Usable};
use super::render::{Fitted, RenderOptions, Tokenizable, tokenize_rows};
use super::source::{Places, all_bytes, files};
use super::split::{Answered, Fate, HeldOut, Sieve, turns};
use super::tokens::{Stored, Writer, check, read};
use super::{LabelledExample, PreferencePair, Prompt, TokenizedExample, TokenizedPair};

/// Changes whenever the same data may give other tokens.
const VERSION: &str = "tokens v3";

/// Bytes of text in a block: some ten milliseconds of work.
const BLOCK: usize = 1 << 20;

/// Blocks that wait for a thread.
const WAITING: usize = 2;

/// What rows are made of, which of them are taken, and how they become tokens.
#[derive(Debug, Clone)]
pub struct Preparation<'a> {
    /// The rows to train on, and those held out unless they have a source of their own.
    pub source: Source<'a>,
    /// Which rows are held out.
    pub held_out: HeldOut<'a>,
    /// Prompts, such as those of an evaluation, whose rows are left out; case and white space do not count.
    pub excluded: Vec<Prompt>,
    /// Whether rows that say the same as one before them are left out.
    pub deduplicate: bool,
    /// How many rows to train on and to hold out are taken at most.
    pub most: [Option<usize>; 2],
    /// Which are taken, if not all: those that a shuffle by this seed puts first, in the files' order. Nothing: the first of the
    /// files, and rows behind the last of them are not read.
    pub shuffle: Option<u64>,
    /// Turns text into tokens.
    pub tokenizer: &'a Tokenizer,
    /// How.
    pub render: RenderOptions,
}

/// Rows as tokens on disk, and what became of the others.
#[derive(Debug, Clone, PartialEq)]
pub struct Prepared<T> {
    /// The rows to train on, in their order.
    pub train: Vec<T>,
    /// The rows that are held out, in their order.
    pub held_out: Vec<T>,
    /// What became of the other rows.
    pub report: Report,
}

/// What became of the rows of a data set, counted up to the last row that was needed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Report {
    /// Whether the prompts are plain texts, to which no chat template applies; the rows of one data set are alike.
    pub plain_text: bool,
    /// Bad rows that were left out.
    pub bad: usize,
    /// What is wrong with the first of them, as a sentence that names it.
    pub first_bad: Option<String>,
    /// Rows left out, since their prompts are excluded or held out.
    pub excluded: usize,
    /// Rows left out, since they repeat others.
    pub repeated: usize,
    /// Rows left out, since their prompts leave no room for a response.
    pub dropped_prompts: usize,
    /// Prompts that lost their first tokens.
    pub cut_prompts: usize,
    /// Responses that lost their last tokens.
    pub truncated_responses: usize,
    /// Rows left out, since the objective cannot learn from them.
    pub not_kept: usize,
}

/// How far a preparation or a conversion is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Rows that were tokenised or written.
    pub rows: usize,
    /// Bytes of the files that were read, compressed as they are.
    pub bytes: u64,
    /// Bytes of all files.
    pub all_bytes: u64,
}

/// A kind of row that training takes.
trait Trainable: Usable + Tokenizable + Answered + Send + Sync {}

impl Trainable for PreferencePair {}
impl Trainable for LabelledExample {}

/// Says whether a tokenised row is taken; it also gets where the rows so far stand, for messages.
pub type Keep<'a, T> = &'a (dyn Fn(&T, &Places) -> Result<bool> + Sync);

/// Rows on their way, as texts or as tokens.
struct Block<T> {
    rows: Vec<T>,
    /// Whether each of them is held out.
    held_out: Vec<bool>,
    /// Where the rows of the source so far stand.
    places: Places,
    /// What became of the rows between those of the block before and the last of these.
    report: Report,
}

impl<T> Default for Block<T> {
    fn default() -> Self {
        Self { rows: Vec::new(), held_out: Vec::new(), places: Places::default(), report: Report::default() }
    }
}

/// What stands beside the file of tokens.
#[derive(Serialize, Deserialize)]
struct Index {
    /// [`blake3`] of the file.
    hash: String,
    /// Rows to train on, and rows that are held out.
    rows: [usize; 2],
    report: Report,
}

impl Preparation<'_> {
    /// Preference pairs as tokens in files of the folder `cache`, which are made unless they are there.
    ///
    /// `keep` says whether a row is taken, which it must decide alike for the same `rule`. `progress` is called now and then,
    /// and may end the work with an error.
    ///
    /// # Errors
    /// Those of [`read_pairs`](super::read_pairs), [`tokenize_pairs`](super::tokenize_pairs), `keep` and `progress`; a folder
    /// that cannot be written. Nothing unfinished stays in the folder.
    pub fn pairs(
        &self,
        cache: &Path,
        rule: &str,
        keep: Keep<'_, TokenizedPair>,
        progress: &mut dyn FnMut(Progress) -> Result<()>,
    ) -> Result<Prepared<TokenizedPair>> {
        self.run::<PreferencePair>(cache, rule, keep, progress)
    }

    /// Labelled responses, as [`pairs`](Self::pairs) gives pairs.
    ///
    /// # Errors
    /// As there.
    pub fn examples(
        &self,
        cache: &Path,
        rule: &str,
        keep: Keep<'_, TokenizedExample>,
        progress: &mut dyn FnMut(Progress) -> Result<()>,
    ) -> Result<Prepared<TokenizedExample>> {
        self.run::<LabelledExample>(cache, rule, keep, progress)
    }

    fn run<T: Trainable>(
        &self,
        cache: &Path,
        rule: &str,
        keep: Keep<'_, T::Tokenized>,
        progress: &mut dyn FnMut(Progress) -> Result<()>,
    ) -> Result<Prepared<T::Tokenized>> {
        let key = self.key::<T>(rule)?;
        let [tokens, index] = ["bin", "json"].map(|ending| cache.join(format!("tokens-{key}.{ending}")));
        let kept = std::fs::read(&index).ok().and_then(|bytes| serde_json::from_slice::<Index>(&bytes).ok());
        if let Some(Index { hash, rows, report }) = kept
            && check(&tokens, &hash).is_ok()
            && let Ok(sides) = read(&tokens, rows)
        {
            return Ok(self.prepared(sides, report));
        }
        std::fs::create_dir_all(cache).map_err(Error::io("create", cache))?;
        let mut report = Report::default();
        let mut written = (String::new(), [0; 2]);
        atomic::try_write_file(&tokens, |out| {
            let mut writer = Writer::new(&tokens, out);
            self.write::<T>(&mut writer, &mut report, keep, progress)?;
            written = (writer.finish()?, writer.rows);
            Ok(())
        })?;
        let (hash, rows) = written;
        let sides = read(&tokens, rows)?;
        let kept = Index { hash, rows, report: report.clone() };
        atomic::write_file(&index, |out| Ok(serde_json::to_writer_pretty(out, &kept)?))?;
        Ok(self.prepared(sides, report))
    }

    /// The rows of both sides that are taken.
    fn prepared<T>(&self, mut sides: [Vec<T>; 2], report: Report) -> Prepared<T> {
        if let Some(seed) = self.shuffle {
            for (rows, most) in sides.iter_mut().zip(self.most) {
                let mut order: Vec<usize> = (0..rows.len()).collect();
                order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
                let mut taken = vec![false; rows.len()];
                order.iter().take(most.unwrap_or(usize::MAX)).for_each(|&row| taken[row] = true);
                let mut taken = taken.into_iter();
                rows.retain(|_| taken.next() == Some(true));
            }
        }
        let [train, held_out] = sides;
        Prepared { train, held_out, report }
    }

    /// How many rows of both sides are written at most.
    fn written(&self) -> [Option<usize>; 2] {
        if self.shuffle.is_some() { [None; 2] } else { self.most }
    }

    /// Names everything that the tokens depend on.
    fn key<T: Usable>(&self, rule: &str) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        let Self { source, held_out, excluded, deduplicate, tokenizer, render, .. } = self;
        let share = match held_out {
            HeldOut::Share { fraction, seed } => Some((fraction, seed)),
            HeldOut::Path(_) => None,
        };
        let Source { format, metric, skip_bad_rows, .. } = source;
        let settings =
            (T::NAME, format, metric, skip_bad_rows, share, excluded, deduplicate, self.written(), render, rule);
        hasher.update(format!("{VERSION} {} {settings:?}", tokenizer.hash()).as_bytes());
        for source in self.sources() {
            let files = files(source.path)?;
            // which files are held out counts, not only which there are
            hasher.update(&(files.len() as u64).to_le_bytes());
            for path in files {
                let file = std::fs::File::open(&path).map_err(Error::io("read", &path))?;
                let mut content = blake3::Hasher::new();
                content.update_reader(file).map_err(Error::io("read", &path))?;
                hasher.update(content.finalize().as_bytes());
            }
        }
        Ok(hasher.finalize().to_hex()[..32].to_owned())
    }

    /// What is read, that which is held out first.
    fn sources(&self) -> impl Iterator<Item = Source<'_>> {
        let held_out = match self.held_out {
            HeldOut::Share { .. } => None,
            HeldOut::Path(path) => Some(Source { path, ..self.source }),
        };
        held_out.into_iter().chain([self.source])
    }

    /// Writes all rows.
    fn write<T: Trainable>(
        &self,
        writer: &mut Writer<'_>,
        report: &mut Report,
        keep: Keep<'_, T::Tokenized>,
        progress: &mut dyn FnMut(Progress) -> Result<()>,
    ) -> Result<()> {
        let all_bytes = self.sources().map(|source| all_bytes(source.path)).sum::<Result<u64>>()?;
        let read = Arc::new(AtomicU64::new(0));
        let apart = matches!(self.held_out, HeldOut::Path(_));
        let mut sieve = Sieve::new(self.deduplicate);
        self.excluded.iter().for_each(|prompt| sieve.exclude(prompt));
        let mut rows = 0;
        for (at, source) in self.sources().enumerate() {
            let side = apart.then_some(at == 0);
            let (send, blocks) = sync_channel(WAITING);
            let (sieve, read) = (&mut sieve, &read);
            std::thread::scope(|scope| {
                // it does not use the pool, of which this thread may be the only one
                scope.spawn(|| self.read_blocks::<T>(&source, side, sieve, read, send));
                // dropped when this is done with, so that the reader does not wait to hand on more
                let blocks = blocks;
                let mut before: Option<Block<Fitted<T::Tokenized>>> = None;
                loop {
                    let next = blocks.recv().ok();
                    if next.is_none() && before.is_none() {
                        return Ok(());
                    }
                    rows += before.as_ref().map_or(0, |block| block.rows.len());
                    let (next, written) = rayon::join(
                        || next.map(|block| self.tokenize_block(block?)).transpose(),
                        || before.take().map_or(Ok(()), |block| self.write_block(block, writer, report, keep)),
                    );
                    // of two errors that of the rows that come first
                    written?;
                    progress(Progress { rows, bytes: read.load(Ordering::Relaxed), all_bytes })?;
                    if self.has_enough(writer.rows, side) {
                        return Ok(());
                    }
                    before = next?;
                }
            })?;
        }
        Ok(())
    }

    fn tokenize_block<T: Trainable>(&self, block: Block<T>) -> Result<Block<Fitted<T::Tokenized>>> {
        let Block { rows, held_out, places, report } = block;
        let rows = tokenize_rows::<T, T>(rows, &|row| places.of(row), self.tokenizer, &self.render)?;
        Ok(Block { rows, held_out, places, report })
    }

    fn write_block<T: Stored>(
        &self,
        block: Block<Fitted<T>>,
        writer: &mut Writer<'_>,
        report: &mut Report,
        keep: Keep<'_, T>,
    ) -> Result<()> {
        let Block { rows, held_out, places, report: read } = block;
        report.plain_text |= read.plain_text;
        report.bad += read.bad;
        report.first_bad = report.first_bad.take().or(read.first_bad);
        report.excluded += read.excluded;
        report.repeated += read.repeated;
        for (row, held_out) in rows.into_iter().zip(held_out) {
            let side = usize::from(held_out);
            if self.written()[side].is_some_and(|most| writer.rows[side] >= most) {
                continue;
            }
            let Some((row, cuts)) = row else {
                report.dropped_prompts += 1;
                continue;
            };
            report.truncated_responses += cuts.responses;
            report.cut_prompts += usize::from(cuts.prompt);
            if keep(&row, &places)? {
                writer.push(&row, held_out)?;
            } else {
                report.not_kept += 1;
            }
        }
        Ok(())
    }

    /// Whether no more rows of a source are needed; `side` says whether all of them are held out, or none.
    fn has_enough(&self, rows: [usize; 2], side: Option<bool>) -> bool {
        let full = |side: usize| self.written()[side].is_some_and(|most| rows[side] >= most);
        match side {
            // all of its openings are left out of training, whichever rows are taken
            Some(true) => false,
            Some(false) => full(0),
            None => full(0) && (full(1) || matches!(self.held_out, HeldOut::Share { fraction: 0.0, .. })),
        }
    }

    /// Reads the rows of a source, decides what becomes of them, and sends those to tokenise in blocks, until nobody takes
    /// them any more. `side` says whether all of them are held out, or none.
    fn read_blocks<T: Trainable>(
        &self,
        source: &Source<'_>,
        side: Option<bool>,
        sieve: &mut Sieve,
        read: &Arc<AtomicU64>,
        send: SyncSender<Result<Block<T>>>,
    ) {
        let mut block = Block::default();
        let mut bytes = 0;
        let mut known = Places::default();
        let outcome = source.visit::<T>(read, &mut |found, places| {
            let report = &mut block.report;
            if known != *places {
                known = places.clone();
            }
            match found {
                Err(described) => {
                    bytes += described.len();
                    report.bad += 1;
                    report.first_bad.get_or_insert(described);
                }
                Ok(row) => {
                    // rows that are left out count too: else a file of them would show no progress and could not be stopped
                    bytes += text_bytes(&row);
                    match sieve.fate(&row, side, &self.held_out) {
                        Fate::Excluded => report.excluded += 1,
                        Fate::Repeated => report.repeated += 1,
                        Fate::Taken { held_out } => {
                            report.plain_text |= matches!(row.prompt(), Prompt::Text(_));
                            block.rows.push(row);
                            block.held_out.push(held_out);
                        }
                    }
                }
            }
            if bytes < BLOCK {
                return Ok(ControlFlow::Continue(()));
            }
            bytes = 0;
            let full = Block { places: known.clone(), ..std::mem::take(&mut block) };
            let taken = send.send(Ok(full)).is_ok();
            Ok(if taken { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
        });
        // The rows before an error may be all that are needed. Nobody may be there to take either.
        let _ = send.send(Ok(Block { places: known, ..block }));
        if let Err(error) = outcome {
            let _ = send.send(Err(error));
        }
    }
}

/// Bytes of all texts of a row.
fn text_bytes(row: &impl Answered) -> usize {
    let prompt: usize = turns(row.prompt()).iter().map(|[_, content]| content.len()).sum();
    prompt + row.responses().iter().map(|(text, _)| text.len()).sum::<usize>()
}
