//! What a training takes, and how its passes are cut so that it fits.
//!
//! Two things stay whatever the passes are: what the process holds besides, and weights, gradient and optimizer state. The
//! activations of a pass grow with its tokens and with what is kept of them for the backward pass. How passes are cut
//! changes time and memory, and the result by rounding at most.

use std::fmt;

use engine::decoder::PassSize;
use engine::memory::{available, in_words, resident, trim};
use engine::optim::OptimizerKind;
use engine::{AdapterLayout, Decoder, Error, Keep, Layout, LoraOptions, ModelConfig, Result};
use serde::Serialize;

use super::TrainOptions;
use crate::reference;
use crate::sequences::{Packing, Sequences};

/// Tokens of a pass, and what is kept of it, from the fastest to the one that takes least. Below a thousand tokens or so the
/// time that each pass takes for the weights shows; computing every block twice costs more than a pass of a few hundred.
const CUTS: [(usize, Keep); 7] = [
    (2048, Keep::All),
    (1024, Keep::All),
    (512, Keep::All),
    (2048, Keep::Inputs),
    (1024, Keep::Inputs),
    (512, Keep::Inputs),
    (1, Keep::Inputs),
];

/// Bytes that are small whatever the model: what matrix products pack their factors into, the allocator's own.
fn work_bytes() -> usize {
    (32 << 20) + (4 << 20) * rayon::current_num_threads()
}

/// How the passes of a training are cut, and what comes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// Tokens per forward and backward pass at most; a longer example passes alone.
    pub micro_batch_tokens: usize,
    /// Tokens of the largest pass, besides
    pub largest_pass: usize,
    /// those of mismatched responses that a pass computes behind its examples, of which nothing is kept.
    pub behind: usize,
    /// Whether the backward pass computes every block again (gradient checkpointing).
    pub recompute: bool,
    /// Bytes of resident memory that the process holds at most while it trains.
    pub peak_bytes: usize,
}

impl MemoryPlan {
    /// What a pass keeps for the backward pass.
    pub(super) fn keep(&self) -> Keep {
        if self.recompute { Keep::Inputs } else { Keep::All }
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kept = if self.recompute { "blocks computed again" } else { "everything kept" };
        write!(f, "{}: at most {} tokens a pass, {kept}", in_words(self.peak_bytes), self.largest_pass)
    }
}

/// What decides the memory of a training.
#[derive(Debug, Clone)]
pub(crate) struct Footprint<'a> {
    pub(crate) config: &'a ModelConfig,
    pub(crate) options: &'a TrainOptions,
    /// Whether the model of the start is kept beside the policy, for an objective that compares the two.
    pub(crate) keeps_reference: bool,
    pub(crate) lengths: Lengths,
}

/// Numbers of tokens that a training computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lengths {
    /// Of the largest example.
    largest: usize,
    /// Of the largest batch.
    batch: usize,
    /// Of the mismatched responses of a batch, and
    behind: usize,
    /// of a batch with them.
    together: usize,
    /// Of the longest sequence.
    pub(super) longest: usize,
    /// At most what the reference computes of prompts that it could score in one pass.
    scored: usize,
    /// Responses of the batch that has most. A pass scores at most so many tokens more than it computes: of each response it
    /// computes all tokens but the last.
    responses: usize,
}

