//! Text to token ids and back.

mod words;

use std::collections::HashMap;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use serde_json::{Map, Value};
use tokenizers::{Model as _, OffsetReferential, OffsetType, PreTokenizer as _};

use self::words::Words;
use crate::chat::{ChatTemplate, Message};
use crate::checkpoint::atomic;
use crate::error::{Error, Result};

/// A Hugging Face tokenizer with its special tokens and chat template. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    words: Arc<Words>,
    /// The bytes of `tokenizer.json` as they were read, so that they can be written back unchanged.
    json: Arc<[u8]>,
    /// `tokenizer_config.json` without the chat template.
    config: Map<String, Value>,
    bos: Option<SpecialToken>,
    eos: Option<SpecialToken>,
    adds_bos: bool,
    /// The texts of the special tokens that part what is before them from what is after them.
    dividers: Arc<HashMap<u32, String>>,
    /// The texts of all special tokens, longest first, and their ids.
    specials: Arc<Vec<(String, u32)>>,
    /// The tokenizer that takes special tokens in a text for text, made when it is needed.
    plain: Arc<OnceLock<tokenizers::Tokenizer>>,
    template: Option<ChatTemplate>,
}

#[derive(Debug, Clone)]
struct SpecialToken {
    id: u32,
    text: String,
}

impl Tokenizer {
    /// The tokenizer of a folder that need not have one, such as an adapter's.
    ///
    /// # Errors
    /// As [`from_folder`](Self::from_folder).
    pub fn found_in(dir: &Path) -> Result<Option<Self>> {
        dir.join("tokenizer.json").exists().then(|| Self::from_folder(dir)).transpose()
    }

    /// Reads `tokenizer.json`, `tokenizer_config.json` (if there) and the chat template: `chat_template.jinja` if
    /// there, else the one in `tokenizer_config.json`, where of several the one named `default` is taken.
    ///
    /// # Errors
    /// [`Error::Io`] when `tokenizer.json` cannot be read, [`Error::Input`] when a file is malformed or names a BOS or
    /// EOS token that is not in the vocabulary.
    pub fn from_folder(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let json = fs::read(&path).map_err(|source| match source.kind() {
            ErrorKind::NotFound if dir.is_dir() => Error::input(format!(
                "{} has no tokenizer.json. If it has another tokenizer file, load it with \
                 `AutoTokenizer.from_pretrained` of the Python package transformers and save it with \
                 `save_pretrained`, which writes tokenizer.json.",
                dir.display()
            )),
            _ => Error::io("read", &path)(source),
        })?;
        let config_path = dir.join("tokenizer_config.json");
        let mut config = match read_optional(&config_path)? {
            None => Map::new(),
            Some(text) => serde_json::from_str(&text)
                .map_err(|e| Error::input(format!("{} is not a JSON object: {e}.", config_path.display())))?,
        };
        let template = match read_optional(&dir.join("chat_template.jinja"))? {
            Some(template) => Some(template),
            None => config.get("chat_template").and_then(default_template).map(str::to_owned),
        };
        config.remove("chat_template");
        Self::from_parts(json, config, template.as_deref())
            .map_err(|e| Error::input(format!("The tokenizer in {} cannot be used. {e}", dir.display())))
    }

    /// A tokenizer from the contents of a `tokenizer.json`, the texts of its BOS and EOS tokens, and a Jinja chat
    /// template.
    ///
    /// # Errors
    /// [`Error::Input`] when the JSON is malformed or BOS or EOS is not in the vocabulary.
    pub fn from_json(
        tokenizer_json: &[u8],
        bos: Option<&str>,
        eos: Option<&str>,
        chat_template: Option<&str>,
    ) -> Result<Self> {
        let mut config = Map::new();
        config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
        config.insert("clean_up_tokenization_spaces".into(), false.into());
        for (name, token) in [("bos_token", bos), ("eos_token", eos)] {
            if let Some(token) = token {
                config.insert(name.into(), token.into());
            }
        }
        Self::from_parts(tokenizer_json.to_vec(), config, chat_template)
    }

