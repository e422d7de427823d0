//! Products of matrices by cuBLASLt. **It has not run on a GPU yet.**
//!
//! The library chooses an algorithm for a product when it first comes, from shapes, types and the alignment of addresses; the choice
//! is kept, so that the same product has the same bits again.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

use super::device::{Operand, Product};
use crate::error::{Error, Result};

/// Memory that algorithms may work in: what NVIDIA recommends for Hopper.
const WORKSPACE: usize = 32 << 20;

/// The library, for one stream.
#[derive(Debug)]
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: CudaSlice<u8>,
    stream: Arc<CudaStream>,
    plans: Mutex<HashMap<Product, Plan>>,
}

// SAFETY: cuBLASLt's handle may be used from several threads, and the plans are behind a lock.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

/// How a product is computed. Its parts belong to the library until [`Plan::destroy`].
#[derive(Debug)]
struct Plan {
    description: sys::cublasLtMatmulDesc_t,
    /// Of the library's factors and result.
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// An error of the library, for use with `map_err`.
fn failed(what: &'static str) -> impl Fn(CublasError) -> Error {
    move |error| Error::Failed(format!("NVIDIA's library cuBLASLt could not {what}: {error}."))
}

impl Blas {
    /// Loads the library.
    ///
    /// # Errors
    /// [`Error::Failed`] where it is not there or does not start.
    pub(super) fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        // SAFETY: loading the library runs nothing but its own constructors.
        if !unsafe { sys::is_culib_present() } {
            let missing = "There is no cuBLASLt (libcublasLt), NVIDIA's library of matrix products. Install it with CUDA, or by \
                           `pip install nvidia-cublas` and LD_LIBRARY_PATH.";
            return Err(Error::Failed(missing.into()));
        }
        let handle = result::create_handle().map_err(failed("start"))?;
        let workspace = stream.alloc_zeros(WORKSPACE).map_err(|error| {
            Error::Failed(format!("The GPU has no memory for matrix products to work in: {error}."))
        })?;
        Ok(Self { handle, workspace, stream: stream.clone(), plans: Mutex::default() })
    }

    /// As [`Device::multiply`](super::device::Device::multiply).
    ///
    /// # Safety
    /// As there.
    pub(super) unsafe fn multiply(&self, product: &Product, scale: f32) -> Result<()> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let key = Product { a: aligned(product.a), b: aligned(product.b), out: aligned(product.out), ..*product };
        let plan = match plans.entry(key) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(Plan::new(self.handle, product).map_err(failed("find an algorithm for a product"))?)
            }
        };
        let beta = if product.add { 1f32 } else { 0f32 };
        let [a, b, out] = [product.a, product.b, product.out].map(|operand| operand.address as *mut c_void);
        // the library's matrices are column-major: it computes outᵀ = bᵀ·aᵀ
        let [first, second, written] = plan.layouts;
        // SAFETY: the plan is of this product, and addresses are the caller's promise; the workspace is as large as the algorithm was
        // told, and products of one stream come one after the other.
        unsafe {
            result::matmul(
                self.handle,
                plan.description,
                ptr::from_ref(&scale).cast(),
                ptr::from_ref(&beta).cast(),
                b,
                first,
                a,
                second,
                out,
                written,
                out,
                written,
                &plan.algorithm,
                self.workspace.device_ptr(&self.stream).0 as *mut c_void,
                WORKSPACE,
                self.stream.cu_stream().cast(),
            )
        }
        .map_err(failed("multiply"))
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        let plans = self.plans.get_mut().unwrap_or_else(PoisonError::into_inner);
        plans.drain().for_each(|(_, plan)| plan.destroy());
        // SAFETY: the handle is this value's, and is not used again. There is nothing to do about an error.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// An operand with the alignment of its address, in bytes up to 256, in the place of the address.
fn aligned(operand: Operand) -> Operand {
    Operand { address: alignment(operand).into(), ..operand }
}

fn alignment(operand: Operand) -> u32 {
    1 << operand.address.trailing_zeros().min(8)
}

impl Plan {
    fn new(handle: sys::cublasLtHandle_t, product: &Product) -> std::result::Result<Self, CublasError> {
        let Product { shape: [m, n, k], a, b, out, .. } = *product;
        let sums = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let description = result::create_matmul_desc(sums, sys::cudaDataType_t::CUDA_R_32F)?;
        use sys::cublasLtMatmulDescAttributes_t::{CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB};
        for (attribute, operand) in [(CUBLASLT_MATMUL_DESC_TRANSA, b), (CUBLASLT_MATMUL_DESC_TRANSB, a)] {
            // A row-major matrix is a column-major one of its transpose, which is what the library is to multiply. CUBLAS_OP_N and
            // CUBLAS_OP_T are 0 and 1.
            let operation = i32::from(operand.transposed);
            let value = ptr::from_ref(&operation).cast();
            // SAFETY: the attribute is of this type.
            unsafe { result::set_matmul_desc_attribute(description, attribute, value, size_of_val(&operation))? };
        }
        let layout = |operand: Operand, rows: usize, columns: usize| {
            let kind = match operand.rounded {
                true => sys::cudaDataType_t::CUDA_R_16BF,
                false => sys::cudaDataType_t::CUDA_R_32F,
            };
            let [rows, columns] = if operand.transposed { [columns, rows] } else { [rows, columns] };
            result::create_matrix_layout(kind, columns as u64, rows as u64, operand.stride as i64)
        };
        let layouts = [layout(b, k, n)?, layout(a, m, k)?, layout(out, m, n)?];
        let preference = result::create_matmul_pref()?;
        use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
        let workspace = WORKSPACE;
        let alignments = [b, a, out].map(alignment);
        let attributes = [
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &alignments[0]),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &alignments[1]),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &alignments[2]),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &alignments[2]),
        ];
        // SAFETY: the attributes are of these types, and all objects are alive.
        let found = unsafe {
            let bytes = Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            result::set_matmul_pref_attribute(
                preference,
                bytes,
                ptr::from_ref(&workspace).cast(),
                size_of_val(&workspace),
            )?;
            for (attribute, value) in attributes {
                result::set_matmul_pref_attribute(
                    preference,
                    attribute,
                    ptr::from_ref(value).cast(),
                    size_of_val(value),
                )?;
            }
            let [first, second, written] = layouts;
            let found =
                result::get_matmul_algo_heuristic(handle, description, first, second, written, written, preference);
            result::destroy_matmul_pref(preference)?;
            found?
        };
        Ok(Self { description, layouts, algorithm: found.algo })
    }

    /// Gives its parts back. There is nothing to do about an error.
    fn destroy(self) {
        // SAFETY: they are this plan's, and nothing uses them again.
        unsafe {
            let _ = result::destroy_matmul_desc(self.description);
            self.layouts.into_iter().for_each(|layout| _ = result::destroy_matrix_layout(layout));
        }
    }
}
