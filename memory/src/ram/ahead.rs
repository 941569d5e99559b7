//! Copies ahead of writes, of all regions.

use crate::ahead::{AheadUse, PageSet, PageSetError};
use crate::error::RamError;
use crate::quiesce::Quiesced;
use crate::ram::GuestRam;
use crate::region::ahead::copy_all_ahead;

impl GuestRam {
    /// Gives this VM its own copies of up to `most` pages of `set`, ahead of their first write.
    /// Returns the number of copied pages. vCPUs and devices may run meanwhile. Contents do not
    /// change, and pages that cannot be copied stay shared.
    ///
    /// # Errors
    /// When the set belongs to a guest of another shape. Then nothing is copied.
    pub fn copy_ahead(&self, set: &PageSet, most: u64) -> Result<u64, PageSetError> {
        set.expect_fits(self.layout())?;
        Ok(copy_all_ahead(self.regions(), set, most))
    }

    /// The pages that this VM has written since it was last made, reset, frozen or woken, and the
    /// use of the pages copied ahead since. Unchanged copies do not count as written, so a set
    /// learned from the result forgets pages that are no longer written.
    ///
    /// # Errors
    /// When there is no memory yet, some is lost, or the page map cannot be read.
    pub fn written_set(&self, _quiesced: &Quiesced<'_>) -> Result<(PageSet, AheadUse), RamError> {
        let (mut runs, mut all) = (Vec::with_capacity(self.regions().len()), AheadUse::default());
        for region in self.regions() {
            let (written, one) = region.written()?;
            runs.push(written);
            all += one;
        }
        Ok((PageSet::found(runs), all))
    }

    /// Whether [`GuestRam::written_set`] covers all writes of this VM since it was made or reset:
    /// it was neither frozen nor suspended since.
    #[must_use]
    pub fn is_written_set_whole(&self) -> bool {
        self.regions().iter().all(|region| !region.state().moved)
    }
}
