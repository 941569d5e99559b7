//! Resets in place: of running and paused VMs, in the middle of I/O, refused, failed half-way, and
//! a thousand times.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use clade_guests::abi::disk::What;
use clade_guests::abi::{Command, PAGE_SIZE, WORK_BASE};
use clade_harness::{BareMailbox, BareVcpu};
use clade_memory::{Access, Backing, PageRange, PinLifetime, RamError};
use clade_test_support::wait_until;
use clade_tests::{
    DiskFile, DiskGuest, Guest, Holdings, Turn, Writer, in_a_process_of_its_own, until_in_flight, with_vcpus,
};
use clade_vmm::vm::{Context, ForkImage, VmError};
use kvm_bindings::Xsave;

const MIB: u64 = 32;
const DISK_BYTES: u64 = 4 << 20;
const SECTORS: u64 = DISK_BYTES / 512;
/// Long enough for a fork or a reset to find requests in flight whenever it comes.
const LATE: Duration = Duration::from_millis(20);

fn turn() -> Option<(Turn, Context)> {
    let turn = Turn::take()?;
    let context = turn.context(Backing::Huge);
    Some((turn, context))
}

/// A guest with 2,048 pages of seed 1, and an image of it.
fn family(context: &Context, cpus: u64) -> (Guest, Arc<ForkImage>) {
    let parent = Guest::boot(context, MIB, cpus);
    parent.fill(Writer::Guest, 0, 2048, 1);
    let (image, _) = parent.fork();
    (parent, image)
}

fn count(first: u64, pages: u64) -> Command {
    Command::Count { start: WORK_BASE + first * PAGE_SIZE, pages, stride: 0 }
}

/// Has a vCPU of a running guest count in memory, and waits until it has begun.
fn counting(guest: &Guest, vcpu: u64, first: u64, pages: u64) {
    let mailbox = BareMailbox::new(guest.vm(), vcpu);
    let seq = mailbox.order(count(first, pages)).unwrap();
    guest.vm().resume().unwrap();
    wait_until("a vCPU begins to count", || mailbox.taken().unwrap() >= seq);
}

#[test]
fn a_running_vm_goes_on_from_its_image() {
    let Some((_turn, context)) = turn() else { return };
    let (parent, image) = family(&context, 1);
    let child = Guest::child(&context, &image);
    assert!(Arc::ptr_eq(&child.vm().origin().unwrap(), &image));
    for round in 0..3 {
        counting(&child, 0, 0, 500);
        let report = child.vm().reset_to_origin().unwrap();
        assert!(report.memory.dropped + report.memory.restored > 0, "round {round}: {report:?}");
        assert!(!child.vm().is_paused(), "it was running");
        // The VM runs, and knows nothing of commands after the image.
        BareVcpu::new(child.vm(), 0).run(Command::Idle).unwrap();
        child.vm().pause().unwrap();
        child.expect(0, 2048, Some(1), "as at the fork");
    }
    parent.expect(0, 2048, Some(1), "the parent's");
}

#[test]
fn a_paused_vm_stays_paused_and_twice_is_once() {
    let Some((_turn, context)) = turn() else { return };
    let (_parent, image) = family(&context, 1);
    let child = Guest::child(&context, &image);
    // Before its first instruction.
    child.vm().reset_to_origin().unwrap();
    child.fill(Writer::Guest, 100, 300, 2);
    child.fill(Writer::Host, 1000, 10, 3);
    let first = child.vm().reset_to_origin().unwrap();
    assert!(first.memory.dropped >= 310, "{first:?}");
    // Nothing was written in between: the few pages that the first reset restored are dropped.
    let again = child.vm().reset_to_origin().unwrap();
    assert_eq!((again.memory.dropped, again.memory.restored), (first.memory.restored, 0), "{again:?}");
    let last = child.vm().reset_to_origin().unwrap();
    assert_eq!((last.memory.dropped, last.memory.restored), (0, 0), "{last:?}");
    assert!(child.vm().is_paused());
    child.expect(0, 2048, Some(1), "as at the fork");
}

#[test]
fn siblings_and_parents_are_not_disturbed() {
    let Some((_turn, context)) = turn() else { return };
    let (parent, image) = family(&context, 1);
    parent.fill(Writer::Guest, 0, 64, 10);
    let children: Vec<Guest> = (0..3).map(|_| Guest::child(&context, &image)).collect();
    for (n, child) in (0..).zip(&children) {
        child.fill(Writer::Guest, n * 64, 128, 20 + n);
    }
    children[1].vm().reset_to_origin().unwrap();
    children[1].expect(0, 2048, Some(1), "as at the fork");
    for n in [0, 2] {
        children[n as usize].expect(n * 64, 128, Some(20 + n), "a sibling's own");
        children[n as usize].expect(256, 1792, Some(1), "what a sibling shares");
    }
    parent.expect(0, 64, Some(10), "the parent's own");
    // A child of a reset VM, and its resets to its own fork point and to its grandparent's.
    children[1].fill(Writer::Guest, 500, 50, 30);
    let (own, _) = children[1].fork();
    let grandchild = Guest::child(&context, &own);
    grandchild.fill(Writer::Guest, 0, 2048, 40);
    grandchild.vm().reset_to_origin().unwrap();
    grandchild.expect(500, 50, Some(30), "its own fork point");
    children[1].fill(Writer::Guest, 500, 50, 31);
    children[1].vm().reset(&own).unwrap();
    children[1].expect(500, 50, Some(30), "an image of itself");
    children[1].vm().reset(&image).unwrap();
    children[1].expect(0, 2048, Some(1), "where it comes from");
    grandchild.vm().reset(&image).unwrap();
    grandchild.expect(0, 2048, Some(1), "an ancestor's image");
}

