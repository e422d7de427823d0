//! What runs kernels, and what they work on.
//!
//! Kernels run, and memory is copied, in the order in which the host asks for it. The host does not wait, except in
//! [`Device::read`].
#![allow(unsafe_code)]

use std::fmt::Debug;
use std::marker::PhantomData;
use std::ops::Range;

use super::Module;
use crate::error::Result;
pub(crate) use crate::ops::Number;
use bytemuck::Pod;

/// Something that runs kernels.
pub(crate) trait Device: Debug + 'static {
    /// A piece of its memory, which is free for others when this is dropped.
    type Memory: Memory;

    /// So many bytes, all zero.
    ///
    /// # Errors
    /// [`Error::Failed`](crate::Error::Failed) where there is no room for them.
    fn allocate(&self, bytes: usize) -> Result<Self::Memory>;

    /// Copies bytes to the beginning of a piece of memory, which is at least as long.
    ///
    /// # Errors
    /// [`Error::Failed`](crate::Error::Failed) where the device fails, now or in what it was asked for before.
    fn write(&self, memory: &mut Self::Memory, bytes: &[u8]) -> Result<()>;

    /// Copies the beginning of a piece of memory, which is at least as long, once all that was asked for before is done.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    fn read(&self, memory: &Self::Memory, bytes: &mut [u8]) -> Result<()>;

    /// Runs a kernel; in no thread where the grid has no block.
    ///
    /// # Safety
    /// The arguments are those of the kernel's definition, in number, order and type; with these and `shape` it stays within
    /// the views among them.
    ///
    /// # Errors
    /// As [`write`](Self::write), and where the kernel does not compile.
    unsafe fn launch(
        &self,
        module: &'static Module,
        kernel: &str,
        shape: Launch,
        arguments: &[Argument<'_>],
    ) -> Result<()>;

    /// Multiplies matrices, of which none is empty.
    ///
    /// # Safety
    /// All elements that shape and strides reach must be within the device's memory, and out must not overlap a or b.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    unsafe fn multiply(&self, product: &Product, scale: f32) -> Result<()>;
}

/// A product of matrices, row-major: out = scale·a·b, or out += scale·a·b, with sums in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Product {
    /// Rows of a and out, columns of b and out, and columns of a, which are the rows of b.
    pub(crate) shape: [usize; 3],
    pub(crate) a: Operand,
    pub(crate) b: Operand,
    /// Never transposed.
    pub(crate) out: Operand,
    /// Whether the result is added to what is there.
    pub(crate) add: bool,
}

/// How a matrix of a product lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Operand {
    /// Where it starts.
    pub(crate) address: u64,
    /// Whether its numbers are in bf16; else in f32. Both factors are of one type.
    pub(crate) rounded: bool,
    /// Numbers from a row to the next, as they lie in memory.
    pub(crate) stride: usize,
    /// Whether the rows in memory are the matrix's columns.
    pub(crate) transposed: bool,
}

#[cfg(test)]
impl Operand {
    /// Bytes of a number.
    pub(crate) fn size(self) -> usize {
        if self.rounded { size_of::<half::bf16>() } else { size_of::<f32>() }
    }
}

/// A piece of a device's memory.
pub(crate) trait Memory: Debug {
    /// Its address on the device.
    fn address(&self) -> u64;
}

/// In how many threads a kernel runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Launch {
    /// Blocks in each dimension.
    pub(crate) grid: [u32; 3],
    /// Threads of a block in each dimension.
    pub(crate) block: [u32; 3],
    /// Bytes of shared memory of a block, besides those of variables.
    pub(crate) shared_bytes: u32,
}

impl Launch {
    /// Threads of a block where nothing asks for another number.
    pub(crate) const BLOCK: u32 = 256;

    /// As many threads, and more to the end of the last block.
    pub(crate) fn threads(count: usize) -> Self {
        Self::blocks(count.div_ceil(Self::BLOCK as usize))
    }

    /// A thread for each element of a matrix, and more to the end of the last block of each row: blocks are of one row each, which
    /// is their place in the first dimension, and go through its columns in the second.
    pub(crate) fn elements(rows: usize, width: usize) -> Self {
        let columns = Self::threads(width).grid[0];
        Self { grid: [rows as u32, columns, 1], ..Self::blocks(0) }
    }

