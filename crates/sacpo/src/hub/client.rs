//! Requests to the Hub: redirects, repetition, and what goes wrong in words.

use std::fmt;
use std::io;
use std::thread::sleep;
use std::time::{Duration, Instant};

use engine::{Error, Result};
use ureq::http::{HeaderMap, Response};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

use super::address::{Kind, Repo};
use super::settings::{Settings, certificates};
use crate::{interrupt, ui};

/// Requests in a row that may fail before it is an error.
const ATTEMPTS: u32 = 5;

/// The wait after the first failed request; it doubles with each.
const FIRST_WAIT: Duration = Duration::from_millis(500);

/// The longest wait that a server may ask for; the Hub counts requests in windows of five minutes.
const LONGEST_WAIT: Duration = Duration::from_secs(310);

/// A server that is silent for so long has gone.
const SILENCE: Duration = Duration::from_secs(30);

/// Redirects in a row.
const REDIRECTS: usize = 10;

/// The largest page of the Hub's interface, in bytes: a thousand files have some 300 kB.
const LARGEST_PAGE: u64 = 64 << 20;

/// Whom to ask, and as whom.
pub(super) struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
}

/// Why a request did not bring what it should.
pub(super) enum Failure {
    /// The server said no.
    Status { status: u16, code: String, said: String, wait: Option<Duration> },
    /// There was no answer, or a part of one.
    Broken(String),
    /// What another attempt does not mend.
    Final(String),
}

/// What is asked for, for messages.
#[derive(Clone, Copy)]
pub(super) struct Subject<'a> {
    pub(super) repo: &'a Repo,
    /// A file of it, or nothing for the list of its files.
    pub(super) file: Option<&'a str>,
}

impl fmt::Display for Subject<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.file {
            Some(file) => write!(f, "the file {file} of {}", self.repo),
            None => write!(f, "{}", self.repo),
        }
    }
}

impl Client {
    pub(super) fn new(settings: &Settings) -> Self {
        let roots = match &*certificates() {
            [] => RootCerts::WebPki,
            certificates => RootCerts::new_with_certs(certificates),
        };
        let config = Agent::config_builder()
            .tls_config(TlsConfig::builder().root_certs(roots).build())
            .http_status_as_error(false)
            // followed here, so that the token stays with the Hub
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("sacpo/", env!("CARGO_PKG_VERSION")))
            // the size of a content is counted as it is sent
            .accept_encoding("identity")
            .timeout_connect(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .build();
        Self { agent: config.into(), endpoint: settings.endpoint.clone(), token: settings.token.clone() }
    }

    /// An address of the Hub's interface.
    pub(super) fn url(&self, path: &str) -> String {
        format!("{}/{path}", self.endpoint)
    }

