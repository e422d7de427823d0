//! What an endpoint replied.

use serde_json::Value;

use super::rubric::parse_scores;

/// What a judge wrote, and the tokens of request and reply where the endpoint counts them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Reply {
    pub(super) text: String,
    pub(super) tokens: Option<[u64; 2]>,
}

impl Reply {
    /// Reads the body of a response; nothing if it is no chat completion. One whose message is no text, as where a model
    /// declines to write, is a reply without text.
    pub(super) fn read(body: &str) -> Option<Self> {
        let completion: Value = serde_json::from_str(body).ok()?;
        let message = completion.pointer("/choices/0/message")?.as_object()?;
        let text = message.get("content").and_then(Value::as_str).unwrap_or_default().to_owned();
        let tokens = |name: &str| completion.pointer(&format!("/usage/{name}"))?.as_u64();
        Some(Self { text, tokens: tokens("prompt_tokens").zip(tokens("completion_tokens")).map(Into::into) })
    }
}

/// What the replies to a request amount to.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Standing {
    /// The request is still to be made.
    Open,
    /// Scores of the first and the second answer, and the text that they stand in.
    Scored([f64; 2], String),
    /// None of as many replies as are asked for has scores. The last one.
    Unreadable(String),
}

impl Standing {
    /// Reads the bodies of responses to one request, in their order. Those that are no chat completions do not count.
    pub(super) fn of(bodies: &[String], attempts: usize) -> Self {
        let replies: Vec<Reply> = bodies.iter().filter_map(|body| Reply::read(body)).collect();
        if let Some((scores, reply)) = replies.iter().find_map(|reply| Some((parse_scores(&reply.text)?, reply))) {
            return Self::Scored(scores, reply.text.clone());
        }
        match replies.into_iter().nth(attempts - 1) {
            Some(reply) => Self::Unreadable(reply.text),
            None => Self::Open,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(text: &str) -> String {
        serde_json::json!({"choices": [{"message": {"role": "assistant", "content": text}}]}).to_string()
    }

    #[test]
    fn a_reply_without_scores_is_asked_for_again_and_then_missing() {
        let (good, bad) = (body("7 3\nbecause"), body("I cannot judge this."));
        let cut = good[..good.len() / 2].to_owned();
        let scored = Standing::Scored([7.0, 3.0], "7 3\nbecause".into());
        let missing = Standing::Unreadable("I cannot judge this.".into());
        for (bodies, standing) in [
            (vec![], Standing::Open),
            (vec![&cut, &cut, &cut, &cut], Standing::Open),
            (vec![&bad], Standing::Open),
            (vec![&bad, &cut, &bad], missing.clone()),
            (vec![&bad, &good], scored.clone()),
            (vec![&bad, &bad, &good], scored),
        ] {
            let bodies: Vec<String> = bodies.into_iter().cloned().collect();
            assert_eq!(Standing::of(&bodies, 2), standing, "{bodies:?}");
        }
    }

    #[test]
    fn what_is_no_completion_is_no_reply() {
        let reply = Reply::read(
            r#"{"id":"x","choices":[{"index":0,"message":{"content":"5 5"},"finish_reason":"stop"}],
                "usage":{"prompt_tokens":11,"completion_tokens":3,"total_tokens":14}}"#,
        );
        assert_eq!(reply, Some(Reply { text: "5 5".into(), tokens: Some([11, 3]) }));
        let refused = r#"{"choices":[{"message":{"content":null,"refusal":"No."}}],"usage":null}"#;
        assert_eq!(Reply::read(refused), Some(Reply { text: String::new(), tokens: None }));
        let parts = r#"{"choices":[{"message":{"content":[{"type":"text"}]}}],"usage":{"prompt_tokens":null}}"#;
        assert_eq!(Reply::read(parts), Some(Reply { text: String::new(), tokens: None }));
        let deep = "[".repeat(100_000);
        for body in ["", "5 5", "{}", r#"{"choices":[]}"#, r#"{"error":{"message":"overloaded"}}"#, "<html>", &deep] {
            assert_eq!(Reply::read(body), None, "{body}");
        }
    }
}
