//! Numbers in another type.

use half::bf16;

use crate::cuda::Module;
use crate::cuda::device::{Device, Launch, View, ViewMut};
use crate::error::Result;

pub(crate) static MODULE: Module =
    Module { name: "cast", text: include_str!("../kernels/cast.cu"), kernels: &["cast_f32_bf16", "cast_bf16_f32"] };

/// The nearest numbers in bf16, of two equally near ones the even one.
pub(crate) fn to_bf16(device: &impl Device, from: View<'_, f32>, to: ViewMut<'_, bf16>) -> Result<()> {
    assert_eq!(from.len(), to.len());
    let count = from.len();
    let arguments = [from.into(), to.into(), count.into()];
    // SAFETY: both have `count` numbers.
    unsafe { device.launch(&MODULE, "cast_f32_bf16", Launch::threads(count), &arguments) }
}

/// The same numbers in f32.
pub(crate) fn to_f32(device: &impl Device, from: View<'_, bf16>, to: ViewMut<'_, f32>) -> Result<()> {
    assert_eq!(from.len(), to.len());
    let count = from.len();
    let arguments = [from.into(), to.into(), count.into()];
    // SAFETY: both have `count` numbers.
    unsafe { device.launch(&MODULE, "cast_bf16_f32", Launch::threads(count), &arguments) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::device::Buffer;
    use crate::cuda::emulator::Emulator;

    #[test]
    fn every_bf16_comes_back_and_others_are_rounded_as_on_the_cpu() {
        let Some(device) = Emulator::new() else { return };
        let all: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
        let from = Buffer::of(&device, &all).unwrap();
        let mut to = Buffer::zeros(&device, all.len()).unwrap();
        to_f32(&device, from.view(), to.view_mut()).unwrap();
        let exact = to.to_vec(&device).unwrap();
        assert!(exact.iter().zip(&all).all(|(e, a)| e.to_bits() == u32::from(a.to_bits()) << 16));

        let near = |low: u32| exact.iter().map(move |x| f32::from_bits(x.to_bits() | low));
        let numbers: Vec<f32> = [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff].into_iter().flat_map(near).skip(1).collect();
        let from = Buffer::of(&device, &numbers).unwrap();
        let mut to = Buffer::zeros(&device, numbers.len()).unwrap();
        to_bf16(&device, from.view(), to.view_mut()).unwrap();
        let rounded = to.to_vec(&device).unwrap();
        assert!(rounded.iter().zip(&numbers).all(|(r, x)| r.to_bits() == bf16::from_f32(*x).to_bits()));
    }
}
