//! Attention of every span of a batch, and its gradient; see [`ops::attention`](crate::ops::attention).
//!
//! In bf16 heads of 64, 96 and 128 numbers have kernels on the tensor cores.

use half::bf16;

use crate::cuda::Module;
use crate::cuda::attention::Plan;
use crate::cuda::device::{Argument, Buffer, Device, Launch, Number, View, ViewMut};
use crate::error::Result;
use crate::ops::attention::Heads;

pub(crate) static MODULE: Module = Module {
    name: "attention",
    text: concat!(include_str!("../kernels/lanes.cuh"), include_str!("../kernels/attention.cu")),
    kernels: &[
        "attention_forward_64",
        "attention_query_gradient_64",
        "attention_key_gradient_64",
        "attention_forward_96",
        "attention_query_gradient_96",
        "attention_key_gradient_96",
        "attention_forward_128",
        "attention_query_gradient_128",
        "attention_key_gradient_128",
        "attention_delta_f32",
        "attention_add_key_gradients_f32",
        "attention_forward_f32",
        "attention_query_gradient_f32",
        "attention_key_gradient_f32",
        "attention_delta_bf16",
        "attention_add_key_gradients_bf16",
        "attention_forward_bf16",
        "attention_query_gradient_bf16",
        "attention_key_gradient_bf16",
    ],
};

/// The widest head, `32·WIDEST` of the kernels.
const WIDEST: usize = 256;

/// Threads of a block, rows of a tile, keys of a job and queries at a time, numbers beside a row in shared memory: constants of the kernels.
const THREADS: u32 = 128;
const ROWS: usize = 64;
const QUERIES: usize = 32;
const PAD: usize = 8;

/// A [`Plan`] in a device's memory.
pub(crate) struct Tables<D: Device> {
    spans: Buffer<D, [i32; 6]>,
    tiles: Buffer<D, [i32; 2]>,
    jobs: Buffer<D, [i32; 5]>,
    queries: Buffer<D, [i32; 4]>,
    shared: Buffer<D, [i32; 4]>,
    /// Places of the workspace.
    slots: usize,
    /// Rows of the batch.
    rows: usize,
}

impl<D: Device> Tables<D> {
    /// # Errors
    /// Those of [`Device::allocate`] and [`Device::write`].
    pub(crate) fn new(device: &D, plan: &Plan) -> Result<Self> {
        Ok(Self {
            spans: Buffer::of(device, &plan.spans)?,
            tiles: Buffer::of(device, &plan.tiles)?,
            jobs: Buffer::of(device, &plan.jobs)?,
            queries: Buffer::of(device, &plan.queries)?,
            shared: Buffer::of(device, &plan.shared)?,
            slots: plan.slots,
            rows: plan.spans.iter().map(|&[start, rows, ..]| (start + rows) as usize).max().unwrap_or(0),
        })
    }

    /// Numbers of the workspace of the gradient.
    pub(crate) fn workspace(&self, heads: Heads) -> usize {
        self.slots * 2 * heads.key_value_width() * ROWS
    }
}

/// How the kernels of a type and a width of heads are launched.
#[derive(Debug, Clone, Copy)]
struct Kernels {
    /// What their names end with.
    suffix: &'static str,
    /// The width that they take as an argument.
    dim: Option<i32>,
}

impl Kernels {
    fn new<T: Number>(heads: Heads) -> Self {
        let suffix = match heads.dim {
            64 => "64",
            96 => "96",
            128 => "128",
            dim => {
                assert!(dim <= WIDEST, "a head of {dim} numbers is too wide");
                return Self { suffix: T::NAME, dim: Some(dim as i32) };
            }
        };
        // the tensor cores have products of bf16
        match T::IS_ROUNDED {
            true => Self { suffix, dim: None },
            false => Self { suffix: T::NAME, dim: Some(heads.dim as i32) },
        }
    }

    /// Blocks for so many tiles or jobs under as many heads, which hold so many rows of a head in shared memory, and numbers in f32
    /// besides.
    fn launch(self, count: usize, heads: usize, dim: usize, rows: usize, others: usize) -> Launch {
        let bytes = rows * (dim + PAD) * size_of::<bf16>() + others * size_of::<f32>();
        let shared_bytes = if self.dim.is_some() { 0 } else { bytes as u32 };
        Launch { grid: [count as u32, heads as u32, 1], block: [THREADS, 1, 1], shared_bytes }
    }

    /// The arguments with the width of a head behind the first `before`, where the kernel takes it.
    fn arguments<'a>(self, before: usize, arguments: &[Argument<'a>]) -> Vec<Argument<'a>> {
        let (first, rest) = arguments.split_at(before);
        let dim = self.dim.map(Argument::from);
        first.iter().copied().chain(dim).chain(rest.iter().copied()).collect()
    }
}

