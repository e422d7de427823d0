//! Adapters on disk: folders as the Python package PEFT writes and reads them.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::fields::Fields;
use super::hf::{Tensors, write_json};
use super::{AdapterSummary, Description, atomic, refuse_to_replace, write_safetensors};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::lora::{Adapter, LoraOptions, Projection};
use crate::tokenizer::Tokenizer;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

/// PEFT's ways to draw the first values that leave the base model as it is. The others (PiSSA, OLoRA, LoftQ, CorDA)
/// subtract the first values from it, so their adapters belong to a base model that is not on the disk.
const PLAIN_STARTS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// Fields that say how an adapter was trained or stored, and nothing about what it computes.
const IRRELEVANT: [&str; 14] = [
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "velora_config",
];

impl Adapter {
    /// Reads a PEFT folder, for models of the given shape.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be read; [`Error::Input`], which names file and field or tensor, when a file is
    /// damaged, asks for something that the engine does not do, or belongs to another model.
    pub fn load(folder: &Path, config: &ModelConfig) -> Result<Self> {
        let stored = Config::read(folder)?;
        let tensors = Tensors::open_file(&weights_file(folder)?)?;
        let targets = stored.targets.unwrap_or_else(|| targets_of(&tensors));
        let options = LoraOptions { targets, ..stored.options };
        options
            .validate(config)
            .map_err(|error| Error::input(format!("{} cannot be used. {error}", folder.display())))?;
        let mut adapter = Self::zeros(config, options);
        let source = format!("{CONFIG} with this model");
        adapter.weights = tensors.read(&adapter.layout.specs, &source, |_| false).map_err(|error| match error {
            Error::Input(what) => Error::input(format!(
                "{what} Use the adapter with the model that it was trained on{}.",
                stored.base.map_or(String::new(), |base| format!(" ({CONFIG} says {base})"))
            )),
            other => other,
        })?;
        Ok(adapter)
    }

    /// Writes a PEFT folder. `base` is where PEFT, and [`Checkpoint::load`](crate::Checkpoint::load), find the model that it
    /// adapts. The folder appears, or replaces an older adapter, only when it is complete and on the disk.
    ///
    /// # Errors
    /// [`Error::Io`] when the disk fails; [`Error::Input`] when `folder` exists and is something else than an adapter,
    /// which would be lost.
    pub fn save(&self, base: &Path, folder: &Path) -> Result<()> {
        self.save_with(None, base, folder)
    }

    /// As [`save`](Self::save), with a tokenizer that goes before the base model's.
    ///
    /// # Errors
    /// As [`save`](Self::save).
    pub fn save_with(&self, tokenizer: Option<&Tokenizer>, base: &Path, folder: &Path) -> Result<()> {
        refuse_to_replace(folder, CONFIG)?;
        atomic::write_folder(folder, |new| {
            tokenizer.map_or(Ok(()), |tokenizer| tokenizer.save(new))?;
            write_json(&new.join(CONFIG), to_json(&self.options, base))?;
            let specs = self.layout.specs.iter();
            let tensors: Vec<_> = specs
                .map(|spec| (spec.name.as_str(), spec.shape.as_slice(), &self.weights[spec.range.clone()]))
                .collect();
            let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
            atomic::write_file(&new.join(WEIGHTS), |out| write_safetensors(out, &tensors, metadata))
        })
    }
}

/// Whether a folder holds an adapter and no model of its own.
pub(super) fn is_adapter(folder: &Path) -> bool {
    folder.join(CONFIG).is_file() && !folder.join("config.json").exists()
}

/// Describes an adapter folder and the base model that it names.
pub(super) fn describe(folder: &Path) -> Result<Description> {
    let base = base_of(folder)?;
    let mut description = super::describe(&base)?;
    let tensors = Tensors::open_file(&weights_file(folder)?)?;
    let stored = Config::read(folder)?;
    description.adapter = Some(AdapterSummary {
        base: base.display().to_string(),
        parameters: tensors.numbers(),
        scale: stored.options.scale(),
        options: LoraOptions { targets: stored.targets.unwrap_or_else(|| targets_of(&tensors)), ..stored.options },
    });
    Ok(description)
}

/// The matrices that an adapter's tensors are for.
fn targets_of(tensors: &Tensors) -> Vec<Projection> {
    let is_there = |p: &Projection| tensors.names().any(|name| name.contains(&p.path()));
    Projection::ALL.into_iter().filter(is_there).collect()
}

/// The path of the model that an adapter folder names as its base: relative to the folder, or as it stands.
pub(super) fn base_of(folder: &Path) -> Result<PathBuf> {
    let config = folder.join(CONFIG);
    let advice = format!(
        "Download the model, put its path there, or fold the adapter into it by \
         `sacpo model fold-adapter MODEL {} OUT`.",
        folder.display()
    );
    let Some(base) = Config::read(folder)?.base else {
        return Err(Error::input(format!("{} names no base_model_name_or_path. {advice}", config.display())));
    };
    let candidates = [folder.join(&base), PathBuf::from(&base)];
    let Some(path) = candidates.into_iter().find(|path| path.exists()) else {
        return Err(Error::input(format!(
            "{} names the base model {base}, which is no folder or file on this machine. {advice}",
            config.display()
        )));
    };
    if is_adapter(&path) {
        return Err(Error::input(format!(
            "{} names the base model {base}, which is an adapter itself. Fold that one into its model first, by \
             `sacpo model fold-adapter`.",
            config.display()
        )));
    }
    Ok(path)
}

