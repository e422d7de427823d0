//! The operations, one file each beside the kernels of the same name. They check the shapes of what they are given, as the
//! kernels do not.
#![allow(unsafe_code)]

pub(super) mod cast;
