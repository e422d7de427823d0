//! `sacpo data`.

mod convert;

use std::fmt::Write as _;
use std::path::Path;

use align::data::{
    self, DataFile, Dataset, ExampleCounts, LabelledExample, Lengths, LongPrompts, PairCounts, PreferencePair,
    RenderOptions, TemplateTail, disagreement, read_examples, read_pairs, tokenize_examples, tokenize_pairs,
};
use align::objective::{self, Objective};
use console::Style;
use engine::checkpoint::Checkpoint;
use engine::tokenizer::Tokenizer;
use engine::{Error, Result};
use serde_json::{Value, json};

use super::print_json;
use crate::cli::{DataCommand, DataSource, Global, InspectData};
use crate::ui;

/// Ranges of a histogram.
const RANGES: usize = 24;

/// The heights of its bars, from the lowest to the highest.
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

pub(super) fn run(command: &DataCommand, global: Global) -> Result<()> {
    match command {
        DataCommand::Convert(options) => convert::run(options, global),
        DataCommand::Inspect(options) => inspect(options, global),
        DataCommand::Stats { source, model } => stats(source, model.as_deref(), global),
    }
}

/// The rows of a file as an objective reads them.
enum Rows {
    Pairs(DataFile<PreferencePair>),
    Examples(DataFile<LabelledExample>),
}

impl Rows {
    /// The usable rows of a file.
    fn read(source: &DataSource) -> Result<Self> {
        let DataSource { file, objective, metric, format } = source;
        Ok(match objective::Options::default().build(objective, 1.0)? {
            Objective::Pairwise(_) => Self::Pairs(read_pairs(file, *format, metric, true)?),
            Objective::Unpaired(_) => Self::Examples(read_examples(file, *format, metric, true)?),
        })
    }

    /// The number of rows that are not usable, and what is wrong with the first.
    fn bad(&self) -> (usize, Option<&String>) {
        match self {
            Self::Pairs(file) => (file.skipped, file.first_skipped.as_ref()),
            Self::Examples(file) => (file.skipped, file.first_skipped.as_ref()),
        }
    }

    fn format(&self) -> data::Format {
        match self {
            Self::Pairs(file) => file.format,
            Self::Examples(file) => file.format,
        }
    }

    /// Keeps `count` rows, from row number `first` of the file on.
    fn keep(&mut self, first: usize, count: usize) {
        match self {
            Self::Pairs(file) => {
                file.rows.retain(|pair| pair.row >= first);
                file.rows.truncate(count);
            }
            Self::Examples(file) => {
                file.rows.retain(|example| example.row >= first);
                file.rows.truncate(count);
            }
        }
    }

    /// The rows as the model sees them, and the number of responses that were cut.
    fn tokens(&self, tokenizer: &Tokenizer, render: &RenderOptions) -> Result<(Dataset, usize)> {
        Ok(match self {
            Self::Pairs(file) => {
                let tokenized = tokenize_pairs(&file.rows, &|row| file.places.of(row), tokenizer, render)?;
                (Dataset::Pairs(tokenized.rows), tokenized.truncated_responses)
            }
            Self::Examples(file) => {
                let tokenized = tokenize_examples(&file.rows, &|row| file.places.of(row), tokenizer, render)?;
                (Dataset::Examples(tokenized.rows), tokenized.truncated_responses)
            }
        })
    }
}

/// What the responses of a row are called.
fn roles(data: &Dataset, index: usize) -> &'static [&'static str] {
    match data {
        Dataset::Pairs(_) => &["chosen", "rejected"],
        Dataset::Examples(examples) if examples[index].desirable => &["desirable"],
        Dataset::Examples(_) => &["undesirable"],
    }
}

fn inspect(options: &InspectData, global: Global) -> Result<()> {
    let tokenizer = tokenizer(&options.model)?;
    let mut rows = Rows::read(&options.source)?;
    if let (bad, Some(first)) = rows.bad() {
        ui::say(format!("{bad} rows are bad and left out. The first: {first}"));
    }
    rows.keep(options.from, options.rows);
    let render = RenderOptions {
        max_length: options.max_length.unwrap_or(usize::MAX),
        template_tail: options.template_tail,
        long_prompts: LongPrompts::Error,
    };
    let (data, _) = rows.tokens(&tokenizer, &render)?;
    if data.is_empty() {
        return Err(Error::input(format!(
            "{} has no row from row {} on. Give a smaller --from.",
            options.source.file.display(),
            options.from
        )));
    }
    let mut shown = Vec::new();
    for (index, sequences) in data.sequences().iter().enumerate() {
        let part = |role: &str, tokens: &[u32]| {
            let complete = tokens.last().copied() == tokenizer.eos();
            Ok(json!({
                "role": role, "tokens": tokens, "text": tokenizer.decode_with_special(tokens)?, "complete": complete,
            }))
        };
        let responses = roles(&data, index).iter().zip(&sequences.responses).map(|(role, tokens)| part(role, tokens));
        let parts = std::iter::once(part("prompt", sequences.prompt)).chain(responses);
        shown.push(json!({"row": sequences.row, "parts": parts.collect::<Result<Vec<_>>>()?}));
    }
    if global.json {
        return print_json(&json!({"rows": shown}));
    }
    ui::print(shown.iter().map(page).collect::<Vec<_>>().join("\n\n"))
}

