use std::fs;
use std::path::PathBuf;

use clade_host_io::Gate;
use clade_test_support::wait_until;
use proptest::prelude::*;

use super::*;
use crate::relocation::{CHECK_INTERVAL, MAX_OVERLAYS, MAX_RUNNING, Relocation};
use crate::testutil::{SOON, begin_write, finish, read, run, settle, whole};
use crate::{CommitError, DiskConfig, DiskImage, DiskOp, SECTOR};

const CLUSTERS: u64 = 300;
/// Not whole clusters.
const SIZE: u64 = CLUSTERS * CLUSTER - 3 * SECTOR;

fn image() -> (tempfile::TempDir, PathBuf, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    let model: Vec<u8> = (0..SIZE).map(|at| (at / SECTOR % 251) as u8 | 1).collect();
    fs::write(&path, &model).unwrap();
    (dir, path, model)
}

/// Waits until the guest's requests have ended. Moves may continue.
fn requests_end(disk: &mut Disk) {
    loop {
        // `reap` submits operations that waited for a cancelled one.
        disk.reap().unwrap();
        if disk.in_flight() == disk.chain.relocation().running() {
            return;
        }
        disk.wait(SOON).unwrap();
    }
}

#[test]
fn a_disk_that_is_forked_a_thousand_times_has_few_files() {
    let (_dir, path, mut model) = image();
    let mut disk = Disk::open(&DiskConfig::new(&path)).unwrap();
    let mut kept = Vec::new();
    let mut most = 0;
    for fork in 0..1000u64 {
        let image = disk.fork();
        if fork % 250 == 100 {
            kept.push((image, model.clone()));
        }
        // A different offset each time, so that each overlay would stay needed.
        let (at, byte) = (fork * 7 % (CLUSTERS - 1) * CLUSTER, fork as u8);
        begin_write(&mut disk, at, &[byte; 4096], fork);
        model[at as usize..at as usize + 4096].fill(byte);
        assert_eq!(finish(&mut disk), 1, "what is moved is nobody's request");
        most = most.max(disk.extents_and_files().1);
    }
    assert!(most <= 2 + MAX_OVERLAYS + CHECK_INTERVAL as usize, "{most} files");
    assert!(most > MAX_OVERLAYS / 2, "{most}: nothing was merged");
    assert!(read(&mut disk, 0, SIZE as usize) == model);
    for (image, then) in &kept {
        assert!(whole(image) == *then, "an image is its instant");
    }
}

#[derive(Clone, Debug)]
enum Act {
    Write {
        sector: u64,
        sectors: u64,
        byte: u8,
        wait: bool,
    },
    Discard {
        cluster: u64,
        clusters: u64,
    },
    Fork,
    /// As a new disk, which replaces this one.
    Child,
    /// In place, once no request is in flight.
    Rewind,
    Cancel,
}

