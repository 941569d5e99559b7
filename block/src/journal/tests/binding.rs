//! A journal beside the wrong image, in each way in which a user can cause it.

use super::*;
use crate::{DiskJournal, JournalState};

/// A bench with one cluster in the journal.
fn left() -> Bench {
    let bench = Bench::new();
    let mut disk = bench.forked();
    flush(&mut disk);
    assert_eq!(bench.mark().unwrap().len(), 32);
    bench
}

/// Copies as `cp -a` does.
fn copy_all(from: &Path, to: &Path) {
    if from.is_dir() {
        fs::create_dir(to).unwrap();
        fs::set_permissions(to, fs::metadata(from).unwrap().permissions()).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            copy_all(&entry.path(), &to.join(entry.file_name()));
        }
        return;
    }
    fs::copy(from, to).unwrap();
    let mut id = [0; 64];
    if let Ok(len) = rustix::fs::getxattr(from, image_binding::XATTR, &mut id) {
        rustix::fs::setxattr(to, image_binding::XATTR, &id[..len], rustix::fs::XattrFlags::empty()).unwrap();
    }
    set_mtime(to, from);
}

fn set_mtime(path: &Path, like: &Path) {
    let time = fs::metadata(like).unwrap().modified().unwrap();
    fs::OpenOptions::new().write(true).open(path).unwrap().set_modified(time).unwrap();
}

fn refused(path: &Path) -> DiskError {
    let before = fs::read(path).unwrap();
    let mut errors = [true, false].map(|read_only| {
        let config = DiskConfig { read_only, ..DiskConfig::new(path) };
        Disk::open(&config).map(drop).unwrap_err()
    });
    assert!(fs::read(path).unwrap() == before, "nothing was written");
    let [_, error] = &mut errors;
    std::mem::replace(error, DiskError::Lost { path: PathBuf::new() })
}

fn changed(error: &DiskError) -> &'static str {
    assert!(error.to_string().contains("clade disk discard"), "{error}");
    match error {
        DiskError::Journal { source: JournalError::Changed { what, .. }, .. } => what,
        other => panic!("{other}"),
    }
}

#[test]
fn an_image_that_was_copied_over_this_one_is_refused() {
    let bench = left();
    let golden = bench.path.with_file_name("golden.img");
    fs::write(&golden, vec![7; SIZE as usize]).unwrap();
    // The same file, with the same size and birth time, and other bytes.
    fs::copy(&golden, &bench.path).unwrap();
    assert_eq!(changed(&refused(&bench.path)), "mtime");
    set_mtime(&bench.path, &golden);
    assert!(matches!(changed(&refused(&bench.path)), "mtime" | "ctime"));
    let shown = DiskJournal::show(&bench.path).unwrap();
    assert!(matches!(&shown.state, JournalState::Refused(error) if !changed(error).is_empty()), "{shown:?}");
    assert_eq!((shown.data, shown.zeros, shown.overlays), (4096, 0, 1));
    assert!(shown.room >= 4096 && shown.id.is_some() && shown.journal == bench.journal, "{shown:?}");
    // The user's intention: the new image.
    assert!(DiskJournal::discard(&bench.path).unwrap());
    drop(bench.open());
    assert!(bench.image() == vec![7; SIZE as usize] && !bench.journal.exists() && bench.mark().is_none());
    assert!(!DiskJournal::discard(&bench.path).unwrap());
}

#[test]
fn a_new_image_of_the_same_name_is_refused_and_can_be_given_the_journal() {
    let bench = left();
    fs::remove_file(&bench.path).unwrap();
    fs::write(&bench.path, vec![7; SIZE as usize]).unwrap();
    let error = refused(&bench.path);
    let DiskError::Journal { source: JournalError::Other { id: Some(_), found: None, .. }, path } = &error else {
        panic!("{error}")
    };
    assert_eq!(*path, bench.journal.join("journal"));
    let report = DiskJournal::apply(&bench.path).unwrap();
    assert_eq!((report.copied, report.zeroed), (4096, 0));
    assert!(bench.image()[..4097] == [vec![2; 4096], vec![7]].concat() && !bench.journal.exists());
    drop(bench.open());
    assert!(DiskJournal::apply(&bench.path).unwrap_err().to_string().starts_with(bench.journal.to_str().unwrap()));
}

#[test]
fn an_image_of_another_size_is_never_given_the_journal() {
    let bench = left();
    fs::OpenOptions::new().write(true).open(&bench.path).unwrap().set_len(SIZE + SECTOR).unwrap();
    for error in [refused(&bench.path), DiskJournal::apply(&bench.path).unwrap_err()] {
        let source = match &error {
            DiskError::Journal { source, .. } => source,
            other => panic!("{other}"),
        };
        assert!(
            matches!(source, JournalError::Other { size: SIZE, found_size, .. } if *found_size == SIZE + SECTOR),
            "{source}"
        );
    }
}

/// An fsck or a mount: a change in place, by a program that does not use our locks.
#[test]
fn an_image_that_something_else_has_written_is_refused_also_while_the_vm_runs() {
    let poke = |bench: &Bench| {
        let image = fs::OpenOptions::new().write(true).open(&bench.path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&image, &[8; 512], 4096).unwrap();
    };
    let bench = left();
    poke(&bench);
    assert_eq!(changed(&refused(&bench.path)), "mtime");
    DiskJournal::apply(&bench.path).unwrap();
    assert!(bench.image()[..4097] == [vec![2; 4096], vec![8]].concat());

    let bench = Bench::new();
    let mut disk = bench.forked();
    flush(&mut disk);
    poke(&bench);
    write(&mut disk, 8192, &[3; 512]);
    flush(&mut disk);
    let (disk, error) = *disk.commit().unwrap_err();
    assert!(matches!(&error, CommitError::Changed { kept: Some(kept), .. } if *kept == bench.journal), "{error}");
    drop(disk);
    assert_eq!(changed(&refused(&bench.path)), "mtime");
}

