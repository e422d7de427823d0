//! The environment variables of huggingface_hub that matter here.

use std::env;
use std::path::{Path, PathBuf};

use ureq::tls::{Certificate, PemItem, parse_pem};

/// Where the Hub is, and how it is used.
pub(super) struct Settings {
    /// `HF_ENDPOINT`: the Hub's address, without a slash at the end.
    pub(super) endpoint: String,
    /// `HF_HUB_CACHE`, or `hub` in `HF_HOME`.
    pub(super) cache: PathBuf,
    /// `HF_TOKEN`, or what is in the file `HF_TOKEN_PATH`, or `token` in `HF_HOME`.
    pub(super) token: Option<String>,
    /// `HF_HUB_OFFLINE`: only what is in the cache is used.
    pub(super) offline: bool,
}

impl Settings {
    pub(super) fn from_environment() -> Self {
        let home = path("HF_HOME").unwrap_or_else(|| {
            path("XDG_CACHE_HOME")
                .unwrap_or_else(|| env::home_dir().unwrap_or_default().join(".cache"))
                .join("huggingface")
        });
        let from_file = || {
            let file = path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
            std::fs::read_to_string(file).ok().and_then(given)
        };
        Self {
            endpoint: text("HF_ENDPOINT")
                .map_or("https://huggingface.co".into(), |endpoint| endpoint.trim_end_matches('/').into()),
            token: text("HF_TOKEN").or_else(from_file),
            cache: path("HF_HUB_CACHE").unwrap_or_else(|| home.join("hub")),
            offline: text("HF_HUB_OFFLINE")
                .is_some_and(|value| ["1", "on", "yes", "true"].contains(&&*value.to_lowercase())),
        }
    }
}

/// The certificates in the file `SSL_CERT_FILE`, to trust instead of those that are built in; none if it is not set.
pub(super) fn certificates() -> Vec<Certificate<'static>> {
    let pem = path("SSL_CERT_FILE").and_then(|path| std::fs::read(path).ok()).unwrap_or_default();
    let certificate = |item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(certificate),
        _ => None,
    };
    parse_pem(&pem).filter_map(certificate).collect()
}

/// A variable that is set to something.
fn text(name: &str) -> Option<String> {
    env::var(name).ok().and_then(given)
}

fn given(text: String) -> Option<String> {
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

/// A path, in which `~` at the start is the user's home, since not only shells set these variables.
fn path(name: &str) -> Option<PathBuf> {
    let text = text(name)?;
    match (text.strip_prefix("~/"), env::home_dir()) {
        (Some(rest), Some(home)) => Some(home.join(rest)),
        _ => Some(Path::new(&text).to_owned()),
    }
}