fn act() -> impl Strategy<Value = Act> {
    let sectors = run(SIZE / SECTOR, 64);
    let clusters = run(CLUSTERS, 20);
    prop_oneof![
        12 => (sectors, any::<u8>(), prop::bool::weighted(0.3))
            .prop_map(|((sector, sectors), byte, wait)| Act::Write { sector, sectors, byte, wait }),
        2 => clusters.prop_map(|(cluster, clusters)| Act::Discard { cluster, clusters }),
        8 => Just(Act::Fork),
        1 => Just(Act::Child),
        1 => Just(Act::Rewind),
        1 => Just(Act::Cancel),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// With constant merging, and writes and forks in the middle, a disk and its images match a
    /// byte array.
    #[test]
    fn whatever_is_moved_bytes_stay(acts in prop::collection::vec(act(), 1..80), late in any::<bool>()) {
        let (_dir, path, mut model) = image();
        let latency = late.then_some(Duration::from_micros(300));
        let mut disk = Disk::open(&DiskConfig { latency, ..DiskConfig::new(&path) }).unwrap();
        *disk.chain.relocation_mut() = Relocation::at_most(3, 1);
        let mut images: Vec<(DiskImage, Vec<u8>)> = Vec::new();
        let mut last = None;
        // The order of overlapping requests in flight is not known.
        let mut busy: Vec<Range<u64>> = Vec::new();
        for (token, act) in (2..).zip(acts) {
            let sectors_in = CLUSTER / SECTOR;
            let range = match act {
                Act::Write { sector, sectors, .. } => Some(sector..sector + sectors),
                Act::Discard { cluster, clusters } => Some(cluster * sectors_in..(cluster + clusters) * sectors_in),
                _ => None,
            };
            if let Some(range) = range {
                if busy.iter().any(|other| other.start < range.end && range.start < other.end) {
                    requests_end(&mut disk);
                    busy.clear();
                }
                busy.push(range);
            }
            match act {
                Act::Write { sector, sectors, byte, wait } => {
                    let bytes = vec![byte; (sectors * SECTOR) as usize];
                    begin_write(&mut disk, sector * SECTOR, &bytes, token);
                    model[(sector * SECTOR) as usize..][..bytes.len()].fill(byte);
                    if wait {
                        finish(&mut disk);
                    }
                }
                Act::Discard { cluster, clusters } => {
                    let (offset, end) = (cluster * CLUSTER, ((cluster + clusters) * CLUSTER).min(SIZE));
                    disk.submit(DiskOp::Zero { offset, len: end - offset, unmap: true }, token).unwrap();
                    model[offset as usize..end as usize].fill(0);
                }
                // A child's device repeats the guest's requests; there is no device here. Moves
                // stay in flight.
                Act::Fork | Act::Child | Act::Rewind => {
                    requests_end(&mut disk);
                    if let (Act::Rewind, Some((image, then))) = (&act, &last) {
                        disk.cancel();
                        disk.settle_moves();
                        prop_assert!(disk.rewind(image));
                        model = Vec::clone(then);
                        continue;
                    }
                    let image = disk.fork();
                    if let Act::Child = act {
                        disk = image.open().unwrap();
                        *disk.chain.relocation_mut() = Relocation::at_most(3, 1);
                    }
                    last = Some((image.clone(), model.clone()));
                    if token % 3 == 0 {
                        images.push((image, model.clone()));
                    }
                }
                Act::Cancel => {
                    requests_end(&mut disk);
                    disk.cancel();
                }
            }
        }
        finish(&mut disk);
        prop_assert!(read(&mut disk, 0, SIZE as usize) == model);
        for (image, then) in &images {
            settle(image);
            prop_assert!(&whole(image) == then, "an image is its instant");
        }
        if disk.is_forked() {
            let last = disk.fork();
            prop_assert!(whole(&last) == model);
        }
    }
}

#[test]
fn a_move_that_fails_loses_nothing_and_a_commit_waits_for_those_under_way() {
    let (_dir, path, mut model) = image();
    let config = DiskConfig { latency: Some(Duration::from_millis(2)), ..DiskConfig::new(&path) };
    let mut disk = Disk::open(&config).unwrap();
    *disk.chain.relocation_mut() = Relocation::at_most(2, 1);
    for fork in 0..12u64 {
        drop(disk.fork());
        // The moves after the last fork begin below, however long its write takes.
        disk.chain.hold_moves(fork == 11);
        let at = fork * 20 * CLUSTER;
        begin_write(&mut disk, at, &[fork as u8; 4096], fork);
        model[at as usize..at as usize + 4096].fill(fork as u8);
        requests_end(&mut disk);
        if fork == 6 {
            // A cancelled request fails, or completes as if it had not been cancelled.
            disk.cancel();
        }
    }
    disk.chain.hold_moves(false);
    disk.kick().unwrap();
    assert!(disk.chain.relocation().running() > 0, "something is on its way");
    let mut disk = Some(disk);
    // A commit gives up after ten seconds, which a busy machine may need.
    wait_until("the disk is committed", || {
        let refused = disk.take().unwrap().commit().err();
        disk = refused.map(|refused| {
            assert!(matches!(refused.1, CommitError::Busy { .. }), "{}", refused.1);
            refused.0
        });
        disk.is_none()
    });
    assert!(fs::read(&path).unwrap() == model);
}

#[test]
fn nothing_is_moved_before_a_parents_writes_have_landed_or_without_an_own_file() {
    let (dir, path, _) = image();
    let mut disk = Disk::open(&DiskConfig::new(&path)).unwrap();
    for at in 0..5 {
        drop(disk.fork());
        begin_write(&mut disk, at * 8 * CLUSTER, &[1; 4096], 1);
        finish(&mut disk);
    }
    *disk.chain.relocation_mut() = Relocation::at_most(2, 1);
    // In place, and in flight while the child is made.
    let gate = Gate::close(dir.path()).unwrap();
    begin_write(&mut disk, 4 * 8 * CLUSTER, &[2; 4096], 1);
    let mut child = disk.fork().open().unwrap();
    *child.chain.relocation_mut() = Relocation::at_most(2, 1);
    begin_write(&mut child, 100 * CLUSTER, &[3; 4096], 1);
    child.kick().unwrap();
    assert!(child.chain.is_unsettled(), "the parent's is on its way");
    assert!(
        !child.chain.relocation().queue.is_empty() && child.chain.relocation().running() == 0,
        "{:?}",
        child.chain.relocation()
    );
    gate.open();
    finish(&mut disk);
    let gate = Gate::close(dir.path()).unwrap();
    child.kick().unwrap();
    assert_eq!(child.chain.relocation().running(), MAX_RUNNING);
    child.chain.relocation_mut().queue.push_back(0..1);
    drop(child.fork());
    let queued = child.chain.relocation().queue.len();
    gate.open();
    requests_end(&mut child);
    while child.chain.relocation().running() > 0 {
        child.wait(SOON).unwrap();
        child.reap().unwrap();
    }
    assert!(
        child.chain.active().is_none() && child.chain.relocation().queue.len() >= queued,
        "{:?}",
        child.chain.relocation()
    );
}
