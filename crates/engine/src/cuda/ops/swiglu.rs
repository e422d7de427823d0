//! The gated feed-forward activation; see [`ops::swiglu`](crate::ops::swiglu).

use crate::cuda::Module;
use crate::cuda::device::{Device, Launch, Number, View, ViewMut};
use crate::error::Result;

pub(crate) static MODULE: Module = Module {
    name: "swiglu",
    text: include_str!("../kernels/swiglu.cu"),
    kernels: &["swiglu_forward_f32", "swiglu_forward_bf16", "swiglu_backward_f32", "swiglu_backward_bf16"],
};

/// gate_up `[n, 2·width]` holds gate then up in each row; y `[n, width]`.
pub(crate) fn forward<T: Number>(
    device: &impl Device,
    gate_up: View<'_, T>,
    y: ViewMut<'_, T>,
    width: usize,
) -> Result<()> {
    let count = y.len();
    assert!(gate_up.len() == 2 * count && count.is_multiple_of(width));
    let arguments = [gate_up.into(), y.into(), (width as i32).into()];
    // SAFETY: the lengths are those of as many rows.
    unsafe {
        device.launch(
            &MODULE,
            &format!("swiglu_forward_{}", T::NAME),
            Launch::elements(count / width, width),
            &arguments,
        )
    }
}

/// Replaces gate_up by its gradient for dy, and writes the activation y itself, which the gradient of the next weight needs.
pub(crate) fn backward<T: Number>(
    device: &impl Device,
    gate_up: ViewMut<'_, T>,
    dy: View<'_, T>,
    y: ViewMut<'_, T>,
    width: usize,
) -> Result<()> {
    let count = dy.len();
    assert!(gate_up.len() == 2 * count && y.len() == count && count.is_multiple_of(width));
    let arguments = [gate_up.into(), dy.into(), y.into(), (width as i32).into()];
    let launch = Launch::elements(count / width, width);
    // SAFETY: the lengths are those of as many rows.
    unsafe { device.launch(&MODULE, &format!("swiglu_backward_{}", T::NAME), launch, &arguments) }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::cuda::ops::tests::{OnHost, as_rounded, assert_close, on, rounded, zeros};
    use crate::cuda::tested::{Tested, devices};
    use crate::ops::finite_difference::random;
    use crate::ops::swiglu as cpu;

    #[test]
    fn as_on_the_cpu() {
        fn check<T: OnHost>(device: &Tested, n: usize, width: usize) {
            let gate_up: Vec<f32> = random(n * 2 * width, 1).iter().map(|x| 12.0 * x).collect();
            let dy = random(n * width, 2);
            let mut on_gate_up = on(device, &rounded::<T>(&gate_up));
            let [mut y, mut again] = [(); 2].map(|()| zeros::<T>(device, dy.len()));
            forward(device, on_gate_up.view(), y.view_mut(), width).unwrap();
            let on_dy = on(device, &rounded::<T>(&dy));
            backward(device, on_gate_up.view_mut(), on_dy.view(), again.view_mut(), width).unwrap();
            let [mut expected, mut expected_y, mut expected_again] =
                [gate_up.len(), dy.len(), dy.len()].map(|n| vec![0.0; n]);
            cpu::forward(&mut as_rounded::<T>(&gate_up), &mut expected, &mut expected_y, width);
            cpu::backward(&mut expected, &as_rounded::<T>(&dy), &mut expected_again, width);
            assert_close(device, &y, &expected_y);
            assert_close(device, &on_gate_up, &expected);
            assert_close(device, &again, &expected_again);
        }
        for device in devices() {
            for (n, width) in [(1, 1), (35, 17), (3, 256)] {
                check::<f32>(&device, n, width);
                check::<bf16>(&device, n, width);
            }
        }
    }
}
