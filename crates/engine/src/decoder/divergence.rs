//! Passes that give, beside the log-probability of each response, the divergence from a reference along it:
//! Σₜ KL(π_ref(·|x, y<t) ‖ π(·|x, y<t)) over the response's tokens (the sequential KL divergence of arXiv 2404.11999).

use std::convert::Infallible;

use super::blocks::{DecoderOn, Scratch};
use super::{Gradient, Head, Keep, Pass};
use crate::backend::{Cpu, Softmax};
use crate::batch::PackedBatch;
use crate::ops::{Number, divergence};

impl<T: Number> DecoderOn<Cpu<T>> {
    /// The normalised final hidden rows that predict the scored tokens of the batch.
    pub(super) fn scored_rows(&mut self, pass: &Pass<'_>, batch: &PackedBatch) -> Result<Vec<f32>, Infallible> {
        self.run_blocks(pass, batch, None)?;
        self.gather_normed(pass, batch.scored_rows.len())?;
        Ok(self.scratch.head.normed[..batch.scored_rows.len() * self.shape.hidden].to_vec())
    }

    /// As [`Decoder::forward_with_divergence`](super::Decoder::forward_with_divergence).
    pub(super) fn forward_with_divergence(
        &mut self,
        pass: &Pass<'_>,
        reference: Head<'_>,
        batch: &PackedBatch,
        keep: Keep,
    ) -> Result<(Vec<f64>, Vec<f64>), Infallible> {
        self.run_blocks(pass, batch, Some(keep))?;
        self.gather_normed(pass, batch.scored_rows.len())?;
        let policy = Head { rows: &self.scratch.head.normed, weights: pass.base(&self.shape.layout.head) };
        let Softmax { logits, reference_logits, .. } = &mut self.softmax;
        let (mut logps, mut divergences) = (Vec::new(), Vec::new());
        for (targets, [policy, reference]) in chunks(self.shape.hidden, policy, reference, batch) {
            let (chunk_logps, chunk_divergences) =
                divergence::forward(T::PRECISION, policy, reference, targets, [logits, reference_logits]);
            logps.extend(chunk_logps);
            divergences.extend(chunk_divergences);
        }
        Ok((batch.sum_responses(&logps), batch.sum_responses(&divergences)))
    }

    /// As [`Decoder::backward_with_divergence`](super::Decoder::backward_with_divergence).
    pub(super) fn backward_with_divergence(
        &mut self,
        pass: &Pass<'_>,
        reference: Head<'_>,
        batch: &PackedBatch,
        [d_logps, d_divergences]: [&[f64]; 2],
        gradient: &mut Gradient<'_>,
    ) -> Result<(), Infallible> {
        let Some(keep) = self.kept.take() else { panic!("backward without a forward pass before it") };
        let (d_logps, d_divergences) = (batch.spread_responses(d_logps), batch.spread_responses(d_divergences));
        self.gather_normed(pass, batch.scored_rows.len())?;
        let (room, width, range) = (self.room(batch.scored_rows.len()), self.shape.hidden, &self.shape.layout.head);
        let Scratch { head, .. } = &mut self.scratch;
        let policy = Head { rows: &head.normed, weights: pass.base(range) };
        let Softmax { logits, reference_logits, .. } = &mut self.softmax;
        let mut done = 0;
        for (targets, [policy, reference]) in chunks(width, policy, reference, batch) {
            let rows = done..done + targets.len();
            done = rows.end;
            let d_normed = &mut room.fit(&mut head.d_normed, width)[rows.start * width..rows.end * width];
            let (derivatives, scratch) =
                ([&d_logps[rows.clone()], &d_divergences[rows]], [&mut *logits, &mut *reference_logits]);
            let d_head = gradient.base(range);
            divergence::backward(T::PRECISION, policy, reference, targets, derivatives, d_normed, d_head, scratch);
        }
        self.norm_backward(pass, batch, gradient)?;
        self.backward_blocks(pass, batch, keep, gradient)
    }
}

