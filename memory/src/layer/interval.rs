//! An ordered map from disjoint page ranges to values that can be cut.

use std::sync::Arc;

use crate::units::PageRange;

/// A value attached to a range of pages that stays meaningful when the range is cut or joined.
pub trait Piece: Clone {
    /// The value for the part that starts `pages` further on.
    fn advance(&self, pages: u64) -> Self;
    /// Whether `next`, directly behind `pages` pages of `self`, continues it.
    fn continues(&self, pages: u64, next: &Self) -> bool;
}

/// Maximum number of entries of a chunk.
const MAX_CHUNK: usize = 64;

#[derive(Clone, Debug)]
struct Interval<V> {
    start: u64,
    end: u64,
    value: V,
}

type Chunk<V> = Arc<Vec<Interval<V>>>;

/// A map from disjoint ranges to values. Later insertions overwrite. Neighbours that continue each
/// other are one entry, so the number of entries is the number of mappings needed.
///
/// Entries are in chunks, which copies share until one of them is changed. A copy costs one
/// reference count per chunk, and the first change after it one chunk: a VM's map is copied for
/// every image, and changed by every discard.
#[derive(Clone, Debug)]
pub struct IntervalMap<V> {
    /// Ascending, none of them empty.
    chunks: Vec<Chunk<V>>,
    len: usize,
}

impl<V> Default for IntervalMap<V> {
    fn default() -> Self {
        Self { chunks: Vec::new(), len: 0 }
    }
}

impl<V: Piece> IntervalMap<V> {
    /// An empty map.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The chunk in which an entry that starts at `page` is, or would be.
    fn chunk_of(&self, page: u64) -> usize {
        self.chunks.partition_point(|chunk| chunk[0].start <= page).saturating_sub(1)
    }

    /// The last entry that starts at or before `page`.
    fn entry_at(&self, page: u64) -> Option<&Interval<V>> {
        let chunk = self.chunks.get(self.chunk_of(page))?;
        let next = chunk.partition_point(|entry| entry.start <= page);
        chunk.get(next.checked_sub(1)?)
    }

    /// The value at `page`, advanced to it.
    #[must_use]
    pub fn get(&self, page: u64) -> Option<V> {
        let entry = self.entry_at(page)?;
        (page < entry.end).then(|| entry.value.advance(page - entry.start))
    }

    /// The entry that contains `page`.
    pub(crate) fn entry(&self, page: u64) -> Option<(PageRange, &V)> {
        let entry = self.entry_at(page).filter(|entry| page < entry.end)?;
        Some((PageRange::new(entry.start, entry.end), &entry.value))
    }

    /// Every entry, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (PageRange, &V)> {
        let entries = self.chunks.iter().flat_map(|chunk| chunk.iter());
        entries.map(|entry| (PageRange::new(entry.start, entry.end), &entry.value))
    }

    /// The entries that touch `range`, cut to it, ascending.
    #[must_use]
    pub fn within(&self, range: PageRange) -> Vec<(PageRange, V)> {
        let mut out = Vec::new();
        let chunks = self.chunks.iter().skip(self.chunk_of(range.start));
        for chunk in chunks.take_while(|chunk| chunk[0].start < range.end) {
            let first = chunk.partition_point(|entry| entry.end <= range.start);
            for entry in chunk[first..].iter().take_while(|entry| entry.start < range.end) {
                let cut = PageRange::new(entry.start, entry.end).intersect(range);
                if !cut.is_empty() {
                    out.push((cut, entry.value.advance(cut.start - entry.start)));
                }
            }
        }
        out
    }

    /// Pages mapped within `range`.
    #[must_use]
    pub fn pages_within(&self, range: PageRange) -> u64 {
        self.within(range).iter().map(|(r, _)| r.len()).sum()
    }

    /// Takes `range` out of the map.
    pub fn remove(&mut self, range: PageRange) {
        if range.is_empty() {
            return;
        }
        let mut at = self.chunk_of(range.start);
        while let Some(chunk) = self.chunks.get(at).filter(|chunk| chunk[0].start < range.end) {
            if chunk[0].start >= range.start && chunk.last().is_some_and(|last| last.end <= range.end) {
                self.len -= chunk.len();
                self.chunks.remove(at);
                continue;
            }
            let first = chunk.partition_point(|entry| entry.end <= range.start);
            let behind = chunk.partition_point(|entry| entry.start < range.end);
            if first < behind {
                self.cut(at, first, behind, range);
            }
            at += 1;
        }
    }

    /// Removes `range` from the entries `first` to `behind` of a chunk, parts of which remain.
    fn cut(&mut self, at: usize, first: usize, behind: usize, range: PageRange) {
        let chunk = Arc::make_mut(&mut self.chunks[at]);
        let (head, tail) = (&chunk[first], &chunk[behind - 1]);
        let before = (head.start < range.start).then(|| Interval { end: range.start, ..head.clone() });
        let after = (tail.end > range.end).then(|| Interval {
            start: range.end,
            end: tail.end,
            value: tail.value.advance(range.end - tail.start),
        });
        let was = chunk.len();
        chunk.splice(first..behind, before.into_iter().chain(after));
        self.len = self.len - was + chunk.len();
        self.split(at);
    }

    /// Splits a chunk that has become too large.
    fn split(&mut self, at: usize) {
        if self.chunks[at].len() > MAX_CHUNK {
            let rest = Arc::make_mut(&mut self.chunks[at]).split_off(MAX_CHUNK / 2);
            self.chunks.insert(at + 1, Arc::new(rest));
        }
    }

    /// Maps `range` to `value`. Replaces existing entries.
    pub fn insert(&mut self, range: PageRange, value: V) {
        if range.is_empty() {
            return;
        }
        self.remove(range);
        let mut entry = Interval { start: range.start, end: range.end, value };
        let before = range.start.checked_sub(1).and_then(|page| self.entry_at(page));
        if let Some(before) = before.filter(|before| before.end == entry.start)
            && before.value.continues(entry.start - before.start, &entry.value)
        {
            entry = Interval { end: entry.end, ..before.clone() };
        }
        if let Some(next) = self.entry_at(entry.end).filter(|next| next.start == entry.end)
            && entry.value.continues(entry.end - entry.start, &next.value)
        {
            entry.end = next.end;
        }
        if (entry.start, entry.end) != (range.start, range.end) {
            self.remove(PageRange::new(entry.start, entry.end));
        }
        let at = self.chunk_of(entry.start);
        self.len += 1;
        match self.chunks.get_mut(at) {
            None => self.chunks.push(Arc::new(vec![entry])),
            Some(chunk) => {
                let chunk = Arc::make_mut(chunk);
                let place = chunk.partition_point(|other| other.start < entry.start);
                chunk.insert(place, entry);
                self.split(at);
            }
        }
    }
}