#[test]
fn all_vcpus_are_put_back() {
    let Some((_turn, context)) = turn() else { return };
    let parent = Guest::boot(&context, MIB, 2);
    parent.fill(Writer::Guest, 0, 2048, 1);
    // In the image both are in the middle of a command.
    counting(&parent, 0, 1000, 10);
    counting(&parent, 1, 1100, 10);
    let (image, _) = parent.fork();
    let child = Guest::child(&context, &image);
    for round in 0..20 {
        child.vm().resume().unwrap();
        for vcpu in 0..2 {
            BareVcpu::new(child.vm(), vcpu).run(Command::Idle).unwrap();
        }
        counting(&child, 1, round * 10, 5);
        child.vm().reset_to_origin().unwrap();
        // Both count on: beyond the instant, each in its own pages.
        let progress = |vcpu| BareMailbox::new(child.vm().ram(), vcpu).progress().unwrap();
        let before = [progress(0), progress(1)];
        wait_until("both vCPUs count on", || (0..2).all(|vcpu| progress(vcpu) != before[vcpu as usize]));
        child.vm().pause().unwrap();
    }
    child.vm().resume().unwrap();
    for vcpu in 0..2 {
        BareVcpu::new(child.vm(), vcpu).run(Command::Idle).unwrap();
    }
    child.vm().pause().unwrap();
    child.expect(0, 1000, Some(1), "what nobody counted in at the fork");
}

#[test]
fn a_reset_in_the_middle_of_disk_io_does_the_images_requests_again() {
    until_in_flight(|| {
        let Some((_turn, context)) = turn() else { return };
        let file = DiskFile::new(DISK_BYTES, 1);
        let mut spec = file.spec();
        spec.disk.latency = Some(LATE);
        let parent = DiskGuest::boot(&context, spec, 1);
        let run = DiskGuest::whole(What::Write, SECTORS, 2);
        let seq = parent.begin(run);
        let image = parent.fork_in_flight(run.count / 4);
        assert_eq!(parent.finish(seq), (run.count, 0, 0));
        let child = DiskGuest::paused_child(&context, &image, "child");
        for round in 1..6 {
            child.vm().resume().unwrap();
            child.await_progress(run.count * (round + 1) / 8);
            // Requests of its own are in flight.
            child.vm().reset_to_origin().unwrap();
        }
        assert_eq!(child.finish(seq), (run.count, 0, 0), "each done once, none wrong");
        child.expect(DiskGuest::whole(What::Verify, SECTORS, 2), "what was written around the fork");
        // Back to the image, with the disk.
        child.expect(DiskGuest::whole(What::Write, SECTORS, 3), "it writes all of it");
        child.vm().reset_to_origin().unwrap();
        assert_eq!(child.finish(seq), (run.count, 0, 0), "and again");
        child.expect(DiskGuest::whole(What::Verify, SECTORS, 2), "nothing of what it wrote since");
        parent.expect(DiskGuest::whole(What::Verify, SECTORS, 2), "the parent's");
    });
}

#[test]
fn a_driver_that_came_or_went_since_is_as_it_was() {
    let Some((_turn, context)) = turn() else { return };
    let file = DiskFile::new(DISK_BYTES, 1);
    let guest = DiskGuest::boot(&context, file.spec(), 1);
    let (opened, _) = guest.guest.fork();
    guest.guest.run(Command::DiskReset { area: DiskGuest::AREA });
    let (closed, _) = guest.guest.fork();
    guest.vm().reset(&opened).unwrap();
    guest.expect(DiskGuest::whole(What::Verify, SECTORS, 1), "the driver has its device");
    guest.expect(DiskGuest::whole(What::Write, 800, 2), "and writes");
    guest.vm().reset(&closed).unwrap();
    guest.open();
    guest.expect(DiskGuest::whole(What::Verify, SECTORS, 1), "taken anew");
    guest.vm().reset(&opened).unwrap();
    guest.expect(DiskGuest::whole(What::Verify, SECTORS, 1), "and as it was");
}

