//! `sacpo logps`.

use std::fmt::Write as _;

use align::data::{self, LongPrompts, RenderOptions, TokenizedPair};
use align::reference;
use engine::Result;
use serde::Serialize;

use super::print_json;
use crate::cli::{Global, Logps};
use crate::policy::Policy;
use crate::ui;

#[derive(Serialize)]
struct Output {
    rows: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    /// The position of the row in the file, from 0.
    row: usize,
    responses: [Response; 2],
}

#[derive(Serialize)]
struct Response {
    role: &'static str,
    logp: f64,
    tokens: usize,
}

pub(super) fn run(options: &Logps, global: Global) -> Result<()> {
    let file = data::read_pairs(&options.data, options.format, &options.metric, false)?;
    let policy = Policy::load(&options.model, options.extrapolate)?;
    let (tokenizer, mixture) = (&policy.first.tokenizer, policy.mixture()?);
    let context = mixture.context();
    let render = RenderOptions {
        max_length: options.max_length.unwrap_or(context).min(context),
        template_tail: options.template_tail,
        long_prompts: LongPrompts::Error,
    };
    let first = &file.rows[..options.limit.unwrap_or(usize::MAX).min(file.rows.len())];
    let tokenized = data::tokenize_pairs(first, &|row| file.places.of(row), tokenizer, &render)?;
    let pairs = tokenized.rows;
    let bar = ui::bar(pairs.len() as u64, "log-probabilities");
    let sequences: Vec<_> = pairs.iter().map(TokenizedPair::sequences).collect();
    let logps = reference::logps(mixture, &sequences, None, None, &mut ui::advance(&bar))?;
    bar.finish_and_clear();
    if tokenized.truncated_responses > 0 {
        ui::say(format!("{} responses were cut to {} tokens.", tokenized.truncated_responses, render.max_length));
    }
    let scored = pairs.iter().zip(logps.as_chunks::<2>().0);
    let rows = scored.enumerate().map(|(row, (pair, &[chosen, rejected]))| Row {
        row,
        responses: [
            Response { role: "chosen", logp: chosen, tokens: pair.chosen.len() },
            Response { role: "rejected", logp: rejected, tokens: pair.rejected.len() },
        ],
    });
    let output = Output { rows: rows.collect() };
    if global.json {
        return print_json(&output);
    }
    let mut table = format!("{:>6}  {:>12} {:>6}  {:>12} {:>6}", "row", "chosen", "tokens", "rejected", "tokens");
    // counted from 1 for people, as in messages and editors
    for (pair, Row { responses: [a, b], .. }) in pairs.iter().zip(&output.rows) {
        let row = pair.row;
        let _ = write!(table, "\n{row:>6}  {:>12.4} {:>6}  {:>12.4} {:>6}", a.logp, a.tokens, b.logp, b.tokens);
    }
    ui::print(table)
}