impl Lengths {
    /// Of a training on some examples in batches of at least `least`, validated on others. With `mismatched`, the responses of a
    /// batch are computed a second time, behind other prompts of it.
    pub(crate) fn new(
        config: &ModelConfig,
        options: &TrainOptions,
        examples: &[Sequences<'_>],
        validation: &[Sequences<'_>],
        least: usize,
        mismatched: bool,
    ) -> Self {
        let for_scores = config.head.is_score();
        let packing = Packing { for_scores, dropout: options.lora.as_ref().is_some_and(|lora| lora.dropout > 0.0) };
        let computed = |item: &Sequences<'_>| item.computed(for_scores);
        let all = || examples.iter().chain(validation);
        let longest = all().map(Sequences::longest).max().unwrap_or(0);
        let plan = options.plan(examples.len(), least);
        // with dropout they are not computed in the same pass
        let mismatched = mismatched && !packing.dropout;
        let again = |item: &Sequences<'_>| if mismatched { computed(item) - item.prompt.len() } else { 0 };
        let responses = |batch: &Vec<usize>| {
            let responses = batch.iter().map(|&example| examples[example].responses.len()).sum::<usize>();
            if mismatched { 2 * responses } else { responses }
        };
        let of_batch = |batch: &Vec<usize>| {
            let items: Vec<Sequences<'_>> = batch.iter().map(|&example| examples[example].clone()).collect();
            (packing.computed(&items), items.iter().map(again).sum::<usize>())
        };
        let batches: Vec<(usize, usize)> = plan.batches.iter().map(of_batch).collect();
        // without what they share, and mismatched responses with prompts of their own
        let of_block = |items: &[Sequences<'_>]| {
            items.iter().map(|item| computed(item) + if mismatched { longest } else { 0 }).sum::<usize>()
        };
        let blocks = examples.chunks(reference::BLOCK).chain(validation.chunks(reference::BLOCK));
        Self {
            largest: all().map(computed).max().unwrap_or(0),
            batch: batches.iter().map(|&(own, _)| own).max().unwrap_or(0),
            behind: batches.iter().map(|&(_, behind)| behind).max().unwrap_or(0),
            together: batches.iter().map(|&(own, behind)| own + behind).max().unwrap_or(0),
            longest,
            scored: blocks.map(of_block).max().unwrap_or(0),
            responses: plan.batches.iter().map(responses).max().unwrap_or(0),
        }
    }
}

impl Footprint<'_> {
    /// The fastest plan that fits beside the `others` of [`resident_besides`].
    ///
    /// # Errors
    /// [`Error::Input`] if even the smallest does not fit, which says what would.
    pub(crate) fn plan(&self, others: usize) -> Result<MemoryPlan> {
        // a tenth stays for what else the machine does
        let rest = || available().map(|bytes| resident().unwrap_or(0) + bytes / 10 * 9);
        self.plan_within(others, self.options.memory_bytes.or_else(rest).unwrap_or(usize::MAX))
    }

    /// As [`plan`](Self::plan), of passes of so many tokens.
    ///
    /// # Errors
    /// As there.
    pub(super) fn plan_with(&self, micro_batch_tokens: usize, others: usize) -> Result<MemoryPlan> {
        let options = &TrainOptions { micro_batch_tokens: Some(micro_batch_tokens), ..self.options.clone() };
        Footprint { options, ..self.clone() }.plan(others)
    }

    /// As [`plan`](Self::plan) for a process that holds `others` besides the training and may hold `limit` in all.
    fn plan_within(&self, others: usize, limit: usize) -> Result<MemoryPlan> {
        let plans = self.plans(others);
        match plans.iter().find(|plan| plan.peak_bytes <= limit) {
            Some(plan) => Ok(*plan),
            None => Err(self.refusal(others, limit)),
        }
    }

    /// All plans, the fastest first.
    fn plans(&self, others: usize) -> Vec<MemoryPlan> {
        let cuts: Vec<(usize, Keep)> = match self.options.micro_batch_tokens {
            Some(tokens) => [Keep::All, Keep::Inputs].map(|keep| (tokens, keep)).to_vec(),
            None => CUTS.to_vec(),
        };
        cuts.into_iter().map(|(tokens, keep)| self.with_cut(others, tokens, keep)).collect()
    }

    fn with_cut(&self, others: usize, tokens: usize, keep: Keep) -> MemoryPlan {
        let Self { config, options, keeps_reference, lengths } = self;
        let lora = options.lora.as_ref();
        // where mismatched responses take as much memory as others, they count as such
        let (batch, behind) = match Decoder::keeps_behind(lora.is_some(), keep) {
            true => (lengths.together, 0),
            false => (lengths.batch, lengths.behind),
        };
        // validation has no larger passes than the largest batch
        let micro_batch_tokens = tokens.min(batch).max(1);
        let behind = behind.min(micro_batch_tokens);
        let largest_pass = micro_batch_tokens.max(lengths.largest);
        let of_pass = |rows: usize, behind: usize| {
            let scored = rows + behind + lengths.responses;
            PassSize { rows, behind, scored, longest: lengths.longest }
        };
        let pass = of_pass(largest_pass, behind);
        let training = self.state_bytes() + Decoder::bytes(config, options.dtype, lora, pass, Some(keep))
            // the reference's last rows of a pass
            + if *keeps_reference { size_of::<f32>() * pass.scored * config.hidden_size } else { 0 };
        // before, the reference's log-probabilities are computed
        let scored = options.micro_batch_tokens.unwrap_or(reference::TOKENS).min(lengths.scored).max(lengths.largest);
        let scoring = model_bytes(config) + Decoder::bytes(config, options.dtype, None, of_pass(scored, 0), None);
        let peak_bytes = others + work_bytes() + training.max(scoring);
        MemoryPlan { micro_batch_tokens, largest_pass, behind, recompute: keep == Keep::Inputs, peak_bytes }
    }

    /// Bytes of weights, gradient, and all that changes with them.
    fn state_bytes(&self) -> usize {
        let Self { config, options, keeps_reference, .. } = self;
        let models = if *keeps_reference { 2 } else { 1 } * model_bytes(config);
        let (specs, adapter) = match &options.lora {
            Some(lora) => {
                let layout = AdapterLayout::new(config, lora);
                (layout.specs, size_of::<f32>() * layout.len)
            }
            None => (Layout::new(config).specs, 0),
        };
        let trained = if options.lora.is_some() { adapter } else { model_bytes(config) };
        // the gradient, the moving average, and the best weights
        let copies = 1 + usize::from(options.ema_decay.is_some()) + usize::from(options.patience.is_some());
        models + adapter + copies * trained + options.optimizer.bytes(&specs)
    }

    /// Bytes of the plan that takes least.
    fn least(&self, others: usize) -> usize {
        self.plans(others).iter().map(|plan| plan.peak_bytes).min().unwrap_or(0)
    }

    /// Says what is needed, what there is, and which options need less.
    fn refusal(&self, others: usize, limit: usize) -> Error {
        let least = self.least(others);
        let needs = |options: &TrainOptions| Footprint { options, ..self.clone() }.least(others);
        let options = self.options;
        let mut changes = Vec::new();
        if options.micro_batch_tokens.is_some() {
            let chosen = TrainOptions { micro_batch_tokens: None, ..options.clone() };
            changes.push(("leave micro_batch_tokens out".to_owned(), needs(&chosen)));
        }
        if options.lora.is_none() {
            let adapted = TrainOptions { lora: Some(LoraOptions::default()), ..options.clone() };
            let rank = LoraOptions::default().rank;
            changes.push((format!("train an adapter (lora_rank = {rank})"), needs(&adapted)));
        }
        if options.optimizer != OptimizerKind::AdamW8bit {
            let kind = OptimizerKind::AdamW8bit;
            let smaller = TrainOptions { optimizer: kind, ..options.clone() };
            changes.push((format!("use another optimizer ({})", kind.name()), needs(&smaller)));
        }
        let helps = changes.into_iter().filter(|(_, needed)| *needed < least);
        let mut remedies: Vec<String> =
            helps.map(|(change, needed)| format!("{change}, which needs {}", in_words(needed))).collect();
        remedies.push(format!("shorten the examples (max_length; the longest has {} tokens)", self.lengths.longest));
        if options.memory_bytes.is_some() {
            remedies.push("allow more (run.memory_gib)".to_owned());
        }
        Error::input(format!(
            "This training needs {} of memory at least, and may take {}{}. To need less: {}.",
            in_words(least),
            in_words(limit),
            if options.memory_bytes.is_some() { ", as run.memory_gib says" } else { " on this machine" },
            remedies.join(", or ")
        ))
    }
}

/// Bytes that the process holds besides what a training holds of itself, `held` bytes.
pub(crate) fn resident_besides(held: usize) -> usize {
    // what an earlier training has left is free
    trim();
    resident().unwrap_or(0).saturating_sub(held)
}

/// Bytes of all weights of a model.
fn model_bytes(config: &ModelConfig) -> usize {
    size_of::<f32>() * Layout::new(config).len
}

#[cfg(test)]
mod tests {
    use engine::{OutputHead, RopeScaling};