#[test]
fn i7_a_long_pin_refuses_the_reset_and_everything_goes_on() {
    let Some((_turn, context)) = turn() else { return };
    let file = DiskFile::new(DISK_BYTES, 1);
    let mut spec = file.spec();
    spec.disk.latency = Some(LATE);
    let parent = DiskGuest::boot(&context, spec, 1);
    let (image, _) = parent.guest.fork();
    let child = DiskGuest::child(&context, &image);
    let run = DiskGuest::whole(What::Write, SECTORS, 2);
    let seq = child.begin(run);
    let region = &child.vm().ram().regions()[0];
    // Another engine's pin, on a page that the driver does not use.
    let page = region.pages() - 1;
    let pin = region.pin(PageRange::with_len(page, 1), Access::Write, PinLifetime::LongTerm).unwrap();
    for _ in 0..3 {
        thread::sleep(Duration::from_millis(20));
        let refused = child.vm().reset_to_origin();
        assert!(matches!(refused, Err(VmError::Ram(RamError::Pinned { pages: 1, .. }))), "{refused:?}");
        assert!(!child.vm().is_paused());
    }
    // Requests given up for the reset are done again.
    assert_eq!(child.finish(seq), (run.count, 0, 0), "each done once, none wrong");
    child.expect(DiskGuest::whole(What::Verify, SECTORS, 2), "what it wrote");
    drop(pin);
    child.vm().reset_to_origin().unwrap();
    child.expect(DiskGuest::whole(What::Verify, SECTORS, 1), "as at the fork");
}

#[test]
fn a_vm_without_an_origin_and_one_that_has_stopped_say_so() {
    let Some((_turn, context)) = turn() else { return };
    let (parent, image) = family(&context, 1);
    assert!(matches!(parent.vm().reset_to_origin(), Err(VmError::NoOrigin)));
    parent.fill(Writer::Guest, 0, 64, 2);
    parent.vm().reset(&image).unwrap();
    parent.expect(0, 2048, Some(1), "an image of its own will do");
    let other = Guest::boot(&context, 2 * MIB, 1);
    assert!(matches!(other.vm().reset(&image), Err(VmError::OtherConfig { field: "memory" })));
    let other = Guest::boot(&context, MIB, 2);
    assert!(matches!(other.vm().reset(&image), Err(VmError::OtherConfig { field: "cpus" })));
    let child = Guest::child(&context, &image);
    child.vm().forget_origin();
    assert!(matches!(child.vm().reset_to_origin(), Err(VmError::NoOrigin)));
    child.vm().stop();
    assert!(matches!(child.vm().reset(&image), Err(VmError::Stopped(_))));
}

/// Returns `image` with a state that no vCPU of this host accepts.
fn broken(image: &ForkImage) -> Arc<ForkImage> {
    // A state component that this host has no room for, in use.
    let mut xsave = Xsave::new(4096).unwrap();
    xsave.as_mut_slice()[4095] = 1;
    with_vcpus(image, |vcpu| vcpu.xsave = xsave.clone())
}

#[test]
fn i13_a_reset_that_fails_half_way_leaves_it_paused_until_another_mends_it() {
    let Some((_turn, context)) = turn() else { return };
    let (_parent, image) = family(&context, 2);
    let bad = broken(&image);
    let child = Guest::child(&context, &image);
    for running in [false, true] {
        child.fill(Writer::Guest, 0, 64, 2);
        if running {
            counting(&child, 0, 100, 10);
        }
        let failed = child.vm().reset(&bad);
        assert!(matches!(failed, Err(VmError::VcpuState(_))), "{failed:?}");
        assert!(child.vm().is_paused());
        assert!(matches!(child.vm().resume(), Err(VmError::Inconsistent)));
        // Its registers are those of a counting guest, but it stands still.
        let progress = || BareMailbox::new(child.vm().ram(), 0).progress().unwrap();
        let before = progress();
        thread::sleep(Duration::from_millis(30));
        assert_eq!(progress(), before, "it stands still");
        assert!(matches!(child.vm().fork().map(drop), Err(VmError::Inconsistent)));
        child.vm().reset_to_origin().unwrap();
        assert!(child.vm().is_paused());
        child.expect(0, 2048, Some(1), "mended");
    }
}

#[test]
fn a_thousand_resets_hold_nothing() {
    if !in_a_process_of_its_own("a_thousand_resets_hold_nothing") {
        return;
    }
    let Some((_turn, context)) = turn() else { return };
    let file = DiskFile::new(DISK_BYTES, 1);
    let parent = DiskGuest::boot(&context, file.spec(), 1);
    let (image, _) = parent.guest.fork();
    let child = DiskGuest::child(&context, &image);
    let round = |n: u64| {
        child.guest.fill(Writer::Host, 2000 + n % 500, 4, n);
        child.expect(DiskGuest::whole(What::Write, 80, n), "it writes");
        child.vm().reset_to_origin().unwrap();
    };
    (0..5).for_each(round);
    let held = Holdings::count(context.store());
    // Pages of the last round that it restored are dropped by another reset.
    let private = || {
        child.vm().reset_to_origin().unwrap();
        child.vm().memory_stats().unwrap().private_kib
    };
    let before = private();
    (0..1000).for_each(round);
    held.expect_same(context.store(), "a thousand resets");
    assert_eq!(private(), before);
    child.expect(DiskGuest::whole(What::Verify, SECTORS, 1), "the disk as it was");
}
