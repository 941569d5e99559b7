//! Saved contents are restored unchanged.

use std::cell::{Cell, RefCell};
use std::fs;
use std::sync::Arc;

use clade_memory::{DontFork, GuestRam, PageRange, RamLayout, Store};
use vm_memory::Bytes;

use super::faults::Plan;
use super::support::*;
use crate::ParentDirs;
use crate::files::{FileOp, FileOps};
use crate::*;

const LOADS: [Load; 3] = [Load::Lazy, Load::Preload, Load::WorkingSet(Vec::new())];

#[test]
fn a_full_snapshot_comes_back_in_every_way() {
    let store = Store::open().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("one");
    let ram = born(&layout(), &store);
    for page in [0, 3, 5, 69, 70, 71, 100, 202] {
        put(&ram, page, page as u8 + 1);
    }
    let mut disk = ModelDisk::new(3 * 4096 + 100);
    disk.write(4090, b"over the edge");
    disk.write(3 * 4096 + 98, b"ab");
    let image = freeze(&ram);
    for compression in [Compression::None, Compression::Zstd] {
        let disks = [DiskToSave { name: "root", space: &disk }];
        let saved = Saving { disks: &disks, compression, ..Saving::default() }.save(&image, &at).unwrap();
        assert_eq!(saved.data_pages + saved.zero_pages, 203 + 4);
        for load in &LOADS {
            assert_eq!(restored(&at, &store, load), contents(&ram), "{compression:?} {load:?}");
        }
        let snapshot = Snapshot::open(&at, &ParentDirs::siblings()).unwrap();
        assert_eq!(
            (snapshot.id(), snapshot.section("vcpus"), snapshot.section("vm")),
            (saved.id, Some(&[1, 2, 3][..]), None)
        );
        let disks = snapshot.disks();
        let mut bytes = vec![1; disk.bytes.len()];
        disks[0].read_at(0, &mut bytes).unwrap();
        assert_eq!((disks[0].name(), bytes), ("root", disk.bytes.clone()));
        let mut some = [0; 13];
        disks[0].read_at(4090, &mut some).unwrap();
        assert_eq!(&some, b"over the edge");
        assert!(disks[0].read_at(3 * 4096 + 90, &mut some).is_err());
        let copy = dir.path().join("copy.img");
        disks[0].copy_to(&fs::File::create(&copy).unwrap(), &copy).unwrap();
        assert_eq!(fs::read(&copy).unwrap(), disk.bytes);
        verify(&at, &ParentDirs::siblings()).unwrap();
        assert_eq!(names(dir.path()), ["copy.img", "one"], "nothing is left aside");
    }
}

#[test]
fn zeros_are_not_what_is_missing() {
    let store = Store::open().unwrap();
    let dir = scratch();
    let at = |name: &str| dir.path().join(name);
    let ram = born(&layout(), &store);
    (0..203).for_each(|page| put(&ram, page, 9));
    let first = freeze(&ram);
    let saved = Saving::default().save(&first, &at("a")).unwrap();
    assert_eq!((saved.data_pages, saved.zero_pages), (203, 0));
    // Written with zeros, and discarded; the rest is unchanged.
    (20..60).for_each(|page| put(&ram, page, 0));
    ram.regions()[1].discard(PageRange::new(30, 90)).unwrap();
    // Few enough that one mapping of the parent's file would span them if they were not data there.
    ram.regions()[1].discard(PageRange::new(100, 103)).unwrap();
    let second = freeze(&ram);
    let base = Some((at("a"), saved.id, &first));
    let base = base.as_ref().map(|(dir, id, image)| (dir.as_path(), *id, *image));
    let saved = Saving { base, ..Saving::default() }.save(&second, &at("b")).unwrap();
    assert_eq!((saved.data_pages, saved.zero_pages), (0, 103));
    for load in &LOADS {
        assert_eq!(restored(&at("b"), &store, load), contents(&ram));
        assert_eq!(restored(&at("a"), &store, load), [9; 203 * 4096]);
    }
    // No change. (A freeze may copy pages again that the VM kept as its own, and these are saved
    // again.)
    let again = Saving { base: Some((&at("b"), saved.id, &second)), ..Saving::default() };
    let none = again.save(&freeze(&ram), &at("c")).unwrap();
    assert!(none.data_pages == 0 && none.zero_pages <= saved.zero_pages);
    assert_eq!(restored(&at("c"), &store, &Load::Lazy), contents(&ram));
}

