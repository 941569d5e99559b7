//! Shared by the tests: a VM with two regions and a hole, a disk, and a model of both in plain
//! bytes.

use std::io;
use std::path::Path;

use clade_memory::{GuestRam, PAGE_SIZE, PageRange, Quiesced, RamImage, RamLayout, Store};
use vm_memory::{Bytes, GuestAddress};

use crate::content::PageContent;
use crate::files::FileOps;
use crate::format::Manifest;
use crate::space::Space;
use crate::staging::MANIFEST;
use crate::{Base, Compression, DiskToSave, Error, Load, ParentDirs, Save, SaveProgress, Saved, Snapshot, SnapshotId};

/// The identity of the snapshot at `at`.
pub(crate) fn id_at(at: &Path) -> SnapshotId {
    Manifest::decode(&std::fs::read(at.join(MANIFEST)).unwrap()).unwrap().id
}

/// Records the working set of the snapshot at `at`.
pub(crate) fn record(at: &Path, runs: &[PageRange]) -> Result<(), Error> {
    crate::record_working_set(at, id_at(at), runs)
}

/// A disk in memory that tracks the writes since its last save.
#[derive(Clone, Debug)]
pub(crate) struct ModelDisk {
    pub(crate) bytes: Vec<u8>,
    pub(crate) dirty: Vec<bool>,
    pub(crate) all: bool,
}

impl ModelDisk {
    pub(crate) fn new(len: usize) -> Self {
        Self { bytes: vec![0; len], dirty: vec![false; len.div_ceil(4096)], all: true }
    }

    pub(crate) fn write(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self.dirty[at / 4096..=(at + bytes.len() - 1) / 4096].fill(true);
    }
}

impl Space for ModelDisk {
    fn bytes(&self) -> u64 {
        self.bytes.len() as u64
    }
    fn runs(&self) -> io::Result<Vec<(PageRange, PageContent)>> {
        let pages = self.dirty.iter().enumerate().filter(|(_, dirty)| self.all || **dirty);
        Ok(pages.map(|(page, _)| (PageRange::with_len(page as u64, 1), PageContent::Data)).collect())
    }
    fn read_pages(&self, page: u64, bytes: &mut [u8]) -> io::Result<()> {
        let from = (page * PAGE_SIZE) as usize;
        let have = &self.bytes[from..(from + bytes.len()).min(self.bytes.len())];
        bytes[..have.len()].copy_from_slice(have);
        bytes[have.len()..].fill(0);
        Ok(())
    }
}

/// Two ranges with a hole between them, neither a multiple of anything.
pub(crate) fn layout() -> RamLayout {
    RamLayout::of_ranges(&[(GuestAddress(0x1000), 70), (GuestAddress(0x20_0000), 133)]).unwrap()
}

pub(crate) fn born(layout: &RamLayout, store: &Store) -> GuestRam {
    let ram = GuestRam::reserve(layout, store).unwrap();
    ram.populate().unwrap();
    ram
}

pub(crate) fn child(image: &RamImage, store: &Store) -> GuestRam {
    let ram = GuestRam::reserve(image.layout(), store).unwrap();
    ram.adopt(image).unwrap();
    ram
}

pub(crate) fn freeze(ram: &GuestRam) -> RamImage {
    ram.freeze(&Quiesced::by(&clade_memory::NoWriters)).unwrap().0
}

/// Guest address of a page counted over all regions.
pub(crate) fn gpa(layout: &RamLayout, mut page: u64) -> GuestAddress {
    for (base, pages) in layout.ranges() {
        if page < *pages {
            return GuestAddress(base.0 + page * PAGE_SIZE);
        }
        page -= pages;
    }
    panic!("page {page} beyond the end");
}

pub(crate) fn pages(layout: &RamLayout) -> u64 {
    layout.bytes() / PAGE_SIZE
}

pub(crate) fn put(ram: &GuestRam, page: u64, byte: u8) {
    ram.memory().write_slice(&[byte; PAGE_SIZE as usize], gpa(ram.layout(), page)).unwrap();
}

/// All of memory, region after region.
pub(crate) fn contents(ram: &GuestRam) -> Vec<u8> {
    let mut out = Vec::new();
    for (base, pages) in ram.layout().ranges() {
        let mut bytes = vec![0; (pages * PAGE_SIZE) as usize];
        ram.memory().read_slice(&mut bytes, *base).unwrap();
        out.extend(bytes);
    }
    out
}

