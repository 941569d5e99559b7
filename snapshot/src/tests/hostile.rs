//! Hostile directories: opening one terminates, costs no more than its content, and touches no file
//! outside.
//! outside.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{MetadataExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;

use clade_memory::{PageRange, Store};
use rustix::fs::{CWD, FileType, Mode, mknodat};

use super::faults::Plan;
use super::support::*;
use crate::ParentDirs;
use crate::content::PageContent;
use crate::files::{FileOp, FileOps};
use crate::format::{Index, Manifest, Run, checksum};
use crate::staging::{StagingDir, expect_replaceable};
use crate::*;

const HUGE: u64 = 8 << 40;

/// A small snapshot with a disk and a working set.
fn small(dir: &Path, name: &str) -> PathBuf {
    let store = Store::open_small().unwrap();
    let ram = born(&layout(), &store);
    put(&ram, 2, 2);
    let mut disk = ModelDisk::new(40 * 4096);
    disk.write(9 * 4096, &[1; 100]);
    let at = dir.join(name);
    let disks = [DiskToSave { name: "root", space: &disk }];
    Saving { disks: &disks, ..Saving::default() }.save(&freeze(&ram), &at).unwrap();
    record(&at, &[PageRange::new(2, 4)]).unwrap();
    at
}

/// Opens the snapshot and reads all readable data, which must terminate.
fn read(at: &Path) -> Result<(), Error> {
    let (at, (told, heard)) = (at.to_owned(), channel());
    std::thread::spawn(move || {
        let read = || Snapshot::open(&at, &ParentDirs::siblings())?.working_set().map(drop);
        let _ = told.send(read());
    });
    clade_test_support::receive("the end of reading a snapshot", &heard)
}

#[test]
fn what_is_no_file_is_refused_by_name_and_not_waited_for() {
    let dir = scratch();
    let at = small(dir.path(), "it");
    let elsewhere = dir.path().join("elsewhere");
    for name in names(&at) {
        let path = at.join(&name);
        let refused = |what: &str| {
            let error = read(&at).expect_err(what);
            let told = error.to_string();
            assert!(told.contains(&name) && told.contains(what), "{name}: {told}");
            if fs::remove_file(&path).is_err() {
                fs::remove_dir(&path).unwrap();
            }
        };
        fs::rename(&path, &elsewhere).unwrap();
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        refused("a pipe");
        // A valid file outside the directory.
        symlink(&elsewhere, &path).unwrap();
        refused("a symbolic link");
        symlink("/dev/zero", &path).unwrap();
        refused("a symbolic link");
        fs::create_dir(&path).unwrap();
        refused("a directory");
        let _socket = UnixListener::bind(&path).unwrap();
        refused("could not be opened");
        fs::rename(&elsewhere, &path).unwrap();
    }
    read(&at).unwrap();
    verify(&at, &ParentDirs::siblings()).unwrap();
}

/// Changes the manifest, and seals it again.
fn forge(at: &Path, change: impl FnOnce(&mut Manifest)) {
    let path = at.join("manifest.json");
    let mut manifest = Manifest::decode(&fs::read(&path).unwrap()).unwrap();
    change(&mut manifest);
    fs::write(&path, manifest.encode()).unwrap();
}

fn lengthen(path: &Path) {
    OpenOptions::new().write(true).open(path).unwrap().set_len(HUGE).unwrap();
}

#[test]
fn a_length_is_not_believed_though_the_file_has_it() {
    let dir = scratch();
    for name in ["state", "memory.index", "disk-0.index", "warm", "manifest.json"] {
        let at = small(dir.path(), name);
        forge(&at, |manifest| match name {
            "state" => manifest.state.bytes = HUGE,
            "memory.index" => manifest.memory.layer.index_bytes = HUGE,
            "disk-0.index" => manifest.disks[0].layer.index_bytes = HUGE,
            _ => {}
        });
        // All of it a hole: the directory has next to nothing.
        lengthen(&at.join(name));
        let refused = read(&at).unwrap_err();
        assert!(matches!(refused, Error::Damaged { .. }), "{name}: {refused:?}");
        assert!(fs::metadata(at.join(name)).unwrap().blocks() < 1 << 10);
    }
}

