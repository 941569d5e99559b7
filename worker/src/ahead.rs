//! Copies ahead for the children of a checkpoint: learns the written pages from ended children, and
//! gives later children copies of them before their guests write.
//!
//! A child's process gets the pages to copy, and a file to note its written pages in. The
//! supervisor reads that file after the process has ended.
//!
//! | bytes of a file | |
//! |---|---|
//! | 0..8 | 1 once the file is complete |
//! | 8..32 | pages copied ahead; of these written since, and not written |
//! | 32..40 | runs |
//! | then 24 each | a run's region, its first page, the page behind its last |
//!
//! Neither side trusts the other's file: a wrong set costs time and memory, and nothing else (I5).

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use clade_memory::{AheadUse, Learned, PageRange, PageSet, RamLayout};
use clade_vmm::vm::Vm;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

use clade_api::AheadInfo;

/// Bytes before the runs.
const HEAD: usize = 40;
/// Bytes of a run.
const RUN: usize = 24;
/// Runs that a file has room for. Those beyond are left out.
const MAX_RUNS: usize = 8_192;
const SIZE: usize = HEAD + MAX_RUNS * RUN;
/// Seals against a change of size.
const SEALED: SealFlags = SealFlags::GROW.union(SealFlags::SHRINK).union(SealFlags::SEAL);
/// Limit of pages copied ahead by all children of one request: 256 MiB.
const MAX_OF_REQUEST: u64 = 65_536;

/// A child's limit of pages to copy. Two descriptors follow it: the set to copy, and the note for
/// the written pages.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct AheadRequest {
    /// Pages to copy at most.
    pub pages: u64,
}

/// The set of pages that the children of a checkpoint have written.
#[derive(Debug)]
pub struct Learning {
    layout: RamLayout,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    learned: Learned,
    /// Children whose notes were read.
    children: u64,
    came: AheadUse,
}

