//! Ratings as Markdown.

use super::{MetricRatings, ModelRatings, Ratings, WinRate};
use crate::table::{self, cell, decimal};

/// The ratings as Markdown tables with headings, which read in a terminal too; ends with a newline.
pub fn markdown(ratings: &Ratings) -> String {
    match ratings {
        Ratings::One(metric) => of_metric(metric),
        Ratings::Several { metrics, frontier } => {
            let mut parts: Vec<String> =
                metrics.iter().map(|(name, metric)| format!("# {}\n\n{}", cell(name), of_metric(metric))).collect();
            parts.extend(frontier.as_ref().map(of_frontier));
            parts.join("\n")
        }
    }
}

/// Best first, by win rate; the baseline stands where its 50 % belong.
fn ranked(metric: &MetricRatings) -> Vec<(&str, &ModelRatings)> {
    let mut models: Vec<(&str, &ModelRatings)> = metric.models.iter().map(|(name, model)| (&**name, model)).collect();
    let rate = |model: &ModelRatings| model.overall.win_rate.unwrap_or(f64::NEG_INFINITY);
    models.sort_by(|(_, a), (_, b)| rate(b).total_cmp(&rate(a)));
    models
}

fn of_metric(metric: &MetricRatings) -> String {
    let models = ranked(metric);
    let against = match &metric.baseline {
        Some(baseline) => format!("`{}`", cell(baseline)),
        None => "all other policies".into(),
    };
    let mut text = format!(
        "{} verdicts on {} prompts. Win rates in percent against {against}, ties half, missing verdicts left out; intervals \
         of 95 % over prompts.\n\n",
        metric.verdicts, metric.prompts
    );
    text += &win_rates(&models);
    text += &section("Ratings on Elo's scale", elo(&models));
    text += &section("Scores", scores(&models));
    text += &section("Refusals", refusals(&models));
    text += &section("By category", categories(&models));
    for note in &metric.notes {
        text += &format!("\n{note}\n");
    }
    text
}

fn section(title: &str, table: Option<String>) -> String {
    table.map(|table| format!("\n## {title}\n\n{table}")).unwrap_or_default()
}

/// A table of a column of names and columns of numbers, or nothing if it has no row.
fn table(head: &[&str], rows: Vec<Vec<String>>) -> Option<String> {
    let texts = head.iter().take_while(|name| matches!(**name, "policy" | "category" | "frontier")).count();
    let all: Vec<Vec<String>> =
        std::iter::once(head.iter().map(|name| (*name).to_owned()).collect()).chain(rows).collect();
    (all.len() > 1).then(|| table::markdown(&all, texts))
}

fn of_win_rate(rate: &WinRate) -> Vec<String> {
    vec![
        number(rate.win_rate),
        number(rate.standard_error),
        interval(rate.interval),
        interval(rate.bootstrap_interval),
        rate.n.to_string(),
        rate.missing.to_string(),
    ]
}

const WIN_RATE: [&str; 6] = ["win rate", "error", "95 %", "bootstrap", "n", "missing"];

fn win_rates(models: &[(&str, &ModelRatings)]) -> String {
    let with_length = models.iter().any(|(_, model)| model.length_controlled.is_some());
    let mut head = vec!["policy"];
    head.extend(WIN_RATE);
    if with_length {
        head.extend(["length-controlled", "95 %"]);
    }
    let row = |(name, model): &(&str, &ModelRatings)| {
        let mut row = vec![cell(name)];
        row.extend(of_win_rate(&model.overall));
        if with_length {
            let controlled = model.length_controlled.as_ref();
            row.push(number(controlled.map(|one| one.win_rate)));
            row.push(interval(controlled.and_then(|one| one.interval)));
        }
        row
    };
    table(&head, models.iter().map(row).collect()).unwrap_or_default()
}

