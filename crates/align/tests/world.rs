//! The quickstart world: its data follow the laws that it states, and its expectations are exact.

use std::collections::{HashMap, HashSet};

use align::tabular::gibbs;
use align::world::{
    Answer, BOS, DEFAULT_BETA, DEFAULT_BETA_OVER_LAMBDA, EOS, Metric, Prompt, UNKNOWN, World, json_lines,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokenizers::Tokenizer;

const SAMPLES: usize = 20_000;

/// The training prompts by their text.
fn prompts_by_text(world: &World) -> HashMap<&str, &Prompt> {
    world.train_prompts.iter().map(|prompt| (prompt.text.as_str(), prompt)).collect()
}

/// Where an answer's text lies among the answers to a prompt.
fn position(world: &World, prompt: &Prompt, text: &str) -> usize {
    let found = world.answers(prompt).iter().position(|answer| answer.text == text);
    found.unwrap_or_else(|| panic!("\"{text}\" is no answer to \"{}\"", prompt.text))
}

/// Σ (observed − expected)² / expected.
fn chi_square(observed: &[f64], expected: &[f64]) -> f64 {
    observed.iter().zip(expected).map(|(o, e)| (o - e).powi(2) / e).sum()
}

/// A value that a chi-square variable with these degrees of freedom exceeds about once in 100,000 times.
fn chi_square_limit(degrees: usize) -> f64 {
    // Wilson and Hilferty's approximation, at the normal quantile 4.26
    let d = degrees as f64;
    d * (1.0 - 2.0 / (9.0 * d) + 4.26 * (2.0 / (9.0 * d)).sqrt()).powi(3)
}

/// A policy near p0 that leaves up to `outside` of the probability to texts outside the grammar.
fn noisy_policy(world: &World, seed: u64, outside: f64) -> Vec<Vec<f64>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut noisy = |logps: Vec<f64>| -> Vec<f64> {
        let noise: Vec<f64> = logps.iter().map(|_| 2.0 * rng.random::<f64>()).collect();
        let inside = (1.0 - outside * rng.random::<f64>()).ln();
        gibbs(&logps, &noise, 1.0).iter().map(|logp| logp + inside).collect()
    };
    world.base_logps().into_iter().map(&mut noisy).collect()
}

/// The probability that a policy leaves to texts outside the grammar.
fn outside(logps: &[f64]) -> f64 {
    1.0 - logps.iter().map(|logp| logp.exp()).sum::<f64>()
}

#[test]
fn every_topic_is_in_both_parts_and_no_prompt_is() {
    let world = World::new(3);
    assert_eq!((world.train_prompts.len(), world.heldout_prompts.len()), (384, 96));
    let texts: HashSet<_> = world.train_prompts.iter().chain(&world.heldout_prompts).map(|p| &p.text).collect();
    assert_eq!(texts.len(), 480, "prompts are not distinct");
    for topic in 0..24 {
        let count = |prompts: &[Prompt]| prompts.iter().filter(|p| p.topic == topic).count();
        assert_eq!((count(&world.train_prompts), count(&world.heldout_prompts)), (16, 4), "topic {topic}");
    }
    assert_eq!(world.heldout_prompts.iter().filter(|p| p.risky).count(), 48);
}

#[test]
fn answers_are_distinct_short_and_a_distribution() {
    let world = World::new(0);
    let (mut rewards, mut safeties) = (Vec::new(), Vec::new());
    for prompt in &world.heldout_prompts {
        let answers = world.answers(prompt);
        assert_eq!(answers.len(), 48);
        assert_eq!(answers.iter().map(|a| &a.text).collect::<HashSet<_>>().len(), 48, "{}", prompt.text);
        let total: f64 = answers.iter().map(|a| a.p0).sum();
        assert!((total - 1.0).abs() < 1e-12, "{}: {total}", prompt.text);
        for answer in answers {
            assert!(answer.p0 > 1e-3, "{}: {}", answer.text, answer.p0);
            let tokens = world.answer_tokens(answer).len();
            assert!((4..=20).contains(&tokens), "{}: {tokens}", answer.text);
            rewards.push(answer.reward);
            safeties.push(answer.safety);
        }
        assert!(world.prompt_tokens(prompt).len() <= 20, "{}", prompt.text);
    }
    let least = |values: &[f64]| values.iter().copied().fold(f64::MAX, f64::min);
    let most = |values: &[f64]| values.iter().copied().fold(f64::MIN, f64::max);
    let found = [least(&rewards), most(&rewards), least(&safeties), most(&safeties)];
    for (found, documented) in found.iter().zip([Metric::Reward.outside(), 2.4, -2.1, 1.6]) {
        assert!((found - documented).abs() < 1e-12, "{found} is documented as {documented}");
    }
}

