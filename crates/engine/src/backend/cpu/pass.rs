//! What a pass on the CPU computes with, and where the gradient goes.

use std::ops::Range;

use crate::batch::PackedBatch;
use crate::decoder::{PackedModel, Parameters};
use crate::lora::Adapter;
use crate::model::{BlockLayout, Product};
use crate::ops::Number;
use crate::ops::attention::Span;
use crate::ops::linear::{self, packed::Packed};
use crate::ops::lora::{LowRank, Scratch};
use crate::precision::Precision;
use crate::profile::{self, Stage, Work};

/// The parameters of one pass over the rows of one batch.
#[derive(Debug, Clone)]
pub(crate) struct Pass<'a> {
    pub(crate) base: &'a [f32],
    /// What adapts the model for each part of the rows: they fall into as many equal parts, one after the other. A pass
    /// that trains has one.
    adapters: Vec<Option<&'a Adapter>>,
    /// The seed and the rows' keys.
    dropout: Option<(u64, &'a [u64])>,
    /// Whether every row is computed by itself, so that its bits do not depend on how many there are.
    rowwise: bool,
    /// The arithmetic of matrix products.
    precision: Precision,
    /// Matrices to read instead of the model's, in a pass that does not train.
    packed: Option<&'a PackedModel>,
    /// The rows' tokens, and their positions in their sequences.
    pub(crate) tokens: &'a [u32],
    pub(crate) positions: &'a [u32],
    /// What the rows attend to.
    pub(crate) spans: Vec<Span<'a>>,
    /// Rows that go to the head, and the tokens that they predict, unless it gives scores or logits.
    pub(crate) scored_rows: &'a [u32],
    pub(crate) targets: &'a [u32],
}

impl<'a> Pass<'a> {
    /// # Panics
    /// If the adapter has dropout and the batch's examples no keys, or if it has DoRA besides.
    pub(crate) fn new(precision: Precision, parameters: Parameters<'a>, batch: &'a PackedBatch) -> Self {
        let Parameters { base, adapter, dropout_seed } = parameters;
        let dropout = dropout_seed.filter(|_| parameters.has_dropout()).map(|seed| (seed, batch.row_keys.as_slice()));
        if let Some((_, keys)) = dropout {
            assert_eq!(keys.len(), batch.rows(), "dropout needs examples with keys");
            assert!(!adapter.is_some_and(|adapter| adapter.options.dora), "DoRA cannot be trained with dropout");
        }
        Self { dropout, ..Self::of_parts(precision, base, &[adapter]).over(batch) }
    }

    /// A pass without dropout, and without rows yet, that computes a part of its rows with each of the adapters, or with none.
    pub(crate) fn of_parts(precision: Precision, base: &'a [f32], adapters: &[Option<&'a Adapter>]) -> Self {
        Self {
            base,
            adapters: adapters.to_vec(),
            dropout: None,
            rowwise: false,
            precision,
            packed: None,
            tokens: &[],
            positions: &[],
            spans: Vec::new(),
            scored_rows: &[],
            targets: &[],
        }
    }

    /// The same pass over rows that continue other sequences and of which some are wanted. `rowwise` computes every row by itself,
    /// which suits few rows.
    pub(crate) fn continuing(
        self,
        tokens: &'a [u32],
        positions: &'a [u32],
        scored_rows: &'a [u32],
        rowwise: bool,
    ) -> Self {
        Self { tokens, positions, scored_rows, rowwise, ..self }
    }

    /// The same pass whose rows attend to other spans.
    pub(crate) fn attending<'s>(&self, spans: Vec<Span<'s>>) -> Pass<'s>
    where
        'a: 's,
    {
        Pass { spans, ..self.clone() }
    }

    /// The same pass over the rows of a batch.
    pub(crate) fn over(self, batch: &'a PackedBatch) -> Self {
        let PackedBatch { tokens, positions, scored_rows, targets, .. } = batch;
        Self { tokens, positions, spans: batch.spans(), scored_rows, targets, ..self }
    }

    /// The same pass with the matrices of a packed model.
    pub(crate) fn with_packed(self, packed: Option<&'a PackedModel>) -> Self {
        Self { packed, ..self }
    }

    /// Whether an adapter is trained.
    pub(crate) fn is_adapted(&self) -> bool {
        self.adapters.iter().any(Option::is_some)
    }

    /// The weights of the model at a place.
    pub(crate) fn base(&self, range: &Range<usize>) -> &'a [f32] {
        &self.base[range.clone()]
    }

    /// The score head: the adapter's, which replaces that of the model at `range`, or the model's.
    pub(crate) fn score_head(&self, range: &Range<usize>) -> &'a [f32] {
        let adapted = only(&self.adapters).and_then(|adapter| adapter.score_head());
        adapted.unwrap_or_else(|| self.base(range))
    }

    /// The gradient of the [`score_head`](Self::score_head).
    pub(crate) fn score_gradient<'g>(&self, range: &Range<usize>, gradient: &'g mut Gradient<'_>) -> &'g mut [f32] {
        match gradient {
            Gradient::Base(gradient) => &mut gradient[range.clone()],
            Gradient::Adapter(gradient) => {
                let head = only(&self.adapters).and_then(|adapter| adapter.layout.score_head.clone());
                &mut gradient[head.unwrap_or_default()]
            }
        }
    }

    /// A product of block `index`.
    pub(crate) fn linear(&self, block: &BlockLayout, index: usize, product: Product) -> Linear<'a> {
        let range = block.product(product).clone();
        let at = |adapter: &Option<&'a Adapter>| {
            let low_rank = adapter.and_then(|adapter| adapter.at(index, product, self.dropout))?;
            Some(LowRank { precision: self.precision, rowwise: self.rowwise, ..low_rank })
        };
        Linear {
            w: &self.base[range.clone()],
            packed: self.packed.map(|packed| packed.product(index, product)),
            range,
            product,
            low_ranks: self.adapters.iter().map(at).collect(),
            rowwise: self.rowwise,
            precision: self.precision,
        }
    }

    /// The gradient that this pass adds to.
    ///
    /// # Panics
    /// If it does not have the layout of what is trained.
    pub(crate) fn gradient<'g>(&self, gradient: &'g mut [f32]) -> Gradient<'g> {
        let adapter = only(&self.adapters);
        let len = adapter.map_or(self.base.len(), |adapter| adapter.layout.len);
        assert_eq!(gradient.len(), len, "the gradient does not fit what is trained");
        if adapter.is_some() { Gradient::Adapter(gradient) } else { Gradient::Base(gradient) }
    }
}

