//! The models and data that commands name, wherever they are.

use std::path::PathBuf;

use engine::Result;

use crate::cli::{Command, DataCommand, InspectData, LocalJudge, ModelCommand};
use crate::hub::{Content, Hub};
use crate::policy::PolicyName;

/// Puts paths on this machine in the place of all addresses on the Hub, so that the commands know nothing of it. Recipes are
/// fetched when they are read.
///
/// # Errors
/// As [`Hub::fetch`].
pub(super) fn fetch(command: &mut Command) -> Result<()> {
    let mut hub = Hub::new();
    for (path, content) in named(command) {
        if let Some(fetched) = hub.fetch(path, content)? {
            *path = fetched.path;
        }
    }
    Ok(())
}

type Input<'a> = (&'a mut PathBuf, Content);

fn data(path: &mut PathBuf) -> Input<'_> {
    (path, Content::Data)
}

fn model(path: &mut PathBuf) -> Input<'_> {
    (path, Content::Model)
}

fn tokenizer(path: &mut PathBuf) -> Input<'_> {
    (path, Content::Tokenizer)
}

fn policy(name: &mut PolicyName) -> Vec<Input<'_>> {
    name.models_mut().into_iter().map(model).collect()
}

/// What a command reads, in the order in which it is fetched.
fn named(command: &mut Command) -> Vec<Input<'_>> {
    match command {
        Command::Logps(options) => std::iter::once(data(&mut options.data)).chain(policy(&mut options.model)).collect(),
        Command::Generate(options) => options.prompts.iter_mut().map(data).chain(policy(&mut options.model)).collect(),
        Command::Merge(options) => {
            let models = options.models_and_out.split_last_mut().map(|(_out, models)| models);
            models.into_iter().flatten().chain(&mut options.base).map(model).collect()
        }
        Command::Data(DataCommand::Inspect(InspectData { source, model, .. })) => {
            vec![data(&mut source.file), tokenizer(model)]
        }
        Command::Data(DataCommand::Stats { source, model }) => {
            std::iter::once(data(&mut source.file)).chain(model.iter_mut().map(tokenizer)).collect()
        }
        Command::Bench(options) => options.model.iter_mut().map(model).collect(),
        Command::Data(DataCommand::Convert(options)) => vec![data(&mut options.from)],
        Command::Serve(options) => policy(&mut options.model),
        Command::Judge(options) => {
            let LocalJudge { reward_model, cost_model, implicit, .. } = &mut options.local;
            let models = reward_model.iter_mut().chain(cost_model).map(model);
            let policies = implicit.iter_mut().chain(&mut options.scoring.reference).flat_map(policy);
            models.chain(policies).collect()
        }
        Command::Rate(options) => options.files.iter_mut().map(data).collect(),
        Command::Model(command) => match command {
            ModelCommand::Inspect { model: path } | ModelCommand::Convert { from: path, .. } => vec![model(path)],
            ModelCommand::AddAdapter(options) => vec![model(&mut options.model)],
            ModelCommand::FoldAdapter { model: base, adapter, .. } => vec![model(base), model(adapter)],
            ModelCommand::StackAdapters { model: base, adapters, .. } => {
                std::iter::once(base).chain(adapters).map(model).collect()
            }
            // it writes into the model's folder
            ModelCommand::SetTemplate { .. } => Vec::new(),
        },
        Command::Quickstart(_)
        | Command::Run(_)
        | Command::Train(_)
        | Command::Loss(_)
        | Command::Report(_)
        | Command::Tabular(_) => Vec::new(),
    }
}
