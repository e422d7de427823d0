//! Words and their ids.

use std::collections::HashMap;

use serde_json::json;

/// The id of `<unk>`, any word that the world does not use.
pub const UNKNOWN: u32 = 0;
/// The id of `<s>`, which starts a sequence.
pub const BOS: u32 = 1;
/// The id of `</s>`, which ends an answer.
pub const EOS: u32 = 2;

/// The special tokens, at their ids.
const SPECIAL: [&str; 3] = ["<unk>", "<s>", "</s>"];

/// The words of the world: the special tokens first, then the words in the order of the texts given.
#[derive(Debug, Clone)]
pub(super) struct Vocabulary {
    words: Vec<String>,
    ids: HashMap<String, u32>,
}

impl Vocabulary {
    /// The words of some texts.
    pub(super) fn new<'a>(texts: impl Iterator<Item = &'a str>) -> Self {
        let mut vocabulary = Self { words: Vec::new(), ids: HashMap::new() };
        for word in SPECIAL.into_iter().chain(texts.flat_map(|text| text.split(' '))) {
            if !vocabulary.ids.contains_key(word) {
                vocabulary.ids.insert(word.to_string(), vocabulary.words.len() as u32);
                vocabulary.words.push(word.to_string());
            }
        }
        vocabulary
    }

    /// Number of ids.
    pub(super) fn len(&self) -> usize {
        self.words.len()
    }

    /// The ids of a text whose words are separated by single spaces.
    pub(super) fn tokens<'a>(&'a self, text: &'a str) -> impl Iterator<Item = u32> + 'a {
        text.split(' ').map(|word| self.ids.get(word).copied().unwrap_or(UNKNOWN))
    }

    /// The vocabulary as the bytes of a Hugging Face `tokenizer.json`.
    pub(super) fn tokenizer_json(&self) -> Vec<u8> {
        let special = |(id, token): (usize, &str)| {
            json!({
                "id": id, "content": token, "special": true,
                "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            })
        };
        let added: Vec<_> = SPECIAL.into_iter().enumerate().map(special).collect();
        let vocab: serde_json::Map<_, _> =
            self.words.iter().enumerate().map(|(id, word)| (word.clone(), json!(id))).collect();
        let bos = json!({ "SpecialToken": { "id": "<s>", "type_id": 0 } });
        let text = |name, type_id| json!({ "Sequence": { "id": name, "type_id": type_id } });
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": { "type": "Lowercase" },
            "pre_tokenizer": { "type": "Whitespace" },
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [bos, text("A", 0)],
                "pair": [bos, text("A", 0), text("B", 1)],
                "special_tokens": { "<s>": { "id": "<s>", "ids": [BOS], "tokens": ["<s>"] } },
            },
            "decoder": null,
            "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "<unk>" },
        })
        .to_string()
        .into_bytes()
    }
}