/// Numbers of heads as the kernels take them.
fn shape(heads: Heads) -> [i32; 2] {
    [heads.query as i32, heads.key_value as i32]
}

/// out `[n, query_width]` and lse `[n, query heads]` of qkv `[n, qkv_width]`.
///
/// # Errors
/// Those of [`Device::launch`].
pub(crate) fn forward<D: Device, T: Number>(
    device: &D,
    qkv: View<'_, T>,
    heads: Heads,
    tables: &Tables<D>,
    out: ViewMut<'_, T>,
    lse: ViewMut<'_, f32>,
) -> Result<()> {
    let n = qkv.len() / heads.qkv_width();
    assert!(qkv.len() == n * heads.qkv_width() && tables.rows <= n && heads.query.is_multiple_of(heads.key_value));
    assert!(out.len() == n * heads.query_width() && lse.len() == n * heads.query);
    let kernels = Kernels::new::<T>(heads);
    let launch = kernels.launch(tables.tiles.view().len(), heads.query, heads.dim, 3 * ROWS, 0);
    let (spans, tiles) = (tables.spans.view().into(), tables.tiles.view().into());
    let arguments = [qkv.into(), spans, tiles, shape(heads).into(), heads.scale().into(), out.into(), lse.into()];
    let name = format!("attention_forward_{}", kernels.suffix);
    // SAFETY: the arguments are the kernel's; rows, heads and widths are those of the views.
    unsafe { device.launch(&MODULE, &name, launch, &kernels.arguments(4, &arguments)) }
}

