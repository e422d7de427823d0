//! `sacpo model`.

use std::path::Path;

use engine::checkpoint::{Checkpoint, describe};
use engine::{Error, Result};

use super::print_json;
use crate::cli::{Global, ModelCommand};
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
    }
}

fn convert(from: &Path, to: &Path, global: Global) -> Result<()> {
    if std::fs::read_dir(to).is_ok_and(|mut entries| entries.next().is_some()) || to.is_file() {
        return Err(Error::input(format!(
            "{} exists, and its files would be lost. Choose a folder that does not exist, or delete it first.",
            to.display()
        )));
    }
    let checkpoint = Checkpoint::load(from)?;
    checkpoint.save(to)?;
    ui::say(format!("Wrote {} parameters to {}.", checkpoint.model.layout.len, to.display()));
    if global.json {
        return print_json(&describe(to)?);
    }
    Ok(())
}
