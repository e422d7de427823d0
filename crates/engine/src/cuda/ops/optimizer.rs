//! The norm of a gradient, and steps of AdamW; see [`optim`](crate::optim).

use crate::cuda::Module;
use crate::cuda::device::{Buffer, Device, Launch, Number, View, ViewMut};
use crate::error::Result;
use crate::optim::adamw::Constants;
use crate::optim::adamw8bit::{self, BLOCK};

pub(crate) static MODULE: Module = Module {
    name: "optimizer",
    text: include_str!("../kernels/optimizer.cu"),
    kernels: &["sum_of_squares", "sum_of_parts", "adamw_f32", "adamw_bf16", "adamw8bit_f32", "adamw8bit_bf16"],
};

/// Numbers that a block sums in [`sum_of_squares`].
const CHUNK: usize = 1 << 16;

/// Blocks of moments that a block of threads updates, so that it reads the codes once for all of them.
const BLOCKS: usize = 16;

/// Σ x², summed in f64 in an order that the length alone decides.
///
/// # Errors
/// Those of the device. It waits for the sum.
pub(crate) fn sum_of_squares<D: Device>(device: &D, x: View<'_, f32>) -> Result<f64> {
    let (count, parts) = (x.len(), x.len().div_ceil(CHUNK));
    let (mut partial, mut sum) = (Buffer::<D, f64>::zeros(device, parts)?, Buffer::<D, f64>::zeros(device, 1)?);
    let arguments = [x.into(), partial.view_mut().into(), count.into(), CHUNK.into()];
    // SAFETY: `partial` has a number for each block.
    unsafe { device.launch(&MODULE, "sum_of_squares", Launch::blocks(parts), &arguments)? };
    let arguments = [partial.view().into(), sum.view_mut().into(), parts.into()];
    // SAFETY: `partial` has as many numbers.
    unsafe { device.launch(&MODULE, "sum_of_parts", Launch::blocks(1), &arguments)? };
    Ok(sum.to_vec(device)?[0])
}

/// A step of AdamW with moments in f32; sets the gradient to zero. Weights in bf16 are rounded up or down at random, so that their
/// mean is right; `seed` must differ from step to step and from tensor to tensor.
pub(crate) fn adamw<W: Number>(
    device: &impl Device,
    weights: ViewMut<'_, W>,
    gradient: ViewMut<'_, f32>,
    first: ViewMut<'_, f32>,
    second: ViewMut<'_, f32>,
    constants: Constants,
    seed: u64,
) -> Result<()> {
    let count = weights.len();
    assert!(gradient.len() == count && first.len() == count && second.len() == count);
    let arguments = [
        weights.into(),
        gradient.into(),
        first.into(),
        second.into(),
        constants.as_array().into(),
        seed.into(),
        count.into(),
    ];
    // SAFETY: all have `count` numbers.
    unsafe { device.launch(&MODULE, &format!("adamw_{}", W::NAME), Launch::threads(count), &arguments) }
}

/// The two codes of moments in 8 bits, on a device.
#[derive(Debug)]
pub(crate) struct Codes<D: Device>(Buffer<D, f32>);

impl<D: Device> Codes<D> {
    /// Copies them to a device.
    ///
    /// # Errors
    /// Those of [`Buffer::of`].
    pub(crate) fn new(device: &D) -> Result<Self> {
        Ok(Self(Buffer::of(device, &adamw8bit::tables().concat())?))
    }
}

/// A moment of a tensor in 8 bits: a code for each number, and the largest magnitude of each block of 256.
#[derive(Debug)]
pub(crate) struct Moment<'a> {
    /// `[n]`.
    pub(crate) codes: ViewMut<'a, u8>,
    /// `[n / 256]`, rounded up.
    pub(crate) absmax: ViewMut<'a, f32>,
}

