//! The room that a journal takes, and its limits.

use std::sync::Arc;

use clade_host_io::IoFile;

use super::files::allocated;
use super::{Journal, format};
use crate::map::{BlockMap, CLUSTER};

/// A journal is replaced if it is longer than this many bytes, and this many times longer than the
/// entries of a whole one.
const LONG: (u64, u64) = (1 << 20, 4);
/// Number of overlays referred to by the journal alone, before it is replaced.
pub(super) const STALE: usize = 16;
/// Garbage allowed in the journal's overlays: a number of bytes, and a fraction (one in so many) of
/// the disk's size.
const GARBAGE: (u64, u64) = (1 << 20, 8);

impl Journal {
    /// Maximum bytes of garbage in overlays.
    fn garbage_limit(&self) -> u64 {
        GARBAGE.0 + self.header.size / GARBAGE.1
    }

    /// Whether a whole journal is better than one more record.
    pub(super) fn is_long(&self, map: &BlockMap) -> bool {
        let (long, times) = LONG;
        if self.end > long && self.end > times * (format::ENTRY * map.len()) as u64 {
            return true;
        }
        let stale: Vec<_> = self.overlays.iter().filter(|named| named.is_stale()).collect();
        stale.len() > STALE
            || !stale.is_empty() && stale.iter().map(|named| allocated(&named.file)).sum::<u64>() > self.garbage_limit()
    }

    /// Overlays to move clusters out of: those with the least used share of allocated bytes, while
    /// the total garbage is above the limit. `own` is still being written.
    pub(crate) fn wasteful(&self, map: &BlockMap, own: Option<&Arc<IoFile>>) -> Vec<Arc<IoFile>> {
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
