//! An OpenAI-compatible endpoint over HTTP: one request, and what became of it.

use std::fmt;
use std::io::ErrorKind;
use std::time::{Duration, SystemTime};

use engine::{Error, Result};
use ureq::Agent;
use ureq::http::{Response, StatusCode, header};

use super::retry::{Clock, retry_after};
use crate::plot::shortened;

/// The longest response that is read.
const MOST_BYTES: u64 = 16 << 20;

/// Beyond this an endpoint that asks to wait is not waited for.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// The secret that an endpoint knows its users by, and the environment variable that holds it.
///
/// Nothing shows or writes it: not its debug form, not messages, not the store.
#[derive(Clone)]
pub struct ApiKey {
    variable: String,
    key: Option<String>,
}

impl ApiKey {
    /// Reads the key from an environment variable, where it is set and not blank.
    ///
    /// # Errors
    /// [`Error::Input`] for a key that no HTTP header can carry.
    pub fn from_env(variable: &str) -> Result<Self> {
        let value = std::env::var_os(variable).unwrap_or_default();
        // what is no Unicode becomes characters that are no ASCII
        let key = value.to_string_lossy().trim().to_owned();
        if !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(Error::input(format!(
                "The environment variable {variable} holds no API key: keys are of visible ASCII characters. Set it anew."
            )));
        }
        Ok(Self { variable: variable.to_owned(), key: Some(key).filter(|key| !key.is_empty()) })
    }

    /// Whether the variable held a key.
    pub fn is_set(&self) -> bool {
        self.key.is_some()
    }

    /// A text without the key in it.
    fn removed_from(&self, text: &str) -> String {
        self.key.as_ref().map_or_else(|| text.to_owned(), |key| text.replace(key, "[API key]"))
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiKey").field("variable", &self.variable).finish_non_exhaustive()
    }
}

/// What became of a request.
pub(super) enum Sent {
    /// The whole body of a good response.
    Answered(String),
    /// It was not served, and may be made again.
    Refused { why: String, retry_after: Option<Duration> },
    /// It was made, but its answer did not come; whether it was served is not known.
    Lost(String),
    /// It was not served, and the same request will not be.
    Rejected(Error),
}

pub(super) struct Endpoint {
    agent: Agent,
    url: String,
    key: ApiKey,
}

impl Endpoint {
    /// `base` is the URL up to `/v1`, as [`base_url`] returns it; so many connections are kept open.
    pub(super) fn new(base: &str, key: ApiKey, timeout: Duration, connections: usize) -> Self {
        let agent = Agent::config_builder()
            .timeout_global(Some(timeout))
            .http_status_as_error(false)
            // a redirected request would arrive without its body
            .max_redirects(0)
            .max_redirects_will_error(false)
            .max_idle_connections(connections)
            .max_idle_connections_per_host(connections)
            .user_agent(concat!("sacpo/", env!("CARGO_PKG_VERSION")))
            .build()
            .into();
        Self { agent, url: format!("{base}/chat/completions"), key }
    }

    /// Makes a request, once. `about` names it in messages.
    pub(super) fn send(&self, body: &str, about: &str, clock: &dyn Clock) -> Sent {
        let mut request = self.agent.post(&self.url).header(header::CONTENT_TYPE, "application/json");
        if let Some(key) = &self.key.key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        let mut response = match request.send(body) {
            Ok(response) => response,
            Err(error) if was_not_sent(&error) => {
                return Sent::Refused { why: self.describe(&error), retry_after: None };
            }
            Err(error) => return Sent::Lost(self.describe(&error)),
        };
        let status = response.status();
        let body = response.body_mut().with_config().limit(MOST_BYTES).read_to_vec();
        let text = body.as_ref().map(|bytes| String::from_utf8_lossy(bytes).into_owned());
        match text {
            // what is kept and shown must not hold the key, whatever an endpoint repeats
            Ok(text) if status.is_success() => Sent::Answered(self.key.removed_from(&text)),
            Err(error) if status.is_success() => Sent::Lost(self.describe(error)),
            text => self.failed(status, &response, &text.unwrap_or_default(), about, clock.now()),
        }
    }

    /// What a response of another status than success means.
    fn failed<B>(&self, status: StatusCode, response: &Response<B>, body: &str, about: &str, now: SystemTime) -> Sent {
        let said = self.said(body);
        let why = format!("it answered {status}{said}");
        let asked = response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
        let asked = asked.and_then(|value| retry_after(value, now));
        let used_up = body.contains("insufficient_quota");
        let again = matches!(status.as_u16(), 408 | 409 | 425 | 429) || status.is_server_error();
        if again && !used_up && asked.is_none_or(|wait| wait <= LONGEST_WAIT) {
            return Sent::Refused { why, retry_after: asked };
        }
        let remedy = match (status.as_u16(), asked) {
            _ if used_up => "Your credit there is used up. Add some, and run the same command again.".to_owned(),
            (_, Some(wait)) if again => {
                format!(
                    "It asks to be left alone for {} minutes. Run the same command again then.",
                    wait.as_secs() / 60
                )
            }
            (401 | 403, _) if self.key.is_set() => {
                format!("Check the API key in the environment variable {}.", self.key.variable)
            }
            (401 | 403, _) => {
                format!("It wants an API key: put it into the environment variable {}.", self.key.variable)
            }
            (404, _) => "Check the URL, which mostly ends in /v1, and the name of the model.".to_owned(),
            (300..=399, _) => "It is elsewhere now: give the URL that it redirects to.".to_owned(),
            _ => {
                format!("The request was about {about}. Change what is complained of, and run the same command again.")
            }
        };
        let message = format!("The endpoint {} did not serve a request: {why}. {remedy} No verdict is lost.", self.url);
        Sent::Rejected(if again { Error::Failed(message) } else { Error::Input(message) })
    }

