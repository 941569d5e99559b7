//! The kernel's accounts of memory, through other interfaces than those of the memory manager.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

const PAGE: u64 = 4096;

/// Returns the pages from `address` on that are private copies: present or swapped, and neither a
/// file's nor shared.
///
/// # Panics
/// When the page map cannot be read.
#[must_use]
pub fn owned_pages(address: u64, pages: u64) -> Vec<u64> {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const FILE_OR_SHARED: u64 = 1 << 61;
    let map = File::open("/proc/self/pagemap").expect("the page map");
    let mut entries = vec![0; pages as usize * 8];
    map.read_exact_at(&mut entries, address / PAGE * 8).expect("the page map");
    let owned = |entry: u64| entry & (PRESENT | SWAPPED) != 0 && entry & FILE_OR_SHARED == 0;
    let entries = entries.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes));
    (0..).zip(entries).filter(|(_, entry)| owned(*entry)).map(|(page, _)| page).collect()
}

/// Returns the sum of `Anonymous` in /proc/self/smaps over the mappings that lie in `pages` pages
/// from `address` on.
///
/// # Panics
/// When it cannot be read.
#[must_use]
pub fn smaps_anonymous_kib(address: u64, pages: u64) -> u64 {
    let smaps = fs::read_to_string("/proc/self/smaps").expect("smaps");
    let range = address..address + pages * PAGE;
    let (mut inside, mut kib) = (false, 0);
    for line in smaps.lines() {
        if let Some(start) = mapping_start(line) {
            inside = range.contains(&start);
        } else if let Some(rest) = line.strip_prefix("Anonymous:").filter(|_| inside) {
            kib += rest.trim().trim_end_matches(" kB").parse::<u64>().expect("a number of kB");
        }
    }
    kib
}

/// Returns the start of the mapping if `line` begins an entry.
fn mapping_start(line: &str) -> Option<u64> {
    let (start, rest) = line.split_once('-')?;
    rest.contains(' ').then(|| u64::from_str_radix(start, 16).ok())?
}
