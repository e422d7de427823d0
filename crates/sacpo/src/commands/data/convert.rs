//! `sacpo data convert`.

use align::data::{Conversion, Source, Target};
use engine::Result;
use serde_json::json;

use crate::cli::{ConvertData, Global};
use crate::commands::{print_json, refuse_existing};
use crate::ui;

pub(super) fn run(options: &ConvertData, global: Global) -> Result<()> {
    let ConvertData { from, out, to, format, metric, skip_bad_rows } = options;
    refuse_existing(out)?;
    let source = Source { path: from, format: *format, metric, skip_bad_rows: *skip_bad_rows };
    let bar = ui::bytes_bar("converting");
    let converted = Conversion { source, to: *to }.write(out, &mut ui::read_on(&bar));
    bar.finish_and_clear();
    let converted = converted?;
    if let Some(first) = &converted.first_bad_row {
        ui::say(format!("{} rows are bad and left out. The first: {first}", converted.bad_rows));
    }
    if converted.left_out > 0 {
        let what = match converted.to {
            Target::Sft => "responses that are not to be learned from are left out",
            _ => "prompts are left out, since they are there already",
        };
        ui::say(format!("{} {what}.", converted.left_out));
    }
    if !converted.lost_columns.is_empty() {
        let names: Vec<String> = converted.lost_columns.iter().map(|name| format!("`{name}`")).collect();
        ui::say(format!("These columns have no place in `{}`: {}.", converted.to.name(), names.join(", ")));
    }
    ui::say(format!("Wrote {} rows as `{}` to {}.", converted.rows, converted.to.name(), out.display()));
    if global.json {
        return print_json(&json!({"out": out, "converted": converted}));
    }
    Ok(())
}
