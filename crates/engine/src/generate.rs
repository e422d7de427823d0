//! Generation: cached keys and values, continuous batching, greedy and random sampling.

mod sequence;

use rand::Rng;
use rand::distr::{Distribution, StandardUniform};

use crate::decoder::Decoder;
use crate::error::{Error, Result};
use crate::mixture::Mixture;
use sequence::{PassCache, SeenPrompt, Sequence};

/// How the next token is chosen, and when an answer ends.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingOptions {
    /// The longest answer in tokens.
    pub max_new_tokens: usize,
    /// 0 takes the likeliest token; otherwise logits are divided by this.
    pub temperature: f64,
    /// Only this many likeliest tokens are eligible; 0 for all.
    pub top_k: usize,
    /// Only the likeliest tokens that together reach this probability are eligible; 1 for all.
    pub top_p: f64,
    /// Only tokens at least this likely relative to the likeliest are eligible; 0 for all.
    pub min_p: f64,
    /// Each prompt draws from its own stream of this seed, so answers do not depend on the batch size.
    pub seed: u64,
    /// Tokens that end an answer; they are not part of it.
    pub end_tokens: Vec<u32>,
    /// Texts that end an answer; the answer's text is cut before them.
    pub stop: Vec<String>,
    /// Answers generated at once.
    pub batch_size: usize,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        Self {
            max_new_tokens: 256,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            end_tokens: Vec::new(),
            stop: Vec::new(),
            batch_size: 16,
        }
    }
}

impl SamplingOptions {
    /// Checks the ranges of all options.
    ///
    /// # Errors
    /// [`Error::Input`] that names the option and its range.
    pub fn validate(&self) -> Result<()> {
        let wrong = |name: &str, value: f64, range: &str| {
            Err(Error::input(format!("{name} is {value}, but must be {range}. Choose a value in that range.")))
        };
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return wrong("temperature", self.temperature, "a finite number of at least 0");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return wrong("top_p", self.top_p, "above 0 and at most 1");
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return wrong("min_p", self.min_p, "from 0 to 1");
        }
        if self.max_new_tokens == 0 {
            return wrong("max_new_tokens", 0.0, "at least 1");
        }
        if self.batch_size == 0 {
            return wrong("batch_size", 0.0, "at least 1");
        }
        if self.stop.iter().any(String::is_empty) {
            return Err(Error::input("A stop text is empty and would end every answer at once. Remove it."));
        }
        Ok(())
    }
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// An end token or a stop text came.
    Stop,
    /// The answer reached its limit, or the context was full.
    Length,
}

/// One generated answer.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Answer {
    /// The generated tokens, without the end token.
    pub tokens: Vec<u32>,
    /// Their text, cut before the first stop text.
    pub text: String,
    /// Why the answer ended.
    pub finish: Finish,
    /// The end token, if one ended the answer.
    #[serde(skip)]
    pub end: Option<u32>,
}

