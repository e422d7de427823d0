//! `sacpo rate`.

use std::path::PathBuf;

use align::data;
use engine::{Error, Result};
use evaluate::rating::{Elo, Options, markdown, rate};
use evaluate::verdict::{Verdict, verdicts};

use super::print_json;
use crate::cli::{Global, Rate};
use crate::ui;

pub(super) fn run(options: &Rate, global: Global) -> Result<()> {
    let verdicts = read(&options.files)?;
    let ratings = rate(
        &verdicts,
        &Options {
            baseline: options.baseline.clone(),
            tail: options.tail,
            benign: options.benign.clone(),
            elo: if options.paper_elo { Elo::Paper } else { Elo::Online },
            seed: options.seed,
        },
    )?;
    if global.json { print_json(&ratings) } else { ui::print(markdown(&ratings).trim_end()) }
}

/// The verdicts in files, with the place of a row that is none in the message.
pub(crate) fn read(files: &[PathBuf]) -> Result<Vec<Verdict>> {
    let mut all = Vec::new();
    for file in files {
        for record in data::read_records(file)? {
            let of_row = verdicts(&record.columns);
            all.extend(of_row.map_err(|error| Error::input(format!("{}: {error}", record.place)))?);
        }
    }
    Ok(all)
}
