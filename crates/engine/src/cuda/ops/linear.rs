//! Products of matrices, with sums in f32; see [`ops::linear`](crate::ops::linear).

use crate::cuda::device::{Device, Number, Operand, Product, View, ViewMut};
use crate::error::Result;

/// A matrix: whole rows of memory, some of their columns, or the transpose of either.
#[derive(Debug)]
pub(crate) struct Matrix<'a, T> {
    view: View<'a, T>,
    shape: [usize; 2],
    stride: usize,
    transposed: bool,
}

impl<T> Clone for Matrix<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Matrix<'_, T> {}

impl<'a, T: Number> Matrix<'a, T> {
    /// All of `view`, in rows of `width`.
    pub(crate) fn rows(view: View<'a, T>, width: usize) -> Self {
        Self { view, shape: [rows(view.len(), width), width], stride: width, transposed: false }
    }

    /// Some of the columns.
    pub(crate) fn columns(self, range: std::ops::Range<usize>) -> Self {
        let Self { view, shape: [rows, columns], stride, transposed } = self;
        assert!(!transposed && range.start <= range.end && range.end <= columns, "columns {range:?} of {columns}");
        let view = view.range(range.start.min(view.len())..view.len());
        Self { view, shape: [rows, range.len()], stride, transposed }
    }

    /// The transposed matrix, in the same memory.
    pub(crate) fn transposed(self) -> Self {
        let [rows, columns] = self.shape;
        Self { shape: [columns, rows], transposed: !self.transposed, ..self }
    }

    fn operand(self) -> Operand {
        let Self { view, stride, transposed, .. } = self;
        Operand { address: view.address(), rounded: T::IS_ROUNDED, stride, transposed }
    }
}

/// A matrix to write to: whole rows of memory, or some of their columns.
#[derive(Debug)]
pub(crate) struct MatrixMut<'a, T> {
    view: ViewMut<'a, T>,
    shape: [usize; 2],
    stride: usize,
}

impl<'a, T: Number> MatrixMut<'a, T> {
    /// All of `view`, in rows of `width`.
    pub(crate) fn rows(view: ViewMut<'a, T>, width: usize) -> Self {
        let shape = [rows(view.len(), width), width];
        Self { view, shape, stride: width }
    }

    /// Some of the columns.
    pub(crate) fn columns(self, range: std::ops::Range<usize>) -> Self {
        let Self { view, shape: [rows, columns], stride } = self;
        assert!(range.start <= range.end && range.end <= columns, "columns {range:?} of {columns}");
        let len = view.len();
        Self { view: view.range(range.start.min(len)..len), shape: [rows, range.len()], stride }
    }
}

/// How many rows of `width` there are in `len` numbers.
fn rows(len: usize, width: usize) -> usize {
    assert_eq!(len % width, 0, "{len} numbers have no rows of {width}");
    len / width
}

/// out = a·b·scale, or out += a·b·scale with `add`.
///
/// # Panics
/// If the shapes do not fit each other.
///
/// # Errors
/// Those of [`Device::multiply`].
pub(crate) fn product<T: Number, O: Number>(
    device: &impl Device,
    a: Matrix<'_, T>,
    b: Matrix<'_, T>,
    out: MatrixMut<'_, O>,
    scale: f32,
    add: bool,
) -> Result<()> {
    let ([m, k], n) = (a.shape, b.shape[1]);
    assert!(b.shape[0] == k && out.shape == [m, n], "the matrices do not fit each other");
    assert!(k > 0, "a product without summands");
    if m == 0 || n == 0 {
        return Ok(());
    }
    let out = Operand { address: out.view.address(), rounded: O::IS_ROUNDED, stride: out.stride, transposed: false };
    let product = Product { shape: [m, n, k], a: a.operand(), b: b.operand(), out, add };
    // SAFETY: every element of a matrix is within its view, and what is borrowed to write is borrowed by nobody else.
    unsafe { device.multiply(&product, scale) }
}

/// y = x·Wᵀ, or y += x·Wᵀ with `add`. x `[n, inputs]`, w `[outputs, inputs]`, y `[n, outputs]`.
pub(crate) fn forward<T: Number, O: Number>(
    device: &impl Device,
    x: View<'_, T>,
    w: View<'_, T>,
    y: ViewMut<'_, O>,
    inputs: usize,
    add: bool,
) -> Result<()> {
    let w = Matrix::rows(w, inputs);
    product(device, Matrix::rows(x, inputs), w.transposed(), MatrixMut::rows(y, w.shape[0]), 1.0, add)
}

