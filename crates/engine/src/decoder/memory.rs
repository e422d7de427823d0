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
        // numbers per row of a `BlockTape`, of which a `CompactTape` halves the wide ones; of the residual stream, and of `Scratch`
        let (narrow, wide) = (2 + heads + d, qkv + query + 2 * f);
        // gate and up rounded, which a tape has besides, the activation, and its gradient where that has other memory
        let (rounded, activation, d_activation) = match precision {
            Precision::F32 => (0, f, 0),
            Precision::Bf16 => (f, f.div_ceil(2), f),
        };
        let tape = narrow + wide + rounded;
        let (stream, forward, backward) = (d, d + activation, d_activation + 2 * d + query + qkv);
        // what every row has at any time, and what is kept of it
        let (per_row, kept) = match keep {
            Some(Keep::All) if precision == Precision::F32 => (stream + forward + backward, blocks * (d + tape)),
            Some(Keep::All) => (tape + stream + forward + backward, blocks * (d + narrow + wide.div_ceil(2))),
            Some(Keep::Inputs) => (tape + stream + forward + backward, blocks * d),
            None => (tape + stream + forward, 0),
        };
        let of_rows = (rows + behind) * per_row + rows * kept;
        let rows = rows + behind;
        let (head, factor) = if config.head.is_score() {
            (rows * (4 * d + 1), rows * (4 * d + 1))
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
            (softmax * config.vocab_size + chunk * (4 * d + 1) + kept, chunk * config.vocab_size)
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
    use super::super::tape::CompactTape;
    use super::*;
    use crate::batch::PackedBatch;
    use crate::lora::{Adapter, Projection};
    use crate::model::Model;
    use crate::model::tests::tiny_config;
    use crate::ops::lora;
    use crate::{OutputHead, Parameters};

    /// Bytes of everything in a decoder that grows, with what grew in vain.
    fn held(decoder: &Decoder) -> usize {
        let super::super::Scratch {
            normed,
            activation,
            rounded_activation,
            logits,
            rounded_excess,
            reference_logits,
            head,
            dx,
            d_normed,
            d_attention,
            d_qkv,
            lora,
        } = &decoder.scratch;
        let tapes = decoder
            .tapes
            .iter()
            .flat_map(|t| [&t.r_attention, &t.qkv, &t.lse, &t.attention, &t.middle, &t.r_feed_forward, &t.gate_up]);
        let tapes = tapes.chain(decoder.tapes.iter().flat_map(|tape| &tape.lora));
        let scratch = [normed, activation, logits, reference_logits, dx, d_normed, d_attention, d_qkv, &decoder.excess];
        let head = [&head.x, &head.r, &head.normed, &head.d_x, &head.d_normed];
        let buffers =
            tapes.chain(scratch).chain(head).chain(&decoder.inputs).chain([&decoder.x, &decoder.inverse_sums]);
        let halves = decoder.tapes.iter().map(|tape| &tape.rounded_gate_up);
        let halves = halves.chain([rounded_activation, rounded_excess, &decoder.rounded_excess]);
        buffers.map(|buffer| size_of::<f32>() * buffer.capacity()).sum::<usize>()
            + halves.map(|half| size_of::<half::bf16>() * half.capacity()).sum::<usize>()
            + lora::Scratch::bytes(lora)
            + decoder.compact.iter().map(CompactTape::bytes).sum::<usize>()
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
            let longest = 64;
            let adapter = lora.clone().map(|lora| Adapter::new(&model, lora, 1).unwrap());
            let parameters = Parameters { base: &model.weights, adapter: adapter.as_ref(), dropout_seed: Some(1) };
            let mut gradient = vec![0.0; adapter.as_ref().map_or(model.layout.len, |adapter| adapter.layout.len)];
            for keep in [None, Some(Keep::Inputs), Some(Keep::All)] {
                let mut decoder = Decoder::new(&model, longest).with_precision(precision);
                for (whole, batch) in [(&smaller, &smaller), (&whole, &batch)] {
                    match keep {
                        None => drop(decoder.logps(parameters, whole)),
                        Some(keep) => {
                            decoder.forward(parameters, whole, keep);
                            decoder.backward(parameters, batch, &[0.3, -0.3], &mut gradient);
                        }
                    }
                }
                let common = if keep.is_some() { attention::common_bytes(decoder.heads(), longest) } else { 0 };
                let held = held(&decoder) + size_of::<f32>() * longest * model.config.head_dim + common;
                let rows = match keep {
                    Some(keep) if !Decoder::keeps_behind(precision, lora.is_some(), keep) => batch.rows(),
                    _ => whole.rows(),
                };
                let (behind, scored) = (whole.rows() - rows, whole.targets.len());
                let size = PassSize { rows, behind, scored, longest };
                let foretold = Decoder::bytes(&model.config, precision, lora.as_ref(), size, keep);
                let slack = if keep.is_none() || for_scores || precision == Precision::Bf16 { 1.5 } else { 1.05 };
                assert!(
                    held <= foretold && foretold as f64 <= slack * held as f64,
                    "{keep:?} {lora:?}: {held} bytes of {foretold} foretold"
                );
            }
        }
    }
}
