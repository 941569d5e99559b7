//! The program's text in huge pages, for a process that is copied many times.
//!
//! A fork copies the page tables of anonymous memory, but not those of files: each worker takes a
//! page fault for every 64 KiB of the program that it runs, 120 of its 200 page faults. So the
//! zygote runs from a copy of the program's file in anonymous huge pages. Its workers share it, and
//! each copies one page table entry for 2 MiB.
//!
//! The copy is as large as the text, 18 MiB, once for a supervisor. Without huge pages nothing is
//! done. Profilers that look up symbols by a mapping's file do not find them in the copy.

use std::fs;
use std::io;

use rustix::mm::{Advice, MapFlags, MprotectFlags, MremapFlags, ProtFlags};
use rustix::mm::{madvise, mmap_anonymous, mprotect, mremap_fixed, munmap};

const HUGE: usize = 2 << 20;

/// A mapping of the program's file, whole huge pages of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct TextSegment {
    start: usize,
    len: usize,
    is_text: bool,
}

impl TextSegment {
    /// Parses a line of `/proc/PID/maps`. Returns None if the mapping is writable, not of
    /// `program`, or has no whole huge page.
    fn parse(line: &str, program: &str) -> Option<Self> {
        // Addresses, permissions, offset, device, inode, path.
        let mut fields = line.splitn(6, ' ');
        let (addresses, permissions) = (fields.next()?, fields.next()?);
        let is_text = match permissions {
            "r-xp" => true,
            "r--p" => false,
            _ => return None,
        };
        if fields.nth(3)?.trim_start() != program {
            return None;
        }
        let (start, end) = addresses.split_once('-')?;
        let [start, end] = [start, end].map(|address| usize::from_str_radix(address, 16).ok());
        let (start, end) = (start?.checked_next_multiple_of(HUGE)?, end? / HUGE * HUGE);
        (start < end).then(|| Self { start, len: end - start, is_text })
    }

    /// Replaces the segment by a copy.
    fn replace(self) -> io::Result<()> {
        let Self { start, len, is_text } = self;
        let (read_write, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing that exists.
        let room = unsafe { mmap_anonymous(std::ptr::null_mut(), len + HUGE, read_write, flags) }?;
        let copy = room.wrapping_byte_add((room as usize).next_multiple_of(HUGE) - room as usize);
        let replaced = (|| {
            // SAFETY: the call sets the page size of a mapping of this function's own.
            unsafe { madvise(copy, len, Advice::LinuxHugepage) }?;
            let from = std::ptr::with_exposed_provenance::<u8>(start);
            // SAFETY: the caller has found `len` readable bytes of the program's file mapped at
            // `start`, which no code writes. At `copy` are `len` of the `len + HUGE` bytes mapped
            // above, apart from them.
            unsafe { std::ptr::copy_nonoverlapping(from, copy.cast::<u8>(), len) };
            let protection = if is_text { MprotectFlags::READ | MprotectFlags::EXEC } else { MprotectFlags::READ };
            // SAFETY: the mapping is this function's own.
            unsafe { mprotect(copy, len, protection) }?;
            let into = std::ptr::with_exposed_provenance_mut(start);
            // SAFETY: the same bytes with the same permissions take the place of the program's
            // file, in one system call, which this process's one thread makes: nothing runs or
            // reads them meanwhile.
            unsafe { mremap_fixed(copy, len, len, MremapFlags::MAYMOVE, into) }.map(|_| ())
        })();
        // The rest of the mapping: all of it, or the parts around the moved copy.
        let (before, behind) = (copy as usize - room as usize, copy.wrapping_byte_add(len));
        let rest = match replaced {
            Ok(()) => [(room, before), (behind, HUGE - before)],
            Err(_) => [(room, len + HUGE), (room, 0)],
        };
        for (at, len) in rest.into_iter().filter(|(_, len)| *len > 0) {
            // SAFETY: the range is part of the mapping made above, which no other code refers to.
            unsafe { munmap(at, len) }?;
        }
        Ok(replaced?)
    }
}

/// Returns whether a process may ask for huge pages.
fn has_huge_pages(enabled: &str) -> bool {
    !enabled.contains("[never]")
}

/// Puts the program's text and constants in huge pages. Call it while the process has one thread,
/// which is not traced by a debugger that has put breakpoints in.
///
/// # Errors
/// When the kernel refuses. Then all or part of the text stays in its file.
pub(crate) fn use_huge_pages() -> io::Result<()> {
    if !has_huge_pages(&fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled")?) {
        return Ok(());
    }
    let program = fs::read_link("/proc/self/exe")?;
    let Some(program) = program.to_str() else { return Ok(()) };
    let maps = fs::read_to_string("/proc/self/maps")?;
    let segments: Vec<_> = maps.lines().filter_map(|line| TextSegment::parse(line, program)).collect();
    segments.iter().try_for_each(|segment| segment.replace())?;
    tracing::debug!(?segments, "the program runs in huge pages");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_is_whole_huge_pages_of_the_programs_file_that_nobody_writes() {
        let parse = |line: &str| TextSegment::parse(line, "/usr/bin/a b");
        let line = "5570fff00000-557101500000 r-xp 0055e000 08:01 42                 /usr/bin/a b";
        let segment = TextSegment { start: 0x5571_0000_0000, len: 10 * HUGE, is_text: true };
        assert_eq!(parse(line), Some(segment));
        assert_eq!(parse(&line.replace("r-xp", "r--p")), Some(TextSegment { is_text: false, ..segment }));
        assert_eq!(parse(&line.replace("r-xp", "rw-p")), None, "it is written");
        assert_eq!(parse(&line.replace("r-xp", "r--s")), None, "it is shared");
        assert_eq!(parse(&line.replace("a b", "a")), None, "it is of another");
        assert_eq!(parse(&line.replace("557101500000", "557100100000")), None, "it is small");
        assert_eq!(parse("7ffd1f9d1000-7ffd1f9d3000 r-xp 00000000 00:00 0                  [vdso]"), None);
        assert_eq!(parse("7f0000000000-7f0001000000 r--p 00000000 00:00 0 "), None);
        assert!(has_huge_pages("always [madvise] never") && !has_huge_pages("always madvise [never]"));
    }

    /// Runs in a child with one thread: this process has others, and stays in its file.
    #[test]
    fn a_process_goes_on_in_the_copy() {
        // SAFETY: the child makes only calls that need no lock of another thread but the
        // allocator's, which glibc's fork takes care of, and ends without running exit handlers.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let before = std::hint::black_box(has_huge_pages)("[always]");
            let moved = use_huge_pages();
            // Text and constants of the copy.
            let after = std::hint::black_box(has_huge_pages)("always [never]");
            let maps = fs::read_to_string("/proc/self/smaps").unwrap_or_default();
            let anonymous = maps.lines().any(|line| line.contains(" r-xp ") && line.trim_end().ends_with(" 0"));
            let is_well = moved.is_ok() && before && !after && anonymous;
            // SAFETY: it ends this process at once.
            unsafe { libc::_exit(if is_well { 7 } else { 1 }) };
        }
        let mut status = 0;
        // SAFETY: the pointer is valid, and the child is this process's own.
        assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
        let there = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
        if !has_huge_pages(&there) {
            return clade_test_support::skipped("no huge pages");
        }
        assert_eq!((libc::WIFEXITED(status), libc::WEXITSTATUS(status)), (true, 7), "{status:#x}");
    }
}
