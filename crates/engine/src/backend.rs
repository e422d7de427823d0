//! What a decoder runs on: memory, and the operations on it.
//!
//! The decoder is written once over these operations. On the CPU they are those of [`ops`](crate::ops), on GPUs those of `cuda`.

mod cpu;

use std::fmt::Debug;
use std::ops::Range;

use crate::model::Product;
use crate::ops::Number;

pub(crate) use cpu::{Cpu, Gradient, Pass, Softmax};

/// How many rows an operation writes, and for how many its memory is made, so that it need not grow with the next pass.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Room {
    pub(crate) rows: usize,
    /// At least `rows`.
    pub(crate) most: usize,
}

impl Room {
    /// For these rows and no others.
    pub(crate) fn of(rows: usize) -> Self {
        Self { rows, most: rows }
    }
}

/// A matrix product of a block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Site {
    pub(crate) block: usize,
    pub(crate) product: Product,
}

/// The derivative for the result of a product.
#[derive(Debug)]
pub(crate) enum Derivative<'a, B: Backend> {
    /// Of one that was added to the residual stream: the stream's.
    Stream(&'a B::Buffer<f32>),
    /// Of another one.
    Passed(&'a B::Buffer<B::Number>),
}

/// What a backend keeps for the backward pass of what adapts each product of a block; see [`ops::lora`](crate::ops::lora).
pub(crate) type Kept<B> = [<B as Backend>::Buffer<<B as Backend>::Sum>; Product::ALL.len()];

/// The operations. Matrices are row-major, and what an operation writes is made as large as [`Room`] says. A place of the weights is
/// that in the model's [`Layout`](crate::Layout).
///
/// The residual stream and its gradient, the factors of norms and the gradient of weights are in f32.
pub(crate) trait Backend: Debug + Sized + 'static {
    /// Why an operation may fail.
    type Error: Debug;
    /// Numbers that are passed on to products.
    type Number: Number;
    /// Numbers of what products give and is not added to the residual stream, and of the derivatives for what they take.
    type Sum: Number;
    /// Memory for numbers.
    type Buffer<N: Number>: Debug + Default;
    /// What a pass computes with: weights, and the rows of a batch.
    type Pass<'p>;
    /// Where a pass adds the gradient of what is trained.
    type Gradient<'g>;
    /// Memory of the vocabulary head.
    type Softmax: Debug + Default;

    /// Whether an adapter is trained, and the model's own weights are frozen.
    fn is_adapted(pass: &Self::Pass<'_>) -> bool;

    /// Number of rows of a pass.
    fn rows(pass: &Self::Pass<'_>) -> usize;

    /// Gives back all memory that the backend keeps for itself.
    fn release(&mut self);

    /// Copies rows of `width` numbers.
    fn copy<N: Number>(
        &mut self,
        room: Room,
        width: usize,
        from: &Self::Buffer<N>,
        to: &mut Self::Buffer<N>,
    ) -> Result<(), Self::Error>;

    /// Sets rows of `width` numbers to zero.
    fn clear(&mut self, room: Room, width: usize, x: &mut Self::Buffer<f32>) -> Result<(), Self::Error>;

    /// The rows' embeddings.
    fn embed(&mut self, room: Room, pass: &Self::Pass<'_>, x: &mut Self::Buffer<f32>) -> Result<(), Self::Error>;

    /// Adds the gradient of the embeddings, unless they are frozen.
    fn embed_backward(
        &mut self,
        pass: &Self::Pass<'_>,
        dx: &Self::Buffer<f32>,
        gradient: &mut Self::Gradient<'_>,
    ) -> Result<(), Self::Error>;

    /// y = x·r·w with the gain w at a place of the weights and r = 1/√(mean(x²) + ε), one per row.
    fn norm<N: Number>(
        &mut self,
        room: Room,
        pass: &Self::Pass<'_>,
        gain: &Range<usize>,
        x: &Self::Buffer<f32>,
        y: &mut Self::Buffer<N>,
        r: &mut Self::Buffer<f32>,
    ) -> Result<(), Self::Error>;

    /// y = x·r·w again.
    fn norm_again(
        &mut self,
        room: Room,
        pass: &Self::Pass<'_>,
        gain: &Range<usize>,
        x_and_r: [&Self::Buffer<f32>; 2],
        y: &mut Self::Buffer<Self::Number>,
    ) -> Result<(), Self::Error>;

    /// Adds the derivative for x to dx, and that for the gain to the gradient, unless it is frozen.
    #[allow(clippy::too_many_arguments, reason = "what an operation reads and writes")]
    fn norm_backward(
        &mut self,
        room: Room,
        pass: &Self::Pass<'_>,
        gain: &Range<usize>,
        x_and_r: [&Self::Buffer<f32>; 2],
        dy: &Self::Buffer<Self::Sum>,
        dx: &mut Self::Buffer<f32>,
        gradient: &mut Self::Gradient<'_>,
    ) -> Result<(), Self::Error>;

    /// y = x·Wᵀ with the adapted W of a product.
    fn project(
        &mut self,
        room: Room,
        pass: &Self::Pass<'_>,
        site: Site,
        x: &Self::Buffer<Self::Number>,
        y: &mut Self::Buffer<Self::Sum>,
        kept: &mut Kept<Self>,
    ) -> Result<(), Self::Error>;

    /// stream += x·Wᵀ with the adapted W of a product.
    fn add_product(
        &mut self,
        room: Room,
        pass: &Self::Pass<'_>,
        site: Site,
        x: &Self::Buffer<Self::Number>,
        stream: &mut Self::Buffer<f32>,
        kept: &mut Kept<Self>,
    ) -> Result<(), Self::Error>;

    /// dx = dy·W with the adapted W of a product, where anybody asks for it.
    fn input_gradient(
        &mut self,
        room: Room,
        pass: &Self::Pass<'_>,
        site: Site,
        dy: Derivative<'_, Self>,
        dx: Option<&mut Self::Buffer<Self::Sum>>,
    ) -> Result<(), Self::Error>;

    /// Adds the derivative for what is trained of a product: W, or what adapts it. The last [`input_gradient`](Self::input_gradient)
    /// was of the same product and of this dy, which has not changed since.
    #[allow(clippy::too_many_arguments, reason = "what an operation reads and writes")]
    fn weight_gradient(
        &mut self,
        room: Room,
        pass: &Self::Pass<'_>,
        site: Site,
        dy: Derivative<'_, Self>,
        x: &Self::Buffer<Self::Number>,
        kept: &Kept<Self>,
        gradient: &mut Self::Gradient<'_>,
    ) -> Result<(), Self::Error>;

    /// Takes queries, keys and values over from `sums`, and rotates queries and keys by the positions of their rows.
    fn rotate(
        &mut self,
        room: Room,
        pass: &Self::Pass<'_>,
        sums: &Self::Buffer<Self::Sum>,
        qkv: &mut Self::Buffer<Self::Number>,
    ) -> Result<(), Self::Error>;

    /// The derivative for what [`rotate`](Self::rotate) takes over.
    fn rotate_backward(
        &mut self,
        room: Room,
        pass: &Self::Pass<'_>,
        d_rotated: &Self::Buffer<Self::Sum>,
        d_qkv: &mut Self::Buffer<Self::Number>,
    ) -> Result<(), Self::Error>;

    /// Attention of every row; lse is the log-sum-exp of its scaled scores under each query head.
    fn attend(
        &mut self,
        room: Room,
        pass: &Self::Pass<'_>,
        qkv: &Self::Buffer<Self::Number>,
        out: &mut Self::Buffer<Self::Number>,
        lse: &mut Self::Buffer<f32>,
    ) -> Result<(), Self::Error>;

    /// The derivative of [`attend`](Self::attend) for rotated queries, keys and values. The pass has been made for backward passes.
    fn attend_backward(
        &mut self,
        room: Room,
        pass: &Self::Pass<'_>,
        qkv_and_out: [&Self::Buffer<Self::Number>; 2],
        lse: &Self::Buffer<f32>,
        d_out: &Self::Buffer<Self::Sum>,
        d_rotated: &mut Self::Buffer<Self::Sum>,
    ) -> Result<(), Self::Error>;

    /// Takes gate and up over from `sums`, and writes their activation y. What is in `sums` afterwards is arbitrary.
    fn activate(
        &mut self,
        room: Room,
        sums: &mut Self::Buffer<Self::Sum>,
        gate_up: &mut Self::Buffer<Self::Number>,
        y: &mut Self::Buffer<Self::Number>,
    ) -> Result<(), Self::Error>;

    /// Replaces gate and up by the derivatives for them, and writes their activation y again.
    fn activate_backward(
        &mut self,
        room: Room,
        gate_up: &mut Self::Buffer<Self::Number>,
        dy: &Self::Buffer<Self::Sum>,
        y: &mut Self::Buffer<Self::Number>,
    ) -> Result<(), Self::Error>;

    /// The rows of x that predict the scored tokens.
    fn gather_scored(
        &mut self,
        room: Room,
        pass: &Self::Pass<'_>,
        x: &Self::Buffer<f32>,
        scored: &mut Self::Buffer<f32>,
    ) -> Result<(), Self::Error>;

    /// Adds to the rows of x that predict the scored tokens, in their order.
    fn scatter_scored(
        &mut self,
        pass: &Self::Pass<'_>,
        scored: &Self::Buffer<f32>,
        x: &mut Self::Buffer<f32>,
    ) -> Result<(), Self::Error>;

    /// The log-probability of every scored token, or the score of every scored row, from normalised rows. Keeps them, and the
    /// softmax of the first `kept` rows.
    fn head(
        &mut self,
        pass: &Self::Pass<'_>,
        normed: &Self::Buffer<Self::Sum>,
        kept: Room,
        softmax: &mut Self::Softmax,
    ) -> Result<(), Self::Error>;

    /// The derivative for the normalised rows, and that for the head, unless it is frozen, which is added to the gradient. The
    /// softmax is as [`head`](Self::head) has left it, if it `is_kept`; else this does what that does too.
    #[allow(clippy::too_many_arguments, reason = "what an operation reads and writes")]
    fn head_backward(
        &mut self,
        room: Room,
        pass: &Self::Pass<'_>,
        normed: &Self::Buffer<Self::Sum>,
        d_logps: &[f32],
        is_kept: bool,
        softmax: &mut Self::Softmax,
        d_normed: &mut Self::Buffer<Self::Sum>,
        gradient: &mut Self::Gradient<'_>,
    ) -> Result<(), Self::Error>;

    /// What [`head`](Self::head) has kept of every scored row; waits for it.
    fn logps(&self, pass: &Self::Pass<'_>, softmax: &Self::Softmax) -> Result<Vec<f32>, Self::Error>;
}
