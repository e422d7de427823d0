//! Judges: which of two policies' answers to a prompt is better, and by how much.
//!
//! ```text
//! comparisons ──rubric──► requests ──chat──► endpoint        a language model behind an HTTP endpoint
//!                             │                  │
//!                             └────── store ◄────┘           every reply, before anything is made of it
//!                                       │
//!                                  judgements
//! comparisons ──► answers ──► scores ─────┘                  a model or a function that scores every answer by itself
//! ```

mod budget;
mod chat;
mod endpoint;
mod reply;
mod retry;
mod rubric;
mod scored;
mod store;
mod work;

use engine::{Error, Result};
use serde::Serialize;

use crate::verdict::Verdict;

pub use budget::{Budget, Prices, Usage};
pub use chat::{ChatJudge, ChatOptions, Plan};
pub use endpoint::ApiKey;
pub use retry::{Clock, SystemClock};
pub use rubric::Rubric;
pub use scored::{ScoreJudge, Scorer};
pub use store::Store;

/// Two policies' answers to one prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Comparison<'a> {
    /// What both answer.
    pub prompt: &'a str,
    /// The kind of prompt, where it is known.
    pub category: Option<&'a str>,
    /// The names of the policies, A's and B's, which differ.
    pub names: [&'a str; 2],
    /// Their answers.
    pub answers: [&'a str; 2],
}

/// A verdict, and what the judge said besides. As JSON one object: the verdict with these fields added.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Judgement {
    /// The verdict.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// The name of the judge.
    pub judge: String,
    /// What the judge wrote, where it writes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reply: Option<String>,
    /// Why there is no outcome, where there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub missing: Option<Missing>,
}

/// Why a verdict has no outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Missing {
    /// The judge replied, as often as it may, and no reply had two scores.
    Unreadable,
    /// The judging ended before there was a reply.
    NotJudged,
}

/// What a judging came to.
#[derive(Debug)]
pub struct Judged {
    /// One or more for each comparison, in the order of the comparisons. Those that there was no verdict on are among them.
    pub judgements: Vec<Judgement>,
    /// Why the judging ended before everything was judged, if it did.
    pub stopped: Option<Error>,
}

/// How far a judging is.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Progress {
    /// Verdicts that there will be.
    pub total: usize,
    /// Verdicts that there are, and those that are [`Missing::Unreadable`].
    pub done: usize,
    /// The latter.
    pub unreadable: usize,
    /// What all of them took.
    pub usage: Usage,
    /// What went wrong last and is tried again.
    pub trouble: Option<String>,
}

impl Progress {
    /// There is what so many verdicts hang on.
    fn settle(&mut self, unreadable: bool, verdicts: usize) {
        self.done += verdicts;
        self.unreadable += if unreadable { verdicts } else { 0 };
    }
}

/// Something that judges two answers to a prompt.
pub trait Judge {
    /// Judges comparisons. `progress` is told how far it is, at least every second, and may end the work with an error.
    ///
    /// # Errors
    /// What keeps the judge from judging anything. What stops it on the way is in [`Judged::stopped`].
    fn judge(
        &self,
        comparisons: &[Comparison<'_>],
        progress: &mut dyn FnMut(&Progress) -> Result<()>,
    ) -> Result<Judged>;
}
