//! Trainings as other programs follow them: event files for TensorBoard, and runs of an MLflow server.

mod events;
mod mlflow;

use std::path::{Path, PathBuf};

use align::trainer::{MemoryPlan, Monitor, StepRecord};
use engine::{Error, Result};
use serde_json::Value;

use self::events::EventFile;
use crate::ui::{self, TrainingBar};

/// What a training is called, and what decides its result: names with their values.
pub(crate) struct About {
    /// The policy's name.
    pub(crate) name: String,
    /// Options and what they apply to.
    pub(crate) parameters: Vec<(&'static str, String)>,
}

/// Trains under a monitor that shows a bar, writes an event file for TensorBoard into `folder` and, where
/// `MLFLOW_TRACKING_URI` is set, sends the metrics to that server.
///
/// # Errors
/// Those of `train`; a tracking server that cannot be used. Once training has begun, what cannot be written or sent is said and
/// does not end it.
pub(crate) fn tracked<T>(folder: &Path, about: &About, train: impl FnOnce(&mut dyn Monitor) -> Result<T>) -> Result<T> {
    let server = mlflow::Server::from_environment()?;
    let mlflow = server.map(|server| mlflow::Run::begin(server, folder, about)).transpose()?;
    let mut tracking =
        Tracking { folder: folder.to_owned(), bar: TrainingBar::new("training"), events: None, broken: false, mlflow };
    let trained = train(&mut tracking);
    if let Some(run) = tracking.mlflow {
        run.end(match &trained {
            Ok(_) => "FINISHED",
            Err(Error::Interrupted(_)) => "KILLED",
            Err(_) => "FAILED",
        });
    }
    trained
}

struct Tracking {
    folder: PathBuf,
    bar: TrainingBar,
    /// Opened at the first step, which says where the training begins or continues.
    events: Option<EventFile>,
    /// Whether an event could not be written.
    broken: bool,
    mlflow: Option<mlflow::Run>,
}

impl Tracking {
    fn write_events(&mut self, record: &StepRecord) -> Result<()> {
        let file = match &mut self.events {
            Some(file) => file,
            empty => empty.insert(EventFile::create(&self.folder, record.step)?),
        };
        file.write(record.step, &numbers(record))
    }
}

impl Monitor for Tracking {
    fn planned(&mut self, plan: &MemoryPlan, before: Option<usize>) {
        self.bar.planned(plan, before);
    }

    fn scored(&mut self, done: usize, total: usize) {
        self.bar.scored(done, total);
    }

    fn step(&mut self, total: u64, record: &StepRecord) {
        self.bar.step(total, record);
        if !self.broken
            && let Err(error) = self.write_events(record)
        {
            self.broken = true;
            ui::say(format!("TensorBoard will not see the rest of this training. {error}"));
        }
        if let Some(run) = &mut self.mlflow {
            run.log(record.step, &numbers(record));
        }
    }

    fn stop_requested(&self) -> bool {
        self.bar.stop_requested()
    }
}

/// The numbers of a record but for its step, under the names that they have in `metrics.jsonl`.
fn numbers(record: &StepRecord) -> Vec<(String, f64)> {
    serde_json::to_value(record).map(|value| numbers_of(&value)).unwrap_or_default()
}

fn numbers_of(record: &Value) -> Vec<(String, f64)> {
    let fields = record.as_object().into_iter().flatten().filter(|(name, _)| *name != "step");
    fields.filter_map(|(name, value)| Some((name.clone(), value.as_f64()?))).collect()
}
