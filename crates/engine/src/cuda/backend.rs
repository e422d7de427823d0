//! The operations of a decoder on a device.

use std::ops::Range;
use std::sync::Arc;

use super::device::{Buffer, Device, Number, View, ViewMut};
use super::low_rank;
use super::ops::attention;
use super::ops::rope::Rope;
use super::ops::rows;
use super::ops::{elementwise, linear, logprob, rmsnorm, swiglu};
use super::pass::{Gradient, Pass};
use crate::backend::{Backend, Derivative, Kept, Room, Site};
use crate::decoder::Shape;
use crate::error::{Error, Result};
use crate::ops::logprob::cut;
use crate::ops::rope::RopeTable;

/// A device, whose numbers for products are T.
#[derive(Debug)]
pub(crate) struct Cuda<D: Device, T> {
    device: Arc<D>,
    shape: Arc<Shape>,
    rope: Rope<D>,
    /// The derivative of the residual stream as products take it.
    passed: Buffer<D, T>,
    /// Memory of attention's gradient.
    delta: Buffer<D, f32>,
    workspace: Buffer<D, f32>,
    /// Memory of the gradient of a norm's gain.
    partial: Buffer<D, f32>,
    /// Memory of what adapts products.
    low_rank: low_rank::Scratch<D, T>,
}

/// Memory of the vocabulary head.
#[derive(Debug)]
pub(crate) struct Softmax<D: Device, T> {
    /// The softmax of the first scored rows.
    excess: Buffer<D, T>,
    inverse_sums: Buffer<D, f32>,
    kept: usize,
    /// That of some rows, and their logits.
    some: Buffer<D, T>,
    some_sums: Buffer<D, f32>,
    logits: Buffer<D, f32>,
    /// Log-probabilities, or scores, of all scored rows.
    logps: Buffer<D, f32>,
    /// Normalised rows times the factors of their softmax.
    scaled: Buffer<D, T>,
}

// not derived, which would ask as much of D and T
impl<D: Device, T> Default for Softmax<D, T> {
    fn default() -> Self {
        Self {
            excess: Buffer::default(),
            inverse_sums: Buffer::default(),
            kept: 0,
            some: Buffer::default(),
            some_sums: Buffer::default(),
            logits: Buffer::default(),
            logps: Buffer::default(),
            scaled: Buffer::default(),
        }
    }
}

impl<D: Device, T: Number> Cuda<D, T> {
    /// Whatever models have this shape, for sequences of the positions in a table.
    ///
    /// # Errors
    /// Those of [`Buffer::of`].
    pub(crate) fn new(device: Arc<D>, shape: Arc<Shape>, table: &RopeTable) -> Result<Self> {
        let rope = Rope::new(&*device, table)?;
        Ok(Self {
            device,
            shape,
            rope,
            passed: Buffer::default(),
            delta: Buffer::default(),
            workspace: Buffer::default(),
            partial: Buffer::default(),
            low_rank: low_rank::Scratch::default(),
        })
    }

    /// Memory for rows of a width, to write.
    fn fit<'b, N: Number>(&self, room: Room, buffer: &'b mut Buffer<D, N>, width: usize) -> Result<ViewMut<'b, N>> {
        buffer.fit(&*self.device, room.most * width)?;
        Ok(buffer.view_mut().range(0..room.rows * width))
    }

    /// The weights of a product as a factor.
    fn factor<'p>(&self, pass: &Pass<'p, D, T>, site: Site) -> View<'p, T> {
        pass.weights.factor(self.shape.layout.blocks[site.block].product(site.product))
    }

    /// The softmax of some scored rows, and their log-probabilities.
    fn some_softmax(
        &self,
        pass: &Pass<'_, D, T>,
        normed: &Buffer<D, T>,
        rows: &Range<usize>,
        softmax: &mut Softmax<D, T>,
    ) -> Result<()> {
        let (device, vocab) = (&*self.device, self.shape.vocab());
        self.some_logits(pass, normed, rows, &mut softmax.logits)?;
        softmax.some.fit(device, rows.len() * vocab)?;
        softmax.some_sums.fit(device, rows.len())?;
        let targets = pass.rows.targets.view().range(rows.clone());
        let excess = softmax.some.view_mut().range(0..rows.len() * vocab);
        let logps = softmax.logps.view_mut().range(rows.clone());
        let sums = softmax.some_sums.view_mut().range(0..rows.len());
        let logits = softmax.logits.view().range(0..rows.len() * vocab);
        logprob::excess(device, logits, targets, excess, logps, sums, vocab)
    }

    /// The logits of some scored rows.
    fn some_logits(
        &self,
        pass: &Pass<'_, D, T>,
        normed: &Buffer<D, T>,
        rows: &Range<usize>,
        logits: &mut Buffer<D, f32>,
    ) -> Result<()> {
        let (d, vocab) = (self.shape.hidden, self.shape.vocab());
        let logits = self.fit(Room::of(rows.len()), logits, vocab)?;
        let normed = normed.view().range(rows.start * d..rows.end * d);
        linear::forward(&*self.device, normed, pass.weights.factor(&self.shape.layout.head), logits, d, false)
    }
}