    /// What an endpoint says about a failure, for a sentence: its message, or the start of the body.
    fn said(&self, body: &str) -> String {
        let json: Option<serde_json::Value> = serde_json::from_str(body).ok();
        let message = json.as_ref().and_then(|json| {
            ["/error/message", "/message", "/detail", "/error"].iter().find_map(|place| json.pointer(place)?.as_str())
        });
        let text = shortened(&self.key.removed_from(message.unwrap_or(body).trim()), 300);
        if text.is_empty() { text } else { format!(", “{}”", text.trim_end_matches('.')) }
    }

    fn describe(&self, error: &ureq::Error) -> String {
        self.key.removed_from(&match error {
            ureq::Error::Timeout(_) => "it did not answer in time".to_owned(),
            ureq::Error::Io(error) if error.kind() == ErrorKind::ConnectionRefused => {
                "nothing listens there".to_owned()
            }
            ureq::Error::Io(error) => format!("the connection failed ({error})"),
            ureq::Error::HostNotFound => "no such host is known".to_owned(),
            error => format!("the request failed ({error})"),
        })
    }
}

/// Whether an error came before there was a connection.
fn was_not_sent(error: &ureq::Error) -> bool {
    match error {
        ureq::Error::HostNotFound
        | ureq::Error::ConnectionFailed
        | ureq::Error::Tls(_)
        | ureq::Error::Rustls(_)
        | ureq::Error::Timeout(ureq::Timeout::Resolve | ureq::Timeout::Connect) => true,
        ureq::Error::Io(error) => matches!(
            error.kind(),
            ErrorKind::ConnectionRefused | ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable
        ),
        _ => false,
    }
}

/// The URL of an endpoint as requests and keys have it: without a slash at its end, and without the path of the one service
/// that is used.
///
/// # Errors
/// [`Error::Input`] for what is no URL, and for one with a user, a password or a query, where secrets stand.
pub(super) fn base_url(url: &str) -> Result<String> {
    let base = url.trim().trim_end_matches('/').trim_end_matches("/chat/completions").trim_end_matches('/');
    let wrong = |what: &str| Err(Error::input(format!("The endpoint's URL {what}")));
    let Ok(parsed) = base.parse::<ureq::http::Uri>() else {
        return wrong("is no URL. Give one such as https://api.openai.com/v1 or http://localhost:8000/v1.");
    };
    if !matches!(parsed.scheme_str(), Some("http" | "https")) || parsed.host().unwrap_or_default().is_empty() {
        return wrong("must start with https:// or http:// and a host, as https://api.openai.com/v1 does.");
    }
    if parsed.authority().is_some_and(|authority| authority.as_str().contains('@')) || parsed.query().is_some() {
        return wrong("must have no user, password or query. Put the API key into an environment variable.");
    }
    Ok(base.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_brought_to_one_form() {
        for url in [
            "https://a.b/v1",
            "https://a.b/v1/",
            " https://a.b/v1/chat/completions",
            "https://a.b/v1/chat/completions/",
        ] {
            assert_eq!(base_url(url).unwrap(), "https://a.b/v1");
        }
        assert_eq!(base_url("http://[::1]:8000").unwrap(), "http://[::1]:8000");
        for url in
            ["", "a.b/v1", "ftp://a.b", "https://", "https://u:secret@a.b", "https://a.b/v1?key=secret", "h ttp://a"]
        {
            let message = base_url(url).unwrap_err().to_string();
            assert!(message.starts_with("The endpoint's URL ") && !message.contains("secret"), "{message}");
        }
    }

    #[test]
    fn the_key_is_never_shown() {
        let key = ApiKey { variable: "KEY".into(), key: Some("sk-secret".into()) };
        assert_eq!(format!("{key:?}"), "ApiKey { variable: \"KEY\", .. }");
        let endpoint = Endpoint::new("http://a.b", key, Duration::from_secs(1), 1);
        let said = endpoint.said(r#"{"error":{"message":"Incorrect API key: sk-secret."}}"#);
        assert_eq!(said, ", “Incorrect API key: [API key]”");
        assert_eq!(endpoint.said("<html>\nsk-secret"), ", “<html>\u{fffd}[API key]”");
        assert_eq!(endpoint.said(" "), "");
    }
}
