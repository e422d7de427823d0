//! How policies compare: what judges say of their answers, ratings, tables and plots.
//!
//! [`verdict`] is what a judge says of two answers, and [`rating`] what follows for the policies. Everything here turns numbers
//! into numbers or text; reading and writing files is the caller's part. Plots are SVG on a white ground, in colours that
//! colour-blind readers tell apart, and every colour has a mark of its own.

pub mod curves;
pub mod frontier;
mod plot;
pub mod rating;
mod table;
pub mod verdict;
