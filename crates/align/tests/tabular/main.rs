//! Finite policies: the theorems of `docs/theory.md`, each held by a test.

#![allow(clippy::unwrap_used)]

mod bounds;
mod chains;
mod choose;
mod population;
mod problems;
mod sampled;
mod solve;
