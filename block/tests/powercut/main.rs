//! Power cuts: a file system on a device that records all writes and flushes, cut anywhere, with
//! any part of the unflushed writes lost.
//!
//! A disk on that file system is written, flushed, forked, committed and opened again. After a cut
//! it must open. Each sector must have its content at the last flush that succeeded before the cut,
//! or a content written since. Opening the disk applies its journal, and that is cut too.
//!
//! On ext4 there is a journal beside the image, on Btrfs and XFS a new image.
//!
//! Without root, FUSE or loop devices it prints `skipped: REASON`, unless the environment's
//! CLADE_REQUIRE names `mount`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod device;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use clade_block::{Disk, DiskConfig, DiskImage, DiskOp, SECTOR};
use clade_host_io::{AlignedBuf, Fragment};
use clade_test_support::Random;

use device::{BTRFS, EXT4, Event, Kind, Mounted, Recorder, XFS, cut};

const CLUSTER: u64 = 4096;
const SIZE: u64 = 128 * CLUSTER;
const SECTORS: u64 = SIZE / SECTOR;

/// The time from a flush on: the durable content of each sector, and its contents since.
struct Epoch {
    position: usize,
    durable: Vec<u8>,
    since: Vec<BTreeSet<u8>>,
}

struct Machine<'r> {
    recorder: &'r Recorder,
    disk: Disk,
    now: Vec<u8>,
    epochs: Vec<Epoch>,
    kept: Option<DiskImage>,
    token: u64,
}

fn open(dir: &Path) -> Disk {
    let path = dir.join("disk.img");
    Disk::open(&DiskConfig::new(&path)).unwrap_or_else(|error| {
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(error) = source {
            text = format!("{text}: {error}");
            source = error.source();
        }
        panic!("an image is refused after a power cut: {text}")
    })
}

impl<'r> Machine<'r> {
    fn new(recorder: &'r Recorder, dir: &Path) -> Self {
        let image = fs::File::create(dir.join("disk.img")).unwrap();
        image.write_all_at(&vec![1; SIZE as usize], 0).unwrap();
        image.sync_all().unwrap();
        fs::File::open(dir).unwrap().sync_all().unwrap();
        let now = vec![1; SECTORS as usize];
        let mut machine = Self { recorder, disk: open(dir), now, epochs: Vec::new(), kept: None, token: 0 };
        machine.durable();
        machine
    }

    /// The present content is durable.
    fn durable(&mut self) {
        let position = self.recorder.position();
        let since = vec![BTreeSet::new(); SECTORS as usize];
        self.epochs.push(Epoch { position, durable: self.now.clone(), since });
    }

    fn do_it(&mut self, op: DiskOp) {
        self.token += 1;
        self.disk.submit(op, self.token).unwrap();
        self.disk.kick().unwrap();
        loop {
            for done in self.disk.take_done().into_iter().chain(self.disk.reap().unwrap()) {
                done.result.unwrap();
                if done.token == self.token {
                    return;
                }
            }
            self.disk.wait(Duration::from_secs(10)).unwrap();
        }
    }

    fn set(&mut self, sector: u64, sectors: u64, byte: u8) {
        let epoch = self.epochs.last_mut().unwrap();
        for sector in sector..sector + sectors {
            self.now[sector as usize] = byte;
            epoch.since[sector as usize].insert(byte);
        }
    }

    fn write(&mut self, random: &mut Random) {
        let sector = random.below(SECTORS);
        let sectors = (1 + random.below(60)).min(SECTORS - sector);
        let byte = random.below(256) as u8;
        let bytes = Arc::new(AlignedBuf::new((sectors * SECTOR) as usize));
        let buffer = Fragment::owned(&bytes, 0, bytes.len()).unwrap();
        buffer.slice().copy_from(&vec![byte; bytes.len()]);
        // Recorded first: the write may take effect from its start.
        self.set(sector, sectors, byte);
        self.do_it(DiskOp::Write { offset: sector * SECTOR, buffers: vec![buffer] });
    }

    fn zero(&mut self, random: &mut Random) {
        let sector = random.below(SECTORS);
        let sectors = (1 + random.below(60)).min(SECTORS - sector);
        self.set(sector, sectors, 0);
        self.do_it(DiskOp::Zero { offset: sector * SECTOR, len: sectors * SECTOR, unmap: random.below(2) == 0 });
    }

    fn flush(&mut self) {
        self.do_it(DiskOp::Flush);
        self.durable();
    }

    fn finish(&mut self) {
        while self.disk.in_flight() > 0 {
            self.disk.wait(Duration::from_secs(10)).unwrap();
            drop(self.disk.reap().unwrap());
        }
    }

