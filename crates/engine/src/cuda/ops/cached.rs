//! A paged cache of keys and values, and attention of one new token of each of many sequences to it.

use crate::cuda::Module;
use crate::cuda::device::{Argument, Buffer, Device, Launch, Number, View, ViewMut};
use crate::error::Result;
use crate::ops::attention::Heads;

pub(crate) static MODULE: Module = Module {
    name: "cached",
    text: concat!(include_str!("../kernels/lanes.cuh"), include_str!("../kernels/cached.cu")),
    kernels: &["cached_write_f32", "cached_write_bf16", "cached_attention_f32", "cached_attention_bf16"],
};

/// Tokens of a page, and warps that share the keys of a query head: constants of the kernels.
const PAGE: usize = 64;
const SPLITS: usize = 4;

/// Threads of a block at most.
const THREADS: usize = 1024;

/// Keys and values of one block of the decoder, for sequences that grow: `[pages, 2, key and value heads, PAGE, dim]`.
pub(crate) struct Pages<D: Device, T> {
    numbers: Buffer<D, T>,
    heads: Heads,
}

impl<D: Device, T: Number> Pages<D, T> {
    /// So many pages, whose numbers are arbitrary until they are written.
    ///
    /// # Panics
    /// If there are more query heads to a key head than a block of threads has room for.
    ///
    /// # Errors
    /// Those of [`Device::allocate`].
    pub(crate) fn new(device: &D, pages: usize, heads: Heads) -> Result<Self> {
        let group = heads.query / heads.key_value;
        assert!(32 * SPLITS * group <= THREADS, "{group} query heads share a key head, which is too many");
        Ok(Self { numbers: Buffer::zeros(device, pages * 2 * heads.key_value_width() * PAGE)?, heads })
    }

    /// Pages for a sequence of so many tokens.
    pub(crate) fn of_tokens(tokens: usize) -> usize {
        tokens.div_ceil(PAGE)
    }
}

/// New tokens, and where the pages of their sequences are.
pub(crate) struct Tokens<D: Device> {
    /// Row in the batch, sequence, and position there, of each.
    tokens: Buffer<D, [i32; 3]>,
    /// The pages of each sequence, `[sequences, width]`.
    tables: Buffer<D, i32>,
    width: usize,
    /// One more than the last row.
    rows: usize,
}

impl<D: Device> Tokens<D> {
    /// `tables` has the pages of each sequence, `width` apart.
    ///
    /// # Panics
    /// If a token has no page in its sequence's table, or a table names a page from `pages` on.
    ///
    /// # Errors
    /// Those of [`Device::allocate`] and [`Device::write`].
    pub(crate) fn new(device: &D, tokens: &[[i32; 3]], tables: &[i32], width: usize, pages: usize) -> Result<Self> {
        assert!(tables.iter().all(|&page| (0..pages as i32).contains(&page)), "a table names a page that is not there");
        let sequences = tables.len() / width.max(1);
        let has_page = |&[row, sequence, position]: &[i32; 3]| {
            row >= 0 && (0..sequences as i32).contains(&sequence) && (0..(width * PAGE) as i32).contains(&position)
        };
        assert!(tokens.iter().all(has_page), "a token has no page");
        let rows = tokens.iter().map(|&[row, ..]| row as usize + 1).max().unwrap_or(0);
        Ok(Self { tokens: Buffer::of(device, tokens)?, tables: Buffer::of(device, tables)?, width, rows })
    }
}

/// Writes keys and values of new tokens, from qkv `[n, qkv_width]`, to the pages of their sequences.
///
/// # Errors
/// Those of [`Device::launch`].
pub(crate) fn write<D: Device, T: Number>(
    device: &D,
    qkv: View<'_, T>,
    tokens: &Tokens<D>,
    pages: &mut Pages<D, T>,
) -> Result<()> {
    let arguments = [&arguments(qkv, tokens, pages.heads)[..], &[pages.numbers.view_mut().into()]].concat();
    let name = format!("cached_write_{}", T::NAME);
    // SAFETY: the arguments are the kernel's; rows and pages were checked.
    unsafe { device.launch(&MODULE, &name, Launch::blocks(tokens.tokens.view().len()), &arguments) }
}

