//! The page: template, style and script filled with a report.

use std::io::Write as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use engine::{Error, Result};
use flate2::Compression;
use flate2::write::ZlibEncoder;
use minijinja::Environment;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value};
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::{AnswerSet, Constraint, Curves, Fact, Frontier, Policy, Rating, Report};
use crate::curves::{Series, curves_svg};
use crate::frontier::{Metrics, Target, frontier_svg};
use crate::panels::panels_svg;
use crate::table;

const TEMPLATE: &str = include_str!("page.html");
const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("script.js");

/// A plot in the page.
#[derive(Debug, Serialize)]
struct Plot {
    /// The name of the file that it is saved as, without ending.
    file: String,
    /// What a reader is told who does not see it.
    label: String,
    /// Nothing where it cannot be drawn.
    svg: Option<String>,
    /// Why it cannot be drawn.
    problem: Option<String>,
}

impl Plot {
    fn new(file: &str, label: String, svg: Result<String>) -> Self {
        let file = file.replace(|c: char| !c.is_alphanumeric() && c != '.', "-");
        let problem = svg.as_ref().err().map(Error::to_string);
        Self { file, label, svg: svg.ok(), problem }
    }
}

/// The curves of a plot in numbers.
#[derive(Debug, Serialize)]
struct Ends<'a> {
    policy: &'a str,
    steps: u64,
    first: f64,
    last: f64,
}

/// What the template reads.
#[derive(Debug, Serialize)]
struct Page<'a> {
    title: &'a str,
    facts: &'a [Fact],
    frontiers: Vec<PlottedFrontier<'a>>,
    constraint: &'a Option<Constraint>,
    ratings: Vec<PlottedRating<'a>>,
    /// The number of sets of answers.
    sets: usize,
    answers: String,
    curves: Vec<PlottedCurves<'a>>,
    policies: &'a [Policy],
    cost: &'a [Fact],
    missing: &'a [String],
    style: &'static str,
    script: &'static str,
    /// The one script that the page may run.
    script_hash: String,
}

#[derive(Debug, Serialize)]
struct PlottedFrontier<'a> {
    #[serde(flatten)]
    frontier: &'a Frontier,
    with_kl: bool,
    plot: Plot,
}

#[derive(Debug, Serialize)]
struct PlottedCurves<'a> {
    step: &'a str,
    metric: &'a str,
    ends: Vec<Ends<'a>>,
    plot: Plot,
}

#[derive(Debug, Serialize)]
struct PlottedRating<'a> {
    #[serde(flatten)]
    rating: &'a Rating,
    plot: Option<Plot>,
}

pub(super) fn html(report: &Report) -> Result<String> {
    let frontiers = report.frontiers.iter().enumerate().map(|(number, frontier)| PlottedFrontier {
        frontier,
        with_kl: frontier.points.iter().any(|point| point.kl.is_some()),
        plot: frontier_plot(number, frontier),
    });
    let curves = report.curves.iter().map(|curves| PlottedCurves {
        step: &curves.step,
        metric: &curves.metric,
        ends: curves.series.iter().filter_map(ends).collect(),
        plot: curves_plot(curves),
    });
    let ratings = report
        .ratings
        .iter()
        .map(|rating| PlottedRating { rating, plot: (!rating.categories.is_empty()).then(|| categories_plot(rating)) });
    let page = Page {
        title: &report.title,
        facts: &report.facts,
        frontiers: frontiers.collect(),
        constraint: &report.constraint,
        ratings: ratings.collect(),
        sets: report.answers.len(),
        answers: packed(&report.answers)?,
        curves: curves.collect(),
        policies: &report.policies,
        cost: &report.cost,
        missing: &report.missing,
        style: STYLE,
        script: SCRIPT,
        script_hash: STANDARD.encode(Sha256::digest(SCRIPT)),
    };
    render(&page).map_err(|error| Error::Failed(format!("The report cannot be written: {error:#}.")))
}

fn render(page: &Page<'_>) -> std::result::Result<String, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.add_filter("decimal", |value: Option<f64>| written(value, table::decimal));
    environment.add_filter("tenths", |value: Option<f64>| written(value, |value| format!("{value:.1}")));
    environment.add_filter("plain", |value: Option<f64>| written(value, |value| value.to_string()));
    // a name that ends in .html: every value is escaped
    environment.add_template("page.html", TEMPLATE)?;
    environment.get_template("page.html")?.render(Value::from(Serde(page)))
}

/// A number with a true minus sign, or a dash where there is none.
fn written(value: Option<f64>, text: impl Fn(f64) -> String) -> String {
    value.map_or("–".to_owned(), |value| text(value).replace('-', "−"))
}

/// The answers as JSON, compressed (zlib) and in base64, of which nothing can end the element that it is in.
fn packed(answers: &[AnswerSet]) -> Result<String> {
    let pack = || -> std::io::Result<Vec<u8>> {
        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(&serde_json::to_vec(answers)?)?;
        encoder.finish()
    };
    let bytes = pack().map_err(|error| Error::Failed(format!("The answers cannot be packed: {error}.")))?;
    Ok(STANDARD.encode(bytes))
}

fn frontier_plot(number: usize, frontier: &Frontier) -> Plot {
    let Frontier { title, metrics: [reward, safety], points, at_least, chosen, .. } = frontier;
    let target = Target { at_least: *at_least, policy: chosen.as_deref() };
    let label = format!(
        "Scatter plot of {} policies: {reward} to the right, {safety} upwards. The table below has the same numbers.",
        points.len()
    );
    let svg = frontier_svg(title, Metrics { reward, safety }, points, target);
    Plot::new(&format!("frontier-{}", number + 1), label, svg)
}

fn curves_plot(Curves { step, metric, series }: &Curves) -> Plot {
    let label = format!("Line plot of {metric} over optimizer steps, one line for each of {} policies.", series.len());
    Plot::new(&format!("{step}-{metric}"), label, curves_svg(&format!("{step}: {metric}"), metric, series))
}

fn categories_plot(Rating { name, rows, categories, .. }: &Rating) -> Plot {
    let policies: Vec<String> = rows.iter().map(|row| row.policy.clone()).collect();
    let label = format!("Bars of win rates with intervals, a panel for each of {} categories.", categories.len());
    let svg = panels_svg(&format!("{name}: win rate in % by category"), &policies, categories);
    Plot::new(&format!("{name}-categories"), label, svg)
}

fn ends(series: &Series) -> Option<Ends<'_>> {
    let (&(_, first), &(steps, last)) = (series.points.first()?, series.points.last()?);
    Some(Ends { policy: &series.name, steps, first, last })
}
