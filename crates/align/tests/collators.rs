//! Tokens, scored positions and truncation against what TRL prepares and collates from the same rows.
//!
//! `scripts/make_collator_fixture.py` runs TRL and writes the fixture.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;

use align::data::{
    Dataset, LongPrompts, Prompt, RenderOptions, TemplateTail, read_examples, read_pairs, tokenize_examples,
    tokenize_pairs,
};
use align::sequences::Sequences;
use common::{file, lines, pair};
use engine::{PackedBatch, Tokenizer};
use proptest::prelude::*;
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
struct Fixture {
    tokenizers: HashMap<String, Value>,
    cases: Vec<Case>,
    ids: Ids,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    objective: String,
    tokenizer: String,
    template: Option<String>,
    rows: Vec<Value>,
    max_length: Option<usize>,
    truncation_mode: Option<String>,
    sequences: Vec<Sequence>,
}

/// Rows that are tokens already.
#[derive(Deserialize)]
struct Ids {
    rows: Vec<HashMap<String, Vec<u32>>>,
    sequences: Vec<Sequence>,
}

/// A prompt with a response, and which of its tokens are scored.
#[derive(Debug, PartialEq, Deserialize)]
struct Sequence {
    ids: Vec<u32>,
    completion_mask: Vec<u8>,
    label: Option<bool>,
}

fn fixture() -> Fixture {
    serde_json::from_str(include_str!("fixtures/collators.json")).unwrap()
}

impl Fixture {
    fn tokenizer(&self, name: &str, template: Option<&str>) -> Tokenizer {
        let json = self.tokenizers[name].to_string();
        Tokenizer::from_json(json.as_bytes(), Some("<s>"), Some("</s>"), template).unwrap()
    }
}

/// Every response behind its prompt, scored where the batch that the model gets scores it.
fn collated(rows: &[Sequences<'_>]) -> Vec<Sequence> {
    let mut batch = PackedBatch::default();
    rows.iter().for_each(|row| batch.push(row.prompt, &row.responses));
    let whole = rows.iter().flat_map(|row| row.responses.iter().map(|response| [row.prompt, response].concat()));
    let sequences = whole.zip(&batch.responses).map(|(ids, range)| {
        let mut completion_mask = vec![0; ids.len()];
        for (&target, &row) in batch.targets[range.clone()].iter().zip(&batch.scored_rows[range.clone()]) {
            let position = batch.positions[row as usize] as usize;
            assert_eq!((batch.tokens[row as usize], target), (ids[position], ids[position + 1]));
            completion_mask[position + 1] = 1;
        }
        Sequence { ids, completion_mask, label: None }
    });
    sequences.collect()
}

/// What becomes of the rows of a case, from their file to the batch.
fn ours(
    case: &Case,
    tokenizer: &Tokenizer,
    template_tail: TemplateTail,
    long_prompts: LongPrompts,
) -> engine::Result<Vec<Sequence>> {
    let options = RenderOptions { max_length: case.max_length.unwrap_or(usize::MAX), template_tail, long_prompts };
    let file = file("rows.jsonl", lines(&case.rows));
    let (data, labels) = if case.objective == "dpo" {
        let pairs = read_pairs(&file.path, None, "helpfulness", false)?;
        let tokens = tokenize_pairs(&pairs.rows, &|row| pairs.places.of(row), tokenizer, &options)?;
        (Dataset::Pairs(tokens.rows), Vec::new())
    } else {
        let examples = read_examples(&file.path, None, "helpfulness", false)?;
        let tokens = tokenize_examples(&examples.rows, &|row| examples.places.of(row), tokenizer, &options)?;
        let labels = tokens.rows.iter().map(|example| example.desirable).collect();
        (Dataset::Examples(tokens.rows), labels)
    };
    let mut sequences = collated(&data.sequences());
    if case.objective == "kto" {
        sequences.iter_mut().zip(labels).for_each(|(sequence, label)| sequence.label = Some(label));
        // TRL takes all chosen responses of pairs first
        sequences.sort_by_key(|sequence| sequence.label == Some(false));
    }
    Ok(sequences)
}

fn theirs(case: &mut Case) -> Vec<Sequence> {
    let mut sequences = std::mem::take(&mut case.sequences);
    sequences.sort_by_key(|sequence| sequence.label == Some(false));
    sequences
}

#[test]
fn tokens_scored_positions_and_truncation_equal_trls() {
    let mut fixture = fixture();
    let mut cases = std::mem::take(&mut fixture.cases);
    cases.retain(|case| DIFFERENCES.iter().all(|difference| difference.case != case.name));
    assert_eq!(cases.len(), 30);
    for mut case in cases {
        let tokenizer = fixture.tokenizer(&case.tokenizer, case.template.as_deref());
        let ours = ours(&case, &tokenizer, TemplateTail::Keep, LongPrompts::Drop).unwrap();
        assert_eq!(ours, theirs(&mut case), "{}", case.name);
    }
}

#[test]
fn a_batch_scores_what_the_documented_batch_of_trl_scores() {
    let Ids { rows, sequences } = fixture().ids;
    let rows: Vec<Sequences<'_>> = rows
        .iter()
        .map(|row| Sequences {
            prompt: &row["prompt_ids"],
            responses: vec![&row["chosen_ids"], &row["rejected_ids"]],
            row: 1,
        })
        .collect();
    assert_eq!(collated(&rows), sequences);
}

/// A case in which TRL does otherwise than `sacpo` by default. Tokens are spelled; ‖ stands before those that are scored, and ¶
/// for the end of a line.
struct Difference {
    case: &'static str,
    ours: Ours,
    /// What TRL trains on.
    theirs: &'static [&'static str],
}

