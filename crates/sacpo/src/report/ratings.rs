//! `ratings.json`, or ratings of the verdicts where it is not there.

use std::collections::BTreeMap;
use std::path::Path;

use evaluate::panels::{Bar, Panel};
use evaluate::rating::{Elo, Options, rate};
use evaluate::report::{Frontier, Measured, Rating, RatingRow};
use serde_json::{Map, Value, json};

use super::answers::VerdictFile;
use super::read_json;
use super::results::Results;

/// Ratings by one metric on one set of prompts.
#[derive(Debug)]
pub(super) struct Rated {
    metric: String,
    pub(super) rating: Rating,
}

/// The ratings in a run folder.
pub(super) fn read(run: &Path, results: &Results, missing: &mut Vec<String>) -> Vec<Rated> {
    let all: Map<String, Value> = read_json(&run.join("ratings.json"), missing).unwrap_or_default();
    all.iter().flat_map(|(name, ratings)| rated(name, ratings, results)).collect()
}

/// Ratings of every file of verdicts, against `base` where it has been judged.
pub(super) fn of_verdicts(files: &[VerdictFile], results: &Results, missing: &mut Vec<String>) -> Vec<Rated> {
    let mut all = Vec::new();
    for VerdictFile { name, verdicts } in files {
        let has_base = verdicts.iter().any(|verdict| verdict.a == "base" || verdict.b == "base");
        let options = Options {
            baseline: has_base.then(|| "base".to_owned()),
            tail: 0.1,
            benign: Vec::new(),
            elo: Elo::Online,
            seed: 0,
        };
        match rate(verdicts, &options) {
            Ok(ratings) => all.extend(rated(name, &json!(ratings), results)),
            Err(error) => missing.push(format!("The verdicts of {name} are not rated. {error}")),
        }
    }
    if all.is_empty() {
        missing.push("There are no ratings: no answers of the run have been judged.".into());
    }
    all
}

/// What `sacpo rate --json` printed, one item for each metric.
fn rated(name: &str, ratings: &Value, results: &Results) -> Vec<Rated> {
    match ratings.get("metrics").and_then(Value::as_object) {
        Some(metrics) => {
            metrics.iter().map(|(metric, one)| of_metric(format!("{name}-{metric}"), metric, one, results)).collect()
        }
        None => {
            // a name is SET-METRIC
            let last = name.rsplit_once('-').map_or(name, |(_, metric)| metric);
            let metric = ratings["metric"].as_str().unwrap_or(last);
            vec![of_metric(name.to_owned(), metric, ratings, results)]
        }
    }
}

fn of_metric(name: String, metric: &str, ratings: &Value, results: &Results) -> Rated {
    let empty = Map::new();
    let mut models: Vec<(&String, &Value)> = ratings["models"].as_object().unwrap_or(&empty).iter().collect();
    models.sort_by_key(|(name, _)| results.place(name));
    let rows = models.iter().map(|&(policy, model)| RatingRow {
        policy: policy.clone(),
        win_rate: measured(model, "win_rate"),
        length_controlled: measured(&model["length_controlled"], "win_rate"),
        bradley_terry: measured(&model["bradley_terry"], "rating"),
        elo: model["elo"].as_f64(),
        score: measured(&model["scores"], "mean"),
        tail: Measured {
            value: model["scores"]["tail_mean"].as_f64(),
            interval: ends(&model["scores"]["tail_interval"]),
        },
        refusals: measured(&model["refusal_rate"], "rate"),
        n: count(&model["n"]),
        missing: count(&model["missing"]),
    });
    let rows: Vec<RatingRow> = rows.collect();
    let mut categories: BTreeMap<&str, Vec<Option<Bar>>> = BTreeMap::new();
    for (number, (_, model)) in models.iter().enumerate() {
        for (category, rate) in model["categories"].as_object().unwrap_or(&empty) {
            let value = rate["win_rate"].as_f64();
            let bar = value.map(|value| Bar { value, interval: ends(&rate["interval"]), n: count(&rate["n"]) });
            categories.entry(category).or_insert_with(|| vec![None; models.len()])[number] = bar;
        }
    }
    let notes = ratings["notes"].as_array().into_iter().flatten().filter_map(|note| Some(note.as_str()?.to_owned()));
    let categories = categories.into_iter().map(|(name, bars)| Panel { name: name.to_owned(), bars });
    let rating = Rating {
        name,
        baseline: ratings["baseline"].as_str().map(str::to_owned),
        verdicts: count(&ratings["verdicts"]),
        prompts: count(&ratings["prompts"]),
        rows,
        categories: categories.collect(),
        notes: notes.collect(),
    };
    Rated { metric: metric.to_owned(), rating }
}

fn measured(of: &Value, key: &str) -> Measured {
    Measured { value: of[key].as_f64(), interval: ends(&of["interval"]) }
}

fn ends(interval: &Value) -> Option<[f64; 2]> {
    Some([interval[0].as_f64()?, interval[1].as_f64()?])
}

fn count(number: &Value) -> usize {
    number.as_u64().and_then(|number| usize::try_from(number).ok()).unwrap_or_default()
}

/// The win rates of the first step's metric, or else of the first one, against those of every other.
pub(super) fn frontiers(all: &[Rated], results: &Results) -> Vec<Frontier> {
    let metrics = || all.iter().map(|rated| rated.metric.as_str());
    let of_step = results.first_metric().filter(|metric| metrics().any(|other| other == *metric));
    let Some(first) = of_step.or(metrics().next()) else { return Vec::new() };
    let (across, upwards): (Vec<&Rated>, Vec<&Rated>) = all.iter().partition(|rated| rated.metric == first);
    let pairs = across.iter().flat_map(|x| upwards.iter().map(move |y| (&x.rating, &y.rating)));
    pairs.filter_map(|(x, y)| frontier(x, y, results)).collect()
}

fn frontier(x: &Rating, y: &Rating, results: &Results) -> Option<Frontier> {
    let value = |measured: Measured| Some((measured.value?, measured.interval));
    let points = x.rows.iter().filter_map(|row| {
        let other = y.rows.iter().find(|other| other.policy == row.policy)?;
        Some(results.point(&row.policy, [value(row.win_rate)?, value(other.win_rate)?]))
    });
    let points: Vec<_> = points.collect();
    let against = |rating: &Rating| match &rating.baseline {
        Some(baseline) => format!("{} against {baseline}", rating.name),
        None => format!("{} against all other policies", rating.name),
    };
    (!points.is_empty()).then(|| Frontier {
        title: format!("Judged: {} against {}", x.name, y.name),
        note: format!(
            "Win rates in percent: {}; {}. Lines are intervals of 95 % over prompts.",
            against(x),
            against(y)
        ),
        metrics: [format!("win rate, {}", x.name), format!("win rate, {}", y.name)],
        points,
        in_percent: true,
        at_least: None,
        chosen: results.chosen().map(str::to_owned),
    })
}
