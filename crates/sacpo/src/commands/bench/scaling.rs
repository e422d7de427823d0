//! The speed of training over model sizes, lengths and numbers of threads.

use engine::{Error, Model, Result, roofline};
use serde::Serialize;

use super::training::{self, Pairs};
use super::{Roofline, check, drawn};
use crate::cli::{Bench, Scaling, Shape};
use crate::ui;

/// The tables that were asked for.
#[derive(Debug, Default, Serialize)]
pub(super) struct Report {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) size: Vec<Point>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) length: Vec<Point>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) threads: Vec<Point>,
}

/// The speed of training in one case.
#[derive(Debug, Serialize)]
pub(super) struct Point {
    /// Weights of the model.
    pub(super) parameters: usize,
    /// Mean tokens of a prompt with a response.
    pub(super) length: usize,
    pub(super) threads: usize,
    pub(super) tokens_per_second: f64,
    pub(super) utilisation: f64,
}

/// Measures what the options ask for.
pub(super) fn measure(model: &Model, roofline: Roofline, options: &Bench) -> Result<Report> {
    let pairs = Pairs::new(options);
    let mut report = Report::default();
    if options.scaling.contains(&Scaling::Size) {
        let fits = |shape: &Shape| {
            let plan = training::plan(&shape.config(), &pairs, options);
            plan.inspect_err(|error| ui::say(format!("{} is left out: {error}", shape.name()))).is_ok()
        };
        let points = Shape::ALL
            .into_iter()
            .filter(fits)
            .map(|shape| point(drawn(shape, options.seed), &pairs, roofline, options));
        report.size = points.collect::<Result<_>>()?;
    }
    if options.scaling.contains(&Scaling::Length) {
        let stretched = [1, 4, 16].map(|stretch| pairs.stretched(stretch));
        report.length =
            stretched.iter().map(|pairs| point(model.clone(), pairs, roofline, options)).collect::<Result<_>>()?;
    }
    if options.scaling.contains(&Scaling::Threads) {
        let most = rayon::current_num_threads();
        let powers = std::iter::successors(Some(1), |threads| Some(2 * threads)).take_while(|&threads| threads < most);
        let points = powers.chain([most]).map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            let pool = pool.map_err(|e| Error::Failed(format!("Could not start {threads} threads: {e}.")))?;
            pool.install(|| {
                let of_threads = Roofline { flops: roofline::peak(options.dtype), ..roofline };
                point(model.clone(), &pairs, of_threads, options)
            })
        });
        report.threads = points.collect::<Result<_>>()?;
    }
    Ok(report)
}

/// Measures training on the current pool of threads.
fn point(model: Model, pairs: &Pairs, roofline: Roofline, options: &Bench) -> Result<Point> {
    let parameters = model.layout.len;
    let report = training::measure(model, pairs, options)?.0.report(options.dtype, roofline);
    check()?;
    Ok(Point {
        parameters,
        length: pairs.mean_length(),
        threads: rayon::current_num_threads(),
        tokens_per_second: report.tokens_per_second,
        utilisation: report.utilisation,
    })
}
