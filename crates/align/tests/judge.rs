//! Judges against what they stand for: log-probabilities one by one, and the values of the quickstart world.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashSet;
use std::path::Path;

use align::data::{
    LongPrompts, Prompt, RenderOptions, TemplateTail, TokenizedPair, margins, set_margins, tokenize_pairs,
};
use align::judge::{Judge, relative_to};
use align::objective::{Pairwise, ScoreLoss};
use align::sequences::Sequences;
use align::task::{Preferences, Scored, Task};
use align::world::{EOS, Metric, UNKNOWN, World};
use common::pair;
use engine::checkpoint::{load_model, load_scorer};
use engine::{Mixture, Model, ModelConfig, PackedBatch, Scorer, Tokenizer};

/// Models of one small shape with random weights.
fn models<const N: usize>() -> [Model; N] {
    std::array::from_fn(|seed| Model::random(config(), 0.3, seed as u64))
}

fn config() -> ModelConfig {
    load_model(concat!(env!("CARGO_MANIFEST_DIR"), "/../engine/tests/fixtures/tiny/tied").as_ref()).unwrap().config
}

/// Prompts of two to four tokens with one to three responses of one to six.
fn texts() -> Vec<(Vec<u32>, Vec<Vec<u32>>)> {
    let tokens = |from: usize, count: usize| (0..count).map(|i| 3 + ((from * 7 + i * 13) % 90) as u32).collect();
    let of_item =
        |i: usize| (tokens(i, 2 + i % 3), (0..1 + i % 3).map(|k| tokens(i + 31 * (k + 1), 1 + (i + k) % 6)).collect());
    (0..20).map(of_item).collect()
}

fn items(texts: &[(Vec<u32>, Vec<Vec<u32>>)]) -> Vec<Sequences<'_>> {
    let rows = texts.iter().zip(1..);
    rows.map(|((prompt, responses), row)| Sequences {
        prompt,
        responses: responses.iter().map(Vec::as_slice).collect(),
        row,
    })
    .collect()
}

fn scores(judge: &Judge<'_>, items: &[Sequences<'_>], cache: Option<&Path>) -> Vec<Vec<f64>> {
    judge.scores(items, Some(64), cache, &mut |_| Ok(())).unwrap()
}

/// The same bits as of each item by itself, since batches and the cache change no log-probability and the arithmetic on them
/// is the same. A response without the others to its prompt has the same bits too.
#[test]
fn implicit_scores_are_scaled_log_ratios_of_each_item_alone() {
    let [a, b, start] = models();
    let (texts, temperature) = (texts(), 0.7);
    let items = items(&texts);
    for policy in [Mixture::from(&a), Mixture::new(&a, &b, 0.3).unwrap()] {
        let logps = |item: &Sequences<'_>, responses: &[&[u32]]| {
            let mut batch = PackedBatch::default();
            batch.push(item.prompt, responses);
            [policy.clone(), (&start).into()].map(|policy| Scorer::new(policy, 16).logps(&batch))
        };
        let of_item = |item: &Sequences<'_>| {
            let [policy, start] = logps(item, &item.responses);
            policy.iter().zip(start).map(|(policy, start)| temperature * (policy - start)).collect()
        };
        let expected: Vec<Vec<f64>> = items.iter().map(of_item).collect();
        for (item, expected) in items.iter().zip(&expected) {
            for (response, expected) in item.responses.iter().zip(expected) {
                let [policy, start] = logps(item, &[response]).map(|logps| logps[0]);
                assert_eq!(temperature * (policy - start), *expected);
            }
        }
        let judge = Judge::Implicit { policy: policy.clone(), start: (&start).into(), temperature };
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(scores(&judge, &items, Some(folder.path())), expected);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "one block of each policy is kept");
        let mut seen = vec![0];
        let mut progress = |done| {
            seen.push(done);
            Ok(())
        };
        assert_eq!(judge.scores(&items, Some(64), Some(folder.path()), &mut progress).unwrap(), expected);
        assert_eq!(seen, [0, 10, 20], "both blocks are read");
    }
}

#[test]
fn models_of_different_vocabularies_are_no_implicit_reward() {
    let [policy] = models();
    let start = Model::random(ModelConfig { vocab_size: 97, ..config() }, 0.3, 1);
    let judge = Judge::Implicit { policy: (&policy).into(), start: (&start).into(), temperature: 0.1 };
    let error = judge.scores(&items(&texts()), Some(64), None, &mut |_| Ok(())).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("has 96 tokens"), "{error}");
}

