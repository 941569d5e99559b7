use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::disk::compact::Moves;
use crate::disk::testutil::{SOON, begin_write, finish, read, run, whole, write};
use crate::disk::{CommitError, CommitReport, Disk, DiskConfig, DiskOp, SECTOR};

const GRANULES: u64 = 40;
/// Not whole granules.
const SIZE: u64 = GRANULES * GRANULE - 3 * SECTOR;

struct Bench {
    _dir: tempfile::TempDir,
    path: PathBuf,
    journal: PathBuf,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        fs::write(&path, vec![1; SIZE as usize]).unwrap();
        let journal = dir.path().join("disk.img.clade-journal");
        Self { _dir: dir, path, journal }
    }

    fn open(&self) -> Disk {
        Disk::open(&DiskConfig::new(&self.path)).unwrap()
    }

    fn image(&self) -> Vec<u8> {
        fs::read(&self.path).unwrap()
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(&self.journal)
            .map(|entries| entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect())
            .unwrap_or_default();
        names.sort_unstable();
        names
    }
}

fn flush(disk: &mut Disk) {
    disk.flush_now().unwrap();
}

#[test]
fn what_was_flushed_after_a_fork_is_there_when_the_process_is_not() {
    let bench = Bench::new();
    let mut disk = bench.open();
    flush(&mut disk);
    let image = disk.fork();
    flush(&mut disk);
    assert!(!bench.journal.exists(), "nothing has been written");
    write(&mut disk, 0, &[2; 8192]);
    disk.submit(DiskOp::Zero { offset: 3 * GRANULE, len: GRANULE, unmap: true }, 1).unwrap();
    finish(&mut disk);
    flush(&mut disk);
    assert_eq!(bench.names(), ["journal", "overlay.0"]);
    // In place, in the last granule, and after another fork.
    write(&mut disk, 4096, &[3; 512]);
    write(&mut disk, SIZE - 512, &[4; 512]);
    drop(disk.fork());
    write(&mut disk, 5 * GRANULE, &[5; 4096]);
    flush(&mut disk);
    assert_eq!(bench.names(), ["journal", "overlay.0", "overlay.1"]);
    // Not flushed, and moved: it may be lost.
    write(&mut disk, 6 * GRANULE, &[6; 4096]);
    assert!(bench.image() == vec![1; SIZE as usize] && whole(&image) == vec![1; SIZE as usize]);
    drop((disk, image));

    let mut model = vec![1; SIZE as usize];
    model[..8192].fill(2);
    model[4096..4608].fill(3);
    model[3 * 4096..4 * 4096].fill(0);
    model[SIZE as usize - 512..].fill(4);
    model[5 * 4096..6 * 4096].fill(5);
    let config = DiskConfig { read_only: true, ..DiskConfig::new(&bench.path) };
    let mut reader = Disk::open(&config).unwrap();
    assert!(read(&mut reader, 0, SIZE as usize) == model, "a reader is shown it");
    assert!(bench.image() == vec![1; SIZE as usize], "and changes nothing");
    drop(reader);
    let mut disk = bench.open();
    assert!(bench.image() == model && read(&mut disk, 0, SIZE as usize) == model);
    assert!(!bench.journal.exists(), "it has been used up");
}

#[test]
fn a_commit_that_did_not_come_to_its_end_is_finished_by_the_next_to_open_the_image() {
    let bench = Bench::new();
    let mut disk = bench.open();
    drop(disk.fork());
    write(&mut disk, 0, &[2; 5 * 4096]);
    assert!(disk.keep());
    // It got as far as this: one granule is there, one is there in part.
    let image = fs::OpenOptions::new().write(true).open(&bench.path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&image, &[2; 4096 + 700], 2 * 4096).unwrap();
    drop(disk);
    let mut model = vec![1; SIZE as usize];
    model[..5 * 4096].fill(2);
    // Nor does the next: what is in the way is not there any more the third time.
    let away = bench.journal.join("overlay.0");
    fs::rename(&away, bench.path.with_extension("away")).unwrap();
    let refused = Disk::open(&DiskConfig::new(&bench.path)).unwrap_err().to_string();
    assert!(refused.starts_with(&away.display().to_string()), "{refused}");
    fs::rename(bench.path.with_extension("away"), &away).unwrap();
    let disk = bench.open();
    assert!(bench.image() == model && !bench.journal.exists());
    drop(disk);

    let mut disk = bench.open();
    drop(disk.fork());
    write(&mut disk, 0, &[3; 4096]);
    let report = disk.commit().map_err(|refused| refused.1).unwrap();
    assert_eq!(report, CommitReport { copied: 4096, zeroed: 0, journaled: true });
    model[..4096].fill(3);
    assert!(bench.image() == model && !bench.journal.exists());
}

