//! Checks of all regions.

use crate::quiesce::Quiesced;
use crate::ram::GuestRam;
use crate::region::check::CheckError;

impl GuestRam {
    /// Checks that the ownership table, the kernel, the map and the mappings agree (I1, I3, D5).
    /// Takes time in proportion to the pages the VM owns.
    ///
    /// # Errors
    /// The first disagreement.
    pub fn check(&self, _quiesced: &Quiesced<'_>) -> Result<(), CheckError> {
        self.regions().iter().try_for_each(|region| region.check())
    }
}
