//! Policies on the plane of reward and safety: a table and a plot.

use engine::{Error, Result};
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;
use serde::Serialize;

use crate::plot::{self, Axis, Canvas, Chart, Look};
use crate::table::{self, cell, decimal};

/// One policy and what it achieves.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Point {
    /// The policy's name.
    pub name: String,
    /// The name of the step that made it, such as `harmlessness`; `base` for the untrained model. Policies of
    /// one step share colour and mark.
    pub step: String,
    /// β/λ, for policies of a later step. Those of one step are joined by a line in the order of this value.
    pub beta_over_lambda: Option<f64>,
    /// The metric that is maximised: expected reward, in the reward's own units.
    pub reward: f64,
    /// The metric that is constrained: expected safety, in its own units.
    pub safety: f64,
    /// KL divergence from the base model in nats, where it is known.
    pub kl: Option<f64>,
}

/// The names of the two metrics, for the heads of columns and the axes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metrics<'a> {
    /// What [`Point::reward`] is.
    pub reward: &'a str,
    /// What [`Point::safety`] is.
    pub safety: &'a str,
}

/// The policies as a Markdown table, aligned so that it reads in a terminal too; ends with a newline.
///
/// The column of the KL divergence is there if any policy has one. Numbers have three decimals.
///
/// # Errors
/// If a number of a policy is NaN or infinite.
pub fn table(metrics: Metrics<'_>, points: &[Point]) -> Result<String> {
    check(points)?;
    let with_kl = points.iter().any(|point| point.kl.is_some());
    let mut rows = vec![["policy", "step", "β/λ", metrics.reward, metrics.safety, "KL"].map(cell).to_vec()];
    for point in points {
        let ratio = point.beta_over_lambda.map_or("–".into(), |ratio| ratio.to_string());
        let kl = point.kl.map_or("–".into(), decimal);
        rows.push(vec![cell(&point.name), cell(&point.step), ratio, decimal(point.reward), decimal(point.safety), kl]);
    }
    if !with_kl {
        rows.iter_mut().for_each(|row| row.truncate(5));
    }
    Ok(table::markdown(&rows, 2))
}

/// The policies as an SVG plot, reward to the right and safety upwards; every policy is labelled.
///
/// # Errors
/// If there is no policy, or a number of one is NaN or infinite.
pub fn frontier_svg(title: &str, metrics: Metrics<'_>, points: &[Point]) -> Result<String> {
    check(points)?;
    if points.is_empty() {
        return Err(Error::Failed("There is no policy to plot.".into()));
    }
    let mut steps: Vec<String> = Vec::new();
    for point in points {
        if !steps.contains(&point.step) {
            steps.push(point.step.clone());
        }
    }
    let look = |point: &Point| Look(steps.iter().position(|step| *step == point.step).unwrap_or(0));
    let x = Axis::around(metrics.reward, points.iter().map(|point| point.reward))?;
    let y = Axis::around(metrics.safety, points.iter().map(|point| point.safety))?;
    plot::figure(title, &x, &y, &steps, |canvas, chart| {
        let mut lines = Vec::new();
        for (i, step) in steps.iter().enumerate() {
            let line = sweep(points, step);
            chart
                .draw_series([PathElement::new(line.clone(), Look(i).colour().mix(0.6).stroke_width(2))])
                .map_err(plot::failed)?;
            lines.push(line.iter().map(|point| chart.backend_coord(point)).collect());
        }
        let spots: Vec<(i32, i32)> = points.iter().map(|p| chart.backend_coord(&(p.reward, p.safety))).collect();
        for (point, &spot) in points.iter().zip(&spots) {
            look(point).mark(canvas, spot)?;
        }
        label(canvas, chart, points, &spots, &lines)
    })
}

/// The policies of one step's sweep in the order of β/λ, as (reward, safety).
fn sweep(points: &[Point], step: &str) -> Vec<(f64, f64)> {
    let mut sweep: Vec<(f64, &Point)> =
        points.iter().filter(|p| p.step == step).filter_map(|p| Some((p.beta_over_lambda?, p))).collect();
    sweep.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    sweep.into_iter().map(|(_, point)| (point.reward, point.safety)).collect()
}

/// A rectangle in pixels: left, top, right, bottom.
type Rect = [f64; 4];