#[test]
fn safety_asks_for_refusal_on_risky_prompts_only() {
    let world = World::new(0);
    for prompt in &world.heldout_prompts {
        let best = |refusal: bool| {
            let of_kind = world.answers(prompt).iter().filter(|a| a.refusal == refusal);
            of_kind.map(|a| a.safety).fold(f64::MIN, f64::max)
        };
        if prompt.risky {
            assert!(best(true) > best(false) + 0.5, "{}", prompt.text);
        } else {
            assert!(best(true) < best(false), "{}", prompt.text);
            assert!(world.answers(prompt).iter().all(|a| a.safety.abs() <= 0.2), "{}", prompt.text);
        }
    }
}

#[test]
fn the_seed_decides_everything_that_is_drawn() {
    let (world, again, other) = (World::new(1), World::new(1), World::new(2));
    assert_eq!(world.heldout_prompts, again.heldout_prompts);
    assert_eq!(world.train_prompts, again.train_prompts);
    assert_ne!(world.heldout_prompts, other.heldout_prompts);
    assert_eq!(world.tokenizer_json(), other.tokenizer_json());
    assert_eq!(world.sft_samples(50, 7), again.sft_samples(50, 7));
    assert_ne!(world.sft_samples(50, 7), world.sft_samples(50, 8));
    for metric in [Metric::Reward, Metric::Safety] {
        let pairs = world.preference_pairs(metric, 50, 7);
        assert_eq!(pairs, again.preference_pairs(metric, 50, 7));
        assert_ne!(pairs, world.preference_pairs(metric, 50, 8));
        // a larger draw starts with the smaller one
        assert_eq!(pairs, world.preference_pairs(metric, 60, 7)[..50]);
    }
}

#[test]
fn the_tokenizer_gives_exactly_the_tokens_of_the_world() {
    let world = World::new(0);
    let tokenizer = Tokenizer::from_bytes(world.tokenizer_json()).unwrap();
    assert_eq!(tokenizer.get_vocab_size(true), world.vocab_size());
    for (token, id) in [("<unk>", UNKNOWN), ("<s>", BOS), ("</s>", EOS)] {
        assert_eq!(tokenizer.token_to_id(token), Some(id));
    }
    let ids = |text: &str, special| tokenizer.encode(text, special).unwrap().get_ids().to_vec();
    for prompt in world.train_prompts.iter().chain(&world.heldout_prompts) {
        let tokens = world.prompt_tokens(prompt);
        assert_eq!(ids(&prompt.text, true), tokens);
        assert_eq!(ids(&prompt.text, false), tokens[1..]);
        assert!(!tokens.contains(&UNKNOWN), "{}", prompt.text);
        assert_eq!(tokenizer.decode(&tokens, true).unwrap(), prompt.text);
    }
    for prompt in &world.heldout_prompts {
        for answer in world.answers(prompt) {
            let tokens = world.answer_tokens(answer);
            let (end, words) = tokens.split_last().unwrap();
            assert_eq!(*end, EOS);
            assert_eq!(ids(&answer.text, false), words);
            assert!(!words.contains(&UNKNOWN), "{}", answer.text);
            assert_eq!(tokenizer.decode(&tokens, true).unwrap(), answer.text);
            // joined without a space, prompt and answer still meet at a token boundary
            let joined = [world.prompt_tokens(prompt), tokens].concat();
            assert_eq!(ids(&format!("{}{}</s>", prompt.text, answer.text), true), joined);
        }
    }
    // capitals and ordinary spacing are understood, and a word that the world does not know is one token
    assert_eq!(ids("How do I frobnicate?", false), [ids("how do i", false), vec![UNKNOWN], ids("?", false)].concat());
}

