//! The mappings of a region's reservation.

use crate::layer::LayerOffset;
use crate::layer::interval::{IntervalMap, Piece};
use crate::units::{PageRange, pages_in, push_run};

/// Mapping of a piece of the reservation.
#[derive(Clone, Debug)]
pub(crate) enum Mapping {
    /// Shared and writable over the base file: every page is this VM's own.
    SharedBase(LayerOffset),
    /// Private over a layer: the kernel copies on write.
    Private(LayerOffset),
    /// Private zeros.
    Zero,
    /// No memory: not inherited (R19).
    Absent,
}

impl Piece for Mapping {
    fn advance(&self, pages: u64) -> Self {
        match self {
            Self::SharedBase(source) => Self::SharedBase(source.advance(pages)),
            Self::Private(source) => Self::Private(source.advance(pages)),
            Self::Zero => Self::Zero,
            Self::Absent => Self::Absent,
        }
    }
    /// Always false: the kernel may or may not merge two mappings, so each counts against the
    /// budget.
    fn continues(&self, _pages: u64, _next: &Self) -> bool {
        false
    }
}

/// The pieces of one region. Their number is the region's share of the mapping budget.
#[derive(Clone, Debug, Default)]
pub(crate) struct Mappings {
    pieces: IntervalMap<Mapping>,
    /// Number of pages mapped shared, so that zero is known without a walk over all pieces.
    base: u64,
}

impl Mappings {
    /// Records that `mapping` replaces the pieces of `range`.
    pub(crate) fn insert(&mut self, range: PageRange, mapping: Mapping) {
        self.base -= pages_in(&self.base_within(range));
        if matches!(mapping, Mapping::SharedBase(_)) {
            self.base += range.len();
        }
        self.pieces.insert(range, mapping);
    }

    /// Number of pieces.
    pub(crate) fn len(&self) -> usize {
        self.pieces.len()
    }

    /// Whether nothing is mapped.
    pub(crate) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Number of pieces after one piece replaces `range`.
    pub(crate) fn len_with(&self, range: PageRange) -> usize {
        let hit = self.pieces.within(range).len();
        let cut = |page: Option<u64>| page.is_some_and(|page| self.pieces.get(page).is_some());
        // A piece that reaches beyond the range keeps that part as a piece of its own.
        let before = usize::from(cut(range.start.checked_sub(1)) && self.same_piece(range.start));
        let after = usize::from(cut(Some(range.end)) && self.same_piece(range.end));
        self.pieces.len() - hit + 1 + before + after
    }

    /// Whether `page` and the one before it are in one piece.
    fn same_piece(&self, page: u64) -> bool {
        let around = PageRange::new(page.saturating_sub(1), page + 1);
        page > 0 && self.pieces.within(around).len() == 1 && self.pieces.pages_within(around) == 2
    }

    /// The pieces that touch `range`, cut to it, ascending.
    pub(crate) fn within(&self, range: PageRange) -> Vec<(PageRange, Mapping)> {
        self.pieces.within(range)
    }

    /// The piece that contains `page`.
    pub(crate) fn piece(&self, page: u64) -> Option<(PageRange, &Mapping)> {
        self.pieces.entry(page)
    }

    /// Every piece, ascending.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (PageRange, &Mapping)> {
        self.pieces.iter()
    }

    /// Pages mapped shared over the base file.
    pub(crate) fn base_pages(&self) -> u64 {
        self.base
    }

    /// The runs mapped shared over the base file.
    pub(crate) fn base_runs(&self) -> Vec<PageRange> {
        if self.base == 0 {
            return Vec::new();
        }
        base(self.pieces.iter())
    }

    /// The runs of `range` mapped shared over the base file.
    pub(crate) fn base_within(&self, range: PageRange) -> Vec<PageRange> {
        if self.base == 0 {
            return Vec::new();
        }
        base(self.pieces.within(range).iter().map(|(range, mapping)| (*range, mapping)))
    }
}

fn base<'a>(pieces: impl Iterator<Item = (PageRange, &'a Mapping)>) -> Vec<PageRange> {
    let mut runs = Vec::new();
    pieces
        .filter(|(_, mapping)| matches!(mapping, Mapping::SharedBase(_)))
        .for_each(|(range, _)| push_run(&mut runs, range));
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_piece_in_place_of_others_is_counted_beforehand(
            pieces in proptest::collection::vec((0u64..40, 1u64..12), 0..30),
            start in 0u64..40,
            len in 1u64..20,
        ) {
            let mut mappings = Mappings::default();
            for (start, len) in pieces {
                mappings.insert(PageRange::with_len(start, len), Mapping::Zero);
            }
            let range = PageRange::with_len(start, len);
            let expected = mappings.len_with(range);
            mappings.insert(range, Mapping::Absent);
            prop_assert_eq!(mappings.len(), expected);
        }
    }
}