    /// As many blocks of [`BLOCK`](Self::BLOCK) threads.
    pub(crate) fn blocks(count: usize) -> Self {
        Self { grid: [count as u32, 1, 1], block: [Self::BLOCK, 1, 1], shared_bytes: 0 }
    }
}

/// An argument of a kernel: a pointer, or a value of up to 32 bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Argument<'a> {
    /// The value's bytes come first.
    words: [u64; 4],
    /// Keeps what a pointer points to.
    memory: PhantomData<&'a mut ()>,
}

impl Argument<'_> {
    fn new(value: impl Pod) -> Self {
        let mut words = [0; 4];
        let value = bytemuck::bytes_of(&value);
        bytemuck::bytes_of_mut(&mut words)[..value.len()].copy_from_slice(value);
        Self { words, memory: PhantomData }
    }

    /// Where the value is, as those who launch kernels want to have it.
    pub(super) fn as_ptr(&self) -> *const u8 {
        self.words.as_ptr().cast()
    }
}

/// Makes arguments of what kernels take by value.
macro_rules! by_value {
    ($($type:ty),*) => {
        $(impl From<$type> for Argument<'_> {
            fn from(value: $type) -> Self {
                Self::new(value)
            }
        })*
    };
}

// a size is a `size_t`, and an array a structure of as many
by_value!(i32, u32, u64, usize, f32, [i32; 2], [f32; 8]);

impl<'a, T> From<View<'a, T>> for Argument<'a> {
    fn from(view: View<'a, T>) -> Self {
        Self::new(view.address)
    }
}

impl<'a, T> From<ViewMut<'a, T>> for Argument<'a> {
    fn from(view: ViewMut<'a, T>) -> Self {
        Self::new(view.address)
    }
}

/// Numbers in a device's memory.
#[derive(Debug)]
pub(crate) struct Buffer<D: Device, T> {
    /// Nothing where there are no numbers.
    memory: Option<D::Memory>,
    len: usize,
    numbers: PhantomData<T>,
}

// not derived, which would ask as much of D and T
impl<D: Device, T> Default for Buffer<D, T> {
    fn default() -> Self {
        Self { memory: None, len: 0, numbers: PhantomData }
    }
}

impl<D: Device, T: Pod> Buffer<D, T> {
    /// Zeros.
    ///
    /// # Errors
    /// Those of [`Device::allocate`].
    pub(crate) fn zeros(device: &D, len: usize) -> Result<Self> {
        Ok(Self { memory: Some(device.allocate(len * size_of::<T>())?), len, numbers: PhantomData })
    }

    /// A copy of numbers of the host.
    ///
    /// # Errors
    /// Those of [`Device::allocate`] and [`Device::write`].
    pub(crate) fn of(device: &D, numbers: &[T]) -> Result<Self> {
        let mut memory = device.allocate(size_of_val(numbers))?;
        device.write(&mut memory, bytemuck::cast_slice(numbers))?;
        Ok(Self { memory: Some(memory), len: numbers.len(), numbers: PhantomData })
    }

    /// Makes room for so many numbers; what they are is arbitrary.
    ///
    /// # Errors
    /// Those of [`Device::allocate`].
    pub(crate) fn fit(&mut self, device: &D, len: usize) -> Result<()> {
        if self.len < len {
            // what there is goes first, so that both are never there together
            *self = Self::default();
            *self = Self::zeros(device, len)?;
            #[cfg(test)]
            if let Some(memory) = &mut self.memory {
                // no number in any type, so that tests notice who reads what was not written
                device.write(memory, &vec![0xff; len * size_of::<T>()])?;
            }
        }
        Ok(())
    }

    /// A copy on the host.
    ///
    /// # Errors
    /// Those of [`Device::read`].
    pub(crate) fn to_vec(&self, device: &D) -> Result<Vec<T>> {
        self.first(device, self.len)
    }

