//! The arithmetic of a decoder, one file per operation, forward beside backward.
//!
//! Every operation works on row-major f32 slices and is split over rayon's current thread pool in
//! chunks whose size does not depend on the number of threads, so results do not either.
//! Backward functions *add* to gradients of weights and, where the doc says so, to gradients of inputs.

pub mod attention;
pub mod embedding;
pub mod linear;
pub mod logprob;
pub mod rmsnorm;
pub mod rope;
pub(crate) mod simd;
pub mod swiglu;

#[cfg(test)]
pub(crate) mod finite_difference;
