//! Merging of layers, of a whole image and of a whole VM.

use std::sync::Arc;

use crate::error::RamError;
use crate::layer::registry::View;
use crate::quiesce::Quiesced;
use crate::ram::{GuestRam, RamImage};
use crate::region::compact::{CompactReport, MergedLayer, runs_to_merge};
use crate::region::dont_fork;
use crate::region::freeze::RegionImage;
use crate::store::Store;

impl RamImage {
    /// Returns the same memory in fewer pieces, for a template that is forked hundreds of times.
    /// Copies short pieces only.
    ///
    /// # Errors
    /// When there is no memory for the copies; the image stays as it was in any case.
    pub fn compact(&self, store: &Store) -> Result<(Self, CompactReport), RamError> {
        let mut report = CompactReport::default();
        let merge = |region: &RegionImage| {
            let barred = dont_fork::runs(&region.dont_fork);
            let merged = MergedLayer::make(store, region.map.map(), &runs_to_merge(&region.map, &barred))?;
            let mut map = Arc::clone(region.map.map());
            if let Some(merged) = &merged {
                merged.substitute(Arc::make_mut(&mut map));
            }
            report.note(&region.map, &map, merged.as_ref().map_or(0, MergedLayer::pages));
            Ok(RegionImage { map: Arc::new(View::new(store.views(), map)), dont_fork: region.dont_fork.clone() })
        };
        let regions = self.regions().iter().map(merge).collect::<Result<_, RamError>>()?;
        Ok((self.with_regions(regions), report))
    }
}

impl GuestRam {
    /// Merges the short pieces of this VM's own view, now. Freezes have it done in the background.
    ///
    /// # Errors
    /// When there is no memory for the copies, or a mapping fails: then some pieces are merged and
    /// others are not, with the same contents.
    pub fn compact(&self, _quiesced: &Quiesced<'_>) -> Result<CompactReport, RamError> {
        let mut report = CompactReport::default();
        for region in self.regions() {
            region.compact(&mut report)?;
        }
        Ok(report)
    }
}
