//! Rows of a table by their numbers: the token embedding, and the rows that go to the head.

use crate::cuda::Module;
use crate::cuda::device::{Buffer, Device, Indices, Launch, Number, View, ViewMut};
use crate::error::Result;

pub(crate) static MODULE: Module = Module {
    name: "rows",
    text: include_str!("../kernels/rows.cu"),
    kernels: &["gather_f32", "gather_bf16", "scatter_add"],
};

/// Numbers of rows of a table, on the device.
#[derive(Debug)]
pub(crate) struct RowNumbers<D: Device> {
    numbers: Indices<D>,
    /// The places in `numbers`, those of equal numbers together and in their order.
    order: Buffer<D, u32>,
    /// Where in `order` the places of a number start; the end besides.
    starts: Buffer<D, u32>,
    /// The number that they have in common.
    distinct: Buffer<D, u32>,
}

impl<D: Device> RowNumbers<D> {
    /// Copies them to a device.
    ///
    /// # Errors
    /// Those of [`Buffer::of`].
    pub(crate) fn new(device: &D, numbers: &[u32]) -> Result<Self> {
        let mut order: Vec<u32> = (0..numbers.len() as u32).collect();
        // a stable sort
        order.sort_by_key(|&place| numbers[place as usize]);
        let number = |place: u32| numbers[place as usize];
        let groups: Vec<&[u32]> = order.chunk_by(|&a, &b| number(a) == number(b)).collect();
        let starts: Vec<u32> = std::iter::once(0)
            .chain(groups.iter().scan(0, |end, group| {
                *end += group.len() as u32;
                Some(*end)
            }))
            .collect();
        let distinct: Vec<u32> = groups.iter().map(|group| number(group[0])).collect();
        Ok(Self {
            numbers: Indices::new(device, numbers)?,
            order: Buffer::of(device, &order)?,
            starts: Buffer::of(device, &starts)?,
            distinct: Buffer::of(device, &distinct)?,
        })
    }

    /// How many.
    pub(crate) fn len(&self) -> usize {
        self.numbers.view().len()
    }
}

/// to\[i\] = table\[rows\[i\]\]. table `[any, width]`, to `[n, width]`.
///
/// # Panics
/// If a row is not in the table.
pub(crate) fn gather<D: Device, T: Number>(
    device: &D,
    table: View<'_, T>,
    rows: &RowNumbers<D>,
    to: ViewMut<'_, f32>,
    width: usize,
) -> Result<()> {
    assert!(to.len() == rows.len() * width && rows.numbers.view().bound() * width <= table.len());
    let arguments = [table.into(), rows.numbers.view().into(), to.into(), (width as i32).into()];
    // SAFETY: the rows are in the table, and `to` has as many.
    unsafe { device.launch(&MODULE, &format!("gather_{}", T::NAME), Launch::blocks(rows.len()), &arguments) }
}

/// table\[rows\[i\]\] += from\[i\], in the order of i: the gradient of [`gather`].
///
/// # Panics
/// If a row is not in the table.
pub(crate) fn scatter_add<D: Device>(
    device: &D,
    from: View<'_, f32>,
    rows: &RowNumbers<D>,
    table: ViewMut<'_, f32>,
    width: usize,
) -> Result<()> {
    assert!(from.len() == rows.len() * width && rows.numbers.view().bound() * width <= table.len());
    let RowNumbers { order, starts, distinct, .. } = rows;
    let [order, starts, distinct] = [order, starts, distinct].map(Buffer::view);
    let shape = Launch::blocks(distinct.len());
    let arguments = [from.into(), order.into(), starts.into(), distinct.into(), table.into(), (width as i32).into()];
    // SAFETY: as in `gather`, and `starts` has one more than `distinct`.
    unsafe { device.launch(&MODULE, "scatter_add", shape, &arguments) }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::cuda::ops::tests::{OnHost, as_rounded, on, rounded, zeros};
    use crate::cuda::tested::{Tested, devices};
    use crate::ops::embedding;
    use crate::ops::finite_difference::random;

    #[test]
    fn as_the_embedding_on_the_cpu_to_the_last_bit() {
        fn check<T: OnHost>(device: &Tested, width: usize) {
            let (table, tokens) = (random(9 * width, 1), [3, 0, 8, 3, 3, 0, 7]);
            let rows = RowNumbers::new(device, &tokens).unwrap();
            let mut x = zeros(device, tokens.len() * width);
            gather(device, on(device, &rounded::<T>(&table)).view(), &rows, x.view_mut(), width).unwrap();
            let mut expected = vec![0.0; tokens.len() * width];
            embedding::forward(&as_rounded::<T>(&table), &tokens, &mut expected, width);
            assert_eq!(x.to_vec(device).unwrap(), expected);

            // magnitudes that differ, so that every order of a sum has another rounding
            let dx: Vec<f32> = random(expected.len(), 2).iter().map(|x| x.powi(5)).collect();
            let mut expected = random(table.len(), 3);
            let mut d_table = on(device, &expected);
            scatter_add(device, on(device, &dx).view(), &rows, d_table.view_mut(), width).unwrap();
            embedding::backward(&tokens, &dx, &mut expected, width);
            assert_eq!(d_table.to_vec(device).unwrap(), expected);
        }
        for device in devices() {
            for width in [1, 5, 300] {
                check::<f32>(&device, width);
                check::<bf16>(&device, width);
            }
            let none = RowNumbers::new(&device, &[]).unwrap();
            gather(&device, on(&device, &[1f32]).view(), &none, zeros(&device, 0).view_mut(), 1).unwrap();
            scatter_add(&device, zeros(&device, 0).view(), &none, zeros(&device, 1).view_mut(), 1).unwrap();
        }
    }

    #[test]
    #[should_panic(expected = "bound() * width")]
    fn a_row_beyond_the_table_is_refused() {
        let Some(device) = devices().next() else { panic!("bound() * width is not tested") };
        let rows = RowNumbers::new(&device, &[2]).unwrap();
        let _ = gather(&device, zeros::<f32>(&device, 8).view(), &rows, zeros(&device, 4).view_mut(), 4);
    }
}