    /// Asks once for what is at an address, from byte `start` on.
    pub(super) fn get(&self, url: &str, start: u64) -> std::result::Result<Response<Body>, Failure> {
        let mut url = url.to_owned();
        for _ in 0..REDIRECTS {
            let mut request = self.agent.get(&url);
            if start > 0 {
                request = request.header("Range", format!("bytes={start}-"));
            }
            if let Some(token) = self.token.as_ref().filter(|_| origin(&url) == origin(&self.endpoint)) {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            let response = request.call().map_err(Failure::of)?;
            let status = response.status();
            if status.is_success() {
                return Ok(response);
            }
            let location = header(response.headers(), "Location");
            url = match location.filter(|_| status.is_redirection()) {
                Some(location) if location.starts_with('/') => format!("{}{location}", origin(&url)),
                Some(location) => location.to_owned(),
                None => return Err(Failure::refused(status.as_u16(), response.headers())),
            };
        }
        Err(Failure::Final("it is redirected without end".into()))
    }

    /// The text at an address, and the address of the page that follows it.
    ///
    /// # Errors
    /// Where no attempt brings it.
    pub(super) fn page(&self, url: &str, subject: Subject<'_>) -> Result<(String, Option<String>)> {
        let mut patience = Patience::default();
        loop {
            let answer = self.get(url, 0).and_then(|response| {
                let next = header(response.headers(), "Link").and_then(next_page).map(str::to_owned);
                let body = response.into_body().into_with_config().limit(LARGEST_PAGE).read_to_string();
                Ok((body.map_err(Failure::of)?, next))
            });
            match answer {
                Ok(page) => return Ok(page),
                Err(failure) => patience.wait(self, failure, subject, &|message| ui::say(message))?,
            }
        }
    }

    /// A failure as a message that says what to do.
    fn error(&self, failure: &Failure, subject: Subject<'_>) -> Error {
        let repo = subject.repo;
        let page = self.url(&repo.page());
        let said = match failure {
            Failure::Status { said, .. } if !said.is_empty() => format!(" The Hub says: {said:?}."),
            _ => String::new(),
        };
        match failure {
            Failure::Status { status: status @ (401 | 403), .. } => {
                let token = match &self.token {
                    Some(_) => {
                        "the token that was sent (HF_TOKEN, or that of `hf auth login`) is not valid or may not read it"
                    }
                    None => "no token was sent: set HF_TOKEN to one of an account that may read it",
                };
                Error::input(format!(
                    "The Hub refuses {subject} (status {status}): it is private or gated, or not there, and {token}. If it has \
                     terms, accept them at {page}. Tokens are made at {}; check the name too.{said}",
                    self.url("settings/tokens")
                ))
            }
            Failure::Status { status: 404, code, .. } if code == "RevisionNotFound" => Error::input(format!(
                "{subject} does not exist (status 404): the repository has no revision `{}`. Give a branch, tag or commit that {page} \
                 shows.{said}",
                repo.revision
            )),
            Failure::Status { status: status @ (404 | 410), .. } => {
                let other = match repo.kind {
                    Kind::Model => format!("; a data set is written hf://datasets/{}", repo.id),
                    Kind::Dataset => format!("; a model is written hf://{}", repo.id),
                };
                Error::input(format!(
                    "The Hub has nothing at {subject} (status {status}). Check owner, name, revision and path at {page}{other}. A \
                     private one needs HF_TOKEN.{said}"
                ))
            }
            Failure::Status { status: 429, wait, .. } => {
                let wait = wait.map_or("some minutes".into(), |wait| format!("{} seconds", wait.as_secs()));
                Error::Failed(format!(
                    "The Hub was asked too often and refuses {subject} for now (status 429). Wait {wait} and run the same command \
                     again, which goes on where it was; with HF_TOKEN set, more is allowed.{said}"
                ))
            }
            Failure::Status { status, .. } => Error::Failed(format!(
                "The Hub could not give {subject} (status {status}). Run the same command again later, which goes on where it was.{said}"
            )),
            Failure::Broken(reason) | Failure::Final(reason) => Error::Failed(format!(
                "Could not fetch {subject} from {}: {reason}. Check the network and the variables HF_ENDPOINT and HTTPS_PROXY, and run \
                 the same command again, which goes on where it was. With HF_HUB_OFFLINE=1 only what is in the cache is used.",
                origin(&self.endpoint)
            )),
        }
    }
}

impl Failure {
    pub(super) fn of(error: ureq::Error) -> Self {
        match error {
            ureq::Error::Io(error) => Self::of_io(&error),
            ureq::Error::Timeout(_) => Self::Broken(format!("nothing came for {} seconds", SILENCE.as_secs())),
            ureq::Error::HostNotFound => Self::Broken("the name of the server is not known".into()),
            ureq::Error::ConnectionFailed | ureq::Error::Protocol(_) => Self::Broken(error.to_string()),
            error => Self::Final(error.to_string()),
        }
    }

    fn of_io(error: &io::Error) -> Self {
        match error.kind() {
            // what a certificate that cannot be trusted becomes
            io::ErrorKind::InvalidData => Self::Final(format!(
                "{error}; if it is about a certificate, check the clock, and give those of a proxy that stands in between by \
                 SSL_CERT_FILE"
            )),
            _ => Self::Broken(error.to_string()),
        }
    }

