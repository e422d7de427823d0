//! Products with a matrix in 8 bits, as in GGUF's Q8_0: 32 neighbours of a row share a scale, f16.
//!
//! The other factor is brought to the same form (with f32 scales), so that the sums within a block are of integers and
//! exact; the blocks of a row add up in f32 in their order. The bits of a result depend on nothing else.

use half::f16;
use rayon::prelude::*;

use super::panels_of_task;
use crate::ops::simd::dispatch;

#[cfg(target_arch = "x86_64")]
mod avx512;

/// Elements that share a scale.
const BLOCK: usize = 32;
/// Elements in a word.
const QUAD: usize = 4;
/// Words of a block.
const WORDS: usize = BLOCK / QUAD;
/// Rows of W that are computed together.
const COLUMNS: usize = 32;

/// A block of some rows of W: for every word of the block that of each row, then each row's scale.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Panel {
    /// Codes are shifted by 128 to be unsigned.
    words: [[[u8; QUAD]; COLUMNS]; WORDS],
    scales: [f16; COLUMNS],
}

/// A matrix W `[outputs, inputs]`.
#[derive(Debug)]
pub(super) struct Int8 {
    inputs: usize,
    outputs: usize,
    /// For each 32 rows the blocks in order.
    panels: Vec<Panel>,
}

/// A block of the other factor.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Codes {
    words: [[i8; QUAD]; WORDS],
    scale: f32,
    /// −128·Σ codes, which undoes the shift of W's.
    shift: i32,
}

/// The scale of up to 32 numbers, and their codes in [−127, 127]. Numbers of which one is none have a scale that is none, so
/// that it shows in the results.
#[inline(always)]
fn encode(x: &[f32]) -> (f32, [i8; BLOCK]) {
    let numbers = x.iter().all(|x| x.is_finite());
    let largest = if numbers { x.iter().fold(0f32, |m, x| m.max(x.abs())) } else { f32::NAN };
    let scale = largest / 127.0;
    // numbers too small for an inverse are zero
    let inverse = Some(1.0 / scale).filter(|inverse| inverse.is_finite()).unwrap_or(0.0);
    let mut codes = [0; BLOCK];
    codes.iter_mut().zip(x).for_each(|(code, x)| *code = (x * inverse).round() as i8);
    (scale, codes)
}

impl Codes {
    #[inline(always)]
    fn new(x: &[f32]) -> Self {
        let (scale, codes) = encode(x);
        let mut words = [[0; QUAD]; WORDS];
        words.as_flattened_mut().copy_from_slice(&codes);
        Self { words, scale, shift: -128 * codes.iter().map(|&code| i32::from(code)).sum::<i32>() }
    }
}

/// The blocks of a row of the other factor.
fn encode_row(x: &[f32]) -> Vec<Codes> {
    dispatch(
        #[inline(always)]
        || x.chunks(BLOCK).map(Codes::new).collect(),
    )
}

impl Int8 {
    pub(super) fn new(w: &[f32], inputs: usize) -> Self {
        let (outputs, blocks) = (w.len() / inputs, inputs.div_ceil(BLOCK));
        let empty = Panel { words: [[[128; QUAD]; COLUMNS]; WORDS], scales: [f16::ZERO; COLUMNS] };
        let mut panels = vec![empty; outputs.div_ceil(COLUMNS) * blocks];
        let rows = panels.par_chunks_exact_mut(blocks).zip(w.par_chunks(COLUMNS * inputs));
        rows.for_each(|(panels, w)| {
            for (column, w) in w.chunks_exact(inputs).enumerate() {
                for (panel, w) in panels.iter_mut().zip(w.chunks(BLOCK)) {
                    let (scale, codes) = encode(w);
                    panel.scales[column] = f16::from_f32(scale);
                    for (word, codes) in panel.words.iter_mut().zip(codes.as_chunks::<QUAD>().0) {
                        word[column] = codes.map(|code| (i16::from(code) + 128) as u8);
                    }
                }
            }
        });
        Self { inputs, outputs, panels }
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(self.panels.as_slice())
    }

    /// y = x·Wᵀ, or y += x·Wᵀ with `add`.
    pub(super) fn forward(&self, x: &[f32], y: &mut [f32], add: bool) {
        self.forward_by(best_kernel(), x, y, add);
    }

