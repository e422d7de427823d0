//! The thread that generates.

use std::collections::HashMap;
use std::sync::Arc;

use engine::generate::{Dtype, Finish, Generator, Progress, SamplingOptions, SequenceId};
use engine::{Result, Tokenizer};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};

use super::growing::GrowingText;
use crate::interrupt;
use crate::policy::Policy;

/// One answer to generate.
pub(super) struct Job {
    pub(super) prompt: Vec<u32>,
    pub(super) options: Arc<SamplingOptions>,
    /// Its place among the answers of a request, and the stream of random numbers that it draws from.
    pub(super) choice: usize,
    /// Whether its text is wanted while it grows.
    pub(super) stream: bool,
    /// Where it goes. When nobody listens any more, it is not generated further.
    pub(super) replies: UnboundedSender<Reply>,
    pub(super) room: Option<OwnedSemaphorePermit>,
}

/// News of an answer, or why it will not come.
pub(super) struct Reply {
    pub(super) choice: usize,
    pub(super) news: Result<News>,
}

pub(super) enum News {
    /// More of its text.
    Text(String),
    /// The last of its text, and the number of its tokens, one that ended it included.
    Finished { text: String, finish: Finish, tokens: usize },
}

/// An answer in progress.
struct Growing {
    choice: usize,
    replies: UnboundedSender<Reply>,
    tokens: Vec<u32>,
    text: GrowingText,
    stream: bool,
    /// Given back when the answer ends.
    room: Option<OwnedSemaphorePermit>,
}

/// Generates until Ctrl-C, or until no jobs can come any more.
///
/// # Errors
/// If the policy's models cannot be mixed.
pub(super) fn work(policy: &Policy, batch_size: usize, dtype: Dtype, mut jobs: UnboundedReceiver<Job>) -> Result<()> {
    let mixture = policy.mixture()?;
    let tokenizer = &policy.first.tokenizer;
    let decode = |tokens: &[u32]| tokenizer.decode(tokens);
    let context = mixture.context();
    let mut generator = Generator::new(mixture, context, batch_size, &decode).with_dtype(dtype);
    let mut growing: HashMap<SequenceId, Growing> = HashMap::new();
    while !interrupt::requested() {
        let mut next = if generator.is_empty() {
            let Some(job) = jobs.blocking_recv() else { break };
            Some(job)
        } else {
            jobs.try_recv().ok()
        };
        while let Some(job) = next {
            begin(&mut generator, &mut growing, job);
            next = jobs.try_recv().ok();
        }
        growing.retain(|id, answer| {
            let wanted = !answer.replies.is_closed();
            if !wanted {
                generator.cancel(*id);
            }
            wanted
        });
        for (id, progress) in generator.step() {
            let Some(answer) = growing.get_mut(&id) else { continue };
            let news = progress.and_then(|progress| answer.news(progress, tokenizer)).transpose();
            let ended = matches!(news, Some(Ok(News::Finished { .. }) | Err(_)));
            if ended {
                // before anybody knows, who may have the next request ready
                answer.room = None;
            }
            news.into_iter().for_each(|news| answer.tell(news));
            if ended {
                growing.remove(&id);
                generator.cancel(id);
            }
        }
    }
    Ok(())
}

fn begin(generator: &mut Generator<'_>, growing: &mut HashMap<SequenceId, Growing>, job: Job) {
    let Job { prompt, options, choice, stream, replies, room } = job;
    let text = GrowingText::new(options.stop.clone());
    let answer = Growing { choice, replies, tokens: Vec::new(), text, stream, room };
    match generator.add(prompt, options, choice as u64) {
        Ok(id) => _ = growing.insert(id, answer),
        Err(error) => answer.tell(Err(error)),
    }
}

impl Growing {
    /// Whether somebody listens is looked at before the next step.
    fn tell(&self, news: Result<News>) {
        let _ = self.replies.send(Reply { choice: self.choice, news });
    }

    /// What there is to tell after a step, if anything.
    fn news(&mut self, progress: Progress, tokenizer: &Tokenizer) -> Result<Option<News>> {
        match progress {
            Progress::Token(_) if !self.stream => Ok(None),
            Progress::Token(token) => {
                self.tokens.push(token);
                let text = tokenizer.decode(&self.tokens)?;
                let next = self.text.next(&text);
                Ok((!next.is_empty()).then(|| News::Text(next.to_owned())))
            }
            Progress::Finished(answer) => {
                let tokens = answer.tokens.len() + usize::from(answer.end.is_some());
                let text = self.text.up_to(&answer.text).to_owned();
                Ok(Some(News::Finished { text, finish: answer.finish, tokens }))
            }
        }
    }
}
