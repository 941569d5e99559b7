//! PAGEMAP_SCAN: which pages of a private mapping are this process's own (Linux 6.7).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::process;
use std::sync::{Arc, Mutex, PoisonError};

use crate::sys::Reservation;
use crate::testing::failpoint::{Call, failpoint};
use crate::units::{PAGE_SHIFT, PageRange, push_run};

const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `_IOWR('f', 16, struct pm_scan_arg)`
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const BATCH: usize = 512;

/// /proc/self/pagemap, held open.
///
/// The file describes the memory of the process that opened it, even in a child that inherits it,
/// so a forked process opens it again.
#[derive(Debug)]
pub(crate) struct Pagemap(Mutex<ProcessPagemap>);

#[derive(Clone, Debug)]
struct ProcessPagemap {
    by: u32,
    file: Arc<File>,
}

impl ProcessPagemap {
    fn now() -> io::Result<Self> {
        Ok(Self { by: process::id(), file: Arc::new(File::open("/proc/self/pagemap")?) })
    }
}

impl Pagemap {
    /// Opens the file, and checks that this kernel has PAGEMAP_SCAN.
    pub(crate) fn open() -> io::Result<Self> {
        let map = Self(Mutex::new(ProcessPagemap::now()?));
        let probe = Reservation::new(1)?;
        map.owned_runs(&probe, PageRange::new(0, 1))?;
        Ok(map)
    }

    /// The file of this process.
    fn file(&self) -> io::Result<Arc<File>> {
        // Replaced in one step.
        let mut opened = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if opened.by != process::id() {
            *opened = ProcessPagemap::now()?;
        }
        Ok(Arc::clone(&opened.file))
    }

    /// The pages of `range` that are present or swapped and neither file-backed nor the zero page:
    /// this VM's own copies. The kernel is authoritative: it has seen writes by vCPUs, by devices
    /// and by this process alike.
    pub(crate) fn owned_runs(&self, at: &Reservation, range: PageRange) -> io::Result<Vec<PageRange>> {
        let runs = self.runs_without(PAGE_IS_FILE | PAGE_IS_PFNZERO, at, range)?;
        trace!(Kernel { at: at.addr(0) as u64, range, runs: runs.clone() });
        Ok(runs)
    }

    /// As [`Self::owned_runs`], for statistics: empty if the page map cannot be read.
    pub(crate) fn seen_runs(&self, at: &Reservation, range: PageRange) -> Vec<PageRange> {
        self.scan(PAGE_IS_FILE | PAGE_IS_PFNZERO, at, range, || Ok(())).unwrap_or_default()
    }

    /// The pages of `range` that were read or written through this mapping and are not the zero
    /// page.
    pub(crate) fn touched_runs(&self, at: &Reservation, range: PageRange) -> io::Result<Vec<PageRange>> {
        self.runs_without(PAGE_IS_PFNZERO, at, range)
    }

    /// The pages of `range` that are present or swapped and in none of the categories `not`.
    fn runs_without(&self, not: u64, at: &Reservation, range: PageRange) -> io::Result<Vec<PageRange>> {
        self.scan(not, at, range, || failpoint(Call::Scan))
    }

    /// As [`Self::runs_without`], with `before` called before each system call.
    fn scan(
        &self,
        not: u64,
        at: &Reservation,
        range: PageRange,
        before: impl Fn() -> io::Result<()>,
    ) -> io::Result<Vec<PageRange>> {
        let mut runs = Vec::new();
        if range.is_empty() {
            return Ok(runs);
        }
        let pagemap = self.file()?;
        let origin = at.addr(0) as u64;
        let (mut start, end) = (at.addr(range.start) as u64, at.addr(range.end) as u64);
        let mut found = [PageRegion::default(); BATCH];
        while start < end {
            let mut arg = ScanArg {
                size: size_of::<ScanArg>() as u64,
                start,
                end,
                vec: found.as_mut_ptr() as u64,
                vec_len: BATCH as u64,
                category_inverted: not,
                category_mask: not,
                category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                return_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                ..ScanArg::default()
            };
            before()?;
            // SAFETY: `arg` describes itself by size and points at `found`, BATCH entries long;
            // both outlive the call.
            let n = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
            if n < 0 {
                match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::Interrupted => continue,
                    e => return Err(e),
                }
            }
            for region in &found[..n as usize] {
                push_run(
                    &mut runs,
                    PageRange::new((region.start - origin) >> PAGE_SHIFT, (region.end - origin) >> PAGE_SHIFT),
                );
            }
            // walk_end is the start of the next call, and equals end when the walk is complete.
            start = arg.walk_end;
        }
        Ok(runs)
    }
}
