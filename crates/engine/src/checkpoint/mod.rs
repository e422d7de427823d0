//! Models on disk: a Hugging Face folder in and out, a GGUF file in, a PEFT adapter in and out.

mod adapter;
pub mod atomic;
mod describe;
mod encoding;
mod fields;
mod generation;
mod gguf;
mod hf;
mod mapped;

use std::fs;
use std::path::Path;

pub use describe::{AdapterSummary, Description, TensorSummary, TokenizerSummary};
pub use encoding::{TensorData, write_safetensors};
pub use generation::GenerationConfig;
pub use hf::StreamedModel;
pub use mapped::Mapped;

use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::lora::Adapter;
use crate::model::{Model, ParamSpec};
use crate::tokenizer::Tokenizer;

/// A model with all that is needed to use it.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// Shape and weights.
    pub model: Model,
    /// The tokenizer that the model was trained with.
    pub tokenizer: Tokenizer,
    /// The publisher's defaults for generation.
    pub generation: GenerationConfig,
}

impl Checkpoint {
    /// Reads a Hugging Face folder, a `.gguf` file, or a PEFT folder, whose adapter is folded into the base model that
    /// it names. Weights are widened to f32.
    ///
    /// Published files often disagree on the special tokens (`config.json` of a chat model may still name the EOS of
    /// its base model), so what is loaded has one answer, in `model.config` and in `generation`: BOS is the first that
    /// any file names, and every token that any file calls EOS ends a response.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be read; [`Error::Input`], which names file and field or tensor, when a file is
    /// damaged, asks for something that the engine does not do, or when the tokenizer has more tokens than the model.
    pub fn load(path: &Path) -> Result<Self> {
        let (mut model, tokenizer, mut generation) = match format(path)? {
            Format::Gguf => gguf::load(path)?,
            Format::Folder => (hf::load_model(path)?, Tokenizer::from_folder(path)?, hf::load_generation(path)?),
            Format::Adapter => {
                let mut base = Self::load(&adapter::base_of(path)?)?;
                base.adapt(path)?.fold_into(&mut base.model);
                return Ok(base);
            }
        };
        agree(&mut model.config, &tokenizer, &mut generation, path)?;
        Ok(Self { model, tokenizer, generation })
    }

    /// Reads a reward or cost model: a Hugging Face folder of a sequence classification with one label.
    ///
    /// # Errors
    /// As [`Checkpoint::load`]; [`Error::Input`] for anything else than such a folder.
    pub fn load_scorer(path: &Path) -> Result<Self> {
        let Format::Folder = format(path)? else {
            return Err(Error::input(format!(
                "{} is no reward or cost model: such a model is a folder with config.json and safetensors.",
                path.display()
            )));
        };
        let (mut model, tokenizer) = (hf::load_scorer(path)?, Tokenizer::from_folder(path)?);
        let mut generation = GenerationConfig::default();
        agree(&mut model.config, &tokenizer, &mut generation, path)?;
        Ok(Self { model, tokenizer, generation })
    }

    /// This language model as a reward or cost model that gives every text the score 0. Its padding token is
    /// [`Tokenizer::padding`].
    pub fn into_scorer(self) -> Self {
        let pad = self.tokenizer.padding();
        let tokenizer = self.tokenizer.padded_with(pad);
        Self { model: self.model.with_score_head(pad), tokenizer, generation: GenerationConfig::default() }
    }

    /// Reads the adapter of a PEFT folder of which this is the base model, and leaves the weights alone. A tokenizer in the
    /// folder goes before the base model's.
    ///
    /// # Errors
    /// As [`Adapter::load`], and as [`Checkpoint::load`] for the tokenizer.
    pub fn adapt(&mut self, folder: &Path) -> Result<Adapter> {
        let adapter = Adapter::load(folder, &self.model.config)?;
        if let Some(tokenizer) = Tokenizer::found_in(folder)? {
            self.tokenizer = tokenizer;
        }
        agree(&mut self.model.config, &self.tokenizer, &mut self.generation, folder)?;
        Ok(adapter)
    }

    /// Writes a Hugging Face folder with f32 weights that this crate and `transformers` load. The folder appears, or
    /// replaces an older checkpoint, only when it is complete and on the disk.
    ///
    /// # Errors
    /// [`Error::Io`] when the disk fails; [`Error::Input`] when `folder` exists and is something else than a checkpoint,
    /// which would be lost.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let mut values =
            |spec: &ParamSpec, put: &mut dyn FnMut(&[f32]) -> Result<()>| put(&self.model.weights[spec.range.clone()]);
        save_in_parts(folder, &self.model.config, &self.tokenizer, &self.generation, &mut values)
    }
}

