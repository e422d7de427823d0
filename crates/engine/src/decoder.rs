//! The decoder, written once over the operations: for log-probabilities, training and generation.
//!
//! ```text
//! x ─┬─ rmsnorm ─ qkv ─ rope ─ attention ─ output ─(+)─┬─ rmsnorm ─ gate·up ─ swiglu ─ down ─(+)─ x'
//!    └──────────────────────────────────────────────────┘└──────────────────────────────────────┘
//! ```

mod blocks;
mod divergence;
mod head;
mod infer;
mod memory;
mod packed;
mod parameters;
mod tape;

use std::sync::Arc;

use half::bf16;

use crate::backend::{Cpu, Gradient, Pass};
use crate::batch::PackedBatch;
use crate::mixture::Shared;
use crate::model::Model;
use crate::ops::attention::Heads;
use crate::ops::rope::RopeTable;
use crate::precision::Precision;

pub(crate) use blocks::{DecoderOn, Shape};
pub use memory::PassSize;
pub use parameters::Parameters;

pub use crate::ops::divergence::Head;
pub(crate) use infer::KeyValueCache;
pub(crate) use packed::PackedModel;

/// How much of the forward pass is kept for the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// Everything that the backward pass reads.
    All,
    /// Only each block's input; the backward pass computes the block again (gradient checkpointing).
    Inputs,
}

/// Runs a model's forward and backward passes, and owns the memory they need between calls.
///
/// Weights and gradients are passed to each call, so that one decoder serves several policies of one shape, with
/// adapters and without. A model with a score head gives the scores of responses where others give log-probabilities;
/// its batches are [`PackedBatch::for_scores`].
#[derive(Debug)]
pub struct Decoder(Typed);

/// By the type of activations.
#[derive(Debug)]
enum Typed {
    F32(Box<DecoderOn<Cpu<f32>>>),
    Bf16(Box<DecoderOn<Cpu<bf16>>>),
}

/// Runs an expression with the decoder of either type.
macro_rules! typed {
    ($decoder:expr, $of_type:ident => $run:expr) => {
        match $decoder {
            Typed::F32($of_type) => $run,
            Typed::Bf16($of_type) => $run,
        }
    };
}

/// As [`typed`], of an expression that cannot fail on the CPU.
macro_rules! run {
    ($decoder:expr, $of_type:ident => $run:expr) => {{
        let Ok(result) = typed!($decoder, $of_type => $run);
        result
    }};
}

impl Decoder {
    /// A decoder for models of this shape. `positions` is the longest sequence that it will see.
    pub fn new(model: &Model, positions: usize) -> Self {
        let (shape, rope) = (Arc::new(Shape::new(model)), RopeTable::new(&model.config, positions));
        Self(Typed::F32(Box::new(DecoderOn::on_cpu(shape, rope))))
    }

    /// The same decoder, still without [announced rows](Self::with_rows), with products in another precision than f32.
    pub fn with_precision(self, precision: Precision) -> Self {
        let (shape, rope) = typed!(self.0, decoder => decoder.into_parts());
        Self(match precision {
            Precision::F32 => Typed::F32(Box::new(DecoderOn::on_cpu(shape, rope))),
            Precision::Bf16 => Typed::Bf16(Box::new(DecoderOn::on_cpu(shape, rope))),
        })
    }

    /// The same decoder, whose buffers are made at once for passes of `rows` tokens that train and as many `behind` as
    /// [`PassSize`] says, so that those of its blocks need not grow from one pass to the next.
    pub fn with_rows(mut self, rows: usize, behind: usize) -> Self {
        typed!(&mut self.0, decoder => decoder.announce(rows, behind));
        self
    }