    /// A copy of the first numbers on the host.
    ///
    /// # Panics
    /// If there are not as many.
    ///
    /// # Errors
    /// Those of [`Device::read`].
    pub(crate) fn first(&self, device: &D, len: usize) -> Result<Vec<T>> {
        assert!(len <= self.len);
        let mut numbers = vec![T::zeroed(); len];
        if let Some(memory) = &self.memory {
            device.read(memory, bytemuck::cast_slice_mut(&mut numbers))?;
        }
        Ok(numbers)
    }

    fn address(&self) -> u64 {
        self.memory.as_ref().map_or(0, Memory::address)
    }

    /// All of it, to read.
    pub(crate) fn view(&self) -> View<'_, T> {
        View { address: self.address(), len: self.len, memory: PhantomData }
    }

    /// All of it, to write.
    pub(crate) fn view_mut(&mut self) -> ViewMut<'_, T> {
        ViewMut { address: self.address(), len: self.len, memory: PhantomData }
    }
}

/// Numbers next to each other in a device's memory, to read.
#[derive(Debug)]
pub(crate) struct View<'a, T> {
    address: u64,
    len: usize,
    memory: PhantomData<&'a [T]>,
}

impl<T> Clone for View<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for View<'_, T> {}

impl<'a> View<'a, f32> {
    /// The same numbers, if those of T are such.
    pub(crate) fn as_numbers<T: Number>(self) -> Option<View<'a, T>> {
        (!T::IS_ROUNDED).then_some(View { address: self.address, len: self.len, memory: PhantomData })
    }
}

impl<T> View<'_, T> {
    /// Where they start.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// How many.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Some of them.
    ///
    /// # Panics
    /// If there are not as many.
    pub(crate) fn range(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len);
        Self { address: self.address + (range.start * size_of::<T>()) as u64, len: range.len(), memory: PhantomData }
    }
}

/// Numbers next to each other in a device's memory, to write.
#[derive(Debug)]
pub(crate) struct ViewMut<'a, T> {
    address: u64,
    len: usize,
    memory: PhantomData<&'a mut [T]>,
}

impl<T> ViewMut<'_, T> {
    /// The same numbers, to write for a while.
    pub(crate) fn again(&mut self) -> ViewMut<'_, T> {
        ViewMut { address: self.address, len: self.len, memory: PhantomData }
    }

    /// The same numbers, to read.
    pub(crate) fn as_view(&self) -> View<'_, T> {
        View { address: self.address, len: self.len, memory: PhantomData }
    }

    /// Where they start.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// How many.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Some of them.
    ///
    /// # Panics
    /// If there are not as many.
    pub(crate) fn range(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len);
        Self { address: self.address + (range.start * size_of::<T>()) as u64, len: range.len(), memory: PhantomData }
    }
}

/// Numbers of rows or columns in a device's memory, which are known to be below a bound: kernels do not check them.
#[derive(Debug)]
pub(crate) struct Indices<D: Device> {
    numbers: Buffer<D, u32>,
    bound: usize,
}

impl<D: Device> Indices<D> {
    /// A copy of numbers of the host.
    ///
    /// # Errors
    /// Those of [`Buffer::of`].
    pub(crate) fn new(device: &D, numbers: &[u32]) -> Result<Self> {
        let bound = numbers.iter().max().map_or(0, |&most| most as usize + 1);
        Ok(Self { numbers: Buffer::of(device, numbers)?, bound })
    }

    /// All of them.
    pub(crate) fn view(&self) -> IndexView<'_> {
        IndexView { numbers: self.numbers.view(), bound: self.bound }
    }
}

/// Some of [`Indices`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct IndexView<'a> {
    numbers: View<'a, u32>,
    bound: usize,
}

impl IndexView<'_> {
    /// How many.
    pub(crate) fn len(self) -> usize {
        self.numbers.len()
    }

    /// What all of them are below.
    pub(crate) fn bound(self) -> usize {
        self.bound
    }

    /// Some of them.
    ///
    /// # Panics
    /// If there are not as many.
    pub(crate) fn range(self, range: Range<usize>) -> Self {
        Self { numbers: self.numbers.range(range), ..self }
    }
}

impl<'a> From<IndexView<'a>> for Argument<'a> {
    fn from(view: IndexView<'a>) -> Self {
        view.numbers.into()
    }
}