enum Ours {
    Tokens(&'static [&'static str]),
    /// The rows are an error that says this.
    Refused(&'static str),
}

use Ours::{Refused, Tokens};

#[rustfmt::skip]
const DIFFERENCES: &[Difference] = &[
    // TRL moves the boundary into the prompt, where generation never starts
    Difference {
        case: "tokens merge across the boundary",
        ours: Tokens(&["<s>The tree is the ‖oak.</s>", "<s>The tree is the ‖elm.</s>"]),
        theirs: &["<s>The tree is the‖ oak.</s>", "<s>The tree is the‖ elm.</s>"],
    },
    Difference {
        case: "tokens merge across one of two boundaries",
        ours: Tokens(&["<s>The tree is the ‖oak.</s>", "<s>The tree is the ‖(unknown)</s>"]),
        theirs: &["<s>The tree is the‖ oak.</s>", "<s>The tree is the‖ (unknown)</s>"],
    },
    Difference {
        case: "tokens merge within a word",
        ours: Tokens(&["<s> Two and two are fo‖ur.</s>", "<s> Two and two are fo‖rty.</s>"]),
        theirs: &["<s> Two and two are ‖four.</s>", "<s> Two and two are ‖forty.</s>"],
    },
    Difference {
        case: "tokens merge behind a template",
        ours: Tokens(&[
            "<s>[user] Which tree has acorns?</s>[assistant] ‖the oak.</s>",
            "<s>[user] Which tree has acorns?</s>[assistant] ‖elm</s>",
        ]),
        theirs: &[
            "<s>[user] Which tree has acorns?</s>[assistant]‖ the oak.</s>",
            "<s>[user] Which tree has acorns?</s>[assistant]‖ elm</s>",
        ],
    },
    Difference {
        case: "a prompt that is rendered otherwise",
        ours: Refused("renders the prompt otherwise once it is answered"),
        theirs: &[
            "<s><|user|>¶Name the month after May.</s>¶<|assistant|>¶‖June.</s>¶",
            "<s><|user|>¶Name the month after May.</s>¶<|assistant|>¶‖July.</s>¶",
        ],
    },
    // one BOS, and one EOS at the end of what is scored
    Difference {
        case: "BOS that is written already",
        ours: Tokens(&["<s>Stop‖ now.</s>", "<s>Stop‖ it.</s>"]),
        theirs: &["<s><s>Stop‖ now.</s>", "<s><s>Stop‖ it.</s>"],
    },
    Difference {
        case: "a template without BOS",
        ours: Tokens(&[
            "<s> user: Name the month after May.</s> assistant: ‖June.</s>",
            "<s> user: Name the month after May.</s> assistant: ‖July.</s>",
        ]),
        theirs: &[
            " user: Name the month after May.</s> assistant: ‖June.</s>",
            " user: Name the month after May.</s> assistant: ‖July.</s>",
        ],
    },
    Difference {
        case: "a template without EOS",
        ours: Tokens(&[
            "<s>user: Name the month after May.¶assistant: ‖June.¶</s>",
            "<s>user: Name the month after May.¶assistant: ‖July.¶</s>",
        ]),
        theirs: &[
            "<s>user: Name the month after May.¶assistant: ‖June.¶",
            "<s>user: Name the month after May.¶assistant: ‖July.¶",
        ],
    },
    Difference {
        case: "EOS inside a response",
        ours: Tokens(&["<s>Stop‖ now.</s>", "<s>Stop‖ it.</s>"]),
        theirs: &["<s>Stop‖ now.</s> Not yet.</s>", "<s>Stop‖ it.</s>"],
    },
    Difference {
        case: "a tail that is scored",
        ours: Tokens(&[
            "<s><|user|>¶Name the month after May.</s>¶<|assistant|>¶‖June.</s>",
            "<s><|user|>¶Name the month after May.</s>¶<|assistant|>¶‖July.</s>",
        ]),
        theirs: &[
            "<s><|user|>¶Name the month after May.</s>¶<|assistant|>¶‖June.</s>¶",
            "<s><|user|>¶Name the month after May.</s>¶<|assistant|>¶‖July.</s>¶",
        ],
    },
    // both have 30, and 10, tokens at most
    Difference {
        case: "the beginning is cut",
        ours: Tokens(&["<s>after May.</s>[assistant] ‖June.</s>", "<s>after May.</s>[assistant] ‖July.</s>"]),
        theirs: &[" after May.</s>[assistant] ‖June.</s>", " after May.</s>[assistant] ‖July.</s>"],
    },
    Difference {
        case: "the beginning of a response is cut",
        ours: Tokens(&["<s>o on:‖ one tw", "<s>o on:‖ no</s>"]),
        theirs: &["‖ two three four</s>", "<s>Go on:‖ no</s>"],
    },
    Difference {
        case: "a prompt without room",
        ours: Refused("leaves no room for a response"),
        theirs: &[],
    },
    // TRL takes the characters that two texts share for the prompt
    Difference {
        case: "transcripts",
        ours: Tokens(&[
            "<s>[user] Which tree has acorns?</s>[assistant] ‖The oak.</s>",
            "<s>[user] Which tree has acorns?</s>[assistant] ‖The oak, or the elm.</s>",
        ]),
        theirs: &[
            "<s>¶¶Human: Which tree has acorns?¶¶Assistant: The oak‖.</s>",
            "<s>¶¶Human: Which tree has acorns?¶¶Assistant: The oak‖, or the elm.</s>",
        ],
    },
    Difference {
        case: "texts without a prompt",
        ours: Refused("column `chosen`: the transcript does not start with"),
        theirs: &["<s>The oak is a tr‖ee.</s>", "<s>The oak is a tr‖ain.</s>"],
    },
    Difference {
        case: "a text that begins as another",
        ours: Refused("column `chosen`: the transcript does not start with"),
        theirs: &["<s>The oak i‖s</s>", "<s>The oak i‖s not</s>"],
    },
    // a response is one message of the assistant, and not nothing
    Difference {
        case: "two responses that are the same",
        ours: Refused("column `rejected`: the chosen and the rejected response are the same"),
        theirs: &["<s>Stop‖ now.</s>", "<s>Stop‖ now. </s>"],
    },
    Difference {
        case: "a blank response",
        ours: Refused("column `rejected`: the response is empty"),
        theirs: &["<s>Stop‖ now.</s>", "<s>Stop‖ </s>"],
    },
    Difference {
        case: "a prompt that ends with the assistant",
        ours: Refused("column `prompt`: the prompt ends with a turn of the assistant"),
        theirs: &[
            "<s>[user] Which tree has acorns?</s>[assistant] I think</s>[assistant]‖ the oak.</s>",
            "<s>[user] Which tree has acorns?</s>[assistant] I think</s>[assistant]‖ the elm.</s>",
        ],
    },
    Difference {
        case: "a response of two turns",
        ours: Refused("column `chosen`: beside a `prompt`, a response must be one message"),
        theirs: &[
            "<s>[user] Which tree has acorns?</s>[assistant] ‖The oak.</s>[user] Sure?</s>[assistant] Yes.</s>",
            "<s>[user] Which tree has acorns?</s>[assistant] ‖None.</s>",
        ],
    },
    Difference {
        case: "conversations that part early",
        ours: Refused("column `rejected`: the conversation differs from that in `chosen` before its last turn"),
        theirs: &[
            "<s>[user] Which tree has acorns?</s>[assistant] ‖The oak.</s>[user] Sure?</s>[assistant] Yes.</s>",
            "<s>[user] Which tree has acorns?</s>[assistant] ‖The elm.</s>[user] Sure?</s>[assistant] No.</s>",
        ],
    },
    Difference {
        case: "messages",
        ours: Tokens(&["<s>[user] Which tree has acorns?</s>[assistant] The oak.</s>[user] Sure?</s>[assistant] ‖Yes.</s>"]),
        theirs: &["‖<s>[user] Which tree has acorns?</s>[assistant] The oak.</s>[user] Sure?</s>[assistant] Yes.</s>"],
    },
];

