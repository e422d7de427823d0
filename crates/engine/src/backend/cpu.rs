//! The operations on the CPU, whose numbers for products are T.

mod pass;

use std::convert::Infallible;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use half::bf16;

use super::{Backend, Derivative, Kept, Room, Site};
use crate::decoder::Shape;
use crate::ops::divergence::Head;
use crate::ops::logprob::{self, Excess};
use crate::ops::rope::RopeTable;
use crate::ops::{Number, attention, embedding, fit, lora, number, rmsnorm, score, swiglu};
use crate::precision::Precision;
use pass::Linear;

pub(crate) use pass::{Gradient, Pass};

/// The CPU.
#[derive(Debug)]
pub(crate) struct Cpu<T> {
    shape: Arc<Shape>,
    rope: RopeTable,
    /// Memory of what adapts products.
    pub(crate) lora: lora::Scratch,
    numbers: PhantomData<T>,
}

/// What the vocabulary head has of a pass. In bf16 the softmax is in 16 bits.
#[derive(Debug, Default)]
pub(crate) struct Softmax {
    /// Log-probabilities, or scores, of all scored rows.
    pub(crate) logps: Vec<f32>,
    /// That of the first scored rows, as many as `inverse_sums` has.
    pub(crate) excess: Vec<f32>,
    pub(crate) rounded_excess: Vec<bf16>,
    pub(crate) inverse_sums: Vec<f32>,
    /// Those of some rows, and their softmax in bf16.
    pub(crate) logits: Vec<f32>,
    pub(crate) rounded_logits: Vec<bf16>,
    pub(crate) reference_logits: Vec<f32>,
}

impl Room {
    /// The rows of a buffer of rows of this width.
    pub(crate) fn fit<T: Number>(self, buffer: &mut Vec<T>, width: usize) -> &mut [T] {
        &mut fit(buffer, self.most * width)[..self.rows * width]
    }
}

impl<T: Number> Cpu<T> {
    pub(crate) fn new(shape: Arc<Shape>, rope: RopeTable) -> Self {
        Self { shape, rope, lora: lora::Scratch::default(), numbers: PhantomData }
    }

    pub(crate) fn into_rope(self) -> RopeTable {
        self.rope
    }

    fn linear<'p>(&self, pass: &Pass<'p>, site: Site) -> Linear<'p> {
        pass.linear(&self.shape.layout.blocks[site.block], site.block, site.product)
    }
}

impl<T: Number> Backend for Cpu<T> {
    type Error = Infallible;
    type Number = T;
    type Sum = f32;
    type Buffer<N: Number> = Vec<N>;
    type Pass<'p> = Pass<'p>;
    type Gradient<'g> = Gradient<'g>;
    type Softmax = Softmax;

    fn is_adapted(pass: &Pass<'_>) -> bool {
        pass.is_adapted()
    }

    fn rows(pass: &Pass<'_>) -> usize {
        pass.tokens.len()
    }

    fn release(&mut self) {
        self.lora = lora::Scratch::default();
    }

    fn copy<N: Number>(&mut self, room: Room, width: usize, from: &Vec<N>, to: &mut Vec<N>) -> Result<(), Infallible> {
        number::copy(&from[..room.rows * width], room.fit(to, width));
        Ok(())
    }

    fn clear(&mut self, room: Room, width: usize, x: &mut Vec<f32>) -> Result<(), Infallible> {
        room.fit(x, width).fill(0.0);
        Ok(())
    }

    fn embed(&mut self, room: Room, pass: &Pass<'_>, x: &mut Vec<f32>) -> Result<(), Infallible> {
        let (table, d) = (pass.base(&self.shape.layout.embedding), self.shape.hidden);
        embedding::forward(table, pass.tokens, room.fit(x, d), d);
        Ok(())
    }

    fn embed_backward(
        &mut self,
        pass: &Pass<'_>,
        dx: &Vec<f32>,
        gradient: &mut Gradient<'_>,
    ) -> Result<(), Infallible> {
        let d = self.shape.hidden;
        if let Some(d_table) = gradient.base(&self.shape.layout.embedding) {
            embedding::backward(pass.tokens, &dx[..pass.tokens.len() * d], d_table, d);
        }
        Ok(())
    }

