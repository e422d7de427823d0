//! Win rates by category: a panel for each category, a row in it for each policy.

use engine::{Error, Result};
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;
use serde::Serialize;

use crate::plot::{self, AXIS, BLACK_TEXT, Canvas, GRID, TITLE_HEIGHT, Tip};

/// The win rates in one category.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Panel {
    /// The category's name.
    pub name: String,
    /// Of every policy; nothing for one without verdicts in it.
    pub bars: Vec<Option<Bar>>,
}

/// A share in percent.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Bar {
    /// The share.
    pub value: f64,
    /// Its interval, if there is one.
    pub interval: Option<[f64; 2]>,
    /// The number of verdicts.
    pub n: usize,
}

const PANEL_WIDTH: i32 = 190;
const GAP: i32 = 28;
const COLUMNS: usize = 3;
const ROW: i32 = 18;
const HEAD: i32 = 26;
const FOOT: i32 = 34;
/// What neither of two wins.
const EVEN: f64 = 50.0;

/// Panels as an SVG: from 50 % a bar to the policy's win rate, with the interval as a line.
///
/// # Errors
/// If there is nothing to plot, a panel does not have a bar or its place for each of `policies`, or a number is outside 0 to 100.
pub fn panels_svg(title: &str, policies: &[String], panels: &[Panel]) -> Result<String> {
    if policies.is_empty() || panels.is_empty() {
        return Err(Error::Failed(format!("There is nothing to plot in `{title}`.")));
    }
    for panel in panels {
        let numbers = panel
            .bars
            .iter()
            .flatten()
            .flat_map(|bar| [bar.value].into_iter().chain(bar.interval.into_iter().flatten()));
        let bad = numbers.into_iter().find(|number| !(0.0..=100.0).contains(number));
        if panel.bars.len() != policies.len() || bad.is_some() {
            return Err(Error::Failed(format!(
                "The category `{}` cannot be plotted: it must have a place for each of {} policies and shares of 0 to 100 %.",
                plot::clean(&panel.name),
                policies.len()
            )));
        }
    }
    let names: Vec<String> = policies.iter().map(|name| plot::shortened(name, 30)).collect();
    let left = names.iter().map(|name| plot::text_width(name)).fold(0.0, f64::max).ceil() as i32 + 20;
    let panel_height = HEAD + ROW * names.len() as i32 + FOOT;
    let columns = panels.len().min(COLUMNS);
    let width = (left + (PANEL_WIDTH + GAP) * columns as i32).max(480);
    let height = TITLE_HEIGHT as i32 + panel_height * panels.len().div_ceil(COLUMNS) as i32;
    plot::picture((width as u32, height as u32), |canvas| {
        plot::write_title(canvas, title, width / 2)?;
        let mut tips = Vec::new();
        for (number, panel) in panels.iter().enumerate() {
            let (row, column) = ((number / COLUMNS) as i32, (number % COLUMNS) as i32);
            let top = TITLE_HEIGHT as i32 + panel_height * row;
            if column == 0 {
                for (name, y) in names.iter().zip(rows(top)) {
                    plot::write_text(canvas, name, (left - 10, y), HPos::Right)?;
                }
            }
            tips.extend(draw_panel(canvas, policies, panel, (left + (PANEL_WIDTH + GAP) * column, top))?);
        }
        Ok(tips)
    })
}

/// The heights of the rows of a panel.
fn rows(top: i32) -> impl Iterator<Item = i32> {
    (0..).map(move |row| top + HEAD + ROW * row + ROW / 2)
}

fn draw_panel(canvas: &Canvas<'_>, policies: &[String], panel: &Panel, (left, top): (i32, i32)) -> Result<Vec<Tip>> {
    let x = |share: f64| left + (share / 100.0 * f64::from(PANEL_WIDTH)).round() as i32;
    let bottom = top + HEAD + ROW * policies.len() as i32;
    plot::write_text(canvas, &plot::shortened(&panel.name, 22), (left, top + HEAD / 2 - 2), HPos::Left)?;
    for share in [0.0, EVEN, 100.0] {
        let colour = if share == EVEN { AXIS } else { GRID };
        line(canvas, [(x(share), top + HEAD), (x(share), bottom)], colour.stroke_width(1))?;
        plot::write_text(canvas, &format!("{share}"), (x(share), bottom + 12), HPos::Center)?;
    }
    let mut tips = Vec::new();
    for ((name, bar), y) in policies.iter().zip(&panel.bars).zip(rows(top)) {
        let Some(Bar { value, interval, n }) = *bar else { continue };
        let (from, to) = (x(EVEN).min(x(value)), x(EVEN).max(x(value)));
        let body = Rectangle::new([(from, y - 4), (to, y + 4)], AXIS.mix(0.5).filled());
        canvas.draw(&body).map_err(plot::failed)?;
        if let Some([low, high]) = interval {
            line(canvas, [(x(low), y), (x(high), y)], BLACK_TEXT.stroke_width(1))?;
        }
        canvas.draw(&Circle::new((x(value), y), 3, BLACK_TEXT.filled())).map_err(plot::failed)?;
        let interval = interval.map(|[low, high]| format!(" ({low:.1} to {high:.1})")).unwrap_or_default();
        let text = format!("{name} in {}: {value:.1} %{interval}, {n} verdicts", panel.name);
        tips.push(Tip { at: (x(value), y), text });
    }
    Ok(tips)
}

fn line(canvas: &Canvas<'_>, ends: [(i32, i32); 2], style: ShapeStyle) -> Result<()> {
    canvas.draw(&PathElement::new(ends.to_vec(), style)).map_err(plot::failed)
}
