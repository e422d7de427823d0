//! What this machine has, and what this process uses.

mod large_pages;

use std::fs;
use std::path::Path;

pub use large_pages::LargePages;

/// Bytes of memory that this process can use without swapping: what the machine has, or less where a control group, such
/// as a container's, leaves less; nothing where the system does not say.
pub fn available() -> Option<usize> {
    let machine = kilobytes("/proc/meminfo", "MemAvailable:");
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    machine.into_iter().chain(left_by_groups(Path::new("/sys/fs/cgroup"), &groups)).min()
}

/// The resident memory of this process now, in bytes; nothing where the system does not say.
pub fn resident() -> Option<usize> {
    kilobytes("/proc/self/status", "VmRSS:")
}

/// The largest resident memory of this process so far, in bytes; nothing where the system does not say.
pub fn peak() -> Option<usize> {
    kilobytes("/proc/self/status", "VmHWM:")
}

/// Gives memory that was freed back to the system, where the allocator keeps it.
pub fn trim() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[allow(unsafe_code)]
    // SAFETY: the call touches nothing but memory that is free, under the allocator's own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Bytes as people read them, rounded up: `512 MiB`, `2.61 GiB`.
pub fn in_words(bytes: usize) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    if mib < 1000.0 {
        format!("{:.0} MiB", mib.ceil())
    } else {
        format!("{:.2} GiB", (mib / 1024.0 * 100.0).ceil() / 100.0)
    }
}

/// Reads a line such as `VmHWM:   1234 kB`.
fn kilobytes(file: &str, name: &str) -> Option<usize> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)
}

/// The files that say what a control group may use and uses, and the start of the lines of its `memory.stat` that count the
/// page cache, which the kernel gives back before it kills.
struct GroupFiles {
    limit: &'static str,
    usage: &'static str,
    cache: [&'static str; 2],
}

/// Version 2 of control groups, and version 1.
const GROUP_FILES: [GroupFiles; 2] = [
    GroupFiles { limit: "memory.max", usage: "memory.current", cache: ["inactive_file ", "active_file "] },
    GroupFiles {
        limit: "memory.limit_in_bytes",
        usage: "memory.usage_in_bytes",
        cache: ["total_inactive_file ", "total_active_file "],
    },
];

/// Bytes that the control groups of a process, which are mounted at `root`, leave it; nothing without a limit. `groups` is its
/// `/proc/self/cgroup`.
fn left_by_groups(root: &Path, groups: &str) -> Option<usize> {
    let of_line = |line: &str| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let [v2, v1] = &GROUP_FILES;
        let (root, files) = match controllers {
            "" => (root.to_owned(), v2),
            _ if controllers.split(',').any(|controller| controller == "memory") => (root.join("memory"), v1),
            _ => return None,
        };
        // a limit also binds the groups below; in a container the path may be the host's, of which only the root is there
        let groups = Path::new(path.trim_start_matches('/')).ancestors();
        groups.filter_map(|group| left_by_group(&root.join(group), files)).min()
    };
    groups.lines().filter_map(of_line).min()
}

fn left_by_group(group: &Path, files: &GroupFiles) -> Option<usize> {
    let read = |name: &str| fs::read_to_string(group.join(name)).ok();
    // without a limit the file says `max`, or a number beyond any memory
    let [limit, usage] = [files.limit, files.usage].map(|name| read(name)?.trim().parse::<usize>().ok());
    let stat = read("memory.stat").unwrap_or_default();
    let lines = stat.lines().filter_map(|line| files.cache.iter().find_map(|name| line.strip_prefix(name)));
    let cache: usize = lines.filter_map(|bytes| bytes.trim().parse::<usize>().ok()).sum();
    Some(limit?.saturating_sub(usage?.saturating_sub(cache)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(folder: &Path, files: &[(&str, &str)]) {
        fs::create_dir_all(folder).unwrap();
        for (name, text) in files {
            fs::write(folder.join(name), text).unwrap();
        }
    }

    #[test]
    fn control_groups_leave_their_limit_less_what_is_used_and_is_no_cache() {
        let root = tempfile::tempdir().unwrap();
        let stat = "anon 5\nfile 900\ninactive_file 200\nactive_file 100\n";
        let limited = [("memory.max", "1000\n"), ("memory.current", "700\n"), ("memory.stat", stat)];
        group(&root.path().join("user"), &limited);
        group(&root.path().join("user/own"), &[("memory.max", "max\n"), ("memory.current", "400\n")]);
        assert_eq!(left_by_groups(root.path(), "0::/user/own\n"), Some(600), "the group above limits it");
        assert_eq!(left_by_groups(root.path(), "0::/\n"), None);
        assert_eq!(left_by_groups(root.path(), "nonsense\n1:cpu:/user\n"), None);
        // a container sees its own limits at the root, whatever its path on the host
        group(root.path(), &limited);
        assert_eq!(left_by_groups(root.path(), "0::/docker/4711\n"), Some(600));
    }

    #[test]
    fn version_1_of_control_groups_counts_too() {
        let root = tempfile::tempdir().unwrap();
        let stat = "inactive_file 1\ntotal_inactive_file 50\n";
        let files = |limit| [("memory.limit_in_bytes", limit), ("memory.usage_in_bytes", "300"), ("memory.stat", stat)];
        group(&root.path().join("memory"), &files("9223372036854771712"));
        group(&root.path().join("memory/job"), &files("1000"));
        assert_eq!(left_by_groups(root.path(), "4:cpu,cpuacct:/job\n3:hugetlb,memory:/job\n"), Some(750));
    }

    #[test]
    fn usage_above_the_limit_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        group(root.path(), &[("memory.max", "100"), ("memory.current", "200")]);
        assert_eq!(left_by_groups(root.path(), "0::/"), Some(0));
    }

    #[test]
    fn this_process_is_measured() {
        let (resident, peak, available) = (resident().unwrap(), peak().unwrap(), available().unwrap());
        assert!(resident > 1 << 20 && peak >= resident && available > 1 << 20);
    }

    #[test]
    fn bytes_in_words() {
        assert_eq!([0, 3 << 20, (3 << 20) + 1, 5 << 29].map(in_words), ["0 MiB", "3 MiB", "4 MiB", "2.50 GiB"]);
    }
}
