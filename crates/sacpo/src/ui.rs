//! Results on standard output; messages and progress on standard error: bars on a terminal, few lines when piped.

use std::io::{self, ErrorKind, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use align::data::Progress;
use align::trainer::{MemoryPlan, Monitor, StepRecord};
use engine::{Error, Result};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

use crate::interrupt;

/// Between two lines about work whose progress bar nobody sees.
const HEARTBEAT: Duration = Duration::from_secs(60);

/// Says what is going on. Whether anybody listens does not matter to the work.
pub(crate) fn say(message: impl AsRef<str>) {
    let _ = writeln!(io::stderr(), "{}", message.as_ref());
}

/// Prints a result and ends the line.
///
/// # Errors
/// If standard output cannot be written, unless its reader has merely gone away (`sacpo logps … | head`).
pub(crate) fn print(text: impl AsRef<str>) -> Result<()> {
    let mut out = io::stdout().lock();
    match writeln!(out, "{}", text.as_ref()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Error::io("write", Path::new("standard output"))(error))
        }
        _ => Ok(()),
    }
}

/// A time for people.
pub(crate) fn duration(seconds: f64) -> String {
    match seconds as u64 {
        0 if seconds > 0.0 => "< 1 s".into(),
        0 => "–".into(),
        s if s < 60 => format!("{s} s"),
        s => format!("{} min {:02} s", s / 60, s % 60),
    }
}

/// A bar of `length` items; hidden when standard error is not a terminal.
pub(crate) fn bar(length: u64, what: &str) -> ProgressBar {
    bar_of("{pos}/{len}", length, what)
}

/// A bar of bytes, whose number is set later.
pub(crate) fn bytes_bar(what: &str) -> ProgressBar {
    bar_of("{bytes}/{total_bytes}", 0, what)
}

fn bar_of(position: &str, length: u64, what: &str) -> ProgressBar {
    let bar = ProgressBar::new(length);
    let template = &format!("  {{prefix}} {{bar:30}} {position}  {{elapsed}} elapsed, {{eta}} left  {{msg}}");
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_prefix(what.to_owned());
    bar
}

/// A callback that moves a bar of bytes and ends the work on Ctrl-C.
pub(crate) fn read_on(bar: &ProgressBar) -> impl FnMut(Progress) -> Result<()> + '_ {
    |progress| {
        bar.set_length(progress.all_bytes);
        bar.set_position(progress.bytes);
        bar.set_message(format!("{} rows", progress.rows));
        interrupt::check()
    }
}

/// Shows how many bytes are received, or in a line now and then when standard error is not a terminal.
pub(crate) struct TransferBar {
    bar: ProgressBar,
    last_line: Instant,
    /// Bytes of the files that are complete.
    complete: u64,
}

impl TransferBar {
    /// For so many files of a repository, which have so many bytes.
    pub(crate) fn new(repository: &str, files: usize, bytes: u64) -> Self {
        say(format!(
            "Fetching {files} {} of {repository}: {}.",
            if files == 1 { "file" } else { "files" },
            HumanBytes(bytes)
        ));
        let bar = bytes_bar("fetching");
        bar.set_length(bytes);
        Self { bar, last_line: Instant::now(), complete: 0 }
    }

    /// Shows how many bytes of the file at hand there are.
    pub(crate) fn received(&mut self, bytes: u64) {
        let bytes = self.complete + bytes;
        self.bar.set_position(bytes);
        if self.bar.is_hidden() && self.last_line.elapsed() >= HEARTBEAT {
            self.last_line = Instant::now();
            say(format!("  {} of {}", HumanBytes(bytes), HumanBytes(self.bar.length().unwrap_or(bytes))));
        }
    }

    /// Goes on to the next file after one of so many bytes.
    pub(crate) fn completed(&mut self, bytes: u64) {
        self.complete += bytes;
    }

    /// Says something above the bar.
    pub(crate) fn say(&self, message: &str) {
        self.bar.suspend(|| say(message));
    }
}

impl Drop for TransferBar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// A callback that moves a bar and ends the work on Ctrl-C.
pub(crate) fn advance(bar: &ProgressBar) -> impl FnMut(usize) -> Result<()> + '_ {
    |done| {
        bar.set_position(done as u64);
        interrupt::check()
    }
}

/// A line now and then for those who do not see a bar.
pub(crate) struct Heartbeat {
    last_line: Instant,
}

impl Heartbeat {
    pub(crate) fn new() -> Self {
        Self { last_line: Instant::now() }
    }

    /// Says how far the work is, if the bar is hidden and the last line long ago.
    pub(crate) fn beat(&mut self, bar: &ProgressBar, line: impl FnOnce() -> String) {
        if bar.is_hidden() && self.last_line.elapsed() >= HEARTBEAT {
            self.last_line = Instant::now();
            say(line());
        }
    }
}

/// Shows training steps on a bar, or in a line now and then when standard error is not a terminal.
pub(crate) struct TrainingBar {
    bar: ProgressBar,
    heartbeat: Heartbeat,
    /// Whether the bar counts optimizer steps yet, and not scored prompts.
    training: bool,
}

impl TrainingBar {
    pub(crate) fn new(what: &str) -> Self {
        Self { bar: bar(0, what), heartbeat: Heartbeat::new(), training: false }
    }
}

impl Monitor for TrainingBar {
    fn planned(&mut self, plan: &MemoryPlan, before: Option<usize>) {
        self.bar.suspend(|| {
            say(format!("  {plan}."));
            if let Some(before) = before {
                say(format!(
                    "  The training began with {before} tokens a pass and goes on with {}, which is what is asked for or fits now: \
                     the last bits of its result may be others than without the stop.",
                    plan.micro_batch_tokens
                ));
            }
        });
    }

    fn scored(&mut self, done: usize, total: usize) {
        self.bar.set_length(total as u64);
        self.bar.set_position(done as u64);
        self.bar.set_message("reference log-probabilities");
        self.heartbeat.beat(&self.bar, || format!("  {done} of {total} prompts scored under the reference"));
    }

    fn step(&mut self, total: u64, record: &StepRecord) {
        if !self.training {
            self.training = true;
            let done = record.step - 1;
            if done > 0 {
                self.bar.suspend(|| say(format!("  Continues after step {done} of {total}.")));
            }
            self.bar.set_length(total);
            // only what is done from here counts for the rate
            self.bar.set_position(done);
            self.bar.reset_eta();
        }
        self.bar.set_position(record.step);
        let accuracy = record.metrics.get("rewards/accuracies");
        let accuracy = accuracy.map(|a| format!(", accuracy {a:.2}")).unwrap_or_default();
        let message = format!("loss {:.4}{accuracy}", record.loss);
        self.heartbeat.beat(&self.bar, || format!("  step {} of {total}, {message}", record.step));
        self.bar.set_message(message);
    }

    fn stop_requested(&self) -> bool {
        interrupt::requested()
    }
}

impl Drop for TrainingBar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