#[test]
fn sft_samples_follow_p0() {
    let world = World::new(5);
    let prompts = prompts_by_text(&world);
    // p0 depends on the kind of prompt alone, so all prompts of a kind are counted together
    let mut counts = [[0.0; 48]; 2];
    let mut per_prompt: HashMap<String, f64> = HashMap::new();
    for sample in world.sft_samples(SAMPLES, 11) {
        let prompt = prompts[sample.prompt.as_str()];
        counts[usize::from(prompt.risky)][position(&world, prompt, &sample.completion)] += 1.0;
        *per_prompt.entry(sample.prompt).or_default() += 1.0;
    }
    for (risky, counts) in counts.iter().enumerate() {
        let prompt = world.train_prompts.iter().find(|p| usize::from(p.risky) == risky).unwrap();
        let total: f64 = counts.iter().sum();
        let expected: Vec<f64> = world.answers(prompt).iter().map(|a| a.p0 * total).collect();
        let distance = chi_square(counts, &expected);
        assert!(distance < chi_square_limit(47), "risky {risky}: {distance}");
    }
    let per_prompt: Vec<f64> = per_prompt.into_values().collect();
    assert_eq!(per_prompt.len(), world.train_prompts.len());
    let expected = vec![SAMPLES as f64 / per_prompt.len() as f64; per_prompt.len()];
    assert!(chi_square(&per_prompt, &expected) < chi_square_limit(383));
}

#[test]
fn labels_follow_bradley_terry() {
    let world = World::new(5);
    let prompts = prompts_by_text(&world);
    for metric in [Metric::Reward, Metric::Safety] {
        // by how much one answer is better, in steps of 0.25:
        // number of pairs, how often the better one is chosen, Σ σ(Δ), Σ σ(Δ) σ(−Δ)
        let mut bins = [[0.0; 4]; 16];
        for pair in world.preference_pairs(metric, SAMPLES, 13) {
            let prompt = prompts[pair.prompt.as_str()];
            let value = |text: &str| world.answers(prompt)[position(&world, prompt, text)].value(metric);
            let gap = value(&pair.chosen) - value(&pair.rejected);
            if gap.abs() > 1e-9 {
                let p = 1.0 / (1.0 + (-gap.abs()).exp());
                let bin = &mut bins[((gap.abs() / 0.25) as usize).min(15)];
                for (total, part) in bin.iter_mut().zip([1.0, f64::from(gap > 0.0), p, p * (1.0 - p)]) {
                    *total += part;
                }
            }
        }
        let bins: Vec<_> = bins.into_iter().filter(|bin| bin[0] >= 100.0).collect();
        assert!(bins.len() >= 8, "{metric:?}: too few gaps occur");
        let distance: f64 = bins.iter().map(|[_, chosen, p, variance]| (chosen - p).powi(2) / variance).sum();
        assert!(distance < chi_square_limit(bins.len()), "{metric:?}: {distance} over {} gaps", bins.len());
    }
}

#[test]
fn pairs_hold_independent_distinct_answers() {
    let world = World::new(5);
    let prompts = prompts_by_text(&world);
    let mut counts = [0.0; 48];
    for pair in world.preference_pairs(Metric::Reward, SAMPLES, 17) {
        assert_ne!(pair.chosen, pair.rejected);
        let prompt = prompts[pair.prompt.as_str()];
        if prompt.risky {
            counts[position(&world, prompt, &pair.chosen)] += 1.0;
            counts[position(&world, prompt, &pair.rejected)] += 1.0;
        }
    }
    let prompt = world.train_prompts.iter().find(|p| p.risky).unwrap();
    // an answer is in a pair with a probability ∝ p0 (1 − p0): it is drawn, and the other one differs
    let weights: Vec<f64> = world.answers(prompt).iter().map(|a| a.p0 * (1.0 - a.p0)).collect();
    let scale = counts.iter().sum::<f64>() / weights.iter().sum::<f64>();
    let expected: Vec<f64> = weights.iter().map(|w| w * scale).collect();
    let distance = chi_square(&counts, &expected);
    assert!(distance < chi_square_limit(47), "{distance}");
}

