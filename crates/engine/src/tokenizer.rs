//! A stand-in with the interface of the tokenizer, until that is merged.

use std::path::Path;

use crate::chat::Message;
use crate::error::{Error, Result};

/// Text to tokens and back, with the chat template.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bos: Option<String>,
    eos: Option<String>,
    adds_bos: bool,
    chat_template: Option<String>,
}

impl Tokenizer {
    /// From the files of a model folder.
    pub fn from_folder(dir: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path = dir.join(name);
            std::fs::read(&path).map_err(Error::io("read", &path))
        };
        let config: serde_json::Value =
            serde_json::from_slice(&read("tokenizer_config.json")?).map_err(|e| Error::input(e.to_string()))?;
        let template = String::from_utf8(read("chat_template.jinja")?).map_err(|e| Error::input(e.to_string()))?;
        Self::from_json(
            &read("tokenizer.json")?,
            config["bos_token"].as_str(),
            config["eos_token"].as_str(),
            Some(&template),
        )
    }

    /// From the bytes of a `tokenizer.json`.
    pub fn from_json(json: &[u8], bos: Option<&str>, eos: Option<&str>, chat_template: Option<&str>) -> Result<Self> {
        let inner = tokenizers::Tokenizer::from_bytes(json).map_err(|e| Error::input(e.to_string()))?;
        let bos = bos.map(str::to_owned);
        let probe = inner.encode("", true).map_err(|e| Error::input(e.to_string()))?;
        let adds_bos =
            bos.as_deref().and_then(|b| inner.token_to_id(b)).is_some_and(|b| probe.get_ids().first() == Some(&b));
        Ok(Self { inner, bos, eos: eos.map(str::to_owned), adds_bos, chat_template: chat_template.map(str::to_owned) })
    }

    /// The tokens of a text, without BOS or EOS.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode(text, false).map_err(|e| Error::input(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of tokens, special tokens included.
    pub fn decode_with_special(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, false).map_err(|e| Error::input(e.to_string()))
    }

    /// The token that starts a sequence.
    pub fn bos(&self) -> Option<u32> {
        self.inner.token_to_id(self.bos.as_deref()?)
    }

    /// The token that ends a response.
    pub fn eos(&self) -> Option<u32> {
        self.inner.token_to_id(self.eos.as_deref()?)
    }

    /// Whether the tokenizer's own post-processor starts sequences with BOS.
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// Whether conversations can be rendered.
    pub fn has_chat_template(&self) -> bool {
        self.chat_template.is_some()
    }

    /// A conversation as text.
    pub fn chat(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let template = self.chat_template.as_deref().ok_or_else(|| Error::input("There is no chat template."))?;
        let mut environment = minijinja::Environment::new();
        let syntax = minijinja::syntax::SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| Error::input(e.to_string()))?);
        environment.add_function("raise_exception", |message: String| -> std::result::Result<(), minijinja::Error> {
            Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, message))
        });
        let messages: Vec<minijinja::Value> = messages
            .iter()
            .map(|m| minijinja::context! { role => m.role.as_str(), content => m.content.as_str() })
            .collect();
        let (bos_token, eos_token) = (self.bos.as_deref(), self.eos.as_deref());
        environment
            .render_str(template, minijinja::context! { messages, add_generation_prompt, bos_token, eos_token })
            .map_err(|e| Error::input(format!("The chat template failed: {e:#}")))
    }
}
