//! `sacpo report`.

use engine::{Error, Result};

use super::print_json;
use crate::cli::{Global, Report};
use crate::report::{Extra, write};
use crate::ui;

pub(super) fn run(options: &Report, global: Global) -> Result<()> {
    let run = options.run.as_deref();
    if let Some(run) = run.filter(|run| !run.is_dir()) {
        return Err(Error::input(format!("{} is no folder. Give the folder of a run, its run.out.", run.display())));
    }
    let out = match (&options.out, run) {
        (Some(out), _) => out.clone(),
        (None, Some(run)) => run.join("report.html"),
        (None, None) => {
            return Err(Error::input("There is no run to write into. Say where the report goes by --out FILE."));
        }
    };
    let extra = Extra { answers: options.answers.clone(), verdicts: options.verdicts.clone() };
    let written = write(run, &extra, &out)?;
    if global.json { print_json(&written) } else { ui::print(written.text()) }
}