/// Memory of 8 TiB, all of it zeros, or all of it data that is a hole. The files are as the format
/// has them.
fn vast(dir: &Path, kind: PageContent) -> PathBuf {
    let at = small(dir, if kind == PageContent::Zero { "zeros" } else { "data" });
    let pages = HUGE >> 12;
    let index = Index {
        packed: false,
        bytes: HUGE,
        data_bytes: HUGE,
        runs: vec![Run { range: PageRange::new(0, pages), kind }],
        chunks: Vec::new(),
    };
    let bytes = index.encode();
    fs::write(at.join("memory.index"), &bytes).unwrap();
    lengthen(&at.join("memory.data"));
    forge(&at, |manifest| {
        manifest.memory.regions.truncate(1);
        manifest.memory.regions[0].pages = pages;
        let layer = &mut manifest.memory.layer;
        (layer.bytes, layer.data_bytes) = (HUGE, HUGE);
        (layer.data_pages, layer.zero_pages) = if kind == PageContent::Zero { (0, pages) } else { (pages, 0) };
        layer.index_bytes = bytes.len() as u64;
        layer.index_checksum = checksum(&bytes[..bytes.len() - 8]);
    });
    at
}

#[test]
fn memory_of_any_size_costs_nothing_before_it_is_there() {
    let dir = scratch();
    let store = Store::open_small().unwrap();
    // Data pages without a chunk are refused.
    assert!(matches!(
        Snapshot::open(&vast(dir.path(), PageContent::Data), &ParentDirs::siblings()),
        Err(Error::Damaged { .. })
    ));
    let opened = Snapshot::open(&vast(dir.path(), PageContent::Zero), &ParentDirs::siblings());
    match opened {
        Err(error) => assert!(matches!(error, Error::Damaged { .. }), "{error:?}"),
        Ok(snapshot) => {
            for load in [Load::Lazy, Load::Preload, Load::WorkingSet(vec![PageRange::new(0, HUGE >> 12)])] {
                if let Ok(image) = snapshot.restore_ram(&store, &load) {
                    // Succeeds or fails with an error, depending on the host's memory.
                    let made = clade_memory::GuestRam::reserve(image.layout(), &store);
                    drop(made.and_then(|ram| ram.adopt(&image).map(drop)));
                }
            }
        }
    }
}

#[test]
fn a_sweep_touches_nothing_behind_links_nor_of_others() {
    let _alone = alone();
    let dir = scratch();
    let victim = small(dir.path(), "victim");
    let all = names(&victim);
    let stage = dir.path().join("stage");
    fs::create_dir(&stage).unwrap();
    let leftover = |n: u8| stage.join(format!(".it.clade-000000000000000{n}"));
    // A link with the name of a leftover.
    symlink(&victim, leftover(0)).unwrap();
    // A leftover with links in it.
    fs::create_dir(leftover(1)).unwrap();
    for name in ["manifest.json", "memory.data"] {
        symlink(victim.join(name), leftover(1).join(name)).unwrap();
    }
    // A leftover of another user, where possible.
    copy_dir(&victim, &leftover(2));
    let others = chown(leftover(2), Some(12345), Some(12345)).is_ok();
    // A valid leftover, and one that is a file.
    copy_dir(&victim, &leftover(3));
    fs::write(leftover(4), "a file").unwrap();
    small(&stage, "it");
    assert_eq!(names(&victim), all, "a save has removed what a link led to");
    verify(&victim, &ParentDirs::siblings()).unwrap();
    assert!(leftover(0).symlink_metadata().is_ok() && leftover(4).exists());
    assert!(!leftover(1).exists() && !leftover(3).exists(), "it sweeps");
    if others {
        assert_eq!(names(&leftover(2)), all, "another user's directory");
    } else {
        clade_test_support::skipped("another user's directory, which only root can make");
    }
    // A replaced snapshot is removed, but not the targets of links in it.
    fs::rename(stage.join("it/memory.data"), dir.path().join("kept")).unwrap();
    symlink(dir.path().join("kept"), stage.join("it/memory.data")).unwrap();
    small(&stage, "it");
    assert!(dir.path().join("kept").exists());
    read(&stage.join("it")).unwrap();
}