    /// A tokenizer from the contents of its files, the chat template apart.
    pub(crate) fn from_parts(json: Vec<u8>, config: Map<String, Value>, chat_template: Option<&str>) -> Result<Self> {
        let malformed = |what: String| Error::input(format!("tokenizer.json is malformed: {what}."));
        let mut parsed: Map<String, Value> = serde_json::from_slice(&json).map_err(|e| malformed(e.to_string()))?;
        // Many published files carry the truncation and padding of some training run, which would cut or pad texts
        // in silence.
        parsed.retain(|name, _| name != "truncation" && name != "padding");
        // On some contradictory files the crate panics instead of returning an error, at the latest when its
        // post-processor first runs.
        let loaded = std::panic::catch_unwind(|| {
            let inner: tokenizers::Tokenizer = serde_json::from_value(parsed.into()).map_err(|e| e.to_string())?;
            let framed = inner.encode_fast("", true).map_err(|e| e.to_string())?;
            Ok((inner, framed.get_ids().to_vec()))
        });
        let loaded = loaded.unwrap_or_else(|_| Err("its parts contradict each other".to_owned()));
        let (inner, framed): (tokenizers::Tokenizer, Vec<u32>) = loaded.map_err(malformed)?;
        if let tokenizers::ModelWrapper::BPE(bpe) = inner.get_model()
            && bpe.dropout.is_some_and(|p| p > 0.0)
        {
            return Err(Error::input(
                "tokenizer.json sets a BPE dropout, under which the same text has other tokens each time. Set \
                 model.dropout to null.",
            ));
        }
        let special = |name: &str| -> Result<Option<SpecialToken>> {
            let Some(text) = config.get(name).and_then(token_text) else { return Ok(None) };
            let id = inner.token_to_id(text).ok_or_else(|| {
                Error::input(format!(
                    "The {name} of tokenizer_config.json is `{text}`, which is not in the vocabulary of tokenizer.json. \
                     Use the two files of one tokenizer."
                ))
            })?;
            Ok(Some(SpecialToken { id, text: text.to_owned() }))
        };
        let (bos, eos) = (special("bos_token")?, special("eos_token")?);
        let adds_bos = bos.as_ref().is_some_and(|bos| framed.first() == Some(&bos.id));
        let template = chat_template.map(ChatTemplate::new);
        // those of the other kinds look at the text beside them
        let divides = |token: &tokenizers::AddedToken| {
            token.special && !token.normalized && !token.single_word && !token.lstrip && !token.rstrip
        };
        let dividers = inner.get_added_tokens_decoder().into_iter().filter(|(_, token)| divides(token));
        let dividers = Arc::new(dividers.map(|(id, token)| (id, token.content)).collect());
        let added = inner.get_added_tokens_decoder().into_iter().filter(|(_, token)| token.special);
        let named = [&bos, &eos].into_iter().flatten().map(|token| (token.text.clone(), token.id));
        let mut specials: Vec<(String, u32)> = added.map(|(id, token)| (token.content, id)).chain(named).collect();
        specials.sort_by(|(a, _), (b, _)| b.len().cmp(&a.len()).then(a.cmp(b)));
        specials.dedup();
        Ok(Self {
            inner: Arc::new(inner),
            words: Arc::default(),
            json: json.into(),
            config,
            bos,
            eos,
            adds_bos,
            dividers,
            specials: Arc::new(specials),
            plain: Arc::default(),
            template,
        })
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json` and, if there is one, `chat_template.jinja`.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be written.
    pub fn save(&self, dir: &Path) -> Result<()> {
        atomic::write_file(&dir.join("tokenizer.json"), |out| out.write_all(&self.json))?;
        atomic::write_file(&dir.join("tokenizer_config.json"), |out| {
            serde_json::to_writer_pretty(&mut *out, &self.config)?;
            out.write_all(b"\n")
        })?;
        if let Some(template) = &self.template {
            atomic::write_file(&dir.join("chat_template.jinja"), |out| out.write_all(template.source().as_bytes()))?;
        }
        Ok(())
    }

    /// The token ids of a text. Neither BOS nor EOS is added; special tokens written in the text are recognised.
    ///
    /// # Errors
    /// [`Error::Input`] when the vocabulary cannot express the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        // The crate's own steps up to the words. It would go on to make texts and offsets of their tokens, which takes longer
        // than to look up the ids.
        let mut words = self.inner.get_added_vocabulary().extract_and_normalize(self.inner.get_normalizer(), text);
        if let Some(pre_tokenizer) = self.inner.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut words).map_err(encoding_failed)?;
        }
        let mut ids = Vec::with_capacity(text.len() / 4);
        let mut known = self.words.take();
        for (word, _, tokens) in words.get_splits(OffsetReferential::Normalized, OffsetType::None) {
            if let Some(added) = tokens {
                ids.extend(added.iter().map(|token| token.id));
            } else if let Some(of_word) = known.get(word) {
                ids.extend(of_word);
            } else {
                let start = ids.len();
                ids.extend(
                    self.inner.get_model().tokenize(word).map_err(encoding_failed)?.iter().map(|token| token.id),
                );
                known.insert(word, &ids[start..]);
            }
        }
        self.words.give_back(known);
        Ok(ids)
    }

    /// Where the last special token begins in a text of these ids, in bytes, if there is one: whatever text follows, its tokens
    /// are the same after the whole text as after the part from there on.
    pub fn last_divider(&self, text: &str, ids: &[u32]) -> Option<usize> {
        ids.iter().rev().find_map(|id| self.dividers.get(id)).and_then(|content| text.rfind(content))
    }

    /// The text of token ids, without special tokens and without ids that no token has.
    ///
    /// # Errors
    /// [`Error::Failed`] when the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(decoding_failed)
    }

    /// The text of token ids, special tokens included.
    ///
    /// # Errors
    /// As [`Self::decode`].
    pub fn decode_with_special(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, false).map_err(decoding_failed)
    }

    /// The token of an id as the vocabulary spells it, for instance `Ġthe`.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The token that starts a sequence.
    pub fn bos(&self) -> Option<u32> {
        self.bos.as_ref().map(|token| token.id)
    }

    /// The token that ends a response.
    pub fn eos(&self) -> Option<u32> {
        self.eos.as_ref().map(|token| token.id)
    }

    /// A token to fill batches up with, which no text ends with: the file's own padding token, its unknown token, or the first
    /// special token that is neither. Not BOS, not EOS, and none that the chat template writes; nothing if there is no other.
    pub fn padding(&self) -> Option<u32> {
        let named =
            ["pad_token", "unk_token"].map(|name| self.config.get(name).and_then(token_text).map(str::to_owned));
        let mut special: Vec<(u32, tokenizers::AddedToken)> =
            self.inner.get_added_tokens_decoder().into_iter().collect();
        special.sort_unstable_by_key(|(id, _)| *id);
        let special = special.into_iter().filter(|(_, token)| token.special).map(|(_, token)| token.content);
        let template = self.template.as_ref().map_or("", |template| template.source());
        let ids = named.into_iter().flatten().chain(special).filter(|text| !template.contains(text.as_str()));
        let mut ids = ids.filter_map(|text| self.inner.token_to_id(&text));
        ids.find(|id| Some(*id) != self.bos() && Some(*id) != self.eos())
    }

    /// The same tokenizer, whose files name this padding token.
    pub(crate) fn padded_with(mut self, pad: Option<u32>) -> Self {
        match pad.and_then(|pad| self.token(pad)) {
            Some(text) => self.config.insert("pad_token".into(), text.into()),
            None => self.config.remove("pad_token"),
        };
        self
    }

    /// Whether texts are meant to start with BOS: whether the tokenizer's own post-processor adds it.
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// One more than the largest token id, added tokens included: the rows that an embedding needs.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1)
    }

    /// Whether [`Self::chat`] can be used.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// The text of a conversation under the chat template. With `add_generation_prompt` the text ends where the
    /// assistant's answer begins. Encode it with [`Self::encode`]; the template writes its own BOS where it wants one.
    ///
    /// # Errors
    /// [`Error::Input`] when there is no template, or when it does not accept the messages.
    pub fn chat(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let template = self.template.as_ref().ok_or_else(|| {
            Error::input(
                "The tokenizer has no chat template, so conversations cannot be turned into text. Add a \
                 chat_template.jinja to the model's folder, or use plain prompts.",
            )
        })?;
        fn text(token: &Option<SpecialToken>) -> Option<&str> {
            token.as_ref().map(|token| token.text.as_str())
        }
        template.render(messages, add_generation_prompt, text(&self.bos), text(&self.eos))
    }

    /// The tokens of a conversation under the chat template, in which special tokens that are written out in a message are text
    /// like any other: nobody who writes a message can end it. Other conversations have the tokens of [`Self::chat`]'s text.
    ///
    /// # Errors
    /// Those of [`Self::chat`] and [`Self::encode`]; [`Error::Input`] when a message holds a special token that the vocabulary
    /// cannot spell in other tokens.
    pub fn encode_chat_as_text(&self, messages: &[Message], add_generation_prompt: bool) -> Result<Vec<u32>> {
        let is_written = |text: &str| messages.iter().any(|message| message.content.contains(text));
        let written: Vec<&str> =
            self.specials.iter().map(|(text, _)| &**text).filter(|text| is_written(text)).collect();
        if written.is_empty() {
            return self.encode(&self.chat(messages, add_generation_prompt)?);
        }
        // while the template is filled in, characters that nobody uses stand for what is written
        let unused = ('\u{F0000}'..='\u{FFFFD}').filter(|c| !is_written(c.encode_utf8(&mut [0; 4])));
        let stand_ins: Vec<(String, &str)> = unused.map(String::from).zip(written).collect();
        let stood_in = messages.iter().map(|message| {
            let replaced = |text: String, (stand_in, written): &(String, &str)| text.replace(written, stand_in);
            Message { content: stand_ins.iter().fold(message.content.clone(), replaced), ..message.clone() }
        });
        let text = self.chat(&stood_in.collect::<Vec<_>>(), add_generation_prompt)?;
        let as_written = |part: &str| {
            let replaced = |text: String, (stand_in, written): &(String, &str)| text.replace(stand_in, written);
            stand_ins.iter().fold(part.to_owned(), replaced)
        };

        // the special tokens that are left are the template's; what stands between them is text
        let texts: HashMap<u32, &str> = self.specials.iter().map(|(text, id)| (*id, &**text)).collect();
        let encoding = self.inner.encode(text.as_str(), false).map_err(encoding_failed)?;
        let (mut ids, mut end) = (Vec::new(), 0);
        for (&id, &(start, next)) in encoding.get_ids().iter().zip(encoding.get_offsets()) {
            // the token of unknown words is special too, and some take white space beside them
            if texts.get(&id).is_some_and(|special| text[start..next].trim() == special.trim()) {
                ids.extend(self.encode_as_text(&as_written(&text[end..start]))?);
                ids.push(id);
                end = next;
            }
        }
        ids.extend(self.encode_as_text(&as_written(&text[end..]))?);
        Ok(ids)
    }

    /// The tokens of a text, none of which are special tokens that stand in it.
    fn encode_as_text(&self, text: &str) -> Result<Vec<u32>> {
        let plain = self.plain.get_or_init(|| {
            let mut plain = (*self.inner).clone();
            plain.set_encode_special_tokens(true);
            plain
        });
        let ids = plain.encode_fast(text, false).map_err(encoding_failed)?.get_ids().to_vec();
        match self.specials.iter().find(|(special, id)| text.contains(special) && ids.contains(id)) {
            Some((special, _)) => Err(Error::input(format!(
                "The text has the special token `{special}` in it, which this tokenizer cannot take for text. Remove it."
            ))),
            None => Ok(ids),
        }
    }

    /// A hash of everything that changes tokens or the chat template: 64 hexadecimal digits.
    pub fn hash(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        let template = self.template.as_ref().map(|template| template.source().as_bytes());
        let token = |token: &Option<SpecialToken>| token.as_ref().map(|token| token.id.to_le_bytes());
        let (bos, eos) = (token(&self.bos), token(&self.eos));
        for part in [Some(&self.json[..]), bos.as_ref().map(|b| &b[..]), eos.as_ref().map(|e| &e[..]), template] {
            // The length keeps apart what would run together; a part that is missing differs from an empty one.
            hasher.update(&part.map_or(u64::MAX, |bytes| bytes.len() as u64).to_le_bytes());
            hasher.update(part.unwrap_or_default());
        }
        hasher.finalize().to_hex().to_string()
    }

    /// The kind of vocabulary: `BPE`, `Unigram`, `WordPiece` or `WordLevel`.
    pub(crate) fn kind(&self) -> &'static str {
        match self.inner.get_model() {
            tokenizers::ModelWrapper::BPE(_) => "BPE",
            tokenizers::ModelWrapper::WordPiece(_) => "WordPiece",
            tokenizers::ModelWrapper::WordLevel(_) => "WordLevel",
            tokenizers::ModelWrapper::Unigram(_) => "Unigram",
        }
    }
}

/// The contents of a text file, or `None` when there is no such file.
fn read_optional(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(source) if source.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::io("read", path)(source)),
    }
}

/// The chat template of `tokenizer_config.json`: a text, or a list of `{"name", "template"}`.
fn default_template(value: &Value) -> Option<&str> {
    match value {
        Value::Array(named) => named.iter().find(|t| t["name"] == "default").and_then(|t| t["template"].as_str()),
        _ => value.as_str(),
    }
}

/// A special token of `tokenizer_config.json`: a text, or an object with the text as its `content`.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

fn encoding_failed(source: tokenizers::Error) -> Error {
    Error::input(format!("The tokenizer cannot express the text: {source}."))
}

fn decoding_failed(source: tokenizers::Error) -> Error {
    Error::Failed(format!("The tokenizer cannot turn the tokens into text: {source}."))
}
