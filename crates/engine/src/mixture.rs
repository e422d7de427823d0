//! Policies mixed at decode time: one distribution over the next token from two models.

use crate::batch::PackedBatch;
use crate::decoder::{Decoder, Head};
use crate::error::{Error, Result};
use crate::lora::Adapter;
use crate::model::Model;
use crate::ops::logprob;
use crate::precision::Precision;

/// A model, as it is or as an adapter makes it. A model alone converts into it.
#[derive(Debug, Clone, Copy)]
pub struct Adapted<'a> {
    /// The model.
    pub model: &'a Model,
    /// What adapts it, made for models of its shape.
    pub adapter: Option<&'a Adapter>,
}

impl<'a> From<&'a Model> for Adapted<'a> {
    fn from(model: &'a Model) -> Self {
        Self { model, adapter: None }
    }
}

impl Adapted<'_> {
    fn is_dora(&self) -> bool {
        self.adapter.is_some_and(|adapter| adapter.options.dora)
    }
}

/// One model, or two whose logits are mixed: logits (1 − q)·A + q·B, so that π ∝ π_A^(1−q)·π_B^q token by token.
///
/// For Gibbs policies π_r and π_{r+λ̄g} over whole answers this is the policy at λ = qλ̄ (`docs/theory.md`); over tokens
/// it approximates it.
#[derive(Debug, Clone)]
pub struct Mixture<'a> {
    /// At least one, of one vocabulary. Their logits add up.
    passes: Vec<Shared<'a>>,
    precision: Precision,
}

/// Policies of one model that are computed in one pass, so that every matrix of the model is read once for all of them.
#[derive(Debug, Clone)]
pub(crate) struct Shared<'a> {
    pub(crate) model: &'a Model,
    /// Of each policy; at least one.
    pub(crate) adapters: Vec<Option<&'a Adapter>>,
    /// The factors on the policies' logits.
    weights: Vec<f32>,
}

impl Shared<'_> {
    /// The weighted sum of the policies' rows. `rows` are all of the first policy, then all of the next.
    ///
    /// The vocabulary head is linear and no adapter changes it, so the head of the sum is the sum of the heads.
    pub(crate) fn weighted_sum<'r>(&self, rows: &'r mut [f32]) -> &'r [f32] {
        let (sum, others) = rows.split_at_mut(rows.len() / self.weights.len());
        sum.iter_mut().for_each(|sum| *sum *= self.weights[0]);
        for (rows, weight) in others.chunks_exact(sum.len()).zip(&self.weights[1..]) {
            sum.iter_mut().zip(rows).for_each(|(sum, x)| *sum = weight.mul_add(*x, *sum));
        }
        sum
    }
}

impl<'a> From<&'a Model> for Mixture<'a> {
    fn from(model: &'a Model) -> Self {
        let passes = vec![Shared { model, adapters: vec![None], weights: vec![1.0] }];
        Self { passes, precision: Precision::F32 }
    }
}

