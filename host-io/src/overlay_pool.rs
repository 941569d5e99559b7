//! Unnamed files that no disk uses any more, kept for the next disk that needs one.
//!
//! A write to a file without blocks there makes the file system allocate and journal them, and hand
//! the write to another thread. A write of parts of blocks even waits for that. Over blocks that
//! are there, it only writes. A disk that is forked a hundred times a second gets as many overlays,
//! each written at the same places as the last one.

use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::handles::Handles;

/// Most files that are kept.
const MAX_FILES: usize = 4;
/// Most bytes allocated to a file that is kept.
const MAX_ALLOCATED: u64 = 8 << 20;
/// Bytes of a block in `st_blocks`.
const BLOCK: u64 = 512;

/// The files that are kept.
#[derive(Debug, Default)]
pub struct OverlayPool(Mutex<Vec<Arc<Handles>>>);

impl OverlayPool {
    fn with<T>(&self, f: impl FnOnce(&mut Vec<Arc<Handles>>) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The file that was kept last: much of it may still be in caches.
    pub(crate) fn take(&self) -> Option<Arc<Handles>> {
        self.with(Vec::pop)
    }

    /// Keeps a file, or drops it or an older one.
    pub(crate) fn put(&self, handles: Arc<Handles>) {
        let taken = handles.cached.metadata().map_or(u64::MAX, |meta| meta.blocks().saturating_mul(BLOCK));
        if taken > MAX_ALLOCATED {
            return;
        }
        let gone = self.with(|kept| {
            kept.push(handles);
            (kept.len() > MAX_FILES).then(|| kept.remove(0))
        });
        // Not under the lock: freeing blocks takes long.
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
        let files: Vec<_> = (0..MAX_FILES + 3).map(|_| file()).collect();
        assert_eq!(kept(), 0);
        drop(files);
        assert_eq!(kept(), MAX_FILES);
        let (small, large) = (file(), file());
        small.write_now(&[1; 4096], 40 << 20).unwrap();
        large.write_now(&vec![1; MAX_ALLOCATED as usize + 4096], 0).unwrap();
        drop((small, large));
        assert_eq!(kept(), MAX_FILES - 1, "a file is as large as what it takes");
    }
}
