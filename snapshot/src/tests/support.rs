//! What tests share: a VM with two regions and a hole, a disk, and a model of both in plain bytes.

use std::io;
use std::path::Path;

use clade_memory::{GuestRam, PAGE_SIZE, PageRange, Quiesced, RamImage, RamLayout, Store};
use vm_memory::{Bytes, GuestAddress};

use crate::files::Files;
use crate::space::{Kind, Space};
use crate::{Base, Compression, DiskToSave, Error, Load, Save, Saved, Snapshot, SnapshotId, Watch};

/// A disk in memory that knows what was written since it was last saved.
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
    fn runs(&self) -> io::Result<Vec<(PageRange, Kind)>> {
        let pages = self.dirty.iter().enumerate().filter(|(_, dirty)| self.all || **dirty);
        Ok(pages.map(|(page, _)| (PageRange::with_len(page as u64, 1), Kind::Data)).collect())
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
    ram.birth().unwrap();
    ram
}

pub(crate) fn child(image: &RamImage, store: &Store) -> GuestRam {
    let ram = GuestRam::reserve(image.layout(), store).unwrap();
    ram.adopt(image).unwrap();
    ram
}

pub(crate) fn freeze(ram: &GuestRam) -> RamImage {
    ram.freeze(&Quiesced::assume()).unwrap().0
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
    pub(crate) files: Files,
    pub(crate) disks: &'a [DiskToSave<'a>],
    pub(crate) base: Option<(&'a Path, SnapshotId, &'a RamImage)>,
    pub(crate) compression: Compression,
}

impl Default for Saving<'_> {
    fn default() -> Self {
        Self { files: Files::default(), disks: &[], base: None, compression: Compression::None }
    }
}

impl Saving<'_> {
    pub(crate) fn save(&self, image: &RamImage, dir: &Path) -> Result<Saved, Error> {
        let base = self.base.map(|(dir, id, image)| Base { dir, id, image });
        let save = Save { memory: image, disks: self.disks, sections: SECTIONS, base, compression: self.compression };
        save.with(&self.files, dir, &Watch::none())
    }
}

/// Memory as a VM restored from `dir` sees it.
pub(crate) fn restored(dir: &Path, store: &Store, load: &Load) -> Vec<u8> {
    let image = Snapshot::open(dir).unwrap().restore_ram(store, load).unwrap();
    contents(&child(&image, store))
}

/// The names in a directory.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