impl<'a> Mixture<'a> {
    /// The mixture of `a` and `b` with weight `q` of `b`: between them for 0 ≤ q ≤ 1, beyond one of them otherwise.
    ///
    /// Policies of one model in memory are computed in one pass over it, unless one has DoRA, which is not an addition to
    /// the model's products.
    ///
    /// # Errors
    /// [`Error::Input`] if q is not finite, or the vocabularies differ in size.
    pub fn new(a: impl Into<Adapted<'a>>, b: impl Into<Adapted<'a>>, q: f64) -> Result<Self> {
        if !q.is_finite() {
            return Err(Error::input(format!("The weight q of a mixture is {q}, but must be a finite number.")));
        }
        let policies: [Adapted<'a>; 2] = [a.into(), b.into()];
        let sizes = policies.map(|policy| policy.model.config.vocab_size);
        if sizes[0] != sizes[1] {
            return Err(Error::input(format!(
                "The two models of a mixture have {} and {} tokens in their vocabularies, so their logits cannot be mixed. \
                 Use policies of one base model.",
                sizes[0], sizes[1]
            )));
        }
        let [a, b] = policies;
        let shared = std::ptr::eq(a.model, b.model) && !a.is_dora() && !b.is_dora();
        let weights = [1.0 - q, q].map(|weight| weight as f32);
        let passes = match shared {
            true => vec![Shared { model: a.model, adapters: vec![a.adapter, b.adapter], weights: weights.to_vec() }],
            false => policies
                .iter()
                .zip(weights)
                .map(|(Adapted { model, adapter }, weight)| Shared {
                    model,
                    adapters: vec![*adapter],
                    weights: vec![weight],
                })
                .collect(),
        };
        Ok(Self { passes, precision: Precision::F32 })
    }

    /// The same policy, scored in another precision than f32. What its answers are generated in, [`Dtype`](crate::generate::Dtype)
    /// says.
    pub fn with_precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// The precision in which it is scored.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Number of token ids.
    pub fn vocab_size(&self) -> usize {
        self.passes[0].model.config.vocab_size
    }

    /// Whether it gives scores of texts in the place of log-probabilities: a model with a score head, alone.
    pub fn is_scorer(&self) -> bool {
        self.passes.iter().any(|pass| pass.model.config.head.is_score())
    }

    /// The longest sequence that all models take.
    pub fn context(&self) -> usize {
        let contexts = self.passes.iter().map(|pass| pass.model.config.max_position_embeddings);
        contexts.min().unwrap_or(0)
    }

    /// A hash of all weights that names this policy, whatever it is computed in: hexadecimal digits.
    pub fn hash(&self) -> String {
        let mut parts = Vec::new();
        for Shared { model, adapters, weights } in &self.passes {
            parts.push(model.hash());
            for (adapter, weight) in adapters.iter().zip(weights) {
                parts.extend(adapter.map(Adapter::hash));
                // a model by itself is named by its hash alone
                parts.extend((*weight != 1.0).then(|| weight.to_string()));
            }
        }
        parts.join(" ")
    }

    /// The passes that give the mixture's logits as their sum.
    pub(crate) fn passes(&self) -> &[Shared<'a>] {
        &self.passes
    }

    /// The logits of the mixture, from those of each pass; `sum` is memory for them.
    pub(crate) fn logits<'l>(&self, each: &[&'l [f32]], sum: &'l mut Vec<f32>) -> &'l [f32] {
        let [first, others @ ..] = each else { return &[] };
        if others.is_empty() {
            return first;
        }
        sum.clear();
        sum.extend_from_slice(first);
        for logits in others {
            sum.iter_mut().zip(*logits).for_each(|(sum, logit)| *sum += logit);
        }
        sum
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
        let decoder = |pass: &Shared<'_>| Decoder::new(pass.model, positions).with_precision(mixture.precision);
        let decoders = mixture.passes.iter().map(decoder).collect();
        Self { mixture, decoders }
    }

