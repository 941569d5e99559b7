//! The contents of mapped pages: populated, compared, dropped, written to files and read from them.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::mm::{Advice, madvise};

use super::Reservation;
use crate::testing::failpoint::{Call, failpoint};
use crate::units::{PAGE_SHIFT, PAGE_SIZE, PageRange, push_run};

/// Words of a page.
const WORDS: usize = PAGE_SIZE as usize / size_of::<u64>();

impl Reservation {
    /// Makes every page of `range` present and writable: breaks the kernel's COW ahead of the first
    /// write.
    pub(crate) fn populate_write(&self, range: PageRange) -> io::Result<()> {
        self.mark_written(range)?;
        trace!(Owned { at: self.at(), range });
        Ok(())
    }

    /// Marks the pages of `range`, which are this VM's own, as written. The kernel drops a clean
    /// page of a memory file under memory pressure, and the page is zeros afterwards.
    pub(crate) fn mark_written(&self, range: PageRange) -> io::Result<()> {
        self.check(range)?;
        failpoint(Call::Advise)?;
        let at = self.addr(range.start).cast();
        loop {
            // SAFETY: populating faults pages in and marks them; contents do not change.
            match unsafe { madvise(at, range.bytes(), Advice::LinuxPopulateWrite) } {
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                other => return Ok(other?),
            }
        }
    }

    /// Maps the pages of `range` for reading: shared ones as they are, without copies.
    pub(crate) fn populate_read(&self, range: PageRange) -> io::Result<()> {
        self.check(range)?;
        failpoint(Call::Advise)?;
        let at = self.addr(range.start).cast();
        loop {
            // SAFETY: populating faults pages in; contents do not change.
            match unsafe { madvise(at, range.bytes(), Advice::LinuxPopulateRead) } {
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                other => return Ok(other?),
            }
        }
    }

    /// The all-zero pages of `runs`. Reads them through the mapping.
    ///
    /// # Safety
    /// The pages are mapped and readable.
    pub(crate) unsafe fn zero_runs(&self, runs: &[PageRange]) -> Vec<PageRange> {
        let mut zeros = Vec::new();
        for page in runs.iter().flat_map(|run| run.start..run.end) {
            // SAFETY: the caller's pages are mapped and readable.
            if unsafe { self.has_words(page, std::iter::repeat_n(0, WORDS)) } {
                push_run(&mut zeros, PageRange::with_len(page, 1));
            }
        }
        zeros
    }

    /// Whether `page` holds `bytes`.
    ///
    /// # Safety
    /// The page is mapped and readable.
    pub(crate) unsafe fn has_bytes(&self, page: u64, bytes: &[u8]) -> bool {
        let (want, _) = bytes.as_chunks::<{ size_of::<u64>() }>();
        debug_assert!(want.len() == WORDS, "a page is compared with a page");
        // SAFETY: the caller's page is mapped and readable.
        unsafe { self.has_words(page, want.iter().map(|want| u64::from_ne_bytes(*want))) }
    }

    /// Whether `page` begins with the words of `want`: a page's at most.
    ///
    /// # Safety
    /// The page is mapped and readable.
    unsafe fn has_words(&self, page: u64, want: impl Iterator<Item = u64>) -> bool {
        assert!(page < self.pages, "page {page:#x} of a region of {:#x} pages", self.pages);
        let words = self.addr(page).cast::<u64>();
        (0..WORDS).zip(want).all(|(at, want)| {
            // SAFETY: the word is within the page, which is within the reservation (checked).
            let word = unsafe { words.add(at) };
            // SAFETY: the page is mapped and readable (the caller's); no reference is made.
            (unsafe { word.read_volatile() }) == want
        })
    }

    /// Copies the page at `from` to `page` unless they are equal. Returns whether it has.
    ///
    /// # Safety
    /// `page` is mapped and writable, and nothing else uses it. The page at `from` is readable, and not of this
    /// reservation. Another process may write to it.
    pub(crate) unsafe fn put_page(&self, page: u64, from: *const [u64; WORDS]) -> bool {
        assert!(from.is_aligned(), "a page is read in words");
        let from = from.cast::<u64>();
        let word = |at| {
            // SAFETY: the word is within the page.
            let word = unsafe { from.add(at) };
            // SAFETY: the caller's page is readable, and aligned (checked). Volatile: another process may write it.
            unsafe { word.read_volatile() }
        };
        // SAFETY: `page` is mapped and writable (the caller's), so it is readable too.
        if unsafe { self.has_words(page, (0..WORDS).map(word)) } {
            return false;
        }
        let to = self.addr(page).cast::<u64>();
        for at in 0..WORDS {
            // SAFETY: the word is within the page, which is within the reservation (checked by `has_words`).
            let to = unsafe { to.add(at) };
            // SAFETY: `page` is mapped and writable, and nothing else uses it (the caller's).
            unsafe { to.write_volatile(word(at)) };
        }
        trace!(Owned { at: self.at(), range: PageRange::with_len(page, 1) });
        true
    }

    /// Collapses the small pages behind each whole block of `range`, mapped shared over a file,
    /// into one of 2 MiB (Linux 6.1). Other mappings of the file still read the same bytes. Refused
    /// if a device uses one of the pages.
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

    /// Appends the bytes of `runs`, one after another, to `file` at `file_page`. The kernel reads
    /// guest memory itself, so a concurrent write by a vCPU or device makes a torn copy, never
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
                // shortened below); the kernel reads it, Rust never does.
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
                // A short write (a full file system, a signal): continues from the place where it
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
}
