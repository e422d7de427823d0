//! What comes behind the last block: the norm, and the vocabulary's or the score head.

use super::Keep;
use super::blocks::{DecoderOn, Scratch};
use crate::backend::{Backend, Room};
use crate::batch::PackedBatch;
use crate::ops::logprob;

impl<B: Backend> DecoderOn<B> {
    /// Log-probabilities, or scores, of the batch's responses from `self.x`; keeps the softmax of the first scored rows, as many
    /// as `keep` allows.
    pub(super) fn head_forward(
        &mut self,
        pass: &B::Pass<'_>,
        batch: &PackedBatch,
        keep: Option<Keep>,
    ) -> Result<Vec<f64>, B::Error> {
        self.gather_normed(pass, batch.scored_rows.len())?;
        let vocab = self.shape.vocab();
        let kept_of = |rows| keep.map_or(0, |keep| logprob::kept_rows(keep == Keep::All, rows, vocab));
        let rows = kept_of(batch.scored_rows.len());
        // a pass seldom scores more tokens than it computes
        let kept = Room { rows, most: kept_of(self.most_rows).max(rows) };
        self.backend.head(pass, &self.scratch.head.normed, kept, &mut self.softmax)?;
        self.softmax_is_kept = true;
        Ok(batch.sum_responses(&self.backend.logps(pass, &self.softmax)?))
    }

    /// Overwrites `scratch.dx` with the gradient of `self.x` and adds the gradients of head and last norm, unless they are
    /// frozen.
    pub(super) fn head_backward(
        &mut self,
        pass: &B::Pass<'_>,
        batch: &PackedBatch,
        d_logps: &[f64],
        gradient: &mut B::Gradient<'_>,
    ) -> Result<(), B::Error> {
        let (d_logps, scored) = (batch.spread_responses(d_logps), batch.scored_rows.len());
        self.gather_normed(pass, scored)?;
        let (room, is_kept) = (self.room(scored), self.softmax_is_kept);
        let Self { backend, softmax, scratch: Scratch { head, .. }, .. } = self;
        let (normed, d_normed) = (&head.normed, &mut head.d_normed);
        backend.head_backward(room, pass, normed, &d_logps, is_kept, softmax, d_normed, gradient)?;
        self.norm_backward(pass, batch, gradient)
    }

    /// Takes `scratch.head.d_normed` through the last norm to `scratch.dx`, which is overwritten.
    pub(super) fn norm_backward(
        &mut self,
        pass: &B::Pass<'_>,
        batch: &PackedBatch,
        gradient: &mut B::Gradient<'_>,
    ) -> Result<(), B::Error> {
        let (room, scored, d) = (self.room(batch.rows()), self.room(batch.scored_rows.len()), self.shape.hidden);
        let (backend, Scratch { head, dx, .. }) = (&mut self.backend, &mut self.scratch);
        backend.clear(room, d, dx)?;
        backend.clear(scored, d, &mut head.d_x)?;
        let (norm, of_norm) = (&self.shape.layout.final_norm, [&head.x, &head.r]);
        backend.norm_backward(scored, pass, norm, of_norm, &head.d_normed, &mut head.d_x, gradient)?;
        backend.scatter_scored(pass, &head.d_x, dx)
    }

    /// Takes the `scored` rows of `self.x` to the head's scratch memory and normalises them.
    pub(super) fn gather_normed(&mut self, pass: &B::Pass<'_>, scored: usize) -> Result<(), B::Error> {
        let room = self.room(scored);
        let (backend, head) = (&mut self.backend, &mut self.scratch.head);
        backend.gather_scored(room, pass, &self.x, &mut head.x)?;
        backend.norm(room, pass, &self.shape.layout.final_norm, &head.x, &mut head.normed, &mut head.r)
    }
}
