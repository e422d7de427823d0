//! The tokenizer in a GGUF file, rebuilt as a `tokenizer.json`.

use std::cmp::Reverse;
use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::container::Container;
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

// llama.cpp's numbers for the types of tokens.
const NORMAL: f64 = 1.0;
const CONTROL: f64 = 3.0;
const USER_DEFINED: f64 = 4.0;

/// How Llama 3 cuts text before merging.
const LLAMA3_PATTERN: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}\
                              | ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

/// Reads the tokenizer and its chat template.
pub(super) fn tokenizer(file: &Container) -> Result<Tokenizer> {
    let vocabulary = Vocabulary::read(file)?;
    let (model, mut pipeline) = match file.text("tokenizer.ggml.model")? {
        Some("gpt2") => byte_level(file, &vocabulary)?,
        Some("llama") => sentencepiece(file, &vocabulary)?,
        other => {
            return Err(unsupported(file, &format!("has a tokenizer of the kind {}", other.unwrap_or("unknown"))));
        }
    };
    pipeline["version"] = json!("1.0");
    pipeline["added_tokens"] = vocabulary.added_tokens();
    pipeline["post_processor"] = vocabulary.post_processor();
    pipeline["model"] = model;

    let mut config = Map::new();
    config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    config.insert("clean_up_tokenization_spaces".into(), false.into());
    if let Some(context) = file.size("llama.context_length")? {
        config.insert("model_max_length".into(), context.into());
    }
    for (name, token) in
        [("bos", vocabulary.bos), ("eos", vocabulary.eos), ("unk", vocabulary.unk), ("pad", vocabulary.pad)]
    {
        if let Some(id) = token {
            config.insert(format!("{name}_token"), vocabulary.tokens[id].into());
        }
    }
    let template = file.text("tokenizer.chat_template")?;
    Tokenizer::from_parts(pipeline.to_string().into_bytes(), config, template)
        .map_err(|e| Error::input(format!("The tokenizer in {} cannot be used. {e}", file.path().display())))
}

/// The tokens of the file and which of them are special.
struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    types: Vec<f64>,
    bos: Option<usize>,
    eos: Option<usize>,
    unk: Option<usize>,
    pad: Option<usize>,
    adds_bos: bool,
    adds_eos: bool,
}

impl<'a> Vocabulary<'a> {
    fn read(file: &'a Container) -> Result<Self> {
        let path = file.path().display();
        let tokens = file.texts("tokenizer.ggml.tokens")?;
        let tokens =
            tokens.ok_or_else(|| Error::input(format!("{path} holds no tokenizer (tokenizer.ggml.tokens).")))?;
        let types = file.numbers("tokenizer.ggml.token_type")?.unwrap_or_else(|| vec![NORMAL; tokens.len()]);
        if types.len() != tokens.len() {
            let (n, m) = (tokens.len(), types.len());
            return Err(Error::input(format!("{path} has {n} tokens but {m} token types. Fetch the file again.")));
        }
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, token) in tokens.iter().enumerate() {
            if let Some(other) = ids.insert(*token, id) {
                return Err(Error::input(format!("{path} has the token `{token}` twice, as {other} and {id}.")));
            }
        }
        // The ids that llama.cpp falls back to.
        let sentencepiece = file.text("tokenizer.ggml.model")? == Some("llama");
        let special = |name: &str, fallback: usize| -> Result<Option<usize>> {
            let key = format!("tokenizer.ggml.{name}_token_id");
            let id = file.size(&key)?.or(sentencepiece.then_some(fallback));
            match id.filter(|&id| id >= tokens.len()) {
                Some(id) => Err(Error::input(format!("{path} has {key} {id} but only {} tokens.", tokens.len()))),
                None => Ok(id),
            }
        };
        let pad = match file.size("tokenizer.ggml.padding_token_id")? {
            None => None,
            Some(_) => special("padding", 0)?,
        };
        let (bos, eos, unk) = (special("bos", 1)?, special("eos", 2)?, special("unknown", 0)?);
        let llama3 = matches!(file.text("tokenizer.ggml.pre")?, Some("llama-bpe" | "llama3" | "llama-v3"));
        Ok(Self {
            bos,
            eos,
            unk,
            pad,
            adds_bos: file.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(sentencepiece || llama3),
            adds_eos: file.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false),
            tokens,
            types,
        })
    }

    /// Every token with its id.
    fn ids(&self) -> Map<String, Value> {
        self.tokens.iter().enumerate().map(|(id, &token)| (token.to_owned(), id.into())).collect()
    }

    /// Tokens that are found in a text before anything else: control tokens, which are special, and user-defined ones.
    fn added_tokens(&self) -> Value {
        let added = self.tokens.iter().zip(&self.types).enumerate();
        let added = added.filter(|(_, (_, kind))| **kind == CONTROL || **kind == USER_DEFINED);
        let added = added.map(|(id, (token, kind))| {
            json!({
                "id": id,
                "content": token,
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": *kind == CONTROL,
            })
        });
        added.collect()
    }

    /// Adds BOS and EOS as the file asks for it.
    fn post_processor(&self) -> Value {
        let bos = self.bos.filter(|_| self.adds_bos);
        let eos = self.eos.filter(|_| self.adds_eos);
        let special = |id: Option<usize>, part: u8| {
            id.map(|id| json!({"SpecialToken": {"id": self.tokens[id], "type_id": part}}))
        };
        let framed = |name: &str, part: u8| {
            let text = json!({"Sequence": {"id": name, "type_id": part}});
            [special(bos, part), Some(text), special(eos, part)].into_iter().flatten().collect::<Vec<Value>>()
        };
        let (single, pair) = (framed("A", 0), [framed("A", 0), framed("B", 1)].concat());
        let used = bos.into_iter().chain(eos);
        let used = used.map(|id| {
            let token = self.tokens[id];
            (token.to_owned(), json!({"id": token, "ids": [id], "tokens": [token]}))
        });
        let special_tokens: Map<String, Value> = used.collect();
        json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special_tokens})
    }
}

