//! How weights are stored in files, and how they become f32.

use std::collections::HashMap;
use std::io::{self, Write};

use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};

/// How the numbers of a tensor are stored.
///
/// The quantised ones are llama.cpp's: a row is cut into blocks of 32 numbers, each with its own scale (and minimum).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    F32,
    F16,
    Bf16,
    /// f16 scale d, 32 × 4 bits q: d·(q − 8).
    Q4_0,
    /// f16 scale d, f16 minimum m, 32 × 4 bits q: d·q + m.
    Q4_1,
    /// f16 scale d, 32 × i8 q: d·q.
    Q8_0,
}

impl Encoding {
    /// The name that llama.cpp and safetensors use.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q8_0 => "Q8_0",
        }
    }

    /// The size of a block: how many numbers, in how many bytes.
    pub(super) fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q8_0 => (32, 34),
        }
    }

    /// The bytes of a tensor of the given shape; `None` when rows are not whole blocks or the size overflows.
    pub(super) fn bytes(self, shape: &[usize]) -> Option<usize> {
        let (numbers, bytes) = self.block();
        let count = shape.iter().try_fold(1_usize, |n, &size| n.checked_mul(size))?;
        let whole_rows = shape.last().copied().unwrap_or(1).is_multiple_of(numbers);
        if whole_rows { (count / numbers).checked_mul(bytes) } else { None }
    }

    /// Widens `bytes` into `out`, in parallel. The lengths must fit each other.
    pub(super) fn widen(self, bytes: &[u8], out: &mut [f32]) {
        const BLOCKS: usize = 4096;
        let (block_numbers, block_bytes) = self.block();
        debug_assert_eq!(out.len() / block_numbers * block_bytes, bytes.len());
        out.par_chunks_mut(BLOCKS * block_numbers)
            .zip(bytes.par_chunks(BLOCKS * block_bytes))
            .for_each(|(out, bytes)| self.widen_blocks(bytes, out));
    }

    fn widen_blocks(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Self::F32 => each(bytes, out, |block: &[u8; 4], x: &mut [f32; 1]| x[0] = f32::from_le_bytes(*block)),
            Self::F16 => each(bytes, out, |block, x: &mut [f32; 1]| x[0] = f16::from_le_bytes(*block).to_f32()),
            Self::Bf16 => each(bytes, out, |block, x: &mut [f32; 1]| x[0] = bf16::from_le_bytes(*block).to_f32()),
            Self::Q4_0 => each(bytes, out, |block: &[u8; 18], x: &mut [f32; 32]| {
                let d = half_at(block, 0);
                nibbles(&block[2..], x, |q| d * (f32::from(q) - 8.0));
            }),
            Self::Q4_1 => each(bytes, out, |block: &[u8; 20], x: &mut [f32; 32]| {
                let (d, m) = (half_at(block, 0), half_at(block, 2));
                nibbles(&block[4..], x, |q| d * f32::from(q) + m);
            }),
            Self::Q8_0 => each(bytes, out, |block: &[u8; 34], x: &mut [f32; 32]| {
                let d = half_at(block, 0);
                for (x, &q) in x.iter_mut().zip(&block[2..]) {
                    *x = d * f32::from(q.cast_signed());
                }
            }),
        }
    }
}

