//! How much room a journal takes, and when that is too much.

use std::sync::Arc;

use clade_io::IoFile;

use super::files::allocated;
use super::{Journal, format};
use crate::disk::map::{BlockMap, CLUSTER};

/// A journal that is longer, and as many times as long as a whole one, is replaced.
const LONG: (u64, u64) = (1 << 20, 4);
/// Overlays that nobody but the journal may have, before it is replaced.
pub(super) const STALE: usize = 16;
/// What of the journal's overlays may be of no use: bytes, and a part of the disk's size.
const GARBAGE: (u64, u64) = (1 << 20, 8);

impl Journal {
    /// Bytes of overlays that may be of no use.
    fn garbage_limit(&self) -> u64 {
        GARBAGE.0 + self.header.size / GARBAGE.1
    }

    /// Whether what is moved should rather be said as a whole.
    pub(super) fn is_long(&self, map: &BlockMap) -> bool {
        let (long, times) = LONG;
        if self.end > long && self.end > times * (format::ENTRY * map.len()) as u64 {
            return true;
        }
        let stale: Vec<_> = self.overlays.iter().filter(|named| named.is_stale()).collect();
        stale.len() > STALE
            || !stale.is_empty() && stale.iter().map(|named| allocated(&named.file)).sum::<u64>() > self.garbage_limit()
    }

    /// Overlays to move clusters away from, when too much of what they take is of no use to `map`. `own` is still
    /// written.
    pub(in crate::disk) fn wasteful(&self, map: &BlockMap, own: Option<&Arc<IoFile>>) -> Vec<Arc<IoFile>> {
        let is_own = |file: &Arc<IoFile>| own.is_some_and(|own| Arc::ptr_eq(own, file));
        if self.overlays.len() < 2 {
            return Vec::new();
        }
        let used = map.sizes();
        let live = |file: &Arc<IoFile>| {
            used.iter().find(|(known, _)| Arc::ptr_eq(known, file)).map_or(0, |(_, clusters)| clusters * CLUSTER)
        };
        let others = self.overlays.iter().filter(|named| !is_own(&named.file) && !named.is_stale());
        let mut waste: Vec<_> =
            others.map(|named| (allocated(&named.file).saturating_sub(live(&named.file)), &named.file)).collect();
        let mut total: u64 = waste.iter().map(|(bytes, _)| bytes).sum();
        waste.sort_unstable_by_key(|(bytes, _)| std::cmp::Reverse(*bytes));
        let mut chosen = Vec::new();
        if total <= self.garbage_limit() {
            return chosen;
        }
        for (bytes, file) in waste {
            if total <= self.garbage_limit() / 2 {
                break;
            }
            total -= bytes;
            chosen.push(Arc::clone(file));
        }
        chosen
    }
}
