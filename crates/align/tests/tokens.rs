//! Preference pairs as tokens: boundary, BOS, EOS, template tail, length.

#![allow(clippy::unwrap_used)]

mod common;

use align::data::{
    LongPrompts, PreferencePair, Prompt, RenderOptions, TemplateTail, Tokenized, TokenizedPair, read_examples,
    read_pairs, tokenize_examples, tokenize_pairs, tokenize_prompt,
};
use common::{TEMPLATE, characters, chat, pair, shared};
use engine::checkpoint::Checkpoint;
use engine::tokenizer::Tokenizer;
use proptest::prelude::*;
use serde_json::Value;

/// The tokenizer of SmolLM2-135M-Instruct, or nothing (loudly) where that is absent.
fn smollm2() -> Option<Tokenizer> {
    common::smollm2().map(|gguf| Checkpoint::load(&gguf).unwrap().tokenizer)
}

const OPTIONS: RenderOptions =
    RenderOptions { max_length: 100, template_tail: TemplateTail::Drop, long_prompts: LongPrompts::Error };

fn tokenize(
    pairs: &[PreferencePair],
    tokenizer: &Tokenizer,
    options: &RenderOptions,
) -> engine::Result<Tokenized<TokenizedPair>> {
    tokenize_pairs(pairs, &|row| format!("Line {row} of rows.jsonl"), tokenizer, options)
}

/// Prompt, chosen, rejected with `|` between their tokens.
fn shown(pair: &PreferencePair, tokenizer: &Tokenizer, options: &RenderOptions) -> [String; 3] {
    let tokens = tokenize(std::slice::from_ref(pair), tokenizer, options).unwrap().rows.remove(0);
    [tokens.prompt, tokens.chosen, tokens.rejected].map(|ids| {
        let text = |id: &u32| tokenizer.decode_with_special(&[*id]).unwrap();
        ids.iter().map(text).collect::<Vec<_>>().join("|")
    })
}

#[test]
fn text_pairs_get_bos_where_the_tokenizer_adds_it_and_one_eos() {
    let plain = pair(Prompt::Text("qx".into()), "yes", "n$");
    let with = characters(true, Some("$"), None);
    assert_eq!(shown(&plain, &with, &OPTIONS), ["^|q|x", "y|e|s|$", "n|$"]);
    let without = characters(false, Some("$"), None);
    assert_eq!(shown(&plain, &without, &OPTIONS), ["q|x", "y|e|s|$", "n|$"]);
    let no_eos = characters(false, None, None);
    assert_eq!(shown(&plain, &no_eos, &OPTIONS), ["q|x", "y|e|s", "n|$"]);
    let doubled = pair(Prompt::Text("^qx".into()), "yes", "no");
    assert_eq!(shown(&doubled, &with, &OPTIONS)[0], "^|q|x");
    // A template does not touch plain text.
    assert_eq!(shown(&plain, &characters(true, Some("$"), Some(TEMPLATE)), &OPTIONS), ["^|q|x", "y|e|s|$", "n|$"]);
}

#[test]
fn templates_give_one_bos_one_eos_and_a_tail_that_is_dropped_or_kept() {
    let pair = pair(chat(&[("user", "q"), ("assistant", "r"), ("user", "s")]), "yes", "no");
    let keep = RenderOptions { template_tail: TemplateTail::Keep, ..OPTIONS };
    let prompt = "^|U|:|q|;|A|:|r|$|\n|U|:|s|;|A|:";
    for adds_bos in [true, false] {
        let tokenizer = characters(adds_bos, Some("$"), Some(TEMPLATE));
        assert_eq!(shown(&pair, &tokenizer, &OPTIONS), [prompt, "y|e|s|$", "n|o|$"]);
        assert_eq!(shown(&pair, &tokenizer, &keep), [prompt, "y|e|s|$|\n", "n|o|$|\n"]);
    }
    let silent = TEMPLATE.replace("{{ bos_token }}", "").replace("{{ eos_token }}\n", "");
    let tokenizer = characters(true, Some("$"), Some(&silent));
    assert_eq!(shown(&pair, &tokenizer, &OPTIONS), ["^|U|:|q|;|A|:|r|U|:|s|;|A|:", "y|e|s|$", "n|o|$"]);
}