/// Calls `widen` for every block of `BYTES` bytes and `NUMBERS` numbers.
fn each<const BYTES: usize, const NUMBERS: usize>(
    bytes: &[u8],
    out: &mut [f32],
    widen: impl Fn(&[u8; BYTES], &mut [f32; NUMBERS]),
) {
    let blocks = bytes.as_chunks::<BYTES>().0;
    for (block, numbers) in blocks.iter().zip(out.as_chunks_mut::<NUMBERS>().0) {
        widen(block, numbers);
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The low halves of 16 bytes are the first 16 numbers of a block, the high halves the last 16.
fn nibbles(bytes: &[u8], out: &mut [f32; 32], value: impl Fn(u8) -> f32) {
    let (low, high) = out.split_at_mut(16);
    for ((low, high), &byte) in low.iter_mut().zip(high).zip(bytes) {
        (*low, *high) = (value(byte & 15), value(byte >> 4));
    }
}

/// The values of a tensor to be written.
#[derive(Debug, Clone, Copy)]
pub enum TensorData<'a> {
    /// Numbers.
    F32(&'a [f32]),
    /// Bytes.
    U8(&'a [u8]),
}

impl<'a> From<&'a [f32]> for TensorData<'a> {
    fn from(values: &'a [f32]) -> Self {
        Self::F32(values)
    }
}

/// Writes tensors, each with name, shape and values, as one safetensors file, without a copy of them in memory.
///
/// # Errors
/// What `out` returns, or a shape that does not fit its values.
pub fn write_safetensors<'a>(
    out: &mut dyn Write,
    tensors: &[(&str, &[usize], impl Into<TensorData<'a>> + Copy)],
    metadata: HashMap<String, String>,
) -> io::Result<()> {
    let infos = tensors.iter().map(|&(name, shape, values)| match values.into() {
        TensorData::F32(values) => (name, shape, Dtype::F32, size_of_val(values)),
        TensorData::U8(values) => (name, shape, Dtype::U8, values.len()),
    });
    write_header(out, infos, metadata)?;
    for &(_, _, values) in tensors {
        match values.into() {
            TensorData::U8(values) => out.write_all(values)?,
            TensorData::F32(values) => write_f32(out, values)?,
        }
    }
    Ok(())
}

/// Writes what precedes the values of tensors, each with name, shape, type and bytes, in a safetensors file.
pub(super) fn write_header<'a>(
    out: &mut dyn Write,
    tensors: impl Iterator<Item = (&'a str, &'a [usize], Dtype, usize)>,
    metadata: HashMap<String, String>,
) -> io::Result<()> {
    let mut end = 0;
    let infos = tensors.map(|(name, shape, dtype, bytes)| {
        let start = end;
        end += bytes;
        (name.to_owned(), TensorInfo { dtype, shape: shape.to_vec(), data_offsets: (start, end) })
    });
    let header = Metadata::new(Some(metadata), infos.collect()).map_err(io::Error::other)?;
    let mut header = serde_json::to_vec(&header)?;
    // Readers map the file, so the data must start at a multiple of its width.
    header.resize(header.len().next_multiple_of(8), b' ');
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)
}

/// Writes numbers as safetensors stores them.
pub(super) fn write_f32(out: &mut dyn Write, values: &[f32]) -> io::Result<()> {
    for chunk in values.chunks(1 << 12) {
        let bytes: Vec<u8> = chunk.iter().flat_map(|value| value.to_le_bytes()).collect();
        out.write_all(&bytes)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn widened(encoding: Encoding, bytes: &[u8]) -> Vec<f32> {
        let (numbers, size) = encoding.block();
        let mut out = vec![f32::NAN; bytes.len() / size * numbers];
        encoding.widen(bytes, &mut out);
        out
    }

    #[test]
    fn floats() {
        let f32s: Vec<u8> = [1.5_f32, -0.1].iter().flat_map(|x| x.to_le_bytes()).collect();
        assert_eq!(widened(Encoding::F32, &f32s), [1.5, -0.1]);
        // 1.0, −2.0 and the smallest number above 0 in f16; 1.0 and −3.140625 in bf16
        assert_eq!(widened(Encoding::F16, &[0, 0x3c, 0, 0xc0, 1, 0]), [1.0, -2.0, 2.0_f32.powi(-24)]);
        assert_eq!(widened(Encoding::Bf16, &[0x80, 0x3f, 0x49, 0xc0]), [1.0, -3.140625]);
    }

    /// Byte i holds i in its low half and 15 − i in its high half.
    fn counting_nibbles() -> impl Iterator<Item = u8> {
        (0..16_u8).map(|i| i | ((15 - i) << 4))
    }

    #[test]
    fn q4_0() {
        // d = 0.5
        let block: Vec<u8> = [0x00, 0x38].into_iter().chain(counting_nibbles()).collect();
        let expected: Vec<f32> = (0..16).chain((0..16).rev()).map(|q| 0.5 * (q as f32 - 8.0)).collect();
        assert_eq!(widened(Encoding::Q4_0, &block), expected);
        assert_eq!((expected[0], expected[15], expected[16]), (-4.0, 3.5, 3.5));
    }

    #[test]
    fn q4_1() {
        // d = 0.25, m = −1
        let block: Vec<u8> = [0x00, 0x34, 0x00, 0xbc].into_iter().chain(counting_nibbles()).collect();
        let expected: Vec<f32> = (0..16).chain((0..16).rev()).map(|q| 0.25 * q as f32 - 1.0).collect();
        assert_eq!(widened(Encoding::Q4_1, &block), expected);
        assert_eq!((expected[0], expected[15], expected[16]), (-1.0, 2.75, 2.75));
    }

    #[test]
    fn q8_0() {
        // two blocks: d = 2 with q = −128, −127, …; d = −1 with q = 7 throughout
        let first = [0x00, 0x40].into_iter().chain((0..32).map(|i| 128 + i));
        let second = [0x00, 0xbc].into_iter().chain([7; 32]);
        let x = widened(Encoding::Q8_0, &first.chain(second).collect::<Vec<u8>>());
        assert_eq!((x[0], x[1], x[31]), (-256.0, -254.0, -194.0));
        assert!(x[32..].iter().all(|&x| x == -7.0));
    }

    #[test]
    fn long_tensors_are_widened_whole() {
        let numbers: Vec<f32> = (0..100_000).map(|i| i as f32).collect();
        let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        assert_eq!(widened(Encoding::F32, &bytes), numbers);
    }

    #[test]
    fn sizes() {
        assert_eq!(Encoding::Q4_1.bytes(&[3, 64]), Some(3 * 2 * 20));
        assert_eq!(Encoding::Q4_1.bytes(&[64, 3]), None);
        assert_eq!(Encoding::F32.bytes(&[usize::MAX, 2]), None);
        assert_eq!(Encoding::F32.bytes(&[1 << 62]), None);
        assert_eq!(Encoding::F32.bytes(&[]), Some(4));
    }
}