/// d_qkv `[n, qkv_width]`, overwritten in the rows of the spans, for the derivative d_out of [`forward`]'s result. `delta` is memory for
/// `[n, query heads]`, `workspace` for [`Tables::workspace`] numbers.
///
/// # Errors
/// Those of [`Device::launch`].
#[allow(clippy::too_many_arguments, reason = "what a backward pass reads and writes")]
pub(crate) fn backward<D: Device, T: Number>(
    device: &D,
    qkv: View<'_, T>,
    heads: Heads,
    tables: &Tables<D>,
    [out, d_out]: [View<'_, T>; 2],
    lse: View<'_, f32>,
    [mut delta, mut workspace]: [ViewMut<'_, f32>; 2],
    mut d_qkv: ViewMut<'_, T>,
) -> Result<()> {
    let n = qkv.len() / heads.qkv_width();
    assert!(qkv.len() == n * heads.qkv_width() && tables.rows <= n && heads.query.is_multiple_of(heads.key_value));
    assert!(out.len() == n * heads.query_width() && d_out.len() == out.len() && lse.len() == n * heads.query);
    assert!(delta.len() == lse.len() && d_qkv.len() == qkv.len());
    assert!(workspace.len() >= tables.workspace(heads));
    let kernels = Kernels::new::<T>(heads);
    let run = |name: &str, suffix: &str, launch: Launch, arguments: &[Argument<'_>]| {
        let name = format!("attention_{name}_{suffix}");
        // SAFETY: as in `forward`; places of the workspace are as many as were checked above.
        unsafe { device.launch(&MODULE, &name, launch, arguments) }
    };
    let rows = n * heads.query;
    let arguments = [out.into(), d_out.into(), delta.again().into(), (rows as u64).into(), (heads.dim as i32).into()];
    run("delta", T::NAME, Launch::threads(32 * rows), &arguments)?;

    let (heads_shape, scale) = (shape(heads).into(), heads.scale().into());
    let launch = kernels.launch(tables.tiles.view().len(), heads.query, heads.dim, 2 * ROWS + 2 * QUERIES, 0);
    let (spans, tiles) = (tables.spans.view().into(), tables.tiles.view().into());
    let read = [lse.into(), delta.as_view().into(), d_out.into()];
    let arguments = [&[qkv.into(), spans, tiles, heads_shape, scale], &read[..], &[d_qkv.again().into()]].concat();
    run("query_gradient", kernels.suffix, launch, &kernels.arguments(4, &arguments))?;

    let rows_held = 2 * ROWS + 2 * QUERIES;
    let launch = kernels.launch(tables.jobs.view().len(), heads.key_value, heads.dim, rows_held, 2 * QUERIES);
    let (jobs, queries) = (tables.jobs.view().into(), tables.queries.view().into());
    let read = [lse.into(), delta.as_view().into(), d_out.into()];
    let written = [d_qkv.again().into(), workspace.again().into()];
    let arguments = [&[qkv.into(), jobs, queries, heads_shape, scale], &read[..], &written].concat();
    run("key_gradient", kernels.suffix, launch, &kernels.arguments(4, &arguments))?;

    let grid = [tables.shared.view().len() as u32, heads.key_value as u32, 1];
    let launch = Launch { grid, ..Launch::blocks(1) };
    let dim = (heads.dim as i32).into();
    let arguments = [tables.shared.view().into(), workspace.as_view().into(), heads_shape, dim, d_qkv.again().into()];
    run("add_key_gradients", T::NAME, launch, &arguments)
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;
    use crate::cuda::ops::tests::{OnHost, as_rounded, on, rounded, to_f32};
    use crate::cuda::tested::{Tested, devices};
    use crate::ops::attention::{self as cpu, Prefix, Span};
    use crate::ops::finite_difference::random;

    fn span(rows: Range<usize>, prefix: [Range<usize>; 2]) -> Span<'static> {
        Span { rows, prefix: Prefix::Rows(prefix) }
    }

    /// Rows of a system prompt, a prompt with responses, one of them longer than a tile, and a text by itself.
    fn spans() -> Vec<Span<'static>> {
        let mut spans = vec![span(0..9, [0..0, 0..0]), span(9..14, [0..9, 0..0])];
        let mut row = 14;
        for len in [3, 70, 1] {
            spans.push(span(row..row + len, [0..9, 9..14]));
            row += len;
        }
        spans.push(span(row..row + 67, [0..9, 0..0]));
        spans
    }

    fn check<T: OnHost>(heads: Heads, plan: &Plan) {
        devices().for_each(|device| check_on::<T>(&device, heads, plan));
    }

    fn check_on<T: OnHost>(device: &Tested, heads: Heads, plan: &Plan) {
        let spans = &spans();
        let n = spans.last().map_or(0, |span| span.rows.end);
        let qkv = as_rounded::<T>(&random(n * heads.qkv_width(), 1));
        let d_out = as_rounded::<T>(&random(n * heads.query_width(), 2));
        let (mut out, mut lse) = (vec![0.0; n * heads.query_width()], vec![0.0; n * heads.query]);
        cpu::forward(&qkv, heads, spans, &mut out, &mut lse);
        let mut d_qkv = vec![0.0; qkv.len()];
        cpu::backward(&qkv, heads, spans, &lse, &d_out, &mut d_qkv);

        // what is not written stays NaN
        let nan = |len: usize| on(device, &vec![f32::NAN; len]);
        let nans = |len: usize| on(device, &rounded::<T>(&vec![f32::NAN; len]));
        let tables = Tables::new(device, plan).unwrap();
        let [qkv, d_out] = [&qkv, &d_out].map(|numbers| on(device, &rounded::<T>(numbers)));
        let (mut got, mut got_lse) = (nans(out.len()), nan(lse.len()));
        forward(device, qkv.view(), heads, &tables, got.view_mut(), got_lse.view_mut()).unwrap();
        close(&to_f32(&got.to_vec(device).unwrap()), &out, T::tolerance(1.0, 1.0));
        close(&got_lse.to_vec(device).unwrap(), &lse, 1e-5);

        let (mut delta, mut workspace) = (nan(lse.len()), nan(tables.workspace(heads)));
        let mut gradient = nans(d_qkv.len());
        let (outs, lse) = ([got.view(), d_out.view()], got_lse.view());
        let memory = [delta.view_mut(), workspace.view_mut()];
        backward(device, qkv.view(), heads, &tables, outs, lse, memory, gradient.view_mut()).unwrap();
        close(&to_f32(&gradient.to_vec(device).unwrap()), &d_qkv, T::tolerance(2.0, 1.0));
    }

    /// Asserts that the largest difference is below a share of the largest number.
    fn close(got: &[f32], expected: &[f32], share: f32) {
        let largest = expected.iter().fold(0f32, |m, x| m.max(x.abs()));
        let worst = got
            .iter()
            .zip(expected)
            .map(|(g, e)| (g - e).abs())
            .fold(0.0, |m: f32, d| if d > m || d.is_nan() { d } else { m });
        assert!(worst <= share * largest, "{worst} of {largest}");
    }

    #[test]
    fn attention_and_its_gradient_are_those_of_the_cpu() {
        let plan = Plan::backward(&spans());
        for (query, key_value, dim) in [(1, 1, 4), (6, 2, 24)] {
            let heads = Heads { query, key_value, dim };
            check::<f32>(heads, &plan);
            check::<bf16>(heads, &plan);
        }
    }

    #[test]
    fn heads_of_every_width_with_kernels_on_the_tensor_cores_are_those_of_the_cpu() {
        let plan = Plan::backward(&spans());
        for (query, key_value, dim) in [(3, 1, 64), (2, 1, 96), (2, 2, 128)] {
            check::<bf16>(Heads { query, key_value, dim }, &plan);
        }
    }

    #[test]
    fn keys_that_many_see_add_up_in_the_workspace() {
        let heads = Heads { query: 2, key_value: 1, dim: 64 };
        let plan = Plan::with_jobs(&spans(), 50);
        assert!(plan.slots > 2);
        check::<f32>(Heads { dim: 4, ..heads }, &plan);
        check::<bf16>(heads, &plan);
    }
}
