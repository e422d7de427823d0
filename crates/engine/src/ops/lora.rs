//! Low-rank adaptation of a matrix product (LoRA, arXiv 2106.09685): y = x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ with W frozen.
//!
//! Matrices that share an input and are multiplied as one are adapted together: their A lie one under the other and
//! are one product, each B writes its own columns of y.

use std::ops::Range;

use rayon::prelude::*;

use super::dropout::Dropout;
use super::linear::{self, View, ViewMut, product};
use super::simd::{dispatch, dot};
use super::{Number, dora, fit};
use crate::precision::Precision;

/// Where the factors that adapt one product lie in an adapter's flat weights.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Site {
    /// A of every target, one under the other, `[targets·rank, inputs]`.
    pub(crate) a: Range<usize>,
    /// The adapted matrices, in the order of their columns in y. A product without any is not adapted.
    pub(crate) targets: Vec<Target>,
}

/// One adapted matrix of a product.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    /// Its columns of y, which are its rows of the product's W.
    pub(crate) columns: Range<usize>,
    /// B, `[columns, rank]`.
    pub(crate) b: Range<usize>,
    /// DoRA's m, `[columns]`; empty without DoRA.
    pub(crate) magnitude: Range<usize>,
}

/// An adapter at one product.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LowRank<'a> {
    pub(crate) site: &'a Site,
    /// All weights of the adapter.
    pub(crate) weights: &'a [f32],
    pub(crate) rank: usize,
    /// The factor s.
    pub(crate) scale: f32,
    /// The dropout of A's input.
    pub(crate) dropout: Option<Dropout<'a>>,
    /// The arithmetic of its products.
    pub(crate) precision: Precision,
    /// Whether a row is computed by itself, so that its bits do not depend on how many there are.
    pub(crate) rowwise: bool,
}

/// Memory that holds nothing between products, and of one product its `d_u` alone.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// What [`LowRank::backward_input`] leaves for [`LowRank::backward_weight`].
    pub(super) d_u: Vec<f32>,
    /// DoRA's u: its forward pass has none.
    pub(super) u: Vec<f32>,
    pub(super) dropped: Vec<f32>,
    pub(super) weight: Vec<f32>,
    pub(super) y: Vec<f32>,
}

#[cfg(test)]
impl Scratch {
    /// What it takes.
    pub(crate) fn bytes(&self) -> usize {
        let Self { u, d_u, dropped, weight, y } = self;
        [u, d_u, dropped, weight, y].iter().map(|buffer| size_of_val(buffer.as_slice())).sum()
    }
}

impl<'a> LowRank<'a> {
    /// y = x·Wᵀ with the adapted W, or y += with `add`. x `[n, inputs]`, w `[outputs, inputs]`, y `[n, outputs]`; `u` keeps
    /// drop(x)·Aᵀ for the backward pass, except with DoRA.
    ///
    /// With B = 0, and with DoRA's m as the norms of W besides, y has the bits that it has without an adapter.
    pub(crate) fn forward(
        &self,
        x: &[impl Number],
        w: &[f32],
        y: &mut [f32],
        add: bool,
        u: &mut Vec<f32>,
        scratch: &mut Scratch,
    ) {
        let (inputs, product) = (self.inputs(), linear::forward_as(self.rowwise, self.precision));
        if self.is_dora() {
            return product(x, self.merged(w, &mut scratch.weight), y, inputs, add);
        }
        product(x, w, y, inputs, add);
        self.add_forward(x, y, u, scratch);
    }

    /// y += s·u·Bᵀ with u = drop(x)·Aᵀ, which is kept. x `[n, inputs]`, y `[n, outputs]`.
    ///
    /// # Panics
    /// With DoRA, whose W is no sum of this and another.
    pub(crate) fn add_forward(&self, x: &[impl Number], y: &mut [f32], u: &mut Vec<f32>, scratch: &mut Scratch) {
        assert!(!self.is_dora(), "DoRA is no update that can be added");
        let outputs = y.len() / (x.len() / self.inputs());
        let u = match self.dropout {
            None => self.down(x, u),
            Some(dropout) => self.down(dropped(dropout, x, &mut scratch.dropped), u),
        };
        if self.rowwise {
            return self.add_up_rowwise(u, y, outputs);
        }
        let u = View::rows(u, self.width());
        for (index, target) in self.site.targets.iter().enumerate() {
            let b = View::rows(self.b(index), self.rank);
            let y = ViewMut::rows(y, outputs).columns(target.columns.clone());
            product(self.precision, u.columns(self.part(index)), b.transposed(), y, self.scale, true);
        }
    }

