//! One operation: its resources, and the part that the kernel gets next.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use io_uring::types::{Fd, FsyncFlags, TimeoutFlags, Timespec};
use io_uring::{opcode, squeue};
use thiserror::Error;

use crate::buffer::{AlignedBuf, Fragment, for_window, total_len};
use crate::file::IoFile;

/// Most pieces of memory that the kernel takes at once (UIO_MAXIOV).
const MAX_PIECES: usize = 1024;
/// Maximum length of a bounce buffer in bytes, which bounds the memory that a guest can make the
/// host allocate.
const MAX_BOUNCED: usize = 1 << 20;
/// How often an operation is given to the kernel again after EINTR or EAGAIN.
const MAX_RETRIES: u32 = 64;

/// An operation on a file. Owns all resources that the kernel needs for it.
#[derive(Debug)]
pub enum Request {
    /// Fills `buffers`, in order, from `offset` on.
    Read {
        /// The file to read.
        file: Arc<IoFile>,
        /// First byte in the file.
        offset: u64,
        /// The memory to fill: parts of pins for writing, or of buffers.
        buffers: Vec<Fragment>,
    },
    /// Writes `buffers`, in order, from `offset` on.
    Write {
        /// The file to write.
        file: Arc<IoFile>,
        /// First byte in the file.
        offset: u64,
        /// The memory to write.
        buffers: Vec<Fragment>,
    },
    /// Makes finished writes durable.
    Sync {
        /// The file to sync.
        file: Arc<IoFile>,
        /// Whether its metadata is synced too. For a directory, these are its names.
        all: bool,
    },
    /// Frees the range, which then reads as zeros.
    Punch {
        /// The file to change.
        file: Arc<IoFile>,
        /// First byte of the range.
        offset: u64,
        /// Length of the range in bytes.
        len: u64,
    },
    /// Makes the range zeros that stay allocated.
    Zero {
        /// The file to change.
        file: Arc<IoFile>,
        /// First byte of the range.
        offset: u64,
        /// Length of the range in bytes.
        len: u64,
    },
}

impl Request {
    fn file(&self) -> &Arc<IoFile> {
        match self {
            Self::Read { file, .. }
            | Self::Write { file, .. }
            | Self::Sync { file, .. }
            | Self::Punch { file, .. }
            | Self::Zero { file, .. } => file,
        }
    }

    fn buffers(&self) -> &[Fragment] {
        match self {
            Self::Read { buffers, .. } | Self::Write { buffers, .. } => buffers,
            Self::Sync { .. } | Self::Punch { .. } | Self::Zero { .. } => &[],
        }
    }

    /// Whether it changes the file.
    fn changes(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::Punch { .. } | Self::Zero { .. })
    }
}

/// Why an operation failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpError {
    /// The kernel has reported an error.
    #[error("I/O on {} failed", path.display())]
    Io {
        /// The file's path.
        path: std::path::PathBuf,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// The file ends before the end of a read.
    #[error("{} ends {missing} bytes too early", path.display())]
    Short {
        /// The file's path.
        path: std::path::PathBuf,
        /// How many bytes are missing.
        missing: usize,
    },
    /// The operation was cancelled.
    #[error("cancelled")]
    Cancelled,
}

impl OpError {
    /// The error number, if the kernel has reported one.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Io { source, .. } => source.raw_os_error(),
            Self::Short { .. } | Self::Cancelled => None,
        }
    }
}

/// The way of a transfer's next step to the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Through the page cache.
    Cached,
    /// Past the page cache, with the request's memory.
    Direct,
    /// Past the page cache, with an aligned buffer of the operation.
    Bounced,
}

/// The step after a completion from the kernel.
pub(crate) enum Step {
    /// The kernel gets the operation again, for the rest.
    Again,
    Over(Result<(), OpError>),
}