impl<D: Device, T: Number> Backend for Cuda<D, T> {
    type Error = Error;
    type Number = T;
    type Sum = T;
    type Buffer<N: Number> = Buffer<D, N>;
    type Pass<'p> = Pass<'p, D, T>;
    type Gradient<'g> = Gradient<'g>;
    type Softmax = Softmax<D, T>;

    fn is_adapted(pass: &Pass<'_, D, T>) -> bool {
        pass.adapter.is_some()
    }

    fn rows(pass: &Pass<'_, D, T>) -> usize {
        pass.rows.tokens.len()
    }

    fn release(&mut self) {
        self.passed = Buffer::default();
        self.delta = Buffer::default();
        self.workspace = Buffer::default();
        self.partial = Buffer::default();
        self.low_rank = low_rank::Scratch::default();
    }

    fn copy<N: Number>(&mut self, room: Room, width: usize, from: &Buffer<D, N>, to: &mut Buffer<D, N>) -> Result<()> {
        let to = self.fit(room, to, width)?;
        elementwise::convert(&*self.device, from.view().range(0..room.rows * width), to)
    }

    fn clear(&mut self, room: Room, width: usize, x: &mut Buffer<D, f32>) -> Result<()> {
        let x = self.fit(room, x, width)?;
        elementwise::clear(&*self.device, x)
    }

    fn embed(&mut self, room: Room, pass: &Pass<'_, D, T>, x: &mut Buffer<D, f32>) -> Result<()> {
        let (table, d) = (pass.weights.at(&self.shape.layout.embedding), self.shape.hidden);
        let x = self.fit(room, x, d)?;
        rows::gather(&*self.device, table, &pass.rows.tokens, x, d)
    }

    fn embed_backward(
        &mut self,
        pass: &Pass<'_, D, T>,
        dx: &Buffer<D, f32>,
        gradient: &mut Gradient<'_>,
    ) -> Result<()> {
        let (tokens, d) = (&pass.rows.tokens, self.shape.hidden);
        let Some(d_table) = gradient.base(&self.shape.layout.embedding) else { return Ok(()) };
        rows::scatter_add(&*self.device, dx.view().range(0..tokens.len() * d), tokens, d_table, d)
    }

    fn norm<N: Number>(
        &mut self,
        room: Room,
        pass: &Pass<'_, D, T>,
        gain: &Range<usize>,
        x: &Buffer<D, f32>,
        y: &mut Buffer<D, N>,
        r: &mut Buffer<D, f32>,
    ) -> Result<()> {
        let (y, r) = (self.fit(room, y, gain.len())?, self.fit(room, r, 1)?);
        let x = x.view().range(0..room.rows * gain.len());
        rmsnorm::forward(&*self.device, x, pass.weights.at(gain), self.shape.eps, y, r)
    }

    fn norm_again(
        &mut self,
        room: Room,
        pass: &Pass<'_, D, T>,
        gain: &Range<usize>,
        [x, r]: [&Buffer<D, f32>; 2],
        y: &mut Buffer<D, T>,
    ) -> Result<()> {
        let (x, r) = (x.view().range(0..room.rows * gain.len()), r.view().range(0..room.rows));
        let y = self.fit(room, y, gain.len())?;
        rmsnorm::recompute(&*self.device, x, pass.weights.at(gain), r, y)
    }

    fn norm_backward(
        &mut self,
        room: Room,
        pass: &Pass<'_, D, T>,
        gain: &Range<usize>,
        [x, r]: [&Buffer<D, f32>; 2],
        dy: &Buffer<D, T>,
        dx: &mut Buffer<D, f32>,
        gradient: &mut Gradient<'_>,
    ) -> Result<()> {
        let all = 0..room.rows * gain.len();
        let (x, r, dy) = (x.view().range(all.clone()), r.view().range(0..room.rows), dy.view().range(all.clone()));
        let dx = dx.view_mut().range(all);
        self.partial.fit(&*self.device, rmsnorm::partial(room.most, gain.len()))?;
        let d_gain = gradient.base(gain).map(|d_gain| (d_gain, self.partial.view_mut()));
        rmsnorm::backward(&*self.device, x, pass.weights.at(gain), r, dy, dx, d_gain)
    }

