//! Data and models that tests need and the repository does not hold; the tests of other crates include this file by its path.

use std::io::Write;
use std::path::PathBuf;

/// A file or folder of the shared test data, or nothing (loudly) where that is absent.
pub(crate) fn shared(name: &str) -> Option<PathBuf> {
    let root = std::env::var_os("SACPO_DATA")
        .map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data")), PathBuf::from);
    present(root.join(name), "set SACPO_DATA to the folder of the shared test data")
}

/// The GGUF file of SmolLM2-135M-Instruct, or nothing (loudly) where that is absent.
pub(crate) fn smollm2() -> Option<PathBuf> {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/SmolLM2-135M-Instruct.Q4_1.gguf");
    let path = std::env::var_os("SACPO_SMOLLM2").map_or_else(|| PathBuf::from(default), PathBuf::from);
    present(path, "run scripts/fetch_smollm2.sh")
}

/// The path if something is there, or nothing, and a loud line that says so.
fn present(path: PathBuf, remedy: &str) -> Option<PathBuf> {
    if path.exists() {
        return Some(path);
    }
    // not `eprintln!`, which a passing test hides
    let _ = writeln!(std::io::stderr(), "SKIPPED: {} is not there; {remedy}.", path.display());
    None
}