    fn forward_by(&self, kernel: Kernel, x: &[f32], y: &mut [f32], add: bool) {
        let (n, blocks) = (x.len() / self.inputs, self.inputs.div_ceil(BLOCK));
        if n == 0 {
            return;
        }
        let rows: Vec<Codes> = x.par_chunks(self.inputs).flat_map_iter(encode_row).collect();
        let count = self.panels.len() / blocks;
        let task = panels_of_task(count, n * blocks * size_of::<Panel>());
        let mut results = vec![[0.0; COLUMNS]; count * n];
        results.par_chunks_mut(task * n).zip(self.panels.par_chunks(task * blocks)).for_each(|(results, panels)| {
            let columns = results.chunks_exact_mut(n).zip(panels.chunks_exact(blocks));
            columns.for_each(|(sums, panels)| kernel(&rows, panels, sums));
        });
        for (row, y) in y.chunks_exact_mut(self.outputs).enumerate() {
            for (columns, y) in y.chunks_mut(COLUMNS).enumerate() {
                for (y, result) in y.iter_mut().zip(&results[columns * n + row]) {
                    *y = result + if add { *y } else { 0.0 };
                }
            }
        }
    }
}

/// Adds the products of rows, each as many blocks as there are panels, with the panels' columns: `sums[row][column]`.
type Kernel = fn(&[Codes], &[Panel], &mut [[f32; COLUMNS]]);

fn best_kernel() -> Kernel {
    #[cfg(target_arch = "x86_64")]
    if avx512::is_available() {
        return avx512::add_products;
    }
    add_products
}

/// The [`Kernel`] of any processor.
fn add_products(rows: &[Codes], panels: &[Panel], sums: &mut [[f32; COLUMNS]]) {
    dispatch(
        #[inline(always)]
        || {
            for (row, sums) in rows.chunks_exact(panels.len()).zip(sums) {
                for (codes, panel) in row.iter().zip(panels) {
                    let mut block = [codes.shift; COLUMNS];
                    for (x, words) in codes.words.iter().zip(&panel.words) {
                        for (sum, w) in block.iter_mut().zip(words) {
                            *sum += w.iter().zip(x).map(|(&w, &x)| i32::from(w) * i32::from(x)).sum::<i32>();
                        }
                    }
                    for ((sum, block), scale) in sums.iter_mut().zip(block).zip(panel.scales) {
                        *sum = (block as f32).mul_add(codes.scale * scale.to_f32(), *sum);
                    }
                }
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::finite_difference::random;

    #[test]
    fn the_kernel_of_this_processor_gives_the_bits_of_the_other() {
        for (n, inputs, outputs) in [(1, 576, 70), (7, 64, 32), (13, 100, 31), (16, 1536, 64), (6, 31, 1)] {
            let (x, w, start) = (random(n * inputs, 1), random(inputs * outputs, 2), random(n * outputs, 3));
            let packed = Int8::new(&w, inputs);
            for add in [false, true] {
                let (mut y, mut expected) = (start.clone(), start.clone());
                packed.forward(&x, &mut y, add);
                packed.forward_by(add_products, &x, &mut expected, add);
                assert!(y == expected, "{n} rows of {inputs}, {outputs} outputs");
            }
        }
    }

    #[test]
    fn codes_are_those_of_q8_0() {
        let w: Vec<f32> = (0..BLOCK).map(|i| i as f32 - 15.5).collect();
        let packed = Int8::new(&w, BLOCK);
        let panel = &packed.panels[0];
        assert_eq!(panel.scales[0], f16::from_f32(15.5 / 127.0));
        for (i, w) in w.iter().enumerate() {
            let code = i32::from(panel.words[i / QUAD][0][i % QUAD]) - 128;
            assert_eq!(code, (w / (15.5 / 127.0)).round() as i32);
        }
        // other columns are empty, and the sum of W's only row with itself is exact but for the codes
        let mut y = [0.0];
        packed.forward(&w, &mut y, false);
        let expected: f32 = w.iter().map(|w| w * w).sum();
        assert!((y[0] / expected - 1.0).abs() < 0.01);
    }

    #[test]
    fn what_is_no_number_shows() {
        let packed = Int8::new(&[1.0; 64], 64);
        let mut y = [0.0];
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = [1.0; 64];
            x[40] = bad;
            packed.forward(&x, &mut y, false);
            assert!(y[0].is_nan());
            let mut w = [1.0; 64];
            w[7] = bad;
            Int8::new(&w, 64).forward(&[1.0; 64], &mut y, false);
            assert!(y[0].is_nan());
        }
        // and what is too small for a scale is zero
        Int8::new(&[-1e-44; 64], 64).forward(&[1.0; 64], &mut y, false);
        assert_eq!(y, [0.0]);
    }
}
