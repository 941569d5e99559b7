//! Random histories of a VM against plain bytes.

use std::path::PathBuf;

use clade_memory::{GuestRam, PAGE_SIZE, PageRange, Quiesced, RamImage, RamLayout, Store};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::support::*;
use crate::ParentDirs;
use crate::*;

/// The second range is longer than a window.
fn layout() -> RamLayout {
    RamLayout::of_ranges(&[(GuestAddress(0), 70), (GuestAddress(0x100_0000), 1100)]).unwrap()
}

#[derive(Clone, Debug)]
enum Deed {
    /// A byte, which may be 0, into each of so many pages from there on.
    Fill(u64, u64, u8),
    /// A byte somewhere.
    Poke(u64, u8),
    Discard(u64, u64),
    Evict(u64, u64),
    Freeze,
    Disk(usize, u8),
    Full(bool),
    Incremental(bool),
    /// One of those that were saved, and how.
    Restore(usize, u8),
    Compact(usize),
}

fn deed() -> impl Strategy<Value = Deed> {
    let pages = pages(&layout());
    let runs = (0..pages, prop_oneof![1..4u64, 10..40u64, 200..600u64]);
    prop_oneof![
        6 => (runs.clone(), prop_oneof![Just(0u8), 1..=255u8]).prop_map(|((at, len), byte)| Deed::Fill(at, len, byte)),
        3 => (0..pages, any::<u8>()).prop_map(|(at, byte)| Deed::Poke(at, byte)),
        1 => runs.clone().prop_map(|(at, len)| Deed::Discard(at, len)),
        1 => runs.prop_map(|(at, len)| Deed::Evict(at, len)),
        2 => Just(Deed::Freeze),
        2 => (0..DISK, 1..=255u8).prop_map(|(at, byte)| Deed::Disk(at, byte)),
        1 => any::<bool>().prop_map(Deed::Full),
        4 => any::<bool>().prop_map(Deed::Incremental),
        2 => (any::<usize>(), 0..3u8).prop_map(|(which, how)| Deed::Restore(which, how)),
        1 => any::<usize>().prop_map(Deed::Compact),
    ]
}

const DISK: usize = 300 * 4096 + 77;

struct World {
    store: Store,
    dir: tempfile::TempDir,
    ram: GuestRam,
    model: Vec<u8>,
    disk: ModelDisk,
    last: Option<(PathBuf, SnapshotId, RamImage)>,
    saved: Vec<(PathBuf, Vec<u8>, Vec<u8>)>,
}

impl World {
    fn new() -> Self {
        let store = Store::open().unwrap();
        let ram = born(&layout(), &store);
        let model = vec![0; layout().bytes() as usize];
        Self { store, dir: scratch(), ram, model, disk: ModelDisk::new(DISK), last: None, saved: Vec::new() }
    }

    /// The parts of a run in each region: which, its first page there, and how many.
    fn parts(at: u64, len: u64) -> Vec<(usize, PageRange)> {
        let mut first = 0;
        let mut out = Vec::new();
        for (number, (_, pages)) in layout().ranges().iter().enumerate() {
            let cut = PageRange::new(at, at + len).intersect(PageRange::with_len(first, *pages));
            if !cut.is_empty() {
                out.push((number, PageRange::new(cut.start() - first, cut.end() - first)));
            }
            first += pages;
        }
        out
    }

    fn save(&mut self, incremental: bool, packed: bool) {
        let base = self.last.clone().filter(|_| incremental);
        let image = freeze(&self.ram);
        self.disk.all = base.is_none();
        let dir = self.dir.path().join(format!("{:03}", self.saved.len()));
        let disks = [DiskToSave { name: "root", space: &self.disk }];
        let compression = if packed { Compression::Zstd } else { Compression::None };
        let base = base.as_ref().map(|(dir, id, image)| (dir.as_path(), *id, image));
        let saved = Saving { disks: &disks, base, compression, ..Saving::default() }.save(&image, &dir).unwrap();
        self.disk.dirty.fill(false);
        self.last = Some((dir.clone(), saved.id, image));
        self.saved.push((dir, self.model.clone(), self.disk.bytes.clone()));
    }