    use super::super::tests::options;
    use super::*;

    /// SmolLM2-135M's shape.
    fn config() -> ModelConfig {
        ModelConfig {
            vocab_size: 49_152,
            hidden_size: 576,
            intermediate_size: 1536,
            num_hidden_layers: 30,
            num_attention_heads: 9,
            num_key_value_heads: 3,
            head_dim: 64,
            max_position_embeddings: 8192,
            rms_norm_eps: 1e-5,
            rope_theta: 1e5,
            rope_scaling: RopeScaling::Default,
            tie_word_embeddings: true,
            model_type: "llama".into(),
            bos_token_id: None,
            eos_token_ids: vec![],
            head: OutputHead::Vocabulary,
        }
    }

    /// Options that choose the cut.
    fn free() -> TrainOptions {
        TrainOptions { micro_batch_tokens: None, ..options() }
    }

    const LENGTHS: Lengths =
        Lengths { largest: 300, batch: 5000, behind: 0, together: 5000, longest: 250, scored: 5000, responses: 16 };
    const GIB: usize = 1 << 30;

    fn footprint<'a>(config: &'a ModelConfig, options: &'a TrainOptions) -> Footprint<'a> {
        Footprint { config, options, keeps_reference: false, lengths: LENGTHS }
    }

    #[test]
    fn with_less_memory_passes_get_smaller_then_blocks_are_computed_again_then_it_is_refused() {
        let (config, options) = (config(), free());
        let footprint = footprint(&config, &options);
        let mut chosen: Vec<(usize, bool)> = Vec::new();
        let mut refused = false;
        for limit in (0..500).rev().map(|hundredths| hundredths * GIB / 100) {
            match footprint.plan_within(0, limit) {
                Ok(plan) => {
                    assert!(plan.peak_bytes <= limit && !refused);
                    chosen.push((plan.largest_pass, plan.recompute));
                }
                Err(error) => {
                    refused = true;
                    assert!(error.exit_code() == 2, "{error}");
                }
            }
        }
        chosen.dedup();
        let [whole, recomputed] = [false, true].map(|recompute| [2048, 1024, 512].map(|rows| (rows, recompute)));
        assert_eq!(chosen, [&whole[..], &recomputed, &[(300, true)]].concat());
        assert!(refused);
    }

