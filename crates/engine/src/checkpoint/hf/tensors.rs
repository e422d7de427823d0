//! The weights of a Hugging Face folder: one safetensors file, or several with an index.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensors};
use serde_json::json;

use crate::checkpoint::Values;
use crate::checkpoint::encoding::{Encoding, write_f32, write_header};
use crate::checkpoint::mapped::Mapped;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::model::{Layout, Model, ParamSpec};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The tensors of a folder, their data not yet read.
pub(in crate::checkpoint) struct Tensors {
    files: Vec<Mapped>,
    by_name: BTreeMap<String, Stored>,
}

/// Where a tensor is stored.
pub(super) struct Stored {
    /// Position in the list of files.
    pub(super) file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Position in the file.
    pub(super) bytes: Range<usize>,
}

impl Tensors {
    /// Reads the headers of a folder's weight files.
    pub(super) fn open(folder: &Path) -> Result<Self> {
        let mut tensors = Self { files: Vec::new(), by_name: BTreeMap::new() };
        for path in weight_files(folder)? {
            tensors.add(&path)?;
        }
        Ok(tensors)
    }

    /// Reads the header of one weight file.
    pub(in crate::checkpoint) fn open_file(path: &Path) -> Result<Self> {
        let mut tensors = Self { files: Vec::new(), by_name: BTreeMap::new() };
        tensors.add(path)?;
        Ok(tensors)
    }

    /// The tensors' names.
    pub(in crate::checkpoint) fn names(&self) -> impl Iterator<Item = &str> {
        self.by_name.keys().map(String::as_str)
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let file = Mapped::open(path)?;
        let (header, metadata) = SafeTensors::read_metadata(&file).map_err(|e| {
            Error::input(format!(
                "{} is not a valid safetensors file: {e}. It is probably truncated or damaged; fetch it again.",
                path.display()
            ))
        })?;
        // `read_metadata` has checked that the header and all tensors end within the file.
        let start = 8 + header;
        for (name, info) in metadata.tensors() {
            let bytes = start + info.data_offsets.0..start + info.data_offsets.1;
            let stored = Stored { file: self.files.len(), dtype: info.dtype, shape: info.shape.clone(), bytes };
            if let Some(other) = self.by_name.insert(name.clone(), stored) {
                let (first, second) = (self.files[other.file].path().display(), path.display());
                return Err(Error::input(format!("The tensor {name} is in {first} and again in {second}.")));
            }
        }
        self.files.push(file);
        Ok(())
    }

    /// Reads the weights of a model of the given shape, widened to f32.
    pub(super) fn load(&self, config: ModelConfig) -> Result<Model> {
        let (layout, sources) = self.of_model(&config)?;
        let weights = self.widen(&layout.specs, &sources);
        Ok(Model { config, layout, weights })
    }

    /// The tensors of a model of the given shape, and where each is stored.
    pub(super) fn of_model(&self, config: &ModelConfig) -> Result<(Layout, Vec<(Encoding, &Stored)>)> {
        self.check_size(config)?;
        let layout = Layout::new(config);
        let tied = config.tie_word_embeddings;
        let repeats = |name: &str| name.ends_with("rotary_emb.inv_freq") || (tied && name == "lm_head.weight");
        let sources = self.find_all(&layout.specs, "config.json", repeats)?;
        Ok((layout, sources))
    }

