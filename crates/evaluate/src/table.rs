//! Markdown tables that read in a terminal too.

use crate::plot;

/// A Markdown table of a head and rows of as many cells, aligned; ends with a newline. The first `texts` columns are flush
/// left, the others, numbers, flush right.
pub(crate) fn markdown(rows: &[Vec<String>], texts: usize) -> String {
    let Some((head, body)) = rows.split_first() else { return String::new() };
    let width = |c: usize| rows.iter().map(|row| row[c].chars().count()).max().unwrap_or(0).max(3);
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |row: &[String]| {
        let cells = row.iter().zip(&widths).enumerate().map(|(c, (text, &width))| {
            if c < texts { format!(" {text:<width$} |") } else { format!(" {text:>width$} |") }
        });
        format!("|{}\n", cells.collect::<String>())
    };
    let rule = |(c, &width): (usize, &usize)| if c < texts { "-".repeat(width) } else { "-".repeat(width - 1) + ":" };
    let rule: Vec<String> = widths.iter().enumerate().map(rule).collect();
    line(head) + &line(&rule) + &body.iter().map(|row| line(row)).collect::<String>()
}

/// A text as a cell of a table.
pub(crate) fn cell(text: &str) -> String {
    plot::clean(text).replace('|', "\\|")
}

/// Three decimals, and no minus sign before zero.
pub(crate) fn decimal(value: f64) -> String {
    let text = format!("{value:.3}");
    if text == "-0.000" { "0.000".into() } else { text }
}
