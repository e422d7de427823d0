use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::generator::next_logits;
use super::sequence::Sequence;
use super::*;
use crate::batch::PackedBatch;
use crate::decoder::{Decoder, PackedModel};
use crate::mixture::Shared;
use crate::mixture::tests::adapted;
use crate::model::tests::tiny_config;
use crate::{Adapted, Adapter, LoraOptions, Model, ModelConfig, Scorer};

fn text(tokens: &[u32]) -> Result<String> {
    Ok(tokens.iter().map(|t| format!("<{t}>")).collect())
}

fn run(model: &Model, prompts: &[Vec<u32>], options: &SamplingOptions) -> Vec<Answer> {
    generate(model, prompts, options, &text, &mut |_| Ok(())).unwrap()
}

fn prompts() -> Vec<Vec<u32>> {
    vec![vec![1, 2, 3], vec![4], vec![5, 6, 7, 8, 9], vec![10, 1], vec![3, 3, 3]]
}

#[test]
fn a_prompt_that_comes_again_is_answered_as_if_it_did_not() {
    let [model, second] = [3, 4].map(|seed| Model::random(tiny_config(), 0.5, seed));
    let prompts = prompts();
    let in_a_row: Vec<Vec<u32>> = prompts.iter().flat_map(|prompt| std::iter::repeat_n(prompt.clone(), 7)).collect();
    for policy in [Mixture::from(&model), Mixture::new(&model, &second, 0.4).unwrap()] {
        for batch_size in [1, 3, 8, 64] {
            let options =
                SamplingOptions { max_new_tokens: 5, temperature: 1.0, batch_size, ..SamplingOptions::default() };
            let answers =
                |prompts: &[Vec<u32>]| generate(policy.clone(), prompts, &options, &text, &mut |_| Ok(())).unwrap();
            let together = answers(&in_a_row);
            for place in 0..7 {
                // every seventh stays, between prompts that differ from their neighbours
                let apart: Vec<Vec<u32>> = (0..in_a_row.len())
                    .map(|i| if i % 7 == place { in_a_row[i].clone() } else { vec![2, 1 + (i % 10) as u32, 5] })
                    .collect();
                let apart = answers(&apart);
                assert!((place..in_a_row.len()).step_by(7).all(|i| apart[i] == together[i]), "{batch_size}, {place}");
            }
        }
    }
}

#[test]
fn greedy_answers_are_the_likeliest_by_the_training_pass() {
    let model = Model::random(tiny_config(), 0.5, 3);
    let options = SamplingOptions { max_new_tokens: 6, ..SamplingOptions::default() };
    let mut decoder = Decoder::new(&model, 32);
    for (prompt, answer) in prompts().iter().zip(run(&model, &prompts(), &options)) {
        assert_eq!(answer.tokens.len(), 6);
        let mut so_far = prompt.clone();
        for &token in &answer.tokens {
            let mut batch = PackedBatch::default();
            let all: Vec<[u32; 1]> = (0..11).map(|t| [t]).collect();
            batch.push(&so_far, &all.iter().map(|t| &t[..]).collect::<Vec<_>>());
            let logps = decoder.logps(&model.weights, &batch);
            let best = (0..11).max_by(|&a, &b| logps[a].total_cmp(&logps[b])).unwrap();
            assert_eq!(best as u32, token);
            so_far.push(token);
        }
    }
}

#[test]
fn answers_do_not_depend_on_the_batch_size() {
    let model = Model::random(tiny_config(), 0.5, 4);
    for temperature in [0.0, 1.0] {
        let options = |batch_size| SamplingOptions {
            max_new_tokens: 9,
            temperature,
            batch_size,
            end_tokens: vec![0],
            ..SamplingOptions::default()
        };
        let alone = run(&model, &prompts(), &options(1));
        assert_eq!(alone, run(&model, &prompts(), &options(2)));
        assert_eq!(alone, run(&model, &prompts(), &options(16)));
    }
}

