//! Language models as arithmetic.
//!
//! This crate turns tokens into log-probabilities and derivatives into weight updates. It knows
//! nothing of preferences: see the `align` crate for those.

pub mod chat;
pub mod checkpoint;
pub mod config;
pub mod error;
pub mod model;
pub mod tokenizer;

pub use chat::Message;
pub use checkpoint::Checkpoint;
pub use config::{ModelConfig, RopeScaling};
pub use error::{Error, Result};
pub use model::{Layout, Model, ParamSpec};
pub use tokenizer::Tokenizer;