    fn project(
        &mut self,
        room: Room,
        pass: &Pass<'_, D, T>,
        site: Site,
        x: &Buffer<D, T>,
        y: &mut Buffer<D, T>,
        kept: &mut Kept<Self>,
    ) -> Result<()> {
        let (inputs, outputs) = self.shape.widths(site.product);
        let mut y = self.fit(room, y, outputs)?;
        let x = x.view().range(0..room.rows * inputs);
        linear::forward(&*self.device, x, self.factor(pass, site), y.again(), inputs, false)?;
        let Some(low_rank) = pass.low_rank(site) else { return Ok(()) };
        low_rank.add_forward(&*self.device, room, x, y, &mut kept[site.product as usize], &mut self.low_rank)
    }

    fn add_product(
        &mut self,
        room: Room,
        pass: &Pass<'_, D, T>,
        site: Site,
        x: &Buffer<D, T>,
        stream: &mut Buffer<D, f32>,
        kept: &mut Kept<Self>,
    ) -> Result<()> {
        let (inputs, outputs) = self.shape.widths(site.product);
        let x = x.view().range(0..room.rows * inputs);
        let mut stream = stream.view_mut().range(0..room.rows * outputs);
        linear::forward(&*self.device, x, self.factor(pass, site), stream.again(), inputs, true)?;
        let Some(low_rank) = pass.low_rank(site) else { return Ok(()) };
        low_rank.add_forward(&*self.device, room, x, stream, &mut kept[site.product as usize], &mut self.low_rank)
    }

    fn input_gradient(
        &mut self,
        room: Room,
        pass: &Pass<'_, D, T>,
        site: Site,
        dy: Derivative<'_, Self>,
        dx: Option<&mut Buffer<D, T>>,
    ) -> Result<()> {
        let (inputs, outputs) = self.shape.widths(site.product);
        let all = 0..room.rows * outputs;
        let dy = match dy {
            Derivative::Passed(dy) => dy.view().range(all),
            Derivative::Stream(dy) => {
                if T::IS_ROUNDED {
                    self.passed.fit(&*self.device, room.most * outputs)?;
                    let passed = self.passed.view_mut().range(all.clone());
                    elementwise::convert(&*self.device, dy.view().range(all.clone()), passed)?;
                }
                dy.view().as_numbers().unwrap_or_else(|| self.passed.view()).range(all)
            }
        };
        let mut dx = dx.map(|dx| self.fit(room, dx, inputs)).transpose()?;
        if let Some(dx) = &mut dx {
            linear::backward_input(&*self.device, dy, self.factor(pass, site), dx.again(), inputs)?;
        }
        let Some(low_rank) = pass.low_rank(site) else { return Ok(()) };
        low_rank.backward_input(&*self.device, room, dy, dx, &mut self.low_rank)
    }

    fn weight_gradient(
        &mut self,
        room: Room,
        pass: &Pass<'_, D, T>,
        site: Site,
        dy: Derivative<'_, Self>,
        x: &Buffer<D, T>,
        kept: &Kept<Self>,
        gradient: &mut Gradient<'_>,
    ) -> Result<()> {
        let (inputs, outputs) = self.shape.widths(site.product);
        let dy = match dy {
            Derivative::Passed(dy) => dy.view(),
            // as `input_gradient` has left it
            Derivative::Stream(dy) => dy.view().as_numbers().unwrap_or_else(|| self.passed.view()),
        };
        let (dy, x) = (dy.range(0..room.rows * outputs), x.view().range(0..room.rows * inputs));
        if let Some(d_w) = gradient.base(self.shape.layout.blocks[site.block].product(site.product)) {
            return linear::backward_weight(&*self.device, dy, x, d_w, inputs);
        }
        let (Some(low_rank), Gradient::Adapter(gradient, _)) = (pass.low_rank(site), gradient) else { return Ok(()) };
        let kept = &kept[site.product as usize];
        low_rank.backward_weight(&*self.device, room, [dy, x], kept, gradient.again(), &mut self.low_rank)
    }

    fn rotate(&mut self, room: Room, pass: &Pass<'_, D, T>, sums: &Buffer<D, T>, qkv: &mut Buffer<D, T>) -> Result<()> {
        let heads = self.shape.heads;
        let (width, rotated) = (heads.qkv_width(), heads.query + heads.key_value);
        let (sums, qkv) = (sums.view().range(0..room.rows * width), self.fit(room, qkv, width)?);
        self.rope.forward(&*self.device, sums, qkv, width, rotated, pass.rows.positions.view())
    }