#[test]
fn the_boundary_is_a_token_boundary_even_where_tokens_would_merge() {
    let tokenizer = characters(true, Some("$"), None);
    let merging = pair(Prompt::Text("xa".into()), "bab", "c");
    assert_eq!(shown(&merging, &tokenizer, &OPTIONS), ["^|x|a", "b|ab|$", "c|$"]);
}

proptest! {
    /// Whatever the text, the tokens spell it, BOS comes once and EOS ends each response.
    #[test]
    fn tokens_spell_prompt_and_response(prompt in "[abx ]{0,8}[abx]", answers in prop::collection::vec("[abx ]{0,8}[abx]", 2)) {
        let tokenizer = characters(true, Some("$"), Some(TEMPLATE));
        let text = pair(Prompt::Text(prompt.clone()), &answers[0], &answers[1]);
        let conversation = PreferencePair { prompt: chat(&[("user", &prompt)]), ..text.clone() };
        for (pair, start) in [(text, format!("^{prompt}")), (conversation, format!("^U:{prompt};A:"))] {
            let tokens = tokenize(&[pair], &tokenizer, &OPTIONS).unwrap().rows.remove(0);
            for (response, answer) in [(&tokens.chosen, &answers[0]), (&tokens.rejected, &answers[1])] {
                let whole = [&*tokens.prompt, response].concat();
                prop_assert_eq!(tokenizer.decode_with_special(&whole).unwrap(), format!("{start}{answer}$"));
                prop_assert_eq!(tokenizer.decode_with_special(response).unwrap(), format!("{answer}$"));
            }
        }
    }
}

#[test]
fn prompts_have_the_same_tokens_in_training_and_generation() {
    let tokenizer = characters(true, Some("$"), Some(TEMPLATE));
    for prompt in [Prompt::Text("xab".into()), chat(&[("user", "ab")])] {
        let trained = tokenize(&[pair(prompt.clone(), "b", "c")], &tokenizer, &OPTIONS).unwrap().rows.remove(0).prompt;
        assert_eq!(trained, tokenize_prompt(&prompt, &tokenizer).unwrap());
    }
}

#[test]
fn long_responses_are_cut_and_counted() {
    let tokenizer = characters(true, Some("$"), None);
    let pairs = [pair(Prompt::Text("qx".into()), "yes", "no"), pair(Prompt::Text("q".into()), "yesyes", "nonono")];
    for (max_length, cut, first) in [
        (7, 2, ["^|q|x", "y|e|s|$", "n|o|$"]),
        (6, 3, ["^|q|x", "y|e|s", "n|o|$"]),
        (5, 4, ["^|q|x", "y|e", "n|o"]),
        (4, 4, ["^|q|x", "y", "n"]),
    ] {
        let options = RenderOptions { max_length, ..OPTIONS };
        let all = tokenize(&pairs, &tokenizer, &options).unwrap();
        assert_eq!((all.truncated_responses, all.dropped_prompts), (cut, 0), "max_length {max_length}");
        assert_eq!(shown(&pairs[0], &tokenizer, &options), first);
        for pair in all.rows {
            assert!(pair.prompt.len() + pair.chosen.len().max(pair.rejected.len()) <= max_length);
        }
    }
}

#[test]
fn prompts_without_room_are_errors_or_dropped() {
    let tokenizer = characters(true, Some("$"), None);
    let pairs: Vec<_> = ["q", "qx", "qxy", "q"]
        .iter()
        .enumerate()
        .map(|(index, text)| PreferencePair { row: 10 + index, ..pair(Prompt::Text((*text).into()), "y", "n") })
        .collect();
    let options = RenderOptions { max_length: 3, ..OPTIONS };
    let error = tokenize(&pairs, &tokenizer, &options).unwrap_err().to_string();
    for part in ["Line 11 of rows.jsonl", "3 tokens", "max_length is 3", "long_prompts"] {
        assert!(error.contains(part), "{part} is not in: {error}");
    }
    let dropped = tokenize(&pairs, &tokenizer, &RenderOptions { long_prompts: LongPrompts::Drop, ..options }).unwrap();
    assert_eq!(dropped.rows.iter().map(|pair| pair.row).collect::<Vec<_>>(), [10, 13]);
    assert_eq!((dropped.dropped_prompts, dropped.truncated_responses), (2, 4));
    assert!(tokenize(&pairs, &tokenizer, &RenderOptions { max_length: 0, ..OPTIONS }).is_err());
}

