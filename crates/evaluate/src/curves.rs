//! Training curves: a quantity such as the loss over optimizer steps, for several runs.

use engine::{Error, Result};
use plotters::prelude::*;

use crate::plot::{self, Axis, Look, Tip};
use crate::table::decimal;

/// One curve.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    /// The name in the legend, such as the policy's.
    pub name: String,
    /// `(optimizer step, value)`, in the order of the steps.
    pub points: Vec<(u64, f64)>,
}

/// A line plot of several series over optimizer steps, as SVG. `value_label` names the vertical axis.
///
/// # Errors
/// If there is no point at all, or a value is NaN or infinite.
pub fn curves_svg(title: &str, value_label: &str, series: &[Series]) -> Result<String> {
    for one in series {
        if let Some((step, value)) = one.points.iter().find(|(_, value)| !value.is_finite()) {
            return Err(Error::Failed(format!(
                "The curve `{}` cannot be plotted: its {value_label} at step {step} is {value}.",
                plot::clean(&one.name)
            )));
        }
    }
    let points = || series.iter().flat_map(|one| &one.points);
    if points().next().is_none() {
        return Err(Error::Failed(format!("There is nothing to plot in `{title}`: no step has been logged.")));
    }
    let x = Axis::steps(points().map(|(step, _)| *step as f64));
    let y = Axis::around(value_label, points().map(|(_, value)| *value))?;
    let names: Vec<String> = series.iter().map(|one| one.name.clone()).collect();
    plot::figure(title, &x, &y, &names, |canvas, chart| {
        let mut tips = Vec::new();
        for (i, one) in series.iter().enumerate() {
            let look = Look(i);
            let line = one.points.iter().map(|(step, value)| (*step as f64, *value));
            chart.draw_series(LineSeries::new(line.clone(), look.colour().stroke_width(2))).map_err(plot::failed)?;
            // a few marks, so that curves can be told apart without colours; shifted, so that they rarely coincide
            let every = one.points.len().div_ceil(6);
            for point in line.skip(i % every.max(1)).step_by(every.max(1)) {
                let at = chart.backend_coord(&point);
                look.mark(canvas, at)?;
                let (step, value) = (point.0, decimal(point.1));
                tips.push(Tip { at, text: format!("{}, step {step}: {value_label} {value}", one.name) });
            }
        }
        Ok(tips)
    })
}
