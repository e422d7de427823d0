//! Low-rank adaptation of products on a device; see [`ops::lora`](crate::ops::lora), whose formulas these are.

use std::ops::Range;

use super::device::{Buffer, Device, Number, View, ViewMut};
use super::ops::dropout::Dropout;
use super::ops::linear::{self, Matrix, MatrixMut, product};
use super::weights::Weights;
use crate::backend::{Room, Site};
use crate::error::{Error, Result};
use crate::lora::{self, Adapter, AdapterLayout, LoraOptions};
use crate::ops::lora as cpu;

/// An adapter on a device.
#[derive(Debug)]
pub(crate) struct AdapterOn<D: Device, T> {
    layout: AdapterLayout,
    options: LoraOptions,
    pub(super) weights: Weights<D, T>,
}

impl<D: Device, T: Number> AdapterOn<D, T> {
    /// A copy.
    ///
    /// # Errors
    /// An adapter of DoRA ([`Error::Input`]), and those of [`Buffer::of`].
    pub(crate) fn new(device: &D, adapter: &Adapter) -> Result<Self> {
        let Adapter { layout, options, weights } = adapter;
        if options.dora {
            return Err(Error::input("DoRA runs on the CPU only: train on it, or set `lora_dora = false`."));
        }
        let weights = Weights::new(device, weights)?;
        Ok(Self { layout: layout.clone(), options: options.clone(), weights })
    }

    /// Where the score head lies, if the adapter has its own.
    pub(super) fn score_head(&self) -> Option<&Range<usize>> {
        self.layout.score_head.as_ref()
    }

    /// What adapts a product, if anything. `dropout` is the seed of the pass and the keys of its rows.
    pub(super) fn at<'p>(&'p self, site: Site, dropout: Option<(u64, View<'p, u64>)>) -> Option<LowRank<'p, D, T>> {
        let Self { layout, options, weights } = self;
        let dropout = dropout.filter(|_| options.dropout > 0.0).map(|(seed, row_keys)| Dropout {
            rate: options.dropout,
            seed: lora::dropout_seed(seed, site.block, site.product),
            row_keys,
        });
        let place = layout.site(site.block, site.product)?;
        Some(LowRank { place, weights, rank: options.rank, scale: options.scale() as f32, dropout })
    }
}

/// Memory that holds nothing between products, and of one product its `d_u` alone.
#[derive(Debug)]
pub(super) struct Scratch<D: Device, T> {
    /// What [`LowRank::backward_input`] leaves for [`LowRank::backward_weight`].
    d_u: Buffer<D, T>,
    dropped: Buffer<D, T>,
}

// not derived, which would ask as much of D and T
impl<D: Device, T> Default for Scratch<D, T> {
    fn default() -> Self {
        Self { d_u: Buffer::default(), dropped: Buffer::default() }
    }
}

/// An adapter at one product.
#[derive(Debug, Clone, Copy)]
pub(super) struct LowRank<'p, D: Device, T> {
    place: &'p cpu::Site,
    weights: &'p Weights<D, T>,
    rank: usize,
    scale: f32,
    dropout: Option<Dropout<'p>>,
}

impl<'p, D: Device, T: Number> LowRank<'p, D, T> {
    /// y += s·u·Bᵀ with u = drop(x)·Aᵀ, which is kept. x `[n, inputs]`, y `[n, outputs]`.
    pub(super) fn add_forward<O: Number>(
        &self,
        device: &D,
        room: Room,
        x: View<'_, T>,
        mut y: ViewMut<'_, O>,
        kept: &mut Buffer<D, T>,
        scratch: &mut Scratch<D, T>,
    ) -> Result<()> {
        kept.fit(device, room.most * self.width())?;
        let x = self.dropped(device, room, x, &mut scratch.dropped)?;
        let u = 0..room.rows * self.width();
        linear::forward(device, x, self.a(), kept.view_mut().range(u.clone()), self.inputs(), false)?;
        let (u, outputs) = (Matrix::rows(kept.view().range(u), self.width()), y.len() / room.rows);
        for (index, target) in self.place.targets.iter().enumerate() {
            let y = MatrixMut::rows(y.again(), outputs).columns(target.columns.clone());
            product(device, u.columns(self.part(index)), self.b(index).transposed(), y, self.scale, true)?;
        }
        Ok(())
    }