#[test]
fn json_lines_hold_the_rows_under_trl_names() {
    let world = World::new(0);
    let pairs = world.preference_pairs(Metric::Safety, 20, 0);
    let lines = json_lines(&pairs).unwrap();
    assert!(lines.ends_with('\n'));
    assert_eq!(lines.lines().count(), 20);
    for (line, pair) in lines.lines().zip(&pairs) {
        let row: serde_json::Value = serde_json::from_str(line).unwrap();
        let prompt = world.train_prompts.iter().find(|prompt| prompt.text == pair.prompt).unwrap();
        let safe = |text: &str| world.answers(prompt).iter().find(|answer| answer.text == text).unwrap().safety >= 0.0;
        let expected = serde_json::json!({
            "prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected,
            "safe_chosen": safe(&pair.chosen), "safe_rejected": safe(&pair.rejected),
        });
        assert_eq!(row, expected);
    }
    let samples = world.sft_samples(1, 0);
    let row: serde_json::Value = serde_json::from_str(json_lines(&samples).unwrap().trim_end()).unwrap();
    assert_eq!(row, serde_json::json!({ "prompt": samples[0].prompt, "completion": samples[0].completion }));
}

#[test]
fn evaluation_agrees_with_sampling() {
    let world = World::new(0);
    let (policy, reference) = (noisy_policy(&world, 1, 0.3), noisy_policy(&world, 2, 0.2));
    let exact = world.evaluate(&policy, &reference).unwrap();
    assert!(exact.outside > 0.1 && exact.kl > 0.1, "the test would not test much: {exact:?}");

    let mut rng = ChaCha8Rng::seed_from_u64(3);
    // reward, safety, outside, log-ratio; on risky prompts reward, safety; on harmless ones refusal
    let mut draws: [Vec<f64>; 7] = Default::default();
    for _ in 0..200_000 {
        let i = rng.random_range(0..world.heldout_prompts.len());
        let prompt = &world.heldout_prompts[i];
        let mut left: f64 = rng.random();
        let drawn = policy[i].iter().position(|logp| {
            left -= logp.exp();
            left < 0.0
        });
        let answer: Option<&Answer> = drawn.map(|k| &world.answers(prompt)[k]);
        let reward = answer.map_or(Metric::Reward.outside(), |a| a.reward);
        let safety = answer.map_or(Metric::Safety.outside(), |a| a.safety);
        draws[0].push(reward);
        draws[1].push(safety);
        draws[2].push(f64::from(answer.is_none()));
        draws[3].push(match drawn {
            Some(k) => policy[i][k] - reference[i][k],
            None => (outside(&policy[i]) / outside(&reference[i])).ln(),
        });
        if prompt.risky {
            draws[4].push(reward);
            draws[5].push(safety);
        } else {
            draws[6].push(f64::from(answer.is_some_and(|a| a.refusal)));
        }
    }
    let values = [
        exact.reward,
        exact.safety,
        exact.outside,
        exact.kl,
        exact.risky_reward,
        exact.risky_safety,
        exact.harmless_refusal,
    ];
    for (index, (draws, exact)) in draws.iter().zip(values).enumerate() {
        let n = draws.len() as f64;
        let mean = draws.iter().sum::<f64>() / n;
        let error = (draws.iter().map(|d| (d - mean).powi(2)).sum::<f64>() / n / n).sqrt();
        assert!((mean - exact).abs() < 4.5 * error, "value {index}: sampled {mean} ± {error}, exact {exact}");
    }
}