    /// y += s·u·Bᵀ of all targets, one row after the other.
    fn add_up_rowwise(&self, u: &[f32], y: &mut [f32], outputs: usize) {
        y.par_chunks_exact_mut(outputs).zip(u.par_chunks_exact(self.width())).for_each(|(y, u)| {
            dispatch(
                #[inline(always)]
                || {
                    for (index, target) in self.site.targets.iter().enumerate() {
                        let (u, rows) = (&u[self.part(index)], self.b(index).chunks_exact(self.rank));
                        // loops, since what closures of iterators compute may be left to a slower instruction set
                        for (y, b) in y[target.columns.clone()].iter_mut().zip(rows) {
                            *y += self.scale * dot(u, b);
                        }
                    }
                },
            );
        });
    }

    /// dx = dy·W with the adapted W, where anybody asks for it. dy `[n, outputs]`, w `[outputs, inputs]`, dx `[n, inputs]`.
    pub(crate) fn backward_input(&self, dy: &[impl Number], w: &[f32], dx: Option<&mut [f32]>, scratch: &mut Scratch) {
        let inputs = self.inputs();
        let Scratch { d_u, dropped, weight, .. } = scratch;
        if self.is_dora() {
            if let Some(dx) = dx {
                linear::backward_input(self.precision, dy, self.merged(w, weight), dx, inputs);
            }
            return;
        }
        let d_u = self.d_u(dy, w.len() / inputs, |index| self.b(index), d_u);
        let Some(dx) = dx else { return };
        linear::backward_input(self.precision, dy, w, dx, inputs);
        let a = View::rows(&self.weights[self.site.a.clone()], inputs);
        match self.dropout {
            None => product(self.precision, d_u, a, ViewMut::rows(dx, inputs), 1.0, true),
            Some(dropout) => {
                let d_dropped = fit(dropped, dx.len());
                product(self.precision, d_u, a, ViewMut::rows(d_dropped, inputs), 1.0, false);
                dropout.backward(d_dropped, dx);
            }
        }
    }

    /// Adds to `gradient`, which has the adapter's layout, the derivatives for A and B (and DoRA's m). `u` is what
    /// [`forward`](Self::forward) kept, `scratch` what [`backward_input`](Self::backward_input) left for the same dy.
    pub(crate) fn backward_weight(
        &self,
        dy: &[impl Number],
        x: &[impl Number],
        w: &[f32],
        gradient: &mut [f32],
        u: &[f32],
        scratch: &mut Scratch,
    ) {
        if self.is_dora() {
            return dora::backward_weight(self, dy, x, w, gradient, scratch);
        }
        let inputs = self.inputs();
        let (outputs, width) = (w.len() / inputs, self.width());
        let len = x.len() / inputs * width;
        let u = View::rows(&u[..len], width);
        for (index, target) in self.site.targets.iter().enumerate() {
            let dy = View::rows(dy, outputs).columns(target.columns.clone());
            let d_b = ViewMut::rows(&mut gradient[target.b.clone()], self.rank);
            product(self.precision, dy.transposed(), u.columns(self.part(index)), d_b, self.scale, true);
        }
        let d_u = View::rows(&scratch.d_u[..len], width);
        let d_a = ViewMut::rows(&mut gradient[self.site.a.clone()], inputs);
        match self.dropout {
            None => product(self.precision, d_u.transposed(), View::rows(x, inputs), d_a, 1.0, true),
            Some(dropout) => {
                let x = View::rows(dropped(dropout, x, &mut scratch.dropped), inputs);
                product(self.precision, d_u.transposed(), x, d_a, 1.0, true);
            }
        }
    }

    /// Replaces the adapted rows of w `[outputs, inputs]` by those of W + s·B·A, with DoRA m·(W + s·B·A)/‖W + s·B·A‖.
    pub(crate) fn merge(&self, w: &mut [f32]) {
        let inputs = self.inputs();
        for (index, target) in self.site.targets.iter().enumerate() {
            self.merge_rows(index, 0, &mut w[target.columns.start * inputs..target.columns.end * inputs]);
        }
    }