    /// The log-probability of each response of the batch, summed over its tokens; or its score.
    pub fn logps<'a>(&mut self, parameters: impl Into<Parameters<'a>>, batch: &'a PackedBatch) -> Vec<f64> {
        let parameters = parameters.into();
        run!(&mut self.0, decoder => decoder.logps(&decoder.pass(parameters, batch), batch))
    }

    /// As [`logps`](Self::logps), keeping what [`backward`](Self::backward) needs.
    pub fn forward<'a>(
        &mut self,
        parameters: impl Into<Parameters<'a>>,
        batch: &'a PackedBatch,
        keep: Keep,
    ) -> Vec<f64> {
        let parameters = parameters.into();
        run!(&mut self.0, decoder => decoder.forward(&decoder.pass(parameters, batch), batch, keep))
    }

    /// Adds to `gradient` the derivative of Σ d_logps\[i\]·logp\[i\] with respect to every weight of what is trained:
    /// of the adapter if there is one, else of the model.
    ///
    /// # Panics
    /// If the last call was not [`forward`](Self::forward) with the same parameters and batch. The forward pass may have had
    /// [further responses](PackedBatch::push_response) behind this batch, which cost nothing here.
    pub fn backward<'a>(
        &mut self,
        parameters: impl Into<Parameters<'a>>,
        batch: &'a PackedBatch,
        d_logps: &[f64],
        gradient: &mut [f32],
    ) {
        let parameters = parameters.into();
        run!(&mut self.0, decoder => {
            let pass = decoder.pass(parameters, batch);
            decoder.backward(&pass, batch, d_logps, &mut pass.gradient(gradient))
        });
    }

    /// Forward and backward in one, for derivatives that are known beforehand: no logits are computed twice.
    /// Returns the log-probabilities.
    ///
    /// # Panics
    /// If the batch has [responses behind](PackedBatch::push_response).
    pub fn forward_backward<'a>(
        &mut self,
        parameters: impl Into<Parameters<'a>>,
        batch: &'a PackedBatch,
        d_logps: &[f64],
        keep: Keep,
        gradient: &mut [f32],
    ) -> Vec<f64> {
        let parameters = parameters.into();
        run!(&mut self.0, decoder => {
            let pass = decoder.pass(parameters, batch);
            decoder.forward_backward(&pass, batch, d_logps, keep, &mut pass.gradient(gradient))
        })
    }

    /// As [`DecoderOn::infer`].
    pub(crate) fn infer(
        &mut self,
        policies: &Shared<'_>,
        packed: Option<&PackedModel>,
        tokens: &[u32],
        positions: &[u32],
        wanted: &[usize],
        cache: &mut dyn KeyValueCache,
    ) -> &[f32] {
        run!(&mut self.0, decoder => decoder.infer(policies, packed, tokens, positions, wanted, cache))
    }

    /// The normalised final hidden rows that predict the scored tokens of the batch, `[scored tokens, hidden]`.
    ///
    /// Those of a reference, with its vocabulary head, are the [`Head`] that a policy of the same shape is compared with.
    pub fn head_rows(&mut self, weights: &[f32], batch: &PackedBatch) -> Vec<f32> {
        run!(&mut self.0, decoder => {
            let pass = decoder.pass_of_parts(weights, &[None]).over(batch);
            decoder.scored_rows(&pass, batch)
        })
    }

    /// As [`head_rows`](Self::head_rows), of several policies of one model at once: the weighted sum of their rows.
    pub(crate) fn mixed_rows(&mut self, policies: &Shared<'_>, batch: &PackedBatch) -> Vec<f32> {
        let batch = batch.repeated(policies.adapters.len());
        let mut rows = run!(&mut self.0, decoder => {
            let pass = decoder.pass_of_parts(&policies.model.weights, &policies.adapters).over(&batch);
            decoder.scored_rows(&pass, &batch)
        });
        policies.weighted_sum(&mut rows).to_vec()
    }

    /// As [`forward`](Self::forward); returns for each response its log-probability under the policy, and the divergence
    /// from the reference along it in nats, which is exactly 0 where both are the same model.
    ///
    /// # Panics
    /// If the reference's head or rows have not the shape that the policy's have on this batch.
    pub fn forward_with_divergence<'a>(
        &mut self,
        parameters: impl Into<Parameters<'a>>,
        reference: Head<'_>,
        batch: &'a PackedBatch,
        keep: Keep,
    ) -> (Vec<f64>, Vec<f64>) {
        let parameters = parameters.into();
        run!(&mut self.0, decoder => {
            decoder.forward_with_divergence(&decoder.pass(parameters, batch), reference, batch, keep)
        })
    }

    /// Adds to `gradient` the derivative of Σ d_logps\[i\]·logp\[i\] + d_divergences\[i\]·divergence\[i\] with respect to
    /// every weight of what is trained.
    ///
    /// # Panics
    /// If the last call was not [`forward_with_divergence`](Self::forward_with_divergence) with the same parameters,
    /// reference and batch.
    pub fn backward_with_divergence<'a>(
        &mut self,
        parameters: impl Into<Parameters<'a>>,
        reference: Head<'_>,
        batch: &'a PackedBatch,
        derivatives: [&[f64]; 2],
        gradient: &mut [f32],
    ) {
        let parameters = parameters.into();
        run!(&mut self.0, decoder => {
            let pass = decoder.pass(parameters, batch);
            decoder.backward_with_divergence(&pass, reference, batch, derivatives, &mut pass.gradient(gradient))
        });
    }

    /// Numbers and width of the attention heads.
    pub(crate) fn heads(&self) -> Heads {
        typed!(&self.0, decoder => decoder.shape.heads)
    }

    /// Whether a pass that keeps what `keep` says for the backward pass, of an adapter if `adapted`, keeps it of responses [added
    /// behind](PackedBatch::push_response) too, which needs none of it.
    pub fn keeps_behind(adapted: bool, keep: Keep) -> bool {
        keep == Keep::All && adapted
    }
}

#[cfg(test)]
mod tests;
