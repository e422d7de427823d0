//! A device for tests: the kernels, compiled by the C++ compiler of this machine, on the memory of the host.
//!
//! Every launch runs twice, with threads and blocks in order and in reverse; both must leave the same bytes in all of the
//! memory. What lies around a piece of memory must stay as it is, and numbers there are NaN.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CStr, c_char};
use std::fmt::Write as _;
use std::io::Write as _;
use std::process::Command;
use std::rc::Rc;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use half::bf16;
use libloading::Library;

use super::Module;
use super::device::{Argument, Device, Launch, Memory, Operand, Product};
use crate::error::{Error, Result};

/// Bytes around a piece of memory that must stay as they are.
const GUARD: usize = 1024;

/// The device.
#[derive(Debug, Default)]
pub(crate) struct Emulator {
    /// All memory in use.
    pieces: Rc<RefCell<Vec<Piece>>>,
}

/// Addresses of a piece of memory with what lies around it.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Piece {
    start: *mut u8,
    layout: Layout,
}

impl Piece {
    fn new(bytes: usize) -> Self {
        let layout = Layout::from_size_align(bytes + 2 * GUARD, 256).unwrap();
        // SAFETY: the size is not zero.
        let start = unsafe { alloc_zeroed(layout) };
        assert!(!start.is_null());
        let mut piece = Self { start, layout };
        let end = piece.all().len() - GUARD;
        piece.all_mut()[..GUARD].fill(0xff);
        piece.all_mut()[end..].fill(0xff);
        piece
    }

    fn all(&self) -> &[u8] {
        // SAFETY: the memory is there until it leaves the list of pieces, and only `launch` and `write`, which return before
        // another borrow begins, write to it.
        unsafe { std::slice::from_raw_parts(self.start, self.layout.size()) }
    }

    fn all_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.layout.size()) }
    }

    fn is_intact(&self) -> bool {
        let all = self.all();
        all[..GUARD].iter().chain(&all[all.len() - GUARD..]).all(|&byte| byte == 0xff)
    }
}

/// A piece of memory in use.
#[derive(Debug)]
pub(crate) struct Emulated {
    piece: Piece,
    pieces: Rc<RefCell<Vec<Piece>>>,
}

impl Memory for Emulated {
    fn address(&self) -> u64 {
        self.piece.start as u64 + GUARD as u64
    }
}

impl Drop for Emulated {
    fn drop(&mut self) {
        self.pieces.borrow_mut().retain(|piece| *piece != self.piece);
        // SAFETY: it was allocated with this layout, and nothing refers to it.
        unsafe { dealloc(self.piece.start, self.piece.layout) };
    }
}

/// [`Launch`] as the emulator reads it.
#[repr(C)]
struct Order {
    launch: Launch,
    reverse: u32,
}

type Launcher = unsafe extern "C" fn(*const Order, *const *const u8) -> *const c_char;

impl Emulator {
    /// The device, or nothing (loudly) where there is no C++ compiler, or no C library with the fibers that it needs.
    pub(crate) fn new() -> Option<Self> {
        let reason = if !cfg!(all(target_os = "linux", target_env = "gnu")) {
            "kernels run on the CPU on Linux with glibc only".into()
        } else if Command::new(compiler()).arg("--version").output().is_err() {
            format!("there is no C++ compiler {}; set CXX to one", compiler())
        } else {
            return Some(Self::default());
        };
        // not `eprintln!`, which a passing test hides
        let _ = writeln!(std::io::stderr(), "SKIPPED: {reason}.");
        None
    }

    fn run(launcher: Launcher, shape: Launch, reverse: bool, arguments: &[*const u8]) -> Result<()> {
        let order = Order { launch: shape, reverse: reverse.into() };
        // SAFETY: the library's function takes these; of the kernel's arguments the caller of `launch` promises it.
        let failure = unsafe { launcher(&order, arguments.as_ptr()) };
        if failure.is_null() {
            return Ok(());
        }
        // SAFETY: the message is there until this thread launches another kernel.
        Err(Error::Failed(unsafe { CStr::from_ptr(failure) }.to_string_lossy().into_owned()))
    }
}

impl Device for Emulator {
    type Memory = Emulated;