#[test]
fn long_prompts_may_lose_their_beginning_but_for_bos() {
    let tokenizer = characters(true, Some("$"), None);
    let pair = pair(Prompt::Text("qxyqxy".into()), "yes", "no");
    for (max_length, cuts, expected) in [
        (11, (0, 0), ["^|q|x|y|q|x|y", "y|e|s|$", "n|o|$"]),
        (10, (1, 0), ["^|x|y|q|x|y", "y|e|s|$", "n|o|$"]),
        (8, (1, 0), ["^|q|x|y", "y|e|s|$", "n|o|$"]),
        // half of the length is the prompt's, whatever the responses need
        (7, (1, 0), ["^|x|y", "y|e|s|$", "n|o|$"]),
        (6, (1, 1), ["^|x|y", "y|e|s", "n|o|$"]),
        (2, (1, 2), ["y", "y", "n"]),
    ] {
        let options = RenderOptions { max_length, long_prompts: LongPrompts::KeepEnd, ..OPTIONS };
        let all = tokenize(std::slice::from_ref(&pair), &tokenizer, &options).unwrap();
        assert_eq!((all.cut_prompts, all.truncated_responses), cuts, "max_length {max_length}");
        assert_eq!(shown(&pair, &tokenizer, &options), expected, "max_length {max_length}");
    }
    // without BOS there is nothing to keep in front
    let options = RenderOptions { max_length: 8, long_prompts: LongPrompts::KeepEnd, ..OPTIONS };
    assert_eq!(shown(&pair, &characters(false, Some("$"), None), &options)[0], "y|q|x|y");
    assert!(tokenize(&[pair], &tokenizer, &RenderOptions { max_length: 1, ..options }).is_err());
}

#[test]
fn pairs_that_cannot_be_rendered_are_named() {
    let chatting = pair(chat(&[("user", "q")]), "y", "n");
    let shifting =
        "{% if add_generation_prompt %}Q{% else %}R{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}";
    let refusing = "{{ raise_exception('no such role') }}";
    #[rustfmt::skip]
    let cases = [
        (&chatting, characters(true, Some("$"), None), "no chat template"),
        (&chatting, characters(true, Some("$"), Some(shifting)), "renders the prompt otherwise"),
        (&chatting, characters(true, Some("$"), Some(refusing)), "no such role"),
        (&pair(Prompt::Text("q".into()), "$", "n"), characters(true, Some("$"), None), "chosen response gives no tokens"),
        (&pair(Prompt::Text("q".into()), "y", "é"), characters(true, Some("$"), None), "rejected response gives no tokens"),
        (&pair(Prompt::Text("é".into()), "y", "n"), characters(false, Some("$"), None), "prompt gives no tokens"),
    ];
    for (pair, tokenizer, reason) in cases {
        let error = tokenize(std::slice::from_ref(pair), &tokenizer, &OPTIONS).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let error = error.to_string();
        assert!(error.starts_with("Line 1 of rows.jsonl") && error.contains(reason), "{error}");
    }
}