#[test]
fn what_cannot_be_committed_is_kept() {
    let bench = Bench::new();
    let mut disk = bench.open();
    let image = disk.fork();
    write(&mut disk, 0, &[2; 4096]);
    let (disk, refused) = *disk.commit().unwrap_err();
    let CommitError::Shared { others: 1, kept: Some(kept), .. } = &refused else { panic!("{refused}") };
    assert_eq!(*kept, bench.journal);
    assert!(refused.to_string().contains("is put in when the image is opened next"), "{refused}");
    drop(disk);
    // The child is alone now, but not the one the image belongs to.
    let mut child = image.open().unwrap();
    drop(image);
    write(&mut child, 0, &[3; 4096]);
    let (child, refused) = *child.commit().unwrap_err();
    assert!(matches!(&refused, CommitError::Left { dir, .. } if *dir == bench.journal), "{refused}");
    drop(child);
    drop(bench.open());
    assert!(bench.image()[..4097] == [vec![2; 4096], vec![1]].concat());
}

#[test]
fn a_journal_that_is_damaged_or_anothers_is_refused_and_nothing_is_lost() {
    let bench = Bench::new();
    let mut disk = bench.open();
    drop(disk.fork());
    write(&mut disk, 0, &[2; 4096]);
    flush(&mut disk);
    drop(disk);
    let journal = bench.journal.join("journal");
    let good = fs::read(&journal).unwrap();
    let mut bad = good.clone();
    bad[40] ^= 1;
    let refused = || {
        let error = Disk::open(&DiskConfig::new(&bench.path)).unwrap_err();
        assert_eq!(bench.names(), ["journal", "overlay.0"]);
        match error {
            DiskError::Journal { path, source } if path == journal => source,
            other => panic!("{other}"),
        }
    };
    fs::write(&journal, &bad).unwrap();
    assert_eq!(refused(), JournalError::Damaged);
    fs::write(&journal, &good).unwrap();
    let was = fs::metadata(&bench.path).unwrap();
    let inode = std::os::unix::fs::MetadataExt::ino(&was);
    fs::OpenOptions::new().write(true).open(&bench.path).unwrap().set_len(SIZE + SECTOR).unwrap();
    assert_eq!(refused(), JournalError::Other { size: SIZE, inode });
    fs::OpenOptions::new().write(true).open(&bench.path).unwrap().set_len(SIZE).unwrap();
    // The same bytes in another file.
    let copy = bench.path.with_extension("copy");
    fs::copy(&bench.path, &copy).unwrap();
    let kept = bench.path.with_extension("kept");
    fs::rename(&bench.path, &kept).unwrap();
    fs::rename(&copy, &bench.path).unwrap();
    assert_eq!(refused(), JournalError::Other { size: SIZE, inode });
    fs::rename(&kept, &bench.path).unwrap();
    // Somebody else could have put it there.
    let mode = |mode| fs::set_permissions(&bench.journal, fs::Permissions::from_mode(mode)).unwrap();
    mode(0o777);
    assert_eq!(refused(), JournalError::NotOurs);
    mode(0o700);
    // Another VM has taken the name.
    let other = File::open(&bench.journal).unwrap();
    other.lock().unwrap();
    let error = Disk::open(&DiskConfig::new(&bench.path)).unwrap_err().to_string();
    assert!(error.starts_with(bench.journal.to_str().unwrap()), "{error}");
    drop(other);
    drop(bench.open());
    assert!(bench.image()[..4096] == [2; 4096]);
}

