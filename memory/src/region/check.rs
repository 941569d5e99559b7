//! A consistency check of a VM's memory: the table, the kernel, the map and the mappings.

use thiserror::Error;

use crate::error::RamError;
use crate::layer::LayerOffset;
use crate::region::GuestRegion;
use crate::region::space::Differs;
use crate::units::PageRange;

/// A disagreement: a bug in this crate, or a writer that was not stopped.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CheckError {
    /// The table claims pages that the kernel does not confirm.
    #[error("I1: {range} are called exclusive and are not the VM's own")]
    NotOwned {
        /// Which pages.
        range: PageRange,
    },
    /// A device holds a page that may be shared.
    #[error("I3: {range} are pinned and not exclusive")]
    PinnedNotExclusive {
        /// Which pages.
        range: PageRange,
    },
    /// A page shows a source that is not in the map, and might be punched under the VM.
    #[error("I14: {range} show {shown} instead of {says}, which the map has")]
    Astray {
        /// Which pages.
        range: PageRange,
        /// Mapped source.
        shown: String,
        /// Source in the map.
        says: String,
    },
    /// More mappings than promised.
    #[error("D5: {mappings} mappings, and {promised} were promised")]
    Unpromised {
        /// Number of mappings.
        mappings: u64,
        /// Number of mappings in the budget.
        promised: u64,
    },
    /// The page map could not be read.
    #[error(transparent)]
    Ram(#[from] RamError),
}

fn told(source: Option<&LayerOffset>) -> String {
    source.map_or_else(|| "zeros".to_owned(), |source| format!("{source:?}"))
}

impl GuestRegion {
    pub(crate) fn check(&self) -> Result<(), CheckError> {
        let mut state = self.checked(self.range())?;
        // Until the background freeze is absorbed, only the view before it has pages that are still
        // mapped.
        self.finish_background(&mut state)?;
        let table = self.table.lock();
        let own = self.own(&state)?;
        let others = crate::units::subtract_runs(&[self.range()], &own);
        for run in &others {
            let claimed = crate::units::subtract_runs(&[*run], &table.not_exclusive(*run));
            if let Some(range) = claimed.first().copied() {
                return Err(CheckError::NotOwned { range });
            }
            if let Some(range) = self.table.pinned_runs(*run).first().copied() {
                return Err(CheckError::PinnedNotExclusive { range });
            }
            if let Some(Differs { range, shown, says }) = state.space.mismatched_ranges(*run).first() {
                let (shown, says) = (told(shown.as_ref()), told(says.as_ref()));
                return Err(CheckError::Astray { range: *range, shown, says });
            }
        }
        let (mappings, promised) = (state.space.mappings().len() as u64, state.space.promised());
        if mappings > promised { Err(CheckError::Unpromised { mappings, promised }) } else { Ok(()) }
    }
}
