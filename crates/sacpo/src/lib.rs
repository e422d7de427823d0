//! The `sacpo` command's own parts: the recipe that a run follows, and how it is read.

pub mod policy_name;
pub mod recipe;
pub mod suggest;