#[test]
fn a_new_image_of_the_same_name_and_number_is_another_image() {
    let bench = Bench::new();
    let mut disk = bench.open();
    drop(disk.fork());
    write(&mut disk, 0, &[2; 4096]);
    flush(&mut disk);
    let before = disk.journal.as_ref().unwrap().image;
    drop(disk);
    if before.born == 0 {
        println!("skipped: the file system does not say when a file was made");
        return;
    }
    fs::remove_file(&bench.path).unwrap();
    fs::write(&bench.path, vec![7; SIZE as usize]).unwrap();
    let refused = Disk::open(&DiskConfig::new(&bench.path)).unwrap_err();
    let source = JournalError::Other { size: SIZE, inode: before.inode };
    assert!(matches!(&refused, DiskError::Journal { source: found, .. } if *found == source), "{refused}");
    assert!(bench.image() == vec![7; SIZE as usize]);
}

#[test]
fn names_without_a_journal_are_nothing_and_a_link_leads_to_the_same_one() {
    let bench = Bench::new();
    fs::create_dir(&bench.journal).unwrap();
    fs::write(bench.journal.join("overlay.7"), [9; 4096]).unwrap();
    fs::write(bench.journal.join("journal.next"), [9; 100]).unwrap();
    let link = bench.path.with_extension("link");
    std::os::unix::fs::symlink(&bench.path, &link).unwrap();
    let mut disk = Disk::open(&DiskConfig::new(&link)).unwrap();
    assert!(!bench.journal.exists() && bench.image() == vec![1; SIZE as usize]);
    drop(disk.fork());
    write(&mut disk, 0, &[2; 4096]);
    flush(&mut disk);
    assert_eq!(bench.names(), ["journal", "overlay.0"]);
    drop(disk);
    drop(bench.open());
    assert!(bench.image()[..4096] == [2; 4096]);
}

/// A directory that must not be written is no reason to fail a flush, unless something is there already.
#[test]
fn what_cannot_be_is_told_from_what_failed() {
    let bench = Bench::new();
    let mut disk = bench.open();
    drop(disk.fork());
    let error = |errno| FileError { path: PathBuf::new(), what: "made", source: io::Error::from_raw_os_error(errno) };
    let journal = disk.journal.as_ref().unwrap();
    for errno in [libc::EACCES, libc::EROFS, libc::EPERM, libc::EXDEV, libc::EOPNOTSUPP] {
        assert!(journal.is_impossible(&error(errno)), "{errno}");
    }
    assert!(!journal.is_impossible(&error(libc::ENOSPC)) && !journal.is_impossible(&error(libc::EIO)));
    write(&mut disk, 0, &[2; 4096]);
    flush(&mut disk);
    assert!(!disk.journal.as_ref().unwrap().is_impossible(&error(libc::EACCES)), "what is there needs a flush");
}

/// Overlays on another file system cannot be given names beside the image.
#[test]
fn without_a_journal_a_flush_and_a_commit_are_what_they_can_be() {
    let bench = Bench::new();
    let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
    let config = DiskConfig { overlays: Some(elsewhere.path().to_owned()), ..DiskConfig::new(&bench.path) };
    if device(elsewhere.path()).unwrap() == device(&bench.path).unwrap() {
        println!("skipped: /dev/shm is the file system of the temporary directory");
        return;
    }
    let mut disk = Disk::open(&config).unwrap();
    let image = disk.fork();
    write(&mut disk, 0, &[2; 4096]);
    flush(&mut disk);
    let (disk, refused) = *disk.commit().unwrap_err();
    assert!(matches!(refused, CommitError::Shared { others: 1, kept: None, .. }), "{refused}");
    drop(image);
    let report = disk.commit().map_err(|refused| refused.1).unwrap();
    assert_eq!(report, CommitReport { copied: 4096, zeroed: 0, journaled: false });
    assert!(!bench.journal.exists() && bench.image()[..4096] == [2; 4096]);
}