    #[test]
    fn what_is_given_is_taken() {
        let config = config();
        let options = TrainOptions { micro_batch_tokens: Some(777), ..free() };
        let footprint = footprint(&config, &options);
        let roomy = footprint.plan_within(0, 64 * GIB).unwrap();
        assert_eq!((roomy.micro_batch_tokens, roomy.recompute), (777, false));
        let narrow = footprint.plan_within(0, roomy.peak_bytes - 1).unwrap();
        assert_eq!((narrow.micro_batch_tokens, narrow.recompute), (777, true));
        footprint.plan_within(0, narrow.peak_bytes - 1).unwrap_err();
        // what else the process holds leaves less
        assert_eq!(footprint.plan_within(5, roomy.peak_bytes + 5).unwrap().peak_bytes, roomy.peak_bytes + 5);
        assert!(footprint.plan_within(5, roomy.peak_bytes).unwrap().recompute);
    }

    #[test]
    fn no_pass_is_larger_than_the_largest_batch_or_smaller_than_the_largest_example() {
        let (config, options) = (config(), free());
        let of = |lengths| Footprint { lengths, ..footprint(&config, &options) }.plan_within(0, usize::MAX).unwrap();
        let small = of(Lengths { batch: 1500, together: 1500, ..LENGTHS });
        assert_eq!((small.micro_batch_tokens, small.largest_pass), (1500, 1500));
        let long = of(Lengths { largest: 4000, longest: 4000, ..LENGTHS });
        assert_eq!((long.micro_batch_tokens, long.largest_pass), (2048, 4000));
        assert!(
            of(Lengths { largest: 0, batch: 0, together: 0, longest: 0, scored: 0, responses: 0, ..LENGTHS })
                .micro_batch_tokens
                == 1
        );
    }

    #[test]
    fn every_copy_of_the_weights_counts() {
        let config = config();
        let weights = model_bytes(&config);
        assert_eq!(weights, 4 * 134_515_008);
        let state = |options: &TrainOptions| footprint(&config, options).state_bytes();
        let plain = free();
        assert_eq!(state(&plain), 4 * weights, "weights, gradient, two moments");
        assert_eq!(state(&TrainOptions { ema_decay: Some(0.9), ..plain.clone() }), 5 * weights);
        assert_eq!(state(&TrainOptions { patience: Some(1), ..plain.clone() }), 5 * weights);
        let compared = Footprint { keeps_reference: true, ..footprint(&config, &plain) };
        assert_eq!(compared.state_bytes(), 5 * weights);
        let lora = TrainOptions { lora: Some(LoraOptions::default()), ..plain };
        let adapter = 4 * AdapterLayout::new(&config, &LoraOptions::default()).len;
        assert_eq!(state(&lora), weights + 4 * adapter);
    }

    #[test]
    fn a_refusal_says_what_is_needed_and_what_would_need_less() {
        let (config, options) = (config(), free());
        let footprint_of = |options| footprint(&config, options);
        let least = in_words(footprint_of(&options).least(0));
        let smaller = TrainOptions { optimizer: OptimizerKind::AdamW8bit, ..options.clone() };
        let smaller = format!("(adamw-8bit), which needs {}", in_words(footprint_of(&smaller).least(0)));
        let refusal = footprint_of(&options).plan_within(0, GIB).unwrap_err().to_string();
        for part in [&*least, "1.00 GiB on this machine", "(lora_rank = 16), which needs", &smaller, "250 tokens"] {
            assert!(refusal.contains(part), "{part}: {refusal}");
        }
        let limited = TrainOptions {
            memory_bytes: Some(GIB),
            micro_batch_tokens: Some(2048),
            lora: Some(LoraOptions { rank: 2000, ..LoraOptions::default() }),
            optimizer: OptimizerKind::AdamW8bit,
            ..options
        };
        let refusal = footprint_of(&limited).plan_within(0, GIB).unwrap_err().to_string();
        for part in ["run.memory_gib says", "leave micro_batch_tokens out", "allow more"] {
            assert!(refusal.contains(part), "{part}: {refusal}");
        }
        assert!(!refusal.contains("adapter") && !refusal.contains("adamw-8bit"), "{refusal}");
    }

