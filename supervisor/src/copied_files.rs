//! The copies that detached checkpoints hold: files without a name that no VM's process can write.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use clade_vmm::vm::{CopiedFile, FileId, ImageFile};

use super::processes::ProcessId;

/// The copies that checkpoints hold.
#[derive(Debug, Default)]
pub(super) struct CopiedFiles(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    /// Files without a name that no VM's process can write, as long as a checkpoint holds them: so their
    /// inode numbers are not reused.
    files: HashMap<FileId, Vec<Weak<()>>>,
    /// Parts of VMs' layers that later checkpoints of the same VM show too.
    parts: Vec<Weak<CopiedPart>>,
}

/// A copy of a part of a layer's file.
#[derive(Debug)]
pub(super) struct CopiedPart {
    /// The VM whose process has named the file: it may lie about files of other VMs.
    vm: Option<ProcessId>,
    pub(super) of: FileId,
    pub(super) runs: Vec<Range<u64>>,
    pub(super) id: FileId,
    pub(super) copy: OwnedFd,
}

/// Keeps the copies of a detached checkpoint known.
#[derive(Debug)]
pub(super) struct Copies {
    #[expect(dead_code, reason = "held, not read")]
    holder: Arc<()>,
    #[expect(dead_code, reason = "held, not read")]
    parts: Vec<Arc<CopiedPart>>,
}

/// Whether runs are ascending and not empty.
fn are_ascending(runs: &[Range<u64>]) -> bool {
    runs.iter().all(|run| !run.is_empty()) && runs.windows(2).all(|pair| pair[0].end <= pair[1].start)
}

impl CopiedFiles {
    /// Whether no checkpoint holds a copy.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.all().files.is_empty()
    }

    fn all(&self) -> MutexGuard<'_, Known> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.files.retain(|_, holders| {
            holders.retain(|holder| holder.strong_count() > 0);
            !holders.is_empty()
        });
        all.parts.retain(|part| part.strong_count() > 0);
        all
    }

    /// Returns the copies among the files of an image of `vm`, and the copied parts of others.
    pub(super) fn among(&self, vm: Option<ProcessId>, files: &[ImageFile<'_>]) -> (Vec<FileId>, Vec<Arc<CopiedPart>>) {
        let all = self.all();
        let copies = files.iter().map(|file| file.id).filter(|id| all.files.contains_key(id)).collect();
        let is_here = |part: &Arc<CopiedPart>| files.iter().any(|file| file.id == part.of);
        let of_vm = |part: &Arc<CopiedPart>| vm.is_some() && part.vm == vm && is_here(part);
        (copies, all.parts.iter().filter_map(Weak::upgrade).filter(of_vm).collect())
    }

    /// Adds the copies of a detached image of `vm`, which the result's owner holds. The image has the files
    /// `files`; `made` were made for it, and those of `known` that it has were not made again.
    pub(super) fn add(
        &self,
        vm: Option<ProcessId>,
        files: &[ImageFile<'_>],
        made: Vec<CopiedFile>,
        known: Vec<Arc<CopiedPart>>,
    ) -> io::Result<Copies> {
        let file_of = |id: FileId| files.iter().find(|file| file.id == id);
        let mut parts: Vec<_> = known.into_iter().filter(|part| file_of(part.id).is_some()).collect();
        for CopiedFile { of, runs, copy: id } in made.into_iter().filter(|made| are_ascending(&made.runs)) {
            let Some(copy) = file_of(id).filter(|file| file.has_no_writer) else { continue };
            parts.push(Arc::new(CopiedPart { vm, of, runs, id, copy: copy.file.try_clone_to_owned()? }));
        }
        let holder = Arc::new(());
        let mut all = self.all();
        for file in files.iter().filter(|file| file.has_no_writer) {
            all.files.entry(file.id).or_default().push(Arc::downgrade(&holder));
        }
        let is_ours = |part: &Weak<CopiedPart>| parts.iter().any(|ours| part.ptr_eq(&Arc::downgrade(ours)));
        all.parts.retain(|part| !is_ours(part));
        all.parts.extend(parts.iter().map(Arc::downgrade));
        drop(all);
        Ok(Copies { holder, parts })
    }
}
