//! A reclaim thread that is kept from its work.

use std::sync::mpsc;

use crate::Store;
use crate::reclaim::ReclaimThread;

/// Keeps a store's reclaim thread from its work until dropped. Tasks queued before have been done.
pub(crate) struct Busy(#[allow(dead_code, reason = "its end is what counts")] mpsc::Sender<()>);

impl Busy {
    pub(crate) fn begin(store: &Store) -> Self {
        let (busy, is_busy) = mpsc::channel();
        let (free, is_free) = mpsc::channel::<()>();
        let task = store.reclaim(ReclaimThread::sender).unwrap().spawn(move || {
            busy.send(()).unwrap();
            let _ = is_free.recv();
        });
        assert!(task.is_ok());
        is_busy.recv().unwrap();
        Self(free)
    }
}
