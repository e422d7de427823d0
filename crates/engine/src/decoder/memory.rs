//! What the memory that a decoder owns takes.

use super::{Decoder, Keep};
use crate::config::ModelConfig;
use crate::lora::{AdapterLayout, LoraOptions};
use crate::ops::attention::{self, Heads};
use crate::ops::{linear, logprob};
use crate::precision::Precision;

/// Numbers of tokens in a pass, at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PassSize {
    /// Computed ones, besides
    pub rows: usize,
    /// those of responses [added behind](crate::PackedBatch::push_response), unless the decoder
    /// [keeps as much of them](Decoder::keeps_behind): they then count as the others.
    pub behind: usize,
    /// Scored ones, which may be more: the last row of a prompt predicts the first token of each of its responses.
    pub scored: usize,
    /// Those of the longest sequence.
    pub longest: usize,
}

impl Decoder {
    /// Bytes that a decoder for models of this shape, adapted by `lora` if at all, takes at most after passes of at most this size
    /// that keep what `keep` says and train, or that keep nothing.
    ///
    /// A pass that gives divergences from a reference takes as much, besides the reference's rows that it is given.
    pub fn bytes(
        config: &ModelConfig,
        precision: Precision,
        lora: Option<&LoraOptions>,
        PassSize { rows, behind, scored, longest }: PassSize,
        keep: Option<Keep>,
    ) -> usize {
        let (d, f, blocks) = (config.hidden_size, config.intermediate_size, config.num_hidden_layers);
        let (query, heads) = (config.query_width(), config.num_attention_heads);
        let qkv = query + 2 * config.key_value_width();
        // so many numbers passed on to products, in units of f32
        let passed = |numbers: usize| match precision {
            Precision::F32 => numbers,
            Precision::Bf16 => numbers.div_ceil(2),
        };
        // numbers per row of a `BlockTape`, of the residual stream, and of `Scratch`
        let tape = 2 + heads + d + passed(qkv + query + 2 * f);
        let (stream, forward, backward) = (d, passed(d + f.max(qkv)) + qkv.max(2 * f), d + d.max(query));
        // what every row has at any time, and what is kept of it
        let (per_row, kept) = match keep {
            Some(Keep::All) if behind == 0 => (stream + forward + backward, blocks * (d + tape)),
            Some(Keep::All) => (tape + stream + forward + backward, blocks * (d + tape)),
            Some(Keep::Inputs) => (tape + stream + forward + backward, blocks * d),
            None => (tape + stream + forward, 0),
        };
        let of_rows = (rows + behind) * per_row + rows * kept;
        let rows = rows + behind;
        // numbers of a row that goes to the head, what it gives, and their derivatives
        let of_scored = if keep.is_some() { 4 * d + 2 } else { 2 * d + 2 };
        let (head, factor) = if config.head.is_score() {
            (rows * of_scored, rows * of_scored)
        } else {
            let scored = scored.max(rows);
            let kept = keep.map_or(0, |keep| logprob::kept_rows(keep == Keep::All, scored, config.vocab_size));
            let most = logprob::chunk_rows(config.vocab_size);
            let others = most.min(scored - kept);
            let softmax = match precision {
                Precision::F32 => kept + others,
                // logits of a chunk are in f32, and the softmax of as many in 16 bits as are kept or computed again
                Precision::Bf16 if keep.is_some() => most.min(scored) + (kept + others).div_ceil(2),
                Precision::Bf16 => others,
            };
            let chunk = kept.max(others);
            (softmax * config.vocab_size + scored * of_scored + kept, chunk * config.vocab_size)
        };
        // without instructions for it, a product in bf16 is that of rounded copies of its factors, of which the head's are largest
        let copies =
            if precision == Precision::Bf16 && !linear::bf16::is_native() { factor + config.vocab_size * d } else { 0 };
        let rope = longest * config.head_dim;
        let tapes = if keep == Some(Keep::All) { blocks } else { 1 };
        let adapter = lora.map_or(0, |lora| AdapterLayout::new(config, lora).pass_bytes(lora, rows, tapes));
        // in the backward pass, which has the whole of a sequence but a token in common with others at most
        let common = if keep.is_some() { attention::common_bytes(Heads::new(config), longest) } else { 0 };
        size_of::<f32>() * (of_rows + head + copies + rope) + adapter + common
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use half::bf16;

    use super::super::blocks::{DecoderOn, Scratch, Shape};
    use super::*;
    use crate::backend::{Cpu, Softmax};
    use crate::batch::PackedBatch;
    use crate::lora::{Adapter, Projection};
    use crate::model::Model;
    use crate::model::tests::tiny_config;
    use crate::ops::rope::RopeTable;
    use crate::ops::{Number, lora};
    use crate::{OutputHead, Parameters};

    /// Bytes of everything in a decoder that grows, with what grew in vain.
    fn held<T: Number>(decoder: &DecoderOn<Cpu<T>>) -> usize {
        let Scratch { normed, sums, passed, head, dx, d_taken } = &decoder.scratch;
        let Softmax { logps, excess, rounded_excess, inverse_sums, logits, rounded_logits, reference_logits } =
            &decoder.softmax;
        let tapes = || decoder.tapes.iter().chain([&decoder.tape]);
        let narrow = tapes().flat_map(|tape| [&tape.r_attention, &tape.lse, &tape.middle, &tape.r_feed_forward]);
        let narrow = narrow.chain(tapes().flat_map(|tape| &tape.lora));
        let scratch = [sums, dx, d_taken, &decoder.x];
        let head = [&head.x, &head.r, &head.normed, &head.d_x, &head.d_normed];
        let softmax = [logps, excess, inverse_sums, logits, reference_logits];
        let wide = narrow.chain(scratch).chain(head).chain(softmax).chain(&decoder.inputs);
        let of_tapes = tapes().flat_map(|tape| [&tape.qkv, &tape.attention, &tape.gate_up]);
        let passed = of_tapes.chain([normed, passed]).map(|buffer| size_of::<T>() * buffer.capacity());
        let rounded = [rounded_excess, rounded_logits].map(|buffer| size_of::<bf16>() * buffer.capacity());
        wide.map(|buffer| size_of::<f32>() * buffer.capacity()).sum::<usize>()
            + passed.sum::<usize>()
            + rounded.iter().sum::<usize>()
            + lora::Scratch::bytes(&decoder.backend.lora)
    }

    #[test]
    fn a_decoder_takes_what_is_foretold() {
        let lora = |dropout, dora| LoraOptions {
            rank: 3,
            alpha: 6.0,
            dropout,
            targets: Projection::ALL.to_vec(),
            rank_stabilized: false,
            dora,
        };
        let (prompt, responses) = ([1, 5, 3], [vec![4; 40], vec![9; 61]]);
        for (precision, for_scores, lora) in [
            (Precision::F32, false, None),
            (Precision::Bf16, false, None),
            (Precision::F32, true, None),
            (Precision::F32, false, Some(lora(0.0, false))),
            (Precision::F32, false, Some(lora(0.1, false))),
            (Precision::F32, false, Some(lora(0.0, true))),
        ] {
            let head = if for_scores { OutputHead::Score { pad_token_id: None } } else { OutputHead::Vocabulary };
            let model = Model::random(ModelConfig { head, ..tiny_config() }, 0.4, 1);
            let mut batch = if for_scores { PackedBatch::for_scores() } else { PackedBatch::default() };
            let mut smaller = batch.clone();
            batch.push_keyed(0, &prompt, &responses.each_ref().map(Vec::as_slice));
            smaller.push_keyed(0, &prompt, &[&responses[0], &responses[0]]);
            let mut whole = batch.clone();
            if !for_scores && lora.is_none() {
                whole.push_response(0, &responses[1]);
                whole.push_response(0, &responses[0]);
            }
            match precision {
                Precision::F32 => is_foretold::<f32>(&model, lora, [&smaller, &whole], &batch),
                Precision::Bf16 => is_foretold::<bf16>(&model, lora, [&smaller, &whole], &batch),
            }
        }
    }

    /// Of passes over two batches, the second with responses behind another.
    fn is_foretold<T: Number>(
        model: &Model,
        lora: Option<LoraOptions>,
        [smaller, whole]: [&PackedBatch; 2],
        batch: &PackedBatch,
    ) {
        let longest = 64;
        let adapter = lora.clone().map(|lora| Adapter::new(model, lora, 1).unwrap());
        let parameters = Parameters { base: &model.weights, adapter: adapter.as_ref(), dropout_seed: Some(1) };
        let mut gradient = vec![0.0; adapter.as_ref().map_or(model.layout.len, |adapter| adapter.layout.len)];
        for keep in [None, Some(Keep::Inputs), Some(Keep::All)] {
            let rope = RopeTable::new(&model.config, longest);
            let mut decoder = DecoderOn::<Cpu<T>>::on_cpu(Arc::new(Shape::new(model)), rope);
            for (whole, batch) in [(smaller, smaller), (whole, batch)] {
                let pass = decoder.pass(parameters, whole);
                match keep {
                    None => drop(decoder.logps(&pass, whole)),
                    Some(keep) => {
                        let Ok(_) = decoder.forward(&pass, whole, keep);
                        let pass = decoder.pass(parameters, batch);
                        let Ok(()) = decoder.backward(&pass, batch, &[0.3, -0.3], &mut pass.gradient(&mut gradient));
                    }
                }
            }
            let common = if keep.is_some() { attention::common_bytes(decoder.shape.heads, longest) } else { 0 };
            let held = held(&decoder) + size_of::<f32>() * longest * model.config.head_dim + common;
            let rows = match keep {
                Some(keep) if !Decoder::keeps_behind(lora.is_some(), keep) => batch.rows(),
                _ => whole.rows(),
            };
            let (behind, scored) = (whole.rows() - rows, whole.targets.len());
            let size = PassSize { rows, behind, scored, longest };
            let foretold = Decoder::bytes(&model.config, T::PRECISION, lora.as_ref(), size, keep);
            let slack = if keep.is_none() || model.config.head.is_score() || T::IS_ROUNDED { 1.5 } else { 1.05 };
            assert!(
                held <= foretold && foretold as f64 <= slack * held as f64,
                "{keep:?} {lora:?}: {held} bytes of {foretold} foretold"
            );
        }
    }
}
