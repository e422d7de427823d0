//! Inverted dropout; see [`ops::dropout`](crate::ops::dropout), whose masks these are.

use crate::cuda::Module;
use crate::cuda::device::{Argument, Device, Launch, Number, View, ViewMut};
use crate::error::Result;
use crate::ops::dropout;

pub(crate) static MODULE: Module = Module {
    name: "dropout",
    text: include_str!("../kernels/dropout.cu"),
    kernels: &["dropout_forward_f32", "dropout_forward_bf16", "dropout_backward_f32", "dropout_backward_bf16"],
};

/// The dropout of one matrix.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dropout<'a> {
    /// The probability that an element is dropped, in [0, 1).
    pub(crate) rate: f64,
    /// Differs from pass to pass and from matrix to matrix.
    pub(crate) seed: u64,
    /// One key per row.
    pub(crate) row_keys: View<'a, u64>,
}

impl Dropout<'_> {
    /// y = x·mask/(1 − rate). x, y `[rows, width]`.
    pub(crate) fn forward<T: Number>(&self, device: &impl Device, x: View<'_, T>, y: ViewMut<'_, T>) -> Result<()> {
        assert_eq!(x.len(), y.len());
        let len = x.len();
        // SAFETY: both have `len` numbers.
        unsafe { self.launch(device, &format!("dropout_forward_{}", T::NAME), x.into(), y.into(), len) }
    }

    /// dx += dy·mask/(1 − rate). dy, dx `[rows, width]`.
    pub(crate) fn backward<T: Number>(&self, device: &impl Device, dy: View<'_, T>, dx: ViewMut<'_, T>) -> Result<()> {
        assert_eq!(dy.len(), dx.len());
        let len = dy.len();
        // SAFETY: both have `len` numbers.
        unsafe { self.launch(device, &format!("dropout_backward_{}", T::NAME), dy.into(), dx.into(), len) }
    }

    /// # Safety
    /// The kernel is one of this module, and `from` and `to` are views of `len` numbers of its types.
    unsafe fn launch(
        &self,
        device: &impl Device,
        kernel: &str,
        from: Argument<'_>,
        to: Argument<'_>,
        len: usize,
    ) -> Result<()> {
        let width = len / self.row_keys.len().max(1);
        assert_eq!(len, width * self.row_keys.len());
        let arguments = [
            from,
            self.row_keys.into(),
            to,
            self.seed.into(),
            dropout::threshold(self.rate).into(),
            dropout::scale(self.rate).into(),
            (width as i32).into(),
        ];
        // SAFETY: there is a key for every row; the rest is the caller's promise.
        unsafe { device.launch(&MODULE, kernel, Launch::elements(self.row_keys.len(), width), &arguments) }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::cuda::ops::tests::{OnHost, as_rounded, assert_close, on, rounded, zeros};
    use crate::cuda::tested::{Tested, devices};
    use crate::ops::finite_difference::random;

    #[test]
    fn masks_are_those_of_the_cpu() {
        fn check<T: OnHost>(device: &Tested) {
            let (keys, width) = ([7, 0, u64::MAX, 1 << 40], 301);
            let on_keys = on(device, &keys);
            let on_device = Dropout { rate: 0.3, seed: 1 << 63 | 5, row_keys: on_keys.view() };
            let cpu = dropout::Dropout { rate: 0.3, seed: 1 << 63 | 5, row_keys: &keys };
            let (x, start) = (random(keys.len() * width, 1), random(keys.len() * width, 2));
            let (on_x, mut y) = (on(device, &rounded::<T>(&x)), zeros::<T>(device, x.len()));
            let (mut dx, mut expected) = (on(device, &rounded::<T>(&start)), vec![0.0; x.len()]);
            on_device.forward(device, on_x.view(), y.view_mut()).unwrap();
            on_device.backward(device, on_x.view(), dx.view_mut()).unwrap();
            cpu.forward(&as_rounded::<T>(&x), &mut expected);
            assert_close(device, &y, &expected);
            let dropped = |y: &[T]| y.iter().map(|y| y.to_f32() == 0.0).collect::<Vec<_>>();
            assert!(dropped(&y.to_vec(device).unwrap()).iter().zip(&expected).all(|(&d, &e)| d == (e == 0.0)));
            let mut expected = as_rounded::<T>(&start);
            cpu.backward(&as_rounded::<T>(&x), &mut expected);
            assert_eq!(dx.to_vec(device).unwrap(), rounded::<T>(&expected));
        }
        for device in devices() {
            check::<f32>(&device);
            check::<bf16>(&device);
        }
    }
}