/// Where a backward pass adds the gradient, in the layout of what is trained.
pub(crate) enum Gradient<'g> {
    Base(&'g mut [f32]),
    Adapter(&'g mut [f32]),
}

impl Gradient<'_> {
    /// The gradient of the model's weights at a place, unless they are frozen.
    pub(crate) fn base(&mut self, range: &Range<usize>) -> Option<&mut [f32]> {
        match self {
            Self::Base(gradient) => Some(&mut gradient[range.clone()]),
            Self::Adapter(_) => None,
        }
    }
}

/// What adapts all rows of a pass that trains.
///
/// # Panics
/// If the rows are in several parts.
fn only<T>(parts: &[Option<T>]) -> Option<&T> {
    let [only] = parts else { panic!("a pass over several policies has no gradient") };
    only.as_ref()
}

/// What each product of a block keeps for the backward pass of what adapts it: x·Aᵀ.
type Kept = [Vec<f32>; Product::ALL.len()];

/// A matrix product of a block, adapted or not. x `[n, inputs]`, y `[n, outputs]`.
pub(crate) struct Linear<'a> {
    w: &'a [f32],
    /// W in fewer bits, to read instead.
    packed: Option<&'a Packed>,
    range: Range<usize>,
    product: Product,
    /// One for each part of the rows.
    low_ranks: Vec<Option<LowRank<'a>>>,
    /// As in [`Pass`].
    rowwise: bool,
    /// As in [`Pass`].
    precision: Precision,
}

impl Linear<'_> {
    /// Times a product of W and as many rows as `x` has; what adapts W takes time, but is no work.
    fn span<T>(&self, stage: Stage, x: &[T], inputs: usize) -> profile::Span {
        profile::span(stage, || Work::Flops(2.0 * (x.len() / inputs * self.w.len()) as f64))
    }

    /// y = x·Wᵀ, or y += x·Wᵀ with `add`. `kept` takes what the backward pass of what adapts W reads.
    ///
    /// Several parts of the rows share the product with W, and what adapts each comes on top.
    pub(crate) fn forward(
        &self,
        x: &[impl Number],
        y: &mut [f32],
        inputs: usize,
        add: bool,
        kept: &mut Kept,
        scratch: &mut Scratch,
    ) {
        let _span = self.span(Stage::Forward, x, inputs);
        let u = &mut kept[self.product as usize];
        if let [Some(low_rank)] = self.low_ranks.as_slice() {
            return low_rank.forward(x, self.w, y, add, u, scratch);
        }
        match self.packed {
            Some(packed) => packed.forward(x, y, add),
            None => linear::forward_as(self.rowwise, self.precision)(x, self.w, y, inputs, add),
        }
        let parts = self.low_ranks.len();
        let parts = x.chunks_exact(x.len() / parts).zip(y.chunks_exact_mut(y.len() / parts)).zip(&self.low_ranks);
        for ((x, y), low_rank) in parts {
            if let Some(low_rank) = low_rank {
                low_rank.add_forward(x, y, u, scratch);
            }
        }
    }

    /// dx = dy·W, where anybody asks for it.
    pub(crate) fn backward_input(
        &self,
        dy: &[impl Number],
        dx: Option<&mut [f32]>,
        inputs: usize,
        scratch: &mut Scratch,
    ) {
        let _span = dx.as_deref().map(|dx| self.span(Stage::BackwardInput, dx, inputs));
        match (only(&self.low_ranks), dx) {
            (Some(low_rank), dx) => low_rank.backward_input(dy, self.w, dx, scratch),
            (None, Some(dx)) => linear::backward_input(self.precision, dy, self.w, dx, inputs),
            (None, None) => {}
        }
    }

    /// Adds the derivative for what is trained: W, or what adapts it, or nothing. `kept` is of
    /// [`forward`](Self::forward), `scratch` as [`backward_input`](Self::backward_input) of the same dy has left it.
    pub(crate) fn backward_weight(
        &self,
        dy: &[impl Number],
        x: &[impl Number],
        inputs: usize,
        gradient: &mut Gradient<'_>,
        kept: &Kept,
        scratch: &mut Scratch,
    ) {
        match (gradient, only(&self.low_ranks)) {
            (Gradient::Base(gradient), _) => {
                let _span = self.span(Stage::BackwardWeight, x, inputs);
                linear::backward_weight(self.precision, dy, x, &mut gradient[self.range.clone()], inputs);
            }
            (Gradient::Adapter(gradient), Some(low_rank)) => {
                low_rank.backward_weight(dy, x, self.w, gradient, &kept[self.product as usize], scratch);
            }
            (Gradient::Adapter(_), None) => {}
        }
    }
}
