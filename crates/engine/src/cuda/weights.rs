//! Weights on a device.

use std::ops::Range;

use super::device::{Buffer, Device, Number, View};
use super::ops::elementwise;
use crate::error::Result;

/// Weights of a model, or of an adapter.
#[derive(Debug)]
pub(crate) struct Weights<D: Device, T> {
    /// All of them, in their layout.
    all: Buffer<D, f32>,
    /// The same as factors of products, unless these are in f32.
    factors: Buffer<D, T>,
}

impl<D: Device, T: Number> Weights<D, T> {
    /// A copy of weights of the host.
    ///
    /// # Errors
    /// Those of [`Buffer::of`] and of kernels.
    pub(crate) fn new(device: &D, weights: &[f32]) -> Result<Self> {
        let all = Buffer::of(device, weights)?;
        let factors = Buffer::zeros(device, if T::IS_ROUNDED { weights.len() } else { 0 })?;
        let mut new = Self { all, factors };
        new.round(device)?;
        Ok(new)
    }

    /// Makes the factors of the weights that there are now.
    fn round(&mut self, device: &D) -> Result<()> {
        if T::IS_ROUNDED { elementwise::convert(device, self.all.view(), self.factors.view_mut()) } else { Ok(()) }
    }

    /// Those of a place.
    pub(super) fn at(&self, range: &Range<usize>) -> View<'_, f32> {
        self.all.view().range(range.clone())
    }

    /// The same as a factor of products.
    pub(super) fn factor(&self, range: &Range<usize>) -> View<'_, T> {
        self.all.view().as_numbers().unwrap_or_else(|| self.factors.view()).range(range.clone())
    }
}