    /// As [`merge`](Self::merge), of the rows `w` of one target, of which `first` is the first.
    pub(crate) fn merge_rows(&self, index: usize, first: usize, w: &mut [f32]) {
        let magnitudes = &self.weights[self.site.targets[index].magnitude.clone()];
        w.par_chunks_mut(self.inputs()).enumerate().for_each(|(row, w)| {
            let row = first + row;
            dispatch(
                #[inline(always)]
                || {
                    self.add_update(index, row, w);
                    if let Some(m) = magnitudes.get(row) {
                        let factor = dora::ratio(*m, dot(w, w).sqrt());
                        w.iter_mut().for_each(|w| *w *= factor);
                    }
                },
            );
        });
    }

    /// Adds a row of s·B·A to that row of a target's W.
    #[inline(always)]
    pub(super) fn add_update(&self, index: usize, row: usize, w: &mut [f32]) {
        let b = &self.b(index)[self.part(row)];
        let a = &self.weights[self.site.a.clone()][index * self.rank * w.len()..(index + 1) * self.rank * w.len()];
        // summed by itself first, so that its small terms are not rounded to the precision of W one by one
        let mut update = vec![0.0; w.len()];
        for (b, a) in b.iter().zip(a.chunks_exact(w.len())) {
            let factor = self.scale * b;
            for (update, a) in update.iter_mut().zip(a) {
                *update = factor.mul_add(*a, *update);
            }
        }
        w.iter_mut().zip(update).for_each(|(w, update)| *w += update);
    }

    /// Columns of x.
    pub(super) fn inputs(&self) -> usize {
        self.site.a.len() / self.width()
    }

    /// Columns of u.
    pub(super) fn width(&self) -> usize {
        self.site.targets.len() * self.rank
    }

    /// u = x·Aᵀ of all targets, `[n, targets·rank]`.
    pub(super) fn down<'u>(&self, x: &[impl Number], u: &'u mut Vec<f32>) -> &'u [f32] {
        let inputs = self.inputs();
        let u = fit(u, x.len() / inputs * self.width());
        linear::forward_as(self.rowwise, self.precision)(x, &self.weights[self.site.a.clone()], u, inputs, false);
        u
    }

    /// The derivative for u: s·dy·B for each target, with B as `b` gives it, `[n, targets·rank]`.
    pub(super) fn d_u<'u, 'b>(
        &self,
        dy: &[impl Number],
        outputs: usize,
        b: impl Fn(usize) -> &'b [f32],
        d_u: &'u mut Vec<f32>,
    ) -> View<'u> {
        let width = self.width();
        let d_u = fit(d_u, dy.len() / outputs * width);
        for (index, target) in self.site.targets.iter().enumerate() {
            let dy = View::rows(dy, outputs).columns(target.columns.clone());
            let part = ViewMut::rows(d_u, width).columns(self.part(index));
            product(self.precision, dy, View::rows(b(index), self.rank), part, self.scale, false);
        }
        View::rows(d_u, width)
    }

    /// The columns of u that belong to a target; also where row `index` of a matrix of `rank` columns lies.
    pub(super) fn part(&self, index: usize) -> Range<usize> {
        index * self.rank..(index + 1) * self.rank
    }

    /// The factor B of a target, `[columns, rank]`.
    pub(super) fn b(&self, index: usize) -> &'a [f32] {
        &self.weights[self.site.targets[index].b.clone()]
    }

    fn is_dora(&self) -> bool {
        self.site.targets.iter().any(|target| !target.magnitude.is_empty())
    }

    /// A copy of w with its adapted rows merged.
    fn merged<'w>(&self, w: &[f32], merged: &'w mut Vec<f32>) -> &'w [f32] {
        let merged = fit(merged, w.len());
        merged.copy_from_slice(w);
        self.merge(merged);
        merged
    }
}

