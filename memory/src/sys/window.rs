//! A file's pages, mapped to be read: cheaper than a system call for each, where they are many.

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::fs::fstatfs;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

use super::SigbusWatch;
use super::tmpfs::TMPFS;
use crate::lost::LostMemory;
use crate::testing::failpoint::{Call, failpoint};
use crate::units::{PAGE_SHIFT, PageRange};

/// A file in memory, mapped for reading only. Another process may write to it meanwhile.
#[derive(Debug)]
pub(crate) struct FileWindow {
    /// None only while the window is opened or dropped.
    watched: Option<SigbusWatch>,
    base: NonNull<u8>,
    pages: u64,
}

// SAFETY: the window is an address and a length; every access through it is volatile or a copy between raw
// pointers.
unsafe impl Send for FileWindow {}
// SAFETY: as above; nothing is written through it.
unsafe impl Sync for FileWindow {}

impl FileWindow {
    /// Maps the first `pages` pages of `file`. The loss of one is reported to `failure`.
    ///
    /// # Errors
    /// When the file is not on a tmpfs: a fault would wait for a disk. When the pages cannot be mapped, or not be
    /// watched.
    pub(crate) fn open(file: BorrowedFd<'_>, pages: u64, failure: &Arc<LostMemory>) -> io::Result<Self> {
        if fstatfs(file)?.f_type as u64 != TMPFS {
            return Err(io::ErrorKind::Unsupported.into());
        }
        failpoint(Call::Map)?;
        let len = PageRange::new(0, pages).bytes();
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let raw = unsafe { mmap(std::ptr::null_mut(), len, ProtFlags::READ, MapFlags::SHARED, file, 0) }?;
        let base = NonNull::new(raw.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let mut window = Self { watched: None, base, pages };
        // SAFETY: this changes the copies made by a fork, not the memory.
        unsafe { madvise(raw, len, Advice::LinuxDontFork) }?;
        let start = base.as_ptr() as usize;
        window.watched = Some(SigbusWatch::new(start, start + len, failure).ok_or(io::ErrorKind::QuotaExceeded)?);
        Ok(window)
    }

    /// The address of a page. Its contents may change at any time.
    ///
    /// # Panics
    /// When `page` is beyond the end: callers read pages of the file's layer.
    pub(crate) fn addr(&self, page: u64) -> *const u8 {
        assert!(page < self.pages, "page {page:#x} beyond a window of {:#x} pages", self.pages);
        // SAFETY: the page is within the mapping (checked), which this type owns.
        unsafe { self.base.as_ptr().add((page << PAGE_SHIFT) as usize) }
    }

    /// Whether a page is lost, was read as zeros, and its owner has not been notified yet.
    pub(crate) fn is_lost(&self) -> bool {
        self.watched.as_ref().is_some_and(SigbusWatch::is_lost)
    }
}

impl Drop for FileWindow {
    fn drop(&mut self) {
        // Before the addresses may be reused.
        self.watched = None;
        // SAFETY: the mapping is this type's own, and no address of it is used any more.
        if let Err(error) = unsafe { munmap(self.base.as_ptr().cast(), PageRange::new(0, self.pages).bytes()) } {
            tracing::error!(%error, "a window stays mapped");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;
    use crate::testing::failpoint::plan;
    use crate::units::PAGE_SIZE;

    fn byte(window: &FileWindow, page: u64) -> u8 {
        // SAFETY: the page is mapped for reading; no reference is made.
        unsafe { window.addr(page).read_volatile() }
    }

    /// The mappings of files with this name, and those that a forked process does not inherit.
    fn mappings(name: &str) -> (usize, usize) {
        let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let (mut all, mut kept, mut is_its) = (0, 0, false);
        for line in text.lines() {
            if line.split_once('-').is_some_and(|(start, _)| u64::from_str_radix(start, 16).is_ok()) {
                is_its = line.contains(name);
                all += usize::from(is_its);
            }
            kept += usize::from(is_its && line.starts_with("VmFlags:") && line.contains(" dc"));
        }
        (all, kept)
    }

    #[test]
    fn a_window_shows_a_file_and_reports_a_page_that_is_gone() {
        const NAME: &str = "clade-window-test";
        let file = File::from(memfd_create(NAME, MemfdFlags::CLOEXEC).unwrap());
        file.write_all_at(&[7; 3 * PAGE_SIZE as usize], 0).unwrap();
        let (failure, other) = (Arc::new(LostMemory::default()), Arc::new(LostMemory::default()));
        let window = FileWindow::open(file.as_fd(), 3, &failure).unwrap();
        let (told, tells) = std::sync::mpsc::channel();
        failure.on(Box::new(move |_| told.send(()).unwrap()));
        assert_eq!((byte(&window, 0), byte(&window, 2), window.is_lost()), (7, 7, false));
        file.write_all_at(&[8], PAGE_SIZE).unwrap();
        assert_eq!(byte(&window, 1), 8);
        assert_eq!(mappings(NAME), (1, 1));
        file.set_len(PAGE_SIZE).unwrap();
        assert_eq!((byte(&window, 0), byte(&window, 2)), (7, 0));
        // One of both: the notification comes between.
        assert!(window.is_lost() || failure.get().is_some());
        tells.recv().unwrap();
        assert!(failure.get().is_some() && !window.is_lost() && other.get().is_none());
        plan().arm(0, true);
        let refused = FileWindow::open(file.as_fd(), 1, &other);
        plan().heal();
        refused.unwrap_err();
        let beyond = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| window.addr(3)));
        beyond.unwrap_err();
        drop(window);
        assert_eq!(mappings(NAME).0, 0);
        // A fault would wait for the disk.
        let on_disk = tempfile::tempfile().unwrap();
        on_disk.set_len(PAGE_SIZE).unwrap();
        if fstatfs(&on_disk).unwrap().f_type as u64 != TMPFS {
            assert_eq!(FileWindow::open(on_disk.as_fd(), 1, &other).unwrap_err().kind(), io::ErrorKind::Unsupported);
        }
    }
}