#[test]
fn sequences_that_join_later_and_beside_cancelled_ones_are_answered_as_alone() {
    let [model, second] = [3, 4].map(|seed| Model::random(tiny_config(), 0.5, seed));
    let own = |index: usize| SamplingOptions {
        max_new_tokens: 4 + 3 * index,
        temperature: index as f64 % 3.0,
        top_p: 0.9,
        seed: index as u64,
        ..SamplingOptions::default()
    };
    for policy in [Mixture::from(&model), Mixture::new(&model, &second, 0.4).unwrap()] {
        let generator = |batch_size| Generator::new(policy.clone(), 64, batch_size, &text);
        // the last two have the prompt of the one before them
        let mut prompts = prompts();
        prompts.extend([vec![3, 3, 3], vec![3, 3, 3]]);
        let alone: Vec<Answer> = (prompts.iter().enumerate())
            .map(|(index, prompt)| {
                generate(policy.clone(), std::slice::from_ref(prompt), &own(index), &text, &mut |_| Ok(()))
                    .unwrap()
                    .remove(0)
            })
            .collect();
        for (batch_size, apart) in [(1, 0), (2, 1), (3, 0), (8, 0), (8, 1), (8, 3)] {
            let mut generator = generator(batch_size);
            let mut expected = HashMap::new();
            let step = |generator: &mut Generator<'_>, expected: &mut HashMap<SequenceId, (usize, Vec<u32>)>| {
                for (id, progress) in generator.step() {
                    let (index, tokens) = expected.get_mut(&id).expect("it is not cancelled");
                    match progress.unwrap() {
                        Progress::Token(token) => tokens.push(token),
                        Progress::Finished(answer) => {
                            assert_eq!(answer, alone[*index], "{batch_size}, {apart}");
                            assert!(answer.tokens.starts_with(tokens) && tokens.len() + 1 >= answer.tokens.len());
                            expected.remove(&id);
                        }
                    }
                }
            };
            for (index, prompt) in prompts.iter().enumerate() {
                let cancelled = generator.add(prompt, Arc::new(own(index)), 0).unwrap();
                expected.insert(cancelled, (index, Vec::new()));
                let id = generator.add(prompt, Arc::new(own(index)), 0).unwrap();
                expected.insert(id, (index, Vec::new()));
                (0..apart).for_each(|_| step(&mut generator, &mut expected));
                generator.cancel(cancelled);
                expected.remove(&cancelled);
            }
            while !generator.is_empty() {
                step(&mut generator, &mut expected);
            }
            assert!(expected.is_empty());
        }
    }
}

#[test]
fn a_sequence_that_fails_leaves_the_others_alone() {
    let model = Model::random(tiny_config(), 0.5, 3);
    let decode = |tokens: &[u32]| match tokens.len() {
        3 => Err(Error::Failed("three".into())),
        _ => text(tokens),
    };
    let mut generator = Generator::new(&model, 64, 8, &decode);
    let options = SamplingOptions { max_new_tokens: 5, ..SamplingOptions::default() };
    let stopped = SamplingOptions { stop: vec!["?".into()], ..options.clone() };
    let failing = generator.add(vec![1, 2], Arc::new(stopped), 0).unwrap();
    let other = generator.add(vec![1, 2], Arc::new(options.clone()), 0).unwrap();
    let mut ends = Vec::new();
    while !generator.is_empty() {
        ends.extend(generator.step().into_iter().filter(|(_, progress)| !matches!(progress, Ok(Progress::Token(_)))));
    }
    let [(first, Err(error)), (second, Ok(Progress::Finished(answer)))] = &ends[..] else { panic!("{ends:?}") };
    assert_eq!((*first, *second, error.to_string().as_str()), (failing, other, "three"));
    assert_eq!(*answer, run(&model, &[vec![1, 2]], &options).remove(0));

    let mut refused = |prompt: Vec<u32>| generator.add(prompt, Arc::new(options.clone()), 0).unwrap_err().to_string();
    assert!(refused(vec![]).starts_with("The prompt has no tokens"));
    assert!(refused(vec![1; 64]).contains("64 tokens"));
    assert!(refused(vec![11]).contains("token 11"));
}

/// Sums over more numbers than a register holds, of which other orders would show in the last bits.
#[test]
fn the_bits_of_logits_do_not_depend_on_what_is_generated_with_them() {
    let shape = ModelConfig { hidden_size: 96, intermediate_size: 160, vocab_size: 300, ..tiny_config() };
    // heads of a width that single rows have attention of their own for, and others
    for head_dim in [32, shape.head_dim] {
        bits_do_not_depend_on_others(&Model::random(ModelConfig { head_dim, ..shape.clone() }, 0.3, 5));
    }
}

