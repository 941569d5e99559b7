//! Memory that an operation owns: parts of pins, or of buffers in this process.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use clade_memory::DmaPin;
use thiserror::Error;
use vm_memory::VolatileSlice;

/// Alignment of buffers, file offsets and lengths for transfers past the page cache: a multiple of
/// every disk's block size.
pub(crate) const ALIGN: usize = 4096;

/// A part is not inside the buffer.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("bytes {start}..{start}+{len} are not inside a buffer of {whole} bytes")]
pub struct BufferError {
    /// First byte of the part.
    pub start: usize,
    /// Length of the part in bytes.
    pub len: usize,
    /// Length of the buffer in bytes.
    pub whole: usize,
}

/// Zeroed memory, aligned for transfers past the page cache. The kernel may write to it at any time
/// while an operation owns it, so it is accessed only through [`AlignedBuf::slice`].
pub struct AlignedBuf {
    at: NonNull<u8>,
    len: usize,
    layout: Layout,
}

// SAFETY: the memory belongs to this value alone and is only accessed by the kernel and through
// volatile slices, both independent of threads.
unsafe impl Send for AlignedBuf {}
// SAFETY: as for Send: there is no access through `&self` but by volatile slices.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// `len` bytes of zeros.
    #[must_use]
    pub fn new(len: usize) -> Self {
        let rounded =
            len.max(1).checked_next_multiple_of(ALIGN).and_then(|size| Layout::from_size_align(size, ALIGN).ok());
        // A length beyond the address space is treated like exhausted memory.
        let Some(layout) = rounded else { handle_alloc_error(Layout::new::<u8>()) };
        // SAFETY: the layout's size is at least `ALIGN`.
        let at = unsafe { alloc_zeroed(layout) };
        let Some(at) = NonNull::new(at) else { handle_alloc_error(layout) };
        Self { at, len, layout }
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its bytes, as volatile memory.
    #[must_use]
    pub fn slice(&self) -> VolatileSlice<'_> {
        // SAFETY: `at` is valid for `len` bytes for as long as `self` lives, and all access to them
        // is volatile.
        unsafe { VolatileSlice::new(self.at.as_ptr(), self.len) }
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout; operations that the kernel still works on
        // own an Arc of it.
        unsafe { dealloc(self.at.as_ptr(), self.layout) };
    }
}

#[derive(Clone, Debug)]
enum Whole {
    Pin(Arc<DmaPin>),
    Buf(Arc<AlignedBuf>),
}

/// Contiguous memory for a transfer. It keeps alive the pin or the buffer that it is a part of.
#[derive(Clone, Debug)]
pub struct Fragment {
    whole: Whole,
    start: usize,
    len: usize,
}

impl Fragment {
    /// `len` bytes of a pin, from its byte `start` on.
    ///
    /// # Errors
    /// When they are not inside the pin.
    pub fn pinned(pin: &Arc<DmaPin>, start: usize, len: usize) -> Result<Self, BufferError> {
        Self::within(Whole::Pin(Arc::clone(pin)), pin.len(), start, len)
    }

    /// `len` bytes of a buffer, from its byte `start` on.
    ///
    /// # Errors
    /// When they are not inside the buffer.
    pub fn owned(buf: &Arc<AlignedBuf>, start: usize, len: usize) -> Result<Self, BufferError> {
        Self::within(Whole::Buf(Arc::clone(buf)), buf.len(), start, len)
    }

    fn within(whole: Whole, size: usize, start: usize, len: usize) -> Result<Self, BufferError> {
        if start.checked_add(len).is_none_or(|end| end > size) {
            return Err(BufferError { start, len, whole: size });
        }
        Ok(Self { whole, start, len })
    }

