//! Answers in the form of OpenAI's API: whole, or as a stream of events.

use std::collections::VecDeque;
use std::convert::Infallible;

use axum::response::Sse;
use axum::response::sse::{Event, KeepAlive};
use futures_util::stream::{self, Stream};
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedReceiver;

use super::error::ApiError;
use super::seconds_since_1970;
use super::worker::{News, Reply};

/// The answers to one request.
pub(super) struct Completion {
    id: String,
    created: u64,
    model: String,
    prompt_tokens: usize,
    choices: usize,
    replies: UnboundedReceiver<Reply>,
    /// Of the answers that are complete.
    completion_tokens: usize,
    complete: usize,
}

impl Completion {
    pub(super) fn new(model: String, prompt_tokens: usize, choices: usize, replies: UnboundedReceiver<Reply>) -> Self {
        Self {
            id: format!("chatcmpl-{:016x}", rand::random::<u64>()),
            created: seconds_since_1970(),
            model,
            prompt_tokens,
            choices,
            replies,
            completion_tokens: 0,
            complete: 0,
        }
    }

    /// All answers, when all are complete.
    pub(super) async fn whole(mut self) -> Result<Value, ApiError> {
        let mut choices = vec![Value::Null; self.choices];
        while let Some((choice, news)) = self.next().await? {
            if let News::Finished { text, finish, .. } = news {
                choices[choice] = json!({
                    "index": choice,
                    "message": {"role": "assistant", "content": text, "refusal": null},
                    "logprobs": null,
                    "finish_reason": finish,
                });
            }
        }
        let mut answer = self.object("chat.completion", choices);
        answer["usage"] = self.usage();
        Ok(answer)
    }

    /// Events with what comes of the answers, as it comes.
    pub(super) fn stream(self, include_usage: bool) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
        let mut events = Events { completion: self, include_usage, ready: VecDeque::new(), ended: false };
        for choice in 0..events.completion.choices {
            events.push_delta(choice, json!({"role": "assistant", "content": ""}), Value::Null);
        }
        let events = stream::unfold(events, async |mut events| {
            let data = events.next().await?;
            Some((Ok(Event::default().data(data)), events))
        });
        Sse::new(events).keep_alive(KeepAlive::default())
    }

    /// The next news of an answer; nothing when all answers are complete.
    async fn next(&mut self) -> Result<Option<(usize, News)>, ApiError> {
        if self.complete == self.choices {
            return Ok(None);
        }
        let Some(Reply { choice, news }) = self.replies.recv().await else { return Err(ApiError::stopping()) };
        let news = news?;
        if let News::Finished { tokens, .. } = news {
            self.completion_tokens += tokens;
            self.complete += 1;
        }
        Ok(Some((choice, news)))
    }

    fn object(&self, kind: &str, choices: Vec<Value>) -> Value {
        json!({"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices})
    }

    fn usage(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        })
    }
}

/// Answers on their way out as events.
struct Events {
    completion: Completion,
    include_usage: bool,
    /// The data of events that can be sent.
    ready: VecDeque<String>,
    ended: bool,
}

impl Events {
    /// The data of the next event.
    async fn next(&mut self) -> Option<String> {
        while self.ready.is_empty() && !self.ended {
            match self.completion.next().await {
                Ok(Some((choice, News::Finished { text, finish, .. }))) => {
                    self.push_text(choice, text);
                    self.push_delta(choice, json!({}), json!(finish));
                }
                Ok(Some((choice, News::Text(text)))) => self.push_text(choice, text),
                Ok(None) => {
                    if self.include_usage {
                        self.push(Vec::new(), self.completion.usage());
                    }
                    self.ready.push_back("[DONE]".into());
                    self.ended = true;
                }
                Err(error) => {
                    self.ready.push_back(error.body().to_string());
                    self.ended = true;
                }
            }
        }
        self.ready.pop_front()
    }

    fn push_text(&mut self, choice: usize, text: String) {
        if !text.is_empty() {
            self.push_delta(choice, json!({"content": text}), Value::Null);
        }
    }

    fn push_delta(&mut self, choice: usize, delta: Value, finish: Value) {
        let choice = json!({"index": choice, "delta": delta, "logprobs": null, "finish_reason": finish});
        self.push(vec![choice], Value::Null);
    }

    /// Usage is part of every event when it is asked for, and null but in the last.
    fn push(&mut self, choices: Vec<Value>, usage: Value) {
        let mut chunk = self.completion.object("chat.completion.chunk", choices);
        if self.include_usage {
            chunk["usage"] = usage;
        }
        self.ready.push_back(chunk.to_string());
    }
}
