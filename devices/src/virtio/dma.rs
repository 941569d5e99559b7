//! Guest memory for devices: pinned if the kernel gets its address, otherwise copied by the
//! processor.
//!
//! An address that the kernel keeps for a transfer needs a pin (I3), because the VM may be forked
//! meanwhile. A write by a thread of the VMM within one call needs no pin, for example to a status
//! byte or the used ring. Such a write goes through this VM's private mapping, which breaks COW by
//! itself, and workers are paused during a fork.

use std::io;
use std::sync::Arc;

use clade_host_io::Fragment;
use clade_memory::{Access, GuestRam, PageRange, PinError, PinLifetime};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryRegion};

use super::chain::Segment;

/// Why a device cannot use guest memory.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DmaError {
    /// The range is not in RAM.
    #[error("{len:#x} bytes at {address:#x} are not in RAM")]
    Outside {
        /// Guest-physical address of the range.
        address: u64,
        /// Length of the range in bytes.
        len: u64,
    },
    /// The range cannot be pinned.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// The processor's access has failed.
    #[error("guest memory at {address:#x}")]
    Access {
        /// Guest-physical address of the access.
        address: u64,
        /// Why the access has failed.
        #[source]
        source: GuestMemoryError,
    },
}

impl DmaError {
    /// Whether a retry may succeed soon: there was no memory for the VM's own copy of a page, or a
    /// page has as many pins as can be counted.
    #[must_use]
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Self::Pin(PinError::Saturated { .. }) => true,
            Self::Pin(PinError::Unshare { source, .. }) => {
                let kind = source.kind();
                let no_memory = matches!(kind, io::ErrorKind::OutOfMemory | io::ErrorKind::StorageFull);
                no_memory || source.raw_os_error() == Some(libc::EAGAIN)
            }
            Self::Pin(_) | Self::Outside { .. } | Self::Access { .. } => false,
        }
    }
}

/// Pins `segments` for one request, and returns fragments that own the pins.
///
/// # Errors
/// When a segment cannot be pinned. No pin is left then.
pub(crate) fn pin(
    ram: &GuestRam,
    owner: &'static str,
    segments: &[Segment],
    access: Access,
) -> Result<Vec<Fragment>, DmaError> {
    segments.iter().map(|segment| pin_one(ram, owner, segment, access)).collect()
}

fn pin_one(ram: &GuestRam, owner: &'static str, segment: &Segment, access: Access) -> Result<Fragment, DmaError> {
    let (address, len) = (segment.address.0, u64::from(segment.len));
    let outside = || DmaError::Outside { address, len };
    let (region, page) = ram.locate(segment.address).ok_or_else(outside)?;
    let offset = address - region.start_addr().0;
    let range = PageRange::covering(offset, len).ok_or_else(outside)?;
    let pin = Arc::new(region.pin_as(owner, range, access, PinLifetime::Transient)?);
    let start = (offset - page * clade_memory::PAGE_SIZE) as usize;
    Fragment::pinned(&pin, start, len as usize).map_err(|_| outside())
}

/// Copies the first bytes of `segments` from guest memory. Returns the rest of the segments.
///
/// # Errors
/// When there are too few bytes, or guest memory cannot be read.
pub(crate) fn copy_in(ram: &GuestRam, segments: &[Segment], bytes: &mut [u8]) -> Result<Vec<Segment>, DmaError> {
    let mut rest = Vec::with_capacity(segments.len());
    let mut done = 0;
    for segment in segments {
        let take = (bytes.len() - done).min(segment.len as usize);
        if take > 0 {
            read(ram, segment.address, &mut bytes[done..done + take])?;
            done += take;
        }
        if take < segment.len as usize {
            let address = GuestAddress(segment.address.0 + take as u64);
            rest.push(Segment { address, len: segment.len - take as u32 });
        }
    }
    if done < bytes.len() {
        return Err(DmaError::Outside { address: 0, len: (bytes.len() - done) as u64 });
    }
    Ok(rest)
}

/// Copies `bytes` into the first bytes of `segments`. Returns the number of bytes that fitted.
///
/// # Errors
/// When guest memory cannot be written.
pub(crate) fn copy_out(ram: &GuestRam, segments: &[Segment], bytes: &[u8]) -> Result<usize, DmaError> {
    let mut done = 0;
    for segment in segments {
        let take = (bytes.len() - done).min(segment.len as usize);
        write(ram, segment.address, &bytes[done..done + take])?;
        done += take;
    }
    Ok(done)
}

/// Reads guest memory with the processor.
///
/// # Errors
/// When guest memory cannot be read.
pub(crate) fn read(ram: &GuestRam, at: GuestAddress, bytes: &mut [u8]) -> Result<(), DmaError> {
    ram.memory().read_slice(bytes, at).map_err(|source| DmaError::Access { address: at.0, source })
}

/// Writes guest memory with the processor.
///
/// # Errors
/// When guest memory cannot be written.
pub(crate) fn write(ram: &GuestRam, at: GuestAddress, bytes: &[u8]) -> Result<(), DmaError> {
    ram.memory().write_slice(bytes, at).map_err(|source| DmaError::Access { address: at.0, source })
}

/// The first `len` bytes of `segments`, or all of them.
#[must_use]
pub(crate) fn prefix(segments: &[Segment], len: usize) -> Vec<Segment> {
    let mut left = len;
    let mut cut = Vec::new();
    for segment in segments {
        let part = (segment.len as usize).min(left);
        if part == 0 {
            break;
        }
        cut.push(Segment { len: part as u32, ..*segment });
        left -= part;
    }
    cut
}

/// The number of bytes in `segments`.
#[must_use]
pub(crate) fn len_of(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| u64::from(segment.len)).sum()
}

/// The error of a pin without memory for the VM's own copy of a page.
#[cfg(test)]
pub(crate) fn out_of_memory() -> DmaError {
    DmaError::Pin(PinError::Unshare { range: PageRange::new(0, 1), source: io::ErrorKind::OutOfMemory.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn want_of_memory_passes_and_what_the_driver_does_wrong_stays() {
        let range = PageRange::covering(0, 1).into_iter().next();
        let Some(range) = range else { panic!("a page") };
        let unshare = |errno| DmaError::Pin(PinError::Unshare { range, source: io::Error::from_raw_os_error(errno) });
        assert!([libc::ENOMEM, libc::EAGAIN, libc::ENOSPC].into_iter().all(|errno| unshare(errno).is_transient()));
        assert!(DmaError::Pin(PinError::Saturated { range }).is_transient());
        assert!(!unshare(libc::EHWPOISON).is_transient());
        assert!(!DmaError::Pin(PinError::NoPages).is_transient());
        assert!(!DmaError::Outside { address: 0, len: 1 }.is_transient());
    }
}