fn elo(models: &[(&str, &ModelRatings)]) -> Option<String> {
    let row = |(name, model): &(&str, &ModelRatings)| {
        let strength = model.bradley_terry.as_ref();
        vec![
            cell(name),
            rounded(strength.map(|one| one.rating)),
            rounded(strength.and_then(|one| one.standard_error)),
            ends(strength.and_then(|one| one.interval), rounded),
            ends(strength.map(|one| one.bootstrap_interval), rounded),
            rounded(model.elo.map(|one| one.elo)),
            rounded(model.elo.map(|one| one.elo_deviation)),
        ]
    };
    let head = ["policy", "Bradley–Terry", "error", "95 %", "bootstrap", "online Elo", "spread over orders"];
    table(&head, models.iter().map(row).collect())
}

fn scores(models: &[(&str, &ModelRatings)]) -> Option<String> {
    let tail = models.iter().find_map(|(_, model)| Some(model.scores?.tail))?;
    let worst = format!("mean of the worst {} %", 100.0 * tail);
    let row = |(name, model): &(&str, &ModelRatings)| {
        let scores = model.scores?;
        let score =
            |value: f64, ends: [f64; 2]| [decimal(value), self::ends(Some(ends), |end| end.map_or_else(dash, decimal))];
        let (all, tail) = (score(scores.mean, scores.interval), score(scores.tail_mean, scores.tail_interval));
        Some([cell(name)].into_iter().chain(all).chain(tail).collect())
    };
    table(&["policy", "mean score", "bootstrap", &worst, "bootstrap"], models.iter().filter_map(row).collect())
}

fn refusals(models: &[(&str, &ModelRatings)]) -> Option<String> {
    let row = |(name, model): &(&str, &ModelRatings)| {
        let of = |rate: Option<super::Proportion>| {
            [number(rate.map(|one| one.rate)), interval(rate.and_then(|one| one.interval))]
        };
        model.refusal_rate?;
        Some([cell(name)].into_iter().chain(of(model.refusal_rate)).chain(of(model.over_refusal_rate)).collect())
    };
    table(&["policy", "refused", "95 %", "refused of benign", "95 %"], models.iter().filter_map(row).collect())
}

fn categories(models: &[(&str, &ModelRatings)]) -> Option<String> {
    let mut rows: Vec<(&str, Vec<String>)> = Vec::new();
    for (name, model) in models {
        for (category, rate) in &model.categories {
            let row = [cell(category), cell(name)].into_iter().chain(of_win_rate(rate)).collect();
            rows.push((category, row));
        }
    }
    // stable, so that policies stay in their order
    rows.sort_by_key(|(category, _)| *category);
    let head: Vec<&str> = ["category", "policy"].into_iter().chain(WIN_RATE).collect();
    table(&head, rows.into_iter().map(|(_, row)| row).collect())
}

fn of_frontier(frontier: &super::Frontier) -> String {
    let row = |(name, model): (&String, &super::FrontierModel)| {
        vec![
            cell(name),
            if model.on_frontier { "yes" } else { "no" }.into(),
            number(Some(model.win_rates[0])),
            number(Some(model.win_rates[1])),
            number(Some(100.0 * model.support)),
        ]
    };
    let names = frontier.metrics.each_ref().map(|name| cell(name));
    let head = ["policy", "frontier", &names[0], &names[1], "% of replicates"];
    let rows = table(&head, frontier.models.iter().map(row).collect()).unwrap_or_default();
    format!(
        "# Frontier of {} and {}\n\n{rows}\nHypervolume of the win rates: {} ({}).\n",
        names[0],
        names[1],
        decimal(frontier.hypervolume),
        ends(Some(frontier.interval), |end| end.map_or_else(dash, decimal)),
    )
}

fn dash() -> String {
    "–".into()
}

fn number(value: Option<f64>) -> String {
    value.map_or_else(dash, |value| format!("{value:.2}"))
}

fn rounded(value: Option<f64>) -> String {
    value.map_or_else(dash, |value| format!("{value:.0}"))
}

fn interval(value: Option<[f64; 2]>) -> String {
    ends(value, number)
}

fn ends(value: Option<[f64; 2]>, written: fn(Option<f64>) -> String) -> String {
    value.map_or_else(dash, |[low, high]| format!("{} to {}", written(Some(low)), written(Some(high))))
}