    fn act(mut self, dir: &Path, random: &mut Random, forks: bool) -> Self {
        match random.below(24) {
            0..9 => self.write(random),
            9..11 => self.zero(random),
            11..17 => self.flush(),
            17..20 if forks => {
                let image = self.disk.fork();
                self.kept = (random.below(2) == 0).then_some(image);
            }
            20 => self.kept = None,
            // Overlays are folded into the image.
            21 if self.disk.is_forked() => {
                self.kept = None;
                for _ in 0..3 {
                    self.flush();
                    self.finish();
                }
            }
            22 if self.disk.is_forked() => {
                self.kept = None;
                self.finish();
                let Self { recorder, disk, now, mut epochs, token, .. } = self;
                disk.commit().map_err(|refused| refused.1).unwrap();
                let since = vec![BTreeSet::new(); SECTORS as usize];
                epochs.push(Epoch { position: recorder.position(), durable: now.clone(), since });
                return Self { recorder, disk: open(dir), now, epochs, kept: None, token };
            }
            // The process ends, and another opens the image.
            23 => {
                let Self { recorder, disk, epochs, token, kept, .. } = self;
                drop((disk, kept));
                let mut machine = Self { recorder, disk: open(dir), now: Vec::new(), epochs, kept: None, token };
                machine.now = shown(dir);
                let epoch = machine.epochs.last_mut().unwrap();
                epoch.compare(&machine.now, "a process that ended");
                // The present content is in the page cache, and may not be durable.
                for (sector, byte) in machine.now.iter().enumerate() {
                    epoch.since[sector].insert(*byte);
                }
                return machine;
            }
            _ => self.write(random),
        }
        self
    }
}

/// One byte per sector of an image opened for writing.
fn shown(dir: &Path) -> Vec<u8> {
    let bytes = fs::read(dir.join("disk.img")).unwrap();
    let sectors = bytes.chunks(SECTOR as usize);
    sectors.inspect(|sector| assert!(sector.iter().all(|byte| *byte == sector[0]), "torn")).map(|s| s[0]).collect()
}

impl Epoch {
    fn compare(&self, found: &[u8], what: &str) {
        for (sector, byte) in found.iter().enumerate() {
            let (was, since) = (self.durable[sector], &self.since[sector]);
            let may = *byte == was || since.contains(byte);
            assert!(may, "{what}: sector {sector} is {byte}, was {was} when it was flushed, and since {since:?}");
        }
    }
}

/// Opens the disk after a cut, and compares it. Returns its content, the requests to the device
/// meanwhile, and how many of them were complete when the disk was open.
fn open_after(recorder: &Recorder, bytes: Vec<u8>, epoch: &Epoch, what: &str) -> (Vec<u8>, Vec<Event>) {
    let mounted = recorder.mount(bytes).unwrap();
    let disk = open(mounted.path());
    let found = shown(mounted.path());
    assert!(!mounted.path().join("disk.img.clade-journal").exists(), "{what}");
    drop(disk);
    epoch.compare(&found, what);
    (found, mounted.unmount())
}

/// A device with an empty file system, if possible.
fn device(kind: Kind) -> Option<(Recorder, Vec<u8>)> {
    let made = Recorder::new(kind).and_then(|recorder| {
        let empty = recorder.format()?;
        recorder.mount(empty.clone()).map(Mounted::unmount)?;
        Ok((recorder, empty))
    });
    made.inspect_err(|error| {
        clade_test_support::skip("mount", &error.to_string());
    })
    .ok()
}

/// One after the other: programs started meanwhile would inherit locks.
#[test]
fn what_was_flushed_survives_power_cuts() {
    for (kind, schedules, cuts) in [(EXT4, 7_u64, 32), (BTRFS, 3, 12), (XFS, 3, 12)] {
        if let Some((recorder, empty)) = device(kind) {
            let schedules = schedules.div_ceil(clade_test_support::stride() as u64);
            cut_and_compare(kind, &recorder, &empty, (schedules, cuts));
        }
    }
}

fn cut_and_compare(kind: Kind, recorder: &Recorder, empty: &[u8], (schedules, cuts_each): (u64, usize)) {
    let (mut cuts, mut again, mut before_forks, mut at_flushes) = (0, 0, 0, 0);
    for schedule in 0..schedules {
        let mut random = Random::new(0x9e37_79b9_7f4a_7c15 ^ (schedule + 1) << 32);
        let mounted = recorder.mount(empty.to_vec()).unwrap();
        let mut machine = Machine::new(recorder, mounted.path());
        for step in 0..60 {
            machine = machine.act(mounted.path(), &mut random, step > 12);
            if step == 12 {
                before_forks = recorder.position();
            }
        }
        let epochs = std::mem::take(&mut machine.epochs);
        drop(machine);
        let log = mounted.unmount();
        let first = epochs[0].position;
        for number in 0..cuts_each {
            // When a flush has just returned, or at any instant.
            let at = if number % 2 == 0 {
                at_flushes += 1;
                epochs[random.below(epochs.len() as u64) as usize].position
            } else {
                first + random.below((log.len() - first) as u64) as usize
            };
            let epoch = epochs.iter().rfind(|epoch| epoch.position <= at).unwrap();
            let left = cut(empty, &log, at, &mut random);
            let what = format!(
                "{}: schedule {schedule}, cut {number} at {at} of {} (forks from {before_forks})",
                kind.name,
                log.len()
            );
            let (found, opening) = open_after(recorder, left.clone(), epoch, &what);
            cuts += 1;
            // During the recovery, or at its end.
            let over = random.below(2) == 0;
            let at = if over { opening.len() } else { random.below(opening.len() as u64 + 1) as usize };
            let left = cut(&left, &opening, at, &mut random);
            let what = format!("{what}, and again at {at} of {}", opening.len());
            let (after, _) = open_after(recorder, left, epoch, &what);
            assert!(!over || after == found, "{what}: it shows something else");
            again += 1;
        }
    }
    let when = "of them when a flush had returned";
    println!("{}: {cuts} cuts, {at_flushes} {when}; {again} while an image was opened after one", kind.name);
    assert_eq!(cuts, schedules as usize * cuts_each);
}
