//! A GPU, by NVIDIA's driver. **It has not run on a GPU yet**; the tests see that a machine without one is told so.
//!
//! The driver's library is loaded when it is first needed, so that the program runs where there is none.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::result::{device, launch_kernel};
use cudarc::driver::sys::{self, CUdevice_attribute, CUfunction_attribute_enum};
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtr, DriverError};

use super::Module;
use super::blas::Blas;
use super::cache::Cache;
use super::device::{Argument, Device, Launch, Memory, Product};
use super::nvrtc::Nvrtc;
use crate::error::{Error, Result};

/// The oldest version of CUDA, as the driver numbers it, that has all functions which are used here.
const OLDEST_DRIVER: i32 = 12_000;

/// The oldest architecture that kernels are written for: the first with products in bf16.
const OLDEST_ARCHITECTURE: (i32, i32) = (8, 0);

/// Shared memory that a block gets without being asked for more.
const SHARED_BYTES: u32 = 48 << 10;

/// A GPU of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Description {
    /// Its number for [`Gpu::open`].
    pub(crate) number: usize,
    /// As its maker calls it.
    pub(crate) name: String,
    /// Compute capability, major and minor.
    pub(crate) architecture: (i32, i32),
    /// Bytes of its memory.
    pub(crate) memory: usize,
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { number, name, architecture: (major, minor), memory } = self;
        write!(f, "cuda:{number} {name}, compute capability {major}.{minor}, {}", crate::memory::in_words(*memory))
    }
}

/// The GPUs of this machine that kernels are written for; at least one.
///
/// # Errors
/// [`Error::Failed`] with the reason why none can be used: no driver, an old one, no GPU.
pub(crate) fn list() -> Result<Vec<Description>> {
    load_driver()?;
    let count = CudaContext::device_count().map_err(driver("count its GPUs"))?;
    let all = (0..count).map(describe).collect::<Result<Vec<_>>>()?;
    let (usable, others): (Vec<_>, Vec<_>) = all.into_iter().partition(|d| d.architecture >= OLDEST_ARCHITECTURE);
    match others.first() {
        _ if !usable.is_empty() => Ok(usable),
        Some(old) => Err(Error::Failed(format!("{old}, has no instructions for bf16; compute capability 8.0 does."))),
        None => Err(Error::Failed("NVIDIA's driver finds no GPU.".into())),
    }
}

fn describe(number: i32) -> Result<Description> {
    let known = || -> std::result::Result<_, DriverError> {
        let device = device::get(number)?;
        // SAFETY: the driver has just named the device.
        unsafe {
            let major =
                device::get_attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
            let minor =
                device::get_attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
            Ok((device::get_name(device)?, (major, minor), device::total_mem(device)?))
        }
    };
    let (name, architecture, memory) = known().map_err(driver("describe a GPU"))?;
    Ok(Description { number: number as usize, name, architecture, memory })
}

/// Loads the driver's library and starts it.
fn load_driver() -> Result<()> {
    // SAFETY: loading the library runs nothing but its own constructors.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::Failed("There is no NVIDIA driver (its library libcuda).".into()));
    }
    let mut version = 0;
    // SAFETY: the library is there, and the pointer is valid.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(driver("tell its version"))?;
    if version < OLDEST_DRIVER {
        let (major, minor) = (version / 1000, version % 1000 / 10);
        return Err(Error::Failed(format!(
            "NVIDIA's driver is for CUDA {major}.{minor}, which is too old. Install one for CUDA 12.0 or newer."
        )));
    }
    cudarc::driver::result::init().map_err(driver("start"))
}

/// An error of the driver, for use with `map_err`.
fn driver(what: &str) -> impl Fn(DriverError) -> Error {
    move |error| {
        let text = error.error_string().map_or_else(|_| format!("{:?}", error.0), |text| text.to_string_lossy().into());
        Error::Failed(format!("NVIDIA's driver could not {what}: {text}."))
    }
}

/// A GPU in use. All that it is asked for goes through one stream.
#[derive(Debug)]
pub(crate) struct Gpu {
    stream: Arc<CudaStream>,
    /// For the compiler, such as `sm_90`.
    architecture: String,
    nvrtc: Nvrtc,
    cache: Cache,
    kernels: Mutex<Kernels>,
    blas: Blas,
}

/// What is loaded onto the GPU, by name.
#[derive(Debug, Default)]
struct Kernels {
    modules: HashMap<&'static str, Arc<CudaModule>>,
    functions: HashMap<String, CudaFunction>,
}