/// A row for people: each part in the colour of its role, a line that goes on indented below the first.
fn page(row: &Value) -> String {
    let mut page = format!("row {}", row["row"]);
    for part in row["parts"].as_array().into_iter().flatten() {
        let role = part["role"].as_str().unwrap_or_default();
        let style = match role {
            "prompt" => Style::new().cyan(),
            "chosen" | "desirable" => Style::new().green(),
            _ => Style::new().red(),
        };
        let cut = if role != "prompt" && part["complete"] == false { ", without end" } else { "" };
        let tokens = part["tokens"].as_array().map_or(0, Vec::len);
        let _ = write!(page, "\n{role} ({tokens} tokens{cut})");
        for line in part["text"].as_str().unwrap_or_default().split('\n') {
            let _ = write!(page, "\n    {}", style.apply_to(line));
        }
    }
    page
}

fn stats(source: &DataSource, model: Option<&Path>, global: Global) -> Result<()> {
    let rows = Rows::read(source)?;
    let counts = match &rows {
        Rows::Pairs(file) => json!(PairCounts::new(&file.rows)),
        Rows::Examples(file) => json!(ExampleCounts::new(&file.rows)),
    };
    let (bad, first_bad) = rows.bad();
    let mut result = json!({
        "file": source.file, "format": rows.format().name(), "metric": source.metric, "bad_rows": bad,
        "first_bad_row": first_bad, "counts": counts,
    });
    if let Rows::Pairs(file) = &rows {
        // one file may hold both metrics' labels
        let other = if source.metric == "helpfulness" { "harmlessness" } else { "helpfulness" };
        if file.format == data::Format::Pku
            && let Ok(others) = read_pairs(&source.file, source.format, other, true)
        {
            let [rows, differ] = disagreement(&file.rows, &others.rows);
            result["other_metric"] = json!({"metric": other, "rows": rows, "prefer_another_response": differ});
        }
    }
    let (unit, lengths) = match model {
        Some(model) => ("tokens", token_lengths(&rows, &tokenizer(model)?)?),
        None => ("characters", character_lengths(&rows)),
    };
    let responses: Vec<&Vec<usize>> = lengths[1..].iter().map(|(_, lengths)| lengths).collect();
    let prompts: usize = lengths[0].1.iter().sum();
    let once = prompts + responses.iter().flat_map(|lengths| lengths.iter()).sum::<usize>();
    // a pass over prompt and response apart reads the prompt once for each response
    let apart = once + prompts * (responses.len() - 1);
    result["saved_by_sharing_prompts"] = json!(1.0 - once as f64 / apart as f64);
    result["unit"] = json!(unit);
    result["lengths"] =
        lengths.into_iter().map(|(part, lengths)| (part.to_owned(), json!(Lengths::new(lengths, RANGES)))).collect();
    if global.json {
        return print_json(&result);
    }
    ui::print(report(&result))
}

