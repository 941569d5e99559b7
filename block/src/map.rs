//! The map from a disk's clusters to files: persistent, cloned in constant time with the VM.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use clade_host_io::IoFile;
use rpds::RedBlackTreeMapSync;

/// Bytes of a cluster, the unit in which the map names files.
pub const CLUSTER: u64 = 4096;

/// The source of a range of clusters. In a file, each cluster stands at its own offset in the disk.
#[derive(Clone, Debug)]
pub(crate) enum ClusterSource {
    /// No file: the range reads as zeros.
    Zero,
    /// A file.
    File(Arc<IoFile>),
}

impl ClusterSource {
    pub(crate) fn is(&self, file: &Arc<IoFile>) -> bool {
        matches!(self, Self::File(own) if Arc::ptr_eq(own, file))
    }

    pub(super) fn same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Zero, Self::Zero) => true,
            (Self::File(a), Self::File(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
}

/// Appends a run of clusters, joined to the last one where they are adjacent.
pub(super) fn push_run(runs: &mut Vec<Range<u64>>, run: Range<u64>) {
    match runs.last_mut() {
        Some(last) if last.end == run.start => last.end = run.end,
        _ => runs.push(run),
    }
}

#[derive(Clone, Debug)]
struct Extent {
    end: u64,
    source: ClusterSource,
}

/// Sources of all clusters, without gaps. Clones share the tree until one of them is changed.
#[derive(Clone, Debug)]
pub(crate) struct BlockMap {
    extents: RedBlackTreeMapSync<u64, Extent>,
}

impl BlockMap {
    /// A map of `clusters` clusters, all with `source`.
    pub(crate) fn new(clusters: u64, source: ClusterSource) -> Self {
        let mut extents = RedBlackTreeMapSync::new_sync();
        if clusters > 0 {
            extents.insert_mut(0, Extent { end: clusters, source });
        }
        Self { extents }
    }

    /// Number of extents.
    pub(crate) fn len(&self) -> usize {
        self.extents.size()
    }

    /// All extents, ascending and without gaps.
    pub(crate) fn extents(&self) -> impl Iterator<Item = (Range<u64>, &ClusterSource)> {
        self.extents.iter().map(|(start, extent)| (*start..extent.end, &extent.source))
    }

    /// The sources of `range`, ascending, without gaps, and cut to the range.
    pub(crate) fn pieces(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, &ClusterSource)> {
        let first = self.extents.range(..=range.start).next_back().map_or(range.start, |(start, _)| *start);
        self.extents.range(first..range.end).filter_map(move |(start, extent)| {
            let piece = (*start).max(range.start)..extent.end.min(range.end);
            (piece.start < piece.end).then_some((piece, &extent.source))
        })
    }

    /// Whether `file` is the source of all of `range`.
    pub(crate) fn is_all(&self, range: Range<u64>, file: &Arc<IoFile>) -> bool {
        self.pieces(range).all(|(_, source)| source.is(file))
    }

    /// The source of one cluster.
    pub(crate) fn at(&self, cluster: u64) -> ClusterSource {
        let found = self.pieces(cluster..cluster + 1).next().map(|(_, source)| source.clone());
        found.unwrap_or(ClusterSource::Zero)
    }

    /// Maps `range` to `source`.
    pub(crate) fn insert(&mut self, range: Range<u64>, source: ClusterSource) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        // Includes the neighbours: they are joined if they have the same source.
        let reach = range.start.saturating_sub(1)..range.end.saturating_add(1);
        let first = self.extents.range(..=reach.start).next_back().map_or(reach.start, |(start, _)| *start);
        let touched: Vec<(u64, Extent)> =
            self.extents.range(first..reach.end).map(|(start, extent)| (*start, extent.clone())).collect();
        for (old, extent) in touched {
            if extent.end < range.start || old > range.end {
                continue;
            }
            self.extents.remove_mut(&old);
            if extent.source.same(&source) {
                start = start.min(old);
                end = end.max(extent.end);
                continue;
            }
            if old < range.start {
                let head = Extent { end: extent.end.min(range.start), source: extent.source.clone() };
                self.extents.insert_mut(old, head);
            }
            if extent.end > range.end {
                self.extents.insert_mut(old.max(range.end), Extent { end: extent.end, source: extent.source });
            }
        }
        self.extents.insert_mut(start, Extent { end, source });
    }

    /// The files in the map, each once, with its number of clusters.
    pub(crate) fn sizes(&self) -> Vec<(Arc<IoFile>, u64)> {
        let (mut files, mut known) = (Vec::new(), HashMap::new());
        for (start, extent) in self.extents.iter() {
            let ClusterSource::File(file) = &extent.source else { continue };
            let at = *known.entry(Arc::as_ptr(file)).or_insert_with(|| {
                files.push((Arc::clone(file), 0));
                files.len() - 1
            });
            files[at].1 += extent.end - start;
        }
        files
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clade_host_io::CachePolicy;
    use proptest::prelude::*;

    #[test]
    fn runs_are_joined_where_one_goes_on_from_the_last() {
        let mut runs = Vec::new();
        [0..2, 2..5, 6..7, 5..6, 6..8].into_iter().for_each(|run| push_run(&mut runs, run));
        assert_eq!(runs, [0..5, 6..7, 5..8]);
    }

    const CLUSTERS: u64 = 40;

    fn files() -> Vec<Arc<IoFile>> {
        let file = || IoFile::unnamed(&std::env::temp_dir(), 4096, CachePolicy::Host).unwrap();
        (0..3).map(|_| Arc::new(file())).collect()
    }

    /// The index of the file that is the source of each cluster, if any.
    fn flat(map: &BlockMap, files: &[Arc<IoFile>]) -> Vec<Option<usize>> {
        let mut flat = Vec::new();
        for (range, source) in map.pieces(0..CLUSTERS) {
            assert_eq!(range.start, flat.len() as u64, "no gap and no overlap");
            let at = files.iter().position(|file| source.is(file));
            flat.extend(range.map(|_| at));
        }
        flat
    }

    proptest! {
        #[test]
        fn agrees_with_an_array(changes in prop::collection::vec((0..CLUSTERS, 1..=CLUSTERS, 0..4usize, any::<bool>()), 1..40)) {
            let files = files();
            let mut map = BlockMap::new(CLUSTERS, ClusterSource::File(Arc::clone(&files[0])));
            let mut model = vec![Some(0); CLUSTERS as usize];
            let mut clones = Vec::new();
            for (start, len, which, clone) in changes {
                let end = (start + len).min(CLUSTERS);
                if clone {
                    clones.push((map.clone(), model.clone()));
                }
                let source = files.get(which).map_or(ClusterSource::Zero, |file| ClusterSource::File(Arc::clone(file)));
                map.insert(start..end, source);
                model[start as usize..end as usize].fill(files.get(which).map(|_| which));
                prop_assert_eq!(&flat(&map, &files), &model);
                let runs = 1 + model.windows(2).filter(|w| w[0] != w[1]).count();
                prop_assert_eq!(map.len(), runs, "neighbours of one source are one extent");
                for cluster in 0..CLUSTERS {
                    let at = map.at(cluster);
                    prop_assert_eq!(files.iter().position(|f| at.is(f)), model[cluster as usize]);
                }
            }
            for (map, model) in clones {
                prop_assert_eq!(flat(&map, &files), model, "a clone does not change");
            }
        }
    }
}
