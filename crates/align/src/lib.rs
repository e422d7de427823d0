//! Preference data, objectives, the trainer and the stepwise chain.
//!
//! A preference pair's way from the file to the weights: [`data`] reads and tokenises it, [`mod@reference`] scores
//! it under the policy before, [`task`] turns log-probabilities into a loss by an [`objective`], and [`trainer`] takes
//! the gradient back through the engine. [`step`] is one step of the chain; [`mod@merge`] makes one model of several;
//! [`judge`] says what responses are worth, among others by the models of [`reward`]; [`world`] is a place where all is known; [`tabular`] solves the constrained
//! problem exactly where policies are finite, and [`choose`] finds the multiplier where they are not.

pub mod choose;
pub mod data;
pub mod judge;
pub mod log;
pub mod merge;
pub mod objective;
pub mod reference;
pub mod reward;
pub mod sequences;
mod state;
pub mod step;
pub mod tabular;
pub mod task;
pub mod trainer;
pub mod world;
