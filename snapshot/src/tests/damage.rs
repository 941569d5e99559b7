//! Damaged files: the error names them, and nothing panics.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use clade_memory::{PageRange, Store};

use super::support::*;
use crate::ParentDirs;
use crate::*;

/// A small snapshot with a disk and a working set, compressed or not.
fn small(compression: Compression) -> (tempfile::TempDir, PathBuf) {
    let store = Store::open_small().unwrap();
    let dir = scratch();
    let ram = born(&layout(), &store);
    [2, 3, 60, 150].iter().for_each(|page| put(&ram, *page, *page as u8));
    let mut disk = ModelDisk::new(40 * 4096 + 7);
    disk.write(9 * 4096, &[1; 100]);
    let at = dir.path().join("it");
    let disks = [DiskToSave { name: "root", space: &disk }];
    Saving { disks: &disks, compression, ..Saving::default() }.save(&freeze(&ram), &at).unwrap();
    record(&at, &[PageRange::new(2, 4)]).unwrap();
    verify(&at, &ParentDirs::siblings()).unwrap();
    (dir, at)
}

fn flip(path: &Path, at: u64, bits: u8) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ bits], at).unwrap();
}

/// Whether the error, or one beneath it, is of damage to that file.
fn blames(error: &Error, name: &str) -> bool {
    matches!(error, Error::Damaged { path, .. } if path.file_name().is_some_and(|found| found == name))
}

#[test]
fn every_bit_of_what_describes_is_checked_at_open() {
    let (_dir, at) = small(Compression::None);
    for name in ["manifest.json", "state", "memory.index", "disk-0.index"] {
        let path = at.join(name);
        let bytes = fs::metadata(&path).unwrap().len();
        for offset in 0..bytes {
            for bits in [1, 0x20, 0x80] {
                flip(&path, offset, bits);
                let opened = Snapshot::open(&at, &ParentDirs::siblings()).unwrap_err();
                assert!(blames(&opened, name), "{name}, byte {offset} ^ {bits:#x}: {opened:?}");
                flip(&path, offset, bits);
            }
        }
    }
    Snapshot::open(&at, &ParentDirs::siblings()).unwrap();
}

#[test]
fn data_is_checked_by_verify_and_by_whoever_copies_it() {
    let store = Store::open_small().unwrap();
    for compression in [Compression::None, Compression::Zstd] {
        let (_dir, at) = small(compression);
        for name in ["memory.data", "disk-0.data"] {
            let path = at.join(name);
            let bytes = fs::metadata(&path).unwrap().len();
            // Holes too.
            for offset in (0..bytes).step_by(if bytes > 4096 { 211 } else { 1 }) {
                flip(&path, offset, 4);
                let found = verify(&at, &ParentDirs::siblings()).unwrap_err();
                assert!(blames(&found, name), "{name}, byte {offset}: {found:?}");
                flip(&path, offset, 4);
            }
        }
        let offset = if compression == Compression::None { 60 * 4096 } else { 5 };
        flip(&at.join("memory.data"), offset, 1);
        let loaded = Snapshot::open(&at, &ParentDirs::siblings()).unwrap().restore_ram(&store, &Load::Preload);
        assert!(matches!(&loaded, Err(error) if blames(error, "memory.data")), "{loaded:?}");
        flip(&at.join("memory.data"), offset, 1);
        flip(&at.join("disk-0.data"), if compression == Compression::None { 9 * 4096 } else { 0 }, 1);
        let copy = at.with_file_name("copy");
        let copied = Snapshot::open(&at, &ParentDirs::siblings()).unwrap().disks()[0]
            .copy_to(&fs::File::create(&copy).unwrap(), &copy);
        assert!(matches!(&copied, Err(error) if blames(error, "disk-0.data")), "{copied:?}");
    }
}

#[test]
fn files_cut_short_lengthened_or_missing_are_found_at_open() {
    let (_dir, at) = small(Compression::Zstd);
    for name in names(&at).into_iter().filter(|name| name != "warm") {
        let path = at.join(&name);
        let whole = fs::read(&path).unwrap();
        for len in (0..whole.len()).chain([whole.len() + 1]) {
            let mut cut = whole.clone();
            cut.resize(len, 0);
            fs::write(&path, &cut).unwrap();
            let opened = Snapshot::open(&at, &ParentDirs::siblings()).unwrap_err();
            assert!(blames(&opened, &name), "{name} of {len} bytes: {opened:?}");
        }
        fs::remove_file(&path).unwrap();
        let opened = Snapshot::open(&at, &ParentDirs::siblings()).unwrap_err();
        assert!(matches!(&opened, Error::File { path: missing, .. } if *missing == path), "{opened:?}");
        fs::write(&path, &whole).unwrap();
    }
    verify(&at, &ParentDirs::siblings()).unwrap();
}

#[test]
fn a_damaged_hint_is_only_a_lost_hint() {
    let (_dir, at) = small(Compression::None);
    let path = at.join("warm");
    assert_eq!(
        Snapshot::open(&at, &ParentDirs::siblings()).unwrap().working_set().unwrap(),
        Some(vec![PageRange::new(2, 4)])
    );
    for offset in 0..fs::metadata(&path).unwrap().len() {
        flip(&path, offset, 0x10);
        let snapshot = Snapshot::open(&at, &ParentDirs::siblings()).unwrap();
        assert!(matches!(snapshot.working_set(), Err(error) if blames(&error, "warm")), "byte {offset}");
        assert!(verify(&at, &ParentDirs::siblings()).is_err(), "byte {offset}");
        flip(&path, offset, 0x10);
    }
    // One of another snapshot, as sound as can be.
    let other = format::WorkingSet { id: SnapshotId::new(1), runs: vec![PageRange::new(1, 2)] };
    fs::write(&path, other.encode()).unwrap();
    assert_eq!(Snapshot::open(&at, &ParentDirs::siblings()).unwrap().working_set().unwrap(), None);
}

#[test]
fn a_file_cut_short_after_it_was_opened_is_not_mapped_nor_saved_as_zeros() {
    let store = Store::open_small().unwrap();
    let (dir, at) = small(Compression::None);
    let snapshot = Snapshot::open(&at, &ParentDirs::siblings()).unwrap();
    let image = snapshot.restore_ram(&store, &Load::Lazy).unwrap();
    let file = OpenOptions::new().write(true).open(at.join("memory.data")).unwrap();
    file.set_len(61 * 4096).unwrap();
    assert!(matches!(snapshot.restore_ram(&store, &Load::Lazy), Err(error) if blames(&error, "memory.data")));
    let saved = Saving::default().save(&image, &dir.path().join("again"));
    assert!(matches!(&saved, Err(Error::Space { name, .. }) if name == "memory"), "{saved:?}");
    assert_eq!(names(dir.path()), ["it"]);
}