/// Generates one answer per prompt, in the order of the prompts.
///
/// `decode` turns tokens into text. `finished` is called after each answer with the number of answers so far;
/// an error from it stops the work and is returned.
///
/// # Errors
/// Options out of range, an empty prompt, or one that leaves no room in the model's context
/// ([`Error::Input`]); logits that are not numbers ([`Error::Failed`]).
pub fn generate<'a>(
    policy: impl Into<Mixture<'a>>,
    prompts: &[Vec<u32>],
    options: &SamplingOptions,
    decode: &dyn Fn(&[u32]) -> Result<String>,
    finished: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<Vec<Answer>> {
    options.validate()?;
    let policy = policy.into();
    let context = policy.context();
    check_prompts(&policy, prompts)?;
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let positions = context.min(longest.saturating_add(options.max_new_tokens));
    let mut decoders: Vec<Decoder> = policy.passes().iter().map(|pass| Decoder::new(pass.model, positions)).collect();
    let mut sum = Vec::new();
    let mut answers: Vec<Option<Answer>> = vec![None; prompts.len()];
    let mut waiting = prompts.iter().enumerate();
    let mut active: Vec<Sequence> = Vec::new();
    let mut seen: Option<SeenPrompt> = None;
    let mut done = 0;
    loop {
        while active.len() < options.batch_size {
            let Some((index, prompt)) = waiting.next() else { break };
            active.push(Sequence::new(index, prompt, &policy, options.seed));
        }
        if active.is_empty() {
            break;
        }
        // prompts by themselves, so that the bits of an answer do not depend on which others are in progress
        let (mut next, new): (Vec<_>, Vec<_>) = active.into_iter().partition(|sequence| sequence.pending.len() == 1);
        let mut chosen = Vec::new();
        if !next.is_empty() {
            let logits = next_logits(&policy, &mut decoders, &mut next, &mut sum);
            for (mut sequence, logits) in next.into_iter().zip(logits.chunks_exact(policy.vocab_size())) {
                let token = sequence.choose(logits, options)?;
                chosen.push((sequence, token));
            }
        }
        // a prompt that comes several times in a row is computed once: by the first, which sets `seen` for its copies
        let comes_again = |index: usize| prompts.get(index + 1) == Some(&prompts[index]);
        let (mut first, copies): (Vec<_>, Vec<_>) =
            new.into_iter().partition(|sequence| sequence.index == 0 || !comes_again(sequence.index - 1));
        let mut copies = copies.into_iter().peekable();
        let logits = if first.is_empty() { &[] } else { next_logits(&policy, &mut decoders, &mut first, &mut sum) };
        let mut first = first.into_iter().zip(logits.chunks_exact(policy.vocab_size())).peekable();
        loop {
            let until = first.peek().map_or(prompts.len(), |(sequence, _)| sequence.index);
            while let (Some(mut sequence), Some(seen)) = (copies.next_if(|copy| copy.index < until), &seen) {
                let logits = seen.copy_to(&mut sequence);
                let token = sequence.choose(logits, options)?;
                chosen.push((sequence, token));
            }
            let Some((mut sequence, logits)) = first.next() else { break };
            seen = comes_again(sequence.index).then(|| SeenPrompt::new(&sequence, logits));
            let token = sequence.choose(logits, options)?;
            chosen.push((sequence, token));
        }
        let mut still = Vec::with_capacity(chosen.len());
        for (mut sequence, token) in chosen {
            match sequence.accept(token, options, context, decode)? {
                Some(answer) => {
                    answers[sequence.index] = Some(answer);
                    done += 1;
                    finished(done)?;
                }
                None => still.push(sequence),
            }
        }
        active = still;
    }
    Ok(answers.into_iter().flatten().collect())
}

/// The logits `[sequence, vocab]` of the token after those that are pending, which join the sequences' caches; `sum` is
/// memory for them. All sequences have one pending token, or all have more.
fn next_logits<'l>(
    policy: &Mixture<'_>,
    decoders: &'l mut [Decoder],
    sequences: &mut [Sequence],
    sum: &'l mut Vec<f32>,
) -> &'l [f32] {
    let tokens: Vec<u32> = sequences.iter().flat_map(|s| s.pending.clone()).collect();
    let positions: Vec<u32> = sequences.iter().flat_map(Sequence::positions).collect();
    let mut end = 0;
    let last_rows: Vec<usize> = sequences.iter().map(|s| (end += s.pending.len(), end - 1).1).collect();
    let passes = decoders.iter_mut().zip(policy.passes()).enumerate();
    let each: Vec<&[f32]> = passes
        .map(|(index, (decoder, pass))| {
            let mut cache = PassCache { heads: decoder.heads(), pass: index, sequences: &mut *sequences };
            decoder.infer(pass, &tokens, &positions, &last_rows, &mut cache)
        })
        .collect();
    sequences.iter_mut().for_each(|sequence| sequence.past += sequence.pending.len());
    policy.logits(&each, sum)
}

/// Refuses prompts that the policy cannot continue.
///
/// # Errors
/// [`Error::Input`] that gives the number, from 1, of the first prompt that is empty, that leaves no room in the
/// model's context, or that holds a token which the model does not know.
pub fn check_prompts(policy: &Mixture<'_>, prompts: &[Vec<u32>]) -> Result<()> {
    prompts.iter().enumerate().try_for_each(|(index, prompt)| check_prompt(policy, prompt, index))
}

fn check_prompt(policy: &Mixture<'_>, prompt: &[u32], index: usize) -> Result<()> {
    let context = policy.context();
    let number = index + 1;
    if prompt.is_empty() {
        return Err(Error::input(format!("Prompt {number} has no tokens. Give a prompt of at least one token.")));
    }
    if prompt.len() >= context {
        return Err(Error::input(format!(
            "Prompt {number} has {} tokens, which leaves no room for an answer in the model's context of {context} \
             tokens. Shorten the prompt.",
            prompt.len()
        )));
    }
    match prompt.iter().find(|&&t| t as usize >= policy.vocab_size()) {
        Some(token) => Err(Error::input(format!(
            "Prompt {number} contains token {token}, but the model knows only {} tokens. The tokenizer belongs to \
             another model.",
            policy.vocab_size()
        ))),
        None => Ok(()),
    }
}