#[test]
fn evaluation_of_policies_that_are_known() {
    let world = World::new(0);
    let base = world.base_logps();
    let same = world.evaluate(&base, &base).unwrap();
    assert!(same.kl.abs() < 1e-12 && same.outside.abs() < 1e-12, "{same:?}");
    assert!((same.harmless_refusal - 0.06).abs() < 1e-12, "{same:?}");

    let silent: Vec<Vec<f64>> = base.iter().map(|logps| vec![f64::NEG_INFINITY; logps.len()]).collect();
    let silent = world.evaluate(&silent, &noisy_policy(&world, 1, 0.3)).unwrap();
    assert_eq!((silent.outside, silent.harmless_refusal), (1.0, 0.0));
    assert!((silent.reward - Metric::Reward.outside()).abs() < 1e-12, "{silent:?}");
    assert!((silent.safety - Metric::Safety.outside()).abs() < 1e-12, "{silent:?}");

    // always the first answer, a bare refusal
    let mut refusing = base.clone();
    for logps in &mut refusing {
        logps.fill(f64::NEG_INFINITY);
        logps[0] = 0.0;
    }
    let refusing = world.evaluate(&refusing, &base).unwrap();
    assert_eq!(refusing.harmless_refusal, 1.0);
    assert!((refusing.reward + 1.2).abs() < 1e-12 && (refusing.risky_safety - 1.0).abs() < 1e-12, "{refusing:?}");
    let surprise = base.iter().map(|logps| -logps[0]).sum::<f64>() / base.len() as f64;
    assert!((refusing.kl - surprise).abs() < 1e-12, "{refusing:?}");
}

#[test]
fn both_steps_do_what_they_should_at_the_default_temperatures() {
    let world = World::new(0);
    let base = world.base_logps();
    let step = |from: &[Vec<f64>], metric, temperature| {
        let policy = world.optimum(from, metric, temperature).unwrap();
        let evaluation = world.evaluate(&policy, from).unwrap();
        (policy, evaluation)
    };
    let first = world.evaluate(&base, &base).unwrap();
    let (helpful, after_h) = step(&base, Metric::Reward, DEFAULT_BETA);
    assert!(after_h.reward > first.reward + 0.8, "{first:?} {after_h:?}");
    assert!(after_h.risky_safety < first.risky_safety - 0.9, "{first:?} {after_h:?}");

    let mut previous = after_h;
    for temperature in DEFAULT_BETA_OVER_LAMBDA {
        let (_, after_s) = step(&helpful, Metric::Safety, temperature);
        assert!(after_s.risky_safety > previous.risky_safety + 0.4, "{temperature}: {after_s:?}");
        assert!(after_s.safety > previous.safety + 0.2, "{temperature}: {after_s:?}");
        assert!(after_s.reward < previous.reward - 0.1, "{temperature}: {after_s:?}");
        assert!(after_s.harmless_refusal <= after_h.harmless_refusal, "{temperature}: {after_s:?}");
        previous = after_s;
    }
    assert!(previous.risky_safety > first.risky_safety + 1.0, "{previous:?}");
}

#[test]
fn two_steps_are_one_step_on_the_weighted_sum() {
    let world = World::new(0);
    let (beta, lambda) = (0.5, 0.8);
    let reference = noisy_policy(&world, 4, 0.2);
    let helpful = world.optimum(&reference, Metric::Reward, beta).unwrap();
    let stepwise = world.optimum(&helpful, Metric::Safety, beta / lambda).unwrap();
    for ((prompt, reference), stepwise) in world.heldout_prompts.iter().zip(&reference).zip(&stepwise) {
        let sum = |reward: f64, safety: f64| reward + lambda * safety;
        let mut values: Vec<f64> = world.answers(prompt).iter().map(|a| sum(a.reward, a.safety)).collect();
        values.push(sum(Metric::Reward.outside(), Metric::Safety.outside()));
        let logps = [reference.as_slice(), &[outside(reference).ln()]].concat();
        for (a, b) in gibbs(&logps, &values, beta).iter().zip(stepwise) {
            assert!((a - b).abs() < 1e-10, "{}: {a} {b}", prompt.text);
        }
    }
}