    /// The paths of the files, in the order in which [`Stored::file`] counts them.
    pub(super) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(Mapped::path)
    }

    /// Reads the tensors that `specs` lists, widened to f32, into one vector. There may be no others but those that
    /// `repeats` finds to say what is known anyway. `source` is what says which tensors there are, for messages.
    pub(in crate::checkpoint) fn read(
        &self,
        specs: &[ParamSpec],
        source: &str,
        repeats: impl Fn(&str) -> bool,
    ) -> Result<Vec<f32>> {
        Ok(self.widen(specs, &self.find_all(specs, source, repeats)?))
    }

    /// Where each tensor that `specs` lists is stored; parameters as in [`Self::read`].
    fn find_all(
        &self,
        specs: &[ParamSpec],
        source: &str,
        repeats: impl Fn(&str) -> bool,
    ) -> Result<Vec<(Encoding, &Stored)>> {
        let sources = specs.iter().map(|spec| self.find(spec, source)).collect::<Result<Vec<_>>>()?;
        let known: BTreeSet<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
        let extra = self.by_name.iter().find(|(name, _)| !known.contains(name.as_str()) && !repeats(name));
        if let Some((name, stored)) = extra {
            return Err(Error::input(format!(
                "{} holds the tensor {name} of shape {:?}, for which {source} has no place. Ignoring it would compute \
                 something else than what was trained.",
                self.files[stored.file].path().display(),
                stored.shape
            )));
        }
        Ok(sources)
    }

    /// The numbers of tensors in one vector.
    fn widen(&self, specs: &[ParamSpec], sources: &[(Encoding, &Stored)]) -> Vec<f32> {
        let mut weights = vec![0.0; specs.last().map_or(0, |spec| spec.range.end)];
        for (spec, (encoding, stored)) in specs.iter().zip(sources) {
            let file = &self.files[stored.file];
            let bytes = &file[stored.bytes.clone()];
            encoding.widen(bytes, &mut weights[spec.range.clone()]);
            // else the model would be in memory twice
            file.release(bytes);
        }
        weights
    }

    /// Number of numbers in all tensors.
    pub(in crate::checkpoint) fn numbers(&self) -> usize {
        self.by_name.values().map(|stored| stored.shape.iter().product::<usize>()).sum()
    }

    /// Number of tensors and of their bytes, by type.
    pub(super) fn by_type(&self) -> impl Iterator<Item = (String, usize)> {
        self.by_name.values().map(|stored| (format!("{:?}", stored.dtype), stored.bytes.len()))
    }

    /// Size of the files in bytes.
    pub(super) fn file_bytes(&self) -> usize {
        self.files.iter().map(|file| file.len()).sum()
    }

    /// Refuses a shape that needs more weights than the files can hold, before anything is allocated for it.
    fn check_size(&self, config: &ModelConfig) -> Result<()> {
        let (needs, bytes) = (config.parameter_count(), self.file_bytes());
        if needs.is_some_and(|needs| needs <= bytes / 2) {
            return Ok(());
        }
        let folder = self.files.first().and_then(|file| file.path().parent()).unwrap_or(Path::new("."));
        Err(Error::input(format!(
            "The config.json in {} describes a model of {} weights, but the weight files beside it have only {bytes} \
             bytes, at 2 or more per weight. Either the files are incomplete or config.json belongs to another model.",
            folder.display(),
            needs.map_or("too many".to_owned(), |n| n.to_string()),
        )))
    }

    /// The type and place of a tensor, which must have the shape that `source` gives it.
    fn find(&self, spec: &ParamSpec, source: &str) -> Result<(Encoding, &Stored)> {
        let (name, expected) = (&spec.name, &spec.shape);
        let Some(stored) = self.by_name.get(name) else {
            let files: Vec<_> = self.files.iter().map(|file| file.path().display().to_string()).collect();
            return Err(Error::input(format!(
                "The tensor {name} of shape {expected:?} is missing from {}. The file is incomplete, or {source} \
                 belongs to another model.",
                files.join(", ")
            )));
        };
        let file = &self.files[stored.file];
        if stored.shape != *expected {
            return Err(Error::input(format!(
                "In {} the tensor {name} has the shape {:?}, but {source} makes it {expected:?}. The two belong to \
                 different models.",
                file.path().display(),
                stored.shape
            )));
        }
        let encoding = match stored.dtype {
            Dtype::F32 => Encoding::F32,
            Dtype::F16 => Encoding::F16,
            Dtype::BF16 => Encoding::Bf16,
            other => {
                return Err(Error::input(format!(
                    "In {} the tensor {name} of shape {expected:?} is stored as {other:?}, but only F32, F16 and BF16 \
                     can be read. Save the model in one of them.",
                    file.path().display()
                )));
            }
        };
        Ok((encoding, stored))
    }
}

/// The weight files of a folder: `model.safetensors`, or the shards that the index names.
fn weight_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let single = folder.join(SINGLE);
    if single.is_file() {
        return Ok(vec![single]);
    }
    let index_path = folder.join(INDEX);
    if !index_path.is_file() {
        return Err(Error::input(format!(
            "{} has neither {SINGLE} nor {INDEX}. If it has weights in another format (pytorch_model.bin), load them \
             with `AutoModelForCausalLM.from_pretrained` of the Python package transformers and save them with \
             `save_pretrained`, which writes safetensors.",
            folder.display()
        )));
    }
    let text = fs::read(&index_path).map_err(Error::io("read", &index_path))?;
    let wrong = |what: String| Error::input(format!("{} is not a valid index: {what}.", index_path.display()));
    let index: serde_json::Value = serde_json::from_slice(&text).map_err(|e| wrong(e.to_string()))?;
    let map = index["weight_map"].as_object().ok_or_else(|| wrong("it has no object weight_map".into()))?;
    let mut files = BTreeSet::new();
    for (tensor, file) in map {
        // A plain file name, so that an index cannot point outside its folder.
        let name = file.as_str().filter(|name| Path::new(name).file_name().is_some_and(|n| n == *name));
        let name = name.ok_or_else(|| wrong(format!("the file of {tensor} is {file}, which is not a file name")))?;
        files.insert(folder.join(name));
    }
    Ok(files.into_iter().collect())
}

