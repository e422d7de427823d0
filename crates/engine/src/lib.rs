//! Language models as arithmetic.
//!
//! This crate turns tokens into log-probabilities and derivatives into weight updates. It knows
//! nothing of preferences: see the `align` crate for those.

mod backend;
pub mod batch;
pub mod chat;
pub mod checkpoint;
pub mod config;
#[allow(dead_code, reason = "no command uses it yet")]
mod cuda;
pub mod decoder;
pub mod error;
pub mod generate;
pub mod lora;
pub mod memory;
pub mod mixture;
pub mod model;
mod ops;
pub mod optim;
pub mod precision;
pub mod profile;
pub mod roofline;
pub mod tokenizer;

pub use batch::PackedBatch;
pub use chat::Message;
pub use checkpoint::Checkpoint;
pub use config::{ModelConfig, OutputHead, RopeScaling};
pub use decoder::{Decoder, Head, Keep, Parameters};
pub use error::{Error, Result};
pub use lora::{Adapter, AdapterLayout, LoraOptions, Projection};
pub use mixture::{Adapted, Mixture, Scorer};
pub use model::{Layout, Model, ModelHash, ParamSpec};
pub use precision::Precision;
pub use tokenizer::Tokenizer;

/// What decides the last bits of results besides what they are results of: how the engine computes, and the processor's
/// instruction set. What is kept on disk names it.
pub fn arithmetic() -> String {
    // changes whenever results may change
    format!("v11 {}", instruction_set())
}

/// The processor's instruction set as the engine uses it.
pub fn instruction_set() -> String {
    format!("{}{}", ops::simd::instruction_set(), if ops::linear::bf16::is_native() { " bf16" } else { "" })
}
