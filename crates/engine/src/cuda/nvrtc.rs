//! Compilation of kernels by NVIDIA's run-time compiler, which is loaded when it is first needed.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString};

use cudarc::nvrtc::result::{compile_program, create_program, destroy_program, get_program_log};
use cudarc::nvrtc::sys::{self, nvrtcProgram, nvrtcResult};

use super::Module;
use crate::error::{Error, Result};

/// What the compiler is told besides the architecture. Products and sums are not contracted: an `fmaf` is where a kernel has it.
const OPTIONS: [&str; 2] = ["--std=c++17", "--fmad=false"];

/// The oldest version that has all functions that are used here.
const OLDEST: (i32, i32) = (12, 0);

/// The compiler.
#[derive(Debug, Clone, Copy)]
pub(super) struct Nvrtc {
    /// Major and minor.
    version: (i32, i32),
}

impl Nvrtc {
    /// Loads the compiler's library.
    ///
    /// # Errors
    /// [`Error::Failed`] where there is none, or it is too old.
    pub(super) fn load() -> Result<Self> {
        // SAFETY: loading the library runs nothing but its own constructors.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::Failed(
                "There is no library libnvrtc, which compiles for GPUs. Install NVIDIA's CUDA toolkit, or the Python package \
                 nvidia-cuda-nvrtc with its folder in LD_LIBRARY_PATH."
                    .into(),
            ));
        }
        let mut version = (0, 0);
        // SAFETY: the library is there, and both pointers are valid.
        check("tell its version", unsafe { sys::nvrtcVersion(&mut version.0, &mut version.1) })?;
        if version < OLDEST {
            let (major, minor) = version;
            return Err(Error::Failed(format!(
                "The library libnvrtc is of CUDA {major}.{minor}, which is too old. Install one of CUDA 12.0 or newer."
            )));
        }
        Ok(Self { version })
    }

    /// What decides the outcome of [`compile`](Self::compile) besides its arguments.
    pub(super) fn identity(self) -> String {
        format!("nvrtc {:?} {OPTIONS:?}", self.version)
    }

    /// Compiles a module for an architecture such as `sm_90`.
    ///
    /// # Errors
    /// [`Error::Failed`] with what the compiler says, where the text is wrong or the compiler does not know the architecture.
    pub(super) fn compile(self, module: &Module, architecture: &str) -> Result<Vec<u8>> {
        let text =
            CString::new(module.source()).map_err(|_| Error::Failed("a kernel's text has a zero byte".into()))?;
        let program = create_program(&text, None).map_err(|e| failed("start", e.0))?;
        let cubin = compile(program, module, architecture);
        // SAFETY: the program was made above and is not used any more.
        let destroyed = unsafe { destroy_program(program) };
        destroyed.map_err(|e| failed("end", e.0))?;
        cubin
    }
}

fn compile(program: nvrtcProgram, module: &Module, architecture: &str) -> Result<Vec<u8>> {
    let mut options = vec![format!("--gpu-architecture={architecture}")];
    options.extend(OPTIONS.map(String::from));
    // SAFETY: the program exists.
    if unsafe { compile_program(program, &options) }.is_err() {
        // SAFETY: as above.
        let log = unsafe { get_program_log(program) }.map_err(|e| failed("say what is wrong", e.0))?;
        // SAFETY: the log ends in a zero byte.
        let log = unsafe { CStr::from_ptr(log.as_ptr()) }.to_string_lossy();
        let name = module.name;
        return Err(Error::Failed(format!(
            "The kernels in {name}.cu do not compile for {architecture}: {}",
            log.trim()
        )));
    }
    let mut len = 0;
    // SAFETY: the program exists, and the pointer is valid.
    check("tell a program's size", unsafe { sys::nvrtcGetCUBINSize(program, &mut len) })?;
    let mut cubin = vec![0u8; len];
    // SAFETY: there is room for as many bytes as the compiler has just said.
    check("hand over a program", unsafe { sys::nvrtcGetCUBIN(program, cubin.as_mut_ptr().cast()) })?;
    Ok(cubin)
}

fn check(what: &str, result: nvrtcResult) -> Result<()> {
    result.result().map_err(|e| failed(what, e.0))
}

fn failed(what: &str, result: nvrtcResult) -> Error {
    Error::Failed(format!("NVIDIA's run-time compiler could not {what}: {result:?}."))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::path::PathBuf;

    use super::*;
    use crate::cuda::MODULES;

    /// The compiler, or nothing (loudly) where it is absent.
    fn nvrtc() -> Option<Nvrtc> {
        let folder = std::env::var_os("SACPO_NVRTC")
            .map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/nvrtc")), PathBuf::from);
        // a library that is loaded is found by its name later
        #[cfg(unix)]
        for name in ["libnvrtc.so.13", "libnvrtc.so.12"] {
            use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
            // SAFETY: loading it runs nothing but its own constructors.
            if let Ok(library) = unsafe { Library::open(Some(folder.join(name)), RTLD_NOW | RTLD_GLOBAL) } {
                std::mem::forget(library);
                break;
            }
        }
        let nvrtc = Nvrtc::load();
        if nvrtc.is_err() {
            // not `eprintln!`, which a passing test hides
            let _ = writeln!(
                std::io::stderr(),
                "SKIPPED: kernels are not compiled, for there is no NVRTC in {}; run scripts/fetch_nvrtc.sh.",
                folder.display()
            );
        }
        nvrtc.ok()
    }

    #[test]
    fn every_kernel_compiles_for_all_architectures_with_bf16() {
        let Some(nvrtc) = nvrtc() else { return };
        for architecture in ["sm_80", "sm_90", "sm_100"] {
            for module in MODULES {
                let cubin = nvrtc.compile(module, architecture).unwrap();
                assert!(cubin.starts_with(b"\x7fELF"));
                for kernel in module.kernels {
                    let section = format!(".text.{kernel}\0");
                    let found = cubin.windows(section.len()).any(|bytes| bytes == section.as_bytes());
                    assert!(found, "{}.cu has no kernel {kernel}", module.name);
                }
            }
        }
    }

    #[test]
    fn what_does_not_compile_is_named_with_its_line() {
        let Some(nvrtc) = nvrtc() else { return };
        let module = Module { name: "wrong", text: "\n__global__ void f() { x = 1; }", kernels: &[] };
        let message = nvrtc.compile(&module, "sm_90").unwrap_err().to_string();
        assert!(message.contains("wrong.cu(2): error"), "{message}");
        let message = nvrtc.compile(MODULES[0], "sm_1").unwrap_err().to_string();
        assert!(message.contains("sm_1"), "{message}");
    }
}