/// The next token, or nothing when a logit is not a number.
fn choose(logits: &[f32], options: &SamplingOptions, rng: &mut impl Rng) -> Option<u32> {
    if logits.iter().any(|l| l.is_nan()) {
        return None;
    }
    let best =
        logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0))).map(|(i, _)| i as u32)?;
    if options.temperature == 0.0 {
        return Some(best);
    }
    let highest = f64::from(logits[best as usize]);
    let mut candidates: Vec<(u32, f64)> = logits
        .iter()
        .enumerate()
        .map(|(i, &l)| (i as u32, ((f64::from(l) - highest) / options.temperature).exp()))
        .collect();
    let by_weight = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if options.top_k > 0 && options.top_k < candidates.len() {
        candidates.select_nth_unstable_by(options.top_k - 1, by_weight);
        candidates.truncate(options.top_k);
    }
    if options.top_p < 1.0 || options.min_p > 0.0 {
        candidates.sort_unstable_by(by_weight);
        let total: f64 = candidates.iter().map(|c| c.1).sum();
        let mut before = 0.0;
        // the likeliest token has weight 1, so min_p compares with the weights themselves
        candidates.retain(|c| {
            let eligible = before < options.top_p * total && c.1 >= options.min_p;
            before += c.1;
            eligible
        });
    }
    let total: f64 = candidates.iter().map(|c| c.1).sum();
    let uniform: f64 = StandardUniform.sample(rng);
    let mut left = uniform * total;
    for &(token, weight) in &candidates {
        left -= weight;
        if left < 0.0 {
            return Some(token);
        }
    }
    candidates.last().map(|c| c.0)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::batch::PackedBatch;
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
        let in_a_row: Vec<Vec<u32>> =
            prompts.iter().flat_map(|prompt| std::iter::repeat_n(prompt.clone(), 7)).collect();
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
                    assert!(
                        (place..in_a_row.len()).step_by(7).all(|i| apart[i] == together[i]),
                        "{batch_size}, {place}"
                    );
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

    /// Sums over more numbers than a register holds, of which other orders would show in the last bits.
    #[test]
    fn the_bits_of_logits_do_not_depend_on_what_is_generated_with_them() {
        let shape = ModelConfig { hidden_size: 96, intermediate_size: 160, vocab_size: 300, ..tiny_config() };
        let model = Model::random(shape, 0.3, 5);
        let adapters = [3, 20].map(|rank| {
            let mut adapter = Adapter::new(&model, LoraOptions { rank, ..LoraOptions::default() }, 1).unwrap();
            adapter.weights.iter_mut().enumerate().for_each(|(i, weight)| *weight += 0.01 * (i % 7) as f32);
            adapter
        });
        let [a, b] = adapters.each_ref().map(|adapter| Adapted { model: &model, adapter: Some(adapter) });
        let others: Vec<Vec<u32>> = (0..40).map(|i| (0..i % 5 + 2).map(|j| 3 * i + j).collect()).collect();
        for policy in [(&model).into(), Mixture::new(a, b, 0.4).unwrap()] {
            // of a prompt, and of the two tokens after it
            let logits = |others: &[Vec<u32>]| -> Vec<Vec<u32>> {
                let mut decoders = [Decoder::new(&model, 16)];
                let prompts = std::iter::once(&[7, 8, 9][..]).chain(others.iter().map(Vec::as_slice));
                let mut sequences: Vec<Sequence> =
                    prompts.enumerate().map(|(index, prompt)| Sequence::new(index, prompt, &policy, 0)).collect();
                let mut all = Vec::new();
                for token in [11, 12, 13] {
                    let mut sum = Vec::new();
                    let logits = next_logits(&policy, &mut decoders, &mut sequences, &mut sum);
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
                let options =
                    SamplingOptions { max_new_tokens: 9, temperature, batch_size, ..SamplingOptions::default() };
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
        assert_eq!(choose(&logits, &SamplingOptions::default(), &mut ChaCha8Rng::seed_from_u64(1)), Some(2));
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
        let error = generate(&broken, &prompts(), &SamplingOptions::default(), &text, &mut |_| Ok(())).unwrap_err();
        assert!(matches!(error, Error::Failed(_)), "{error}");
    }
}