    /// The log-probability of each response of the batch, summed over its tokens; of one model to the last bit as
    /// [`Decoder::logps`] has it.
    pub fn logps(&mut self, batch: &PackedBatch) -> Vec<f64> {
        if let ([decoder], [Shared { model, adapters, .. }]) = (self.decoders.as_mut_slice(), self.mixture.passes())
            && let [None] = adapters.as_slice()
        {
            return decoder.logps(&model.weights, batch);
        }
        let passes = self.decoders.iter_mut().zip(self.mixture.passes());
        let rows: Vec<Vec<f32>> = passes.map(|(decoder, pass)| decoder.mixed_rows(pass, batch)).collect();
        let heads = rows
            .iter()
            .zip(self.mixture.passes())
            .map(|(rows, Shared { model, .. })| Head { rows, weights: &model.weights[model.layout.head.clone()] });
        batch.sum_responses(&logprob::mixed(self.mixture.precision, &heads.collect::<Vec<_>>(), &batch.targets))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::lora::{LoraOptions, Projection};
    use crate::model::tests::tiny_config;
    use crate::ops::finite_difference::random;

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

    /// A model, adapters of it as training leaves them (of other ranks and matrices; the last has DoRA), and the models
    /// that they make of it.
    pub(crate) fn adapted() -> (Model, Vec<(Adapter, Model)>) {
        let model = Model::random(tiny_config(), 0.5, 3);
        let some = vec![Projection::QProj, Projection::VProj, Projection::DownProj];
        let options = [
            LoraOptions { rank: 3, ..LoraOptions::default() },
            LoraOptions { rank: 2, targets: some, dropout: 0.5, ..LoraOptions::default() },
            LoraOptions { rank: 2, dora: true, ..LoraOptions::default() },
        ];
        let adapters = options.into_iter().enumerate().map(|(seed, options)| {
            let mut adapter = Adapter::new(&model, options, seed as u64).unwrap();
            let noise = random(adapter.weights.len(), seed as u64);
            adapter.weights.iter_mut().zip(noise).for_each(|(weight, noise)| *weight += 0.3 * noise);
            let mut folded = model.clone();
            adapter.fold_into(&mut folded);
            (adapter, folded)
        });
        let adapters = adapters.collect();
        (model, adapters)
    }

    #[test]
    fn adapters_of_one_model_in_one_pass_score_as_the_models_that_they_make() {
        let (model, adapters) = adapted();
        let [(first, first_folded), (second, second_folded), (dora, dora_folded)] = adapters.as_slice() else {
            panic!("three adapters")
        };
        let with = |adapter| Adapted { model: &model, adapter: Some(adapter) };
        for (a, b, folded, passes) in [
            (with(first), with(second), [first_folded, second_folded], 1),
            ((&model).into(), with(first), [&model, first_folded], 1),
            (with(second), (&model).into(), [second_folded, &model], 1),
            (with(first), with(dora), [first_folded, dora_folded], 2),
        ] {
            for q in [0.0, 0.3, 1.0, 1.4] {
                let mixture = Mixture::new(a, b, q).unwrap();
                assert_eq!(mixture.passes().len(), passes);
                let shared = Scorer::new(mixture, 16).logps(&batch());
                let apart = Scorer::new(Mixture::new(folded[0], folded[1], q).unwrap(), 16).logps(&batch());
                for (shared, apart) in shared.iter().zip(&apart) {
                    assert!((shared / apart - 1.0).abs() < 1e-5, "q = {q}: {shared} shared, {apart} apart");
                }
            }
        }
    }

    #[test]
    fn the_hash_names_weights_adapters_and_shares() {
        let (model, adapters) = adapted();
        let hash = |a: usize, b: Option<usize>, q| {
            let adapter = |index: usize| Some(&adapters[index].0);
            let [a, b] = [adapter(a), b.and_then(adapter)].map(|adapter| Adapted { model: &model, adapter });
            Mixture::new(a, b, q).unwrap().hash()
        };
        let all =
            [hash(0, Some(1), 0.5), hash(1, Some(0), 0.5), hash(0, Some(1), 0.4), hash(0, None, 0.5), model.hash()];
        assert_eq!(std::collections::BTreeSet::from(all).len(), 5);
        assert_eq!(Mixture::from(&model).hash(), model.hash());
    }

    #[test]
    fn models_of_other_vocabularies_and_shares_without_a_value_are_refused() {
        let a = Model::random(tiny_config(), 0.5, 1);
        let b = Model::random(crate::ModelConfig { vocab_size: 12, ..tiny_config() }, 0.5, 1);
        assert!(Mixture::new(&a, &b, 0.5).unwrap_err().to_string().contains("11 and 12 tokens"));
        for q in [f64::INFINITY, f64::NAN] {
            assert_eq!(Mixture::new(&a, &a, q).unwrap_err().exit_code(), 2);
        }
    }
}
