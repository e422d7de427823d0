//! The operations of a decoder on NVIDIA GPUs. **Nothing of it has run on a GPU yet**: the tests run every kernel on the CPU,
//! through a small emulator, and compare it with the operation of the same name in [`ops`](crate::ops).
//!
//! Kernels are CUDA C++, one file per operation in `cuda/kernels`. Their text is part of the program and is compiled on the
//! machine that runs them. Results do not depend on the order in which threads run: no two threads add to one number in
//! memory.

mod attention;
mod backend;
mod blas;
mod cache;
mod device;
#[cfg(test)]
mod emulator;
mod gpu;
mod low_rank;
mod nvrtc;
mod ops;
mod pass;
#[cfg(test)]
mod tested;
mod weights;

/// A file of kernels.
#[derive(Debug)]
pub(crate) struct Module {
    /// The file's name without its extension.
    name: &'static str,
    /// Its text.
    text: &'static str,
    /// The kernels in it.
    kernels: &'static [&'static str],
}

/// All kernels.
#[cfg(test)]
const MODULES: [&Module; 11] = [
    &ops::attention::MODULE,
    &ops::cached::MODULE,
    &ops::dropout::MODULE,
    &ops::elementwise::MODULE,
    &ops::logprob::MODULE,
    &ops::optimizer::MODULE,
    &ops::rmsnorm::MODULE,
    &ops::rope::MODULE,
    &ops::rows::MODULE,
    &ops::sampling::MODULE,
    &ops::swiglu::MODULE,
];

impl Module {
    /// The text that a compiler takes: what all kernels share, then the file.
    fn source(&self) -> String {
        let common = include_str!("cuda/kernels/common.cuh");
        let Self { name, text, .. } = self;
        let rest: String =
            text.lines().filter(|line| !line.starts_with("#include")).flat_map(|line| [line, "\n"]).collect();
        format!("#line 1 \"common.cuh\"\n{common}\n#line 1 \"{name}.cu\"\n{rest}")
    }
}