/// Gives the numbers of a tensor to its second argument, in order, in one or more parts.
pub type Values<'a> = dyn FnMut(&ParamSpec, &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> + 'a;

/// Writes a checkpoint as [`Checkpoint::save`] does, of a model that need not be in memory: `values` is asked for each
/// tensor of the layout, in its order.
///
/// # Errors
/// As [`Checkpoint::save`], and what `values` returns; `folder` is then what it was.
///
/// # Panics
/// If `values` gives a tensor more or fewer numbers than its shape has.
pub fn save_in_parts(
    folder: &Path,
    config: &ModelConfig,
    tokenizer: &Tokenizer,
    generation: &GenerationConfig,
    values: &mut Values<'_>,
) -> Result<()> {
    refuse_to_replace(folder, "config.json")?;
    atomic::write_folder(folder, |new| hf::save(config, tokenizer, generation, values, new))
}

/// Lets the files of a checkpoint have one answer on special tokens, as [`Checkpoint::load`] says.
fn agree(
    config: &mut ModelConfig,
    tokenizer: &Tokenizer,
    generation: &mut GenerationConfig,
    path: &Path,
) -> Result<()> {
    let (needs, has) = (tokenizer.vocab_size(), config.vocab_size);
    if needs > has {
        return Err(Error::input(format!(
            "The tokenizer in {} has token ids up to {}, but the model's vocabulary has {has}. This is the wrong \
             tokenizer for the model: put the model's own tokenizer.json beside its weights.",
            path.display(),
            needs - 1,
        )));
    }
    config.bos_token_id = config.bos_token_id.or(generation.bos_token_id).or(tokenizer.bos());
    for id in generation.eos_token_ids.iter().copied().chain(tokenizer.eos()) {
        if !config.eos_token_ids.contains(&id) {
            config.eos_token_ids.push(id);
        }
    }
    config.validate(&path.display().to_string())?;
    generation.bos_token_id = config.bos_token_id;
    generation.eos_token_ids = config.eos_token_ids.clone();
    Ok(())
}

/// Describes a Hugging Face folder, a `.gguf` file, or a PEFT folder with its base, without reading weights.
///
/// # Errors
/// As [`Checkpoint::load`], save for what only the weights can show.
pub fn describe(path: &Path) -> Result<Description> {
    match format(path)? {
        Format::Gguf => gguf::describe(path),
        Format::Folder => hf::describe(path),
        Format::Adapter => adapter::describe(path),
    }
}

/// Reads the language model of a Hugging Face folder, without its tokenizer.
///
/// # Errors
/// As [`Checkpoint::load`].
pub fn load_model(folder: &Path) -> Result<Model> {
    hf::load_model(folder)
}

/// Reads the reward or cost model of a Hugging Face folder, without its tokenizer.
///
/// # Errors
/// As [`Checkpoint::load_scorer`].
pub fn load_scorer(folder: &Path) -> Result<Model> {
    hf::load_scorer(folder)
}

enum Format {
    Folder,
    Gguf,
    Adapter,
}

fn format(path: &Path) -> Result<Format> {
    let metadata = fs::metadata(path).map_err(Error::io("read the model", path))?;
    if metadata.is_dir() {
        return Ok(if adapter::is_adapter(path) { Format::Adapter } else { Format::Folder });
    }
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
        return Ok(Format::Gguf);
    }
    Err(Error::input(format!(
        "{} is neither a folder nor a .gguf file. Give the folder that holds config.json, or a GGUF file.",
        path.display()
    )))
}

/// Refuses to overwrite anything but nothing, an empty folder, or a folder of files, `mark` among them, which shows that
/// it is of the same kind.
fn refuse_to_replace(folder: &Path, mark: &str) -> Result<()> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(source) if source.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(Error::io("replace", folder)(source)),
    };
    let paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    let is_same_kind = folder.join(mark).is_file() && paths.iter().all(|path| path.is_file());
    if paths.is_empty() || is_same_kind {
        return Ok(());
    }
    Err(Error::input(format!(
        "{} exists and is not a folder that holds only a checkpoint ({mark}), so it is not replaced. Choose another \
         folder, or remove it first.",
        folder.display()
    )))
}