    fn norm<N: Number>(
        &mut self,
        room: Room,
        pass: &Pass<'_>,
        gain: &Range<usize>,
        x: &Vec<f32>,
        y: &mut Vec<N>,
        r: &mut Vec<f32>,
    ) -> Result<(), Infallible> {
        let x = &x[..room.rows * gain.len()];
        rmsnorm::forward(x, pass.base(gain), self.shape.eps, room.fit(y, gain.len()), room.fit(r, 1));
        Ok(())
    }

    fn norm_again(
        &mut self,
        room: Room,
        pass: &Pass<'_>,
        gain: &Range<usize>,
        [x, r]: [&Vec<f32>; 2],
        y: &mut Vec<T>,
    ) -> Result<(), Infallible> {
        let x = &x[..room.rows * gain.len()];
        rmsnorm::recompute(x, pass.base(gain), &r[..room.rows], room.fit(y, gain.len()));
        Ok(())
    }

    fn norm_backward(
        &mut self,
        room: Room,
        pass: &Pass<'_>,
        gain: &Range<usize>,
        [x, r]: [&Vec<f32>; 2],
        dy: &Vec<f32>,
        dx: &mut Vec<f32>,
        gradient: &mut Gradient<'_>,
    ) -> Result<(), Infallible> {
        let len = room.rows * gain.len();
        let (x, dy, dx) = (&x[..len], &dy[..len], &mut dx[..len]);
        rmsnorm::backward(x, pass.base(gain), &r[..room.rows], dy, dx, gradient.base(gain));
        Ok(())
    }

    fn project(
        &mut self,
        room: Room,
        pass: &Pass<'_>,
        site: Site,
        x: &Vec<T>,
        y: &mut Vec<f32>,
        kept: &mut Kept<Self>,
    ) -> Result<(), Infallible> {
        let (inputs, outputs) = self.shape.widths(site.product);
        let y = room.fit(y, outputs);
        self.linear(pass, site).forward(&x[..room.rows * inputs], y, inputs, false, kept, &mut self.lora);
        Ok(())
    }

    fn add_product(
        &mut self,
        room: Room,
        pass: &Pass<'_>,
        site: Site,
        x: &Vec<T>,
        stream: &mut Vec<f32>,
        kept: &mut Kept<Self>,
    ) -> Result<(), Infallible> {
        let (inputs, outputs) = self.shape.widths(site.product);
        let stream = &mut stream[..room.rows * outputs];
        self.linear(pass, site).forward(&x[..room.rows * inputs], stream, inputs, true, kept, &mut self.lora);
        Ok(())
    }

    fn input_gradient(
        &mut self,
        room: Room,
        pass: &Pass<'_>,
        site: Site,
        dy: Derivative<'_, Self>,
        dx: Option<&mut Vec<f32>>,
    ) -> Result<(), Infallible> {
        let (inputs, outputs) = self.shape.widths(site.product);
        let (dx, len) = (dx.map(|dx| room.fit(dx, inputs)), room.rows * outputs);
        let linear = self.linear(pass, site);
        match dy {
            Derivative::Stream(dy) => linear.backward_input(&dy[..len], dx, inputs, &mut self.lora),
            Derivative::Passed(dy) => linear.backward_input(&dy[..len], dx, inputs, &mut self.lora),
        }
        Ok(())
    }

    fn weight_gradient(
        &mut self,
        room: Room,
        pass: &Pass<'_>,
        site: Site,
        dy: Derivative<'_, Self>,
        x: &Vec<T>,
        kept: &Kept<Self>,
        gradient: &mut Gradient<'_>,
    ) -> Result<(), Infallible> {
        let (inputs, outputs) = self.shape.widths(site.product);
        let (x, len) = (&x[..room.rows * inputs], room.rows * outputs);
        let linear = self.linear(pass, site);
        match dy {
            Derivative::Stream(dy) => linear.backward_weight(&dy[..len], x, inputs, gradient, kept, &mut self.lora),
            Derivative::Passed(dy) => linear.backward_weight(&dy[..len], x, inputs, gradient, kept, &mut self.lora),
        }
        Ok(())
    }

