//! What a client asks for.

use std::num::NonZeroUsize;

use axum::http::StatusCode;
use engine::chat::Message;
use engine::generate::SamplingOptions;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::error::ApiError;

/// A request for answers to a conversation.
#[derive(Debug)]
pub(super) struct ChatRequest {
    pub(super) messages: Vec<Message>,
    pub(super) options: SamplingOptions,
    /// Number of answers.
    pub(super) choices: usize,
    pub(super) stream: bool,
    /// Whether a stream ends with the numbers of tokens.
    pub(super) include_usage: bool,
}

/// The fields that are understood; what is null or missing has its default. Fields that nobody knows are ignored.
#[derive(Deserialize)]
struct Body {
    model: String,
    messages: Vec<Turn>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    top_k: Option<usize>,
    min_p: Option<f64>,
    max_tokens: Option<NonZeroUsize>,
    max_completion_tokens: Option<NonZeroUsize>,
    stop: Option<Stop>,
    seed: Option<i64>,
    n: Option<NonZeroUsize>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
}

#[derive(Deserialize)]
struct Turn {
    role: Role,
    content: Option<Content>,
    tool_calls: Option<Value>,
    function_call: Option<Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Role {
    System,
    /// OpenAI's newer name for the system.
    Developer,
    User,
    Assistant,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a text or a list of text parts")]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a text or a list of texts")]
enum Stop {
    One(String),
    Several(Vec<String>),
}

#[derive(Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

impl ChatRequest {
    /// Reads the body of a request to the model `name`; what it leaves out is that of `defaults`.
    ///
    /// # Errors
    /// Status 400 for what is no valid request or asks for something that is not supported, 404 for another model.
    pub(super) fn parse(body: &[u8], name: &str, defaults: &SamplingOptions) -> Result<Self, ApiError> {
        let body: Value = serde_json::from_slice(body)
            .map_err(|error| ApiError::bad_request(format!("The body is not valid JSON: {error}.")))?;
        let Value::Object(fields) = &body else {
            return Err(ApiError::bad_request("The body must be a JSON object."));
        };
        refuse_unsupported(fields)?;
        let body: Body = serde_path_to_error::deserialize(&body).map_err(|error| {
            let path = error.path().to_string();
            match path.as_str() {
                "." => ApiError::bad_request(format!("The request cannot be understood: {}.", error.inner())),
                _ => ApiError::bad_request(format!("{path} cannot be understood: {}.", error.inner())).param(path),
            }
        })?;
        check_model(&body.model, name)?;
        if body.messages.is_empty() {
            return Err(ApiError::bad_request("messages is empty. Give at least one message.").param("messages"));
        }
        let messages = body.messages.into_iter().enumerate().map(|(index, turn)| turn.message(index));
        let max_new_tokens = body.max_completion_tokens.or(body.max_tokens);
        let options = SamplingOptions {
            max_new_tokens: max_new_tokens.map_or(defaults.max_new_tokens, NonZeroUsize::get),
            temperature: body.temperature.unwrap_or(defaults.temperature),
            top_p: body.top_p.unwrap_or(defaults.top_p),
            top_k: body.top_k.unwrap_or(defaults.top_k),
            min_p: body.min_p.unwrap_or(defaults.min_p),
            seed: body.seed.map_or_else(rand::random, i64::cast_unsigned),
            stop: match body.stop {
                None => Vec::new(),
                Some(Stop::One(stop)) => vec![stop],
                Some(Stop::Several(stop)) => stop,
            },
            ..defaults.clone()
        };
        options.validate()?;
        let stream = body.stream.unwrap_or(false);
        if body.stream_options.is_some() && !stream {
            let message = "stream_options is given, but not `\"stream\": true`. Leave it out, or stream.";
            return Err(ApiError::bad_request(message).param("stream_options"));
        }
        Ok(Self {
            messages: messages.collect::<Result<_, _>>()?,
            options,
            choices: body.n.map_or(1, NonZeroUsize::get),
            stream,
            include_usage: body.stream_options.and_then(|options| options.include_usage).unwrap_or(false),
        })
    }
}

/// Refuses a model other than the one that is served.
pub(super) fn check_model(asked: &str, name: &str) -> Result<(), ApiError> {
    if asked == name {
        return Ok(());
    }
    let message = format!("There is no model `{asked}`. The model here is `{name}`.");
    Err(ApiError::new(StatusCode::NOT_FOUND, message).param("model").code("model_not_found"))
}

/// Refuses fields that would change the answer and are not supported, unless their value asks for nothing.
fn refuse_unsupported(fields: &Map<String, Value>) -> Result<(), ApiError> {
    for (name, value) in fields {
        let asks_for_nothing = match name.as_str() {
            "logprobs" => *value == json!(false),
            "top_logprobs" | "presence_penalty" | "frequency_penalty" => value.as_f64() == Some(0.0),
            "tools" | "functions" => *value == json!([]),
            "tool_choice" | "function_call" => *value == json!("none") || *value == json!("auto"),
            "response_format" => *value == json!({"type": "text"}),
            "logit_bias" => *value == json!({}),
            "modalities" => *value == json!(["text"]),
            "reasoning_effort" => *value == json!("none"),
            "audio" | "prediction" | "web_search_options" => false,
            _ => true,
        };
        if !(asks_for_nothing || value.is_null()) {
            let message = format!("{name} is not supported with the value {value}. Leave it out.");
            return Err(ApiError::bad_request(message).param(name).code("unsupported_parameter"));
        }
    }
    Ok(())
}

impl Turn {
    /// The message, which is number `index` of its conversation.
    fn message(self, index: usize) -> Result<Message, ApiError> {
        let unsupported = |field: &str, message: &str| {
            let param = format!("messages[{index}].{field}");
            ApiError::bad_request(format!("{param} {message}")).param(param)
        };
        if self.tool_calls.is_some() || self.function_call.is_some() {
            let field = if self.tool_calls.is_some() { "tool_calls" } else { "function_call" };
            return Err(unsupported(field, "is not supported. Leave it out.").code("unsupported_parameter"));
        }
        let content = match self.content {
            None => return Err(unsupported("content", "is missing. Give a text.")),
            Some(Content::Text(text)) => text,
            Some(Content::Parts(parts)) => {
                let texts = parts.into_iter().map(|part| match (part.kind.as_str(), part.text) {
                    ("text", Some(text)) => Ok(text),
                    _ => Err(unsupported("content", "may hold parts of type `text` alone, each with its `text`.")),
                });
                texts.collect::<Result<Vec<_>, _>>()?.join("\n")
            }
        };
        let role = match self.role {
            Role::System | Role::Developer => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
        };
        Ok(Message::new(role, content))
    }
}
