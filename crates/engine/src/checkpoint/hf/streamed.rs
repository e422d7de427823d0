//! A model in a Hugging Face folder that is read a part at a time.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::{Tensors, load_config, load_generation};
use crate::checkpoint::encoding::Encoding;
use crate::checkpoint::{Format, GenerationConfig, agree, format};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::model::Layout;
use crate::tokenizer::Tokenizer;

/// A model whose weights stay on the disk until a part of a tensor is asked for.
///
/// The files are read, not mapped: mapped pages would count as this process's memory until the system takes them back.
#[derive(Debug)]
pub struct StreamedModel {
    /// The shape, its special tokens as [`Checkpoint::load`](crate::Checkpoint::load) finds them.
    pub config: ModelConfig,
    /// The tensors that there are.
    pub layout: Layout,
    /// The folder.
    pub path: PathBuf,
    files: Vec<(PathBuf, File)>,
    /// Of each tensor of the layout.
    places: Vec<Place>,
    buffer: Vec<u8>,
}

#[derive(Debug)]
struct Place {
    file: usize,
    encoding: Encoding,
    start: u64,
}

impl StreamedModel {
    /// Opens a Hugging Face folder, with its tokenizer and its defaults for generation.
    ///
    /// # Errors
    /// As [`Checkpoint::load`](crate::Checkpoint::load); [`Error::Input`] also for a GGUF file and an adapter.
    pub fn open(path: &Path) -> Result<(Self, Tokenizer, GenerationConfig)> {
        let what = match format(path)? {
            Format::Folder => None,
            Format::Gguf => Some("a GGUF file"),
            Format::Adapter => Some("an adapter"),
        };
        if let Some(what) = what {
            return Err(Error::input(format!(
                "{0} is {what}, but a folder with all weights as safetensors is needed here, which can be read a part \
                 at a time. Write one by `sacpo model convert {0} FOLDER` and give that.",
                path.display()
            )));
        }
        let mut config = load_config(path)?;
        let tokenizer = Tokenizer::from_folder(path)?;
        let mut generation = load_generation(path)?;
        agree(&mut config, &tokenizer, &mut generation, path)?;
        let tensors = Tensors::open(path)?;
        let (layout, sources) = tensors.of_model(&config)?;
        let places = sources.into_iter().map(|(encoding, stored)| Place {
            file: stored.file,
            encoding,
            start: stored.bytes.start as u64,
        });
        let places = places.collect();
        let open = |path: &Path| Ok((path.to_owned(), File::open(path).map_err(Error::io("read", path))?));
        let files = tensors.paths().map(open).collect::<Result<_>>()?;
        let model = Self { config, layout, path: path.to_owned(), files, places, buffer: Vec::new() };
        Ok((model, tokenizer, generation))
    }

    /// Reads the numbers `range` of a tensor, given by its position in the layout, widened to f32, into `out`.
    ///
    /// # Errors
    /// [`Error::Io`] when the disk fails.
    ///
    /// # Panics
    /// If there is no such tensor, or `range` is not within it.
    pub fn read(&mut self, tensor: usize, range: Range<usize>, out: &mut Vec<f32>) -> Result<()> {
        assert!(range.start <= range.end && range.end <= self.layout.specs[tensor].range.len());
        let Place { file, encoding, start } = &self.places[tensor];
        // floats only, so that a block is one number
        let (_, width) = encoding.block();
        self.buffer.resize(range.len() * width, 0);
        let (path, file) = &mut self.files[*file];
        file.seek(SeekFrom::Start(start + (range.start * width) as u64))
            .and_then(|_| file.read_exact(&mut self.buffer))
            .map_err(Error::io("read", path))?;
        out.resize(range.len(), 0.0);
        encoding.widen(&self.buffer, out);
        Ok(())
    }
}
