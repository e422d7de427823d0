//! Policies on the plane of reward and safety: a table and a plot.

use engine::{Error, Result};
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;
use serde::Serialize;

use crate::plot::{self, Axis, Canvas, Chart, Look, Tip};
use crate::table::{self, cell, decimal};

/// One policy and what it achieves.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Point {
    /// The policy's name.
    pub name: String,
    /// The name of the step that made it, such as `harmlessness`; `base` for the untrained model. Policies of
    /// one step share colour and mark.
    pub step: String,
    /// β/λ, for policies of a later step. Those of one step are joined by a line in the order of this value.
    pub beta_over_lambda: Option<f64>,
    /// Of a merged or mixed policy the share of its second end.
    pub q: Option<f64>,
    /// The metric that is maximised: expected reward, in the reward's own units.
    pub reward: f64,
    /// The interval of the reward, if it was measured and not calculated.
    pub reward_interval: Option<[f64; 2]>,
    /// The metric that is constrained: expected safety, in its own units.
    pub safety: f64,
    /// The interval of the safety, if it was measured and not calculated.
    pub safety_interval: Option<[f64; 2]>,
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

/// What a plot of policies points out.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Target<'a> {
    /// The least safety that was asked for.
    pub at_least: Option<f64>,
    /// The policy that was made for it.
    pub policy: Option<&'a str>,
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

/// The policies as an SVG plot, reward to the right and safety upwards; every policy is labelled, and intervals are thin lines.
/// The target is a dashed line, and its policy has a ring.
///
/// # Errors
/// If there is no policy, or a number of one, or of the target, is NaN or infinite.
pub fn frontier_svg(title: &str, metrics: Metrics<'_>, points: &[Point], target: Target<'_>) -> Result<String> {
    check(points)?;
    if points.is_empty() {
        return Err(Error::Failed("There is no policy to plot.".into()));
    }
    if let Some(at_least) = target.at_least.filter(|at_least| !at_least.is_finite()) {
        return Err(Error::Failed(format!("The threshold {at_least} cannot be shown. It must be finite.")));
    }
    let mut steps: Vec<String> = Vec::new();
    for point in points {
        if !steps.contains(&point.step) {
            steps.push(point.step.clone());
        }
    }
    let look = |point: &Point| Look(steps.iter().position(|step| *step == point.step).unwrap_or(0));
    let ends = |value: f64, interval: Option<[f64; 2]>| [value].into_iter().chain(interval.into_iter().flatten());
    let rewards = points.iter().flat_map(|point| ends(point.reward, point.reward_interval));
    let safeties = points.iter().flat_map(|point| ends(point.safety, point.safety_interval));
    let x = Axis::around(metrics.reward, rewards)?;
    let y = Axis::around(metrics.safety, safeties.chain(target.at_least))?;
    plot::figure(title, &x, &y, &steps, |canvas, chart| {
        let taken = target.at_least.map(|at_least| threshold(canvas, chart, at_least)).transpose()?;
        for point in points {
            let horizontal = point.reward_interval.map(|ends| ends.map(|end| (end, point.safety)));
            let vertical = point.safety_interval.map(|ends| ends.map(|end| (point.reward, end)));
            for line in horizontal.into_iter().chain(vertical) {
                let style = look(point).colour().mix(0.5).stroke_width(1);
                chart.draw_series([PathElement::new(line.to_vec(), style)]).map_err(plot::failed)?;
            }
        }
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
            if target.policy == Some(point.name.as_str()) {
                let ring = Circle::new(spot, 11, plot::BLACK_TEXT.stroke_width(2));
                canvas.draw(&ring).map_err(plot::failed)?;
            }
        }
        label(canvas, chart, points, &spots, &lines, taken.into_iter().collect())?;
        Ok(points.iter().zip(spots).map(|(point, at)| Tip { at, text: told(point, metrics) }).collect())
    })
}

/// Draws a dashed line at a value of safety and writes the value on it; returns where.
fn threshold(canvas: &Canvas<'_>, chart: &mut Chart<'_, '_>, at_least: f64) -> Result<Rect> {
    let x = chart.x_range();
    let ends = [(x.start, at_least), (x.end, at_least)];
    let line = DashedLineSeries::new(ends, 6, 4, plot::BLACK_TEXT.stroke_width(1));
    chart.draw_series(line).map_err(plot::failed)?;
    let text = format!("at least {at_least}");
    let (left, y) = chart.backend_coord(&(x.start, at_least));
    let at = (left + 6, y - 9);
    plot::write_text(canvas, &text, at, HPos::Left)?;
    let (left, middle) = (f64::from(at.0), f64::from(at.1));
    Ok([left, middle - plot::TEXT * 0.6, left + plot::text_width(&text), middle + plot::TEXT * 0.6])
}

/// What is known of a policy, in a line.
fn told(point: &Point, metrics: Metrics<'_>) -> String {
    let value = |name: &str, value: f64, interval: Option<[f64; 2]>| {
        let interval = interval.map(|[low, high]| format!(" ({} to {})", decimal(low), decimal(high)));
        format!("; {name} {}{}", decimal(value), interval.unwrap_or_default())
    };
    let mut text = point.name.clone();
    text.extend(point.beta_over_lambda.map(|ratio| format!(", β/λ = {ratio}")));
    text.extend(point.q.map(|q| format!(", q = {q}")));
    text += &value(metrics.reward, point.reward, point.reward_interval);
    text + &value(metrics.safety, point.safety, point.safety_interval)
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

/// Writes every policy's name near its mark, off the marks, the lines, the other names and what is `taken` where possible.
fn label(
    canvas: &Canvas<'_>,
    chart: &Chart<'_, '_>,
    points: &[Point],
    spots: &[(i32, i32)],
    lines: &[Vec<(i32, i32)>],
    mut taken: Vec<Rect>,
) -> Result<()> {
    let (width, height) = chart.plotting_area().get_pixel_range();
    let inside = [width.start, height.start, width.end, height.end].map(f64::from);
    let marks: Vec<Rect> = spots.iter().map(|&(x, y)| around(f64::from(x), f64::from(y), 8.0, 8.0)).collect();
    let line_dots: Vec<Rect> =
        lines.iter().flat_map(|line| line.windows(2)).flat_map(|ends| dots(ends[0], ends[1])).collect();
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
        let ends = |what, interval: Option<[f64; 2]>| interval.into_iter().flatten().map(move |end| (what, Some(end)));
        let intervals = ends("interval of the reward", point.reward_interval)
            .chain(ends("interval of the safety", point.safety_interval));
        for (what, number) in numbers.into_iter().chain(intervals) {
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
