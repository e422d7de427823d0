//! `sacpo serve`.

use std::net::TcpListener;

use engine::{Error, Result};
use serde::Serialize;

use super::print_json;
use crate::cli::{Global, Serve};
use crate::policy::Policy;
use crate::{serve, ui};

#[derive(Serialize)]
struct Ready<'a> {
    model: &'a str,
    base_url: &'a str,
}

pub(super) fn run(options: &Serve, global: Global) -> Result<()> {
    let key = options.api_key_env.as_deref().map(key_of).transpose()?;
    let listener = TcpListener::bind((options.host.as_str(), options.port)).map_err(|error| {
        Error::input(format!(
            "Could not listen at {}, port {}: {error}. Choose another --host or --port; port 0 takes a free one.",
            options.host, options.port
        ))
    })?;
    let address = listener.local_addr().map_err(|error| Error::Failed(format!("The port has no number: {error}.")))?;
    let policy = Policy::load(&options.model, options.extrapolate)?;
    if !policy.first.tokenizer.has_chat_template() {
        return Err(Error::input(format!(
            "{} has no chat template, so it cannot chat. `sacpo model set-template` gives it one.",
            options.model
        )));
    }
    let name = options.name.clone().unwrap_or_else(|| options.model.to_string());
    let base_url = format!("http://{address}/v1");
    if global.json {
        print_json(&Ready { model: &name, base_url: &base_url })?;
    } else {
        ui::say(format!("Serving {name} at {base_url}. Ctrl-C stops."));
    }
    let server = serve::Options {
        name,
        key,
        max_new_tokens: options.max_new_tokens,
        batch_size: options.batch_size,
        dtype: options.dtype,
        queue: options.queue,
    };
    serve::serve(&policy, listener, server)
}

/// The key in an environment variable.
fn key_of(variable: &str) -> Result<String> {
    std::env::var(variable).ok().filter(|key| !key.is_empty()).ok_or_else(|| {
        Error::input(format!(
            "The environment variable {variable} that --api-key-env names is not set, is empty or is not UTF-8. Set it to the \
             key that clients send."
        ))
    })
}
