//! Disks on real KVM: a bare guest's driver, the block device, and forks with requests in flight.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::thread;
use std::time::Duration;

use clade_block::CommitError;
use clade_guests::abi::Command;
use clade_guests::abi::disk::{DiskRun, Order, What};
use clade_harness::BareVcpu;
use clade_memory::Backing;
use clade_test_support::{wait_for, wait_until};
use clade_tests::{DiskFile, DiskGuest, Turn, until_in_flight, words};
use clade_vmm::vm::{Context, DiskSpec};

const MIB: u64 = 1 << 20;
const BYTES: u64 = 4 * MIB;
const SECTORS: u64 = BYTES / 512;
/// Long enough for a fork to find requests in flight whenever it comes.
const LATE: Duration = Duration::from_millis(20);

fn turn() -> Option<(Turn, Context)> {
    let turn = Turn::take()?;
    let context = turn.context(Backing::Huge);
    Some((turn, context))
}

fn whole(what: What, seed: u64) -> DiskRun {
    DiskGuest::whole(what, SECTORS, seed)
}

/// The same over the first `sectors` sectors.
fn part(what: What, sectors: u64, seed: u64) -> DiskRun {
    DiskGuest::whole(what, sectors, seed)
}

fn late(file: &DiskFile) -> DiskSpec {
    let mut spec = file.spec();
    spec.disk.latency = Some(LATE);
    spec
}

/// The disk of `guest` as it is now, written to a file.
fn exported(guest: &DiskGuest, file: &DiskFile, name: &str) -> Vec<u8> {
    let (image, _) = guest.vm().fork().unwrap();
    let disk = image.disks().next().unwrap();
    wait_until("the disk settles", || disk.settle(Duration::from_millis(50)));
    disk.export(&file.beside(name)).unwrap();
    std::fs::read(file.beside(name)).unwrap()
}

#[test]
fn a_guest_reads_and_writes_its_disk() {
    let Some((_turn, context)) = turn() else { return };
    let file = DiskFile::new(4 * MIB, 1);
    let guest = DiskGuest::boot(&context, file.spec(), 1);
    guest.expect(whole(What::Verify, 1), "what the host wrote");
    guest.expect(DiskRun { order: Order::Random, count: 2000, ..whole(What::Verify, 1) }, "in any order");
    guest.expect(whole(What::Write, 2), "a write");
    guest.expect(DiskRun { count: 1, ..whole(What::Flush, 0) }, "a flush");
    guest.expect(whole(What::Verify, 2), "what it wrote itself");
    assert!(file.bytes() == clade_tests::words(2, 0, 4 * MIB), "the file has it");
}

// --- a fork with requests in flight ---

#[test]
fn writes_in_flight_at_a_fork_are_done_once_here_and_again_there() {
    until_in_flight(|| {
        let Some((_turn, context)) = turn() else { return };
        let file = DiskFile::new(BYTES, 1);
        let parent = DiskGuest::boot(&context, late(&file), 1);
        let run = whole(What::Write, 2);
        let seq = parent.begin(run);
        let image = parent.fork_in_flight(run.count / 3);
        assert_eq!(parent.finish(seq), (run.count, 0, 0), "the parent's: each done once, none wrong");
        let child = DiskGuest::paused_child(&context, &image, "child");
        assert_eq!(child.finish(seq), (run.count, 0, 0), "the child's: each done once, none wrong");
        for guest in [&parent, &child] {
            guest.expect(whole(What::Verify, 2), "what was written around the fork");
        }
        // From here on they diverge.
        child.expect(part(What::Write, 800, 3), "the child writes");
        parent.expect(part(What::Write, 400, 4), "the parent writes");
        child.expect(part(What::Verify, 800, 3), "the child's own");
        parent.expect(part(What::Verify, 400, 4), "the parent's own");
        parent.expect(DiskRun { sector: 400, ..part(What::Verify, 400, 2) }, "what only the child wrote");
        let late_child = DiskGuest::paused_child(&context, &image, "late");
        assert_eq!(late_child.finish(seq), (run.count, 0, 0), "another child of the same instant");
        late_child.expect(whole(What::Verify, 2), "it sees nothing of what came after");
    });
}

