//! Matrices that are prepared once for many products y = x·Wᵀ of few rows, as generation makes them: what limits those is
//! how fast W can be read.

use half::bf16;
use rayon::prelude::*;

use super::int8::Int8;
use super::{View, ViewMut, bf16 as rounded, write_columns};
use crate::ops::Number;
use crate::ops::simd::{dispatch, dot};

/// Rows of W that a task takes.
const TOGETHER: usize = 32;

/// A matrix W `[outputs, inputs]` in fewer bits.
///
/// The bits of a row of a product do not depend on how many others there are.
#[derive(Debug)]
pub(crate) struct Packed {
    inputs: usize,
    outputs: usize,
    form: Form,
}

#[derive(Debug)]
enum Form {
    /// In the order in which the kernel of AVX512-BF16 reads them.
    #[cfg(target_arch = "x86_64")]
    Panels(Vec<u32>),
    /// Row by row.
    Rows(Vec<bf16>),
    Int8(Int8),
}

impl Packed {
    /// W rounded to bf16; products are those of [`Precision::Bf16`](crate::Precision::Bf16), where the processor has bf16 to
    /// the last bit.
    pub(crate) fn bf16(w: &[f32], inputs: usize) -> Self {
        let outputs = View::rows(w, inputs).shape[0];
        #[cfg(target_arch = "x86_64")]
        if rounded::is_native() {
            return Self { inputs, outputs, form: Form::Panels(rounded::panels(View::rows(w, inputs))) };
        }
        Self::rows(w, inputs, outputs)
    }

    fn rows(w: &[f32], inputs: usize, outputs: usize) -> Self {
        Self { inputs, outputs, form: Form::Rows(w.par_iter().map(|w| bf16::from_f32(*w)).collect()) }
    }

    /// W in 8 bits, as in GGUF's Q8_0.
    pub(crate) fn int8(w: &[f32], inputs: usize) -> Self {
        Self { inputs, outputs: View::rows(w, inputs).shape[0], form: Form::Int8(Int8::new(w, inputs)) }
    }

    /// y = x·Wᵀ, or y += x·Wᵀ with `add`. x `[n, inputs]`, y `[n, outputs]`.
    pub(crate) fn forward<T: Number>(&self, x: &[T], y: &mut [f32], add: bool) {
        let n = View::rows(x, self.inputs).shape[0];
        assert_eq!(y.len(), n * self.outputs, "the output does not have the shape of the product");
        match &self.form {
            #[cfg(target_arch = "x86_64")]
            Form::Panels(panels) => {
                rounded::product_of_panels(View::rows(x, self.inputs), panels, ViewMut::rows(y, self.outputs), add);
            }
            Form::Rows(w) => self.forward_rows(w, &T::widened(x), y, add),
            Form::Int8(w) => w.forward(&T::widened(x), y, add),
        }
    }

    /// Bytes that a product reads of W.
    pub(crate) fn bytes(&self) -> usize {
        match &self.form {
            #[cfg(target_arch = "x86_64")]
            Form::Panels(panels) => size_of_val(panels.as_slice()),
            Form::Rows(w) => size_of_val(w.as_slice()),
            Form::Int8(w) => w.bytes(),
        }
    }

    /// [`forward`](Self::forward) where the processor does not know bf16.
    fn forward_rows(&self, w: &[bf16], x: &[f32], y: &mut [f32], add: bool) {
        let mut x = x.to_vec();
        rounded::round(&mut x);
        let (inputs, n) = (self.inputs, x.len() / self.inputs);
        let mut columns = vec![0.0; y.len()];
        columns.par_chunks_mut(TOGETHER * n.max(1)).zip(w.par_chunks(TOGETHER * inputs)).for_each(|(columns, w)| {
            let mut wide = vec![0.0; inputs];
            dispatch(
                #[inline(always)]
                || {
                    for (column, w) in columns.chunks_exact_mut(n).zip(w.chunks_exact(inputs)) {
                        wide.iter_mut().zip(w).for_each(|(wide, w)| *wide = w.to_f32());
                        for (y, x) in column.iter_mut().zip(x.chunks_exact(inputs)) {
                            *y = dot(x, &wide);
                        }
                    }
                },
            );
        });
        write_columns(&columns, y, self.outputs, add);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::finite_difference::random;
    use crate::ops::linear::forward;
    use crate::precision::Precision;

    #[test]
    fn products_are_those_of_the_matrix_to_its_rounding() {
        for (inputs, outputs) in [(576, 960), (40, 33), (33, 1), (1100, 70), (1536, 200)] {
            let (x, w, start) = (random(17 * inputs, 1), random(outputs * inputs, 2), random(17 * outputs, 3));
            for add in [false, true] {
                let mut expected = start.clone();
                forward(Precision::F32, &x, &w, &mut expected, inputs, add);
                let largest = expected.iter().fold(0f32, |m, y| m.max(y.abs()));
                for packed in [Packed::bf16(&w, inputs), Packed::rows(&w, inputs, outputs), Packed::int8(&w, inputs)] {
                    let run = |rows: std::ops::Range<usize>| {
                        let mut y = start[rows.start * outputs..rows.end * outputs].to_vec();
                        packed.forward(&x[rows.start * inputs..rows.end * inputs], &mut y, add);
                        y
                    };
                    let all = run(0..17);
                    assert!(all.iter().zip(&expected).all(|(y, e)| (y - e).abs() < 0.02 * largest));
                    for rows in [0..1, 3..16, 16..17] {
                        assert!(run(rows.clone()) == all[rows.start * outputs..rows.end * outputs]);
                    }
                }
                let mut rounded = start.clone();
                forward(Precision::Bf16, &x, &w, &mut rounded, inputs, add);
                let mut y = start.clone();
                Packed::bf16(&w, inputs).forward(&x, &mut y, add);
                let close = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-5 * largest;
                assert!(if rounded::is_native() { y == rounded } else { y.iter().zip(&rounded).all(close) });
            }
        }
    }
}