/// An operation in progress. Boxed while the kernel holds it, because the kernel reads the pieces
/// and the time in place.
pub(crate) struct Op<T> {
    request: Request,
    pub(crate) token: T,
    /// Bytes that were transferred.
    done: usize,
    total: usize,
    pieces: Vec<libc::iovec>,
    bounce: Option<AlignedBuf>,
    way: Way,
    /// Whether the file system accepts O_DIRECT but has refused this transfer.
    no_direct: bool,
    retries: u32,
    pub(crate) delay: Option<Timespec>,
    /// The gate that holds it, for tests.
    #[cfg(feature = "gate")]
    pub(crate) held: Option<crate::gate::Held>,
}

// SAFETY: `pieces` points into fragments of `request` or into `bounce`, which move with the
// operation, and which any thread may use.
unsafe impl<T: Send> Send for Op<T> {}

impl<T> Op<T> {
    pub(crate) fn new(request: Request, token: T, delay: Option<Duration>) -> Self {
        let total = total_len(request.buffers());
        if request.changes() {
            request.file().write_begins();
        }
        Self {
            total,
            #[cfg(feature = "gate")]
            held: crate::gate::Held::of(request.file().path()),
            request,
            token,
            done: 0,
            pieces: Vec::new(),
            bounce: None,
            way: Way::Cached,
            no_direct: false,
            retries: 0,
            delay: delay.map(Timespec::from),
        }
    }