#[test]
fn reads_in_flight_at_a_fork_arrive_in_both() {
    until_in_flight(|| {
        let Some((_turn, context)) = turn() else { return };
        let file = DiskFile::new(BYTES, 5);
        let parent = DiskGuest::boot(&context, late(&file), 1);
        let run = DiskRun { order: Order::Random, count: 600, ..whole(What::Verify, 5) };
        let seq = parent.begin(run);
        let image = parent.fork_in_flight(100);
        let child = DiskGuest::paused_child(&context, &image, "child");
        let again = parent.fork_in_flight(300);
        assert_eq!(parent.finish(seq), (600, 0, 0));
        assert_eq!(child.finish(seq), (600, 0, 0));
        assert_eq!(DiskGuest::paused_child(&context, &again, "second").finish(seq), (600, 0, 0));
    });
}

#[test]
fn a_child_that_is_forked_before_it_ran_hands_its_requests_on() {
    until_in_flight(|| {
        let Some((_turn, context)) = turn() else { return };
        let file = DiskFile::new(BYTES, 1);
        let parent = DiskGuest::boot(&context, late(&file), 1);
        let run = whole(What::Write, 6);
        let seq = parent.begin(run);
        let mut image = parent.fork_in_flight(50);
        let mut generations = Vec::new();
        for n in 0..4 {
            let child = DiskGuest::paused_child(&context, &image, "descendant");
            image = if n % 2 == 1 {
                // The child begins to repeat them, and is forked in the middle of that.
                child.vm().resume().unwrap();
                thread::sleep(LATE / 2);
                child.fork_in_flight(0)
            } else {
                let (next, report) = child.vm().fork().unwrap();
                assert!(report.in_flight > 0, "generation {n} has not run, and all of it is in flight still");
                next
            };
            generations.push(child);
        }
        generations.push(DiskGuest::paused_child(&context, &image, "last"));
        for guest in generations.iter().rev().chain([&parent]) {
            assert_eq!(guest.finish(seq), (run.count, 0, 0));
            guest.expect(whole(What::Verify, 6), "every generation");
        }
    });
}

#[test]
fn writes_of_parts_of_clusters_survive_forks() {
    let Some((_turn, context)) = turn() else { return };
    let file = DiskFile::new(BYTES, 1);
    let mut model = file.bytes();
    let parent = DiskGuest::boot(&context, file.spec(), 1);
    // After the first fork each of these is a write into a new overlay, of 1 to 13 sectors.
    let mut generations = vec![parent];
    for n in 0..6u64 {
        let last = generations.last().unwrap();
        let (block, sector, sectors) = (1 + n * 2 % 13, 3 + n * 701, 900);
        let run = DiskRun { block, sector, sectors, count: 50, order: Order::Random, ..whole(What::Write, 100 + n) };
        let seq = last.begin(run);
        let (image, _) = last.vm().fork().unwrap();
        assert_eq!(last.finish(seq), (50, 0, 0));
        for i in 0..run.count {
            let at = (run.sector_of(i) * 512) as usize;
            model[at..at + run.block_bytes() as usize].copy_from_slice(&words(run.seed, at as u64, run.block_bytes()));
        }
        assert!(exported(last, &file, &format!("parent{n}")) == model, "generation {n}, the one that was forked");
        let child = DiskGuest::paused_child(&context, &image, "child");
        assert_eq!(child.finish(seq), (50, 0, 0));
        assert!(exported(&child, &file, &format!("child{n}")) == model, "generation {n}, its child");
        generations.push(child);
    }
}

#[test]
fn a_parent_that_is_forked_all_the_time_loses_nothing() {
    let Some((_turn, context)) = turn() else { return };
    let file = DiskFile::new(BYTES, 9);
    let parent = DiskGuest::boot(&context, file.spec(), 1);
    let run = DiskRun { order: Order::Random, count: 0, ..whole(What::Verify, 9) };
    let seq = parent.begin(run);
    parent.await_progress(1);
    let mut in_flight = 0;
    for n in 0..60 {
        let (image, report) = parent.vm().fork().unwrap();
        in_flight += report.in_flight;
        if n % 10 == 0 {
            let child = DiskGuest::paused_child(&context, &image, "child");
            child.vm().resume().unwrap();
            let [done, errors, wrong, _] = child.stop_run();
            assert!(done > 0);
            assert_eq!((errors, wrong), (0, 0), "child {n}");
        }
        thread::sleep(Duration::from_millis(2));
    }
    let [done, errors, wrong, _] = parent.stop_run();
    assert!(done > 0 && seq > 0);
    assert_eq!((errors, wrong), (0, 0), "{done} operations, {in_flight} in flight at forks");
}

