//! The devices that operations are tested on: the emulator, and the first GPU where there is one.
#![allow(unsafe_code)]

use std::io::Write as _;
use std::sync::Once;

use super::Module;
use super::device::{Argument, Device, Launch, Memory, Product};
use super::emulator::Emulator;
use super::gpu::Gpu;
use crate::error::Result;

/// One of them.
#[derive(Debug)]
pub(crate) enum Tested {
    Emulator(Emulator),
    Gpu(Box<Gpu>),
}

/// A piece of its memory.
#[derive(Debug)]
pub(crate) enum TestedMemory {
    Emulator(<Emulator as Device>::Memory),
    Gpu(<Gpu as Device>::Memory),
}

/// The devices that are here; says loudly what is not.
pub(crate) fn devices() -> impl Iterator<Item = Tested> {
    static SAID: Once = Once::new();
    let gpu = Gpu::open(0);
    if let Err(reason) = &gpu {
        // not `eprintln!`, which a passing test hides
        SAID.call_once(|| {
            let _ = writeln!(std::io::stderr(), "SKIPPED: kernels are not tested on a GPU. {reason}");
        });
    }
    Emulator::new().map(Tested::Emulator).into_iter().chain(gpu.ok().map(|gpu| Tested::Gpu(Box::new(gpu))))
}

impl Memory for TestedMemory {
    fn address(&self) -> u64 {
        match self {
            Self::Emulator(memory) => memory.address(),
            Self::Gpu(memory) => memory.address(),
        }
    }
}

impl Device for Tested {
    type Memory = TestedMemory;

    fn allocate(&self, bytes: usize) -> Result<TestedMemory> {
        match self {
            Self::Emulator(device) => device.allocate(bytes).map(TestedMemory::Emulator),
            Self::Gpu(device) => device.allocate(bytes).map(TestedMemory::Gpu),
        }
    }

    fn write(&self, memory: &mut TestedMemory, bytes: &[u8]) -> Result<()> {
        match (self, memory) {
            (Self::Emulator(device), TestedMemory::Emulator(memory)) => device.write(memory, bytes),
            (Self::Gpu(device), TestedMemory::Gpu(memory)) => device.write(memory, bytes),
            _ => panic!("the memory is another device's"),
        }
    }

    fn read(&self, memory: &TestedMemory, bytes: &mut [u8]) -> Result<()> {
        match (self, memory) {
            (Self::Emulator(device), TestedMemory::Emulator(memory)) => device.read(memory, bytes),
            (Self::Gpu(device), TestedMemory::Gpu(memory)) => device.read(memory, bytes),
            _ => panic!("the memory is another device's"),
        }
    }

    unsafe fn launch(
        &self,
        module: &'static Module,
        kernel: &str,
        shape: Launch,
        arguments: &[Argument<'_>],
    ) -> Result<()> {
        // SAFETY: the caller's promise is the same.
        unsafe {
            match self {
                Self::Emulator(device) => device.launch(module, kernel, shape, arguments),
                Self::Gpu(device) => device.launch(module, kernel, shape, arguments),
            }
        }
    }

    unsafe fn multiply(&self, product: &Product, scale: f32) -> Result<()> {
        // SAFETY: the caller's promise is the same.
        unsafe {
            match self {
                Self::Emulator(device) => device.multiply(product, scale),
                Self::Gpu(device) => device.multiply(product, scale),
            }
        }
    }
}
