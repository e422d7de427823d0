//! `metrics.jsonl`: one line per optimizer step.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use engine::{Error, Result};
use serde::Serialize;
use serde_json::Value;

/// Appends records to a file, one JSON object a line.
#[derive(Debug)]
pub(crate) struct MetricsLog {
    file: File,
    path: PathBuf,
}

impl MetricsLog {
    /// Opens the log of a training that has taken `steps` steps: later lines, which a killed run may have left,
    /// are dropped, since they will be written again.
    pub(crate) fn open(path: &Path, steps: u64) -> Result<Self> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        }
        let kept = match std::fs::read_to_string(path) {
            Ok(text) => {
                text.split_inclusive('\n').take_while(|line| step_of(line).is_some_and(|s| s <= steps)).collect()
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(Error::io("read", path)(error)),
        };
        engine::checkpoint::atomic::write_file(path, |out| out.write_all(kept.as_bytes()))?;
        let file = OpenOptions::new().append(true).open(path).map_err(Error::io("write", path))?;
        Ok(Self { file, path: path.to_path_buf() })
    }

    pub(crate) fn append(&mut self, record: &impl Serialize) -> Result<()> {
        let mut line =
            serde_json::to_string(record).map_err(|e| Error::Failed(format!("A metric is no JSON: {e}.")))?;
        line.push('\n');
        // one write per line, so that a kill leaves whole lines but for the last
        self.file.write_all(line.as_bytes()).map_err(Error::io("write", &self.path))
    }
}

/// One metric of a `metrics.jsonl`, with its optimizer step; lines without it are left out.
///
/// # Errors
/// If the file cannot be read.
pub fn read_metric(path: &Path, metric: &str) -> Result<Vec<(u64, f64)>> {
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    let point = |line: &str| {
        let record: Value = serde_json::from_str(line).ok()?;
        Some((record.get("step")?.as_u64()?, record.get(metric)?.as_f64()?))
    };
    Ok(text.lines().filter_map(point).collect())
}

/// The step of a complete line.
fn step_of(line: &str) -> Option<u64> {
    let line = line.strip_suffix('\n')?;
    serde_json::from_str::<Value>(line).ok()?.get("step")?.as_u64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reopening_drops_what_came_after_the_saved_step() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/metrics.jsonl");
        let mut log = MetricsLog::open(&path, 0).unwrap();
        for step in 1..=3 {
            log.append(&serde_json::json!({"step": step, "loss": 0.5})).unwrap();
        }
        log.file.write_all(b"{\"step\": 4, \"lo").unwrap();
        let mut log = MetricsLog::open(&path, 2).unwrap();
        log.append(&serde_json::json!({"step": 3, "loss": 0.25})).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 3);
        assert!(text.ends_with("{\"step\":3,\"loss\":0.25}\n"));
        assert_eq!(read_metric(&path, "loss").unwrap(), [(1, 0.5), (2, 0.5), (3, 0.25)]);
        assert_eq!(read_metric(&path, "accuracy").unwrap(), []);
    }
}