#[test]
fn the_quickstart_judge_knows_every_answer_and_nothing_else() {
    let world = World::new(2);
    for metric in [Metric::Reward, Metric::Safety] {
        let judge = Judge::Quickstart { world: &world, metric };
        for prompt in world.train_prompts.iter().chain(&world.heldout_prompts) {
            let tokens = world.prompt_tokens(prompt);
            let answers: Vec<Vec<u32>> = world.answers(prompt).iter().map(|a| world.answer_tokens(a)).collect();
            let score = |responses: Vec<&[u32]>| {
                scores(&judge, &[Sequences { prompt: &tokens, responses, row: 1 }], None).remove(0)
            };
            let values: Vec<f64> = world.answers(prompt).iter().map(|answer| answer.value(metric)).collect();
            assert_eq!(score(answers.iter().map(Vec::as_slice).collect()), values, "{}", prompt.text);

            let other = world.train_prompts.iter().find(|other| other.topic != prompt.topic).unwrap();
            let own: HashSet<&str> = world.answers(prompt).iter().map(|answer| answer.text.as_str()).collect();
            let foreign = world.answers(other).iter().filter(|answer| !own.contains(answer.text.as_str()));
            let mut outside: Vec<Vec<u32>> = foreign.map(|answer| world.answer_tokens(answer)).collect();
            assert_eq!(outside.len(), 28, "all answers that give the steps of the other request");
            for answer in &answers {
                outside.push(answer[..answer.len() - 1].to_vec());
                outside.push([answer.as_slice(), &[EOS]].concat());
            }
            outside.extend([vec![EOS], vec![UNKNOWN], tokens.clone()]);
            let found = score(outside.iter().map(Vec::as_slice).collect());
            assert!(found.iter().all(|score| *score == metric.outside()), "{}: {found:?}", prompt.text);
        }
    }
}

/// Pairs on their way from text to tokens stay what the judge knows, but for those that are cut.
#[test]
fn tokenised_pairs_of_the_world_have_the_values_of_their_texts() {
    let world = World::new(0);
    let drawn = world.preference_pairs(Metric::Safety, 500, 1);
    let pairs: Vec<_> = drawn.iter().map(|p| pair(Prompt::Text(p.prompt.clone()), &p.chosen, &p.rejected)).collect();
    let tokenizer = Tokenizer::from_json(&world.tokenizer_json(), Some("<s>"), Some("</s>"), None).unwrap();
    let options = RenderOptions { max_length: 26, template_tail: TemplateTail::Drop, long_prompts: LongPrompts::Error };
    let tokenized = tokenize_pairs(&pairs, &|row| row.to_string(), &tokenizer, &options).unwrap();
    let items: Vec<_> = tokenized.rows.iter().map(TokenizedPair::sequences).collect();
    let found = scores(&Judge::Quickstart { world: &world, metric: Metric::Safety }, &items, None);
    let mut cut = 0;
    for ((pair, item), scores) in drawn.iter().zip(&items).zip(&found) {
        let prompt = world.train_prompts.iter().find(|prompt| prompt.text == pair.prompt).unwrap();
        for ((text, tokens), score) in [&pair.chosen, &pair.rejected].into_iter().zip(&item.responses).zip(scores) {
            let value = world.answers(prompt).iter().find(|answer| answer.text == *text).unwrap().safety;
            let whole = tokens.ends_with(&[EOS]);
            cut += usize::from(!whole);
            assert_eq!(*score, if whole { value } else { Metric::Safety.outside() }, "{text}");
        }
    }
    assert!(cut == tokenized.truncated_responses && (50..500).contains(&cut), "{cut} responses are cut");
}

#[test]
fn a_prompt_that_the_world_does_not_have_is_named() {
    let world = World::new(0);
    let judge = Judge::Quickstart { world: &world, metric: Metric::Safety };
    let known = world.prompt_tokens(&world.train_prompts[0]);
    let item = |prompt, row| Sequences { prompt, responses: vec![&[EOS]], row };
    let error = judge.scores(&[item(&known, 3), item(&known[1..], 4)], Some(64), None, &mut |_| Ok(())).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("row 4"), "{error}");
}

#[test]
fn scores_relative_to_the_base_have_its_mean_at_zero() {
    let base = vec![vec![1.0, 3.0], vec![-4.0]];
    let mut own = base.clone();
    relative_to(&mut own, &base);
    assert_eq!(own, [vec![-1.0, 1.0], vec![0.0]]);
    // a constant per prompt, as an implicit reward leaves open, does not matter
    let shifted: Vec<Vec<f64>> = base.iter().zip([5.0, 7.0]).map(|(r, c)| r.iter().map(|g| g + c).collect()).collect();
    let [mut scores, mut raised] =
        [[0.0, 0.0], [5.0, 7.0]].map(|[a, b]| vec![vec![2.0 + a, 6.0 + a, a], vec![1.0 + b]]);
    relative_to(&mut scores, &base);
    relative_to(&mut raised, &shifted);
    assert_eq!(scores, [vec![0.0, 4.0, -2.0], vec![5.0]]);
    assert_eq!(raised, scores);
}