/// The weights of an adapter folder.
fn weights_file(folder: &Path) -> Result<PathBuf> {
    let path = folder.join(WEIGHTS);
    if path.exists() {
        return Ok(path);
    }
    Err(Error::input(format!(
        "{} has no {WEIGHTS}. If it has weights in another format (adapter_model.bin), load them with \
         `PeftModel.from_pretrained` of the Python package peft and save them with `save_pretrained`.",
        folder.display()
    )))
}

/// The contents of an `adapter_config.json`.
struct Config {
    /// Without the targets.
    options: LoraOptions,
    /// `None` when they are given as a pattern.
    targets: Option<Vec<Projection>>,
    base: Option<String>,
}

impl Config {
    fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(CONFIG);
        let mut fields = Fields::parse(&fs::read(&path).map_err(Error::io("read", &path))?, &path)?;
        let kind = fields.text("peft_type")?;
        if fields.required("peft_type", kind.clone())? != "LORA" {
            return Err(fields.unsupported("peft_type", &json!(kind)));
        }
        fields.must_be("task_type", &[json!("CAUSAL_LM")])?;
        let (rank, alpha) = (fields.size("r")?, fields.number("lora_alpha")?);
        let options = LoraOptions {
            rank: fields.required("r", rank)?,
            alpha: fields.required("lora_alpha", alpha)?,
            dropout: fields.number("lora_dropout")?.unwrap_or(0.0),
            targets: Vec::new(),
            rank_stabilized: fields.flag("use_rslora")?.unwrap_or(false),
            dora: fields.flag("use_dora")?.unwrap_or(false),
        };
        let targets = targets(&mut fields)?;
        let base = fields.text("base_model_name_or_path")?;
        match fields.take("init_lora_weights") {
            None | Some(Value::Bool(_)) => {}
            Some(Value::String(start)) if PLAIN_STARTS.contains(&start.as_str()) => {}
            Some(start) => return Err(fields.unsupported("init_lora_weights", &start)),
        }
        fields.must_be("bias", &[json!("none")])?;
        for name in IRRELEVANT {
            fields.take(name);
        }
        // whatever is left and not switched off would change the arithmetic: modules_to_save, rank_pattern, …
        fields.refuse_switched_on()?;
        Ok(Self { options, targets, base })
    }
}

/// `target_modules`: names of matrices, alone or with what stands before them, or `all-linear`, or a pattern.
fn targets(fields: &mut Fields) -> Result<Option<Vec<Projection>>> {
    const NEEDS: &str = "a list of names, or a text";
    let value = fields.take("target_modules");
    let value = fields.required("target_modules", value)?;
    let names = match &value {
        Value::String(text) if text == "all-linear" => return Ok(Some(Projection::ALL.to_vec())),
        Value::String(_) => return Ok(None),
        Value::Array(names) => names,
        other => return Err(fields.wrong("target_modules", other, NEEDS)),
    };
    let mut targets = Vec::new();
    for name in names {
        let name = name.as_str().ok_or_else(|| fields.wrong("target_modules", &value, NEEDS))?;
        let last = name.rsplit('.').next().unwrap_or(name);
        let projection = last.parse().map_err(|error| fields.wrong_because("target_modules", &error))?;
        if !targets.contains(&projection) {
            targets.push(projection);
        }
    }
    targets.sort_unstable();
    Ok(Some(targets))
}

/// The contents of an `adapter_config.json`.
fn to_json(options: &LoraOptions, base: &Path) -> Map<String, Value> {
    let whole = options.alpha.fract() == 0.0 && options.alpha < 2f64.powi(53);
    let fields = [
        ("alpha_pattern", json!({})),
        ("base_model_name_or_path", json!(base)),
        ("bias", json!("none")),
        ("fan_in_fan_out", json!(false)),
        ("inference_mode", json!(true)),
        ("init_lora_weights", json!(true)),
        ("layers_pattern", Value::Null),
        ("layers_to_transform", Value::Null),
        // PEFT's type says that it is whole; other numbers work nevertheless
        ("lora_alpha", if whole { json!(options.alpha as u64) } else { json!(options.alpha) }),
        ("lora_dropout", json!(options.dropout)),
        ("modules_to_save", Value::Null),
        ("peft_type", json!("LORA")),
        ("r", json!(options.rank)),
        ("rank_pattern", json!({})),
        ("revision", Value::Null),
        ("target_modules", json!(options.targets)),
        ("task_type", json!("CAUSAL_LM")),
        ("use_dora", json!(options.dora)),
        ("use_rslora", json!(options.rank_stabilized)),
    ];
    fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}
