//! How policies compare: judges, what they say of their answers, ratings, tables and plots.
//!
//! [`judge`] has judges of two answers, [`verdict`] is what one says of them, and [`rating`] what follows for the policies. But for
//! the judges' store of replies, everything here turns numbers into numbers or text; reading and writing files is the caller's
//! part. Plots are SVG on a white ground, in colours that colour-blind readers tell apart, and every colour has a mark of its own.

pub mod curves;
pub mod frontier;
pub mod judge;
pub mod panels;
mod plot;
pub mod rating;
pub mod report;
mod table;
pub mod verdict;
