//! Large pages for large allocations.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};

/// Bytes from which an allocation asks for large pages. Such allocations lie next to each other, so that they fill large pages
/// together where one alone would not.
const LARGE: usize = 1 << 20;

/// The system's allocator, which asks the kernel for large pages where an allocation is large: weights, gradients and
/// activations span gigabytes, and finding a page of 4 KiB costs more than reading a row of it. A kernel that gives large pages only
/// to who asks (`madvise` in `/sys/kernel/mm/transparent_hugepage/enabled`, as distributions set it) otherwise gives none.
#[derive(Debug, Clone, Copy)]
pub struct LargePages;

// SAFETY: every call is the system allocator's, with the caller's promises; what is asked of the kernel changes no contents.
unsafe impl GlobalAlloc for LargePages {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        ask(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        ask(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promise.
        ask(unsafe { System.realloc(start, layout, size) }, size)
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(start, layout) }
    }
}

/// Asks for large pages for an allocation that is large and did not fail; returns where it starts.
fn ask(start: *mut u8, len: usize) -> *mut u8 {
    #[cfg(target_os = "linux")]
    if len >= LARGE && !start.is_null() {
        const PAGE: usize = 1 << 16;
        let first = start.align_offset(PAGE);
        let whole = (len - first) / PAGE * PAGE;
        // SAFETY: all of these pages belong to the allocation (pages of the machine are no larger); the advice changes no
        // contents, and whether the kernel takes it does not matter.
        unsafe {
            libc::madvise(start.wrapping_add(first).cast(), whole, libc::MADV_HUGEPAGE);
        }
    }
    start
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    /// Whether the kernel was asked for large pages at an address; the flag `hg` of its mapping says so.
    fn is_asked(address: usize) -> bool {
        let (mut is_here, text) = (false, fs::read_to_string("/proc/self/smaps").unwrap());
        for line in text.lines() {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            let range = range.map(|(start, end)| [start, end].map(|bound| usize::from_str_radix(bound, 16)));
            match range {
                Some([Ok(start), Ok(end)]) => is_here = (start..end).contains(&address),
                _ if is_here && line.starts_with("VmFlags:") => return line.split(' ').any(|flag| flag == "hg"),
                _ => {}
            }
        }
        panic!("nothing is mapped at {address:x}");
    }

    #[test]
    fn large_allocations_ask_and_keep_their_contents() {
        let layout = |size| Layout::from_size_align(size, 16).unwrap();
        // SAFETY: sizes are not 0, and each allocation is used within its size and given back with its layout.
        unsafe {
            let start = LargePages.alloc_zeroed(layout(LARGE));
            assert!((0..LARGE).step_by(4096).all(|i| *start.add(i) == 0));
            start.write(7);
            let start = LargePages.realloc(start, layout(LARGE), 4 * LARGE);
            assert_eq!(start.read(), 7);
            let small = LargePages.alloc(layout(64));
            if Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
                assert!(is_asked(start as usize + 2 * LARGE) && !is_asked(small as usize));
            }
            LargePages.dealloc(small, layout(64));
            LargePages.dealloc(start, layout(4 * LARGE));
        }
    }
}
