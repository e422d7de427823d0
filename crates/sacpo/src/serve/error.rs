//! Errors in the form of OpenAI's API.

use axum::http::{StatusCode, header};
use axum::response::{AppendHeaders, IntoResponse, Json, Response};
use engine::Error;
use serde_json::{Value, json};

/// Why a request is not answered.
#[derive(Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    message: String,
    /// The field of the request that is wrong.
    param: Option<String>,
    code: Option<&'static str>,
}

impl ApiError {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None }
    }

    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    pub(super) fn fault() -> Self {
        let message = "The request could not be read, by a fault of the program.";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    pub(super) fn queue_full() -> Self {
        let message = "Too many requests are waiting. Try again in a moment.";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, message).code("queue_full")
    }

    pub(super) fn stopping() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "The server is stopping.").code("stopping")
    }

    pub(super) fn param(self, name: impl Into<String>) -> Self {
        Self { param: Some(name.into()), ..self }
    }

    pub(super) fn code(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    /// The object that a response, or an event of a stream, holds.
    pub(super) fn body(&self) -> Value {
        let kind = if self.status.is_server_error() { "server_error" } else { "invalid_request_error" };
        json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        match error {
            Error::Input(message) => Self::bad_request(message),
            other => Self::new(StatusCode::INTERNAL_SERVER_ERROR, other.to_string()),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let header = match self.status {
            StatusCode::SERVICE_UNAVAILABLE => Some((header::RETRY_AFTER, "1")),
            // the body may not have been read, and then the connection is of no more use
            StatusCode::UNAUTHORIZED
            | StatusCode::NOT_FOUND
            | StatusCode::METHOD_NOT_ALLOWED
            | StatusCode::PAYLOAD_TOO_LARGE => Some((header::CONNECTION, "close")),
            _ => None,
        };
        (self.status, AppendHeaders(header), Json(self.body())).into_response()
    }
}
