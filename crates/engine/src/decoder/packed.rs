//! A model's matrices in fewer bits, for generation.

use crate::generate::Dtype;
use crate::lora::Adapter;
use crate::mixture::Shared;
use crate::model::Product;
use crate::ops::linear::packed::Packed;

/// The matrices of the policies of one pass.
#[derive(Debug)]
pub(crate) struct PackedModel {
    /// For each block those of [`Product::ALL`].
    blocks: Vec<Vec<Packed>>,
    pub(super) head: Packed,
    /// Whether the pass's only adapter is folded into them.
    folded: bool,
}

impl PackedModel {
    /// Nothing for f32, in which the model's own weights are read.
    pub(crate) fn new(policies: &Shared<'_>, dtype: Dtype) -> Option<Self> {
        let pack = match dtype {
            Dtype::F32 => return None,
            Dtype::Bf16 => Packed::bf16,
            Dtype::Int8 => Packed::int8,
        };
        let Shared { model, adapters, .. } = policies;
        let alone = if let [adapter] = adapters.as_slice() { *adapter } else { None };
        let product = |index: usize, product: Product| {
            let w = &model.weights[model.layout.blocks[index].product(product).clone()];
            let inputs = product.inputs(&model.config);
            match alone.and_then(|adapter| adapter.at(index, product, None)) {
                None => pack(w, inputs),
                Some(low_rank) => {
                    let mut merged = w.to_vec();
                    low_rank.merge(&mut merged);
                    pack(&merged, inputs)
                }
            }
        };
        let blocks = 0..model.layout.blocks.len();
        Some(Self {
            blocks: blocks.map(|index| Product::ALL.map(|which| product(index, which)).into()).collect(),
            head: pack(&model.weights[model.layout.head.clone()], model.config.hidden_size),
            folded: alone.is_some(),
        })
    }

    /// Bytes of all matrices.
    pub(crate) fn bytes(&self) -> usize {
        self.blocks.iter().flatten().chain([&self.head]).map(Packed::bytes).sum()
    }

    /// A matrix of block `index`.
    pub(crate) fn product(&self, index: usize, product: Product) -> &Packed {
        &self.blocks[index][product as usize]
    }

    /// What adapts the matrices for each policy of the pass.
    pub(super) fn adapters<'a>(&self, policies: &Shared<'a>) -> Vec<Option<&'a Adapter>> {
        if self.folded { vec![None] } else { policies.adapters.clone() }
    }
}