#[test]
fn the_metrics_of_pku_rows_share_tokens_and_swap_them_where_they_disagree() {
    let Some(path) = shared("small/pku-saferlhf-32rows.json") else { return };
    let rows: Vec<Value> = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let fixture: Value = serde_json::from_str(include_str!("fixtures/collators.json")).unwrap();
    let bytes = fixture["tokenizers"]["bytes"].to_string();
    let tokenizer = Tokenizer::from_json(bytes.as_bytes(), Some("<s>"), Some("</s>"), Some(TEMPLATE)).unwrap();
    let options = RenderOptions { max_length: usize::MAX, ..OPTIONS };
    let pairs = |metric| tokenize(&read_pairs(&path, None, metric, false).unwrap().rows, &tokenizer, &options).unwrap();
    let [helpful, harmless] = [pairs("helpfulness"), pairs("harmlessness")];
    let examples = read_examples(&path, None, "harmlessness", false).unwrap();
    let examples = tokenize_examples(&examples.rows, &|row| examples.places.of(row), &tokenizer, &options).unwrap();
    let mut swapped = 0;
    for ((helpful, harmless), row) in helpful.rows.iter().zip(&harmless.rows).zip(&rows) {
        let differ = row["better_response_id"] != row["safer_response_id"];
        let [a, b] = [helpful.sequences(), harmless.sequences()];
        let mut responses = b.responses.clone();
        if differ {
            responses.reverse();
        }
        assert_eq!((a.prompt, &a.responses, a.row), (b.prompt, &responses, b.row));
        assert_ne!(a.responses[0], a.responses[1]);
        swapped += usize::from(differ);

        // the same tokens again, in the order of the columns
        let of_row: Vec<_> = examples.rows.iter().filter(|example| example.row == a.row).collect();
        let chosen = row["better_response_id"].as_u64().unwrap() as usize;
        for (k, example) in of_row.iter().enumerate() {
            let position = usize::from(k != chosen);
            let sequences = example.sequences();
            assert_eq!((sequences.prompt, sequences.responses[0]), (a.prompt, a.responses[position]));
            assert_eq!(example.desirable, row[format!("is_response_{k}_safe")].as_bool().unwrap());
        }
        assert_eq!(of_row.len(), 2);
    }
    assert_eq!((swapped, helpful.rows.len(), examples.rows.len()), (19, 32, 64));
}

/// FNV-1a over the lengths and ids of all sequences, as 32-bit little-endian words.
fn checksum(tokenized: &Tokenized<TokenizedPair>) -> u64 {
    let sequences = tokenized.rows.iter().flat_map(|pair| [&pair.prompt, &pair.chosen, &pair.rejected]);
    let words = sequences.flat_map(|ids| std::iter::once(ids.len() as u32).chain(ids.iter().copied()));
    words
        .flat_map(u32::to_le_bytes)
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// The checksums are of `prompt_ids`, `chosen_ids` and `rejected_ids` in the dataset that TRL 1.16's `DPOTrainer`
/// prepared from the first 32 pairs of each file, as messages, with max_length 512.
#[test]
fn tokens_equal_those_of_trl() {
    let Some(tokenizer) = smollm2() else { return };
    for (name, tokens, expected) in [
        ("hh-helpful-base", 7429, 0xbf47_1b86_ec79_6976u64),
        ("pku-saferlhf-safety-pairs", 6063, 0x4ae6_9587_9937_ea4a),
    ] {
        let Some(path) = shared(&format!("real-text/{name}.train.jsonl.gz")) else { continue };
        let mut pairs = read_pairs(&path, None, "harmlessness", true).unwrap().rows;
        pairs.truncate(32);
        let keep =
            RenderOptions { max_length: 512, template_tail: TemplateTail::Keep, long_prompts: LongPrompts::Error };
        let kept = tokenize(&pairs, &tokenizer, &keep).unwrap();
        let length = |pair: &TokenizedPair| pair.prompt.len() + pair.chosen.len() + pair.rejected.len();
        assert_eq!(kept.rows.iter().map(length).sum::<usize>(), tokens, "{name}");
        assert_eq!(checksum(&kept), expected, "{name}");

        // Without the tail, every complete response ends with the only EOS, one token (the newline) earlier.
        let dropped =
            tokenize(&pairs, &tokenizer, &RenderOptions { template_tail: TemplateTail::Drop, ..keep }).unwrap();
        for (kept, dropped) in kept.rows.iter().zip(&dropped.rows) {
            for (kept, dropped) in [(&kept.chosen, &dropped.chosen), (&kept.rejected, &dropped.rejected)] {
                assert!(kept.starts_with(dropped) && kept.len() <= dropped.len() + 1);
                let ends = dropped.iter().filter(|id| Some(**id) == tokenizer.eos()).count();
                assert!(ends == 1 && dropped.last().copied() == tokenizer.eos() || kept == dropped, "{dropped:?}");
            }
        }
    }
}
