//! A model in a Hugging Face folder, or an adapter of one, that is read a part at a time.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::{Tensors, load_config, load_generation};
use crate::checkpoint::encoding::Encoding;
use crate::checkpoint::{Format, GenerationConfig, adapter, agree, format};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::lora::Adapter;
use crate::model::Layout;
use crate::tokenizer::Tokenizer;

/// A model whose weights stay on the disk until a part of a tensor is asked for. Of an adapter only its factors are in
/// memory, and each part is folded when it is read.
///
/// The files are read, not mapped: mapped pages would count as this process's memory until the system takes them back.
#[derive(Debug)]
pub struct StreamedModel {
    /// The shape, its special tokens as [`Checkpoint::load`](crate::Checkpoint::load) finds them.
    pub config: ModelConfig,
    /// The tensors that there are.
    pub layout: Layout,
    /// The folder that was opened.
    pub path: PathBuf,
    /// The folder that holds the weights: the same, or the base model of an adapter.
    pub folder: PathBuf,
    /// What is folded into each part.
    pub adapter: Option<Adapter>,
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
    /// Opens a Hugging Face folder, or a PEFT folder whose base model is one, with its tokenizer and its defaults for
    /// generation.
    ///
    /// # Errors
    /// As [`Checkpoint::load`](crate::Checkpoint::load); [`Error::Input`] also for a GGUF file and an adapter of one.
    pub fn open(path: &Path) -> Result<(Self, Tokenizer, GenerationConfig)> {
        let base = match format(path)? {
            Format::Adapter => adapter::base_of(path)?,
            _ => path.to_owned(),
        };
        if let Format::Gguf = format(&base)? {
            return Err(Error::input(format!(
                "{0} is {1}a GGUF file, but a folder with all weights as safetensors is needed here, which can be read a \
                 part at a time. Write one by `sacpo model convert {0} FOLDER` and give that.",
                path.display(),
                if base == path { "" } else { "an adapter of " }
            )));
        }
        let (mut model, mut tokenizer, mut generation) = Self::open_folder(&base)?;
        if base != path {
            model.adapter = Some(Adapter::load(path, &model.config)?);
            model.path = path.to_owned();
            tokenizer = Tokenizer::found_in(path)?.unwrap_or(tokenizer);
            agree(&mut model.config, &tokenizer, &mut generation, path)?;
        }
        Ok((model, tokenizer, generation))
    }

    fn open_folder(path: &Path) -> Result<(Self, Tokenizer, GenerationConfig)> {
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
        let model = Self {
            config,
            layout,
            path: path.to_owned(),
            folder: path.to_owned(),
            adapter: None,
            files,
            places,
            buffer: Vec::new(),
        };
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
        let spec = &self.layout.specs[tensor];
        assert!(range.start <= range.end && range.end <= spec.range.len());
        let Some(width) = spec.shape.get(1).copied().filter(|_| self.adapter.is_some()) else {
            return self.read_stored(tensor, range, out);
        };
        // whole rows, since DoRA divides each by its length
        let rows = range.start / width..range.end.div_ceil(width);
        let start = rows.start * width;
        self.read_stored(tensor, start..rows.end * width, out)?;
        if let Some(adapter) = &self.adapter {
            adapter.fold_rows_into(&self.layout, &self.layout.specs[tensor], rows.start, out);
        }
        out.truncate(range.end - start);
        out.drain(..range.start - start);
        Ok(())
    }

    /// As [`read`](Self::read), of the folder alone.
    fn read_stored(&mut self, tensor: usize, range: Range<usize>, out: &mut Vec<f32>) -> Result<()> {
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