/// The targets of a batch with the rows of both heads that predict them, some at a time.
fn chunks<'b>(
    hidden: usize,
    policy: Head<'b>,
    reference: Head<'b>,
    batch: &'b PackedBatch,
) -> impl Iterator<Item = (&'b [u32], [Head<'b>; 2])> {
    let expected = batch.scored_rows.len() * hidden;
    assert_eq!(reference.rows.len(), expected, "the reference's rows are not those of this batch");
    let chunk = divergence::even_chunk(batch.targets.len(), policy.weights.len() / hidden);
    let rows =
        move |head: Head<'b>| head.rows[..expected].chunks(chunk * hidden).map(move |rows| Head { rows, ..head });
    let heads = rows(policy).zip(rows(reference)).map(|(policy, reference)| [policy, reference]);
    batch.targets.chunks(chunk).zip(heads)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Decoder;
    use crate::model::Model;
    use crate::model::tests::tiny_config;
    use crate::ops::finite_difference::check;

    fn batch() -> PackedBatch {
        let mut batch = PackedBatch::default();
        batch.push(&[1, 5, 3], &[&[4, 2], &[9, 9, 10, 2]]);
        batch.push(&[1, 7], &[&[8, 2]]);
        batch
    }

    fn head<'a>(model: &'a Model, rows: &'a [f32]) -> Head<'a> {
        Head { rows, weights: &model.weights[model.layout.head.clone()] }
    }

    #[test]
    fn gradients_match_finite_differences() {
        let (batch, d_logps, d_divergences) = (batch(), [0.7, -0.4, 1.1], [0.6, 1.3, -0.8]);
        let derivatives: Vec<f32> = d_logps.iter().chain(&d_divergences).map(|&d| d as f32).collect();
        for tie_word_embeddings in [false, true] {
            let config = crate::ModelConfig { tie_word_embeddings, ..tiny_config() };
            let (model, reference) = (Model::random(config.clone(), 0.4, 1), Model::random(config, 0.4, 2));
            let mut decoder = Decoder::new(&model, 16);
            let rows = decoder.head_rows(&reference.weights, &batch);
            let reference = head(&reference, &rows);
            let mut gradient = vec![0.0; model.layout.len];
            for keep in [Keep::All, Keep::Inputs] {
                let mut again = vec![0.0; model.layout.len];
                decoder.forward_with_divergence(&model.weights, reference, &batch, keep);
                let derivatives = [&d_logps[..], &d_divergences];
                decoder.backward_with_divergence(&model.weights, reference, &batch, derivatives, &mut again);
                assert!(keep == Keep::All || again == gradient);
                gradient = again;
            }
            let decoder = std::cell::RefCell::new(decoder);
            for spec in &model.layout.specs {
                let range = spec.range.clone();
                check(&model.weights[range.clone()], &gradient[range.clone()], &derivatives, |part| {
                    let mut weights = model.weights.clone();
                    weights[range.clone()].copy_from_slice(part);
                    let mut decoder = decoder.borrow_mut();
                    let (logps, divergences) =
                        decoder.forward_with_divergence(&weights, reference, &batch, Keep::Inputs);
                    logps.iter().chain(&divergences).map(|&value| value as f32).collect()
                });
            }
        }
    }

    #[test]
    fn without_weight_on_the_divergence_all_is_as_without_a_reference() {
        let (batch, d_logps) = (batch(), [0.7, -0.4, 1.1]);
        let (model, reference) = (Model::random(tiny_config(), 0.4, 1), Model::random(tiny_config(), 0.4, 2));
        let mut decoder = Decoder::new(&model, 16);
        let rows = decoder.head_rows(&reference.weights, &batch);
        let mut plain = vec![0.0; model.layout.len];
        let logps = decoder.forward(&model.weights, &batch, Keep::All);
        decoder.backward(&model.weights, &batch, &d_logps, &mut plain);
        let mut gradient = vec![0.0; model.layout.len];
        let reference = head(&reference, &rows);
        let (with, divergences) = decoder.forward_with_divergence(&model.weights, reference, &batch, Keep::All);
        decoder.backward_with_divergence(&model.weights, reference, &batch, [&d_logps, &[0.0; 3]], &mut gradient);
        assert_eq!(with, logps);
        assert!(divergences.iter().all(|&d| d > 0.01), "{divergences:?}");
        // the row's factor comes to the logits here, and to what is narrow there
        let largest = plain.iter().fold(0f32, |most, value| most.max(value.abs()));
        assert!(gradient.iter().zip(&plain).all(|(with, plain)| (with - plain).abs() < 16.0 * f32::EPSILON * largest));
    }

    #[test]
    fn a_policy_does_not_diverge_from_itself_and_nothing_depends_on_the_packing() {
        let (model, reference) = (Model::random(tiny_config(), 0.4, 1), Model::random(tiny_config(), 0.4, 2));
        let mut decoder = Decoder::new(&model, 16);
        let mut run = |batch: &PackedBatch, reference: &Model| {
            let rows = decoder.head_rows(&reference.weights, batch);
            decoder.forward_with_divergence(&model.weights, head(reference, &rows), batch, Keep::Inputs)
        };
        // more scored tokens than fit in a chunk
        let mut large = PackedBatch::default();
        let responses: Vec<Vec<u32>> = (0..200).map(|i| (0..7).map(|t| (i * t + i + t) % 11).collect()).collect();
        let responses: Vec<&[u32]> = responses.iter().map(Vec::as_slice).collect();
        responses.chunks(2).for_each(|pair| large.push(&[1, 4], pair));
        assert!(divergence::even_chunk(large.targets.len(), 11) < large.targets.len());
        assert_eq!(run(&large, &model).1, [0.0; 200]);
        let (logps, divergences) = run(&large, &reference);
        // parts of one chunk each; not of few rows, since very small matrix products sum in another order
        for (i, part) in responses.chunks(20).enumerate() {
            let mut small = PackedBatch::default();
            part.chunks(2).for_each(|pair| small.push(&[1, 4], pair));
            let range = 20 * i..20 * (i + 1);
            assert_eq!(run(&small, &reference), (logps[range.clone()].to_vec(), divergences[range].to_vec()));
        }
    }
}