#[test]
fn a_lazily_restored_vm_is_saved_whole_and_over_its_own_files() {
    let store = Store::open().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("it");
    let ram = born(&layout(), &store);
    (0..203).for_each(|page| put(&ram, page, page as u8));
    let wanted = contents(&ram);
    Saving::default().save(&freeze(&ram), &at).unwrap();
    drop(ram);
    for _ in 0..3 {
        let image = Snapshot::open(&at, &ParentDirs::siblings()).unwrap().restore_ram(&store, &Load::Lazy).unwrap();
        // Without touching a page of it.
        let ram = child(&image, &store);
        let saved = Saving::default().save(&freeze(&ram), &at).unwrap();
        assert_eq!(saved.data_pages + saved.zero_pages, 203);
        verify(&at, &ParentDirs::siblings()).unwrap();
        assert_eq!(contents(&ram), wanted, "its memory is the old files'");
        assert_eq!(restored(&at, &store, &Load::Preload), wanted);
    }
    assert_eq!(names(dir.path()), ["it"]);
}

#[test]
fn what_is_not_inherited_is_neither_saved_nor_forgotten() {
    let store = Store::open().unwrap();
    let dir = scratch();
    let at = dir.path().join("it");
    let ram = born(&layout(), &store);
    (0..203).for_each(|page| put(&ram, page, 0x55));
    let region = &ram.regions()[1];
    region.set_dont_fork(PageRange::new(3, 5), Some(DontFork::Absent)).unwrap();
    region.set_dont_fork(PageRange::new(8, 9), Some(DontFork::Zeroed)).unwrap();
    let pattern = store.reference_page(&[7; 4096]).unwrap();
    region.set_dont_fork(PageRange::new(40, 44), Some(DontFork::Fresh(pattern))).unwrap();
    let image = freeze(&ram);
    Saving::default().save(&image, &at).unwrap();
    let restored = Snapshot::open(&at, &ParentDirs::siblings()).unwrap().restore_ram(&store, &Load::Lazy).unwrap();
    let look = |ram: &GuestRam| {
        [2, 3, 4, 5, 8, 39, 40, 43, 44].map(|page| ram.memory().read_obj::<u8>(gpa(&layout(), 70 + page)).ok())
    };
    let ram = child(&restored, &store);
    let wanted = [Some(0x55), None, None, Some(0x55), Some(0), Some(0x55), Some(7), Some(7), Some(0x55)];
    assert_eq!(look(&ram), wanted);
    assert_eq!(look(&ram), look(&child(&image, &store)), "as a fork would have it");
    // Children of the VM do not inherit its writes there.
    put(&ram, 70 + 8, 1);
    put(&ram, 70 + 41, 1);
    assert_eq!(look(&child(&freeze(&ram), &store)), wanted);
}

#[test]
fn progress_is_told_and_a_save_can_be_cancelled() {
    let store = Store::open().unwrap();
    let dir = scratch();
    let at = dir.path().join("it");
    let layout = RamLayout::new(64 << 20).unwrap();
    let ram = born(&layout, &store);
    (0..10_000).for_each(|page| put(&ram, page, 3));
    let image = freeze(&ram);
    let save = Save {
        memory: &image,
        disks: &[],
        sections: SECTIONS,
        base: None,
        compression: Compression::None,
        replace: true,
    };
    let told = RefCell::new(Vec::new());
    let tell = |done, total| told.borrow_mut().push((done, total));
    save.to(&at, &SaveProgress { progress: &tell, ..SaveProgress::none() }).unwrap();
    let told = told.into_inner();
    assert!(told.len() > 5 && told.windows(2).all(|two| two[0].0 <= two[1].0 && two[0].1 == two[1].1));
    assert!(told.first().is_some_and(|first| first.0 == 0) && told.last().is_some_and(|last| last.0 == last.1));
    let checks = Cell::new(0);
    let plan = Arc::new(Plan::default());
    let (files, last_check) = (FileOps { plan: Some(Arc::clone(&plan)) }, Cell::new(0));
    let cancelled_at = |check: u32| {
        checks.set(0);
        let is_cancelled = || {
            last_check.set(plan.trace().len());
            checks.replace(checks.get() + 1) == check
        };
        save.with(&files, &at, &SaveProgress { is_cancelled: &is_cancelled, ..SaveProgress::none() })
    };
    cancelled_at(u32::MAX).unwrap();
    // A cancellation counts until the snapshot is put in its place.
    assert_eq!(plan.trace()[last_check.get()].0, FileOp::Rename);
    let there = || (Snapshot::open(&at, &ParentDirs::siblings()).unwrap().id(), names(dir.path()));
    let before = (there().0, vec!["it".to_owned()]);
    for check in 0..checks.get() {
        assert!(matches!(cancelled_at(check), Err(Error::Cancelled)), "check {check}");
        assert_eq!(there(), before, "check {check}");
    }
}

