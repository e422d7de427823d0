//! Numbers one by one.

use crate::cuda::Module;
use crate::cuda::device::{Device, Launch, Number, View, ViewMut};
use crate::error::Result;

pub(crate) static MODULE: Module = Module {
    name: "elementwise",
    text: include_str!("../kernels/elementwise.cu"),
    kernels: &[
        "clear_f32",
        "convert_f32_f32",
        "convert_f32_bf16",
        "convert_bf16_f32",
        "convert_bf16_bf16",
        "add_f32",
        "add_bf16",
    ],
};

/// Sets numbers to zero.
pub(crate) fn clear(device: &impl Device, x: ViewMut<'_, f32>) -> Result<()> {
    let count = x.len();
    let arguments = [x.into(), count.into()];
    // SAFETY: there are `count` numbers.
    unsafe { device.launch(&MODULE, "clear_f32", Launch::threads(count), &arguments) }
}

/// Copies numbers; in bf16 the nearest one, of two equally near ones the even one.
pub(crate) fn convert<F: Number, T: Number>(device: &impl Device, from: View<'_, F>, to: ViewMut<'_, T>) -> Result<()> {
    assert_eq!(from.len(), to.len());
    let (kernel, count) = (format!("convert_{}_{}", F::NAME, T::NAME), from.len());
    let arguments = [from.into(), to.into(), count.into()];
    // SAFETY: both have `count` numbers.
    unsafe { device.launch(&MODULE, &kernel, Launch::threads(count), &arguments) }
}

/// to += from.
pub(crate) fn add<T: Number>(device: &impl Device, from: View<'_, T>, to: ViewMut<'_, f32>) -> Result<()> {
    assert_eq!(from.len(), to.len());
    let (kernel, count) = (format!("add_{}", T::NAME), from.len());
    let arguments = [from.into(), to.into(), count.into()];
    // SAFETY: both have `count` numbers.
    unsafe { device.launch(&MODULE, &kernel, Launch::threads(count), &arguments) }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::cuda::ops::tests::{OnHost, on, rounded, to_f32, zeros};
    use crate::cuda::tested::{Tested, devices};
    use crate::ops::finite_difference::random;

    #[test]
    fn every_bf16_comes_back_and_others_are_rounded_as_on_the_cpu() {
        for device in devices() {
            let all: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
            let (mut exact, mut same) = (zeros::<f32>(&device, all.len()), zeros::<bf16>(&device, all.len()));
            convert(&device, on(&device, &all).view(), exact.view_mut()).unwrap();
            let exact = exact.to_vec(&device).unwrap();
            assert!(exact.iter().zip(&all).all(|(e, a)| e.to_bits() == u32::from(a.to_bits()) << 16));
            convert(&device, on(&device, &all).view(), same.view_mut()).unwrap();
            let quiet = |x: &bf16| bf16::from_f32(x.to_f32()).to_bits();
            assert!(same.to_vec(&device).unwrap().iter().zip(&all).all(|(s, a)| s.to_bits() == quiet(a)));

            let near = |low: u32| exact.iter().map(move |x| f32::from_bits(x.to_bits() | low));
            let numbers: Vec<f32> = [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff].into_iter().flat_map(near).skip(1).collect();
            let mut to = zeros::<bf16>(&device, numbers.len());
            convert(&device, on(&device, &numbers).view(), to.view_mut()).unwrap();
            let to = to.to_vec(&device).unwrap();
            assert!(to.iter().zip(&numbers).all(|(r, x)| r.to_bits() == bf16::from_f32(*x).to_bits()));
        }
    }

    #[test]
    fn sums_and_copies() {
        fn check<T: OnHost>(device: &Tested) {
            let (from, start) = (rounded::<T>(&random(777, 1)), random(777, 2));
            let mut to = on(device, &start);
            add(device, on(device, &from).view(), to.view_mut()).unwrap();
            let expected: Vec<f32> = start.iter().zip(&from).map(|(s, f)| s + f.to_f32()).collect();
            assert_eq!(to.to_vec(device).unwrap(), expected);
            convert(device, on(device, &from).view(), to.view_mut()).unwrap();
            assert_eq!(to.to_vec(device).unwrap(), to_f32(&from));
            clear(device, to.view_mut().range(1..700)).unwrap();
            let cleared = to.to_vec(device).unwrap();
            assert!(cleared[1..700].iter().all(|&x| x == 0.0));
            assert_eq!([&cleared[..1], &cleared[700..]].concat(), to_f32(&[&from[..1], &from[700..]].concat()));
            // nothing is no fault
            add(device, on::<T>(device, &[]).view(), zeros(device, 0).view_mut()).unwrap();
        }
        for device in devices() {
            check::<f32>(&device);
            check::<bf16>(&device);
        }
    }
}