#[test]
fn where_trl_differs_our_rule_holds() {
    let mut fixture = fixture();
    let mut cases: HashMap<String, Case> =
        std::mem::take(&mut fixture.cases).into_iter().map(|case| (case.name.clone(), case)).collect();
    for Difference { case, ours: expected, theirs: of_trl } in DIFFERENCES {
        let case = cases.get_mut(*case).unwrap();
        let tokenizer = fixture.tokenizer(&case.tokenizer, case.template.as_deref());
        let spelled = |sequences: &[Sequence]| -> Vec<String> {
            sequences.iter().map(|sequence| spell(sequence, &tokenizer)).collect()
        };
        let long_prompts = match case.truncation_mode.as_deref() {
            Some("keep_end") => LongPrompts::KeepEnd,
            _ => LongPrompts::Error,
        };
        match (ours(case, &tokenizer, TemplateTail::Drop, long_prompts), expected) {
            (Ok(sequences), Tokens(expected)) => {
                assert_eq!(spelled(&sequences), *expected, "{}", case.name);
                assert_ne!(sequences, case.sequences, "{}", case.name);
            }
            (Err(error), Refused(reason)) => {
                assert_eq!(error.exit_code(), 2);
                let error = error.to_string();
                assert!(error.starts_with("Line 1 of ") && error.contains(reason), "{}: {error}", case.name);
            }
            (Ok(sequences), Refused(_)) => panic!("{} is not refused: {:?}", case.name, spelled(&sequences)),
            (Err(error), Tokens(_)) => panic!("{}: {error}", case.name),
        }
        assert_eq!(spelled(&case.sequences), *of_trl, "{}", case.name);
    }
}

