//! What a pass on a device computes with, and where the gradient goes.

use std::ops::Range;

use super::attention::Plan;
use super::device::{Buffer, Device, Indices, Number, View, ViewMut};
use super::low_rank::{AdapterOn, LowRank};
use super::ops::attention::Tables;
use super::ops::rows::RowNumbers;
use super::weights::Weights;
use crate::backend::Site;
use crate::batch::PackedBatch;
use crate::error::Result;

/// The rows of a batch on a device.
pub(crate) struct Rows<D: Device> {
    pub(super) tokens: RowNumbers<D>,
    pub(super) positions: Indices<D>,
    pub(super) tables: Tables<D>,
    pub(super) scored: RowNumbers<D>,
    pub(super) targets: Indices<D>,
    /// For dropout; none where the batch has none.
    keys: Buffer<D, u64>,
    /// Whether the tables are for backward passes too.
    pub(super) trains: bool,
}

impl<D: Device> Rows<D> {
    /// Copies what kernels read of a batch, and where it `trains` what those of the gradient do.
    ///
    /// # Errors
    /// Those of [`Buffer::of`].
    pub(crate) fn new(device: &D, batch: &PackedBatch, trains: bool) -> Result<Self> {
        let plan = if trains { Plan::backward(&batch.spans()) } else { Plan::forward(&batch.spans()) };
        Ok(Self {
            tokens: RowNumbers::new(device, &batch.tokens)?,
            positions: Indices::new(device, &batch.positions)?,
            tables: Tables::new(device, &plan)?,
            scored: RowNumbers::new(device, &batch.scored_rows)?,
            targets: Indices::new(device, &batch.targets)?,
            keys: Buffer::of(device, &batch.row_keys)?,
            trains,
        })
    }
}

/// What a pass on a device computes with.
pub(crate) struct Pass<'p, D: Device, T> {
    pub(crate) weights: &'p Weights<D, T>,
    /// What adapts the model, which is frozen then.
    pub(crate) adapter: Option<&'p AdapterOn<D, T>>,
    /// The seed of the adapter's dropout; `None` drops nothing.
    pub(crate) dropout_seed: Option<u64>,
    pub(crate) rows: &'p Rows<D>,
}

impl<'p, D: Device, T: Number> Pass<'p, D, T> {
    /// What adapts a product, if anything.
    pub(super) fn low_rank(&self, site: Site) -> Option<LowRank<'p, D, T>> {
        let dropout = self.dropout_seed.map(|seed| (seed, self.rows.keys.view()));
        self.adapter.and_then(|adapter| adapter.at(site, dropout))
    }

    /// The score head: the adapter's, or that of the model at `range`.
    pub(super) fn score_head(&self, range: &Range<usize>) -> View<'p, T> {
        let of_adapter = |adapter: &'p AdapterOn<D, T>| Some(adapter.weights.factor(adapter.score_head()?));
        self.adapter.and_then(of_adapter).unwrap_or_else(|| self.weights.factor(range))
    }

    /// The gradient that this pass adds to, in the layout of what is trained.
    pub(crate) fn gradient<'g>(&self, gradient: ViewMut<'g, f32>) -> Gradient<'g> {
        match self.adapter {
            Some(adapter) => Gradient::Adapter(gradient, adapter.score_head().cloned()),
            None => Gradient::Base(gradient),
        }
    }
}

/// Where a backward pass adds the gradient, in the layout of what is trained.
#[derive(Debug)]
pub(crate) enum Gradient<'g> {
    Base(ViewMut<'g, f32>),
    /// With the place of the score head, if the adapter has its own.
    Adapter(ViewMut<'g, f32>, Option<Range<usize>>),
}

impl Gradient<'_> {
    /// The gradient of the model's weights at a place, unless they are frozen.
    pub(super) fn base(&mut self, range: &Range<usize>) -> Option<ViewMut<'_, f32>> {
        match self {
            Self::Base(gradient) => Some(gradient.again().range(range.clone())),
            Self::Adapter(..) => None,
        }
    }

    /// The gradient of the score head, which is at `range` of the model.
    pub(super) fn score_head(&mut self, range: &Range<usize>) -> Option<ViewMut<'_, f32>> {
        match self {
            Self::Base(gradient) => Some(gradient.again().range(range.clone())),
            Self::Adapter(gradient, place) => Some(gradient.again().range(place.clone()?)),
        }
    }
}