/// `modpo` from the base model with margins by an implicit judge is the second step of `dpo`, to rounding in f64.
#[test]
fn implicit_margins_make_modpo_the_second_step() {
    let [base, helpful, policy] = models();
    let (beta, lambda) = (0.3, 0.8);
    let responses = |i: u32| [vec![3 + i, 40, 2].into(), vec![50 + i, 2].into()];
    let mut pairs: Vec<TokenizedPair> = (0..30)
        .map(|i| {
            let [chosen, rejected] = responses(i);
            TokenizedPair { prompt: [1, 5 + i].into(), chosen, rejected, is_unsafe: None, margin: None, row: 1 }
        })
        .collect();
    let unmarked = pairs.clone();
    let items: Vec<_> = unmarked.iter().map(TokenizedPair::sequences).collect();
    let judge = Judge::Implicit { policy: (&helpful).into(), start: (&base).into(), temperature: beta };
    set_margins(&mut pairs, &margins(&[scores(&judge, &items, None)], &[1.0]));

    let logps = |model: &Model| align::reference::logps(model, &items, Some(64), None, &mut |_| Ok(())).unwrap();
    let [of_base, of_helpful, of_policy] = [&base, &helpful, &policy].map(logps);
    let (base_logps, helpful_logps) = (of_base.as_chunks::<2>().0, of_helpful.as_chunks::<2>().0);
    let modpo = Pairwise::Modpo { beta, weight: lambda };
    let dpo = Pairwise::Dpo { beta: beta / lambda, label_smoothing: 0.0 };
    let at_once = Preferences::new(&pairs, base_logps, &base, &modpo);
    let stepwise = Preferences::new(&unmarked, helpful_logps, &helpful, &dpo);
    for (example, logps) in of_policy.as_chunks::<2>().0.iter().enumerate() {
        let scored = logps.map(|logp| Scored { logp, kl: 0.0 });
        let [a, b] = [&at_once, &stepwise].map(|task| task.evaluate(example, &scored, 0.0));
        assert!((a.loss - b.loss).abs() <= 1e-12 * (1.0 + b.loss), "{a:?} {b:?}");
        assert!((a.derivatives[0].logp - b.derivatives[0].logp).abs() <= 1e-12, "{a:?} {b:?}");
    }
}

/// Costs count with the other sign; padding at the end of a response is not part of it, as in transformers; and the cache
/// changes nothing.
#[test]
fn scores_of_models_are_transformers() {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../engine/tests/fixtures/score"));
    let model = load_scorer(folder).unwrap();
    let fixture: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(folder.join("expected.json")).unwrap()).unwrap();
    let ids = |value: &serde_json::Value| -> Vec<u32> {
        value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
    };
    let sequences = fixture["sequences"].as_array().unwrap();
    let texts: Vec<(Vec<u32>, Vec<Vec<u32>>)> =
        sequences.iter().map(|sequence| (ids(&sequence[0]), vec![ids(&sequence[1]), vec![3, 3]])).collect();
    let items = items(&texts);
    let cache = tempfile::tempdir().unwrap();
    let rewards = scores(&Judge::Model { model: &model, loss: ScoreLoss::Reward }, &items, Some(cache.path()));
    for (rewards, expected) in rewards.iter().zip(fixture["scores"].as_array().unwrap()) {
        let expected = expected.as_f64().unwrap();
        assert!((rewards[0] - expected).abs() < 1e-5 * expected.abs().max(1.0), "{} not {expected}", rewards[0]);
        // nothing but padding: the score of the prompt
        assert!(rewards[1].is_finite() && rewards[1] != rewards[0]);
    }
    let costs = scores(&Judge::Model { model: &model, loss: ScoreLoss::Cost }, &items, Some(cache.path()));
    assert!(rewards.iter().flatten().zip(costs.iter().flatten()).all(|(reward, cost)| *reward == -cost));
    assert_eq!(std::fs::read_dir(cache.path()).unwrap().count(), 1, "the scores are read, not computed again");
    let [policy] = models();
    let error =
        Judge::Model { model: &policy, loss: ScoreLoss::Reward }.scores(&items, Some(64), None, &mut |_| Ok(()));
    assert!(error.unwrap_err().to_string().contains("does not score"));
}