/// out `[n, query_width]` of new tokens, whose keys and values are written already.
///
/// # Errors
/// Those of [`Device::launch`].
pub(crate) fn attention<D: Device, T: Number>(
    device: &D,
    qkv: View<'_, T>,
    tokens: &Tokens<D>,
    pages: &Pages<D, T>,
    out: ViewMut<'_, T>,
) -> Result<()> {
    let heads = pages.heads;
    assert_eq!(out.len() / heads.query_width(), qkv.len() / heads.qkv_width());
    let warps = SPLITS * (heads.query / heads.key_value);
    let launch = Launch {
        grid: [tokens.tokens.view().len() as u32, heads.key_value as u32, 1],
        block: [32 * warps as u32, 1, 1],
        shared_bytes: (warps * (heads.dim + 2) * size_of::<f32>()) as u32,
    };
    let others = [pages.numbers.view().into(), heads.scale().into(), out.into()];
    let arguments = [&arguments(qkv, tokens, heads)[..], &others].concat();
    let name = format!("cached_attention_{}", T::NAME);
    // SAFETY: as above.
    unsafe { device.launch(&MODULE, &name, launch, &arguments) }
}

/// What both kernels take first.
///
/// # Panics
/// If qkv has not the row of every token.
fn arguments<'a, D: Device, T: Number>(qkv: View<'a, T>, tokens: &'a Tokens<D>, heads: Heads) -> [Argument<'a>; 7] {
    assert!(qkv.len().is_multiple_of(heads.qkv_width()) && tokens.rows * heads.qkv_width() <= qkv.len());
    let [width, query, key_value, dim] =
        [tokens.width, heads.query, heads.key_value, heads.dim].map(|number| (number as i32).into());
    [qkv.into(), tokens.tokens.view().into(), tokens.tables.view().into(), width, query, key_value, dim]
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::cuda::ops::tests::{OnHost, as_rounded, on, rounded, to_f32};
    use crate::cuda::tested::{Tested, devices};
    use crate::ops::attention::{self as cpu, Prefix, Span};
    use crate::ops::finite_difference::random;

    fn check<T: OnHost>(device: &Tested, heads: Heads) {
        // sequences of one token, of some pages, and of more keys than the splits take at once
        let lengths = [1, 150, 64, 300];
        let (mut tokens, mut spans, mut row) = (Vec::new(), Vec::new(), 0);
        for (sequence, &len) in lengths.iter().enumerate() {
            spans.push(Span { rows: row..row + len, prefix: Prefix::Rows([0..0, 0..0]) });
            tokens.extend((0..len).map(|position| [row + position, sequence, position].map(|x| x as i32)));
            row += len;
        }
        let qkv: Vec<f32> = as_rounded::<T>(&random(row * heads.qkv_width(), 1));
        let (mut expected, mut lse) = (vec![0.0; row * heads.query_width()], vec![0.0; row * heads.query]);
        cpu::forward(&qkv, heads, &spans, &mut expected, &mut lse);

        // pages in no order, some of which nobody has
        let width = lengths.iter().map(|&len| Pages::<Tested, T>::of_tokens(len)).max().unwrap();
        let tables: Vec<i32> = (0..lengths.len() * width).map(|i| (i * 7 % 23) as i32).collect();
        let mut pages = Pages::new(device, 23, heads).unwrap();
        let there = on(device, &rounded::<T>(&qkv));
        let of = |tokens: &[[i32; 3]]| Tokens::new(device, tokens, &tables, width, 23).unwrap();
        write(device, there.view(), &of(&tokens), &mut pages).unwrap();
        let last: Vec<[i32; 3]> =
            tokens.iter().copied().filter(|&[_, s, position]| position as usize + 1 == lengths[s as usize]).collect();
        let mut out = on(device, &rounded::<T>(&vec![f32::NAN; expected.len()]));
        attention(device, there.view(), &of(&last), &pages, out.view_mut()).unwrap();
        let out = to_f32(&out.to_vec(device).unwrap());
        for [row, ..] in last {
            let row = row as usize * heads.query_width()..(row as usize + 1) * heads.query_width();
            for (got, &expected) in out[row.clone()].iter().zip(&expected[row]) {
                assert!((got - expected).abs() <= T::tolerance(expected, 1.0), "{got} instead of {expected}");
            }
        }
    }

    #[test]
    fn the_last_token_of_every_sequence_attends_to_its_pages() {
        for heads in [Heads { query: 6, key_value: 2, dim: 12 }, Heads { query: 2, key_value: 2, dim: 40 }] {
            for device in devices() {
                check::<f32>(&device, heads);
                check::<bf16>(&device, heads);
            }
        }
    }

    #[test]
    #[should_panic(expected = "not there")]
    fn a_page_that_is_not_there_is_refused() {
        let Some(device) = devices().next() else { panic!("not there") };
        let _ = Tokens::new(&device, &[[0, 0, 0]], &[5], 1, 5);
    }
}