fn unsupported(file: &Container, what: &str) -> Error {
    Error::input(format!(
        "{} {what}, which is not supported. Use the model's Hugging Face folder instead.",
        file.path().display()
    ))
}

/// BPE on bytes, as GPT-2 and Llama 3 have it.
fn byte_level(file: &Container, vocabulary: &Vocabulary<'_>) -> Result<(Value, Value)> {
    let prefix = file.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(false);
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": use_regex});
    let (pre_tokenizer, ignore_merges) = match file.text("tokenizer.ggml.pre")? {
        Some("smollm") => {
            let digits = json!({"type": "Digits", "individual_digits": true});
            (json!({"type": "Sequence", "pretokenizers": [digits, bytes(true)]}), false)
        }
        Some("llama-bpe" | "llama3" | "llama-v3") => {
            let pattern = json!({"Regex": LLAMA3_PATTERN});
            let split = json!({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false});
            (json!({"type": "Sequence", "pretokenizers": [split, bytes(false)]}), true)
        }
        // Converters wrote no name, or `default`, before there were others.
        None | Some("default" | "gpt-2") => (bytes(true), false),
        Some(other) => return Err(unsupported(file, &format!("has the pre-tokenizer {other}"))),
    };
    let merges = file.texts("tokenizer.ggml.merges")?.ok_or_else(|| {
        Error::input(format!("{} lacks the list tokenizer.ggml.merges, which is needed.", file.path().display()))
    })?;
    let pair = |merge: &&str| {
        merge.split_once(' ').map(|(left, right)| json!([left, right])).ok_or_else(|| {
            Error::input(format!("{} has the merge `{merge}`, which is not two tokens.", file.path().display()))
        })
    };
    let merges: Vec<Value> = merges.iter().map(pair).collect::<Result<_>>()?;
    let model = json!({
        "type": "BPE",
        "dropout": null,
        "unk_token": null,
        "continuing_subword_prefix": null,
        "end_of_word_suffix": null,
        "fuse_unk": false,
        "byte_fallback": false,
        "ignore_merges": ignore_merges,
        "vocab": vocabulary.ids(),
        "merges": merges,
    });
    let pipeline = json!({
        "truncation": null,
        "padding": null,
        "normalizer": null,
        "pre_tokenizer": pre_tokenizer,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
    });
    Ok((model, pipeline))
}

/// SentencePiece's BPE, as Llama 1 and 2 and Mistral have it: pieces with scores, and bytes for what no piece covers.
fn sentencepiece(file: &Container, vocabulary: &Vocabulary<'_>) -> Result<(Value, Value)> {
    let charsmap = file.keys().any(|key| key == "tokenizer.ggml.precompiled_charsmap");
    if charsmap || file.flag("tokenizer.ggml.remove_extra_whitespaces")?.unwrap_or(false) {
        return Err(unsupported(file, "has a tokenizer that normalises text"));
    }
    let scores = file.numbers("tokenizer.ggml.scores")?.filter(|scores| scores.len() == vocabulary.tokens.len());
    let scores = scores.ok_or_else(|| {
        let path = file.path().display();
        Error::input(format!("{path} lacks a list tokenizer.ggml.scores with a score for every token."))
    })?;
    let prefix = file.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let model = json!({
        "type": "BPE",
        "dropout": null,
        "unk_token": vocabulary.unk.map(|id| vocabulary.tokens[id]),
        "continuing_subword_prefix": null,
        "end_of_word_suffix": null,
        "fuse_unk": true,
        "byte_fallback": true,
        "ignore_merges": false,
        "vocab": vocabulary.ids(),
        "merges": merges_by_score(vocabulary, &scores),
    });
    let pipeline = json!({
        "truncation": null,
        "padding": null,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
    });
    Ok((model, pipeline))
}

/// The merges that SentencePiece leaves unsaid: any two pieces that make a third, the best-scored first.
fn merges_by_score(vocabulary: &Vocabulary<'_>, scores: &[f64]) -> Vec<[String; 2]> {
    let normal = |id: &usize| vocabulary.types[*id] == NORMAL;
    let pieces = (0..vocabulary.tokens.len()).filter(normal);
    let ids: HashMap<&str, usize> = pieces.clone().map(|id| (vocabulary.tokens[id], id)).collect();
    let mut merges = Vec::new();
    for merged in pieces {
        let token = vocabulary.tokens[merged];
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(&l), Some(&r)) = (ids.get(left), ids.get(right)) {
                merges.push((merged, left, right, l, r));
            }
        }
    }
    // Among equals in the order of `transformers`, so that both make the same tokenizer of a file.
    merges.sort_by(|a, b| {
        let lengths = |left: &str, right: &str| Reverse((left.chars().count(), right.chars().count()));
        scores[b.0]
            .total_cmp(&scores[a.0])
            .then_with(|| (lengths(a.1, a.2), a.0, a.3, a.4).cmp(&(lengths(b.1, b.2), b.0, b.3, b.4)))
    });
    merges.into_iter().map(|(_, left, right, ..)| [left.to_owned(), right.to_owned()]).collect()
}
