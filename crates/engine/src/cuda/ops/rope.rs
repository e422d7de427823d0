//! Rotary position embedding; see [`ops::rope`](crate::ops::rope).

use crate::cuda::Module;
use crate::cuda::device::{Buffer, Device, IndexView, Launch, Number, View, ViewMut};
use crate::error::Result;
use crate::ops::rope::RopeTable;

pub(crate) static MODULE: Module =
    Module { name: "rope", text: include_str!("../kernels/rope.cu"), kernels: &["rope_f32", "rope_bf16"] };

/// Cosines and sines of every position and frequency of a model, on a device.
#[derive(Debug)]
pub(crate) struct Rope<D: Device> {
    head_dim: usize,
    table: Buffer<D, f32>,
}

impl<D: Device> Rope<D> {
    /// Copies a table to a device.
    ///
    /// # Errors
    /// Those of [`Buffer::of`].
    pub(crate) fn new(device: &D, table: &RopeTable) -> Result<Self> {
        Ok(Self { head_dim: table.head_dim(), table: Buffer::of(device, table.values())? })
    }

    /// y = x with the first `heads` heads of each row rotated by its position. x, y `[n, stride]`, positions `[n]`.
    ///
    /// # Panics
    /// If a position is not in the table.
    pub(crate) fn forward<T: Number>(
        &self,
        device: &D,
        x: View<'_, T>,
        y: ViewMut<'_, T>,
        stride: usize,
        heads: usize,
        positions: IndexView<'_>,
    ) -> Result<()> {
        self.rotate(device, x, y, [stride, heads], positions, 1.0)
    }

    /// Turns the gradient dy with respect to the rotated rows into dx, that with respect to the plain ones.
    pub(crate) fn backward<T: Number>(
        &self,
        device: &D,
        dy: View<'_, T>,
        dx: ViewMut<'_, T>,
        stride: usize,
        heads: usize,
        positions: IndexView<'_>,
    ) -> Result<()> {
        self.rotate(device, dy, dx, [stride, heads], positions, -1.0)
    }

    fn rotate<T: Number>(
        &self,
        device: &D,
        x: View<'_, T>,
        y: ViewMut<'_, T>,
        [stride, heads]: [usize; 2],
        positions: IndexView<'_>,
        sign: f32,
    ) -> Result<()> {
        let (rows, dim) = (positions.len(), self.head_dim);
        assert!(x.len() == rows * stride && y.len() == x.len() && heads * dim <= stride);
        assert!(positions.bound() * dim <= self.table.view().len());
        let shape = Launch::elements(rows, heads * (dim / 2) + stride - heads * dim);
        let table = self.table.view().into();
        let [stride, heads, dim] = [stride, heads, dim].map(|number| (number as i32).into());
        let arguments = [x.into(), y.into(), table, positions.into(), stride, heads, dim, sign.into()];
        // SAFETY: the heads are in the rows, and the positions in the table.
        unsafe { device.launch(&MODULE, &format!("rope_{}", T::NAME), shape, &arguments) }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::config::ModelConfig;
    use crate::cuda::device::Indices;
    use crate::cuda::ops::tests::{OnHost, as_rounded, assert_close, on, rounded, zeros};
    use crate::cuda::tested::{Tested, devices};
    use crate::model::tests::tiny_config;
    use crate::ops::finite_difference::random;

    #[test]
    fn as_on_the_cpu() {
        fn check<T: OnHost>(device: &Tested) {
            let cpu = RopeTable::new(&ModelConfig { head_dim: 6, ..tiny_config() }, 200);
            let rope = Rope::new(device, &cpu).unwrap();
            let positions: Vec<u32> = (0..31).map(|i| i * i * 7 % 200).collect();
            let (stride, heads, on_positions) = (6 * 5 + 1, 3, Indices::new(device, &positions).unwrap());
            let start = random(positions.len() * stride, 1);
            let (from, [mut x, mut dx]) =
                (on(device, &rounded::<T>(&start)), [(); 2].map(|()| zeros(device, start.len())));
            rope.forward::<T>(device, from.view(), x.view_mut(), stride, heads, on_positions.view()).unwrap();
            rope.backward::<T>(device, from.view(), dx.view_mut(), stride, heads, on_positions.view()).unwrap();
            let start = as_rounded::<T>(&start);
            let [mut expected_x, mut expected_dx] = [(); 2].map(|()| vec![0.0; start.len()]);
            cpu.forward(&start, &mut expected_x, stride, heads, &positions);
            cpu.backward(&start, &mut expected_dx, stride, heads, &positions);
            assert_close(device, &x, &expected_x);
            assert_close(device, &dx, &expected_dx);
        }
        for device in devices() {
            check::<f32>(&device);
            check::<bf16>(&device);
        }
    }
}