pub(crate) const SECTIONS: &[(&str, &[u8])] = &[("config", b"{}"), ("vcpus", &[1, 2, 3]), ("devices", b"")];

pub(crate) struct Saving<'a> {
    pub(crate) files: FileOps,
    pub(crate) disks: &'a [DiskToSave<'a>],
    pub(crate) base: Option<(&'a Path, SnapshotId, &'a RamImage)>,
    pub(crate) compression: Compression,
    pub(crate) replace: bool,
}

impl Default for Saving<'_> {
    fn default() -> Self {
        Self { files: FileOps::default(), disks: &[], base: None, compression: Compression::None, replace: true }
    }
}

impl Saving<'_> {
    pub(crate) fn save(&self, image: &RamImage, dir: &Path) -> Result<Saved, Error> {
        let base = self.base.map(|(dir, id, image)| Base { dir, id, image, is_fixed: false });
        let save = Save {
            memory: image,
            disks: self.disks,
            sections: SECTIONS,
            base,
            compression: self.compression,
            replace: self.replace,
        };
        save.with(&self.files, dir, &SaveProgress::none())
    }
}

/// Memory as a VM restored from `dir` sees it.
pub(crate) fn restored(dir: &Path, store: &Store, load: &Load) -> Vec<u8> {
    let image = Snapshot::open(dir, &ParentDirs::siblings()).unwrap().restore_ram(store, load).unwrap();
    contents(&child(&image, store))
}

/// The names in a directory.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Held by tests that start processes, and by those in which a lock must go with its file: between
/// a fork and the exec behind it the child has all of this process's descriptors, locks and all.
pub(crate) fn alone() -> std::sync::MutexGuard<'static, ()> {
    static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// An operation on a directory that has `one`, a full snapshot, and `two`, on top of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deed {
    /// A full save to where nothing is.
    Fresh,
    /// A full save over `two`.
    Over,
    /// An incremental save over `two`, based on a VM restored from `one`.
    Incremental,
    /// Compressed, with a disk, over `two`.
    Packed,
    /// `two` is merged with `one`.
    Compact,
    /// The working set of a run from `two` is recorded.
    WorkingSet,
}

pub(crate) const DEEDS: [Deed; 6] =
    [Deed::Fresh, Deed::Over, Deed::Incremental, Deed::Packed, Deed::Compact, Deed::WorkingSet];

/// The VMs that deeds are done with.
pub(crate) struct Cast {
    pub(crate) store: Store,
    /// Where `one` and `two` are to be copied from.
    pub(crate) template: tempfile::TempDir,
    /// Page 5 is 50, page 90 is 90.
    pub(crate) one: Vec<u8>,
    /// And page 6 is 60.
    pub(crate) two: Vec<u8>,
    /// And page 90 is zeros and page 100 is 100.
    pub(crate) new: Vec<u8>,
    base: (SnapshotId, RamImage),
    image: RamImage,
}

/// The variable with the directory of a process that will be killed, and leaves its own behind.
pub(crate) const SCRATCH: &str = "CLADE_SNAPSHOT_SCRATCH";

/// Where syncs cost nothing, if there is such a place.
pub(crate) fn scratch() -> tempfile::TempDir {
    let dir = std::env::var_os(SCRATCH).unwrap_or_else(|| "/dev/shm".into());
    tempfile::tempdir_in(dir).or_else(|_| tempfile::tempdir()).unwrap()
}

impl Cast {
    pub(crate) fn new() -> Self {
        let store = Store::open_small().unwrap();
        let template = scratch();
        let at = |name: &str| template.path().join(name);
        let ram = born(&layout(), &store);
        put(&ram, 5, 50);
        put(&ram, 90, 90);
        let one = contents(&ram);
        let first = Saving::default().save(&freeze(&ram), &at("one")).unwrap();
        // From here on it is a VM restored from `one`.
        let restored =
            Snapshot::open(&at("one"), &ParentDirs::siblings()).unwrap().restore_ram(&store, &Load::Lazy).unwrap();
        let ram = child(&restored, &store);
        put(&ram, 6, 60);
        let two = contents(&ram);
        let base = (first.id, restored);
        let onto = |image: &RamImage| {
            let base = Some((at("one"), base.0, &base.1));
            let base = base.as_ref().map(|(dir, id, image)| (dir.as_path(), *id, *image));
            Saving { base, ..Saving::default() }.save(image, &at("two")).unwrap()
        };
        onto(&freeze(&ram));
        put(&ram, 90, 0);
        put(&ram, 100, 100);
        let (new, image) = (contents(&ram), freeze(&ram));
        Self { store, template, one, two, new, base, image }
    }

