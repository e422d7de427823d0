//! The types of numbers that operations pass on to each other.

use std::borrow::Cow;
use std::fmt::Debug;

use bytemuck::Pod;
use half::bf16;
use half::vec::HalfBitsVecExt;
use rayon::prelude::*;

use super::simd::{dispatch, of_bf16, to_bf16};
use crate::precision::Precision;

/// Numbers that a task converts.
const CHUNK: usize = 1 << 14;

/// [`f32`] or [`bf16`].
pub(crate) trait Number: Pod + Debug + Send + Sync {
    /// What the names of its kernels on GPUs end with.
    const NAME: &'static str;

    /// Whether it is a [`bf16`].
    const IS_ROUNDED: bool;

    /// The precision in which products of such numbers are computed.
    const PRECISION: Precision = if Self::IS_ROUNDED { Precision::Bf16 } else { Precision::F32 };

    /// The nearest to a number.
    fn of_f32(x: f32) -> Self;

    /// The number in f32.
    fn to_f32(self) -> f32;

    /// All numbers in f32.
    fn widened(numbers: &[Self]) -> Cow<'_, [f32]>;

    /// Many of arbitrary value, in memory that nobody has written to.
    fn unwritten(len: usize) -> Vec<Self>;

    /// Exchanges the memory of numbers in f32 and of such, if they are of one type; says whether they are.
    fn exchange(wide: &mut Vec<f32>, numbers: &mut Vec<Self>) -> bool;
}

impl Number for f32 {
    const NAME: &'static str = "f32";
    const IS_ROUNDED: bool = false;

    #[inline(always)]
    fn of_f32(x: f32) -> Self {
        x
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    fn widened(numbers: &[Self]) -> Cow<'_, [f32]> {
        numbers.into()
    }

    fn unwritten(len: usize) -> Vec<Self> {
        vec![0.0; len]
    }

    fn exchange(wide: &mut Vec<f32>, numbers: &mut Vec<Self>) -> bool {
        std::mem::swap(wide, numbers);
        true
    }
}

impl Number for bf16 {
    const NAME: &'static str = "bf16";
    const IS_ROUNDED: bool = true;

    #[inline(always)]
    fn of_f32(x: f32) -> Self {
        to_bf16(x)
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        of_bf16(self)
    }

    fn widened(numbers: &[Self]) -> Cow<'_, [f32]> {
        // few numbers, as generation has them, are not worth a second thread
        numbers.par_iter().with_min_len(CHUNK).map(|&x| of_bf16(x)).collect::<Vec<_>>().into()
    }

    fn unwritten(len: usize) -> Vec<Self> {
        vec![0u16; len].reinterpret_into()
    }

    fn exchange(_: &mut Vec<f32>, _: &mut Vec<Self>) -> bool {
        false
    }
}

/// Rounds numbers on all threads.
pub(crate) fn round<T: Number>(from: &[f32], to: &mut [T]) {
    assert_eq!(from.len(), to.len());
    to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK)).for_each(|(to, from)| {
        dispatch(
            #[inline(always)]
            || to.iter_mut().zip(from).for_each(|(to, from)| *to = T::of_f32(*from)),
        );
    });
}

/// Copies numbers on all threads.
pub(crate) fn copy<T: Number>(from: &[T], to: &mut [T]) {
    assert_eq!(from.len(), to.len());
    to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK)).for_each(|(to, from)| to.copy_from_slice(from));
}
