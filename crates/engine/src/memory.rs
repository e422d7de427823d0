//! What this machine has, and what this process has used.

/// Bytes of memory that can be used without swapping; nothing where the system does not say.
pub fn available() -> Option<usize> {
    kilobytes("/proc/meminfo", "MemAvailable:")
}

/// The largest resident memory of this process so far, in bytes; nothing where the system does not say.
pub fn peak() -> Option<usize> {
    kilobytes("/proc/self/status", "VmHWM:")
}

/// Reads a line such as `VmHWM:   1234 kB`.
fn kilobytes(file: &str, name: &str) -> Option<usize> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)
}
