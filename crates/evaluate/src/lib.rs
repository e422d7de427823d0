//! How policies compare: tables and plots of reward against safety, and training curves.
//!
//! Everything here turns numbers into text; writing it to a file is the caller's part. Plots are SVG on a
//! white ground, in colours that colour-blind readers tell apart, and every colour has a mark of its own.

pub mod curves;
pub mod frontier;
mod plot;
pub mod verdict;
