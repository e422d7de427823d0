//! The arithmetic of matrix products.

use serde::{Deserialize, Serialize};

use crate::ops::linear::bf16;

/// In what precision matrix products are computed, and what is kept of activations. All else is f32: weights and their
/// gradients, optimizer states, sums within products, norms, softmax, log-probabilities.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// f32 throughout.
    #[default]
    F32,
    /// Factors of products, and the activations that a block keeps, are rounded to bfloat16 (8 bits of fraction).
    Bf16,
}

impl Precision {
    /// Both.
    pub const ALL: [Self; 2] = [Self::F32, Self::Bf16];

    /// Whether the processor has instructions for products in this precision, and they are used. Others round the factors.
    pub fn is_native(self) -> bool {
        self == Self::F32 || bf16::is_native()
    }

    /// The name in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }
}
