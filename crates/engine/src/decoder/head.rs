//! What comes behind the last block: the norm, and the vocabulary's or the score head.

use super::blocks::{DecoderOf, Scratch};
use super::{Gradient, Keep, Pass};
use crate::batch::PackedBatch;
use crate::ops::divergence::Head;
use crate::ops::logprob::{Excess, Softmax};
use crate::ops::{Number, fit, logprob, rmsnorm, score};
use crate::precision::Precision;

impl<T: Number> DecoderOf<T> {
    /// Log-probabilities, or scores, of the batch's responses from `self.x`; keeps the softmax of the first scored rows, as many
    /// as `keep` allows.
    pub(super) fn head_forward(&mut self, pass: &Pass<'_>, batch: &PackedBatch, keep: Option<Keep>) -> Vec<f64> {
        if self.shape.scores {
            self.gather_normed(pass, &batch.scored_rows);
            let normed = &self.scratch.head.normed[..batch.scored_rows.len() * self.shape.hidden];
            return batch.sum_responses(&score::forward(normed, pass.score_head(&self.shape.layout.head)));
        }
        let (weights, vocab) = (pass.base(&self.shape.layout.head), self.shape.vocab());
        self.inverse_sums.clear();
        let kept_of = |rows| keep.map_or(0, |keep| logprob::kept_rows(keep == Keep::All, rows, vocab));
        let kept = kept_of(batch.targets.len());
        if kept > 0 {
            // a pass seldom scores more tokens than it computes
            let room = vocab * kept_of(self.most_rows).max(kept);
            match T::PRECISION {
                Precision::F32 => _ = fit(&mut self.excess, room),
                Precision::Bf16 => _ = fit(&mut self.rounded_excess, room),
            }
        }
        let mut logps = Vec::with_capacity(batch.targets.len());
        for rows in logprob::cut(batch.targets.len(), kept, vocab) {
            self.gather_normed(pass, &batch.scored_rows[rows.clone()]);
            let Scratch { head, logits, .. } = &mut self.scratch;
            let is_kept = rows.end <= kept;
            let head = Head { rows: &head.normed[..rows.len() * self.shape.hidden], weights };
            let (logits, rounded) = match T::PRECISION {
                _ if !is_kept => (logits, None),
                Precision::F32 => (&mut self.excess, None),
                Precision::Bf16 => (logits, Some(&mut self.rounded_excess)),
            };
            let (chunk, inverse_sums) = logprob::forward(T::PRECISION, head, &batch.targets[rows], logits, rounded);
            logps.extend(chunk);
            if is_kept {
                self.inverse_sums = inverse_sums;
            }
        }
        batch.sum_responses(&logps)
    }

    /// Overwrites `scratch.dx` with the gradient of `self.x` and adds the gradients of head and last norm, unless they are
    /// frozen. Returns the log-probabilities of the scored tokens whose softmax was not kept; or the scores.
    pub(super) fn head_backward(
        &mut self,
        pass: &Pass<'_>,
        batch: &PackedBatch,
        d_logps: &[f64],
        gradient: &mut Gradient<'_>,
    ) -> Vec<f32> {
        let d_logps = batch.spread_responses(d_logps);
        self.room(batch.rows()).of(&mut self.scratch.dx, self.shape.hidden).fill(0.0);
        if self.shape.scores {
            return self.score_forward_backward(pass, batch, &d_logps, gradient);
        }
        let (weights, vocab) = (pass.base(&self.shape.layout.head), self.shape.vocab());
        let kept = self.inverse_sums.len().min(batch.targets.len());
        let mut logps = Vec::new();
        for rows in logprob::cut(batch.targets.len(), kept, vocab) {
            self.gather_normed(pass, &batch.scored_rows[rows.clone()]);
            let Scratch { head, logits, rounded_excess, .. } = &mut self.scratch;
            let len = rows.len() * self.shape.hidden;
            let policy = Head { rows: &head.normed[..len], weights };
            let computed;
            let (excess, rounded, inverse_sums) = if rows.end <= kept {
                (&self.excess, &self.rounded_excess, &self.inverse_sums[..kept])
            } else {
                let targets = &batch.targets[rows.clone()];
                let rounded = (T::PRECISION == Precision::Bf16).then_some(&mut *rounded_excess);
                let (chunk, sums) = logprob::forward(T::PRECISION, policy, targets, logits, rounded);
                computed = sums;
                logps.extend(chunk);
                (&*logits, &*rounded_excess, &*computed)
            };
            let excess = match T::PRECISION {
                Precision::F32 => Excess::F32(&excess[..rows.len() * vocab]),
                Precision::Bf16 => Excess::Bf16(&rounded[..rows.len() * vocab]),
            };
            let (d_normed, d_w) = (fit(&mut head.d_normed, len), gradient.base(&self.shape.layout.head));
            logprob::backward(policy, &d_logps[rows.clone()], Softmax { excess, inverse_sums }, d_normed, d_w);
            self.norm_backward(pass, &batch.scored_rows[rows], gradient);
        }
        logps
    }

