//! Snapshots written by earlier versions, which must stay readable.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::{Path, PathBuf};

use clade_memory::{GuestRam, PAGE_SIZE, PageRange, RamLayout, Store};
use clade_snapshot::{Load, ParentDirs, Snapshot, SnapshotId, show, verify};
use vm_memory::{Bytes, GuestAddress};

const LOW: GuestAddress = GuestAddress(0x1000);
const HIGH: GuestAddress = GuestAddress(0x10_0000);

fn v1(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/v1").join(name)
}

/// The first byte of each of the 20 pages, after making sure that the page holds nothing but it.
fn pages(name: &str, load: &Load) -> Vec<u8> {
    let store = Store::open_small().unwrap();
    let image = Snapshot::open(&v1(name), &ParentDirs::siblings()).unwrap().restore_ram(&store, load).unwrap();
    let ram = GuestRam::reserve(image.layout(), &store).unwrap();
    ram.adopt(&image).unwrap();
    let mut out = Vec::new();
    for (base, pages) in image.layout().ranges() {
        for page in 0..*pages {
            let mut bytes = [0; PAGE_SIZE as usize];
            ram.memory().read_slice(&mut bytes, GuestAddress(base.0 + page * PAGE_SIZE)).unwrap();
            assert!(bytes.iter().all(|byte| *byte == bytes[0]), "page {page} at {base:?}");
            out.push(bytes[0]);
        }
    }
    out
}

#[test]
fn version_1_is_read() {
    let mut full = [0; 20];
    (full[0], full[19]) = (0x11, 0x22);
    let mut child = full;
    (child[1], child[19]) = (0x33, 0);
    for load in [Load::Lazy, Load::Preload] {
        assert_eq!(pages("full", &load), full);
        assert_eq!(pages("child", &load), child);
    }
    let opened = Snapshot::open(&v1("child"), &ParentDirs::siblings()).unwrap();
    assert_eq!(opened.id(), SnapshotId::new(0xb1b1));
    assert_eq!(opened.depth(), 2);
    assert_eq!(opened.layout().unwrap(), RamLayout::of_ranges(&[(LOW, 2), (HIGH, 18)]).unwrap());
    let sections: Vec<(&str, &[u8])> = opened.sections().iter().collect();
    assert_eq!(sections, [("config", &b"{\"cpus\":1}"[..]), ("vcpus", &[0, 255]), ("empty", &[])]);
    assert_eq!(opened.working_set().unwrap(), Some(vec![PageRange::new(19, 20), PageRange::new(0, 2)]));
    let disk = &opened.disks()[0];
    let mut bytes = vec![9; 5000];
    disk.read_at(0, &mut bytes).unwrap();
    let mut wanted = vec![0; 5000];
    wanted[10] = 0x44;
    wanted[4999] = 0x55;
    assert_eq!((disk.name(), bytes), ("root", wanted));
    for (name, snapshots) in [("full", 1), ("child", 2)] {
        assert_eq!(verify(&v1(name), &ParentDirs::siblings()).unwrap().snapshots, snapshots);
        let shown = show(&v1(name), &ParentDirs::siblings()).unwrap();
        assert_eq!((shown.full, shown.broken, shown.ignored), (snapshots == 1, None, Vec::<String>::new()));
    }
}
