//! The copies of a freeze: their runs, their layout in the layer, and the part that is remapped in
//! the parent.

use std::sync::Arc;

use crate::backing::Backing;
use crate::freeze::background::{CopySource, DeltaPart};
use crate::layer::{Layer, LayerMap, LayerOffset};
use crate::units::{BLOCK_PAGES, PageRange, join_runs, pages_in, subtract_runs};

/// Runs are joined over gaps up to this length (in pages) even when there are few: copying four
/// shared pages costs less than another mapping in the parent and in every child.
pub(crate) const SMALL_GAP: u64 = if cfg!(shuttle) { 1 } else { 4 };
/// Above this many runs, longer gaps are closed too.
const MANY_RUNS: usize = 64;

/// Place of each run of a region in a delta.
pub(crate) type DeltaRuns = Vec<(PageRange, LayerOffset)>;

/// Selects the copied runs to remap in the parent: never pinned ones (I3; the copied base pages are
/// all pinned), and the longest first, until at most `keep` pages are left.
pub(crate) fn runs_to_remap(copy: &[PageRange], pinned: &[PageRange], keep: u64) -> Vec<PageRange> {
    let mut runs = subtract_runs(copy, pinned);
    let mut left = pages_in(&runs);
    runs.sort_unstable_by_key(|run| std::cmp::Reverse(run.len()));
    runs.retain(|run| {
        let worth = left > keep;
        left -= if worth { run.len() } else { 0 };
        worth
    });
    runs.sort_unstable();
    runs
}

/// Layout of runs in a delta's file: one after another, whole blocks first and aligned so that they
/// can be mapped 2 MiB at a time. (With offset = region offset, one stray page in a huge-page file
/// would cost 2 MiB.)
pub(crate) struct Packed {
    pub(crate) runs: Vec<PageRange>,
    pub(crate) pages: u64,
    pub(crate) grain: Backing,
}

impl Packed {
    pub(crate) fn of(runs: &[PageRange]) -> Self {
        let mut order = Vec::with_capacity(runs.len());
        let mut rest = Vec::with_capacity(runs.len());
        for run in runs {
            let first = run.start.next_multiple_of(BLOCK_PAGES);
            let last = run.end - run.end % BLOCK_PAGES;
            if first < last {
                order.push(PageRange::new(first, last));
                rest.push(PageRange::new(run.start, first));
                rest.push(PageRange::new(last, run.end));
            } else {
                rest.push(*run);
            }
        }
        let grain = if order.is_empty() { Backing::Small } else { Backing::Huge };
        order.extend(rest.into_iter().filter(|r| !r.is_empty()));
        Self { pages: pages_in(&order), runs: order, grain }
    }

    /// The runs, each with its first page in the file.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (PageRange, u64)> {
        self.runs.iter().scan(0, |at, run| {
            let here = *at;
            *at += run.len();
            Some((*run, here))
        })
    }

    pub(crate) fn placed(&self, layer: &Arc<Layer>) -> DeltaRuns {
        self.iter().map(|(run, at)| (run, LayerOffset { layer: Arc::clone(layer), at })).collect()
    }
}

/// The origins of the delta's pages. Owned and pinned pages come from the VM's memory. Closed gaps
/// come from the layer below, because the VM may write them meanwhile (not all are protected).
pub(crate) fn parts(map: &LayerMap, owned: &[PageRange], pinned: &[PageRange], packed: &Packed) -> Vec<DeltaPart> {
    let mut own = subtract_runs(pinned, owned);
    own.extend_from_slice(owned);
    own.sort_unstable();
    let mut parts = Vec::with_capacity(packed.runs.len());
    for (run, at) in packed.iter() {
        let mut add = |range: PageRange, origin: CopySource| {
            parts.push(DeltaPart { range, at: at + (range.start - run.start), origin });
        };
        let first = own.partition_point(|own| own.end <= run.start);
        let mut done = run.start;
        for own in own[first..].iter().map(|own| own.intersect(run)).take_while(|own| !own.is_empty()) {
            beneath(map, PageRange::new(done, own.start), &mut add);
            add(own, CopySource::Parent);
            done = own.end;
        }
        beneath(map, PageRange::new(done, run.end), &mut add);
    }
    parts
}

fn beneath(map: &LayerMap, gap: PageRange, add: &mut impl FnMut(PageRange, CopySource)) {
    if gap.is_empty() {
        return;
    }
    let mut done = gap.start;
    let zero = |from: u64, to: u64, add: &mut dyn FnMut(PageRange, CopySource)| {
        if from < to {
            add(PageRange::new(from, to), CopySource::Zero);
        }
    };
    for (range, source) in map.within(gap) {
        zero(done, range.start, add);
        done = range.end;
        add(range, CopySource::Layer(source));
    }
    zero(done, gap.end, add);
}

/// Joins runs over small gaps, and over longer ones when there are many runs. Copying extra shared
/// pages is always safe (I5).
pub(crate) fn close_gaps(runs: &[PageRange]) -> Vec<PageRange> {
    let mut joined = join_runs(runs, SMALL_GAP);
    let mut gap = SMALL_GAP * 4;
    while joined.len() > MANY_RUNS && gap <= BLOCK_PAGES / 8 {
        let wider = join_runs(runs, gap);
        // Bounded: at most twice the pages that have to be copied anyway.
        if pages_in(&wider) > 2 * pages_in(runs) {
            break;
        }
        joined = wider;
        gap *= 4;
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_runs_are_shared_and_never_pinned_ones() {
        let r = PageRange::new;
        let copy = [r(0, 10), r(20, 21), r(30, 60), r(100, 105)];
        assert_eq!(runs_to_remap(&copy, &[], 100), vec![]);
        assert_eq!(runs_to_remap(&copy, &[], 20), vec![r(30, 60)]);
        assert_eq!(runs_to_remap(&copy, &[], 15), vec![r(0, 10), r(30, 60)]);
        assert_eq!(runs_to_remap(&copy, &[], 0), copy);
        assert_eq!(runs_to_remap(&copy, &[r(0, 10), r(40, 50)], 16), vec![r(30, 40)]);
    }

    #[test]
    fn gaps_close_when_cheap() {
        let r = PageRange::new;
        assert_eq!(close_gaps(&[r(0, 1), r(3, 4), r(20, 21)]), vec![r(0, 4), r(20, 21)]);
        let scattered: Vec<_> = (0..1000).map(|i| PageRange::with_len(i * 10, 1)).collect();
        assert_eq!(close_gaps(&scattered).len(), 1000, "closing would copy ten times as much");
        let dense: Vec<_> = (0..1000).map(|i| PageRange::with_len(i * 20, 14)).collect();
        assert_eq!(close_gaps(&dense), vec![r(0, 19_994)]);
        let evenly = |count: u64, pages: u64, gap: u64| -> Vec<PageRange> {
            (0..count).map(|i| PageRange::with_len(i * (pages + gap), pages)).collect()
        };
        assert_eq!(close_gaps(&evenly(2, 100, 10)).len(), 2, "two are not many");
        assert_eq!((close_gaps(&evenly(64, 14, 6)).len(), close_gaps(&evenly(65, 14, 6)).len()), (64, 1));
        assert_eq!(close_gaps(&evenly(65, 60, 50)).len(), 1, "up to 64 pages");
        assert_eq!(close_gaps(&evenly(65, 120, 100)).len(), 65, "and no more");
    }
}