#[test]
fn an_image_that_was_renamed_is_refused_until_its_journal_is_too() {
    let bench = left();
    let other = bench.path.with_file_name("other.img");
    fs::rename(&bench.path, &other).unwrap();
    let error = refused(&other);
    let text = error.to_string();
    let DiskError::JournalMissing { image, journal, found, .. } = error else { panic!("{error}") };
    let named = (other.clone(), bench.path.with_file_name("other.img.clade-journal"), Some(bench.journal.clone()));
    assert_eq!((image, journal, found), named);
    assert!(text.contains("clade disk discard"), "{text}");
    assert!(matches!(DiskJournal::show(&other).unwrap().state, JournalState::Missing));
    fs::rename(&bench.journal, bench.path.with_file_name("other.img.clade-journal")).unwrap();
    assert_eq!(changed(&refused(&other)), "ctime");
    DiskJournal::apply(&other).unwrap();
    assert!(fs::read(&other).unwrap()[..4097] == [vec![2; 4096], vec![1]].concat());
    drop(Disk::open(&DiskConfig::new(&other)).unwrap());

    // Alternatively the journal is discarded.
    let bench = left();
    let other = bench.path.with_file_name("other.img");
    fs::rename(&bench.path, &other).unwrap();
    fs::remove_dir_all(&bench.journal).unwrap();
    assert!(matches!(refused(&other), DiskError::JournalMissing { found: None, .. }));
    assert!(DiskJournal::discard(&other).unwrap());
    drop(Disk::open(&DiskConfig::new(&other)).unwrap());
    assert!(fs::read(&other).unwrap() == vec![1; SIZE as usize]);
}

#[test]
fn a_second_name_is_refused_by_both() {
    let bench = left();
    let link = bench.path.with_file_name("link.img");
    fs::hard_link(&bench.path, &link).unwrap();
    let DiskError::JournalMissing { found: Some(found), .. } = refused(&link) else { panic!() };
    assert_eq!(found, bench.journal);
    assert_eq!(changed(&refused(&bench.path)), "ctime");
    DiskJournal::apply(&bench.path).unwrap();
    drop(Disk::open(&DiskConfig::new(&link)).unwrap());
    assert!(fs::read(&link).unwrap()[..4096] == [2; 4096]);
}

#[test]
fn a_copy_of_image_and_journal_is_refused_with_a_way_out() {
    let bench = left();
    let dir = bench.path.with_file_name("copy");
    fs::create_dir(&dir).unwrap();
    let copy = dir.join("disk.img");
    copy_all(&bench.path, &copy);
    copy_all(&bench.journal, &dir.join("disk.img.clade-journal"));
    assert_eq!(changed(&refused(&copy)), "ctime");
    DiskJournal::apply(&copy).unwrap();
    drop(Disk::open(&DiskConfig::new(&copy)).unwrap());
    assert!(fs::read(&copy).unwrap()[..4096] == [2; 4096]);
    // The first image is unchanged.
    drop(bench.open());
    assert!(bench.image()[..4096] == [2; 4096]);
}

/// A write to the image that was begun before the fork ends long after a flush was submitted. It
/// changes the image's times.
#[test]
fn a_flush_waits_for_writes_to_the_image() {
    let bench = Bench::new();
    let mut disk = bench.open();
    write(&mut disk, 0, &[4; 4096]);
    disk.requests.engine_mut().unwrap().set_latency(Some(Duration::from_millis(500)));
    begin_write(&mut disk, 8 * CLUSTER, &[5; 4096], 7);
    disk.requests.engine_mut().unwrap().set_latency(None);
    drop(disk.fork());
    begin_write(&mut disk, 0, &[2; 4096], 8);
    disk.submit(DiskOp::Flush, 9).unwrap();
    let mut order = Vec::new();
    disk.kick().unwrap();
    while disk.in_flight() > 0 {
        disk.wait(SOON).unwrap();
        order.extend(disk.reap().unwrap().into_iter().map(|done| (done.token, done.result.is_ok())));
    }
    order.retain(|(token, _)| *token != 8);
    assert_eq!(order, [(7, true), (9, true)]);
    drop(disk);
    drop(bench.open());
    assert_eq!((bench.image()[0], bench.image()[8 * 4096]), (2, 5));
}

/// A VM whose directory is renamed continues there.
#[test]
fn a_directory_that_is_renamed_is_the_same_one() {
    let bench = Bench::new();
    let dir = bench.path.parent().unwrap().join("vm");
    fs::create_dir(&dir).unwrap();
    let path = dir.join("disk.img");
    fs::rename(&bench.path, &path).unwrap();
    let mut disk = Disk::open(&DiskConfig::new(&path)).unwrap();
    drop(disk.fork());
    write(&mut disk, 0, &[2; 4096]);
    flush(&mut disk);
    let moved = dir.with_file_name("moved");
    fs::rename(&dir, &moved).unwrap();
    drop(disk.fork());
    write(&mut disk, 4096, &[3; 4096]);
    flush(&mut disk);
    disk.durability.journal_mut().unwrap().replaced();
    write(&mut disk, 8192, &[4; 4096]);
    flush(&mut disk);
    drop(disk);
    let path = moved.join("disk.img");
    drop(Disk::open(&DiskConfig::new(&path)).unwrap());
    assert!(fs::read(&path).unwrap()[..12288] == [[2; 4096], [3; 4096], [4; 4096]].concat());
    let left: Vec<_> = fs::read_dir(&moved).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}
