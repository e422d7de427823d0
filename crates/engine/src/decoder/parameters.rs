//! What a decoder computes with.

use crate::lora::Adapter;

/// What a pass computes with. A model's weights alone convert into it.
#[derive(Debug, Clone, Copy)]
pub struct Parameters<'a> {
    /// The weights of the model.
    pub base: &'a [f32],
    /// What adapts them. The model is then frozen: gradients are the adapter's, in its layout.
    pub adapter: Option<&'a Adapter>,
    /// The seed of the adapter's dropout, another one for each optimizer step; `None` drops nothing.
    pub dropout_seed: Option<u64>,
}

impl Parameters<'_> {
    /// Whether a pass drops anything.
    pub fn has_dropout(&self) -> bool {
        self.dropout_seed.is_some() && self.adapter.is_some_and(|adapter| adapter.options.dropout > 0.0)
    }
}

impl<'a> From<&'a [f32]> for Parameters<'a> {
    fn from(base: &'a [f32]) -> Self {
        Self { base, adapter: None, dropout_seed: None }
    }
}

impl<'a> From<&'a Vec<f32>> for Parameters<'a> {
    fn from(base: &'a Vec<f32>) -> Self {
        base.as_slice().into()
    }
}