#[test]
fn the_journal_and_its_overlays_stay_few() {
    let bench = Bench::new();
    let mut disk = bench.open();
    let mut model = vec![1; SIZE as usize];
    let mut most = (0, 0);
    for round in 0..200u64 {
        drop(disk.fork());
        let at = (round * 7 % 20) as usize * 4096;
        write(&mut disk, at as u64, &[round as u8; 4096]);
        model[at..at + 4096].fill(round as u8);
        flush(&mut disk);
        let journal = fs::metadata(bench.journal.join("journal")).unwrap().len();
        most = (most.0.max(bench.names().len()), most.1.max(journal));
    }
    // One for each granule, and those that only the journal names.
    assert!(most.0 > STALE && most.0 <= 1 + 20 + STALE + 2, "{most:?}");
    assert!(most.1 < 16 << 10, "{most:?}");
    drop(disk);
    drop(bench.open());
    assert!(bench.image() == model);
}

/// What the kernel would do of it, and what it was.
fn carry_out(request: &Request) -> String {
    let name = |file: &IoFile| file.path().file_name().unwrap().to_str().unwrap().to_owned();
    match request {
        Request::Sync { file, all } => {
            file.sync_now().unwrap();
            format!("sync {}{}", name(file), if *all { ", all" } else { "" })
        }
        Request::Write { file, offset, buffers } => {
            let mut bytes = vec![0; buffers[0].len()];
            buffers[0].slice().copy_to(&mut bytes);
            file.write_now(&bytes, *offset).unwrap();
            format!("write {} at {offset}", name(file))
        }
        other => panic!("{other:?}"),
    }
}

/// Stopped after any step, and opened again.
#[test]
fn a_flush_is_in_order_and_one_step() {
    for stop in 0..7 {
        let bench = Bench::new();
        let beside = bench.path.parent().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
        let mut disk = bench.open();
        drop(disk.fork());
        write(&mut disk, 0, &[2; 4096]);
        let run = |disk: &mut Disk, most: usize| {
            let (map, mut done) = (disk.map.clone(), Vec::new());
            let journal = disk.journal.as_mut().unwrap();
            let first = journal.begin(&map).unwrap();
            done.extend(first.iter().map(carry_out));
            for _ in 0..most {
                match journal.next().unwrap() {
                    Some(request) => done.push(carry_out(&request)),
                    None => return (done, true),
                }
            }
            (done, false)
        };
        // The first journal, and one that is appended to.
        let (done, durable) = run(&mut disk, stop);
        let all = [
            &format!("sync {beside}, all"),
            "sync disk.img.clade-journal, all",
            // The overlay: it is known by the directory it was made in.
            &format!("sync {beside}"),
            "write journal.next at 0",
            "sync journal.next",
            "sync disk.img.clade-journal, all",
        ];
        assert_eq!(done, all[..(3 + stop).min(6)], "{stop}");
        assert_eq!(durable, stop > 3);
        if durable {
            drop(disk.fork());
            write(&mut disk, 4096, &[3; 4096]);
            let (done, _) = run(&mut disk, stop - 4);
            let all = [
                "sync disk.img.clade-journal, all",
                &format!("sync {beside}"),
                "write journal.next at 88",
                "sync journal.next",
            ];
            assert_eq!(done, all[..(2 + stop - 4).min(4)]);
        }
        drop(disk);
        drop(bench.open());
        let first = if stop >= 3 { 2 } else { 1 };
        let second = if stop >= 5 { 3 } else { 1 };
        assert_eq!((bench.image()[0], bench.image()[4096]), (first, second), "{stop}");
    }
}

#[test]
fn a_flush_that_failed_is_done_again_from_the_beginning() {
    let bench = Bench::new();
    let mut disk = bench.open();
    drop(disk.fork());
    write(&mut disk, 0, &[2; 4096]);
    let map = disk.map.clone();
    let journal = disk.journal.as_mut().unwrap();
    let told = |requests: Vec<Request>| requests.iter().map(carry_out).collect::<Vec<_>>();
    let first = told(journal.begin(&map).unwrap());
    assert_eq!(first.len(), 3);
    journal.give_up(false);
    assert_eq!(told(journal.begin(&map).unwrap()), first, "with the names, which are there");
    while let Some(request) = journal.next().unwrap() {
        carry_out(&request);
    }
    assert!(told(journal.begin(&map).unwrap()).is_empty() && journal.next().unwrap().is_none());
    assert_eq!(bench.names(), ["journal", "overlay.0"]);
    // What the system has lost it does not say twice.
    let _ = journal.begin(&map).unwrap();
    journal.give_up(true);
    let refused = journal.begin(&map).unwrap_err().to_string();
    assert!(refused.contains("a write to an overlay was lost"), "{refused}");
}