impl Gpu {
    /// Starts to use a GPU.
    ///
    /// # Errors
    /// [`Error::Failed`] where it or what it needs is not there, or does not start.
    pub(crate) fn open(number: usize) -> Result<Self> {
        let all = list()?;
        let Some(description) = all.iter().find(|d| d.number == number) else {
            let names: Vec<String> = all.iter().map(Description::to_string).collect();
            return Err(Error::input(format!("There is no GPU cuda:{number}. Choose one of: {}.", names.join("; "))));
        };
        let (major, minor) = description.architecture;
        let nvrtc = Nvrtc::load()?;
        let context = CudaContext::new(number).map_err(driver("open the GPU"))?;
        // SAFETY: everything goes through one stream, so that nothing is used on another.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(driver("make a stream"))?;
        let architecture = format!("sm_{major}{minor}");
        let blas = Blas::new(&stream)?;
        Ok(Self { stream, architecture, nvrtc, cache: Cache::of_user(), kernels: Mutex::default(), blas })
    }

    fn function(&self, module: &'static Module, kernel: &str) -> Result<CudaFunction> {
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = kernels.functions.get(kernel) {
            return Ok(function.clone());
        }
        let loaded = match kernels.modules.entry(module.name) {
            Entry::Occupied(entry) => entry.get().clone(),
            Entry::Vacant(entry) => entry.insert(self.load(module)?).clone(),
        };
        let function = loaded.load_function(kernel).map_err(driver(&format!("find the kernel {kernel}")))?;
        kernels.functions.insert(kernel.to_owned(), function.clone());
        Ok(function)
    }

    fn load(&self, module: &Module) -> Result<Arc<CudaModule>> {
        let Self { architecture, nvrtc, .. } = self;
        let input = format!("{}\n{architecture}\n{}", nvrtc.identity(), module.source());
        let cubin = self.cache.get(&input, || nvrtc.compile(module, architecture))?;
        let image = cudarc::nvrtc::Ptx::from_binary(cubin);
        self.stream.context().load_module(image).map_err(driver(&format!("load the kernels of {}.cu", module.name)))
    }
}

impl Memory for CudaSlice<u8> {
    fn address(&self) -> u64 {
        self.device_ptr(self.stream()).0
    }
}

impl Device for Gpu {
    type Memory = CudaSlice<u8>;

    fn allocate(&self, bytes: usize) -> Result<CudaSlice<u8>> {
        // the driver refuses to allocate nothing
        let memory = self.stream.alloc_zeros(bytes.max(1));
        memory.map_err(driver(&format!("allocate {} of the GPU's memory", crate::memory::in_words(bytes))))
    }

    fn write(&self, memory: &mut CudaSlice<u8>, bytes: &[u8]) -> Result<()> {
        self.stream.memcpy_htod(bytes, memory).map_err(driver("copy to the GPU"))
    }

    fn read(&self, memory: &CudaSlice<u8>, bytes: &mut [u8]) -> Result<()> {
        let copied = self.stream.memcpy_dtoh(&memory.slice(..bytes.len()), bytes);
        copied.and_then(|()| self.stream.synchronize()).map_err(driver("copy from the GPU"))
    }

    unsafe fn launch(
        &self,
        module: &'static Module,
        kernel: &str,
        shape: Launch,
        arguments: &[Argument<'_>],
    ) -> Result<()> {
        if shape.grid.contains(&0) {
            return Ok(());
        }
        let function = self.function(module, kernel)?;
        if shape.shared_bytes > SHARED_BYTES {
            let most = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let set = function.set_attribute(most, shape.shared_bytes as i32);
            set.map_err(driver(&format!("give {kernel} {} bytes of shared memory", shape.shared_bytes)))?;
        }
        self.stream.context().bind_to_thread().map_err(driver("choose the GPU"))?;
        let mut pointers: Vec<*mut c_void> = arguments.iter().map(|a| a.as_ptr().cast_mut().cast()).collect();
        let [grid, block] = [shape.grid, shape.block].map(|[x, y, z]| (x, y, z));
        let stream = self.stream.cu_stream();
        // SAFETY: the function belongs to a module that stays loaded, and the driver copies the arguments before it returns; what
        // the kernel does with them is the caller's promise.
        let launched =
            unsafe { launch_kernel(function.cu_function(), grid, block, shape.shared_bytes, stream, &mut pointers) };
        launched.map_err(driver(&format!("start the kernel {kernel}")))
    }

    unsafe fn multiply(&self, product: &Product, scale: f32) -> Result<()> {
        self.stream.context().bind_to_thread().map_err(driver("choose the GPU"))?;
        // SAFETY: the caller's promise.
        unsafe { self.blas.multiply(product, scale) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_gpu_is_told_why() {
        match list() {
            Ok(all) => assert!(!all.is_empty()),
            Err(error) => {
                let message = error.to_string();
                assert!(matches!(error, Error::Failed(_)) && message.contains("NVIDIA") && !message.contains('\n'));
                assert_eq!(Gpu::open(0).unwrap_err().to_string(), message);
            }
        }
    }

    #[test]
    fn a_gpu_is_described_in_a_line() {
        let gpu = Description { number: 1, name: "NVIDIA X1".into(), architecture: (9, 0), memory: 80 << 30 };
        assert_eq!(gpu.to_string(), "cuda:1 NVIDIA X1, compute capability 9.0, 80.00 GiB");
    }
}
