//! The arithmetic of a decoder, one file per operation, forward beside backward.
//!
//! Every operation works on row-major slices and is split over rayon's current thread pool in
//! chunks whose size does not depend on the number of threads, so results do not either.
//! Backward functions *add* to gradients of weights and, where the doc says so, to gradients of inputs.

pub(crate) mod attention;
pub(crate) mod divergence;
pub(crate) mod dora;
pub(crate) mod dropout;
pub(crate) mod embedding;
pub(crate) mod linear;
pub(crate) mod logprob;
pub(crate) mod lora;
pub(crate) mod number;
pub(crate) mod rmsnorm;
pub(crate) mod rope;
pub(crate) mod score;
pub(crate) mod simd;
pub(crate) mod swiglu;

pub(crate) use number::Number;

use crate::profile::{self, Span, Stage, Work};

#[cfg(test)]
pub(crate) mod finite_difference;

/// Times an elementwise operation that reads and writes so many bytes.
fn elementwise(bytes: usize) -> Span {
    profile::span(Stage::Elementwise, || Work::Bytes(bytes as f64))
}

/// The first `len` elements of a buffer that is made anew where it is too small; their values are arbitrary.
///
/// Memory that is new to the process is not written to: the system gives a page of it to the thread that uses it first.
pub(crate) fn fit<T: Number>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    if buffer.len() < len {
        // what there is goes first, so that both are never there together
        *buffer = Vec::new();
        *buffer = T::unwritten(len);
    }
    &mut buffer[..len]
}

/// The first `len` words of memory that grows as needed.
fn words_of(memory: &mut Vec<u32>, len: usize) -> &mut [u32] {
    if memory.len() < len {
        memory.resize(len, 0);
    }
    &mut memory[..len]
}