    fn rotate_backward(
        &mut self,
        room: Room,
        pass: &Pass<'_, D, T>,
        d_rotated: &Buffer<D, T>,
        d_qkv: &mut Buffer<D, T>,
    ) -> Result<()> {
        let heads = self.shape.heads;
        let (width, rotated) = (heads.qkv_width(), heads.query + heads.key_value);
        let (d_rotated, d_qkv) = (d_rotated.view().range(0..room.rows * width), self.fit(room, d_qkv, width)?);
        self.rope.backward(&*self.device, d_rotated, d_qkv, width, rotated, pass.rows.positions.view())
    }

    fn attend(
        &mut self,
        room: Room,
        pass: &Pass<'_, D, T>,
        qkv: &Buffer<D, T>,
        out: &mut Buffer<D, T>,
        lse: &mut Buffer<D, f32>,
    ) -> Result<()> {
        let heads = self.shape.heads;
        let (out, lse) = (self.fit(room, out, heads.query_width())?, self.fit(room, lse, heads.query)?);
        let qkv = qkv.view().range(0..room.rows * heads.qkv_width());
        attention::forward(&*self.device, qkv, heads, &pass.rows.tables, out, lse)
    }

    fn attend_backward(
        &mut self,
        room: Room,
        pass: &Pass<'_, D, T>,
        [qkv, out]: [&Buffer<D, T>; 2],
        lse: &Buffer<D, f32>,
        d_out: &Buffer<D, T>,
        d_rotated: &mut Buffer<D, T>,
    ) -> Result<()> {
        assert!(pass.rows.trains, "the rows were not made for a backward pass");
        let (n, heads, tables) = (room.rows, self.shape.heads, &pass.rows.tables);
        let device = &*self.device;
        self.workspace.fit(device, tables.workspace(heads))?;
        self.delta.fit(device, room.most * heads.query)?;
        d_rotated.fit(device, room.most * heads.qkv_width())?;
        let memory = [self.delta.view_mut().range(0..n * heads.query), self.workspace.view_mut()];
        let outs = [out, d_out].map(|out| out.view().range(0..n * heads.query_width()));
        let (qkv, lse) = (qkv.view().range(0..n * heads.qkv_width()), lse.view().range(0..n * heads.query));
        let d_rotated = d_rotated.view_mut().range(0..n * heads.qkv_width());
        attention::backward(device, qkv, heads, tables, outs, lse, memory, d_rotated)
    }

    fn activate(
        &mut self,
        room: Room,
        sums: &mut Buffer<D, T>,
        gate_up: &mut Buffer<D, T>,
        y: &mut Buffer<D, T>,
    ) -> Result<()> {
        let width = self.shape.intermediate;
        gate_up.fit(&*self.device, room.most * 2 * width)?;
        std::mem::swap(sums, gate_up);
        let y = self.fit(room, y, width)?;
        swiglu::forward(&*self.device, gate_up.view().range(0..room.rows * 2 * width), y, width)
    }

    fn activate_backward(
        &mut self,
        room: Room,
        gate_up: &mut Buffer<D, T>,
        dy: &Buffer<D, T>,
        y: &mut Buffer<D, T>,
    ) -> Result<()> {
        let width = self.shape.intermediate;
        let y = self.fit(room, y, width)?;
        let (gate_up, dy) = (gate_up.view_mut().range(0..room.rows * 2 * width), dy.view().range(0..room.rows * width));
        swiglu::backward(&*self.device, gate_up, dy, y, width)
    }

    fn gather_scored(
        &mut self,
        room: Room,
        pass: &Pass<'_, D, T>,
        x: &Buffer<D, f32>,
        scored: &mut Buffer<D, f32>,
    ) -> Result<()> {
        let d = self.shape.hidden;
        let scored = self.fit(room, scored, d)?;
        rows::gather(&*self.device, x.view(), &pass.rows.scored, scored, d)
    }

    fn scatter_scored(&mut self, pass: &Pass<'_, D, T>, scored: &Buffer<D, f32>, x: &mut Buffer<D, f32>) -> Result<()> {
        let (rows, d) = (&pass.rows.scored, self.shape.hidden);
        rows::scatter_add(&*self.device, scored.view().range(0..rows.len() * d), rows, x.view_mut(), d)
    }

