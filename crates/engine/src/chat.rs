//! Conversations, and the template that turns one into text.

use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, ErrorKind, context};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user` or `assistant`, or what else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A turn of the given role and content.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A Jinja chat template from a plain text with `{prompt}` in it, for models that were trained on such a text: the user's message
/// takes the place of `{prompt}`, and the answer follows, with EOS.
///
/// # Errors
/// [`Error::Input`] if `{prompt}` does not stand in the text exactly once, or the text has control characters other than line
/// ends and tabs.
pub fn plain_template(text: &str) -> Result<String> {
    let Some((before, after)) = text.split_once("{prompt}").filter(|(_, after)| !after.contains("{prompt}")) else {
        return Err(Error::input(format!(
            "The template {text:?} must have the place of the user's message, {{prompt}}, exactly once. An example is \
             'USER: {{prompt}} ASSISTANT:'."
        )));
    };
    if text.chars().any(|c| c.is_control() && !matches!(c, '\n' | '\r' | '\t')) {
        return Err(Error::input(format!("The template {text:?} has control characters. Leave them out.")));
    }
    // both Jinja and Python know these escapes
    let literal = |text: &str| {
        let escaped = text.replace('\\', "\\\\").replace('"', "\\\"");
        escaped.replace('\n', "\\n").replace('\r', "\\r").replace('\t', "\\t")
    };
    Ok(format!(
        "{{%- for message in messages -%}}\n\
         {{%- if loop.index == 1 and message.role == 'user' -%}}\n\
         {{{{- \"{}\" + message.content + \"{}\" -}}}}\n\
         {{%- elif loop.index == 2 and message.role == 'assistant' -%}}\n\
         {{{{- message.content + eos_token -}}}}\n\
         {{%- else -%}}\n\
         {{{{- raise_exception('This template takes one message of the user and one answer') -}}}}\n\
         {{%- endif -%}}\n\
         {{%- endfor -%}}\n",
        literal(before),
        literal(after)
    ))
}

/// A Jinja chat template, rendered as `transformers` renders it.
#[derive(Debug, Clone)]
pub(crate) struct ChatTemplate {
    source: Arc<str>,
    /// The parsed template, or why it cannot be parsed: a model whose template is never used stays usable.
    environment: Arc<std::result::Result<Environment<'static>, String>>,
}

impl ChatTemplate {
    /// Parses a template.
    pub(crate) fn new(source: &str) -> Self {
        let parsed = environment().and_then(|mut environment| {
            environment.add_template_owned("chat_template", without_generation(source))?;
            Ok(environment)
        });
        let parsed = parsed.map_err(|e| explain(&e));
        Self { source: source.into(), environment: Arc::new(parsed) }
    }

    /// The template's text.
    pub(crate) fn source(&self) -> &str {
        &self.source
    }

    /// Renders a conversation. A special token that the tokenizer lacks is undefined in the template.
    pub(crate) fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        bos_token: Option<&str>,
        eos_token: Option<&str>,
    ) -> Result<String> {
        let environment = self.environment.as_ref().as_ref().map_err(|reason| {
            Error::input(format!("The tokenizer's chat template cannot be parsed: {reason}. Correct the template."))
        })?;
        let token = |token: Option<&str>| token.map_or(Value::UNDEFINED, Value::from);
        environment
            .get_template("chat_template")
            .and_then(|template| {
                template.render(context! {
                    messages => Value::from(Serde(messages)),
                    add_generation_prompt,
                    bos_token => token(bos_token),
                    eos_token => token(eos_token),
                    // Templates ask whether these are none, so they must be there.
                    tools => Value::from(()),
                    documents => Value::from(()),
                })
            })
            .map_err(|e| {
                Error::input(format!(
                    "The tokenizer's chat template does not accept these messages: {}. Change the messages or the \
                     template.",
                    explain(&e)
                ))
            })
    }
}

/// What a template error says: the template's own words where it raised the error itself.
fn explain(error: &minijinja::Error) -> String {
    let detail = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    let line = error.line().map(|line| format!(" (line {line} of the template)"));
    format!("{}{}", detail.trim_end_matches('.'), line.unwrap_or_default())
}

/// The template without the tags `generation` and `endgeneration`, by which `transformers` marks what the assistant says: they
/// become a condition that always holds, on the same line and with the same control of white space.
fn without_generation(source: &str) -> String {
    let mut rest = source;
    let mut text = String::with_capacity(source.len());
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let (tag, end) = (&rest[start + 2..start + length], start + length);
        text.push_str(&rest[..start + 2]);
        text.push_str(&match tag.trim_matches(['-', '+', ' ', '\t', '\r', '\n']) {
            "generation" => tag.replace("generation", "if true"),
            "endgeneration" => tag.replace("endgeneration", "endif"),
            _ => tag.to_owned(),
        });
        rest = &rest[end..];
    }
    text + rest
}

/// Jinja as `transformers` sets it up.
fn environment() -> std::result::Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> std::result::Result<Value, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", tojson);
    // Python's None cannot be iterated over, which templates rely on for `tools`
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    Ok(environment)
}

/// The local date and time, in the format of `strftime`.
fn strftime_now(format: &str) -> std::result::Result<String, minijinja::Error> {
    jiff::fmt::strtime::format(format, &jiff::Zoned::now())
        .map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, e.to_string()))
}

/// JSON with Python's spacing and without the escapes for HTML that Jinja's own filter makes.
fn tojson(value: &Value, options: Kwargs) -> std::result::Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    let mut json = Vec::new();
    let written = match indent {
        Some(width) => {
            let indent = " ".repeat(width);
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut json, formatter))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut json, PythonFormatter)),
    };
    let invalid = |e: String| minijinja::Error::new(ErrorKind::BadSerialization, e);
    written.map_err(|e| invalid(e.to_string()))?;
    String::from_utf8(json).map_err(|e| invalid(e.to_string()))
}

/// `{"a": 1, "b": 2}`: a space after each comma and colon.
struct PythonFormatter;

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: std::io::Write + ?Sized>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: std::io::Write + ?Sized>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: std::io::Write + ?Sized>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}