    fn rotate(&mut self, room: Room, pass: &Pass<'_>, sums: &Vec<f32>, qkv: &mut Vec<T>) -> Result<(), Infallible> {
        let heads = self.shape.heads;
        let (width, rotated) = (heads.qkv_width(), heads.query + heads.key_value);
        self.rope.forward(&sums[..room.rows * width], room.fit(qkv, width), width, rotated, pass.positions);
        Ok(())
    }

    fn rotate_backward(
        &mut self,
        room: Room,
        pass: &Pass<'_>,
        d_rotated: &Vec<f32>,
        d_qkv: &mut Vec<T>,
    ) -> Result<(), Infallible> {
        let heads = self.shape.heads;
        let (width, rotated) = (heads.qkv_width(), heads.query + heads.key_value);
        self.rope.backward(&d_rotated[..room.rows * width], room.fit(d_qkv, width), width, rotated, pass.positions);
        Ok(())
    }

    fn attend(
        &mut self,
        room: Room,
        pass: &Pass<'_>,
        qkv: &Vec<T>,
        out: &mut Vec<T>,
        lse: &mut Vec<f32>,
    ) -> Result<(), Infallible> {
        let heads = self.shape.heads;
        let (qkv, out) = (&qkv[..room.rows * heads.qkv_width()], room.fit(out, heads.query_width()));
        attention::forward(qkv, heads, &pass.spans, out, room.fit(lse, heads.query));
        Ok(())
    }

    fn attend_backward(
        &mut self,
        room: Room,
        pass: &Pass<'_>,
        [qkv, _]: [&Vec<T>; 2],
        lse: &Vec<f32>,
        d_out: &Vec<f32>,
        d_rotated: &mut Vec<f32>,
    ) -> Result<(), Infallible> {
        let (n, heads) = (room.rows, self.shape.heads);
        let (qkv, lse, d_out) =
            (&qkv[..n * heads.qkv_width()], &lse[..n * heads.query], &d_out[..n * heads.query_width()]);
        attention::backward(qkv, heads, &pass.spans, lse, d_out, room.fit(d_rotated, heads.qkv_width()));
        Ok(())
    }

    fn activate(
        &mut self,
        room: Room,
        sums: &mut Vec<f32>,
        gate_up: &mut Vec<T>,
        y: &mut Vec<T>,
    ) -> Result<(), Infallible> {
        let width = self.shape.intermediate;
        room.fit(gate_up, 2 * width);
        swiglu::forward(sums, gate_up, room.fit(y, width), width);
        Ok(())
    }

    fn activate_backward(
        &mut self,
        room: Room,
        gate_up: &mut Vec<T>,
        dy: &Vec<f32>,
        y: &mut Vec<T>,
    ) -> Result<(), Infallible> {
        let (n, width) = (room.rows, self.shape.intermediate);
        swiglu::backward(&mut gate_up[..n * 2 * width], &dy[..n * width], room.fit(y, width), width);
        Ok(())
    }

    fn gather_scored(
        &mut self,
        room: Room,
        pass: &Pass<'_>,
        x: &Vec<f32>,
        scored: &mut Vec<f32>,
    ) -> Result<(), Infallible> {
        let d = self.shape.hidden;
        for (to, &row) in room.fit(scored, d).chunks_exact_mut(d).zip(pass.scored_rows) {
            to.copy_from_slice(&x[row as usize * d..(row as usize + 1) * d]);
        }
        Ok(())
    }

    fn scatter_scored(&mut self, pass: &Pass<'_>, scored: &Vec<f32>, x: &mut Vec<f32>) -> Result<(), Infallible> {
        let d = self.shape.hidden;
        // a prompt's last row predicts the first token of each of its responses, so rows may repeat
        for (from, &row) in scored.chunks_exact(d).zip(pass.scored_rows) {
            let to = &mut x[row as usize * d..(row as usize + 1) * d];
            to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
        }
        Ok(())
    }

