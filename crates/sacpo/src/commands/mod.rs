//! What each command does.

mod bench;
mod data;
mod generate;
mod inputs;
mod judge;
mod logps;
mod loss;
mod merge;
mod model;
mod quickstart;
mod rate;
mod report;
mod reward;
mod run;
mod serve;
mod tabular;

use std::path::Path;

use engine::{Error, Result};
use serde::Serialize;

use crate::cli::{Arguments, Command, TrainCommand};
use crate::{interrupt, ui};

pub(crate) use rate::read as read_verdicts;

/// Carries out the command line.
pub(crate) fn run(mut arguments: Arguments) -> Result<()> {
    let global = arguments.global;
    interrupt::listen()?;
    inputs::fetch(&mut arguments.command)?;
    match arguments.command {
        Command::Quickstart(options) => on_threads(global.threads, || quickstart::run(&options, global)),
        Command::Run(options) => run::run(&options, global),
        Command::Train(TrainCommand::Policy(options)) => run::train(&options, global),
        Command::Train(TrainCommand::Scorer(loss, options)) => reward::run(loss, &options, global),
        Command::Logps(options) => on_threads(global.threads, || logps::run(&options, global)),
        Command::Loss(options) => loss::run(&options, global),
        Command::Generate(options) => on_threads(global.threads, || generate::run(&options, global)),
        Command::Judge(options) => judge::run(&options, global),
        Command::Serve(options) => on_threads(global.threads, || serve::run(&options, global)),
        Command::Merge(options) => on_threads(global.threads, || merge::run(&options, global)),
        Command::Rate(options) => rate::run(&options, global),
        Command::Report(options) => report::run(&options, global),
        Command::Tabular(options) => tabular::run(&options, global),
        Command::Bench(options) => on_threads(global.threads, || bench::run(&options, global)),
        Command::Data(command) => on_threads(global.threads, || data::run(&command, global)),
        Command::Model(command) => model::run(&command, global),
    }
}

/// More threads than this are a slip of the finger on any machine.
const MAX_THREADS: usize = 1024;

/// The stack of a thread: what the main thread has on Linux.
const STACK_BYTES: usize = 8 << 20;

/// Does the work on a pool of `threads` threads, by default as many as the machine has physical cores; call once.
///
/// The work itself is on one of them: from outside the pool every parallel loop would put its caller to sleep and wake it
/// again, which takes longer than a step of a small model.
fn on_threads(threads: Option<usize>, work: impl FnOnce() -> Result<()> + Send) -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = threads.unwrap_or_else(|| cores.min(num_cpus::get_physical()));
    if threads > MAX_THREADS {
        return Err(Error::input(format!(
            "{threads} threads are asked for, but at most {MAX_THREADS} are sensible: this machine has {cores} cores. \
             Lower --threads or run.threads, or leave it out."
        )));
    }
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .stack_size(STACK_BYTES)
        .build_global()
        .map_err(|error| Error::Failed(format!("Could not start {threads} threads: {error}.")))?;
    rayon::scope(|_| work())
}

/// Prints the one JSON object of a command.
fn print_json(value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string(value).map_err(|e| Error::Failed(format!("The result is no JSON: {e}.")))?;
    ui::print(text)
}

/// Refuses to write where there is a file, or a folder that has files, which would be lost.
fn refuse_existing(to: &Path) -> Result<()> {
    if std::fs::read_dir(to).is_ok_and(|mut entries| entries.next().is_some()) || to.is_file() {
        return Err(Error::input(format!(
            "{} exists, and what it holds would be lost. Choose a path that does not exist, or delete it first.",
            to.display()
        )));
    }
    Ok(())
}
