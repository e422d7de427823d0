//! Preference data, objectives, the trainer and the stepwise chain.

pub mod data;
pub mod objective;