#[test]
fn a_sweep_leaves_a_snapshot_that_is_put_in_place_before_its_lock() {
    let dir = scratch();
    let place = small(dir.path(), "it");
    let all = names(&place);
    // As another process has it that is about to publish it.
    let aside = dir.path().join(".it.clade-0000000000000000");
    fs::rename(&place, &aside).unwrap();
    let (from, to) = (aside.clone(), place.clone());
    let plan = Arc::new(Plan::hooked(move |op, path| {
        if op == FileOp::Lock && path == from && !to.exists() {
            fs::rename(&from, &to)?;
        }
        Ok(())
    }));
    let files = FileOps { plan: Some(plan) };
    drop(StagingDir::create(&files, dir.path().join("other")).unwrap());
    assert!(!aside.exists() && names(&place) == all, "{:?}", names(&place));
    verify(&place, &ParentDirs::siblings()).unwrap();
}

#[test]
fn another_programs_manifest_is_not_replaced() {
    let dir = scratch();
    let place = dir.path().join("site");
    fs::create_dir(&place).unwrap();
    for text in [
        "{\"name\": \"a site\", \"icons\": []}",
        "",
        "{\"format\": \"web\", \"version\": {\"major\": 1, \"minor\": 0}}",
    ] {
        fs::write(place.join("manifest.json"), text).unwrap();
        let refused = expect_replaceable(&FileOps::default(), &place).unwrap_err().to_string();
        assert!(refused.contains("manifest.json of another format"), "{refused}");
    }
    // One of a later version, whose other files are gone.
    fs::write(
        place.join("manifest.json"),
        "{\"format\": \"clade-snapshot\", \"version\": {\"major\": 9, \"minor\": 0}}",
    )
    .unwrap();
    expect_replaceable(&FileOps::default(), &place).unwrap();
}

#[test]
fn a_record_of_what_is_touched_names_each_page_of_the_memory_once() {
    let dir = scratch();
    let at = small(dir.path(), "it");
    let id = Snapshot::open(&at, &ParentDirs::siblings()).unwrap().id();
    let pages = pages(&layout());
    let with = |runs: &[PageRange]| {
        fs::write(at.join("warm"), format::WorkingSet { id, runs: runs.to_vec() }.encode()).unwrap();
        Snapshot::open(&at, &ParentDirs::siblings()).unwrap().working_set()
    };
    let damaged = |runs: &[PageRange]| {
        let found = with(runs);
        assert!(matches!(&found, Err(Error::Damaged { path, .. }) if path.ends_with("warm")), "{found:?}");
        assert!(verify(&at, &ParentDirs::siblings()).is_err());
    };
    let whole = PageRange::new(0, pages);
    assert_eq!(with(&[whole]).unwrap(), Some(vec![whole]));
    damaged(&[PageRange::new(0, pages + 1)]);
    damaged(&[PageRange::new(1 << 47, (1 << 47) + 1)]);
    damaged(&[PageRange::new(5, 9), PageRange::new(0, 2), PageRange::new(8, 9)]);
    damaged(&vec![whole; 50]);
    // A file with more runs than pages is not even read.
    let plan = std::sync::Arc::new(super::faults::Plan::default());
    let files = crate::files::FileOps { plan: Some(plan.clone()) };
    let many = format::WorkingSet { id, runs: vec![PageRange::new(0, 1); 1 + pages as usize] };
    fs::write(at.join("warm"), many.encode()).unwrap();
    let snapshot = Snapshot::with(&files, &at, &ParentDirs::siblings()).unwrap();
    let steps = plan.trace().len();
    assert!(matches!(snapshot.working_set(), Err(Error::Damaged { damage: Damage::Length { .. }, .. })));
    assert!(plan.trace()[steps..].iter().all(|(op, _)| *op != crate::files::FileOp::Read));
    // A wrong count of runs, in a sealed file.
    let mut bytes = format::WorkingSet { id, runs: vec![whole] }.encode();
    bytes.truncate(bytes.len() - 8);
    bytes[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(at.join("warm"), format::with_checksum(bytes)).unwrap();
    assert!(matches!(snapshot.working_set(), Err(Error::Damaged { damage: Damage::Length { .. }, .. })));
    // Recorded runs are normalized.
    record(&at, &[PageRange::new(8, 10), PageRange::new(0, pages + 7), PageRange::new(9, 9)]).unwrap();
    let wanted = [(8, 10), (0, 8), (10, pages)].map(|(start, end)| PageRange::new(start, end));
    assert_eq!(snapshot.working_set().unwrap().as_deref(), Some(&wanted[..]));
    verify(&at, &ParentDirs::siblings()).unwrap();
}