/// dx = dy·W. dy `[n, outputs]`, w `[outputs, inputs]`, dx `[n, inputs]`.
pub(crate) fn backward_input<T: Number, O: Number>(
    device: &impl Device,
    dy: View<'_, T>,
    w: View<'_, T>,
    dx: ViewMut<'_, O>,
    inputs: usize,
) -> Result<()> {
    let w = Matrix::rows(w, inputs);
    product(device, Matrix::rows(dy, w.shape[0]), w, MatrixMut::rows(dx, inputs), 1.0, false)
}

/// dW += dyᵀ·x. dy `[n, outputs]`, x `[n, inputs]`, dw `[outputs, inputs]`.
pub(crate) fn backward_weight<T: Number>(
    device: &impl Device,
    dy: View<'_, T>,
    x: View<'_, T>,
    dw: ViewMut<'_, f32>,
    inputs: usize,
) -> Result<()> {
    let outputs = rows(dw.len(), inputs);
    let (dy, x) = (Matrix::rows(dy, outputs), Matrix::rows(x, inputs));
    product(device, dy.transposed(), x, MatrixMut::rows(dw, inputs), 1.0, true)
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::cuda::device::Buffer;
    use crate::cuda::ops::tests::{OnHost, as_rounded, assert_close, on, rounded};
    use crate::cuda::tested::{Tested, devices};
    use crate::ops::finite_difference::random;
    use crate::ops::linear as cpu;
    use crate::precision::Precision::F32;

    fn check<T: OnHost>(device: &Tested) {
        let (n, inputs, outputs) = (5, 7, 3);
        let [x, w, dy] =
            [(n * inputs, 1), (outputs * inputs, 2), (n * outputs, 3)].map(|(len, seed)| random(len, seed));
        let [on_x, on_w, on_dy] = [&x, &w, &dy].map(|numbers| on(device, &rounded::<T>(numbers)));
        let [x, w, dy] = [&x, &w, &dy].map(|numbers| as_rounded::<T>(numbers));
        for add in [false, true] {
            let mut expected = random(n * outputs, 4);
            let mut y = on(device, &expected);
            cpu::forward(F32, &x, &w, &mut expected, inputs, add);
            forward(device, on_x.view(), on_w.view(), y.view_mut(), inputs, add).unwrap();
            assert_close(device, &y, &expected);
        }
        let mut expected = vec![0.0; n * inputs];
        let mut dx: Buffer<_, T> = Buffer::zeros(device, n * inputs).unwrap();
        cpu::backward_input(F32, &dy, &w, &mut expected, inputs);
        backward_input(device, on_dy.view(), on_w.view(), dx.view_mut(), inputs).unwrap();
        assert_close(device, &dx, &expected);
        let mut expected = random(outputs * inputs, 5);
        let mut dw = on(device, &expected);
        cpu::backward_weight(F32, &dy, &x, &mut expected, inputs);
        backward_weight(device, on_dy.view(), on_x.view(), dw.view_mut(), inputs).unwrap();
        assert_close(device, &dw, &expected);

        // some columns of both, and of the result
        let (a, b) =
            (Matrix::rows(on_x.view(), inputs).columns(2..5), Matrix::rows(on_dy.view(), outputs).columns(1..3));
        let mut out = on(device, &[0.5f32; 5 * 4]);
        let to = MatrixMut::rows(out.view_mut(), 4).columns(1..3);
        product(device, b.transposed(), a, MatrixMut { shape: [2, 3], ..to }, 2.0, false).unwrap();
        let got = out.to_vec(device).unwrap();
        for (row, column) in (0..2).flat_map(|row| (0..3).map(move |column| (row, column))) {
            let sum: f32 = (0..n).map(|i| dy[i * outputs + 1 + row] * x[i * inputs + 2 + column]).sum();
            assert!((got[row * 4 + 1 + column] - 2.0 * sum).abs() < 1e-5);
        }
        assert!(got[0] == 0.5 && got[4] == 0.5 && got[8..].iter().all(|&x| x == 0.5));
    }

    #[test]
    fn products_are_those_of_the_cpu() {
        for device in devices() {
            check::<f32>(&device);
            check::<bf16>(&device);
        }
    }
}