/// A set of pages is a map to nothing.
impl Piece for () {
    fn advance(&self, _pages: u64) -> Self {}
    fn continues(&self, _pages: u64, _next: &Self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// (file, offset): the shape of a layer reference.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct At(u8, u64);

    impl Piece for At {
        fn advance(&self, pages: u64) -> Self {
            Self(self.0, self.1 + pages)
        }
        fn continues(&self, pages: u64, next: &Self) -> bool {
            self.0 == next.0 && self.1 + pages == next.1
        }
    }

    #[derive(Clone, Debug)]
    enum Op {
        Insert(PageRange, At),
        Remove(PageRange),
    }

    fn op() -> impl Strategy<Value = Op> {
        let len = prop_oneof![0u64..3, 0u64..12, 0u64..300];
        let range = (0u64..MODEL, len).prop_map(|(s, l)| PageRange::new(s, (s + l).min(MODEL)));
        prop_oneof![
            3 => (range.clone(), 0u8..3, 0u64..4).prop_map(|(r, f, d)| Op::Insert(r, At(f, r.start + d * 100))),
            1 => range.prop_map(Op::Remove),
        ]
    }

    const MODEL: u64 = 400;

    proptest! {
        #[test]
        fn agrees_with_an_array(ops in proptest::collection::vec(op(), 0..300)) {
            let mut map = IntervalMap::new();
            let mut model = vec![None; MODEL as usize];
            let mut copies = Vec::new();
            for (n, op) in ops.into_iter().enumerate() {
                if n % 16 == 0 {
                    copies.push((map.clone(), model.clone()));
                }
                match op {
                    Op::Insert(r, at) => {
                        map.insert(r, at);
                        for p in r.start..r.end { model[p as usize] = Some(at.advance(p - r.start)); }
                    }
                    Op::Remove(r) => {
                        map.remove(r);
                        for p in r.start..r.end { model[p as usize] = None; }
                    }
                }
                for p in 0..MODEL { prop_assert_eq!(map.get(p), model[p as usize], "page {}", p); }
                // As few entries as the contents allow: every boundary is a real one.
                let entries: Vec<_> = map.iter().map(|(r, v)| (r, *v)).collect();
                prop_assert_eq!(entries.len(), map.len());
                for w in entries.windows(2) {
                    prop_assert!(w[0].0.end <= w[1].0.start);
                    prop_assert!(w[0].0.end != w[1].0.start || !w[0].1.continues(w[0].0.len(), &w[1].1));
                }
                let cut = PageRange::new(10, 30);
                let total: u64 = (10..30).filter(|p| model[*p as usize].is_some()).count() as u64;
                prop_assert_eq!(map.pages_within(cut), total);
                for (r, v) in map.within(cut) {
                    prop_assert!(cut.covers(r));
                    prop_assert_eq!(Some(v), model[r.start as usize]);
                }
            }
            // A copy does not change with its original.
            for (map, model) in copies {
                for p in 0..MODEL { prop_assert_eq!(map.get(p), model[p as usize], "page {} of a copy", p); }
            }
        }

        /// Enough entries for several chunks, and cuts across chunks.
        #[test]
        fn many_entries_agree_with_an_array(cuts in proptest::collection::vec((0u64..2_000, 0u64..700), 0..20)) {
            let mut map = IntervalMap::new();
            let mut model = vec![None; 3_000];
            for p in (0..2_000).step_by(2) {
                map.insert(PageRange::with_len(p, 1), At(1, 7 * p));
                model[p as usize] = Some(At(1, 7 * p));
            }
            for (n, (start, len)) in cuts.into_iter().enumerate() {
                let range = PageRange::with_len(start, len);
                if n % 2 == 0 { map.remove(range) } else { map.insert(range, At(2, 0)) }
                for p in range.start..range.end { model[p as usize] = (n % 2 == 1).then(|| At(2, p - range.start)); }
                prop_assert_eq!(map.len(), map.iter().count());
                for p in 0..3_000 { prop_assert_eq!(map.get(p), model[p as usize], "page {}", p); }
                let inside = map.within(PageRange::new(500, 1_500));
                let there = (500..1_500).filter(|p| model[*p].is_some()).count() as u64;
                prop_assert_eq!(inside.iter().map(|(r, _)| r.len()).sum::<u64>(), there);
            }
        }
    }
}
