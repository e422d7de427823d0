//! `sacpo model`.

use std::path::{Path, PathBuf};

use engine::chat::plain_template;
use engine::checkpoint::{Checkpoint, atomic, describe};
use engine::tokenizer::Tokenizer;
use engine::{Adapter, Error, LoraOptions, Projection, Result};

use super::{print_json, refuse_existing};
use crate::cli::{AddAdapter, Global, ModelCommand};
use crate::ui;

pub(super) fn run(command: &ModelCommand, global: Global) -> Result<()> {
    match command {
        ModelCommand::Inspect { model } => {
            let description = describe(model)?;
            if global.json {
                return print_json(&description);
            }
            ui::print(description.to_string().trim_end())
        }
        ModelCommand::Convert { from, to } => convert(from, to, global),
        ModelCommand::SetTemplate { model, text } => set_template(model, text, global),
        ModelCommand::AddAdapter(options) => add_adapter(options, global),
        ModelCommand::FoldAdapter { model, adapter, to } => fold_adapter(model, adapter, to, global),
        ModelCommand::StackAdapters { model, adapters, to } => stack_adapters(model, adapters, to, global),
    }
}

fn convert(from: &Path, to: &Path, global: Global) -> Result<()> {
    refuse_existing(to)?;
    save(&Checkpoint::load(from)?, to, global)
}

fn set_template(model: &Path, text: &str, global: Global) -> Result<()> {
    let template = plain_template(text)?;
    // what is no model's folder gets no template
    Tokenizer::from_folder(model)?;
    let path = model.join("chat_template.jinja");
    match std::fs::read_to_string(&path) {
        Ok(found) if found != template => {
            return Err(Error::input(format!(
                "{} is there already, with another template. Move it away first if the model is to have another template.",
                path.display()
            )));
        }
        _ => atomic::write_file(&path, |out| out.write_all(template.as_bytes()))?,
    }
    if global.json {
        return print_json(&serde_json::json!({"template": path}));
    }
    ui::print(path.display().to_string())
}

fn add_adapter(options: &AddAdapter, global: Global) -> Result<()> {
    refuse_existing(&options.to)?;
    let targets = match options.targets.as_str() {
        "all" => Projection::ALL.to_vec(),
        names => names.split(',').map(|name| name.trim().parse()).collect::<Result<_>>()?,
    };
    let lora = LoraOptions {
        rank: options.rank,
        alpha: options.alpha,
        dropout: options.dropout,
        targets,
        rank_stabilized: options.rank_stabilized,
        dora: options.dora,
    };
    let model = load_base(&options.model)?.model;
    save_adapter(&Adapter::new(&model, lora, options.seed)?, &options.model, &options.to, global)
}

fn fold_adapter(model: &Path, adapter: &Path, to: &Path, global: Global) -> Result<()> {
    refuse_existing(to)?;
    let mut checkpoint = load_base(model)?;
    Adapter::load(adapter, &checkpoint.model.config)?.fold_into(&mut checkpoint.model);
    save(&checkpoint, to, global)
}

fn stack_adapters(model: &Path, adapters: &[PathBuf], to: &Path, global: Global) -> Result<()> {
    refuse_existing(to)?;
    let config = load_base(model)?.model.config;
    let adapters = adapters.iter().map(|folder| Adapter::load(folder, &config)).collect::<Result<Vec<_>>>()?;
    save_adapter(&Adapter::stack(&config, &adapters.iter().collect::<Vec<_>>())?, model, to, global)
}

/// Loads a model that is no adapter: an adapter's own base would be lost where this one is named as a base.
fn load_base(path: &Path) -> Result<Checkpoint> {
    if describe(path)?.adapter.is_some() {
        return Err(Error::input(format!(
            "{0} is an adapter, but the model below it is needed here. Give that one, or write the model that both make \
             by `sacpo model convert {0} OUT` and give that.",
            path.display()
        )));
    }
    Checkpoint::load(path)
}

fn save(checkpoint: &Checkpoint, to: &Path, global: Global) -> Result<()> {
    checkpoint.save(to)?;
    report(checkpoint.model.layout.len, to, global)
}

fn save_adapter(adapter: &Adapter, base: &Path, to: &Path, global: Global) -> Result<()> {
    // absolute, so that PEFT finds the base from any folder
    let base = base.canonicalize().map_err(Error::io("find", base))?;
    adapter.save(&base, to)?;
    report(adapter.layout.len, to, global)
}

fn report(parameters: usize, to: &Path, global: Global) -> Result<()> {
    ui::say(format!("Wrote {parameters} parameters to {}.", to.display()));
    if global.json {
        return print_json(&describe(to)?);
    }
    Ok(())
}
