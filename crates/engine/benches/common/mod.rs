//! What the benchmarks that take turns with another program share.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout, Command, Stdio};

use serde_json::Value;

/// As in the program that is measured.
#[global_allocator]
static ALLOCATOR: engine::memory::LargePages = engine::memory::LargePages;

/// Another program, which answers requests of one line with one line of JSON.
pub(crate) struct Peer {
    /// The command that started it.
    pub(crate) command: String,
    child: Child,
    answers: BufReader<ChildStdout>,
}

impl Peer {
    /// Starts it by a command of the shell.
    pub(crate) fn start(command: &str) -> Self {
        let mut child = Command::new("sh")
            .args(["-c", &format!("exec {command}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("could not start `{command}`: {e}"));
        let answers = BufReader::new(child.stdout.take().unwrap_or_else(|| unreachable!("stdout is piped")));
        Self { command: command.to_owned(), child, answers }
    }

    /// Its answer, which says in `seconds` what the work has taken.
    pub(crate) fn ask(&mut self, request: &str) -> Value {
        let input = self.child.stdin.as_mut().unwrap_or_else(|| unreachable!("stdin is piped"));
        writeln!(input, "{request}").unwrap_or_else(|e| panic!("`{}` has stopped: {e}", self.command));
        loop {
            let mut line = String::new();
            assert!(self.answers.read_line(&mut line).unwrap_or(0) > 0, "`{}` has stopped", self.command);
            // it may print lines about itself before
            let answer: Value = serde_json::from_str(&line).unwrap_or_default();
            if !answer["seconds"].is_null() {
                return answer;
            }
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
    }
}

/// The middle value, of an even number the higher of the two in the middle.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}
