//! The events of a trace.

use crate::trace::records::Record;
use crate::trace::step::WordStep;
use crate::units::PageRange;

/// A file: its device's number and its inode's.
pub(crate) type FileId = (u64, u64);

/// One linearization point. `at` is the address of a reservation, `table` the number of an
/// ownership table.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// A VM is born: a schedule begins.
    Schedule,
    Table {
        table: u64,
        pages: u64,
    },
    TableGone {
        table: u64,
    },
    /// Changed a record, which was `before` and is `after`.
    Word {
        table: u64,
        block: usize,
        page: Option<usize>,
        step: WordStep,
        before: Record,
        after: Record,
        device: u64,
    },
    Lock {
        table: u64,
    },
    Unlock {
        table: u64,
    },
    /// A pin is requested.
    Pin {
        device: u64,
        table: u64,
        range: PageRange,
        write: bool,
        long: bool,
    },
    /// The pin is held: `counted` if not all of it, and whether a section keeps the rest.
    Held {
        device: u64,
        counted: Option<Vec<PageRange>>,
        section: bool,
    },
    /// The pin is dropped; its counts are removed from here on.
    Closing {
        device: u64,
    },
    /// The pin is gone, or was refused: it has no counts left.
    Done {
        device: u64,
    },
    /// The reservation is the table's region.
    Space {
        at: u64,
        table: u64,
    },
    SpaceGone {
        at: u64,
    },
    Shared {
        at: u64,
        range: PageRange,
        file: FileId,
        page: u64,
    },
    Private {
        at: u64,
        range: PageRange,
        file: FileId,
        page: u64,
    },
    Zero {
        at: u64,
        range: PageRange,
    },
    /// The VM's own copies are dropped: the mapping below is shown.
    Dropped {
        at: u64,
        range: PageRange,
    },
    /// The memory was removed.
    Nothing {
        at: u64,
        range: PageRange,
    },
    /// Private pages with the same bytes replaced a mapping.
    Replaced {
        at: u64,
        range: PageRange,
    },
    /// The kernel's COW was broken, or bytes were copied in: the pages are the VM's own.
    Owned {
        at: u64,
        range: PageRange,
    },
    /// The kernel reported the pages of `range` that are the VM's own.
    Kernel {
        at: u64,
        range: PageRange,
        runs: Vec<PageRange>,
    },
    Protected {
        at: u64,
        range: PageRange,
    },
    Released {
        at: u64,
        range: PageRange,
    },
    Layer {
        layer: u64,
        file: FileId,
    },
    LayerGone {
        layer: u64,
    },
    Handle {
        layer: u64,
    },
    HandleGone {
        layer: u64,
    },
    /// A view is registered, or shows another map. `born`: its pages are a VM's own.
    View {
        view: u64,
        born: bool,
        map: Vec<(PageRange, u64, u64)>,
    },
    ViewGone {
        view: u64,
    },
    /// Copied to a file, where the runs are contiguous.
    Written {
        at: u64,
        runs: Vec<PageRange>,
        file: FileId,
        page: u64,
    },
    /// A layer is published before its pages are filled.
    Hollow {
        layer: u64,
    },
    /// A sweep has checked handles for the last time: these layers have no handle.
    Swept {
        layers: Vec<u64>,
    },
    /// Memory of a file is freed; `swept`: of a layer in use, by a sweep.
    Punch {
        file: FileId,
        range: PageRange,
        swept: bool,
    },
    /// The VM is dropped: its pages in its birth file have no owner any more.
    Left {
        table: u64,
    },
    /// A reset proceeds: there is no uncounted read.
    ResetBegun {
        table: u64,
    },
    FreezeBegun {
        table: u64,
    },
    FreezeFailed {
        table: u64,
    },
    /// The region's lock is about to be released, with no background work left: this is its map.
    Settled {
        table: u64,
        map: Vec<(PageRange, u64, u64)>,
    },
    /// A freeze has made an image; `declared` are the no-fork pages.
    Image {
        table: u64,
        map: Vec<(PageRange, u64, u64)>,
        declared: Vec<PageRange>,
    },
}

impl Event {
    /// The table or reservation of the event, if any.
    pub(crate) fn about(&self) -> Option<(u64, Option<PageRange>)> {
        Some(match self {
            Self::Word { table, block, page, .. } => {
                let whole = PageRange::with_len(*block as u64 * crate::BLOCK_PAGES, crate::BLOCK_PAGES);
                (*table, Some(page.map_or(whole, |page| PageRange::with_len(whole.start + page as u64, 1))))
            }
            Self::Lock { table } | Self::Unlock { table } | Self::TableGone { table } | Self::Table { table, .. } => {
                (*table, None)
            }
            Self::FreezeBegun { table }
            | Self::FreezeFailed { table }
            | Self::ResetBegun { table }
            | Self::Left { table }
            | Self::Settled { table, .. }
            | Self::Image { table, .. } => (*table, None),
            Self::Pin { table, range, .. } => (*table, Some(*range)),
            Self::Shared { at, range, .. }
            | Self::Private { at, range, .. }
            | Self::Zero { at, range }
            | Self::Dropped { at, range }
            | Self::Nothing { at, range }
            | Self::Replaced { at, range }
            | Self::Owned { at, range }
            | Self::Kernel { at, range, .. }
            | Self::Protected { at, range }
            | Self::Released { at, range } => (*at, Some(*range)),
            Self::Space { at, .. } | Self::SpaceGone { at } => (*at, None),
            Self::Written { at, .. } => (*at, None),
            _ => return None,
        })
    }
}
