//! Passes that give, beside the log-probability of each response, the divergence from a reference along it:
//! Σₜ KL(π_ref(·|x, y<t) ‖ π(·|x, y<t)) over the response's tokens (the sequential KL divergence of arXiv 2404.11999).

use super::blocks::{DecoderOf, Scratch};
use super::{Head, Keep, Pass};
use crate::batch::PackedBatch;
use crate::ops::{Number, divergence, fit};

impl<T: Number> DecoderOf<T> {
    /// The normalised final hidden rows that predict the scored tokens of the batch.
    pub(super) fn scored_rows(&mut self, pass: &Pass<'_>, batch: &PackedBatch) -> Vec<f32> {
        self.run_blocks(pass, batch, None);
        let mut all = Vec::with_capacity(batch.scored_rows.len() * self.shape.hidden);
        for rows in batch.scored_rows.chunks(self.divergence_chunk(batch)) {
            self.gather_normed(pass, rows);
            all.extend_from_slice(&self.scratch.head.normed[..rows.len() * self.shape.hidden]);
        }
        all
    }

    /// As [`Decoder::forward_with_divergence`](super::Decoder::forward_with_divergence).
    pub(super) fn forward_with_divergence(
        &mut self,
        pass: &Pass<'_>,
        reference: Head<'_>,
        batch: &PackedBatch,
        keep: Keep,
    ) -> (Vec<f64>, Vec<f64>) {
        self.run_blocks(pass, batch, Some(keep));
        let chunk = self.divergence_chunk(batch);
        let (mut logps, mut divergences) = (Vec::new(), Vec::new());
        for (rows, targets, reference) in chunks(chunk, self.shape.hidden, reference, batch) {
            self.gather_normed(pass, rows);
            let Scratch { head, logits, reference_logits, .. } = &mut self.scratch;
            let normed = &head.normed[..rows.len() * self.shape.hidden];
            let policy = Head { rows: normed, weights: pass.base(&self.shape.layout.head) };
            let (chunk_logps, chunk_divergences) =
                divergence::forward(T::PRECISION, policy, reference, targets, [logits, reference_logits]);
            logps.extend(chunk_logps);
            divergences.extend(chunk_divergences);
        }
        (batch.sum_responses(&logps), batch.sum_responses(&divergences))
    }

    /// As [`Decoder::backward_with_divergence`](super::Decoder::backward_with_divergence).
    pub(super) fn backward_with_divergence(
        &mut self,
        pass: &Pass<'_>,
        reference: Head<'_>,
        batch: &PackedBatch,
        [d_logps, d_divergences]: [&[f64]; 2],
        gradient: &mut [f32],
    ) {
        let Some(keep) = self.kept.take() else { panic!("backward without a forward pass before it") };
        let mut gradient = pass.gradient(gradient);
        let (d_logps, d_divergences) = (batch.spread_responses(d_logps), batch.spread_responses(d_divergences));
        let chunk = self.divergence_chunk(batch);
        self.room(batch.rows()).of(&mut self.scratch.dx, self.shape.hidden).fill(0.0);
        let derivatives = d_logps.chunks(chunk).zip(d_divergences.chunks(chunk));
        for ((rows, targets, reference), (d_logps, d_divergences)) in
            chunks(chunk, self.shape.hidden, reference, batch).zip(derivatives)
        {
            self.gather_normed(pass, rows);
            let Scratch { head, logits, reference_logits, .. } = &mut self.scratch;
            let len = rows.len() * self.shape.hidden;
            let policy = Head { rows: &head.normed[..len], weights: pass.base(&self.shape.layout.head) };
            let d_normed = fit(&mut head.d_normed, len);
            let d_head = gradient.base(&self.shape.layout.head);
            let (derivatives, scratch) = ([d_logps, d_divergences], [logits, reference_logits]);
            divergence::backward(T::PRECISION, policy, reference, targets, derivatives, d_normed, d_head, scratch);
            self.norm_backward(pass, rows, &mut gradient);
        }
        self.backward_blocks(pass, batch, keep, &mut gradient);
    }

    /// How many scored rows to compare at once.
    fn divergence_chunk(&self, batch: &PackedBatch) -> usize {
        divergence::even_chunk(batch.targets.len(), self.shape.vocab())
    }
}

/// The scored rows of a batch, their targets, and the reference's rows, `chunk` at a time.
fn chunks<'b>(
    chunk: usize,
    hidden: usize,
    reference: Head<'b>,
    batch: &'b PackedBatch,
) -> impl Iterator<Item = (&'b [u32], &'b [u32], Head<'b>)> {
    let expected = batch.scored_rows.len() * hidden;
    assert_eq!(reference.rows.len(), expected, "the reference's rows are not those of this batch");
    let references = reference.rows.chunks(chunk * hidden).map(move |rows| Head { rows, ..reference });
    let scored = batch.scored_rows.chunks(chunk).zip(batch.targets.chunks(chunk));
    scored.zip(references).map(|((rows, targets), reference)| (rows, targets, reference))
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