// --- refused and interrupted requests ---

#[test]
fn a_read_only_disk_refuses_writes_and_the_end_of_a_disk_is_its_end() {
    let Some((_turn, context)) = turn() else { return };
    let file = DiskFile::new(BYTES, 1);
    let mut spec = file.spec();
    spec.disk.read_only = true;
    let guest = DiskGuest::boot(&context, spec, 1);
    for what in [What::Write, What::Zero, What::Discard] {
        assert_eq!(guest.run(part(what, 80, 2)), (10, 10, 0), "{what:?}: every one an error");
    }
    guest.expect(whole(What::Verify, 1), "nothing was written");
    let beyond = DiskRun { sector: SECTORS - 4, ..part(What::Verify, 8, 1) };
    assert_eq!(guest.run(beyond), (1, 1, 0), "across the end");
    let far = DiskRun { sector: u64::MAX / 512, ..part(What::Verify, 8, 1) };
    assert_eq!(guest.run(far), (1, 1, 0), "where offsets overflow");
    assert!(guest.vm().stopped().is_none());
    assert!(file.bytes() == words(1, 0, BYTES));
}

#[test]
fn ephemeral_disks_of_one_image_are_written_apart_and_leave_it_as_it_is() {
    let Some((_turn, context)) = turn() else { return };
    let file = DiskFile::new(BYTES, 1);
    let mut spec = file.spec();
    spec.disk.ephemeral = true;
    let guests = [2, 3].map(|seed| (DiskGuest::boot(&context, spec.clone(), 1), seed));
    for (guest, seed) in &guests {
        guest.expect(whole(What::Verify, 1), "the image");
        guest.expect(whole(What::Write, *seed), "its own");
    }
    let (parent, seed) = &guests[0];
    let (image, _) = parent.guest.fork();
    let child = DiskGuest::child(&context, &image);
    child.expect(whole(What::Verify, *seed), "what its parent wrote");
    for (guest, seed) in &guests {
        guest.expect(whole(What::Verify, *seed), "its own, and nobody else's");
    }
    drop((image, child));
    let vm = parent.vm();
    vm.stop();
    wait_for("the end of its threads", || vm.wait(Duration::ZERO));
    let commits: Vec<_> =
        vm.take_disks().disks.into_iter().map(|disk| disk.commit().map_err(|failed| failed.1)).collect();
    assert!(matches!(commits.as_slice(), [Err(CommitError::ReadOnly { .. })]), "{commits:?}");
    drop(guests);
    assert!(file.bytes() == words(1, 0, BYTES));
    let beside = std::fs::read_dir(file.path().parent().unwrap()).unwrap().count();
    assert_eq!(beside, 1, "neither overlay nor journal");
}

#[test]
fn zeros_and_discards_read_as_zeros_before_and_after_a_fork() {
    let Some((_turn, context)) = turn() else { return };
    let file = DiskFile::new(BYTES, 1);
    let parent = DiskGuest::boot(&context, file.spec(), 1);
    let at = |sector, sectors, what| DiskRun { sector, sectors, block: sectors, count: 1, ..whole(what, 1) };
    parent.expect(at(3, 21, What::Zero), "in the base");
    parent.expect(at(3, 21, What::VerifyZero), "in the base");
    let (image, _) = parent.guest.fork();
    let child = DiskGuest::child(&context, &image);
    for (guest, sector) in [(&parent, 104), (&child, 200)] {
        guest.expect(at(sector + 3, 30, What::Zero), "in an overlay that is not there yet");
        guest.expect(at(sector + 3, 30, What::VerifyZero), "with odd ends");
        guest.expect(at(sector, 3, What::Verify), "what is before");
        guest.expect(at(sector + 33, 40, What::Verify), "what is behind");
        guest.expect(at(sector + 8, 16, What::Write), "over zeros");
        guest.expect(at(sector + 8, 16, What::Verify), "over zeros");
        guest.expect(at(sector + 8, 16, What::Discard), "what is in the overlay");
        guest.expect(at(sector + 8, 16, What::VerifyZero), "what was in the overlay");
        guest.expect(at(3, 21, What::VerifyZero), "what was zero before the fork");
    }
    parent.expect(at(200, 50, What::Verify), "what only the child made zeros");
    child.expect(at(104, 50, What::Verify), "what only the parent made zeros");
}