impl Learning {
    /// Creates an empty set for guests of this layout.
    pub fn new(layout: &RamLayout) -> Self {
        let state = State { learned: Learned::new(layout), children: 0, came: AheadUse::default() };
        Self { layout: layout.clone(), state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the limit of pages for each of `count` children, if one may copy `most`.
    pub fn budget(most: u64, count: usize) -> u64 {
        most.min(MAX_OF_REQUEST / (count as u64).max(1))
    }

    /// Returns the pages that the next child is likely to write, at most `most`, in a file.
    ///
    /// # Errors
    /// When there is no memory or descriptor for it.
    pub fn likely(&self, most: u64) -> io::Result<OwnedFd> {
        let likely = self.state().learned.likely(most);
        let file = note()?;
        write(&file, &likely, AheadUse::default())?;
        Ok(file)
    }

    /// Learns from the note of a child that has ended. An empty note is ignored.
    pub fn learn(&self, note: &OwnedFd) {
        let Some((written, came)) = read(note, &self.layout) else { return };
        let mut state = self.state();
        match state.learned.record(&written) {
            Ok(()) => {
                state.children += 1;
                state.came.copied = state.came.copied.saturating_add(came.copied);
                state.came.hits = state.came.hits.saturating_add(came.hits);
                state.came.waste = state.came.waste.saturating_add(came.waste);
            }
            Err(error) => tracing::debug!(%error, "nothing is learned of a child"),
        }
    }

    /// Returns the counts for display.
    pub fn info(&self) -> AheadInfo {
        let state = self.state();
        let AheadUse { copied, hits, waste } = state.came;
        let pages = state.learned.likely(u64::MAX).pages();
        AheadInfo { children: state.children, pages, copied, hits, waste }
    }
}

/// Creates a file to note a set in.
///
/// # Errors
/// When there is no memory or descriptor for it.
pub fn note() -> io::Result<OwnedFd> {
    let file = memfd_create("clade-ahead", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, SIZE as u64)?;
    fcntl_add_seals(&file, SEALED)?;
    Ok(file)
}

fn write(file: &OwnedFd, set: &PageSet, came: AheadUse) -> io::Result<()> {
    let runs =
        set.runs().iter().enumerate().flat_map(|(region, runs)| runs.iter().map(move |run| (region as u64, run)));
    let mut bytes = vec![0; 8];
    let words = |bytes: &mut Vec<u8>, words: [u64; 3]| words.iter().for_each(|word| bytes.extend(word.to_le_bytes()));
    words(&mut bytes, [came.copied, came.hits, came.waste]);
    let count = set.runs().iter().map(Vec::len).sum::<usize>().min(MAX_RUNS);
    bytes.extend((count as u64).to_le_bytes());
    runs.take(MAX_RUNS).for_each(|(region, run)| words(&mut bytes, [region, run.start(), run.end()]));
    let file = std::fs::File::from(file.as_fd().try_clone_to_owned()?);
    file.write_all_at(&bytes, 0)?;
    // Written last: a reader before this takes the file as empty.
    file.write_all_at(&1_u64.to_le_bytes(), 0)
}

/// Reads an untrusted file. Returns None if it is incomplete or of another guest's layout.
fn read(file: &OwnedFd, layout: &RamLayout) -> Option<(PageSet, AheadUse)> {
    // A copy, which no other process can change.
    let mut bytes = vec![0; HEAD];
    let file = std::fs::File::from(file.as_fd().try_clone_to_owned().ok()?);
    file.read_exact_at(&mut bytes, 0).ok()?;
    let word = |bytes: &[u8], at: usize| {
        bytes.get(at..at + 8).map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()))
    };
    let count = usize::try_from(word(&bytes, 32)?).ok().filter(|count| *count <= MAX_RUNS)?;
    if word(&bytes, 0)? != 1 {
        return None;
    }
    let came = AheadUse { copied: word(&bytes, 8)?, hits: word(&bytes, 16)?, waste: word(&bytes, 24)? };
    let mut bytes = vec![0; count * RUN];
    file.read_exact_at(&mut bytes, HEAD as u64).ok()?;
    let mut runs = vec![Vec::new(); layout.ranges().len()];
    for run in bytes.chunks_exact(RUN) {
        let region = runs.get_mut(usize::try_from(word(run, 0)?).ok()?)?;
        let (start, end) = (word(run, 8)?, word(run, 16)?);
        // Checked before a range is made: a run must not end before it begins.
        region.push((start < end).then(|| PageRange::new(start, end))?);
    }
    let set = PageSet::new(layout, runs);
    set.inspect_err(|error| tracing::debug!(%error, "a set of pages is not taken")).ok().map(|set| (set, came))
}

/// The child's side: the pages to copy, and the file to note its written pages in.
#[derive(Debug)]
pub struct ChildAhead {
    note: OwnedFd,
}

impl ChildAhead {
    /// Begins to copy the pages of the file `likely`, beside the VM.
    pub fn begin(vm: &Arc<Vm>, request: AheadRequest, likely: &OwnedFd, note: OwnedFd) -> Self {
        let AheadRequest { pages } = request;
        let set = read(likely, vm.ram().layout()).map(|(set, _)| set).filter(|set| pages > 0 && !set.is_empty());
        if let Some(set) = set {
            let vm = Arc::downgrade(vm);
            let copy = move || {
                let Some(vm) = vm.upgrade() else { return };
                match vm.ram().copy_ahead(&set, pages) {
                    Ok(copied) => tracing::debug!(copied, "pages are copied ahead"),
                    Err(error) => tracing::debug!(%error, "no page is copied ahead"),
                }
            };
            // The child also runs without the copies.
            if let Err(error) = thread::Builder::new().name("clade-ahead".to_owned()).spawn(copy) {
                tracing::warn!(%error, "no page is copied ahead");
            }
        }
        Self { note }
    }

