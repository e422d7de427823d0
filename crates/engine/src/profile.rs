//! Where the time of a training step goes.
//!
//! While a thread profiles, the operations that it calls add their time and their work to a [`Profile`]. Otherwise they
//! only look at a flag.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Instant;

/// A part of the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// The blocks' products with their weights, forward: y = x·Wᵀ.
    Forward,
    /// The gradients of those products with respect to their inputs: dx = dy·W.
    BackwardInput,
    /// The gradients of those products with respect to their weights: dW += dyᵀ·x.
    BackwardWeight,
    /// Attention without its projections, forward.
    Attention,
    /// Attention without its projections, backward.
    AttentionBackward,
    /// The vocabulary head with its softmax, forward and backward.
    Head,
    /// Norms, rotary positions, SwiGLU and the embedding.
    Elementwise,
    /// The gradient's norm, and the update of the weights.
    Optimizer,
}

impl Stage {
    /// The name for tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Forward => "products, forward",
            Self::BackwardInput => "products, input gradient",
            Self::BackwardWeight => "products, weight gradient",
            Self::Attention => "attention, forward",
            Self::AttentionBackward => "attention, backward",
            Self::Head => "vocabulary head",
            Self::Elementwise => "norms, elementwise",
            Self::Optimizer => "optimizer",
        }
    }
}

/// What an operation must do at least.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Work {
    /// Floating-point operations of matrix products; a multiplication with its addition counts two.
    Flops(f64),
    /// Bytes that are read or written, each operand once.
    Bytes(f64),
}

/// Time and work of a stage.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Cost {
    /// Wall-clock seconds.
    pub seconds: f64,
    /// See [`Work::Flops`].
    pub flops: f64,
    /// See [`Work::Bytes`].
    pub bytes: f64,
}

/// The costs of all stages that took place.
pub type Profile = BTreeMap<Stage, Cost>;

thread_local! {
    static CURRENT: RefCell<Option<Profile>> = const { RefCell::new(None) };
}

/// Begins a profile of what this thread does.
pub fn start() {
    CURRENT.set(Some(Profile::new()));
}

/// Ends the profile, which is empty if none was begun.
pub fn stop() -> Profile {
    CURRENT.take().unwrap_or_default()
}

/// An operation under way; its end is when this is dropped. Operations with spans do not call each other.
#[must_use]
pub(crate) struct Span(Option<(Stage, Work, Instant)>);

/// Begins an operation. `work` is only called while the thread profiles.
pub(crate) fn span(stage: Stage, work: impl FnOnce() -> Work) -> Span {
    let profiles = CURRENT.with_borrow(Option::is_some);
    Span(profiles.then(|| (stage, work(), Instant::now())))
}

impl Drop for Span {
    fn drop(&mut self) {
        let Some((stage, work, start)) = self.0 else { return };
        let seconds = start.elapsed().as_secs_f64();
        CURRENT.with_borrow_mut(|profile| {
            let Some(profile) = profile else { return };
            let cost = profile.entry(stage).or_default();
            cost.seconds += seconds;
            match work {
                Work::Flops(flops) => cost.flops += flops,
                Work::Bytes(bytes) => cost.bytes += bytes,
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_adds_up_between_start_and_stop_only() {
        drop(span(Stage::Head, || panic!("nobody asks for the work")));
        assert!(stop().is_empty());
        start();
        drop(span(Stage::Head, || Work::Flops(3.0)));
        drop(span(Stage::Head, || Work::Flops(4.0)));
        drop(span(Stage::Optimizer, || Work::Bytes(5.0)));
        let profile = stop();
        assert_eq!((profile[&Stage::Head].flops, profile[&Stage::Optimizer].bytes), (7.0, 5.0));
        assert!(profile[&Stage::Head].seconds > 0.0 && profile.len() == 2);
        drop(span(Stage::Head, || panic!("nobody asks for the work")));
        assert!(stop().is_empty());
    }
}
