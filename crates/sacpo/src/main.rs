//! `sacpo`: align language models under safety constraints, step by step.

mod answer_files;
mod answers;
mod cli;
mod commands;
mod hub;
mod interrupt;
mod judging;
mod pipeline;
mod policy;
mod report;
mod scorer;
mod serve;
mod tracking;
mod ui;

use std::process::ExitCode;

use clap::Parser;

#[global_allocator]
static ALLOCATOR: engine::memory::LargePages = engine::memory::LargePages;

fn main() -> ExitCode {
    let arguments = cli::Arguments::parse();
    match commands::run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // to stop on request is no error, although the work is not done
            let prefix = if matches!(error, engine::Error::Interrupted(_)) { "" } else { "error: " };
            ui::say(format!("{prefix}{error}"));
            ExitCode::from(error.exit_code())
        }
    }
}