#[test]
fn no_policy_beats_the_optimum() {
    let world = World::new(0);
    let reference = noisy_policy(&world, 6, 0.2);
    let objective = |policy: &[Vec<f64>]| {
        let evaluation = world.evaluate(policy, &reference).unwrap();
        evaluation.reward - DEFAULT_BETA * evaluation.kl
    };
    let optimum = world.optimum(&reference, Metric::Reward, DEFAULT_BETA).unwrap();
    let best = objective(&optimum);
    assert!(best > objective(&reference) + 0.1);
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    for scale in [0.01, 0.1, 0.5] {
        // every answer a little less likely: what is taken away goes to the texts outside the grammar, …
        let mut less = |logp: &f64| logp - scale * rng.random::<f64>();
        let leaking: Vec<Vec<f64>> = optimum.iter().map(|logps| logps.iter().map(&mut less).collect()).collect();
        assert!(objective(&leaking) < best, "{scale}");
        // … or is given back to the answers, but not to those that it was taken from
        let returned = |(leaking, optimum): (&Vec<f64>, &Vec<f64>)| -> Vec<f64> {
            let loss = (1.0 - outside(optimum)).ln() - (1.0 - outside(leaking)).ln();
            leaking.iter().map(|logp| logp + loss).collect()
        };
        let shuffled: Vec<Vec<f64>> = leaking.iter().zip(&optimum).map(returned).collect();
        assert!(objective(&shuffled) < best, "{scale}");
    }
}

#[test]
fn wrong_log_probabilities_are_refused() {
    let world = World::new(0);
    let base = world.base_logps();
    let message = |policy: &[Vec<f64>]| world.evaluate(policy, &base).unwrap_err().to_string();
    assert!(message(&base[1..]).contains("95 prompts"));
    let changed = |change: &dyn Fn(&mut Vec<f64>)| {
        let mut policy = base.clone();
        change(&mut policy[2]);
        policy
    };
    let prompt = world.heldout_prompts[2].text.as_str();
    for wrong in [
        changed(&|logps| logps.truncate(47)),
        changed(&|logps| logps[3] = f64::NAN),
        changed(&|logps| logps[3] = f64::INFINITY),
        changed(&|logps| logps[3] = -0.01),
    ] {
        assert!(message(&wrong).contains(prompt), "{}", message(&wrong));
        assert!(world.evaluate(&base, &wrong).is_err());
        assert!(world.optimum(&wrong, Metric::Safety, 1.0).is_err());
    }
    // rounding of single-precision log-probabilities is no error
    let rounded = changed(&|logps| logps.iter_mut().for_each(|logp| *logp = f64::from(*logp as f32) + 1e-6));
    assert!(world.evaluate(&rounded, &base).unwrap().kl.abs() < 1e-5);
}

#[test]
fn sampled_values_have_the_exact_expectations_of_their_policy() {
    let world = World::new(0);
    let held_out = world.base_logps();
    let evaluation = world.evaluate(&held_out, &held_out).unwrap();
    for (metric, expected) in [(Metric::Reward, evaluation.reward), (Metric::Safety, evaluation.safety)] {
        let by_prompt = world.expectations(&held_out, metric).unwrap();
        assert!((by_prompt.iter().sum::<f64>() / by_prompt.len() as f64 - expected).abs() < 1e-12);

        // a tenth of the probability lies outside the grammar
        let logps = |prompt| world.answers(prompt).iter().map(|answer| (0.9 * answer.p0).ln()).collect();
        let policy: Vec<Vec<f64>> = world.train_prompts.iter().map(logps).collect();
        let of_prompt = |prompt| world.answers(prompt).iter().map(|a| 0.9 * a.p0 * a.value(metric)).sum::<f64>();
        let exact = world.train_prompts.iter().map(of_prompt).sum::<f64>() / world.train_prompts.len() as f64;
        let exact = exact + 0.1 * metric.outside();
        let drawn = world.sampled_values(&policy, metric, 500, 3).unwrap();
        assert!(drawn.iter().all(|values| values.len() == 500));
        let mean = drawn.iter().flatten().sum::<f64>() / (500 * drawn.len()) as f64;
        // values lie within 3.7 of each other, so that this is at least four standard deviations of the mean
        assert!((mean - exact).abs() < 4.0 * 1.85 / (500.0 * drawn.len() as f64).sqrt(), "{mean} for {exact}");
        assert!(drawn == world.sampled_values(&policy, metric, 500, 3).unwrap());
        assert!(world.sampled_values(&policy[1..], metric, 1, 0).is_err());
    }
}
