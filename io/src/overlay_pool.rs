//! Unnamed files that nobody has any more, kept for whoever needs one next.
//!
//! A write to a file where it has no blocks yet makes the file system find some, write that down,
//! and give the write to a thread that may wait for it; one that is not in whole blocks it even
//! waits for. Over blocks that are there, it only writes. A disk that is forked a hundred times a
//! second gets as many overlays, each written where the last one was.

use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::file::Handles;

/// Files kept.
const MOST: usize = 4;
/// Largest file kept: bytes that it takes, not its length.
const LARGEST: u64 = 8 << 20;
/// The unit of a file's blocks as the system counts them.
const BLOCK: u64 = 512;

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct OverlayPool(Mutex<Vec<Arc<Handles>>>);

impl OverlayPool {
    fn with<T>(&self, f: impl FnOnce(&mut Vec<Arc<Handles>>) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The file that came last: most of what it takes may still be in caches.
    pub(crate) fn take(&self) -> Option<Arc<Handles>> {
        self.with(Vec::pop)
    }

    /// Keeps a file, or lets it go, or one that was kept longer.
    pub(crate) fn put(&self, handles: Arc<Handles>) {
        let taken = handles.cached.metadata().map_or(u64::MAX, |meta| meta.blocks().saturating_mul(BLOCK));
        if taken > LARGEST {
            return;
        }
        let gone = self.with(|kept| {
            kept.push(handles);
            (kept.len() > MOST).then(|| kept.remove(0))
        });
        // Not under the lock: giving its blocks back takes long.
        drop(gone);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::{CachePolicy, IoFile};

    #[test]
    fn few_are_kept_and_no_large_ones() {
        let dir = tempfile::tempdir().unwrap();
        let pool = Arc::new(OverlayPool::default());
        let opened = std::fs::File::open(dir.path()).unwrap();
        let file = || IoFile::reused_in(&pool, opened.as_fd(), dir.path(), 64 << 20, CachePolicy::Host).unwrap();
        let kept = || pool.with(|kept| kept.len());
        let files: Vec<_> = (0..MOST + 3).map(|_| file()).collect();
        assert_eq!(kept(), 0);
        drop(files);
        assert_eq!(kept(), MOST);
        let (small, large) = (file(), file());
        small.write_now(&[1; 4096], 40 << 20).unwrap();
        large.write_now(&vec![1; LARGEST as usize + 4096], 0).unwrap();
        drop((small, large));
        assert_eq!(kept(), MOST - 1, "a file is as large as what it takes");
    }
}
