//! What the plots share: canvas, axes, legend, marks and colours.

use std::ops::Range;

use engine::{Error, Result};
use plotters::coord::Shift;
use plotters::coord::ranged1d::{BoldPoints, Ranged};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// The drawing surface, in pixels.
pub(crate) type Canvas<'a> = DrawingArea<SVGBackend<'a>, Shift>;
/// The area within the axes.
pub(crate) type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// Size of labels and legends in pixels.
pub(crate) const TEXT: f64 = 13.0;
const TITLE: f64 = 17.0;
const CHART_WIDTH: u32 = 760;
const HEIGHT: u32 = 520;
pub(crate) const TITLE_HEIGHT: u32 = 44;
const LEGEND_LINE: i32 = 22;
pub(crate) const BLACK_TEXT: RGBColor = RGBColor(0x22, 0x22, 0x22);
/// Lines that help to read a value.
pub(crate) const GRID: RGBColor = RGBColor(0xE2, 0xE2, 0xE2);
/// Axes, and lines that stand for a fixed value.
pub(crate) const AXIS: RGBColor = RGBColor(0x88, 0x88, 0x88);

/// Colours that remain distinct under the common colour-vision deficiencies (Okabe and Ito), dark enough
/// for a white ground.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0x00, 0x00, 0x00),
    RGBColor(0x00, 0x72, 0xB2),
    RGBColor(0xD5, 0x5E, 0x00),
    RGBColor(0x00, 0x9E, 0x73),
    RGBColor(0xCC, 0x79, 0xA7),
    RGBColor(0xE6, 0x9F, 0x00),
    RGBColor(0x56, 0xB4, 0xE9),
];

/// How the members of one group look: colour and mark of the `index`-th group.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Look(pub(crate) usize);

impl Look {
    pub(crate) fn colour(self) -> RGBColor {
        COLOURS[self.0 % COLOURS.len()]
    }

    /// Draws the group's mark, about 12 pixels across, around `(x, y)`.
    pub(crate) fn mark(self, canvas: &Canvas<'_>, (x, y): (i32, i32)) -> Result<()> {
        let style = self.colour().filled();
        // five marks and seven colours: the pairs repeat only after 35 groups
        match self.0 % 5 {
            0 => canvas.draw(&Circle::new((x, y), 6, style)),
            1 => canvas.draw(&Polygon::new(vec![(x - 6, y + 5), (x + 6, y + 5), (x, y - 7)], style)),
            2 => canvas.draw(&Rectangle::new([(x - 5, y - 5), (x + 5, y + 5)], style)),
            3 => canvas.draw(&Polygon::new(vec![(x - 7, y), (x, y - 7), (x + 7, y), (x, y + 7)], style)),
            _ => canvas.draw(&Polygon::new(vec![(x - 6, y - 5), (x + 6, y - 5), (x, y + 7)], style)),
        }
        .map_err(failed)
    }
}

/// One axis: its name, the values that it shows, and how they are written.
pub(crate) struct Axis {
    name: String,
    range: Range<f64>,
    /// At most so many values are marked.
    ticks: usize,
    /// Digits after the point, the same for all marked values.
    decimals: usize,
    /// The longest marked value in pixels.
    width: u32,
}

impl Axis {
    /// An axis around finite `values`, with room on both sides for marks and labels.
    pub(crate) fn around(name: &str, values: impl Iterator<Item = f64> + Clone) -> Result<Self> {
        let (low, high) = bounds(values);
        let magnitude = low.abs().max(high.abs());
        if magnitude > 1e15 {
            return Err(Error::Failed(format!(
                "The values of `{}` reach {magnitude:e}, which is too large to plot. Look for the policy that diverged.",
                clean(name)
            )));
        }
        let span = high - low;
        let pad = if span > (magnitude * 1e-6).max(1e-9) {
            0.12 * span
        } else if magnitude > 1e-6 {
            0.5 * magnitude
        } else {
            0.5
        };
        Ok(Self::new(name, low - pad..high + pad, 9))
    }

    /// An axis of optimizer steps from 0 to the largest of `values`, numbered in whole steps.
    pub(crate) fn steps(values: impl Iterator<Item = f64> + Clone) -> Self {
        let last = bounds(values).1.max(1.0);
        Self::new("step", 0.0..last, (last as usize).clamp(1, 9) + 1)
    }

    fn new(name: &str, range: Range<f64>, ticks: usize) -> Self {
        let marked = RangedCoordf64::from(range.clone()).key_points(BoldPoints(ticks));
        let tolerance = 1e-6 * (range.end - range.start);
        let exact = |decimals: &usize| {
            let scale = 10f64.powi(*decimals as i32);
            marked.iter().all(|value| ((value * scale).round() / scale - value).abs() < tolerance)
        };
        let decimals = (0..12).find(exact).unwrap_or(12);
        let mut axis = Self { name: clean(name), range, ticks, decimals, width: 0 };
        axis.width = marked.iter().map(|value| text_width(&axis.number(*value)).ceil() as u32).max().unwrap_or(0);
        axis
    }

    fn number(&self, value: f64) -> String {
        let text = format!("{value:.*}", self.decimals);
        // a rounded value just below zero
        if text.trim_start_matches(['-', '0', '.']).is_empty() { text.replace('-', "") } else { text }
    }
}

fn bounds(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)))
}

/// What a viewer is told who points at a place of the picture.
pub(crate) struct Tip {
    pub(crate) at: (i32, i32),
    pub(crate) text: String,
}