    /// Notes the written pages of a VM that has ended. Notes nothing if the set is no longer
    /// complete: siblings would take a part for the whole.
    pub fn end(self, vm: &Vm) {
        if !vm.ram().is_written_set_whole() {
            return;
        }
        let noted = vm.written_set().map_err(io::Error::other).and_then(|(set, came)| write(&self.note, &set, came));
        if let Err(error) = noted {
            tracing::debug!(%error, "cannot record the pages that the VM has written");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clade_vmm::vm::VmConfig;
    use proptest::prelude::*;

    fn layout() -> RamLayout {
        VmConfig::bare(32 << 20, 1).unwrap().layout().clone()
    }

    fn set(layout: &RamLayout, runs: &[(u64, u64)]) -> PageSet {
        PageSet::new(layout, vec![runs.iter().map(|(start, end)| PageRange::new(*start, *end)).collect()]).unwrap()
    }

    #[test]
    fn what_a_child_has_written_is_what_the_next_one_copies() {
        let layout = layout();
        let learning = Learning::new(&layout);
        let nothing = note().unwrap();
        learning.learn(&nothing);
        assert_eq!(learning.info(), AheadInfo::default(), "a child that was killed has noted nothing");
        let came = AheadUse { copied: 5, hits: 3, waste: 2 };
        for _ in 0..2 {
            let file = note().unwrap();
            write(&file, &set(&layout, &[(3, 5), (9, 10)]), came).unwrap();
            learning.learn(&file);
        }
        assert_eq!(learning.info(), AheadInfo { children: 2, pages: 3, copied: 10, hits: 6, waste: 4 });
        let (likely, none) = read(&learning.likely(2).unwrap(), &layout).unwrap();
        assert_eq!((likely, none), (set(&layout, &[(3, 5)]), AheadUse::default()), "as many as may be");
    }

    #[test]
    fn more_runs_than_there_is_room_for_are_left_out() {
        let layout = layout();
        let runs = MAX_RUNS as u64 - 1000;
        // The guest has 8,192 pages: every other one.
        let all: Vec<(u64, u64)> = (0..runs / 2).map(|run| (2 * run, 2 * run + 1)).collect();
        let file = note().unwrap();
        write(&file, &set(&layout, &all), AheadUse::default()).unwrap();
        assert_eq!(read(&file, &layout).unwrap().0, set(&layout, &all));
        assert_eq!(rustix::fs::fstat(&file).unwrap().st_size as usize, SIZE);
        assert!(ftruncate(&file, 1).is_err() && ftruncate(&file, 1 << 40).is_err(), "its size is for good");
    }

    #[test]
    fn what_is_no_set_of_the_guest_is_not_taken() {
        let layout = layout();
        let pages = layout.ranges()[0].1;
        let rows: [&[u64]; 8] = [
            &[0, 0, 0, 0, 0],                   // not all there
            &[1, 0, 0, 0, MAX_RUNS as u64 + 1], // more runs than there are
            &[1, 0, 0, 0, u64::MAX],
            &[1, 0, 0, 0, 1, 1, 0, 1],          // another region
            &[1, 0, 0, 0, 1, 0, 5, 5],          // empty
            &[1, 0, 0, 0, 1, 0, 6, 5],          // backwards
            &[1, 0, 0, 0, 1, 0, 0, pages + 1],  // beyond
            &[1, 0, 0, 0, 2, 0, 4, 6, 0, 5, 7], // not apart
        ];
        for row in rows {
            let file = note().unwrap();
            let bytes: Vec<u8> = row.iter().flat_map(|word| word.to_le_bytes()).collect();
            std::fs::File::from(file.try_clone().unwrap()).write_all_at(&bytes, 0).unwrap();
            assert!(read(&file, &layout).is_none(), "{row:?}");
        }
    }

    #[test]
    fn many_children_have_less_each() {
        assert_eq!(Learning::budget(4096, 1), 4096);
        assert_eq!(Learning::budget(4096, 1000), 65);
        assert_eq!(Learning::budget(4096, 0), 4096);
        assert_eq!(Learning::budget(4096, 100_000), 0);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_set_of_the_guest_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..400), whole: bool, runs in 0u64..20) {
            let (layout, file) = (layout(), note().unwrap());
            let mut bytes = bytes;
            if whole && bytes.len() >= HEAD {
                bytes[..8].copy_from_slice(&1_u64.to_le_bytes());
                bytes[32..40].copy_from_slice(&runs.to_le_bytes());
            }
            std::fs::File::from(file.try_clone().unwrap()).write_all_at(&bytes, 0).unwrap();
            if let Some((set, _)) = read(&file, &layout) {
                prop_assert!(set.pages() <= layout.ranges()[0].1);
                prop_assert_eq!(PageSet::new(&layout, set.runs().to_vec()).unwrap(), set);
            }
        }
    }
}
