//! No-fork regions: memory that a child does not inherit (R19), such as rings shared with a device or secrets.
//!
//! Declared ranges are left out of every layer: a freeze neither shares nor copies them, so their bytes are in no file a child
//! maps. The parent keeps them as they are. A child gets them absent, as zeros, or fresh from a reference page, and inherits the
//! declaration, so that its own children do too. The declaration belongs to the range: writing, protecting, discarding or resetting its
//! pages does not change it.

use crate::error::RamError;
use crate::interval::{IntervalMap, Piece};
use crate::layer::{LayerMap, Source};
use crate::reference::RefPage;
use crate::region::GuestRegion;
use crate::units::{PageRange, push_run, subtract_runs};

/// What a child finds in a no-fork range.
#[derive(Clone, Debug)]
pub enum NoFork {
    /// No memory: an access stops the child (a guest's by an error from KVM, the VMM's by an error of its own).
    Absent,
    /// Zeros.
    Zeroed,
    /// Copies of a reference page.
    Fresh(RefPage),
}

impl Piece for NoFork {
    fn advance(&self, _pages: u64) -> Self {
        self.clone()
    }
    fn continues(&self, _pages: u64, next: &Self) -> bool {
        match (self, next) {
            (Self::Absent, Self::Absent) | (Self::Zeroed, Self::Zeroed) => true,
            (Self::Fresh(a), Self::Fresh(b)) => a.same_as(b),
            _ => false,
        }
    }
}

/// Declarations by range.
pub(crate) type NoForkMap = IntervalMap<NoFork>;

/// The declared ranges.
pub(crate) fn runs(declared: &NoForkMap) -> Vec<PageRange> {
    let mut out = Vec::new();
    for (range, _) in declared.iter() {
        push_run(&mut out, range);
    }
    out
}

/// The parts of `range` that children may have.
pub(crate) fn inherited(declared: &NoForkMap, range: PageRange) -> Vec<PageRange> {
    subtract_runs(&[range], &runs(declared))
}

/// What the children's map says where the parent's must not be seen.
pub(crate) fn hide(declared: &NoForkMap, map: &mut LayerMap) {
    for (range, what) in declared.iter() {
        map.remove(range);
        if let NoFork::Fresh(page) = what {
            page.sources(range).into_iter().for_each(|(piece, source): (PageRange, Source)| map.insert(piece, source));
        }
    }
}

/// The ranges a child has no memory for.
pub(crate) fn absent(declared: &NoForkMap) -> Vec<PageRange> {
    declared.iter().filter(|(_, what)| matches!(what, NoFork::Absent)).map(|(range, _)| range).collect()
}

impl GuestRegion {
    /// Declares what children find in `range` from the next fork on; `None` takes the declaration back, and they inherit it again.
    ///
    /// # Errors
    /// When the range is not the region's, or the region has no memory yet.
    pub fn set_no_fork(&self, range: PageRange, what: Option<NoFork>) -> Result<(), RamError> {
        let mut state = self.checked(range)?;
        match what {
            Some(what) => state.no_fork.insert(range, what),
            None => state.no_fork.remove(range),
        }
        Ok(())
    }

    /// The declared ranges and what children find there.
    #[must_use]
    pub fn no_fork(&self) -> Vec<(PageRange, NoFork)> {
        self.state().no_fork.iter().map(|(range, what)| (range, what.clone())).collect()
    }
}