    /// The part of `len` bytes from `start` on; both are cut to the fragment.
    #[must_use]
    pub fn part(&self, start: usize, len: usize) -> Self {
        let start = start.min(self.len);
        Self { whole: self.whole.clone(), start: self.start + start, len: len.min(self.len - start) }
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its bytes, as volatile memory.
    #[must_use]
    pub fn slice(&self) -> VolatileSlice<'_> {
        let whole = match &self.whole {
            Whole::Pin(pin) => pin.slice(),
            Whole::Buf(buf) => buf.slice(),
        };
        // Checked when the fragment was made, so this cannot fail.
        whole.subslice(self.start, self.len).unwrap_or_else(|_| empty())
    }

    /// Host address of the first byte.
    pub(crate) fn address(&self) -> *mut u8 {
        match &self.whole {
            Whole::Pin(pin) => pin.host_address().wrapping_add(self.start),
            Whole::Buf(buf) => buf.at.as_ptr().wrapping_add(self.start),
        }
    }
}

fn empty<'a>() -> VolatileSlice<'a> {
    // SAFETY: no byte is accessed through a slice of length 0.
    unsafe { VolatileSlice::new(NonNull::dangling().as_ptr(), 0) }
}

/// The number of bytes in all `fragments`.
#[must_use]
pub fn total_len(fragments: &[Fragment]) -> usize {
    fragments.iter().map(Fragment::len).sum()
}

/// The `len` bytes behind the first `skip` of `fragments`, as fragments of the same memory. Fewer,
/// if there are not so many.
#[must_use]
pub fn window(fragments: &[Fragment], skip: usize, len: usize) -> Vec<Fragment> {
    let mut parts = Vec::with_capacity(fragments.len());
    for_window(fragments, skip, len, |part| parts.push(part.fragment.part(part.start, part.len)));
    parts
}

/// Calls `with` for each part of `fragments` in the `len` bytes behind the first `skip`.
pub(crate) fn for_window<'a>(fragments: &'a [Fragment], skip: usize, len: usize, mut with: impl FnMut(Part<'a>)) {
    let (mut skip, mut left) = (skip, len);
    for fragment in fragments {
        if skip >= fragment.len {
            skip -= fragment.len;
            continue;
        }
        if left == 0 {
            return;
        }
        let take = (fragment.len - skip).min(left);
        with(Part { fragment, start: skip, len: take });
        left -= take;
        skip = 0;
    }
}

/// A part of a fragment, borrowed.
pub(crate) struct Part<'a> {
    fragment: &'a Fragment,
    start: usize,
    pub(crate) len: usize,
}

impl Part<'_> {
    pub(crate) fn address(&self) -> *mut u8 {
        self.fragment.address().wrapping_add(self.start)
    }

    pub(crate) fn slice(&self) -> VolatileSlice<'_> {
        self.fragment.slice().subslice(self.start, self.len).unwrap_or_else(|_| empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_stay_inside() {
        let buf = Arc::new(AlignedBuf::new(100));
        assert!(buf.slice().ptr_guard().as_ptr().addr().is_multiple_of(ALIGN));
        assert_eq!(Fragment::owned(&buf, 90, 11).unwrap_err(), BufferError { start: 90, len: 11, whole: 100 });
        assert!(Fragment::owned(&buf, usize::MAX, 2).is_err());
        let whole = Fragment::owned(&buf, 10, 90).unwrap();
        let part = whole.part(80, 50);
        assert_eq!((part.start, part.len()), (90, 10));
        assert_eq!(part.slice().len(), 10);
        assert!(whole.part(500, 1).is_empty());
    }

    #[test]
    fn a_window_covers_exactly_its_bytes() {
        let buf = Arc::new(AlignedBuf::new(64));
        let parts = [
            Fragment::owned(&buf, 0, 10).unwrap(),
            Fragment::owned(&buf, 20, 5).unwrap(),
            Fragment::owned(&buf, 40, 20).unwrap(),
        ];
        for skip in 0..36 {
            for len in 0..36 {
                let mut seen = 0;
                for_window(&parts, skip, len, |part| seen += part.slice().len());
                assert_eq!(seen, len.min(35usize.saturating_sub(skip)), "{skip} {len}");
            }
        }
    }
}