    fn allocate(&self, bytes: usize) -> Result<Emulated> {
        let piece = Piece::new(bytes);
        self.pieces.borrow_mut().push(piece);
        Ok(Emulated { piece, pieces: self.pieces.clone() })
    }

    fn write(&self, memory: &mut Emulated, bytes: &[u8]) -> Result<()> {
        memory.piece.all_mut()[GUARD..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn read(&self, memory: &Emulated, bytes: &mut [u8]) -> Result<()> {
        bytes.copy_from_slice(&memory.piece.all()[GUARD..][..bytes.len()]);
        Ok(())
    }

    unsafe fn launch(
        &self,
        module: &'static Module,
        kernel: &str,
        shape: Launch,
        arguments: &[Argument<'_>],
    ) -> Result<()> {
        let library = library(module);
        // SAFETY: the text that `launchers` makes defines it so.
        let launcher = *unsafe { library.get::<Launcher>(format!("launch_{kernel}")) }.unwrap();
        let arguments: Vec<*const u8> = arguments.iter().map(Argument::as_ptr).collect();
        let mut pieces = self.pieces.borrow_mut();
        let copies = |pieces: &[Piece]| pieces.iter().map(|piece| piece.all().to_vec()).collect::<Vec<_>>();
        let before = copies(&pieces);
        Self::run(launcher, shape, false, &arguments)?;
        let after = copies(&pieces);
        pieces.iter_mut().zip(&before).for_each(|(piece, before)| piece.all_mut().copy_from_slice(before));
        Self::run(launcher, shape, true, &arguments)?;
        let failed = |what: &str| Err(Error::Failed(format!("{kernel} {what}")));
        if !pieces.iter().all(Piece::is_intact) {
            return failed("has written beside a buffer");
        }
        if pieces.iter().zip(&after).any(|(piece, after)| piece.all() != after) {
            return failed("has another result when threads run in reverse order");
        }
        Ok(())
    }

    unsafe fn multiply(&self, product: &Product, scale: f32) -> Result<()> {
        let Product { shape: [m, n, k], a, b, out, add } = *product;
        // SAFETY: the caller's promise.
        let [a, b] = unsafe { [numbers(a, m, k), numbers(b, k, n)] };
        let at = |row: usize, column: usize| out.address + ((row * out.stride + column) * out.size()) as u64;
        for row in 0..m {
            for column in 0..n {
                let sum: f64 = (0..k).map(|i| f64::from(a[row * k + i]) * f64::from(b[i * n + column])).sum();
                let product = scale * sum as f32;
                // SAFETY: the caller's promise.
                unsafe {
                    if out.rounded {
                        let to = at(row, column) as *mut bf16;
                        *to = bf16::from_f32(product + if add { (*to).to_f32() } else { 0.0 });
                    } else {
                        let to = at(row, column) as *mut f32;
                        *to = product + if add { *to } else { 0.0 };
                    }
                }
            }
        }
        Ok(())
    }
}

/// The numbers of a matrix, row by row.
///
/// # Safety
/// They must be valid to read.
unsafe fn numbers(operand: Operand, rows: usize, columns: usize) -> Vec<f32> {
    let at = |row: usize, column: usize| {
        let place = if operand.transposed { column * operand.stride + row } else { row * operand.stride + column };
        let address = operand.address + (place * operand.size()) as u64;
        // SAFETY: the caller's promise.
        unsafe { if operand.rounded { (*(address as *const bf16)).to_f32() } else { *(address as *const f32) } }
    };
    (0..rows).flat_map(|row| (0..columns).map(move |column| at(row, column))).collect()
}

/// The C++ compiler.
fn compiler() -> String {
    std::env::var("CXX").unwrap_or_else(|_| "c++".into())
}

/// The kernels of a module, compiled once.
fn library(module: &'static Module) -> Arc<Library> {
    static LIBRARIES: LazyLock<Mutex<HashMap<&str, Arc<Library>>>> = LazyLock::new(Mutex::default);
    // a module that does not compile fails its own tests and no others
    let mut libraries = LIBRARIES.lock().unwrap_or_else(PoisonError::into_inner);
    libraries.entry(module.name).or_insert_with(|| Arc::new(compile(module))).clone()
}

fn compile(module: &Module) -> Library {
    let folder = tempfile::tempdir().unwrap();
    let (source, library) = (folder.path().join("kernels.cpp"), folder.path().join("kernels.so"));
    let header = include_str!("emulator/emulator.h");
    let text = format!("#line 1 \"emulator.h\"\n{header}\n{}\n{}", module.source(), launchers(module));
    std::fs::write(&source, text).unwrap();
    // as NVRTC is told: no contraction of products and sums
    let output = Command::new(compiler())
        .args(["-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing"])
        // checked versions of the jumps refuse to go from one stack to another
        .args(["-U_FORTIFY_SOURCE", "-o"])
        .args([&library, &source])
        .output()
        .unwrap();
    assert!(output.status.success(), "{} does not compile:\n{}", module.name, String::from_utf8_lossy(&output.stderr));
    // SAFETY: loading it runs nothing but the constructors of the C++ library.
    unsafe { Library::new(&library) }.unwrap()
}

/// For each kernel a function that the host can call without knowing its parameters.
fn launchers(module: &Module) -> String {
    let mut text = String::new();
    for kernel in module.kernels {
        writeln!(
            text,
            "extern \"C\" const char *launch_{kernel}(const emulator::Launch *how, void *const *arguments) {{\n    \
             return emulator::launch({kernel}, *how, arguments);\n}}"
        )
        .unwrap();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::device::Buffer;
    use crate::ops::finite_difference::random;

    static BROKEN: Module = Module {
        name: "broken",
        text: r#"
            extern "C" __global__ void neighbour(float *x, int barrier) {
                __shared__ float all[64];
                all[threadIdx.x] = x[threadIdx.x];
                if (barrier) __syncthreads();
                x[threadIdx.x] = all[(threadIdx.x + 1) % 64];
            }
            extern "C" __global__ void blocks(float *x) { x[0] = blockIdx.x; }
            extern "C" __global__ void beside(float *x, int at) { x[at] = 1; }
            extern "C" __global__ void beyond_shared(float *x, int at) {
                extern __shared__ __align__(16) char shared[];
                ((float *)shared)[at] = 1;
                x[0] = ((float *)shared)[0];
            }
            extern "C" __global__ void half_a_barrier() {
                if (threadIdx.x < 32) __syncthreads();
            }
            extern "C" __global__ void half_a_warp(int *x) {
                if (threadIdx.x % 2) x[threadIdx.x] = __shfl_sync(0xffffffff, 1, 0);
            }
        "#,
        kernels: &["neighbour", "blocks", "beside", "beyond_shared", "half_a_barrier", "half_a_warp"],
    };

    fn launch(device: &Emulator, kernel: &str, grid: u32, arguments: &[Argument<'_>]) -> Result<()> {
        let shape = Launch { grid: [grid, 1, 1], block: [64, 1, 1], shared_bytes: 256 };
        // SAFETY: the arguments are those of the kernels above, and what is written beside a buffer stays in its guard.
        unsafe { device.launch(&BROKEN, kernel, shape, arguments) }
    }

    #[test]
    fn what_would_be_wrong_on_a_gpu_is_an_error() {
        let Some(device) = Emulator::new() else { return };
        let numbers = random(64, 1);
        let mut x = Buffer::of(&device, &numbers).unwrap();
        let mut run = |kernel, grid, arguments: &[Argument<'_>]| {
            let x = x.view_mut().into();
            launch(&device, kernel, grid, &[&[x], arguments].concat())
        };
        run("neighbour", 1, &[1.into()]).unwrap();
        run("blocks", 1, &[]).unwrap();
        run("beside", 1, &[63.into()]).unwrap();
        run("beyond_shared", 1, &[63.into()]).unwrap();
        let mut fails = |kernel, grid, arguments: &[Argument<'_>], why: &str| {
            let message = run(kernel, grid, arguments).unwrap_err().to_string();
            assert!(message.contains(why), "{message}");
        };
        fails("neighbour", 1, &[0.into()], "reverse order");
        fails("blocks", 2, &[], "reverse order");
        fails("beyond_shared", 1, &[64.into()], "beyond the shared memory");
        fails("half_a_warp", 1, &[], "__shfl_sync");
        let message = launch(&device, "half_a_barrier", 1, &[]).unwrap_err().to_string();
        assert!(message.contains("thread 0 waits in __syncthreads"), "{message}");
        for at in [-1, 64] {
            let fresh = Emulator::default();
            let mut x = Buffer::of(&fresh, &numbers).unwrap();
            let message = launch(&fresh, "beside", 1, &[x.view_mut().into(), at.into()]).unwrap_err().to_string();
            assert!(message.contains("beside a buffer"), "{message}");
        }
    }

    /// Fragments as the instruction set's manual (PTX ISA, "Matrix fragments for mma.m16n8k16") numbers their elements.
    static MATRICES: Module = Module {
        name: "matrices",
        text: r#"
            extern "C" __global__ void product(const float *a, const float *b, float *d) {
                int group = threadIdx.x >> 2, in_group = threadIdx.x % 4;
                bf16 left[8], right[4];
                for (int i = 0; i < 8; i++) {
                    int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
                    int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
                    left[i] = from_float<bf16>(a[16 * row + column]);
                }
                for (int i = 0; i < 4; i++)
                    right[i] = from_float<bf16>(b[8 * (in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)) + group]);
                float sum[4];
                for (int i = 0; i < 4; i++) sum[i] = d[8 * (i < 2 ? group : group + 8) + in_group * 2 + (i & 1)];
                mma_m16n8k16_bf16(sum, (const uint32_t *)left, (const uint32_t *)right);
                for (int i = 0; i < 4; i++) d[8 * (i < 2 ? group : group + 8) + in_group * 2 + (i & 1)] = sum[i];
            }
            extern "C" __global__ void load(const bf16 *matrices, bf16 *fragments) {
                uint32_t *to = (uint32_t *)fragments;
                ldmatrix_x2(to + 2 * threadIdx.x, matrices + 8 * (threadIdx.x % 16));
                ldmatrix_x2_trans(to + 64 + 2 * threadIdx.x, matrices + 8 * (threadIdx.x % 16));
                ldmatrix_x4(to + 128 + 4 * threadIdx.x, matrices + 8 * threadIdx.x);
                ldmatrix_x4_trans(to + 256 + 4 * threadIdx.x, matrices + 8 * threadIdx.x);
            }
        "#,
        kernels: &["product", "load"],
    };

    const ONE_WARP: Launch = Launch { grid: [1; 3], block: [32, 1, 1], shared_bytes: 0 };

    #[test]
    fn fragments_lie_as_the_manual_says() {
        let Some(device) = Emulator::new() else { return };
        let (a, b, c) = (random(256, 1), random(128, 2), random(128, 3));
        let [left, right] = [&a, &b].map(|numbers| Buffer::of(&device, numbers).unwrap());
        let mut d = Buffer::of(&device, &c).unwrap();
        let arguments = [left.view().into(), right.view().into(), d.view_mut().into()];
        // SAFETY: the arguments are those of the kernel above.
        unsafe { device.launch(&MATRICES, "product", ONE_WARP, &arguments) }.unwrap();
        let rounded = |x: f32| half::bf16::from_f32(x).to_f32();
        for (i, d) in d.to_vec(&device).unwrap().into_iter().enumerate() {
            let products = (0..16).map(|k| rounded(a[i / 8 * 16 + k]) * rounded(b[k * 8 + i % 8]));
            assert!((d - c[i] - products.sum::<f32>()).abs() < 1e-5);
        }

        let numbers: Vec<u16> = (0..256).collect();
        let matrices = Buffer::of(&device, &numbers).unwrap();
        let mut fragments = Buffer::zeros(&device, 768).unwrap();
        let arguments = [matrices.view().into(), fragments.view_mut().into()];
        // SAFETY: the arguments are those of the kernel above.
        unsafe { device.launch(&MATRICES, "load", ONE_WARP, &arguments) }.unwrap();
        let fragments: Vec<u16> = fragments.to_vec(&device).unwrap();
        let number = |matrix: usize, row: usize, column: usize| (64 * matrix + 8 * row + column) as u16;
        for (start, count) in [(0, 2), (256, 4)] {
            for lane in 0..32 {
                let (row, column) = (lane / 4, lane % 4 * 2);
                for matrix in 0..count {
                    let plain = start + (lane * count + matrix) * 2;
                    let transposed = plain + 64 * count;
                    assert_eq!(fragments[plain..][..2], [0, 1].map(|i| number(matrix, row, column + i)));
                    assert_eq!(fragments[transposed..][..2], [0, 1].map(|i| number(matrix, column + i, row)));
                }
            }
        }
    }
}
