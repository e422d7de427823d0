//! What the tests of preference data share.
#![allow(dead_code, unused_imports, clippy::unwrap_used)]

#[path = "../../../engine/tests/common/shared_data.rs"]
mod shared_data;

use std::io::Write;
use std::path::PathBuf;

use align::data::{PreferencePair, Prompt};
use engine::Tokenizer;
use engine::chat::Message;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use tempfile::TempDir;

pub(crate) use shared_data::{shared, smollm2};

/// A conversation of (role, content).
pub(crate) fn chat(turns: &[(&str, &str)]) -> Prompt {
    Prompt::Chat(
        turns.iter().map(|(role, content)| Message { role: (*role).into(), content: (*content).into() }).collect(),
    )
}

/// A pair on row 1.
pub(crate) fn pair(prompt: Prompt, chosen: &str, rejected: &str) -> PreferencePair {
    PreferencePair { prompt, chosen: chosen.into(), rejected: rejected.into(), is_unsafe: None, margin: None, row: 1 }
}

/// A file that goes with its folder.
pub(crate) struct TempFile {
    _folder: TempDir,
    pub(crate) path: PathBuf,
}

/// A file of this name that holds these bytes.
pub(crate) fn file(name: &str, bytes: impl AsRef<[u8]>) -> TempFile {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    TempFile { _folder: folder, path }
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// JSON lines.
pub(crate) fn lines(rows: &[Value]) -> String {
    rows.iter().map(|row| format!("{row}\n")).collect()
}

/// A token a character, but `ab` is one, with `^` as BOS and `$` as EOS.
pub(crate) fn characters(adds_bos: bool, eos: Option<&str>, template: Option<&str>) -> Tokenizer {
    let specials = ["^", "$"];
    let letters = (' '..='~').map(String::from).filter(|letter| !specials.contains(&letter.as_str()));
    let tokens = specials.map(String::from).into_iter().chain(letters).chain(["\n".into(), "ab".into()]);
    let vocab: serde_json::Map<String, Value> = tokens.enumerate().map(|(id, token)| (token, json!(id))).collect();
    let added: Vec<Value> = specials
        .iter()
        .enumerate()
        .map(|(id, content)| {
            json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false})
        })
        .collect();
    let post_processor = adds_bos.then(|| {
        json!({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "^", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"^": {"id": "^", "ids": [0], "tokens": ["^"]}}})
    });
    let json = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": null, "post_processor": post_processor, "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": [["a", "b"]]}});
    Tokenizer::from_json(json.to_string().as_bytes(), Some("^"), eos, template).unwrap()
}

/// `U:…;A:…$` and a newline, as ChatML does it, with BOS first.
pub(crate) const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }};\
    {% else %}A:{{ m.content }}{{ eos_token }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}";