fn spell(sequence: &Sequence, tokenizer: &Tokenizer) -> String {
    let unscored = sequence.completion_mask.iter().filter(|scored| **scored == 0).count();
    assert!(sequence.completion_mask.is_sorted());
    let text = |ids: &[u32]| -> String {
        ids.iter().map(|id| tokenizer.token(*id).unwrap().replace(['Ġ', '▁'], " ").replace('Ċ', "¶")).collect()
    };
    format!("{}‖{}", text(&sequence.ids[..unscored]), text(&sequence.ids[unscored..]))
}

proptest! {
    /// Wherever tokens would merge, those of prompt and response spell the two, and nothing more.
    #[test]
    fn a_response_has_no_white_space_that_its_text_has_not(
        prompt in "[a-z ]{0,6}(four|hundred| oak|the|[ a-z])",
        responses in prop::collection::vec("(ur|red|our|oak| elm|[ a-z])[a-z ]{0,6}", 2),
        name in prop::sample::select(vec!["bytes", "pieces"]),
    ) {
        let tokenizer = fixture().tokenizer(name, None);
        let pair = pair(Prompt::Text(prompt.clone()), &responses[0], &responses[1]);
        let options = RenderOptions { max_length: 100, template_tail: TemplateTail::Drop, long_prompts: LongPrompts::Error };
        let tokens = tokenize_pairs(&[pair], &|_| String::new(), &tokenizer, &options).unwrap().rows;
        let start = if name == "pieces" { "<s> " } else { "<s>" };
        let spelled: Vec<String> =
            collated(&[tokens[0].sequences()]).iter().map(|sequence| spell(sequence, &tokenizer)).collect();
        prop_assert_eq!(spelled, responses.iter().map(|response| format!("{start}{prompt}‖{response}</s>")).collect::<Vec<_>>());
    }
}
