//! Root-mean-square normalisation; see [`ops::rmsnorm`](crate::ops::rmsnorm).

use crate::cuda::Module;
use crate::cuda::device::{Device, Launch, Number, View, ViewMut};
use crate::error::Result;

pub(crate) static MODULE: Module = Module {
    name: "rmsnorm",
    text: include_str!("../kernels/rmsnorm.cu"),
    kernels: &[
        "rmsnorm_forward_f32",
        "rmsnorm_forward_bf16",
        "rmsnorm_recompute_f32",
        "rmsnorm_recompute_bf16",
        "rmsnorm_backward_f32",
        "rmsnorm_backward_bf16",
        "rmsnorm_gain_f32",
        "rmsnorm_gain_bf16",
        "rmsnorm_add_gain",
    ],
};

/// Rows that are summed one after the other in the gradient of the gain.
const ROWS: usize = 64;

/// Normalises each row. x, y `[n, width]`, w `[width]`; r `[n]` keeps 1/rms for the backward pass.
pub(crate) fn forward<T: Number>(
    device: &impl Device,
    x: View<'_, f32>,
    w: View<'_, f32>,
    eps: f32,
    y: ViewMut<'_, T>,
    r: ViewMut<'_, f32>,
) -> Result<()> {
    let (n, width) = (r.len(), w.len());
    assert!(x.len() == n * width && y.len() == x.len());
    let arguments = [x.into(), w.into(), eps.into(), y.into(), r.into(), (width as i32).into()];
    // SAFETY: the lengths are those of `n` rows.
    unsafe { device.launch(&MODULE, &format!("rmsnorm_forward_{}", T::NAME), Launch::blocks(n), &arguments) }
}

/// Computes y = x·r·w again from the kept r.
pub(crate) fn recompute<T: Number>(
    device: &impl Device,
    x: View<'_, f32>,
    w: View<'_, f32>,
    r: View<'_, f32>,
    y: ViewMut<'_, T>,
) -> Result<()> {
    let (n, width) = (r.len(), w.len());
    assert!(x.len() == n * width && y.len() == x.len());
    let arguments = [x.into(), w.into(), r.into(), y.into(), (width as i32).into()];
    // SAFETY: the lengths are those of `n` rows.
    unsafe { device.launch(&MODULE, &format!("rmsnorm_recompute_{}", T::NAME), Launch::blocks(n), &arguments) }
}

/// Numbers of memory that the gradient of a gain takes.
pub(crate) fn partial(rows: usize, width: usize) -> usize {
    rows.div_ceil(ROWS) * width
}

/// dx += r·(dy·w − x·r²·mean(dy·w·x)) and, unless the gain is frozen, dw += Σ dy·x·r. Beside dw comes memory for [`partial`] numbers.
pub(crate) fn backward<T: Number>(
    device: &impl Device,
    x: View<'_, f32>,
    w: View<'_, f32>,
    r: View<'_, f32>,
    dy: View<'_, T>,
    dx: ViewMut<'_, f32>,
    dw: Option<(ViewMut<'_, f32>, ViewMut<'_, f32>)>,
) -> Result<()> {
    let (n, width) = (r.len(), w.len());
    assert!(x.len() == n * width && dy.len() == x.len() && dx.len() == x.len());
    let arguments = [x.into(), w.into(), r.into(), dy.into(), dx.into(), (width as i32).into()];
    // SAFETY: the lengths are those of `n` rows.
    unsafe { device.launch(&MODULE, &format!("rmsnorm_backward_{}", T::NAME), Launch::blocks(n), &arguments)? };
    let Some((dw, mut partial)) = dw else { return Ok(()) };
    assert!(dw.len() == width && partial.len() >= self::partial(n, width));
    let parts = n.div_ceil(ROWS);
    let columns = Launch::threads(width);
    let shape = Launch { grid: [columns.grid[0], parts as u32, 1], ..columns };
    let [rows, rows_of_block, of_row] = [n, ROWS, width].map(|number| (number as i32).into());
    let arguments = [x.into(), r.into(), dy.into(), partial.again().into(), rows, rows_of_block, of_row];
    // SAFETY: as above, and `partial` has a row for each block.
    unsafe { device.launch(&MODULE, &format!("rmsnorm_gain_{}", T::NAME), shape, &arguments)? };
    let arguments = [partial.as_view().into(), dw.into(), (parts as i32).into(), of_row];
    // SAFETY: as above.
    unsafe { device.launch(&MODULE, "rmsnorm_add_gain", columns, &arguments) }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::cuda::device::Buffer;
    use crate::cuda::ops::tests::{OnHost, as_rounded, assert_close, on, rounded, zeros};
    use crate::cuda::tested::{Tested, devices};
    use crate::ops::finite_difference::random;
    use crate::ops::rmsnorm as cpu;

    fn check<T: OnHost>(device: &Tested, n: usize, width: usize) {
        let (x, w, dy) = (random(n * width, 1), random(width, 2), random(n * width, 3));
        let [on_x, on_w] = [&x, &w].map(|numbers| on(device, numbers));
        let (mut y, mut r) = (zeros::<T>(device, x.len()), zeros(device, n));
        forward(device, on_x.view(), on_w.view(), 1e-5, y.view_mut(), r.view_mut()).unwrap();
        let (mut expected_y, mut expected_r) = (vec![0.0; x.len()], vec![0.0; n]);
        cpu::forward(&x, &w, 1e-5, &mut expected_y, &mut expected_r);
        assert_close(device, &y, &expected_y);
        assert_close(device, &r, &expected_r);
        let mut again = zeros::<T>(device, x.len());
        recompute(device, on_x.view(), on_w.view(), r.view(), again.view_mut()).unwrap();
        assert!(again.to_vec(device).unwrap() == y.to_vec(device).unwrap());

        let (start, start_w) = (random(x.len(), 4), random(width, 5));
        let (mut dx, mut dw) = (on(device, &start), on(device, &start_w));
        let on_dy = on(device, &rounded::<T>(&dy));
        let run = |dx: &mut Buffer<Tested, f32>, dw: Option<&mut Buffer<Tested, f32>>| {
            let mut partial = zeros(device, partial(n, width));
            let dw = dw.map(|dw| (dw.view_mut(), partial.view_mut()));
            backward(device, on_x.view(), on_w.view(), r.view(), on_dy.view(), dx.view_mut(), dw).unwrap();
        };
        run(&mut dx, Some(&mut dw));
        let (mut expected_x, mut expected_w) = (start.clone(), start_w);
        cpu::backward(&x, &w, &expected_r, &as_rounded::<T>(&dy), &mut expected_x, Some(&mut expected_w));
        assert_close(device, &dx, &expected_x);
        assert_close(device, &dw, &expected_w);
        let mut frozen = on(device, &start);
        run(&mut frozen, None);
        assert_eq!(frozen.to_vec(device).unwrap(), dx.to_vec(device).unwrap());
    }

    #[test]
    fn as_on_the_cpu() {
        for device in devices() {
            for (n, width) in [(1, 1), (3, 21), (65, 40), (130, 577)] {
                check::<f32>(&device, n, width);
                check::<bf16>(&device, n, width);
            }
        }
    }
}
