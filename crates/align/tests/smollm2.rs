//! Real pairs under a real model: SmolLM2-135M-Instruct against PyTorch with transformers.
#![allow(clippy::unwrap_used)]

mod common;

use align::data::{LongPrompts, RenderOptions, TemplateTail, TokenizedPair, read_pairs, tokenize_pairs};
use align::reference;
use engine::checkpoint::Checkpoint;
use serde_json::Value;

#[test]
fn sequence_log_probabilities_equal_transformers() {
    let (Some(gguf), Some(data)) = (common::smollm2(), common::shared("real-text")) else { return };
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/smollm2_logps.json");
    let fixture: Value = serde_json::from_str(&std::fs::read_to_string(fixture).unwrap()).unwrap();
    let Checkpoint { model, tokenizer, .. } = Checkpoint::load(&gguf).unwrap();
    let options = RenderOptions {
        max_length: fixture["max_length"].as_u64().unwrap() as usize,
        template_tail: TemplateTail::Keep,
        long_prompts: LongPrompts::Drop,
    };
    let mut compared = 0;
    let mut worst = 0.0f64;
    for file in fixture["files"].as_array().unwrap() {
        let path = data.join(file["file"].as_str().unwrap());
        let rows = file["rows"].as_array().unwrap();
        let all = read_pairs(&path, None, "harmlessness", true).unwrap().rows;
        let wanted: Vec<_> = rows
            .iter()
            .map(|row| all.iter().find(|pair| pair.row as u64 == row["line"].as_u64().unwrap()).unwrap().clone())
            .collect();
        let pairs = tokenize_pairs(&wanted, &|row| row.to_string(), &tokenizer, &options).unwrap().rows;
        let sequences: Vec<_> = pairs.iter().map(TokenizedPair::sequences).collect();
        let logps = reference::logps(&model, &sequences, None, None, &mut |_| Ok(())).unwrap();
        for ((row, pair), logps) in rows.iter().zip(&pairs).zip(logps.as_chunks::<2>().0) {
            assert_eq!(pair.prompt.len() as u64, row["prompt_tokens"].as_u64().unwrap());
            let sides = [("chosen", &pair.chosen), ("rejected", &pair.rejected)];
            for ((side, tokens), logp) in sides.into_iter().zip(logps) {
                assert_eq!(tokens.len() as u64, row[format!("{side}_tokens")].as_u64().unwrap());
                let expected = row[format!("{side}_logp")].as_f64().unwrap();
                let error = (logp / expected - 1.0).abs();
                assert!(error < 1e-5, "{} line {} {side}: {logp} instead of {expected}", path.display(), pair.row);
                worst = worst.max(error);
                compared += 1;
            }
        }
    }
    println!("{compared} responses: largest relative difference {worst:.1e}");
    assert_eq!(compared, 64);
}