/// As [`adamw`], with moments in 8 bits.
pub(crate) fn adamw8bit<D: Device, W: Number>(
    device: &D,
    codes: &Codes<D>,
    weights: ViewMut<'_, W>,
    gradient: ViewMut<'_, f32>,
    [first, second]: [Moment<'_>; 2],
    constants: Constants,
    seed: u64,
) -> Result<()> {
    let (count, blocks) = (weights.len(), weights.len().div_ceil(BLOCK));
    assert!(gradient.len() == count);
    assert!([&first, &second].iter().all(|m| m.codes.len() == count && m.absmax.len() == blocks));
    let arguments = [
        weights.into(),
        gradient.into(),
        first.codes.into(),
        first.absmax.into(),
        second.codes.into(),
        second.absmax.into(),
        codes.0.view().into(),
        constants.as_array().into(),
        seed.into(),
        i32::from(adamw8bit::signed_zero()).into(),
        (BLOCKS as i32).into(),
        count.into(),
    ];
    const { assert!(BLOCK == Launch::BLOCK as usize) };
    // SAFETY: all have `count` numbers or as many blocks.
    unsafe {
        device.launch(&MODULE, &format!("adamw8bit_{}", W::NAME), Launch::blocks(blocks.div_ceil(BLOCKS)), &arguments)
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::cuda::ops::tests::{OnHost, on, rounded, to_f32, zeros};
    use crate::cuda::tested::{Tested, devices};
    use crate::model::ParamSpec;
    use crate::ops::dropout::mix;
    use crate::ops::finite_difference::random;
    use crate::optim::{Optimizer, OptimizerKind, OptimizerOptions, StateValues, Step, global_norm};

    #[test]
    fn the_norm_is_that_of_the_cpu() {
        for device in devices() {
            for len in [0, 1, 255, CHUNK + 3, 3 * CHUNK] {
                let x = random(len, 1);
                let (sum, norm) = (sum_of_squares(&device, on(&device, &x).view()).unwrap(), global_norm(&x));
                assert!((sum - norm * norm).abs() <= 1e-12 * sum, "{sum} {norm}");
            }
        }
    }

    const OPTIONS: OptimizerOptions =
        OptimizerOptions { beta1: 0.9, beta2: 0.999, eps: 1e-8, momentum: 0.0, weight_decay: 0.1 };
    const LEARNING_RATE: f64 = 0.01;
    const SCALE: f64 = 0.7;

    fn constants(number: u64) -> Constants {
        let keep = 1.0 - LEARNING_RATE * OPTIONS.weight_decay;
        Constants::new(Step { options: OPTIONS, number, learning_rate: LEARNING_RATE, scale: SCALE, keep })
    }

    /// A number of type W as a step stores it: the nearest, or one of two neighbours at random.
    fn stored<W: OnHost>(w: f32, number: usize, seed: u64) -> W {
        if size_of::<W>() == 4 {
            return W::of_f32(w);
        }
        let random = mix(seed ^ mix(number as u64)) as u32 & 0xffff;
        W::of_f32(f32::from_bits((w.to_bits() + random) & 0xffff_0000))
    }

    /// Takes steps on the CPU, and through `step` on a device, and compares every bit. `step` gets the number of the step.
    fn check<W: OnHost>(
        device: &Tested,
        kind: OptimizerKind,
        len: usize,
        mut step: impl FnMut(u64, ViewMut<'_, W>, ViewMut<'_, f32>),
    ) -> Vec<Vec<u8>> {
        let spec = ParamSpec { name: "weights".into(), shape: vec![1, len], range: 0..len };
        let mut optimizer = Optimizer::new(kind, OPTIONS, &[spec]);
        let mut expected: Vec<W> = rounded(&random(len, 1));
        let mut weights = on(device, &expected);
        for number in 1..=4 {
            let mut gradient: Vec<f32> = random(len, 1 + number).iter().map(|g| g.powi(9)).collect();
            gradient[len / 2] = 0.0;
            let mut on_gradient = on(device, &gradient);
            step(number, weights.view_mut(), on_gradient.view_mut());
            let mut exact = to_f32(&expected);
            optimizer.step(&mut exact, &mut gradient, LEARNING_RATE, SCALE);
            expected = exact.into_iter().enumerate().map(|(i, w)| stored(w, i, number)).collect();
            assert!(weights.to_vec(device).unwrap() == expected, "step {number}");
            assert!(on_gradient.to_vec(device).unwrap().iter().all(|&g| g == 0.0));
        }
        let bytes = |values: StateValues<'_>| match values {
            StateValues::F32(values) => bytemuck::cast_slice(values).to_vec(),
            StateValues::U8(values) => values.to_vec(),
        };
        optimizer.state().into_iter().map(|tensor| bytes(tensor.values)).collect()
    }

    fn bytes<T: bytemuck::Pod>(device: &Tested, numbers: &Buffer<Tested, T>) -> Vec<u8> {
        bytemuck::cast_slice(&numbers.to_vec(device).unwrap()).to_vec()
    }

    #[test]
    fn adamw_is_that_of_the_cpu_to_the_last_bit() {
        fn run<W: OnHost>(device: &Tested) {
            let len = 1003;
            let [mut first, mut second] = [(); 2].map(|()| zeros(device, len));
            let expected = check::<W>(device, OptimizerKind::AdamW, len, |number, weights, gradient| {
                let (m, v) = (first.view_mut(), second.view_mut());
                adamw(device, weights, gradient, m, v, constants(number), number).unwrap();
            });
            assert!(expected == [first, second].map(|moment| bytes(device, &moment)));
        }
        for device in devices() {
            run::<f32>(&device);
            run::<bf16>(&device);
        }
    }

    #[test]
    fn adamw_in_8_bits_is_that_of_the_cpu_to_the_last_bit() {
        fn run<W: OnHost>(device: &Tested) {
            let (len, all) = (BLOCKS * BLOCK + 1000, Codes::new(device).unwrap());
            let [mut m, mut v] = [(); 2].map(|()| zeros(device, len));
            let [mut m_absmax, mut v_absmax] = [(); 2].map(|()| zeros(device, len.div_ceil(BLOCK)));
            let expected = check::<W>(device, OptimizerKind::AdamW8bit, len, |number, weights, gradient| {
                let first = Moment { codes: m.view_mut(), absmax: m_absmax.view_mut() };
                let second = Moment { codes: v.view_mut(), absmax: v_absmax.view_mut() };
                adamw8bit(device, &all, weights, gradient, [first, second], constants(number), number).unwrap();
            });
            let actual = [bytes(device, &m), bytes(device, &m_absmax), bytes(device, &v), bytes(device, &v_absmax)];
            assert!(expected == actual);
        }
        for device in devices() {
            run::<f32>(&device);
            run::<bf16>(&device);
        }
    }

    #[test]
    fn weights_in_bf16_are_right_in_the_mean() {
        for device in devices() {
            let len = 20_000;
            let mut start = vec![bf16::ONE; len];
            start[..2].copy_from_slice(&[bf16::INFINITY, bf16::NAN]);
            let mut weights = on(&device, &start);
            let mut gradient = on(&device, &vec![1f32; len]);
            let [mut m, mut v] = [(); 2].map(|()| zeros(&device, len));
            let step = Step { options: OPTIONS, number: 1, learning_rate: 0.001, scale: 1.0, keep: 1.0 };
            let (m, v) = (m.view_mut(), v.view_mut());
            adamw(&device, weights.view_mut(), gradient.view_mut(), m, v, Constants::new(step), 9).unwrap();
            let weights = weights.to_vec(&device).unwrap();
            assert!(weights[0] == bf16::INFINITY && weights[1].is_nan());
            let below = 1.0 - 1.0 / 256.0;
            assert!(weights[2..].iter().all(|w| [1.0, below].contains(&w.to_f64())));
            let mean = weights[2..].iter().map(|w| w.to_f64()).sum::<f64>() / (len - 2) as f64;
            // five standard errors
            assert!((mean - 0.999).abs() < 5.0 * 0.44 / 256.0 / (len as f64).sqrt(), "{mean}");
        }
    }
}