    fn head(
        &mut self,
        pass: &Pass<'_>,
        normed: &Vec<f32>,
        kept: Room,
        softmax: &mut Softmax,
    ) -> Result<(), Infallible> {
        let (d, range, targets) = (self.shape.hidden, &self.shape.layout.head, pass.targets);
        if self.shape.scores {
            softmax.logps = score::forward(&normed[..pass.scored_rows.len() * d], pass.score_head(range));
            return Ok(());
        }
        let (weights, vocab) = (pass.base(range), self.shape.vocab());
        softmax.inverse_sums.clear();
        if kept.rows > 0 {
            match T::PRECISION {
                Precision::F32 => _ = kept.fit(&mut softmax.excess, vocab),
                Precision::Bf16 => _ = kept.fit(&mut softmax.rounded_excess, vocab),
            }
        }
        softmax.logps.clear();
        for rows in logprob::cut(targets.len(), kept.rows, vocab) {
            let is_kept = rows.end <= kept.rows;
            let head = Head { rows: &normed[rows.start * d..rows.end * d], weights };
            let (logits, rounded) = match T::PRECISION {
                _ if !is_kept => (&mut softmax.logits, None),
                Precision::F32 => (&mut softmax.excess, None),
                Precision::Bf16 => (&mut softmax.logits, Some(&mut softmax.rounded_excess)),
            };
            let (chunk, inverse_sums) = logprob::forward(T::PRECISION, head, &targets[rows], logits, rounded);
            softmax.logps.extend(chunk);
            if is_kept {
                softmax.inverse_sums = inverse_sums;
            }
        }
        Ok(())
    }

    fn head_backward(
        &mut self,
        room: Room,
        pass: &Pass<'_>,
        normed: &Vec<f32>,
        d_logps: &[f32],
        is_kept: bool,
        softmax: &mut Softmax,
        d_normed: &mut Vec<f32>,
        gradient: &mut Gradient<'_>,
    ) -> Result<(), Infallible> {
        let (d, range, targets) = (self.shape.hidden, &self.shape.layout.head, pass.targets);
        let d_normed = room.fit(d_normed, d);
        if self.shape.scores {
            let (normed, w) = (&normed[..d_normed.len()], pass.score_head(range));
            score::backward(normed, w, d_logps, d_normed, pass.score_gradient(range, gradient));
            if !is_kept {
                softmax.logps = score::forward(normed, w);
            }
            return Ok(());
        }
        let (weights, vocab) = (pass.base(range), self.shape.vocab());
        let kept = if is_kept { softmax.inverse_sums.len().min(targets.len()) } else { 0 };
        if !is_kept {
            softmax.logps.clear();
        }
        for rows in logprob::cut(targets.len(), kept, vocab) {
            let Softmax { logps, excess, rounded_excess, inverse_sums, logits, rounded_logits, .. } = &mut *softmax;
            let policy = Head { rows: &normed[rows.start * d..rows.end * d], weights };
            let computed;
            let (excess, rounded, inverse_sums) = if rows.end <= kept {
                (&*excess, &*rounded_excess, &inverse_sums[..kept])
            } else {
                let rounded = (T::PRECISION == Precision::Bf16).then_some(&mut *rounded_logits);
                let (chunk, sums) = logprob::forward(T::PRECISION, policy, &targets[rows.clone()], logits, rounded);
                computed = sums;
                if !is_kept {
                    logps.extend(chunk);
                }
                (&*logits, &*rounded_logits, &*computed)
            };
            let excess = match T::PRECISION {
                Precision::F32 => Excess::F32(&excess[..rows.len() * vocab]),
                Precision::Bf16 => Excess::Bf16(&rounded[..rows.len() * vocab]),
            };
            let softmax = logprob::Softmax { excess, inverse_sums };
            let d_normed = &mut d_normed[rows.start * d..rows.end * d];
            logprob::backward(policy, &d_logps[rows], softmax, d_normed, gradient.base(range));
        }
        Ok(())
    }

    fn logps(&self, _: &Pass<'_>, softmax: &Softmax) -> Result<Vec<f32>, Infallible> {
        Ok(softmax.logps.clone())
    }
}