#[test]
fn a_reset_in_the_middle_of_transfers_ends_them() {
    let Some((_turn, context)) = turn() else { return };
    let file = DiskFile::new(BYTES, 1);
    let mut spec = file.spec();
    spec.disk.latency = Some(Duration::from_millis(700));
    let guest = DiskGuest::boot(&context, spec, 2);
    // On a machine that stands still meanwhile, the run may end before its device is reset.
    wait_until("a run that a reset has broken off", || {
        let seq = guest.begin(whole(What::Read, 1));
        wait_until("a whole batch in flight", || guest.vm().fork().unwrap().1.in_flight == 32);
        let [status, ..] = BareVcpu::new(guest.vm(), 1).run(Command::DiskReset { area: DiskGuest::AREA }).unwrap();
        assert_eq!(status, 0, "the device says that it is reset");
        let (done, ..) = guest.finish(seq);
        let is_broken_off = done < 512;
        if !is_broken_off {
            guest.open();
        }
        is_broken_off
    });
    // Interrupted transfers never arrive later: buffers keep their contents.
    guest.guest.fill(clade_tests::Writer::Guest, 16, 64, 77);
    thread::sleep(Duration::from_secs(1));
    guest.guest.expect(16, 64, Some(77), "after the reset");
    let [_, _, status, _] = guest.open();
    assert_eq!(status, 15, "and can be taken again");
    guest.expect(part(What::Verify, 80, 1), "and works");
}

// --- overlays at the end ---

#[test]
fn an_overlay_goes_back_to_its_base_when_nobody_else_uses_it() {
    let Some((_turn, context)) = turn() else { return };
    let file = DiskFile::new(BYTES, 1);
    let parent = DiskGuest::boot(&context, file.spec(), 1);
    parent.expect(part(What::Write, 80, 2), "before the fork");
    let (image, _) = parent.guest.fork();
    parent.expect(part(What::Write, 40, 3), "after the fork");
    parent.expect(DiskRun { sector: 1000, ..part(What::Zero, 8, 3) }, "after the fork");
    let mut want = words(1, 0, BYTES);
    want[..80 * 512].copy_from_slice(&words(2, 0, 80 * 512));
    assert!(file.bytes() == want, "the base has what was written before the fork, and no more");
    assert!(parent.vm().take_disks().disks.is_empty(), "a running VM keeps its disks");
    parent.vm().stop();
    let disk = parent.vm().take_disks().disks.pop().unwrap();
    let (disk, error) = *disk.commit().unwrap_err();
    assert!(matches!(error, CommitError::Shared { others: 1, .. }), "{error}");
    drop(image);
    let report = disk.commit().map_err(|failed| failed.1).unwrap();
    assert_eq!((report.copied, report.zeroed), (40 * 512, 8 * 512));
    want[..40 * 512].copy_from_slice(&words(3, 0, 40 * 512));
    want[1000 * 512..1008 * 512].fill(0);
    assert!(file.bytes() == want, "the base has everything");
}

#[test]
fn what_the_guest_flushed_after_forks_is_there_when_its_vm_has_died() {
    let Some((_turn, context)) = turn() else { return };
    let file = DiskFile::new(BYTES, 1);
    let parent = DiskGuest::boot(&context, file.spec(), 1);
    let flush = DiskRun { count: 1, ..whole(What::Flush, 0) };
    let mut want = words(1, 0, BYTES);
    for fork in 0..5u64 {
        let _ = parent.guest.fork();
        let (sector, seed) = (100 * fork, 2 + fork);
        parent.expect(DiskRun { sector, ..part(What::Write, 80, seed) }, "after a fork");
        parent.expect(flush, "a flush");
        want[sector as usize * 512..][..80 * 512].copy_from_slice(&words(seed, sector * 512, 80 * 512));
    }
    assert!(file.bytes() == words(1, 0, BYTES), "the image is for others to read");
    // No process commits.
    drop(parent);
    let guest = DiskGuest::boot(&context, file.spec(), 1);
    assert!(file.bytes() == want, "the image has been given it");
    assert!(!file.beside("disk.img.clade-journal").exists());
    guest.expect(DiskRun { sector: 400, ..part(What::Verify, 80, 6) }, "and the next guest sees it");
}