#[test]
fn what_a_run_touched_is_read_ahead_in_the_next() {
    let store = Store::open_small().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("it");
    let layout = RamLayout::new(16 << 20).unwrap();
    let ram = born(&layout, &store);
    (0..4096).for_each(|page| put(&ram, page, 3));
    Saving::default().save(&freeze(&ram), &at).unwrap();
    let snapshot = Snapshot::open(&at, &ParentDirs::siblings()).unwrap();
    let run = child(&snapshot.restore_ram(&store, &Load::Lazy).unwrap(), &store);
    put(&run, 1000, 4);
    let touched = linear(&layout, &run.touched().unwrap());
    assert!(touched.iter().any(|run| run.contains(1000)) && !touched.iter().any(|run| run.contains(3000)));
    record(&at, &touched).unwrap();
    // Not the working set of what is in the directory by now.
    let other = SnapshotId::new(7);
    let refused = record_working_set(&at, other, &[PageRange::new(0, 1)]);
    assert!(matches!(refused, Err(Error::WrongId { wanted, .. }) if wanted == other), "{refused:?}");
    let warm = Snapshot::open(&at, &ParentDirs::siblings()).unwrap().working_set().unwrap().unwrap();
    assert_eq!(warm, touched);
    let image = snapshot.restore_ram(&store, &Load::WorkingSet(warm)).unwrap();
    assert!(contents(&child(&image, &store)).iter().all(|byte| *byte == 3));
    assert!(show(&at, &ParentDirs::siblings()).unwrap().working_set);
}

#[test]
fn names_given_twice_and_spaces_with_gaps_are_refused() {
    let store = Store::open_small().unwrap();
    let dir = scratch();
    let at = dir.path().join("it");
    let image = freeze(&born(&layout(), &store));
    let mut disk = ModelDisk::new(3 * 4096);
    let twice = [DiskToSave { name: "a", space: &disk }, DiskToSave { name: "a", space: &disk }];
    let refused = Saving { disks: &twice, ..Saving::default() }.save(&image, &at);
    assert!(matches!(refused, Err(Error::Twice { name }) if name == "a"));
    let sections: &[(&str, &[u8])] = &[("x", b""), ("x", b"")];
    let save = Save { memory: &image, disks: &[], sections, base: None, compression: Compression::None, replace: true };
    assert!(matches!(save.to(&at, &SaveProgress::none()), Err(Error::Twice { name }) if name == "x"));
    disk.all = false;
    disk.write(4096, b"only the second page");
    let gaps = [DiskToSave { name: "a", space: &disk }];
    let refused = Saving { disks: &gaps, ..Saving::default() }.save(&image, &at);
    assert!(matches!(refused, Err(Error::Incomplete { page: 0, .. })));
    assert_eq!(names(dir.path()), [""; 0]);
}

#[test]
fn a_lazily_restored_vm_is_frozen_after_many_writes() {
    let store = Store::open().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("it");
    let layout = RamLayout::new(32 << 20).unwrap();
    let ram = born(&layout, &store);
    (0..8192).for_each(|page| put(&ram, page, 3));
    Saving::default().save(&freeze(&ram), &at).unwrap();
    let restored = Snapshot::open(&at, &ParentDirs::siblings()).unwrap().restore_ram(&store, &Load::Lazy).unwrap();
    let ram = child(&restored, &store);
    // More pages than a freeze in mode Auto copies while the VM is paused.
    (0..8192).filter(|page| page % 4 == 0).for_each(|page| put(&ram, page, 4));
    let image = freeze(&ram);
    image.finish_background().unwrap();
    let (of_image, on_disk) = (child(&image, &store), child(&restored, &store));
    for page in [0, 1, 4, 5, 8188, 8191] {
        let look = |ram: &GuestRam| ram.memory().read_obj::<u8>(gpa(&layout, page)).unwrap();
        let written = if page % 4 == 0 { 4 } else { 3 };
        assert_eq!((look(&ram), look(&of_image), look(&on_disk)), (written, written, 3), "page {page}");
    }
    verify(&at, &ParentDirs::siblings()).unwrap();
}

#[test]
fn a_snapshot_has_any_name_that_a_directory_has() {
    let store = Store::open_small().unwrap();
    let dir = scratch();
    let image = freeze(&born(&layout(), &store));
    // Of one, two and three bytes a character.
    for name in ["x".repeat(255), "\u{fc}".repeat(127), "\u{20ac}".repeat(85)] {
        let at = dir.path().join(&name);
        Saving::default().save(&image, &at).unwrap();
        Saving::default().save(&image, &at).unwrap();
        assert_eq!(names(dir.path()), [name]);
        fs::remove_dir_all(at).unwrap();
    }
}
