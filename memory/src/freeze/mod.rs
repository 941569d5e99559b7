//! The copies that a freeze makes, at once or in the background, and its write protection. The steps
//! of a freeze are in [`crate::region::freeze`].

pub(crate) mod background;
pub(crate) mod copies;
pub(crate) mod protect;

/// Selects when a freeze copies private pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FreezeMode {
    /// Before the freeze returns.
    Eager,
    /// In the background, regardless of their number. An error if the host lacks support.
    Background,
    /// In the background if there are many pages and the host supports it.
    #[default]
    Auto,
}

/// Result of a freeze. Counts are pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FreezeReport {
    /// Pages that became layer pages by remapping alone.
    pub remapped: u64,
    /// Pages that were or will be copied into a delta layer (closed gaps included).
    pub copied: u64,
    /// Copied pages that are left to the background.
    pub pending: u64,
    /// Copied pages that are pinned: they stay exclusive and in place.
    pub pinned: u64,
}

impl std::ops::AddAssign for FreezeReport {
    fn add_assign(&mut self, other: Self) {
        self.remapped += other.remapped;
        self.copied += other.copied;
        self.pending += other.pending;
        self.pinned += other.pinned;
    }
}

/// Treatment of pages that are pinned for DMA.
#[cfg(any(test, feature = "hazard"))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PinPolicy {
    /// Pinned pages are copied for other VMs, and stay the VM's own and in place (I3).
    #[default]
    Unshare,
    /// Pinned pages are shared and write-protected like any other page, as in kernels before
    /// exclusive pages were tracked. **Memory is lost**: devices write into layers, and into frames
    /// that the guest has left. For proving that a test would detect it.
    Ignore,
}