    /// As [`head_backward`](Self::head_backward), of scores; `scratch.dx` is all zero before. The head is
    /// trained even where the model is frozen.
    fn score_forward_backward(
        &mut self,
        pass: &Pass<'_>,
        batch: &PackedBatch,
        d_scores: &[f32],
        gradient: &mut Gradient<'_>,
    ) -> Vec<f32> {
        self.gather_normed(pass, &batch.scored_rows);
        let (range, head, len) =
            (&self.shape.layout.head, &mut self.scratch.head, batch.scored_rows.len() * self.shape.hidden);
        let (normed, w) = (&head.normed[..len], pass.score_head(range));
        let scores = score::forward(normed, w);
        score::backward(normed, w, d_scores, fit(&mut head.d_normed, len), pass.score_gradient(range, gradient));
        self.norm_backward(pass, &batch.scored_rows, gradient);
        scores
    }

    /// Takes `scratch.head.d_normed` of the given rows through the last norm and adds it to `scratch.dx`.
    pub(super) fn norm_backward(&mut self, pass: &Pass<'_>, rows: &[u32], gradient: &mut Gradient<'_>) {
        let (d, Scratch { head, dx, .. }) = (self.shape.hidden, &mut self.scratch);
        let len = rows.len() * d;
        let d_x = fit(&mut head.d_x, len);
        d_x.fill(0.0);
        let (norm, r) = (&self.shape.layout.final_norm, &head.r[..rows.len()]);
        let d_normed = &head.d_normed[..len];
        rmsnorm::backward(&head.x[..len], pass.base(norm), r, d_normed, d_x, gradient.base(norm));
        // a prompt's last row predicts the first token of each of its responses, so rows may repeat
        for (d_x, &row) in d_x.chunks_exact(d).zip(rows) {
            let to = &mut dx[row as usize * d..(row as usize + 1) * d];
            to.iter_mut().zip(d_x).for_each(|(to, d)| *to += d);
        }
    }

    /// Copies rows of `self.x` to the head's scratch memory and normalises them.
    pub(super) fn gather_normed(&mut self, pass: &Pass<'_>, rows: &[u32]) {
        let (d, head) = (self.shape.hidden, &mut self.scratch.head);
        let x = fit(&mut head.x, rows.len() * d);
        for (to, &row) in x.chunks_exact_mut(d).zip(rows) {
            to.copy_from_slice(&self.x[row as usize * d..(row as usize + 1) * d]);
        }
        let (normed, r) = (fit(&mut head.normed, rows.len() * d), fit(&mut head.r, rows.len()));
        rmsnorm::forward(x, pass.base(&self.shape.layout.final_norm), self.shape.eps, normed, r);
    }
}