fn bits_do_not_depend_on_others(model: &Model) {
    let adapters = [3, 20].map(|rank| {
        let mut adapter = Adapter::new(model, LoraOptions { rank, ..LoraOptions::default() }, 1).unwrap();
        adapter.weights.iter_mut().enumerate().for_each(|(i, weight)| *weight += 0.01 * (i % 7) as f32);
        adapter
    });
    let [a, b] = adapters.each_ref().map(|adapter| Adapted { model, adapter: Some(adapter) });
    let others: Vec<Vec<u32>> = (0..40).map(|i| (0..i % 5 + 2).map(|j| 3 * i + j).collect()).collect();
    let policies = [model.into(), Mixture::new(a, b, 0.4).unwrap()];
    for (policy, dtype) in policies.iter().flat_map(|policy| Dtype::ALL.map(|dtype| (policy, dtype))) {
        let packed: Vec<_> = policy.passes().iter().map(|pass| PackedModel::new(pass, dtype)).collect();
        // of a prompt, and of the two tokens after it
        let logits = |others: &[Vec<u32>]| -> Vec<Vec<u32>> {
            let mut decoders = [Decoder::new(model, 16).with_precision(dtype.precision())];
            let prompts = std::iter::once(&[7, 8, 9][..]).chain(others.iter().map(Vec::as_slice));
            let options = Arc::new(SamplingOptions::default());
            let sequence = |prompt: &[u32]| Sequence::new(SequenceId(0), prompt.into(), options.clone(), 0, policy);
            let mut sequences: Vec<Sequence> = prompts.map(sequence).collect();
            let mut all = Vec::new();
            for token in [11, 12, 13] {
                let mut sum = Vec::new();
                let logits = next_logits(policy, &packed, &mut decoders, &mut sequences, &mut sum);
                all.push(logits[..300].iter().map(|logit| logit.to_bits()).collect());
                sequences.iter_mut().for_each(|sequence| sequence.pending = vec![token]);
            }
            all
        };
        let alone = logits(&[]);
        for count in [1, 3, 15, 16, 40] {
            assert!(alone == logits(&others[..count]), "with {count} others");
        }
    }
}

#[test]
fn fewer_bits_move_logits_by_their_rounding() {
    let (model, adapters) = adapted();
    let policies: Vec<Mixture<'_>> = vec![
        (&model).into(),
        Mixture::new(Adapted { model: &model, adapter: Some(&adapters[0].0) }, &model, 0.4).unwrap(),
        Mixture::new(Adapted { model: &model, adapter: Some(&adapters[2].0) }, &model, 0.4).unwrap(),
    ];
    for policy in policies {
        let [f32, bf16, int8] = Dtype::ALL.map(|dtype| {
            let packed: Vec<_> = policy.passes().iter().map(|pass| PackedModel::new(pass, dtype)).collect();
            let decoder = |pass: &Shared<'_>| Decoder::new(pass.model, 16).with_precision(dtype.precision());
            let mut decoders: Vec<_> = policy.passes().iter().map(decoder).collect();
            let options = Arc::new(SamplingOptions::default());
            let mut sequences = [Sequence::new(SequenceId(0), vec![1, 5, 3, 9], options, 0, &policy)];
            next_logits(&policy, &packed, &mut decoders, &mut sequences, &mut Vec::new()).to_vec()
        });
        let largest = f32.iter().fold(0f32, |m, l| m.max(l.abs()));
        for rounded in [bf16, int8] {
            let worst = f32.iter().zip(rounded).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            assert!(worst > 0.0 && worst < 0.05 * largest, "{worst} of {largest}");
        }
    }
}

#[test]
fn a_mixture_answers_as_it_scores_whatever_the_batch() {
    let [a, b] = [6, 7].map(|seed| Model::random(tiny_config(), 0.5, seed));
    let mixture = Mixture::new(&a, &b, 0.4).unwrap();
    let run = |batch_size, policy: Mixture<'_>| {
        let options = SamplingOptions { max_new_tokens: 5, batch_size, ..SamplingOptions::default() };
        generate(policy, &prompts(), &options, &text, &mut |_| Ok(())).unwrap()
    };
    let answers = run(16, mixture.clone());
    assert_eq!(answers, run(1, mixture.clone()));
    assert_ne!(answers, run(16, (&a).into()));
    assert_eq!(run(16, Mixture::new(&a, &b, 0.0).unwrap()), run(16, (&a).into()));
    let all: Vec<[u32; 1]> = (0..11).map(|t| [t]).collect();
    for (prompt, answer) in prompts().iter().zip(&answers) {
        let mut so_far = prompt.clone();
        for &token in &answer.tokens {
            let mut batch = PackedBatch::default();
            batch.push(&so_far, &all.iter().map(|t| &t[..]).collect::<Vec<_>>());
            let logps = Scorer::new(mixture.clone(), 32).logps(&batch);
            assert_eq!((0..11).max_by(|&a, &b| logps[a].total_cmp(&logps[b])), Some(token as usize));
            so_far.push(token);
        }
    }
}

