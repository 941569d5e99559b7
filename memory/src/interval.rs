//! An ordered map from disjoint page ranges to values that know how to be cut.

use std::collections::BTreeMap;

use crate::units::PageRange;

/// A value attached to a range of pages that stays meaningful when the range is cut or joined.
pub trait Piece: Clone {
    /// The value for the part that starts `pages` further on.
    fn advance(&self, pages: u64) -> Self;
    /// Whether `next`, directly behind `pages` pages of `self`, continues it.
    fn continues(&self, pages: u64, next: &Self) -> bool;
}

/// Disjoint ranges to values. Later insertions overwrite; neighbours that continue each other are one entry, so the
/// number of entries is the number of mappings needed.
#[derive(Clone, Debug)]
pub struct IntervalMap<V> {
    entries: BTreeMap<u64, (u64, V)>,
}

impl<V> Default for IntervalMap<V> {
    fn default() -> Self {
        Self { entries: BTreeMap::new() }
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
        self.entries.len()
    }

    /// Whether nothing is mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The value at `page`, advanced to it.
    #[must_use]
    pub fn get(&self, page: u64) -> Option<V> {
        let (&start, (end, value)) = self.entries.range(..=page).next_back()?;
        (page < *end).then(|| value.advance(page - start))
    }

    /// Every entry, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (PageRange, &V)> {
        self.entries.iter().map(|(&start, (end, value))| (PageRange::new(start, *end), value))
    }

    /// The entries that touch `range`, cut to it, ascending.
    #[must_use]
    pub fn within(&self, range: PageRange) -> Vec<(PageRange, V)> {
        let mut out = Vec::new();
        let from = self.entries.range(..=range.start).next_back().map_or(range.start, |(&s, _)| s);
        for (&start, (end, value)) in self.entries.range(from..range.end.max(from)) {
            let cut = PageRange::new(start, *end).intersect(range);
            if !cut.is_empty() {
                out.push((cut, value.advance(cut.start - start)));
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
        let from = self.entries.range(..range.start).next_back().map_or(range.start, |(&s, _)| s);
        let hit: Vec<u64> = self.entries.range(from..range.end).map(|(&s, _)| s).collect();
        for start in hit {
            let Some((end, value)) = self.entries.remove(&start) else { continue };
            if start < range.start {
                self.entries.insert(start, (end.min(range.start), value.clone()));
            }
            if end > range.end {
                let at = start.max(range.end);
                self.entries.insert(at, (end, value.advance(at - start)));
            }
        }
    }

    /// Maps `range` to `value`, over whatever was there.
    pub fn insert(&mut self, range: PageRange, value: V) {
        if range.is_empty() {
            return;
        }
        self.remove(range);
        let (mut start, mut end, mut value) = (range.start, range.end, value);
        if let Some((&before, (before_end, prior))) = self.entries.range(..start).next_back()
            && *before_end == start
            && prior.continues(start - before, &value)
        {
            value = prior.clone();
            start = before;
        }
        if let Some((next_end, next)) = self.entries.get(&end)
            && value.continues(end - start, next)
        {
            let old = end;
            end = *next_end;
            self.entries.remove(&old);
        }
        self.entries.insert(start, (end, value));
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
        let range = (0u64..40, 0u64..12).prop_map(|(s, l)| PageRange::with_len(s, l));
        prop_oneof![
            3 => (range.clone(), 0u8..3, 0u64..4).prop_map(|(r, f, d)| Op::Insert(r, At(f, r.start + d * 100))),
            1 => range.prop_map(Op::Remove),
        ]
    }

    proptest! {
        #[test]
        fn agrees_with_an_array(ops in proptest::collection::vec(op(), 0..60)) {
            let mut map = IntervalMap::new();
            let mut model = [None; 64];
            for op in ops {
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
                for p in 0..64u64 { prop_assert_eq!(map.get(p), model[p as usize], "page {}", p); }
                // As few entries as the contents allow: every boundary is a real one.
                let entries: Vec<_> = map.iter().map(|(r, v)| (r, *v)).collect();
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
        }
    }
}