    fn act(&mut self, deed: &Deed) {
        match *deed {
            Deed::Fill(at, len, byte) => {
                let end = (at + len).min(pages(&layout()));
                (at..end).for_each(|page| put(&self.ram, page, byte));
                self.model[(at * PAGE_SIZE) as usize..(end * PAGE_SIZE) as usize].fill(byte);
            }
            Deed::Poke(at, byte) => {
                let here = gpa(&layout(), at);
                self.ram.memory().write_obj(byte, GuestAddress(here.0 + 1234)).unwrap();
                self.model[(at * PAGE_SIZE) as usize + 1234] = byte;
            }
            Deed::Discard(at, len) => {
                for (region, range) in Self::parts(at, len) {
                    self.ram.regions()[region].discard(range).unwrap();
                }
                let end = (at + len).min(pages(&layout()));
                self.model[(at * PAGE_SIZE) as usize..(end * PAGE_SIZE) as usize].fill(0);
            }
            Deed::Evict(at, len) => {
                for (region, range) in Self::parts(at, len) {
                    let swap = std::path::Path::new("/var/tmp");
                    self.ram.regions()[region].evict(range, swap, &Quiesced::by(&clade_memory::NoWriters)).unwrap();
                }
            }
            Deed::Freeze => drop(freeze(&self.ram)),
            Deed::Disk(at, byte) => {
                let end = (at + 3000).min(DISK);
                self.disk.write(at, &vec![byte; end - at]);
            }
            Deed::Full(packed) => self.save(false, packed),
            Deed::Incremental(packed) => self.save(true, packed),
            Deed::Restore(which, how) if !self.saved.is_empty() => {
                let (dir, model, disk) = self.saved[which % self.saved.len()].clone();
                let snapshot = Snapshot::open(&dir, &ParentDirs::siblings()).unwrap();
                let load = match how {
                    0 => Load::Lazy,
                    1 => Load::Preload,
                    _ => Load::WorkingSet(linear(&layout(), &self.ram.touched().unwrap())),
                };
                let image = snapshot.restore_ram(&self.store, &load).unwrap();
                self.ram = child(&image, &self.store);
                self.model = model;
                self.disk.bytes = disk;
                self.disk.dirty.fill(false);
                self.last = Some((dir, snapshot.id(), image));
            }
            Deed::Compact(which) if !self.saved.is_empty() => {
                let (dir, ..) = &self.saved[which % self.saved.len()];
                compact(dir, &ParentDirs::siblings(), &SaveProgress::none()).unwrap();
            }
            Deed::Restore(..) | Deed::Compact(_) => {}
        }
        assert!(contents(&self.ram) == self.model, "after {deed:?}");
    }

    /// Everything that was ever saved is there as it was.
    fn check(&self) {
        for (dir, model, disk) in &self.saved {
            verify(dir, &ParentDirs::siblings()).unwrap();
            let snapshot = Snapshot::open(dir, &ParentDirs::siblings()).unwrap();
            for load in [Load::Lazy, Load::Preload] {
                let image = snapshot.restore_ram(&self.store, &load).unwrap();
                // Two at once.
                let vms = [child(&image, &self.store), child(&image, &self.store)];
                put(&vms[0], 3, 0xdd);
                assert!(contents(&vms[1]) == *model, "{} {load:?}", dir.display());
            }
            let mut bytes = vec![1; DISK];
            snapshot.disks()[0].read_at(0, &mut bytes).unwrap();
            assert!(bytes == *disk, "{}", dir.display());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn any_history_comes_back(deeds in proptest::collection::vec(deed(), 1..30)) {
        let mut world = World::new();
        deeds.iter().for_each(|deed| world.act(deed));
        world.save(true, false);
        world.check();
    }
}

#[test]
fn a_scattered_chain_takes_few_mappings() {
    let layout = RamLayout::of_ranges(&[(GuestAddress(0), 8192)]).unwrap();
    let store = Store::open().unwrap();
    let dir = scratch();
    let ram = born(&layout, &store);
    // Every other 20 pages: too long a gap to be written with the data.
    (0..8192).filter(|page| page / 20 % 2 == 0).for_each(|page| put(&ram, page, 1));
    let mut last: Option<(PathBuf, SnapshotId, RamImage)> = None;
    for (number, byte) in [(0, 1), (1, 2), (2, 0), (3, 4)] {
        (number..8192).step_by(37).for_each(|page| put(&ram, page, byte));
        let image = freeze(&ram);
        let at = dir.path().join(number.to_string());
        let base = last.as_ref().map(|(dir, id, image)| (dir.as_path(), *id, image));
        let saved = Saving { base, ..Saving::default() }.save(&image, &at).unwrap();
        last = Some((at, saved.id, image));
        let lazy = Snapshot::open(&dir.path().join(number.to_string()), &ParentDirs::siblings()).unwrap();
        let image = lazy.restore_ram(&store, &Load::Lazy).unwrap();
        assert!(image.mappings() <= 512, "{} mappings", image.mappings());
        assert!(contents(&child(&image, &store)) == contents(&ram), "snapshot {number}");
    }
}
