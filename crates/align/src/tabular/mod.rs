//! Finite policies with exact expectations: the constrained problem and its solution, alignment step by step, and
//! what each objective leads to when data are unlimited.
//!
//! Throughout, π(y|x) is a policy over the answers y to prompts x with weights w(x), E is the expectation over both,
//! KL(π ‖ π_ref) = E_x Σ_y π log(π/π_ref), and all values are f64. `docs/theory.md` says which theorem each test holds.

mod bounds;
mod dual;
mod minimise;
mod policy;
mod population;
mod problem;
mod solve;
mod stepwise;

pub use bounds::{OptimalityBounds, Uncertainty, ViolationBounds};
pub(crate) use dual::solved;
pub(crate) use policy::divergence;
pub use policy::{Policy, Table, expectation, gibbs, kl};
pub use population::{ExpectedLoss, Labels, Pairs};
pub use problem::{Description, Problem};
pub use solve::Solution;
pub use stepwise::{Step, largest_difference_over_orders};