    fn head(
        &mut self,
        pass: &Pass<'_, D, T>,
        normed: &Buffer<D, T>,
        kept: Room,
        softmax: &mut Softmax<D, T>,
    ) -> Result<()> {
        let device = &*self.device;
        let (n, d, vocab) = (pass.rows.scored.len(), self.shape.hidden, self.shape.vocab());
        softmax.logps.fit(device, n)?;
        if self.shape.scores {
            let head = pass.score_head(&self.shape.layout.head);
            let scores = softmax.logps.view_mut().range(0..n);
            return linear::forward(device, normed.view().range(0..n * d), head, scores, d, false);
        }
        softmax.excess.fit(device, kept.most * vocab)?;
        softmax.inverse_sums.fit(device, kept.most)?;
        softmax.kept = kept.rows;
        for rows in cut(kept.rows, 0, vocab) {
            self.some_logits(pass, normed, &rows, &mut softmax.logits)?;
            let targets = pass.rows.targets.view().range(rows.clone());
            let excess = softmax.excess.view_mut().range(rows.start * vocab..rows.end * vocab);
            let sums = softmax.inverse_sums.view_mut().range(rows.clone());
            let logits = softmax.logits.view().range(0..rows.len() * vocab);
            let logps = softmax.logps.view_mut().range(rows);
            logprob::excess(device, logits, targets, excess, logps, sums, vocab)?;
        }
        for rows in cut(n - kept.rows, 0, vocab).map(|rows| rows.start + kept.rows..rows.end + kept.rows) {
            self.some_logits(pass, normed, &rows, &mut softmax.logits)?;
            let targets = pass.rows.targets.view().range(rows.clone());
            let logits = softmax.logits.view().range(0..rows.len() * vocab);
            logprob::forward(device, logits, targets, softmax.logps.view_mut().range(rows), vocab)?;
        }
        Ok(())
    }

    fn head_backward(
        &mut self,
        room: Room,
        pass: &Pass<'_, D, T>,
        normed: &Buffer<D, T>,
        d_logps: &[f32],
        is_kept: bool,
        softmax: &mut Softmax<D, T>,
        d_normed: &mut Buffer<D, T>,
        gradient: &mut Gradient<'_>,
    ) -> Result<()> {
        let device = &*self.device;
        let (n, d, vocab) = (room.rows, self.shape.hidden, self.shape.vocab());
        let range = &self.shape.layout.head;
        let head = pass.weights.factor(range);
        softmax.logps.fit(device, n)?;
        let mut d_normed = self.fit(room, d_normed, d)?;
        if self.shape.scores {
            let d_scores: Vec<T> = d_logps.iter().map(|&d| T::of_f32(d)).collect();
            let d_scores = Buffer::of(device, &d_scores)?;
            let normed = normed.view().range(0..n * d);
            let head = pass.score_head(range);
            linear::backward_input(device, d_scores.view(), head, d_normed, d)?;
            if let Some(d_head) = gradient.score_head(range) {
                linear::backward_weight(device, d_scores.view(), normed, d_head, d)?;
            }
            if !is_kept {
                linear::forward(device, normed, head, softmax.logps.view_mut().range(0..n), d, false)?;
            }
        } else {
            let d_logps = Buffer::of(device, d_logps)?;
            let kept = if is_kept { softmax.kept.min(n) } else { 0 };
            for rows in cut(n, kept, vocab) {
                let is_there = rows.end <= kept;
                if !is_there {
                    self.some_softmax(pass, normed, &rows, softmax)?;
                }
                let Softmax { excess, inverse_sums, some, some_sums, scaled, .. } = &mut *softmax;
                let (excess, sums) = if is_there { (excess, inverse_sums) } else { (some, some_sums) };
                let (excess, sums) = (excess.view().range(0..rows.len() * vocab), sums.view().range(0..rows.len()));
                let of_rows = rows.start * d..rows.end * d;
                let d_logps = d_logps.view().range(rows.clone());
                let mut d_normed = d_normed.again().range(of_rows.clone());
                linear::backward_input(device, excess, head, d_normed.again(), d)?;
                logprob::scale_in_place(device, d_normed, d_logps, sums)?;
                if let Some(d_head) = gradient.base(range) {
                    let mut scaled = self.fit(Room::of(rows.len()), scaled, d)?;
                    logprob::scale(device, normed.view().range(of_rows), d_logps, sums, scaled.again())?;
                    linear::backward_weight(device, excess, scaled.as_view(), d_head, d)?;
                }
            }
        }
        Ok(())
    }

    fn logps(&self, pass: &Pass<'_, D, T>, softmax: &Softmax<D, T>) -> Result<Vec<f32>> {
        softmax.logps.first(&*self.device, pass.rows.scored.len())
    }
}

#[cfg(test)]
mod tests;