/// Of a journal that has its name, durably or not, the next flush has to say that it is over.
#[test]
fn a_journal_that_may_be_there_is_replaced_even_by_nothing() {
    let bench = Bench::new();
    let mut disk = bench.open();
    let image = disk.fork();
    write(&mut disk, 0, &[2; 4096]);
    let map = disk.map.clone();
    let journal = disk.journal.as_mut().unwrap();
    journal.begin(&map).unwrap().iter().for_each(|request| drop(carry_out(request)));
    while bench.names().binary_search(&JOURNAL.to_owned()).is_err() {
        journal.next().unwrap().iter().for_each(|request| drop(carry_out(request)));
    }
    journal.give_up(false);
    assert_eq!(journal.kept_in(), Some(bench.journal.as_path()));
    assert!(disk.rewind(&image));
    flush(&mut disk);
    drop((disk, image, map));
    drop(bench.open());
    assert!(bench.image() == vec![1; SIZE as usize], "it was put back");
}

/// The first has taken what there is to be synced; the second must not be done before it.
#[test]
fn a_flush_waits_for_the_one_before_it() {
    let bench = Bench::new();
    let latency = Some(Duration::from_millis(50));
    let mut disk = Disk::open(&DiskConfig { latency, ..DiskConfig::new(&bench.path) }).unwrap();
    write(&mut disk, 0, &[2; 4096]);
    disk.submit(DiskOp::Flush, 1).unwrap();
    drop(disk.fork());
    disk.submit(DiskOp::Flush, 2).unwrap();
    disk.kick().unwrap();
    assert!(disk.take_done().is_empty(), "neither is done");
    let mut order = Vec::new();
    while disk.in_flight() > 0 {
        disk.wait(SOON).unwrap();
        order.extend(disk.reap().unwrap().iter().map(|done| done.token));
    }
    assert_eq!(order, [1, 2]);
}

#[derive(Clone, Debug)]
enum Act {
    Write {
        sector: u64,
        sectors: u64,
        byte: u8,
    },
    Zero {
        granule: u64,
        granules: u64,
    },
    Fork,
    Rewind,
    /// With writes begun after it, and cancelled in the middle or not; or two of them.
    Flush {
        cancelled: bool,
        twice: bool,
    },
    /// The process ends, and another one opens the image.
    Crash,
    Commit,
}

fn act() -> impl Strategy<Value = Act> {
    let sectors = run(SIZE / SECTOR, 40);
    let granules = run(GRANULES, 10);
    prop_oneof![
        12 => (sectors, any::<u8>()).prop_map(|((sector, sectors), byte)| Act::Write { sector, sectors, byte }),
        2 => granules.prop_map(|(granule, granules)| Act::Zero { granule, granules }),
        6 => Just(Act::Fork),
        1 => Just(Act::Rewind),
        5 => (prop::bool::weighted(0.3), any::<bool>())
            .prop_map(|(cancelled, twice)| Act::Flush { cancelled, twice }),
        1 => Just(Act::Crash),
        1 => Just(Act::Commit),
    ]
}

/// Sectors as they are, as they were at the last flush that succeeded, and what they have been since.
struct Model {
    now: Vec<u8>,
    durable: Vec<u8>,
    since: Vec<BTreeSet<u8>>,
}

impl Model {
    fn new() -> Self {
        let sectors = (SIZE / SECTOR) as usize;
        Self { now: vec![1; sectors], durable: vec![1; sectors], since: vec![BTreeSet::new(); sectors] }
    }

    fn set(&mut self, sectors: Range<u64>, byte: u8) {
        for sector in sectors {
            self.now[sector as usize] = byte;
            self.since[sector as usize].insert(byte);
        }
    }

    /// All of it, as it was `then`.
    fn flushed(&mut self, then: Vec<u8>) {
        self.durable = then;
        self.since.iter_mut().for_each(BTreeSet::clear);
    }
}

/// A byte for each sector; a sector is all of one.
fn sectors_of(bytes: &[u8]) -> Vec<u8> {
    let sectors = bytes.chunks(SECTOR as usize);
    sectors
        .inspect(|sector| assert!(sector.iter().all(|byte| *byte == sector[0]), "torn"))
        .map(|sector| sector[0])
        .collect()
}