/// drop(x), in `memory`.
fn dropped<'m>(dropout: Dropout<'_>, x: &[impl Number], memory: &'m mut Vec<f32>) -> &'m [f32] {
    let dropped = fit(memory, x.len());
    dropout.forward(x, dropped);
    dropped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::finite_difference::{check, random};

    const KEYS: [u64; 5] = [3, 1, 4, 15, 9];

    /// A product of 7 inputs whose outputs 1 and 2 of 8, and 5 to 7, are adapted with rank 2.
    fn site(dora: bool) -> (Site, Vec<f32>) {
        let magnitude = |range: Range<usize>| if dora { range } else { 0..0 };
        let targets = vec![
            Target { columns: 1..3, b: 28..32, magnitude: magnitude(38..40) },
            Target { columns: 5..8, b: 32..38, magnitude: magnitude(40..43) },
        ];
        (Site { a: 0..28, targets }, random(43, 1))
    }

    fn low_rank<'a>(site: &'a Site, weights: &'a [f32], dropout: Option<Dropout<'a>>) -> LowRank<'a> {
        LowRank { site, weights, rank: 2, scale: 0.7, dropout, precision: Precision::F32, rowwise: false }
    }

    #[test]
    fn gradients_match_finite_differences() {
        let (x, w, dy) = (random(5 * 7, 2), random(8 * 7, 3), random(5 * 8, 4));
        let scratch = std::cell::RefCell::new(Scratch::default());
        for (dora, rate) in [(false, 0.0), (false, 0.4), (true, 0.0)] {
            let (site, weights) = site(dora);
            let dropout = (rate > 0.0).then_some(Dropout { rate, seed: 6, row_keys: &KEYS });
            let adapted = low_rank(&site, &weights, dropout);
            let run = |x: &[f32], weights: &[f32]| {
                let mut y = vec![0.0; dy.len()];
                let scratch = &mut scratch.borrow_mut();
                LowRank { weights, ..adapted }.forward(x, &w, &mut y, false, &mut Vec::new(), scratch);
                y
            };
            let (mut dx, mut gradient) = (vec![0.0; x.len()], vec![0.0; weights.len()]);
            let (mut u, mut y) = (Vec::new(), vec![0.0; dy.len()]);
            adapted.forward(&x, &w, &mut y, false, &mut u, &mut scratch.borrow_mut());
            adapted.backward_input(&dy, &w, Some(&mut dx), &mut scratch.borrow_mut());
            adapted.backward_weight(&dy, &x, &w, &mut gradient, &u, &mut scratch.borrow_mut());
            check(&x, &dx, &dy, |x| run(x, &weights));
            let held: Vec<_> = (0..2).map(|target| dora::norms(&adapted, target, &w)).collect();
            for range in [0..28, 28..38, if dora { 38..43 } else { 28..32 }] {
                check(&weights[range.clone()], &gradient[range.clone()], &dy, |part| {
                    let mut moved = weights.clone();
                    moved[range.clone()].copy_from_slice(part);
                    // the norms count as constants: where they move, m follows, so that m/‖V‖ stays
                    for (index, target) in site.targets.iter().enumerate().filter(|_| dora) {
                        let norms = dora::norms(&LowRank { weights: &moved, ..adapted }, index, &w);
                        let factors = norms.iter().zip(&held[index]).map(|(norm, held)| norm / held);
                        let m = moved[target.magnitude.clone()].iter_mut();
                        m.zip(factors).for_each(|(m, factor)| *m *= factor);
                    }
                    run(&x, &moved)
                });
            }
            // gradients add up, and need no dx
            let once = gradient.clone();
            adapted.backward_input(&dy, &w, None, &mut scratch.borrow_mut());
            adapted.backward_weight(&dy, &x, &w, &mut gradient, &u, &mut scratch.borrow_mut());
            assert!(gradient.iter().zip(&once).all(|(g, once)| (g - 2.0 * once).abs() < 1e-5));
        }
    }

    #[test]
    fn a_row_of_zeros_stays_one_with_dora() {
        let (site, mut weights) = site(true);
        weights[28..38].fill(0.0);
        let low_rank = low_rank(&site, &weights, None);
        let (x, w, dy) = (random(5 * 7, 2), vec![0.0; 8 * 7], random(5 * 8, 4));
        let (mut y, mut gradient) = (vec![1.0; dy.len()], vec![0.0; weights.len()]);
        low_rank.forward(&x, &w, &mut y, false, &mut Vec::new(), &mut Scratch::default());
        assert_eq!(y, [0.0; 40]);
        low_rank.backward_weight(&dy, &x, &w, &mut gradient, &[], &mut Scratch::default());
        assert!(gradient.iter().all(|g| g.is_finite()));
    }
}