/// Writes every policy's name near its mark, off the marks, the lines and the other names where possible.
fn label(
    canvas: &Canvas<'_>,
    chart: &Chart<'_, '_>,
    points: &[Point],
    spots: &[(i32, i32)],
    lines: &[Vec<(i32, i32)>],
) -> Result<()> {
    let (width, height) = chart.plotting_area().get_pixel_range();
    let inside = [width.start, height.start, width.end, height.end].map(f64::from);
    let marks: Vec<Rect> = spots.iter().map(|&(x, y)| around(f64::from(x), f64::from(y), 8.0, 8.0)).collect();
    let line_dots: Vec<Rect> =
        lines.iter().flat_map(|line| line.windows(2)).flat_map(|ends| dots(ends[0], ends[1])).collect();
    let mut taken: Vec<Rect> = Vec::new();
    for (point, &(x, y)) in points.iter().zip(spots) {
        let name = plot::shortened(&point.name, 40);
        let (half_width, half_height) = (plot::text_width(&name) / 2.0, plot::TEXT * 0.6);
        let cost = |rect: &Rect, distance: f64| {
            let hits = |others: &[Rect]| others.iter().map(|other| overlap(rect, other)).sum::<f64>();
            let outside = area(rect) - overlap(rect, &inside);
            100.0 * outside + 20.0 * hits(&taken) + 10.0 * hits(&marks) + hits(&line_dots) + distance
        };
        let mut best: Option<(f64, Rect, f64, i32)> = None;
        for distance in [11.0, 22.0, 36.0, 54.0, 76.0] {
            for (right, down) in [(1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1)] {
                // on a diagonal the label's near corner, otherwise the middle of its near side, is `distance` away
                let reach = if right != 0 && down != 0 { distance * 0.7 } else { distance };
                let centre_x = f64::from(x) + f64::from(right) * (reach + half_width);
                let centre_y = f64::from(y) + f64::from(down) * (reach + half_height);
                let rect = around(centre_x, centre_y, half_width, half_height);
                let cost = cost(&rect, distance);
                if best.is_none_or(|(least, ..)| cost < least) {
                    best = Some((cost, rect, distance, right));
                }
            }
        }
        let Some((_, rect, distance, right)) = best else { continue };
        if distance > 12.0 {
            // far from its mark, so a thin line says whose name it is
            let near = (f64::from(x).clamp(rect[0], rect[2]) as i32, f64::from(y).clamp(rect[1], rect[3]) as i32);
            let thin = plot::BLACK_TEXT.mix(0.4).stroke_width(1);
            canvas.draw(&PathElement::new(vec![(x, y), near], thin)).map_err(plot::failed)?;
        }
        // the width is an estimate, so the text begins or ends on the side of its mark
        let (x, anchor) = match right {
            1 => (rect[0], HPos::Left),
            -1 => (rect[2], HPos::Right),
            _ => ((rect[0] + rect[2]) / 2.0, HPos::Center),
        };
        let y = (rect[1] + rect[3]) / 2.0;
        plot::write_text(canvas, &name, (x.round() as i32, y.round() as i32), anchor)?;
        taken.push(rect);
    }
    Ok(())
}

fn around(x: f64, y: f64, half_width: f64, half_height: f64) -> Rect {
    [x - half_width, y - half_height, x + half_width, y + half_height]
}

fn area(rect: &Rect) -> f64 {
    (rect[2] - rect[0]).max(0.0) * (rect[3] - rect[1]).max(0.0)
}

fn overlap(a: &Rect, b: &Rect) -> f64 {
    area(&[a[0].max(b[0]), a[1].max(b[1]), a[2].min(b[2]), a[3].min(b[3])])
}

/// Small rectangles along a line, every few pixels.
fn dots(from: (i32, i32), to: (i32, i32)) -> impl Iterator<Item = Rect> {
    let (x, y) = (f64::from(from.0), f64::from(from.1));
    let (dx, dy) = (f64::from(to.0) - x, f64::from(to.1) - y);
    let count = (dx.hypot(dy) / 4.0).ceil().max(1.0);
    (0..=count as usize).map(move |i| {
        let t = i as f64 / count;
        around(x + t * dx, y + t * dy, 2.0, 2.0)
    })
}

/// Fails on the first number that is not finite.
fn check(points: &[Point]) -> Result<()> {
    for point in points {
        let numbers = [
            ("reward", Some(point.reward)),
            ("safety", Some(point.safety)),
            ("β/λ", point.beta_over_lambda),
            ("KL", point.kl),
        ];
        for (what, number) in numbers {
            if let Some(number) = number.filter(|number| !number.is_finite()) {
                return Err(Error::Failed(format!(
                    "The policy `{}` cannot be shown: its {what} is {number}. Look at its training for the step where \
                     the loss diverged.",
                    plot::clean(&point.name)
                )));
            }
        }
    }
    Ok(())
}