/// The lengths of prompts and of each response of the rows; all rows have as many responses.
type PartLengths = Vec<(&'static str, Vec<usize>)>;

fn character_lengths(rows: &Rows) -> PartLengths {
    let text = |text: &String| text.chars().count();
    let prompt = |prompt: &data::Prompt| match prompt {
        data::Prompt::Text(content) => text(content),
        data::Prompt::Chat(messages) => messages.iter().map(|message| text(&message.content)).sum(),
    };
    match rows {
        Rows::Pairs(DataFile { rows, .. }) => vec![
            ("prompt", rows.iter().map(|pair| prompt(&pair.prompt)).collect()),
            ("chosen", rows.iter().map(|pair| text(&pair.chosen)).collect()),
            ("rejected", rows.iter().map(|pair| text(&pair.rejected)).collect()),
        ],
        Rows::Examples(DataFile { rows, .. }) => vec![
            ("prompt", rows.iter().map(|example| prompt(&example.prompt)).collect()),
            ("response", rows.iter().map(|example| text(&example.completion)).collect()),
        ],
    }
}

fn token_lengths(rows: &Rows, tokenizer: &Tokenizer) -> Result<PartLengths> {
    let render =
        RenderOptions { max_length: usize::MAX, template_tail: TemplateTail::Drop, long_prompts: LongPrompts::Error };
    let (data, _) = rows.tokens(tokenizer, &render)?;
    let names: &[&str] =
        if matches!(data, Dataset::Pairs(_)) { &["prompt", "chosen", "rejected"] } else { &["prompt", "response"] };
    let mut lengths: PartLengths = names.iter().map(|name| (*name, Vec::with_capacity(data.len()))).collect();
    for row in data.sequences() {
        let parts = std::iter::once(row.prompt).chain(row.responses);
        lengths.iter_mut().zip(parts).for_each(|((_, lengths), part)| lengths.push(part.len()));
    }
    Ok(lengths)
}

/// The statistics for people.
fn report(result: &Value) -> String {
    let counts = &result["counts"];
    let count = |key: &str| counts[key].as_u64().unwrap_or(0);
    let of = |part: u64, whole: u64| format!("{part} ({:.1} %)", 100.0 * part as f64 / whole.max(1) as f64);
    let mut lines = vec![format!(
        "{}: format `{}`",
        result["file"].as_str().unwrap_or_default(),
        result["format"].as_str().unwrap_or_default()
    )];
    let mut line = |name: &str, value: String| lines.push(format!("  {name:<28} {value}"));
    let rows = count("rows");
    if counts["desirable"].is_null() {
        line("pairs", rows.to_string());
        line("chosen has more characters", of(count("chosen_is_longer"), rows));
        if count("flagged") > 0 {
            let safe = |index: usize| of(counts["safe"][index].as_u64().unwrap_or(0), count("flagged"));
            line("chosen is safe", safe(0));
            line("rejected is safe", safe(1));
        }
        if let Some(both) = result["other_metric"]["rows"].as_u64() {
            let differ = result["other_metric"]["prefer_another_response"].as_u64().unwrap_or(0);
            let metric = result["other_metric"]["metric"].as_str().unwrap_or_default();
            line(&format!("otherwise by {metric}"), of(differ, both));
        }
    } else {
        line("labelled responses", rows.to_string());
        line("to learn from", of(count("desirable"), rows));
    }
    line("different prompts", count("prompts").to_string());
    line("said before", of(count("duplicates"), rows));
    line("said otherwise before", of(count("contradictions"), rows));
    line("bad rows left out", result["bad_rows"].to_string());
    let unit = result["unit"].as_str().unwrap_or_default();
    let saved = 100.0 * result["saved_by_sharing_prompts"].as_f64().unwrap_or(0.0);
    line(&format!("{unit} saved by sharing prompts"), format!("{saved:.1} %"));
    if let Some(first) = result["first_bad_row"].as_str() {
        lines.push(format!("  The first bad row: {first}"));
    }
    lines.push(format!(
        "  {unit:<12} {:>8} {:>8} {:>8} {:>8} {:>8}  from 0 to the most",
        "mean", "median", "90 %", "99 %", "most"
    ));
    for (part, lengths) in result["lengths"].as_object().into_iter().flatten() {
        let quantile = |index: usize| lengths["quantiles"][index].as_u64().unwrap_or(0);
        let mean = lengths["mean"].as_f64().unwrap_or(0.0);
        let [median, ninety, last, most] = [1, 2, 3, 4].map(quantile);
        let histogram: Vec<u64> =
            lengths["histogram"].as_array().into_iter().flatten().filter_map(Value::as_u64).collect();
        lines.push(format!(
            "  {part:<12} {mean:>8.1} {median:>8} {ninety:>8} {last:>8} {most:>8}  {}",
            bars(&histogram)
        ));
    }
    lines.join("\n")
}

/// A histogram as a line of bars; nothing where nothing is.
fn bars(counts: &[u64]) -> String {
    let highest = counts.iter().copied().max().unwrap_or(0).max(1);
    let bar = |&count: &u64| match count {
        0 => ' ',
        _ => BARS[(count * BARS.len() as u64).div_ceil(highest) as usize - 1],
    };
    counts.iter().map(bar).collect()
}

/// The tokenizer of a model.
fn tokenizer(model: &Path) -> Result<Tokenizer> {
    // a folder's can be read without its weights
    if model.is_dir() { Tokenizer::from_folder(model) } else { Ok(Checkpoint::load(model)?.tokenizer) }
}