    /// A directory with copies of both, and the leftovers of a crash.
    pub(crate) fn stage(&self) -> tempfile::TempDir {
        let stage = scratch();
        for name in ["one", "two"] {
            copy_dir(&self.template.path().join(name), &stage.path().join(name));
        }
        let stale = stage.path().join(".two.clade-0123456789abcdef");
        copy_dir(&self.template.path().join("one"), &stale);
        stage
    }

    /// Where the deed's result is.
    pub(crate) fn target(deed: Deed) -> &'static str {
        if deed == Deed::Fresh { "three" } else { "two" }
    }

    pub(crate) fn act(&self, deed: Deed, files: &FileOps, stage: &Path) -> Result<(), Error> {
        let target = stage.join(Self::target(deed));
        let one = stage.join("one");
        let mut disk = ModelDisk::new(5000);
        disk.write(4096, &[9; 500]);
        let disks = [DiskToSave { name: "root", space: &disk }];
        let mut saving = Saving { files: files.clone(), ..Saving::default() };
        match deed {
            Deed::Compact => {
                return crate::compact::compact_with(files, &target, &ParentDirs::siblings(), &SaveProgress::none())
                    .map(drop);
            }
            Deed::WorkingSet => {
                let runs = [PageRange::new(5, 7)];
                return crate::working_set::record_with(files, &target, id_at(&target), &runs);
            }
            Deed::Fresh | Deed::Over => {}
            Deed::Incremental => saving.base = Some((&one, self.base.0, &self.base.1)),
            Deed::Packed => (saving.compression, saving.disks) = (Compression::Zstd, &disks),
        }
        saving.save(&self.image, &target).map(drop)
    }

    /// Contents of the target before the deed (`None` if it does not exist) and after.
    pub(crate) fn before_and_after(&self, deed: Deed) -> (Option<&[u8]>, &[u8]) {
        match deed {
            Deed::Fresh => (None, &self.new),
            Deed::Over | Deed::Incremental | Deed::Packed => (Some(&self.two), &self.new),
            Deed::Compact | Deed::WorkingSet => (Some(&self.two), &self.two),
        }
    }

    /// The old or the new, complete; and `one` as it was. Returns whether it is the new.
    pub(crate) fn check(&self, deed: Deed, stage: &Path, what: &str) -> bool {
        crate::verify(&stage.join("one"), &ParentDirs::siblings())
            .unwrap_or_else(|error| panic!("{what}: one: {error:?}"));
        assert!(restored(&stage.join("one"), &self.store, &Load::Lazy) == self.one, "{what}: one has changed");
        let target = stage.join(Self::target(deed));
        let (before, after) = self.before_and_after(deed);
        if !target.exists() {
            assert!(before.is_none(), "{what}: the old snapshot is gone");
            return false;
        }
        crate::verify(&target, &ParentDirs::siblings()).unwrap_or_else(|error| panic!("{what}: {error:?}"));
        let found = restored(&target, &self.store, &Load::Preload);
        assert!(found == after || Some(found.as_slice()) == before, "{what}: neither the old nor the new");
        found == after
    }
}

pub(crate) fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for name in names(from) {
        std::fs::copy(from.join(&name), to.join(&name)).unwrap();
    }
}

impl Cast {
    /// As [`Self::act`], on a stage that another process has set up: there, a VM is restored and
    /// does the same.
    pub(crate) fn act_on_copy(&self, deed: Deed, files: &FileOps, stage: &Path) -> Result<(), Error> {
        let one = Snapshot::open(&stage.join("one"), &ParentDirs::siblings())?;
        let restored = one.restore_ram(&self.store, &Load::Lazy)?;
        let ram = child(&restored, &self.store);
        for (page, byte) in [(6, 60), (90, 0), (100, 100)] {
            put(&ram, page, byte);
        }
        let image = freeze(&ram);
        let cast = Self {
            store: self.store.clone(),
            template: scratch(),
            base: (one.id(), restored),
            image,
            one: Vec::new(),
            two: Vec::new(),
            new: Vec::new(),
        };
        cast.act(deed, files, stage)
    }
}
