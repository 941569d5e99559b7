//! The shape of a guest's memory.

use vm_memory::GuestAddress;

use crate::error::RamError;
use crate::units::{PAGE_SHIFT, PAGE_SIZE};

/// Start of the gap for memory-mapped devices: 3 GiB.
pub const GAP_START: u64 = 0xc000_0000;

/// Where memory continues above the gap: 4 GiB.
pub const GAP_END: u64 = 0x1_0000_0000;

/// Maximum memory of a guest, which must fit below 2^46 (a host with 4-level page tables has 2^47
/// addresses for itself).
const MAX_BYTES: u64 = 1 << 45;

/// The shape of a guest's memory: which guest-physical ranges are RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamLayout {
    ranges: Vec<(GuestAddress, u64)>,
}

impl RamLayout {
    /// `bytes` of RAM from 0, with the gap below 4 GiB.
    ///
    /// # Errors
    /// When `bytes` is 0, not a multiple of the page size or too large.
    pub fn new(bytes: u64) -> Result<Self, RamError> {
        if bytes == 0 {
            return Err(RamError::NoMemory);
        }
        if !bytes.is_multiple_of(PAGE_SIZE) {
            return Err(RamError::NotPageSized { bytes });
        }
        if bytes > MAX_BYTES {
            return Err(RamError::TooLarge { bytes, most: MAX_BYTES });
        }
        let low = bytes.min(GAP_START);
        let mut ranges = vec![(GuestAddress(0), low >> PAGE_SHIFT)];
        if bytes > low {
            ranges.push((GuestAddress(GAP_END), (bytes - low) >> PAGE_SHIFT));
        }
        Ok(Self { ranges })
    }

    /// RAM in the given ranges: start and length in pages of each.
    ///
    /// # Errors When the list is empty, a range is empty or not page-aligned, or the ranges are not
    /// ascending and disjoint.
    pub fn of_ranges(ranges: &[(GuestAddress, u64)]) -> Result<Self, RamError> {
        let mut free = 0;
        let mut total = 0u64;
        for (start, pages) in ranges {
            let wrong = RamError::Range { start: start.0, pages: *pages };
            let Some(end) = pages.checked_mul(PAGE_SIZE).and_then(|bytes| start.0.checked_add(bytes)) else {
                return Err(wrong);
            };
            if *pages == 0 || start.0 < free || !start.0.is_multiple_of(PAGE_SIZE) {
                return Err(wrong);
            }
            free = end;
            total = total.saturating_add(pages << PAGE_SHIFT);
        }
        if total == 0 {
            return Err(RamError::NoMemory);
        }
        if free > 2 * MAX_BYTES || total > MAX_BYTES {
            return Err(RamError::TooLarge { bytes: total, most: MAX_BYTES });
        }
        Ok(Self { ranges: ranges.to_vec() })
    }

    /// Start and length in pages of each range, ascending.
    #[must_use]
    pub fn ranges(&self) -> &[(GuestAddress, u64)] {
        &self.ranges
    }

    /// Total size.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|(_, pages)| pages << PAGE_SHIFT).sum()
    }
}