/// Lets requests end, and says whether all went well; what is moved goes on.
fn all_well(disk: &mut Disk) -> bool {
    let mut well = true;
    disk.kick().unwrap();
    loop {
        for done in disk.take_done().into_iter().chain(disk.reap().unwrap()) {
            well &= done.result.is_ok();
        }
        if disk.parts.is_empty() {
            return well;
        }
        disk.wait(SOON).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    /// Each sector is what it was at the last flush that succeeded, or what was written to it since, whenever the process ends.
    #[test]
    fn what_was_flushed_survives(acts in prop::collection::vec(act(), 1..70), late in any::<bool>()) {
        let bench = Bench::new();
        let latency = late.then_some(Duration::from_micros(300));
        let open = || {
            let mut disk = Disk::open(&DiskConfig { latency, ..DiskConfig::new(&bench.path) }).unwrap();
            disk.moves = Moves::at_most(3, 1);
            disk
        };
        let (mut disk, mut model, mut last) = (open(), Model::new(), None);
        for (token, act) in (2u64..).zip(acts) {
            match act {
                Act::Write { sector, sectors, byte } => {
                    begin_write(&mut disk, sector * SECTOR, &vec![byte; (sectors * SECTOR) as usize], token);
                    all_well(&mut disk);
                    model.set(sector..sector + sectors, byte);
                }
                Act::Zero { granule, granules } => {
                    let (offset, end) = (granule * GRANULE, ((granule + granules) * GRANULE).min(SIZE));
                    disk.submit(DiskOp::Zero { offset, len: end - offset, unmap: true }, token).unwrap();
                    all_well(&mut disk);
                    model.set(offset / SECTOR..end / SECTOR, 0);
                }
                Act::Fork => last = Some((disk.fork(), model.now.clone())),
                Act::Rewind => {
                    let Some((image, then)) = &last else { continue };
                    disk.settle_moves();
                    prop_assert!(disk.rewind(image));
                    for (sector, byte) in then.iter().enumerate() {
                        if model.now[sector] != *byte {
                            model.set(sector as u64..sector as u64 + 1, *byte);
                        }
                    }
                }
                Act::Flush { cancelled, twice } => {
                    let then = model.now.clone();
                    disk.submit(DiskOp::Flush, token).unwrap();
                    if twice {
                        disk.submit(DiskOp::Flush, 1).unwrap();
                    }
                    disk.kick().unwrap();
                    if cancelled {
                        disk.cancel();
                        if all_well(&mut disk) {
                            model.flushed(then);
                        }
                        continue;
                    }
                    // Beside it.
                    let (sector, byte) = (token * 13 % (SIZE / SECTOR), token as u8 | 0x80);
                    begin_write(&mut disk, sector * SECTOR, &[byte; SECTOR as usize], u64::MAX - token);
                    prop_assert!(all_well(&mut disk), "a flush that nobody cancels succeeds");
                    model.flushed(then);
                    model.set(sector..sector + 1, byte);
                }
                Act::Crash => {
                    last = None;
                    drop(disk);
                    disk = open();
                    let found = sectors_of(&read(&mut disk, 0, SIZE as usize));
                    for (sector, byte) in found.iter().enumerate() {
                        let may = *byte == model.durable[sector] || model.since[sector].contains(byte);
                        let (was, since) = (model.durable[sector], &model.since[sector]);
                        prop_assert!(may, "sector {sector} is {byte}, was {was} when it was flushed, and since {since:?}");
                    }
                    model.now.clone_from(&found);
                    model.flushed(found);
                }
                Act::Commit => {
                    last = None;
                    let committed = disk.commit();
                    prop_assert!(committed.is_ok(), "{:?}", committed.map_err(|refused| refused.1));
                    prop_assert_eq!(&sectors_of(&bench.image()), &model.now);
                    prop_assert!(!bench.journal.exists());
                    model.flushed(model.now.clone());
                    disk = open();
                }
            }
        }
        finish(&mut disk);
        prop_assert_eq!(&sectors_of(&read(&mut disk, 0, SIZE as usize)), &model.now);
    }
}
