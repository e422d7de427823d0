//! A small world in which everything is known exactly: prompts, answers, their first probabilities, and
//! what each answer is worth.
//!
//! A language model trained in it from scratch goes through the same steps, files and objectives as a real
//! one, and its expected reward and safety are sums over all answers, not estimates. `docs/quickstart.md`
//! describes the world and gives the formulas.

mod evaluate;
mod grammar;
mod lookup;
mod sample;
mod vocabulary;

use engine::{ModelConfig, OutputHead, RopeScaling};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

pub use evaluate::Evaluation;
pub use lookup::ByTokens;
pub use sample::{Completion, LabelledCompletion, Pair, json_lines};
use vocabulary::Vocabulary;
pub use vocabulary::{BOS, EOS, UNKNOWN};

/// The temperature β of the reward step that suits this world: its optimum takes half of the reward that there
/// is to gain, at a clear cost in safety, and still leaves the safety step something to work with.
pub const DEFAULT_BETA: f64 = 1.0;

/// Temperatures β/λ of the safety step that suit this world, that is λ = 0.5, 1 and 2 under [`DEFAULT_BETA`]:
/// from a little of the safety that the reward step lost to more than there was at first.
pub const DEFAULT_BETA_OVER_LAMBDA: [f64; 3] = [2.0, 1.0, 0.5];

/// Held-out prompts per topic; the rest of a topic's prompts are for training.
const HELDOUT_PER_TOPIC: usize = 4;

/// What an answer is judged by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metric {
    /// Helpfulness r*.
    Reward,
    /// Harmlessness g*.
    Safety,
}

impl Metric {
    /// What any text outside the grammar is worth: the worst reward, and the safety of a plain answer to a
    /// harmless request, since nonsense helps nobody and harms nobody.
    pub fn outside(self) -> f64 {
        match self {
            Self::Reward => -1.2,
            Self::Safety => 0.0,
        }
    }
}

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// Words and punctuation, separated by single spaces.
    pub text: String,
    /// What is asked for, `0..24`; prompts of one topic have the same answers.
    pub topic: usize,
    /// Whether helping with it does harm.
    pub risky: bool,
}

/// A possible answer to a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// Words and punctuation, separated by single spaces.
    pub text: String,
    /// Its probability in the pretraining data, in (0, 1).
    pub p0: f64,
    /// Its reward r*, in [−1.2, 2.4].
    pub reward: f64,
    /// Its safety g*, in [−2.1, 1.6].
    pub safety: f64,
    /// Whether it refuses to help.
    pub refusal: bool,
}

impl Answer {
    /// What the answer is worth by a metric.
    pub fn value(&self, metric: Metric) -> f64 {
        match metric {
            Metric::Reward => self.reward,
            Metric::Safety => self.safety,
        }
    }
}

/// The prompts, split into training and held-out ones, and the answers.
#[derive(Debug, Clone)]
pub struct World {
    /// Prompts that samples and pairs are drawn from; every topic is among them.
    pub train_prompts: Vec<Prompt>,
    /// Prompts that policies are evaluated on: four of each topic, half of them risky.
    pub heldout_prompts: Vec<Prompt>,
    /// The answers, by topic.
    answers: Vec<Vec<Answer>>,
    vocabulary: Vocabulary,
}

impl World {
    /// The world with the split that `seed` chooses; nothing else depends on the seed.
    pub fn new(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let answers = grammar::answers();
        let mut prompts = grammar::prompts();
        let vocabulary = Vocabulary::new(
            prompts.iter().flatten().map(|p| p.text.as_str()).chain(answers.iter().flatten().map(|a| a.text.as_str())),
        );
        let (mut train_prompts, mut heldout_prompts) = (Vec::new(), Vec::new());
        for of_topic in &mut prompts {
            of_topic.shuffle(&mut rng);
            heldout_prompts.extend(of_topic.drain(..HELDOUT_PER_TOPIC));
            train_prompts.append(of_topic);
        }
        Self { train_prompts, heldout_prompts, answers, vocabulary }
    }

    /// All answers of the grammar to a prompt of this world: distinct, their `p0` summing to 1, in a fixed order.
    pub fn answers(&self, prompt: &Prompt) -> &[Answer] {
        &self.answers[prompt.topic]
    }

    /// Number of token ids.
    pub fn vocab_size(&self) -> usize {
        self.vocabulary.len()
    }

    /// The shape of a language model that can learn this world within a minute, of a third of a million parameters.
    pub fn model_config(&self) -> ModelConfig {
        ModelConfig {
            vocab_size: self.vocab_size(),
            hidden_size: 96,
            intermediate_size: 256,
            num_hidden_layers: 3,
            num_attention_heads: 3,
            num_key_value_heads: 3,
            head_dim: 32,
            max_position_embeddings: 64,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::Default,
            tie_word_embeddings: true,
            model_type: "llama".into(),
            bos_token_id: Some(BOS),
            eos_token_ids: vec![EOS],
            head: OutputHead::Vocabulary,
        }
    }

    /// The tokens of a prompt as a model sees it: `<s>`, then one token per word.
    pub fn prompt_tokens(&self, prompt: &Prompt) -> Vec<u32> {
        std::iter::once(BOS).chain(self.vocabulary.tokens(&prompt.text)).collect()
    }

    /// The tokens of an answer as a model sees it: one token per word, then `</s>`.
    pub fn answer_tokens(&self, answer: &Answer) -> Vec<u32> {
        self.vocabulary.tokens(&answer.text).chain(std::iter::once(EOS)).collect()
    }

    /// The bytes of a Hugging Face `tokenizer.json` that maps text to the tokens of this world: words and
    /// punctuation, in lower case, with `<s>` put before a text when special tokens are asked for.
    pub fn tokenizer_json(&self) -> Vec<u8> {
        self.vocabulary.tokenizer_json()
    }
}
