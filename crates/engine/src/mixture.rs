//! Policies mixed at decode time: one distribution over the next token from two models.

use crate::batch::PackedBatch;
use crate::decoder::{Decoder, Head};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::ops::logprob;

/// One model, or two whose logits are mixed: logits (1 − q)·A + q·B, so that π ∝ π_A^(1−q)·π_B^q token by token.
///
/// For Gibbs policies π_r and π_{r+λ̄g} over whole answers this is the policy at λ = qλ̄ (`docs/theory.md`); over tokens
/// it approximates it.
#[derive(Debug, Clone)]
pub struct Mixture<'a> {
    /// The models and the factors on their logits; at least one, of one vocabulary.
    parts: Vec<(&'a Model, f32)>,
}

impl<'a> From<&'a Model> for Mixture<'a> {
    fn from(model: &'a Model) -> Self {
        Self { parts: vec![(model, 1.0)] }
    }
}

impl<'a> Mixture<'a> {
    /// The mixture of `a` and `b` with weight `q` of `b`, 0 ≤ q ≤ 1.
    ///
    /// # Errors
    /// [`Error::Input`] if q is out of its range, or the vocabularies differ in size.
    pub fn new(a: &'a Model, b: &'a Model, q: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&q) {
            return Err(Error::input(format!("The weight q of a mixture is {q}, but must be from 0 to 1.")));
        }
        let sizes = [a, b].map(|model| model.config.vocab_size);
        if sizes[0] != sizes[1] {
            return Err(Error::input(format!(
                "The two models of a mixture have {} and {} tokens in their vocabularies, so their logits cannot be mixed. \
                 Use policies of one base model.",
                sizes[0], sizes[1]
            )));
        }
        Ok(Self { parts: vec![(a, (1.0 - q) as f32), (b, q as f32)] })
    }

    /// Number of token ids.
    pub fn vocab_size(&self) -> usize {
        self.parts[0].0.config.vocab_size
    }

    /// The longest sequence that all models take.
    pub fn context(&self) -> usize {
        let contexts = self.parts.iter().map(|(model, _)| model.config.max_position_embeddings);
        contexts.min().unwrap_or(0)
    }

    /// A hash of all weights that names this policy: hexadecimal digits.
    pub fn hash(&self) -> String {
        match self.parts.as_slice() {
            [(model, _)] => model.hash(),
            parts => {
                let parts: Vec<String> =
                    parts.iter().map(|(model, weight)| format!("{} {weight}", model.hash())).collect();
                parts.join(" ")
            }
        }
    }

    /// The models.
    pub(crate) fn models(&self) -> impl Iterator<Item = &'a Model> {
        self.parts.iter().map(|(model, _)| *model)
    }

    /// The logits of the mixture, from one list a model; `mixed` is memory for them.
    pub(crate) fn logits<'l>(&self, each: &[&'l [f32]], mixed: &'l mut Vec<f32>) -> &'l [f32] {
        if let [only] = each {
            return only;
        }
        mixed.clear();
        mixed.resize(each[0].len(), 0.0);
        for (logits, (_, weight)) in each.iter().zip(&self.parts) {
            mixed.iter_mut().zip(*logits).for_each(|(mixed, logit)| *mixed = weight.mul_add(*logit, *mixed));
        }
        mixed
    }
}

/// Scores responses under a mixture, and owns the memory for it.
#[derive(Debug)]
pub struct Scorer<'a> {
    mixture: Mixture<'a>,
    decoders: Vec<Decoder>,
}

impl<'a> Scorer<'a> {
    /// For sequences of at most `positions` tokens.
    pub fn new(policy: impl Into<Mixture<'a>>, positions: usize) -> Self {
        let mixture = policy.into();
        let decoders = mixture.models().map(|model| Decoder::new(model, positions)).collect();
        Self { mixture, decoders }
    }

    /// The log-probability of each response of the batch, summed over its tokens; of one model to the last bit as
    /// [`Decoder::logps`] has it.
    pub fn logps(&mut self, batch: &PackedBatch) -> Vec<f64> {
        if let ([decoder], [(model, _)]) = (self.decoders.as_mut_slice(), self.mixture.parts.as_slice()) {
            return decoder.logps(&model.weights, batch);
        }
        let models = self.mixture.models();
        let rows: Vec<Vec<f32>> = self
            .decoders
            .iter_mut()
            .zip(models)
            .map(|(decoder, model)| decoder.head_rows(&model.weights, batch))
            .collect();
        let heads = rows.iter().zip(&self.mixture.parts).map(|(rows, (model, weight))| {
            (Head { rows, weights: &model.weights[model.layout.head.clone()] }, *weight)
        });
        batch.sum_responses(&logprob::mixed(&heads.collect::<Vec<_>>(), &batch.targets))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::tiny_config;

    fn batch() -> PackedBatch {
        let mut batch = PackedBatch::default();
        batch.push(&[1, 5, 3], &[&[4, 2], &[9, 9, 10, 2]]);
        batch.push(&[1, 7], &[&[8, 2]]);
        batch
    }

    #[test]
    fn a_mixture_is_the_normalised_product_and_its_ends_are_the_models() {
        let [a, b] = [1, 2].map(|seed| Model::random(tiny_config(), 0.5, seed));
        let alone = |model: &Model| Scorer::new(model, 16).logps(&batch());
        for (q, end) in [(0.0, &a), (1.0, &b)] {
            let mixed = Scorer::new(Mixture::new(&a, &b, q).unwrap(), 16).logps(&batch());
            assert!(mixed.iter().zip(alone(end)).all(|(mixed, end)| (mixed - end).abs() < 1e-5));
        }
        // one token at a time, from the probabilities of all tokens
        let q = 0.3;
        let every: Vec<[u32; 1]> = (0..11).map(|token| [token]).collect();
        let every: Vec<&[u32]> = every.iter().map(|token| &token[..]).collect();
        let next = |prompt: &[u32], token: u32| {
            let mut batch = PackedBatch::default();
            batch.push(prompt, &every);
            let [a, b] = [&a, &b].map(|model| Scorer::new(model, 16).logps(&batch));
            let product: Vec<f64> = a.iter().zip(&b).map(|(a, b)| ((1.0 - q) * a + q * b).exp()).collect();
            (product[token as usize] / product.iter().sum::<f64>()).ln()
        };
        let mixed = Scorer::new(Mixture::new(&a, &b, q).unwrap(), 16).logps(&batch());
        let expected = next(&[1, 7], 8) + next(&[1, 7, 8], 2);
        assert!((mixed[2] - expected).abs() < 1e-5, "{} {expected}", mixed[2]);
    }

    #[test]
    fn models_of_other_vocabularies_and_weights_beyond_the_ends_are_refused() {
        let a = Model::random(tiny_config(), 0.5, 1);
        let b = Model::random(crate::ModelConfig { vocab_size: 12, ..tiny_config() }, 0.5, 1);
        assert!(Mixture::new(&a, &b, 0.5).unwrap_err().to_string().contains("11 and 12 tokens"));
        for q in [-0.1, 1.1, f64::NAN] {
            assert_eq!(Mixture::new(&a, &a, q).unwrap_err().exit_code(), 2);
        }
    }
}