/// Writes tensors as f32: one file, or shards of at most `shard_bytes` (if a tensor fits) and an index. `values` gives
/// their numbers.
pub(super) fn save(specs: &[ParamSpec], values: &mut Values, folder: &Path, shard_bytes: usize) -> Result<()> {
    let mut shards: Vec<Vec<&ParamSpec>> = Vec::new();
    let mut room = 0;
    for spec in specs {
        let bytes = spec.range.len() * 4;
        match shards.last_mut() {
            Some(shard) if bytes <= room => {
                shard.push(spec);
                room -= bytes;
            }
            _ => {
                shards.push(vec![spec]);
                room = shard_bytes.saturating_sub(bytes);
            }
        }
    }
    if let [shard] = shards.as_slice() {
        return save_shard(shard, values, &folder.join(SINGLE));
    }
    let mut weight_map = serde_json::Map::new();
    for (i, shard) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        save_shard(shard, values, &folder.join(&name))?;
        weight_map.extend(shard.iter().map(|spec| (spec.name.clone(), json!(name))));
    }
    let index = json!({"metadata": {"total_size": specs.iter().map(|spec| spec.range.len() * 4).sum::<usize>()}, "weight_map": weight_map});
    let path = folder.join(INDEX);
    fs::write(&path, format!("{index:#}\n")).map_err(Error::io("write", &path))
}

/// Writes some tensors as one safetensors file.
fn save_shard(specs: &[&ParamSpec], values: &mut Values, path: &Path) -> Result<()> {
    let infos = specs.iter().map(|spec| (spec.name.as_str(), spec.shape.as_slice(), Dtype::F32, spec.range.len() * 4));
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path).map_err(Error::io("write", path))?);
    write_header(&mut out, infos, metadata).map_err(Error::io("write", path))?;
    for spec in specs {
        let mut written = 0;
        values(spec, &mut |part| {
            written += part.len();
            write_f32(&mut out, part).map_err(Error::io("write", path))
        })?;
        assert_eq!(written, spec.range.len(), "{} does not have the length of its shape", spec.name);
    }
    out.flush().map_err(Error::io("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{OutputHead, RopeScaling};

    #[test]
    fn large_models_are_cut_into_shards() {
        let config = ModelConfig {
            vocab_size: 100,
            hidden_size: 16,
            intermediate_size: 24,
            num_hidden_layers: 2,
            num_attention_heads: 2,
            num_key_value_heads: 1,
            head_dim: 8,
            max_position_embeddings: 64,
            rms_norm_eps: 1e-5,
            rope_theta: 1e4,
            rope_scaling: RopeScaling::Default,
            tie_word_embeddings: false,
            model_type: "llama".to_owned(),
            bos_token_id: None,
            eos_token_ids: vec![],
            head: OutputHead::Vocabulary,
        };
        let model = Model::random(config, 0.02, 1);
        let folder = tempfile::tempdir().unwrap();
        // Embedding and head are each larger than a shard may be; the blocks share shards.
        let mut values = |spec: &ParamSpec, put: &mut dyn FnMut(&[f32]) -> Result<()>| {
            // a tensor may come in parts
            model.weights[spec.range.clone()].chunks(1000).try_for_each(put)
        };
        save(&model.layout.specs, &mut values, folder.path(), 6000).unwrap();
        let files = weight_files(folder.path()).unwrap();
        assert!(files.len() > 3, "{files:?}");
        assert!(files[1].ends_with(format!("model-00002-of-{:05}.safetensors", files.len())));
        for (i, file) in files.iter().enumerate() {
            let bytes = fs::read(file).unwrap();
            let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let fits = bytes.len() - header - 8 <= 6000 || i == 0 || i == files.len() - 1;
            assert!(header.is_multiple_of(8) && fits, "{}", file.display());
        }
        let loaded = Tensors::open(folder.path()).unwrap().load(model.config.clone()).unwrap();
        assert!(loaded.weights == model.weights);
    }
}
