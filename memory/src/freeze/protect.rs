//! The protect gate: the only way a page of guest memory is write-protected.
//!
//! R10 and R20: the gate does not inspect pages. It takes [`SharedPages`] runs only, which are made
//! by clearing bits in the ownership table, under its lock. A pinned page keeps its bit, so no such
//! run includes it, and *the gate cannot protect it*. A page pinned later has lost its bit, takes
//! the locked path, and is released there before the device gets its address.
//!
//! Protection uses userfaultfd (R16: no page-table bits of our own), so a write waits regardless of
//! its origin: vCPU, KVM, or a system call of this process. The registration lasts for the region's
//! life: registered but unprotected memory loses only fault-around, while unregistering would
//! discard KVM's mappings of the whole region.

use std::io;
use std::marker::PhantomData;
use std::sync::Arc;

use crate::ownership::TableGuard;
use crate::sys::{RegisterMode, Reservation, Uffd};
use crate::units::{PageRange, subtract_runs};

/// Runs whose exclusive bits were just cleared. Proof as long as the table stays locked: until then
/// the pages cannot be pinned.
#[derive(Debug)]
pub(crate) struct SharedPages<'t> {
    runs: Vec<PageRange>,
    pinned: Vec<PageRange>,
    _locked: PhantomData<&'t TableGuard<'t>>,
}

impl<'t> SharedPages<'t> {
    /// Clears the bits of `runs` (ascending) except for pinned pages (I2, I3).
    pub(crate) fn give_up(table: &'t TableGuard<'_>, runs: &[PageRange]) -> Self {
        let mut pinned = Vec::new();
        for run in runs {
            pinned.extend(table.share(*run));
        }
        Self { runs: subtract_runs(runs, &pinned), pinned, _locked: PhantomData }
    }

    /// The pages that may be protected.
    pub(crate) fn runs(&self) -> &[PageRange] {
        &self.runs
    }

    /// The pages that stay the VM's own because a device holds them.
    pub(crate) fn pinned(&self) -> &[PageRange] {
        &self.pinned
    }
}

/// Write-protects and releases pages of one region.
#[derive(Debug)]
pub(crate) struct ProtectGate {
    uffd: Arc<Uffd>,
    at: Arc<Reservation>,
}

impl ProtectGate {
    /// Prepares the whole region `at`. (A part would split its mappings.)
    pub(crate) fn open(uffd: Arc<Uffd>, at: Arc<Reservation>) -> io::Result<Self> {
        uffd.register(&at, PageRange::new(0, at.pages()), RegisterMode::Protected)?;
        Ok(Self { uffd, at })
    }

    /// The region's memory.
    pub(crate) fn at(&self) -> &Arc<Reservation> {
        &self.at
    }

    pub(crate) fn uffd(&self) -> &Arc<Uffd> {
        &self.uffd
    }

    /// Protects `shared`: a CPU's write waits once this returns. On failure some pages may be
    /// protected, and the caller releases all.
    pub(crate) fn protect(&self, shared: &SharedPages<'_>) -> io::Result<()> {
        for run in &shared.runs {
            trace!(Protected { at: self.at.addr(0) as u64, range: *run });
            self.uffd.protect(&self.at, *run)?;
        }
        Ok(())
    }

    /// Lifts the protection of `range` and wakes waiting writes. Always safe for the region; the
    /// caller has already copied the pages that the layer still needs.
    pub(crate) fn release(&self, range: PageRange) -> io::Result<()> {
        self.uffd.unprotect(&self.at, range)?;
        trace!(Released { at: self.at.addr(0) as u64, range });
        Ok(())
    }

    /// Wakes writes that wait in `range`, after a different mapping was put there.
    pub(crate) fn wake(&self, range: PageRange) -> io::Result<()> {
        self.uffd.wake(&self.at, range)
    }

    /// Lifts all protection by forgetting the region. The last resort when [`Self::release`] fails.
    pub(crate) fn forget(&self) -> io::Result<()> {
        let all = PageRange::new(0, self.at.pages());
        self.uffd.unregister(&self.at, all)?;
        trace!(Released { at: self.at.addr(0) as u64, range: all });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ownership::OwnershipTable;

    #[test]
    fn r10_the_gate_cannot_be_asked_for_a_pinned_page() {
        let table = OwnershipTable::new(100);
        table.lock().set_exclusive(PageRange::new(0, 100));
        table.lock().split_partial(PageRange::new(0, 1));
        table.try_pin(PageRange::new(20, 23)).unwrap();
        let guard = table.lock();
        let shared = SharedPages::give_up(&guard, &[PageRange::new(10, 30), PageRange::new(50, 60)]);
        assert_eq!(shared.runs(), [PageRange::new(10, 20), PageRange::new(23, 30), PageRange::new(50, 60)]);
        assert_eq!(shared.pinned(), [PageRange::new(20, 23)]);
    }
}