#[test]
fn adapters_of_one_model_in_one_pass_answer_as_the_models_that_they_make() {
    let (model, adapters) = adapted();
    let with = |index: usize| Adapted { model: &model, adapter: Some(&adapters[index].0) };
    let pairs: [(Adapted<'_>, Adapted<'_>, [&Model; 2]); 3] = [
        (with(0), with(1), [&adapters[0].1, &adapters[1].1]),
        ((&model).into(), with(1), [&model, &adapters[1].1]),
        (with(2), with(0), [&adapters[2].1, &adapters[0].1]),
    ];
    for (a, b, folded) in pairs {
        let apart = Mixture::new(folded[0], folded[1], 0.4).unwrap();
        for (temperature, batch_size) in [(0.0, 1), (0.0, 3), (1.0, 1), (1.0, 3)] {
            let options = SamplingOptions { max_new_tokens: 9, temperature, batch_size, ..SamplingOptions::default() };
            let run = |policy| generate(policy, &prompts(), &options, &text, &mut |_| Ok(())).unwrap();
            assert_eq!(run(Mixture::new(a, b, 0.4).unwrap()), run(apart.clone()));
        }
    }
}

#[test]
fn samples_follow_the_distribution_and_its_cuts() {
    let logits = [0.0f32, 1.0, 2.0, -1.0];
    let draw = |options: &SamplingOptions| {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut counts = [0usize; 4];
        (0..20_000).for_each(|_| counts[choose(&logits, options, &mut rng).unwrap() as usize] += 1);
        counts.map(|c| c as f64 / 20_000.0)
    };
    let warm = SamplingOptions { temperature: 1.0, ..SamplingOptions::default() };
    let total: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
    for (share, l) in draw(&warm).iter().zip(logits) {
        assert!((share - f64::from(l).exp() / total).abs() < 0.015);
    }
    let eligible = |options: SamplingOptions| draw(&options).map(|s| s > 0.0);
    assert_eq!(eligible(SamplingOptions { top_k: 2, ..warm.clone() }), [false, true, true, false]);
    assert_eq!(eligible(SamplingOptions { top_p: 0.7, ..warm.clone() }), [false, true, true, false]);
    assert_eq!(eligible(SamplingOptions { top_p: 0.6, ..warm.clone() }), [false, false, true, false]);
    assert_eq!(eligible(SamplingOptions { min_p: 0.1, ..warm.clone() }), [true, true, true, false]);
    let greedy = |logits: &[f32]| choose(logits, &SamplingOptions::default(), &mut ChaCha8Rng::seed_from_u64(1));
    assert_eq!(greedy(&logits), Some(2));
    assert_eq!(greedy(&[-1.0, 3.0, 3.0, 0.0]), Some(1), "the first of equals");
    assert_eq!(greedy(&[f32::NEG_INFINITY, -5.0]), Some(1));
    assert_eq!(greedy(&[0.0, f32::NAN]), None);
}

#[test]
fn answers_end_at_end_tokens_stop_texts_and_limits() {
    let model = Model::random(tiny_config(), 0.5, 5);
    let prompt = vec![vec![1, 2]];
    let long = SamplingOptions { max_new_tokens: 500, ..SamplingOptions::default() };
    let answer = run(&model, &prompt, &long).remove(0);
    assert_eq!(answer.finish, Finish::Length);
    assert_eq!(answer.tokens.len(), tiny_config().max_position_embeddings - 2);
    let third = answer.tokens[2];
    let first_at = answer.tokens.iter().position(|&t| t == third).unwrap();
    let ended = run(&model, &prompt, &SamplingOptions { end_tokens: vec![third], ..long.clone() }).remove(0);
    assert_eq!((ended.finish, ended.tokens.as_slice()), (Finish::Stop, &answer.tokens[..first_at]));
    let stop = vec![format!("<{third}>")];
    let stopped = run(&model, &prompt, &SamplingOptions { stop, ..long }).remove(0);
    assert_eq!((stopped.finish, stopped.text), (Finish::Stop, text(&answer.tokens[..first_at]).unwrap()));
}

#[test]
fn bad_prompts_and_options_are_named() {
    let model = Model::random(tiny_config(), 0.5, 5);
    let fail = |prompts: &[Vec<u32>], options: SamplingOptions| {
        generate(&model, prompts, &options, &text, &mut |_| Ok(())).unwrap_err().to_string()
    };
    assert!(fail(&[vec![1], vec![]], SamplingOptions::default()).contains("Prompt 2"));
    assert!(fail(&[vec![1; 64]], SamplingOptions::default()).contains("64 tokens"));
    assert!(fail(&[vec![11]], SamplingOptions::default()).contains("token 11"));
    let hot = SamplingOptions { temperature: f64::NAN, ..SamplingOptions::default() };
    assert!(fail(&[vec![1]], hot).contains("temperature"));
    let mut broken = model.clone();
    broken.weights.fill(f32::NAN);
    let error = generate(&broken, &prompts()[..2], &SamplingOptions::default(), &text, &mut |_| Ok(())).unwrap_err();
    assert!(matches!(&error, Error::Failed(message) if message.starts_with("For prompt 2: ")), "{error}");
}
