//! The operations, one file each beside the kernels of the same name. They check the shapes of what they are given, as the
//! kernels do not. Matrices are row-major; T is f32 or bf16.
#![allow(unsafe_code)]

pub(super) mod attention;
pub(super) mod cached;
pub(super) mod dropout;
pub(super) mod elementwise;
pub(super) mod linear;
pub(super) mod logprob;
pub(super) mod optimizer;
pub(super) mod rmsnorm;
pub(super) mod rope;
pub(super) mod rows;
pub(super) mod sampling;
pub(super) mod swiglu;

#[cfg(test)]
mod tests {
    use bytemuck::Pod;
    use half::bf16;

    use crate::cuda::device::{Buffer, Number};
    use crate::cuda::tested::Tested;

    /// Numbers of a type of activations on the host.
    pub(super) trait OnHost: Number + PartialEq {
        /// How far apart two are at most that are the same but for the order of sums, and this type's rounding.
        fn tolerance(x: f32, largest: f32) -> f32;
    }

    impl OnHost for f32 {
        fn tolerance(_: f32, largest: f32) -> f32 {
            1e-5 * largest
        }
    }

    impl OnHost for bf16 {
        fn tolerance(x: f32, largest: f32) -> f32 {
            x.abs() / 256.0 + 1e-5 * largest
        }
    }

    pub(super) fn rounded<T: OnHost>(numbers: &[f32]) -> Vec<T> {
        numbers.iter().map(|&x| T::of_f32(x)).collect()
    }

    pub(super) fn to_f32<T: OnHost>(numbers: &[T]) -> Vec<f32> {
        numbers.iter().map(|x| x.to_f32()).collect()
    }

    /// What rounding to T leaves of numbers.
    pub(super) fn as_rounded<T: OnHost>(numbers: &[f32]) -> Vec<f32> {
        to_f32(&rounded::<T>(numbers))
    }

    pub(super) fn on<T: Pod>(device: &Tested, numbers: &[T]) -> Buffer<Tested, T> {
        Buffer::of(device, numbers).unwrap()
    }

    pub(super) fn zeros<T: Pod>(device: &Tested, len: usize) -> Buffer<Tested, T> {
        Buffer::zeros(device, len).unwrap()
    }

    /// Asserts that numbers of a device are those of the host but for the order of sums, and rounding to T.
    pub(super) fn assert_close<T: OnHost>(device: &Tested, actual: &Buffer<Tested, T>, expected: &[f32]) {
        let actual = actual.to_vec(device).unwrap();
        assert_eq!(actual.len(), expected.len());
        let largest = expected.iter().fold(0f32, |m, e| m.max(e.abs()));
        assert!(largest > 0.0, "zeros prove nothing");
        for (i, (a, &e)) in actual.iter().zip(expected).enumerate() {
            let a = a.to_f32();
            assert!((a - e).abs() <= T::tolerance(e, largest), "element {i} is {a} and not {e}");
        }
    }
}