    #[test]
    fn passes_are_no_larger_than_the_data_and_what_would_not_help_is_not_offered() {
        let config = config();
        let short =
            Lengths { largest: 300, batch: 400, behind: 0, together: 400, longest: 250, scored: 600, responses: 2 };
        let peak = |micro_batch_tokens| {
            let options = TrainOptions { micro_batch_tokens: Some(micro_batch_tokens), ..options() };
            Footprint { lengths: short, ..footprint(&config, &options) }.plan_within(0, usize::MAX).unwrap().peak_bytes
        };
        assert_eq!(peak(600), peak(1_000_000_000));
        // the reference's pass is the larger one beside a small adapter
        let lora = Some(LoraOptions { rank: 1, ..LoraOptions::default() });
        let options = TrainOptions { lora, micro_batch_tokens: Some(1 << 20), ..options() };
        let long = Lengths { scored: 1 << 20, ..short };
        let refusal = Footprint { lengths: long, ..footprint(&config, &options) }.plan_within(0, GIB).unwrap_err();
        let refusal = refusal.to_string();
        assert!(refusal.contains("leave micro_batch_tokens out") && !refusal.contains("adamw-8bit"), "{refusal}");
    }

    #[test]
    fn lengths_are_those_of_the_batches_that_are_drawn() {
        let config = config();
        let tokens: Vec<u32> = (0..200).collect();
        let item = |response: usize| Sequences {
            prompt: &tokens[response..response + 10],
            responses: vec![&tokens[..response]],
            row: 1,
        };
        let examples: Vec<_> = (1..=10).map(|i| item(9 * i)).collect();
        let options = TrainOptions { batch_size: 10, epochs: 2, ..free() };
        let lengths = Lengths::new(&config, &options, &examples, &[item(95)], 1, false);
        // the last token of a response is not computed
        let batch = 10 * 9 + 9 * 55;
        let expected =
            Lengths { largest: 104, batch, behind: 0, together: batch, longest: 105, scored: batch, responses: 10 };
        assert_eq!(lengths, expected);
        let pairs = TrainOptions { batch_size: 2, ..options };
        let lengths = Lengths::new(&config, &pairs, &examples, &[], 1, false);
        let largest = pairs.plan(10, 1).batches.iter().map(|b| b.iter().map(|i| 9 * i + 18).sum::<usize>()).max();
        assert_eq!((lengths.largest, Some(lengths.batch), lengths.longest), (99, largest, 100));
    }

    #[test]
    fn what_all_prompts_of_a_batch_begin_with_counts_once_and_for_mismatched_pairs_as_well() {
        let config = config();
        let system: Vec<u32> = (0..20).collect();
        let prompts: Vec<Vec<u32>> = (100..104).map(|token| [&system[..], &[token, 9]].concat()).collect();
        let response = [7, 8, 9, 2];
        let examples: Vec<_> =
            prompts.iter().map(|prompt| Sequences { prompt, responses: vec![&response[..]], row: 1 }).collect();
        let options = TrainOptions { batch_size: 4, ..free() };
        let lengths =
            |options: &TrainOptions, mismatched| Lengths::new(&config, options, &examples, &[], 1, mismatched);
        // the last token of a response is not computed
        let batch = 20 + 4 * (2 + 3);
        // those that the reference scores are counted by themselves
        let (longest, scored) = (22 + 4, 4 * (22 + 3));
        let expected = Lengths { largest: 22 + 3, batch, behind: 0, together: batch, longest, scored, responses: 4 };
        assert_eq!(lengths(&options, false), expected);
        let scored = scored + 4 * longest;
        let mismatched = Lengths { behind: 4 * 3, together: batch + 4 * 3, scored, responses: 8, ..expected };
        assert_eq!(lengths(&options, true), mismatched);
        let lora = Some(LoraOptions { dropout: 0.1, ..LoraOptions::default() });
        let apart = TrainOptions { lora, ..options };
        for mismatched in [false, true] {
            let lengths = lengths(&apart, mismatched);
            assert_eq!((lengths.together, lengths.responses), (4 * (22 + 3), 4), "with dropout nothing is shared");
        }
    }
}
