//! What is trained.

use engine::{Adapter, Model, ParamSpec, Parameters};

/// A policy in training.
#[derive(Debug, Clone)]
pub enum Policy {
    /// All weights of a model.
    Whole(Model),
    /// An adapter on a model that stays as it is.
    Adapted(Model, Adapter),
}

impl Policy {
    /// The model that it has become, into which an adapter is folded; and that adapter, if there is one.
    pub fn into_model(self) -> (Model, Option<Adapter>) {
        match self {
            Self::Whole(model) => (model, None),
            Self::Adapted(mut model, adapter) => {
                adapter.fold_into(&mut model);
                (model, Some(adapter))
            }
        }
    }

    /// The model as it is without an adapter.
    pub(super) fn base(&self) -> &Model {
        match self {
            Self::Whole(model) => model,
            Self::Adapted(model, _) => model,
        }
    }

    /// The tensors that are trained.
    pub(super) fn specs(&self) -> &[ParamSpec] {
        match self {
            Self::Whole(model) => &model.layout.specs,
            Self::Adapted(_, adapter) => &adapter.layout.specs,
        }
    }

    /// The weights that are trained, in one flat vector.
    pub(super) fn weights(&self) -> &Vec<f32> {
        match self {
            Self::Whole(model) => &model.weights,
            Self::Adapted(_, adapter) => &adapter.weights,
        }
    }

    /// As [`weights`](Self::weights), to change them.
    pub(super) fn weights_mut(&mut self) -> &mut Vec<f32> {
        match self {
            Self::Whole(model) => &mut model.weights,
            Self::Adapted(_, adapter) => &mut adapter.weights,
        }
    }

    /// Bytes of all weights, those that stay as they are too.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Whole(model) => size_of_val(&*model.weights),
            Self::Adapted(model, adapter) => size_of_val(&*model.weights) + size_of_val(&*adapter.weights),
        }
    }

    /// What a pass computes with; `dropout_seed` for passes that drop.
    pub(super) fn parameters(&self, dropout_seed: Option<u64>) -> Parameters<'_> {
        match self {
            Self::Whole(model) => Parameters::from(&model.weights),
            Self::Adapted(model, adapter) => Parameters { base: &model.weights, adapter: Some(adapter), dropout_seed },
        }
    }

    /// A hash of all weights: hexadecimal digits.
    pub(super) fn hash(&self) -> String {
        match self {
            Self::Whole(model) => model.hash(),
            Self::Adapted(model, adapter) => model.hash() + &adapter.hash(),
        }
    }
}