    fn refused(status: u16, headers: &HeaderMap) -> Self {
        let text = |name: &str| header(headers, name).unwrap_or_default().chars().take(300).collect();
        let seconds = header(headers, "Retry-After").and_then(|text| text.trim().parse().ok());
        let wait = seconds.or_else(|| header(headers, "RateLimit").and_then(reset)).map(Duration::from_secs);
        Self::Status { status, code: text("X-Error-Code"), said: text("X-Error-Message"), wait }
    }

    /// Whether another attempt may bring it.
    fn passes(&self) -> bool {
        match self {
            Self::Status { status, wait, .. } => {
                matches!(status, 408 | 429 | 500..) && wait.is_none_or(|wait| wait <= LONGEST_WAIT)
            }
            Self::Broken(_) => true,
            Self::Final(_) => false,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status { status, .. } => write!(f, "status {status}"),
            Self::Broken(reason) | Self::Final(reason) => f.write_str(reason),
        }
    }
}

/// How often one thing was asked for in vain.
#[derive(Default)]
pub(super) struct Patience {
    failed: u32,
}

impl Patience {
    /// Waits before another attempt: twice as long each time, or as long as the server asks. `say` is told so.
    ///
    /// # Errors
    /// A failure that stays, or one too many; [`Error::Interrupted`].
    pub(super) fn wait(
        &mut self,
        client: &Client,
        failure: Failure,
        subject: Subject<'_>,
        say: &dyn Fn(&str),
    ) -> Result<()> {
        self.failed += 1;
        if self.failed == ATTEMPTS || !failure.passes() {
            return Err(client.error(&failure, subject));
        }
        let wait = match failure {
            Failure::Status { wait: Some(wait), .. } => wait,
            _ => FIRST_WAIT * 2u32.pow(self.failed - 1),
        };
        let seconds = wait.as_secs_f64();
        say(&format!("  Not fetched yet: {subject} ({failure}). Trying again in {seconds:.1} s."));
        let end = Instant::now() + wait;
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            interrupt::check()?;
            sleep(left.min(Duration::from_millis(100)));
        }
        Ok(())
    }
}

/// A header as text.
pub(super) fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Scheme, host and port of an address.
fn origin(url: &str) -> &str {
    let start = url.find("://").map_or(0, |at| at + 3);
    &url[..url[start..].find(['/', '?', '#']).map_or(url.len(), |at| start + at)]
}

/// The address of the next page in a header `<…>; rel="next"`.
fn next_page(link: &str) -> Option<&str> {
    let next = link.split(',').find(|part| part.contains("rel=\"next\""))?;
    Some(next.trim().strip_prefix('<')?.split_once('>')?.0)
}

/// The seconds until more is allowed in a header `"api";r=0;t=55`.
fn reset(limit: &str) -> Option<u64> {
    let field = |name: &str| limit.split(';').find_map(|part| part.trim().strip_prefix(name)?.parse::<u64>().ok());
    if field("r=")? > 0 { None } else { field("t=") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read() {
        assert_eq!(next_page("<https://h/api?cursor=a%3D>; rel=\"next\""), Some("https://h/api?cursor=a%3D"));
        assert_eq!(next_page("<https://h/a>; rel=\"prev\", <https://h/b>; rel=\"next\""), Some("https://h/b"));
        assert_eq!(next_page("<https://h/a>; rel=\"prev\""), None);
        assert_eq!((reset("\"api\";r=0;t=55"), reset("\"api\";r=3;t=55"), reset("x")), (Some(55), None, None));
    }

    #[test]
    fn an_origin_is_all_before_the_path() {
        for (url, expected) in [
            ("https://huggingface.co/a/b", "https://huggingface.co"),
            ("http://localhost:80?x=/", "http://localhost:80"),
            ("https://huggingface.co.evil.org", "https://huggingface.co.evil.org"),
            ("https://huggingface.co@evil.org/x", "https://huggingface.co@evil.org"),
        ] {
            assert_eq!(origin(url), expected);
        }
    }
}
