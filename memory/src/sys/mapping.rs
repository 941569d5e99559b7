//! A reservation of host address space that never moves, and what gets mapped into it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, MremapFlags, ProtFlags, madvise, mmap, mmap_anonymous, mremap_fixed, munmap};

use crate::testing::failpoint::{Call, failpoint};
use crate::units::{BLOCK_SIZE, PAGE_SHIFT, PageRange};

/// Address space for a region: inaccessible until something is mapped over it, aligned to 2 MiB so
/// that huge pages fit.
///
/// The address is fixed for the reservation's life, so a KVM memslot over it is set once.
#[derive(Debug)]
pub(crate) struct Reservation {
    base: NonNull<u8>,
    pages: u64,
}

// SAFETY: the reservation is an address and a length; every access through it is volatile or by the
// kernel.
unsafe impl Send for Reservation {}
// SAFETY: as above; remapping is serialized by the region's lock, or by its background copy's for
// pages that are protected.
unsafe impl Sync for Reservation {}

const RAM_PROT: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

impl Reservation {
    /// Reserves `pages` pages.
    pub(crate) fn new(pages: u64) -> io::Result<Self> {
        failpoint(Call::Map)?;
        let len = PageRange::new(0, pages).bytes();
        let slack = BLOCK_SIZE as usize;
        let padded = len.checked_add(slack).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches nothing
        // that exists.
        let raw = unsafe {
            mmap_anonymous(std::ptr::null_mut(), padded, ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::NORESERVE)
        }?;
        let start = raw as usize;
        let aligned = start.next_multiple_of(slack);
        Self::trim(start, aligned - start)?;
        Self::trim(aligned + len, start + padded - (aligned + len))?;
        let base = NonNull::new(aligned as *mut u8).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, pages })
    }

    fn trim(at: usize, len: usize) -> io::Result<()> {
        if len > 0 {
            // SAFETY: only called on the slack at either end of the mapping just made, which nobody
            // else knows.
            unsafe { munmap(at as *mut _, len) }?;
        }
        Ok(())
    }

    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// The host address of `page`.
    ///
    /// # Panics
    /// When `page` is beyond the end: callers check ranges against the region.
    pub(crate) fn addr(&self, page: u64) -> *mut u8 {
        assert!(page <= self.pages, "page {page:#x} beyond a region of {:#x} pages", self.pages);
        // SAFETY: page <= pages, so the result is within, or one past, the mapping this type owns.
        unsafe { self.base.as_ptr().add((page << PAGE_SHIFT) as usize) }
    }

    fn check(&self, range: PageRange) -> io::Result<()> {
        if range.end <= self.pages { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }

    /// Maps `range` shared and writable over `file` from `file_page` on.
    pub(crate) fn map_shared(&self, range: PageRange, file: BorrowedFd<'_>, file_page: u64) -> io::Result<()> {
        self.map(range, MapFlags::SHARED, file, file_page)?;
        trace!(Shared { at: self.at(), range, file: crate::trace::file(file), page: file_page });
        Ok(())
    }

    /// Maps `range` private (the kernel copies on write) over `file` from `file_page` on.
    pub(crate) fn map_private(&self, range: PageRange, file: BorrowedFd<'_>, file_page: u64) -> io::Result<()> {
        self.map(range, MapFlags::PRIVATE | MapFlags::NORESERVE, file, file_page)?;
        trace!(Private { at: self.at(), range, file: crate::trace::file(file), page: file_page });
        Ok(())
    }

    fn map(&self, range: PageRange, kind: MapFlags, file: BorrowedFd<'_>, file_page: u64) -> io::Result<()> {
        self.check(range)?;
        failpoint(Call::Map)?;
        let at = self.addr(range.start).cast();
        // SAFETY: range lies within this reservation (checked), which this type owns; replacing its
        // mapping leaves it mapped, so volatile accesses through it stay valid. No Rust reference
        // into it exists.
        unsafe { mmap(at, range.bytes(), RAM_PROT, kind | MapFlags::FIXED, file, file_page << PAGE_SHIFT) }?;
        self.do_not_fork(range);
        Ok(())
    }

    /// Maps `range` to fresh zeros of this VM's own.
    pub(crate) fn map_zero(&self, range: PageRange) -> io::Result<()> {
        self.check(range)?;
        failpoint(Call::Map)?;
        let at = self.addr(range.start).cast();
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: as in `map`.
        unsafe { mmap_anonymous(at, range.bytes(), RAM_PROT, flags) }?;
        self.do_not_fork(range);
        trace!(Zero { at: self.at(), range });
        Ok(())
    }

    /// Keeps `range` out of processes that this one forks (R19's VM_DONTCOPY): a fork would make
    /// guest memory the kernel's COW pages, under its devices, and give a child process what is the
    /// guest's. Best effort: it can only fail for a range that is not mapped.
    fn do_not_fork(&self, range: PageRange) {
        let at = self.addr(range.start).cast();
        // SAFETY: it changes what a fork copies, not the memory.
        if let Err(error) = unsafe { madvise(at, range.bytes(), Advice::LinuxDontFork) } {
            tracing::debug!(%error, %range, "a process that is forked inherits guest memory");
        }
    }

    /// Takes the memory of `range` away: an access is an error.
    pub(crate) fn map_none(&self, range: PageRange) -> io::Result<()> {
        self.check(range)?;
        failpoint(Call::Map)?;
        let at = self.addr(range.start).cast();
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: the range stays reserved; no Rust reference into it exists, and the region says
        // that it is not there.
        unsafe { mmap_anonymous(at, range.bytes(), ProtFlags::empty(), flags) }?;
        trace!(Nothing { at: self.at(), range });
        Ok(())
    }

    /// Puts private pages with the bytes that `file` has from `file_page` on in place of what is
    /// mapped in `range`, in one step. Failing, nothing has changed.
    pub(crate) fn replace_private(&self, range: PageRange, file: BorrowedFd<'_>, file_page: u64) -> io::Result<()> {
        let aside = Self::new(range.len())?;
        let all = PageRange::new(0, range.len());
        aside.map_zero(all)?;
        aside.read_in(all, file, file_page)?;
        self.check(range)?;
        failpoint(Call::Map)?;
        let (from, into) = (aside.addr(0).cast(), self.addr(range.start).cast());
        // SAFETY: `from` is a mapping of this function's own, which moves whole; `into` lies within
        // this reservation, which stays mapped. No Rust reference into either exists.
        unsafe { mremap_fixed(from, range.bytes(), range.bytes(), MremapFlags::MAYMOVE, into) }?;
        // Its addresses were given up by the move, and may be another's by now.
        std::mem::forget(aside);
        trace!(Replaced { at: self.at(), range });
        Ok(())
    }

    /// Makes every page of `range` present and writable: breaks the kernel's COW ahead of the first
    /// write.
    pub(crate) fn populate_write(&self, range: PageRange) -> io::Result<()> {
        self.check(range)?;
        failpoint(Call::Advise)?;
        let at = self.addr(range.start).cast();
        loop {
            // SAFETY: populating faults pages in; contents do not change.
            match unsafe { madvise(at, range.bytes(), Advice::LinuxPopulateWrite) } {
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                Err(error) => return Err(error.into()),
                Ok(()) => break,
            }
        }
        trace!(Owned { at: self.at(), range });
        Ok(())
    }

    /// Puts the small pages behind each whole block of `range`, mapped shared over a file, together
    /// into one of 2 MiB (Linux 6.1). Whoever maps the file goes on reading the same bytes. Refused
    /// where a page is in use by a device.
    pub(crate) fn collapse(&self, range: PageRange) -> io::Result<()> {
        self.check(range)?;
        let at = self.addr(range.start).cast();
        // SAFETY: the file's contents do not change, only the pages they are in.
        if unsafe { libc::madvise(at, range.bytes(), libc::MADV_COLLAPSE) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Drops this VM's own copies in a private mapping: the next access sees the file again.
    pub(crate) fn drop_private(&self, range: PageRange) -> io::Result<()> {
        self.check(range)?;
        failpoint(Call::Advise)?;
        let at = self.addr(range.start).cast();
        // SAFETY: only the contents of guest memory change, which Rust never holds a reference to.
        unsafe { madvise(at, range.bytes(), Advice::LinuxDontNeed) }?;
        trace!(Dropped { at: self.at(), range });
        Ok(())
    }

    /// Takes all access away, and all memory with it.
    pub(crate) fn protect_none(&self) -> io::Result<()> {
        let at: *mut core::ffi::c_void = self.base.as_ptr().cast();
        let len = PageRange::new(0, self.pages).bytes();
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: replaces this reservation's own mappings; it stays reserved.
        unsafe { mmap_anonymous(at, len, ProtFlags::empty(), flags) }?;
        trace!(Nothing { at: self.at(), range: PageRange::new(0, self.pages) });
        Ok(())
    }

    /// Appends the bytes of `runs`, one after another, to `file` at `file_page`. The kernel reads
    /// guest memory itself, so a vCPU or device that is still writing makes a torn copy, never
    /// undefined behaviour.
    pub(crate) fn write_out(&self, runs: &[PageRange], file: impl AsFd, file_page: u64) -> io::Result<()> {
        const MAX_IOVECS: usize = 1024;
        let fd = file.as_fd().as_raw_fd();
        let mut at = file_page << PAGE_SHIFT;
        for batch in runs.chunks(MAX_IOVECS) {
            let mut todo = Vec::with_capacity(batch.len());
            for run in batch {
                self.check(*run)?;
                todo.push(libc::iovec { iov_base: self.addr(run.start).cast(), iov_len: run.bytes() });
            }
            let mut todo = todo.as_mut_slice();
            while !todo.is_empty() {
                failpoint(Call::Copy)?;
                // SAFETY: every iovec lies within this reservation (checked above, and only ever
                // cut shorter below); the kernel reads it, Rust never does.
                let wrote = unsafe { libc::pwritev(fd, todo.as_ptr(), todo.len() as libc::c_int, at as i64) };
                let mut wrote = match wrote {
                    0 => return Err(io::ErrorKind::WriteZero.into()),
                    n if n > 0 => n as usize,
                    _ => match io::Error::last_os_error() {
                        e if e.kind() == io::ErrorKind::Interrupted => continue,
                        e => return Err(e),
                    },
                };
                at += wrote as u64;
                // A short write (a file system that fills up, a signal): go on from where it
                // stopped.
                let whole = todo.iter().take_while(|v| {
                    let fits = v.iov_len <= wrote;
                    wrote -= if fits { v.iov_len } else { 0 };
                    fits
                });
                let whole = whole.count();
                todo = &mut todo[whole..];
                if let Some(first) = todo.first_mut() {
                    first.iov_base = first.iov_base.wrapping_byte_add(wrote);
                    first.iov_len -= wrote;
                }
            }
        }
        trace!(Written { at: self.at(), runs: runs.to_vec(), file: crate::trace::file(&file), page: file_page });
        Ok(())
    }

    /// Reads `range` from `file` at `file_page` into this VM's own pages.
    pub(crate) fn read_in(&self, range: PageRange, file: impl AsFd, file_page: u64) -> io::Result<()> {
        self.check(range)?;
        failpoint(Call::Copy)?;
        let fd = file.as_fd().as_raw_fd();
        let mut done = 0usize;
        while done < range.bytes() {
            // SAFETY: the bytes lie within the reservation (checked); `done` is less than the
            // range's length.
            let at = unsafe { self.addr(range.start).add(done) };
            let offset = (file_page << PAGE_SHIFT) + done as u64;
            let left = range.bytes() - done;
            // SAFETY: the buffer is `left` bytes of this reservation; only the kernel writes
            // through it.
            let got = unsafe { libc::pread(fd, at.cast(), left, offset as i64) };
            match got {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n if n > 0 => done += n as usize,
                _ => match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::Interrupted => {}
                    e => return Err(e),
                },
            }
        }
        trace!(Owned { at: self.at(), range });
        Ok(())
    }

    /// What a trace calls it.
    #[cfg(feature = "trace")]
    fn at(&self) -> u64 {
        self.addr(0) as u64
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        trace!(SpaceGone { at: self.at() });
        let len = PageRange::new(0, self.pages).bytes();
        // SAFETY: the mapping is this type's own, and a holder of an address holds the region
        // that owns it.
        if let Err(error) = unsafe { munmap(self.base.as_ptr().cast(), len) } {
            tracing::error!(%error, "a region's address range could not be unmapped");
        }
    }
}
