//! How devices access memory, and the bytes that they must read.

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use clade_memory::{Access, DmaPin, PAGE_SIZE, PageRange};

use crate::dma;
use crate::dma::splice::Splice;
use crate::pages::Pages;

const PAGE: usize = PAGE_SIZE as usize;

pub(crate) enum Reach {
    /// By frames that were made the VM's own: registered once.
    Frames(dma::Device),
    /// By the frames present at the start of a short read.
    Held(Held),
    /// By address at the time of each request.
    Address(DmaPin),
}

/// A short read in progress.
pub(crate) struct Held {
    splice: Option<Splice>,
    /// The contents of each page since the pin was taken, starting with the pin's instant.
    seen: Vec<Vec<Arc<[u8; PAGE]>>>,
    // Dropped last: the kernel releases the frames first.
    _pin: DmaPin,
}

impl Held {
    pub(crate) fn of(pin: DmaPin, range: PageRange, model: &Pages) -> Self {
        let seen = (range.start()..range.end()).map(|page| vec![Arc::clone(model.bytes(page))]).collect();
        Self { splice: Some(Splice::of(&pin)), seen, _pin: pin }
    }
}

pub(crate) struct Pin {
    pub(crate) reach: Reach,
    /// Counted over all regions.
    pub(crate) range: PageRange,
    pub(crate) access: Access,
    pub(crate) vm: u64,
    /// Pages that count the pin.
    pub(crate) counted: Vec<u64>,
}

impl Pin {
    /// Records the current contents of the VM's pages.
    pub(crate) fn note(&mut self, model: &Pages) {
        let Reach::Held(held) = &mut self.reach else { return };
        for (page, seen) in (self.range.start()..).zip(&mut held.seen) {
            let now = model.bytes(page);
            if seen.last().is_none_or(|last| !Arc::ptr_eq(last, now)) {
                seen.push(Arc::clone(now));
            }
        }
    }

    /// Reads all pages. Returns whether the request is complete.
    ///
    /// A page with a counted pin is the VM's own: the device sees the guest's latest write. Any
    /// other page may be a layer's, which does not change, or a copy of the guest's own: it must
    /// have its contents of some instant since the pin.
    pub(crate) fn reads_what_it_must(&mut self, model: &Pages) -> bool {
        let held = match &mut self.reach {
            Reach::Held(held) => held,
            Reach::Frames(device) => {
                let wrong = model.first_wrong(self.range, &device.read());
                assert_eq!(wrong, None, "R26: the device sees what the guest wrote");
                return false;
            }
            Reach::Address(pin) => {
                let wrong = model.first_wrong(self.range, &read_by_address(pin));
                assert_eq!(wrong, None, "R26: the device sees what the guest wrote");
                return false;
            }
        };
        let Some(splice) = held.splice.take() else { return true };
        let got = splice.read();
        let counted: BTreeSet<u64> = self.counted.iter().copied().collect();
        for ((page, got), seen) in (self.range.start()..).zip(got.as_chunks::<PAGE>().0).zip(&held.seen) {
            let may = if counted.contains(&page) { &seen[seen.len() - 1..] } else { seen };
            let starts = || may.iter().map(|bytes| bytes[0]).collect::<Vec<_>>();
            let right = may.iter().any(|bytes| **bytes == *got) || **model.bytes(page) == *got;
            assert!(right, "I4: a short read of page {page:#x} is {:#x}.., it held {:x?}..", got[0], starts());
        }
        true
    }
}

/// Bytes that the kernel reads at a pin's address.
fn read_by_address(pin: &DmaPin) -> Vec<u8> {
    // SAFETY: the name is a valid C string.
    let fd = unsafe { libc::memfd_create(c"read".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: fd was just made and has no other owner.
    let file = std::fs::File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    // SAFETY: the pinned bytes are mapped; the kernel reads them.
    let wrote = unsafe { libc::pwrite(file.as_raw_fd(), pin.host_address().cast(), pin.len(), 0) };
    assert_eq!(wrote, pin.len() as isize);
    let mut got = vec![0; pin.len()];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut got, 0).unwrap();
    got
}