    /// The entry for the remaining transfer. Its pointers are into `self`, which must not be
    /// dropped until the completion.
    pub(crate) fn entry(&mut self) -> (squeue::Entry, Way) {
        let file = Arc::clone(self.request.file());
        let fd = Fd(file.cached_fd());
        let entry = match self.request {
            Request::Sync { all, .. } => {
                let flags = if all { FsyncFlags::empty() } else { FsyncFlags::DATASYNC };
                opcode::Fsync::new(fd).flags(flags).build()
            }
            Request::Punch { offset, len, .. } => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build()
            }
            Request::Zero { offset, len, .. } => {
                let mode = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
                opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build()
            }
            Request::Read { offset, .. } => {
                let (fd, at) = self.prepare(offset);
                opcode::Readv::new(fd, self.pieces.as_ptr(), self.pieces.len() as u32).offset(at).build()
            }
            Request::Write { offset, .. } => {
                let (fd, at) = self.prepare(offset);
                opcode::Writev::new(fd, self.pieces.as_ptr(), self.pieces.len() as u32).offset(at).build()
            }
        };
        (entry, self.way)
    }

    /// The timer that delays the operation, or the entry that waits for its gate, if any. Its
    /// pointer is into `self`.
    pub(crate) fn timer(&self) -> Option<squeue::Entry> {
        #[cfg(feature = "gate")]
        if let Some(held) = &self.held {
            let opened = opcode::PollAdd::new(Fd(held.fd()), libc::POLLIN as u32).build();
            return Some(opened.flags(squeue::Flags::IO_LINK));
        }
        let time = self.delay.as_ref()?;
        // Without ETIME_SUCCESS an expired timer would break the link.
        let timer = opcode::Timeout::new(&raw const *time).flags(TimeoutFlags::ETIME_SUCCESS).build();
        Some(timer.flags(squeue::Flags::IO_LINK))
    }

    /// Prepares the pieces for the bytes that are left. Returns the handle to use, and the offset
    /// in the file.
    fn prepare(&mut self, offset: u64) -> (Fd, u64) {
        let file = self.request.file();
        let (at, left) = (offset + self.done as u64, self.total - self.done);
        // A short transfer leaves an odd rest. The rest, and transfers that begin or end inside a
        // block, go through the cache.
        let align = file.direct_align();
        let aligned = at.is_multiple_of(align as u64) && left.is_multiple_of(align);
        let direct = file.direct_fd().filter(|_| aligned && !self.no_direct);
        let fd = Fd(direct.unwrap_or(file.cached_fd()));
        self.pieces.clear();
        let buffers = self.request.buffers();
        let mut fits = true;
        for_window(buffers, self.done, left, |part| {
            fits &= part.address().addr().is_multiple_of(align) && part.len.is_multiple_of(align);
            if self.pieces.len() < MAX_PIECES {
                self.pieces.push(libc::iovec { iov_base: part.address().cast(), iov_len: part.len });
            }
        });
        self.way = if direct.is_none() {
            Way::Cached
        } else if fits {
            Way::Direct
        } else {
            Way::Bounced
        };
        if self.way == Way::Bounced {
            let len = left.min(MAX_BOUNCED);
            let bounce = AlignedBuf::new(len);
            if matches!(self.request, Request::Write { .. }) {
                let mut to = 0;
                for_window(buffers, self.done, len, |part| {
                    copy(&part.slice(), &bounce.slice(), 0, to);
                    to += part.len;
                });
            }
            self.pieces.clear();
            self.pieces.push(libc::iovec { iov_base: bounce.slice().ptr_guard_mut().as_ptr().cast(), iov_len: len });
            self.bounce = Some(bounce);
        }
        (fd, at)
    }

    /// Processes the kernel's `result`.
    pub(crate) fn step(&mut self, result: i32) -> Step {
        if result < 0 {
            return self.failed(-result);
        }
        if !matches!(self.request, Request::Read { .. } | Request::Write { .. }) {
            return Step::Over(Ok(()));
        }
        let count = result as usize;
        if let Some(bounce) = self.bounce.take()
            && matches!(self.request, Request::Read { .. })
        {
            let mut from = 0;
            for_window(self.request.buffers(), self.done, count, |part| {
                copy(&bounce.slice(), &part.slice(), from, 0);
                from += part.len;
            });
        }
        self.done = (self.done + count).min(self.total);
        match self.total - self.done {
            0 => Step::Over(Ok(())),
            missing if count == 0 => {
                Step::Over(Err(OpError::Short { path: self.request.file().path().to_owned(), missing }))
            }
            _ => Step::Again,
        }
    }

    fn failed(&mut self, errno: i32) -> Step {
        self.bounce = None;
        match errno {
            libc::EINTR | libc::EAGAIN if self.retries < MAX_RETRIES => {
                self.retries += 1;
                Step::Again
            }
            libc::ECANCELED => Step::Over(Err(OpError::Cancelled)),
            // Blocks larger than pages, or memory that the device cannot reach: the cache takes any
            // transfer.
            libc::EINVAL if self.way != Way::Cached => {
                self.no_direct = true;
                Step::Again
            }
            _ => {
                let path = self.request.file().path().to_owned();
                Step::Over(Err(OpError::Io { path, source: io::Error::from_raw_os_error(errno) }))
            }
        }
    }
}

impl<T> Op<T> {
    /// Whether it makes a file durable.
    pub(crate) fn is_sync(&self) -> bool {
        matches!(self.request, Request::Sync { .. })
    }

    /// Takes the operation apart at its end: the token and the memory. Notifies the file of the end
    /// of a write.
    pub(crate) fn into_parts(self) -> (T, Vec<Fragment>) {
        if self.request.changes() {
            self.request.file().write_ends();
        }
        let buffers = match self.request {
            Request::Read { buffers, .. } | Request::Write { buffers, .. } => buffers,
            Request::Sync { .. } | Request::Punch { .. } | Request::Zero { .. } => Vec::new(),
        };
        (self.token, buffers)
    }
}

/// Copies what fits from `from[from_at..]` to `to[to_at..]`.
fn copy(from: &vm_memory::VolatileSlice<'_>, to: &vm_memory::VolatileSlice<'_>, from_at: usize, to_at: usize) {
    let len = from.len().saturating_sub(from_at).min(to.len().saturating_sub(to_at));
    // Both are cut to the slices, so neither can fail.
    if let (Ok(from), Ok(to)) = (from.subslice(from_at, len), to.subslice(to_at, len)) {
        from.copy_to_volatile_slice(to);
    }
}