    /// dx += s·dy·B·A, where anybody asks for it, and what the derivatives for A need. dy `[n, outputs]`, dx `[n, inputs]`.
    pub(super) fn backward_input(
        &self,
        device: &D,
        room: Room,
        dy: View<'_, T>,
        dx: Option<ViewMut<'_, T>>,
        scratch: &mut Scratch<D, T>,
    ) -> Result<()> {
        let (Scratch { d_u, dropped }, width, inputs) = (scratch, self.width(), self.inputs());
        d_u.fit(device, room.most * width)?;
        let (all, outputs) = (0..room.rows * width, dy.len() / room.rows);
        for (index, target) in self.place.targets.iter().enumerate() {
            let dy = Matrix::rows(dy, outputs).columns(target.columns.clone());
            let part = MatrixMut::rows(d_u.view_mut().range(all.clone()), width).columns(self.part(index));
            product(device, dy, self.b(index), part, self.scale, false)?;
        }
        let Some(dx) = dx else { return Ok(()) };
        let (d_u, a) = (Matrix::rows(d_u.view().range(all), width), Matrix::rows(self.a(), inputs));
        let Some(dropout) = self.dropout else {
            return product(device, d_u, a, MatrixMut::rows(dx, inputs), 1.0, true);
        };
        dropped.fit(device, room.most * inputs)?;
        let mut d_dropped = dropped.view_mut().range(0..room.rows * inputs);
        product(device, d_u, a, MatrixMut::rows(d_dropped.again(), inputs), 1.0, false)?;
        dropout.backward(device, d_dropped.as_view(), dx)
    }

    /// Adds the derivatives for A and B to a gradient of the adapter's layout. `kept` is of [`add_forward`](Self::add_forward),
    /// `scratch` as [`backward_input`](Self::backward_input) of the same dy has left it.
    pub(super) fn backward_weight(
        &self,
        device: &D,
        room: Room,
        [dy, x]: [View<'_, T>; 2],
        kept: &Buffer<D, T>,
        mut gradient: ViewMut<'_, f32>,
        scratch: &mut Scratch<D, T>,
    ) -> Result<()> {
        let (Scratch { d_u, dropped }, width) = (scratch, self.width());
        let (all, outputs) = (0..room.rows * width, dy.len() / room.rows);
        let u = Matrix::rows(kept.view().range(all.clone()), width);
        for (index, target) in self.place.targets.iter().enumerate() {
            let dy = Matrix::rows(dy, outputs).columns(target.columns.clone());
            let d_b = MatrixMut::rows(gradient.again().range(target.b.clone()), self.rank);
            product(device, dy.transposed(), u.columns(self.part(index)), d_b, self.scale, true)?;
        }
        let x = self.dropped(device, room, x, dropped)?;
        linear::backward_weight(device, d_u.view().range(all), x, gradient.range(self.place.a.clone()), self.inputs())
    }

    /// drop(x).
    fn dropped<'m>(&self, device: &D, room: Room, x: View<'m, T>, memory: &'m mut Buffer<D, T>) -> Result<View<'m, T>> {
        let Some(dropout) = self.dropout else { return Ok(x) };
        memory.fit(device, room.most * self.inputs())?;
        dropout.forward(device, x, memory.view_mut().range(0..x.len()))?;
        Ok(memory.view().range(0..x.len()))
    }

    /// Columns of x.
    fn inputs(&self) -> usize {
        self.place.a.len() / self.width()
    }

    /// Columns of u.
    fn width(&self) -> usize {
        self.place.targets.len() * self.rank
    }

    /// The columns of u that belong to a target.
    fn part(&self, index: usize) -> Range<usize> {
        index * self.rank..(index + 1) * self.rank
    }

    /// A of every target, `[width, inputs]`.
    fn a(&self) -> View<'p, T> {
        self.weights.factor(&self.place.a)
    }

    /// B of a target, `[columns, rank]`.
    fn b(&self, index: usize) -> Matrix<'p, T> {
        Matrix::rows(self.weights.factor(&self.place.targets[index].b), self.rank)
    }
}