/// Draws a figure with title, axes and a legend on its right, and returns it as SVG.
///
/// `draw` fills the area within the axes and says what is told there. Groups in `legend` are shown in order, the `i`-th as `Look(i)`.
pub(crate) fn figure(
    title: &str,
    x: &Axis,
    y: &Axis,
    legend: &[String],
    draw: impl FnOnce(&Canvas<'_>, &mut Chart<'_, '_>) -> Result<Vec<Tip>>,
) -> Result<String> {
    let legend: Vec<String> = legend.iter().map(|name| shortened(name, 30)).collect();
    let legend_width = legend.iter().map(|name| text_width(name)).fold(0.0, f64::max).ceil() as u32 + 52;
    let height = HEIGHT.max(TITLE_HEIGHT + LEGEND_LINE as u32 * (legend.len() as u32 + 1));
    picture((CHART_WIDTH + legend_width, height), |canvas| {
        write_title(canvas, title, CHART_WIDTH as i32 / 2 + 20)?;
        let mut chart = ChartBuilder::on(canvas)
            .margin_top(TITLE_HEIGHT)
            .margin_left(10)
            .margin_right(legend_width)
            .margin_bottom(10)
            .x_label_area_size(44)
            .y_label_area_size(y.width + 36)
            .build_cartesian_2d(x.range.clone(), y.range.clone())
            .map_err(failed)?;
        let label = style(TEXT - 1.0, BLACK_TEXT, HPos::Left);
        chart
            .configure_mesh()
            // fewer where their numbers are long, so that neighbours do not touch
            .x_labels(x.ticks.min((600 / (x.width + 16)).max(2) as usize))
            .y_labels(y.ticks)
            .x_label_formatter(&|value| x.number(*value))
            .y_label_formatter(&|value| y.number(*value))
            .x_desc(x.name.as_str())
            .y_desc(y.name.as_str())
            .label_style(label)
            .axis_desc_style(style(TEXT, BLACK_TEXT, HPos::Left))
            .axis_style(AXIS)
            .bold_line_style(GRID)
            .light_line_style(TRANSPARENT)
            .draw()
            .map_err(failed)?;
        let tips = draw(canvas, &mut chart)?;

        for (i, name) in legend.into_iter().enumerate() {
            let (left, middle) = (CHART_WIDTH as i32 + 24, TITLE_HEIGHT as i32 + 12 + LEGEND_LINE * i as i32);
            Look(i).mark(canvas, (left, middle))?;
            write_text(canvas, &name, (left + 14, middle), HPos::Left)?;
        }
        Ok(tips)
    })
}

/// An SVG of this size in pixels on a white ground.
pub(crate) fn picture(size: (u32, u32), draw: impl FnOnce(&Canvas<'_>) -> Result<Vec<Tip>>) -> Result<String> {
    let mut svg = String::new();
    let tips = {
        let canvas = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        canvas.fill(&WHITE).map_err(failed)?;
        let tips = draw(&canvas)?;
        canvas.present().map_err(failed)?;
        tips
    };
    // the backend knows no tooltips
    let Some(end) = svg.rfind("</svg>") else { return Ok(svg) };
    let tips: String = tips.iter().map(Tip::svg).collect();
    svg.insert_str(end, &tips);
    Ok(svg)
}

impl Tip {
    /// A circle that is not seen, with its text as the title.
    fn svg(&self) -> String {
        let text = clean(&self.text).replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
        let (x, y) = self.at;
        format!(
            "<circle class=\"tip\" cx=\"{x}\" cy=\"{y}\" r=\"9\" fill=\"none\" pointer-events=\"all\"><title>{text}</title></circle>\n"
        )
    }
}

/// Writes the picture's title with its middle at `x`.
pub(crate) fn write_title(canvas: &Canvas<'_>, title: &str, x: i32) -> Result<()> {
    let title = Text::new(shortened(title, 80), (x, 22), style(TITLE, BLACK_TEXT, HPos::Center));
    canvas.draw(&title).map_err(failed)
}

/// Writes one line of label text; `(x, y)` is the middle of its height.
pub(crate) fn write_text(canvas: &Canvas<'_>, text: &str, at: (i32, i32), anchor: HPos) -> Result<()> {
    canvas.draw(&Text::new(text.to_string(), at, style(TEXT, BLACK_TEXT, anchor))).map_err(failed)
}

fn style(pixels: f64, colour: RGBColor, anchor: HPos) -> TextStyle<'static> {
    // the SVG backend divides sizes by 1.24
    ("sans-serif", pixels * 1.24).into_font().color(&colour).pos(Pos::new(anchor, VPos::Center))
}

/// The width of a label in pixels, rather too large than too small, since the viewer picks the font.
pub(crate) fn text_width(text: &str) -> f64 {
    let ems: f64 = text.chars().map(|c| if c.is_ascii() { 0.62 } else { 1.0 }).sum();
    ems * TEXT
}

/// A text for one line of a plot or table: control characters, which XML forbids, replaced.
pub(crate) fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') { '\u{fffd}' } else { c }).collect()
}

/// The clean text, cut to `most` characters with an ellipsis.
pub(crate) fn shortened(text: &str, most: usize) -> String {
    let text = clean(text);
    if text.chars().count() <= most {
        return text;
    }
    text.chars().take(most - 1).chain(['…']).collect()
}

/// A plotting error as ours; it does not occur in practice, since an SVG is drawn into memory.
pub(crate) fn failed(error: impl std::fmt::Display) -> Error {
    Error::Failed(format!("Could not draw a plot: {error}."))
}
