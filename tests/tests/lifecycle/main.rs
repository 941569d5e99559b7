//! Lives and deaths: ancestors that end first, VMs by the hundred, operations that race, and
//! failures in the middle of them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod admission;
mod refused;
mod slices;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use clade_guests::BARE_ELF;
use clade_guests::abi::{Command, Event, PAGE_SIZE, POLL_OPS, WORK_BASE};
use clade_harness::{BareMailbox, BareVcpu, Slice, stop_writing};
use clade_memory::{Backing, GuestRam};
use clade_test_support::{wait_for, wait_until};
use clade_tests::{Guest, Holdings, Turn, Writer, expect_nothing_held, in_a_process_of_its_own};
use clade_vmm::boot::{BootImage, BootSource};
use clade_vmm::vm::{ChildOptions, Context, ForkImage, StopReason, Vm, VmConfig, VmError};
use vm_memory::{Bytes, GuestAddress};

const MIB: u64 = 32;
const PAUSED: ChildOptions<'static> = ChildOptions { paused: true, erase: &[], before_start: None };

fn turn() -> Option<(Turn, Context)> {
    with_context(Turn::take()?)
}

/// For a test that counts what the process holds.
fn alone() -> Option<(Turn, Context)> {
    with_context(Turn::alone()?)
}

fn with_context(turn: Turn) -> Option<(Turn, Context)> {
    let context = turn.context(Backing::Huge);
    Some((turn, context))
}

// --- ancestors ---

#[test]
fn a_child_outlives_its_parent_and_its_image() {
    let Some((_turn, context)) = turn() else { return };
    let parent = Guest::boot(&context, MIB, 1);
    parent.fill(Writer::Guest, 0, 2048, 1);
    let (image, _) = parent.fork();
    let child = Guest::child(&context, &image);
    drop(parent);
    child.expect(0, 2048, Some(1), "the parent is gone");
    drop(image);
    child.fill(Writer::Guest, 100, 1000, 2);
    child.expect(1100, 948, Some(1), "the image is gone");
    child.fork_child().expect(100, 1000, Some(2), "its own child");
}

#[test]
fn an_image_outlives_all_vms() {
    let Some((_turn, context)) = turn() else { return };
    let parent = Guest::boot(&context, MIB, 1);
    parent.fill(Writer::Guest, 0, 2048, 1);
    let (image, _) = parent.fork();
    drop(Guest::child(&context, &image));
    drop(parent);
    let late: Vec<Guest> = (0..3).map(|_| Guest::child(&context, &image)).collect();
    for (n, guest) in (0..).zip(&late) {
        guest.fill(Writer::Guest, n * 16, 16, 10 + n);
    }
    for (n, guest) in (0..).zip(&late) {
        guest.expect(n * 16, 16, Some(10 + n), "what it wrote");
        guest.expect(64, 1984, Some(1), "what it did not");
        guest.expect((n + 1) % 3 * 16, 16, Some(1), "what a sibling wrote");
    }
}

#[test]
fn ten_generations_with_the_ancestors_gone() {
    let Some((_turn, context)) = turn() else { return };
    let mut guest = Guest::boot(&context, MIB, 1);
    guest.fill(Writer::Guest, 0, 2048, 100);
    for n in 0..10 {
        // Each generation writes its pages: 20, and every other one more than a freeze leaves in
        // place.
        guest.fill(Writer::Guest, n * 20, 20, n);
        if n % 2 == 0 {
            guest.fill(Writer::Guest, 400, 1000, 50 + n);
        }
        guest = guest.fork_child();
        assert_eq!(u64::from(guest.vm().generation()), n + 1);
    }
    for n in 0..10 {
        guest.expect(n * 20, 20, Some(n), "a generation's mark");
    }
    guest.expect(400, 1000, Some(58), "the eighth generation's");
    guest.expect(200, 200, Some(100), "the first ancestor's");
    guest.expect(1400, 648, Some(100), "the first ancestor's");
}

// --- more than one vCPU ---

const SLICE_PAGES: u64 = 512;
const WINDOW: u64 = 32;

fn slice(vcpu: u64) -> Slice {
    Slice::zeros(vcpu, WORK_BASE + vcpu * SLICE_PAGES * PAGE_SIZE, SLICE_PAGES, WINDOW, vcpu)
}

/// Makes a child whose vCPUs stop before their first instruction, and returns the progress of each
/// at the fork.
fn stopping_child(context: &Context, image: &Arc<ForkImage>, cpus: u64) -> (Guest, Vec<u64>) {
    let at_fork = std::cell::RefCell::new(Vec::new());
    let tell = |ram: &GuestRam| {
        for vcpu in 0..cpus {
            let mailbox = BareMailbox::new(ram, vcpu);
            at_fork.borrow_mut().push(mailbox.progress().unwrap());
            mailbox.order(Command::Idle).unwrap();
        }
    };
    let options = ChildOptions { paused: true, erase: &[], before_start: Some(&tell) };
    let vm = Vm::from_image(context, "child", image, options).unwrap();
    vm.resume().unwrap();
    for vcpu in 0..cpus {
        BareVcpu::new(&vm, vcpu).run(Command::Idle).unwrap();
    }
    vm.pause().unwrap();
    (Guest::from(vm), at_fork.into_inner())
}

#[test]
fn writers_on_all_vcpus_are_forked_again_and_again() {
    for cpus in [2, 4] {
        let Some((_turn, context)) = turn() else { return };
        let parent = Guest::boot(&context, MIB, cpus);
        let mut slices: Vec<Slice> = (0..cpus).map(slice).collect();
        parent.vm().resume().unwrap();
        for slice in &slices {
            BareVcpu::new(parent.vm(), slice.vcpu()).mailbox().order(slice.write_command(0)).unwrap();
        }
        let mut children: Vec<(Guest, Vec<u64>)> = Vec::new();
        for _ in 0..20 {
            // Each has written more than the last child, which goes on to its next look at its orders.
            for vcpu in 0..cpus {
                let last = children.last().map_or(0, |(_, at_fork)| at_fork[vcpu as usize] + POLL_OPS);
                let mailbox = BareMailbox::new(parent.vm().ram(), vcpu);
                wait_until("the vCPUs to write on", || mailbox.progress().unwrap() > last);
            }
            let (image, _) = parent.vm().fork().unwrap();
            children.push(stopping_child(&context, &image, cpus));
        }
        let ended = stop_writing(parent.vm(), cpus).unwrap();
        parent.vm().pause().unwrap();
        let mut moved = 0;
        for (n, (child, at_fork)) in children.iter().enumerate() {
            for (slice, at_fork) in slices.iter_mut().zip(at_fork) {
                let progress = BareMailbox::new(child.vm().ram(), slice.vcpu()).progress().unwrap();
                let what = format!("{cpus} vCPUs, child {n}, vCPU {}", slice.vcpu());
                assert!((*at_fork..=at_fork + POLL_OPS).contains(&progress), "{what}: {progress}, forked at {at_fork}");
                moved += u64::from(progress > slice.done());
                let start = slice.start();
                child.expect_words(start, slice.advance(progress), &what);
            }
        }
        assert_eq!(moved, 20 * cpus, "the vCPUs wrote on between the forks");
        for (slice, progress) in slices.iter_mut().zip(ended) {
            let start = slice.start();
            parent.expect_words(start, slice.advance(progress), "parent");
        }
    }
}

#[test]
fn a_shared_count_is_exact_in_parent_and_children() {
    for cpus in [2, 4] {
        let Some((_turn, context)) = turn() else { return };
        // On a busy machine all forks may come before the count or after it: then the test is
        // repeated.
        assert!((0..10).any(|_| is_exact_when_forked_while_counting(&context, cpus)), "forked while counting");
    }
}

/// Returns whether a fork came in the middle of the count. The count is exact in any case.
fn is_exact_when_forked_while_counting(context: &Context, cpus: u64) -> bool {
    const COUNT: u64 = 1_000_000;
    let address = WORK_BASE + 8;
    let parent = Guest::boot(context, MIB, cpus);
    parent.vm().resume().unwrap();
    let order = |vcpu| {
        let command = Command::SharedCount { address, count: COUNT };
        BareVcpu::new(parent.vm(), vcpu).mailbox().order(command).unwrap()
    };
    let seqs: Vec<u64> = (0..cpus).map(order).collect();
    let read = |vm: &Vm| vm.ram().memory().read_obj::<u64>(GuestAddress(address)).unwrap();
    let mut children = Vec::new();
    let mut counts = Vec::new();
    for _ in 0..8 {
        let (image, _) = parent.vm().fork().unwrap();
        let child = Vm::from_image(context, "child", &image, PAUSED).unwrap();
        counts.push(read(&child));
        children.push(child);
    }
    let finish = |vm: &Vm| {
        for (vcpu, seq) in (0..).zip(&seqs) {
            BareVcpu::new(vm, vcpu).await_done(*seq).unwrap();
        }
        vm.pause().unwrap();
        assert_eq!(read(vm), cpus * COUNT);
    };
    finish(parent.vm());
    assert!(counts.windows(2).all(|two| two[0] <= two[1]), "{counts:?}");
    for child in &children {
        child.resume().unwrap();
        finish(child);
    }
    counts.iter().any(|count| (1..cpus * COUNT).contains(count))
}

// --- resources released ---

#[test]
fn a_hundred_children_leave_nothing_behind() {
    if !in_a_process_of_its_own("a_hundred_children_leave_nothing_behind") {
        return;
    }
    let Some((_turn, context)) = turn() else { return };
    let parent = Guest::boot(&context, MIB, 1);
    parent.fill(Writer::Guest, 0, 2048, 1);
    let store = context.store();
    let round = || {
        parent.fill(Writer::Guest, 0, 600, 2);
        let (image, _) = parent.fork();
        let children: Vec<Guest> = (0..100).map(|_| Guest::child(&context, &image)).collect();
        for child in children.iter().step_by(10) {
            child.fill(Writer::Guest, 300, 600, 3);
            drop(child.fork_child());
        }
        assert!(Holdings::count(store).threads >= 100, "they were all there");
    };
    // Twice before counting: the C library's caches are filled by the first.
    round();
    round();
    let before = Holdings::count(store);
    round();
    before.expect_same(store, "a hundred children");
    parent.expect(600, 1448, Some(1), "parent");
    drop(parent);
    context.drain();
    expect_nothing_held(store, "all of them");
}

// --- operations that race ---

/// A VM with `cpus` vCPUs that count their own words for ever.
fn counting(context: &Context, cpus: u64) -> Vm {
    let vm = Guest::boot(context, MIB, cpus).into_vm();
    vm.resume().unwrap();
    for vcpu in 0..cpus {
        let start = WORK_BASE + vcpu * 64 * PAGE_SIZE;
        BareVcpu::new(&vm, vcpu).mailbox().order(Command::Count { start, pages: 64, stride: 0 }).unwrap();
    }
    vm
}

fn progress(vm: &Vm, vcpu: u64) -> u64 {
    BareMailbox::new(vm.ram(), vcpu).progress().unwrap()
}

/// Waits until the vCPUs' threads have ended. Returns the reason.
fn ended(vm: &Vm) -> StopReason {
    wait_for("the end of its threads", || vm.wait(Duration::ZERO))
}

/// Waits until every vCPU makes progress.
fn expect_running(vm: &Vm, cpus: u64) {
    for vcpu in 0..cpus {
        let before = progress(vm, vcpu);
        wait_until("every vCPU gets on", || {
            assert_eq!(vm.stopped(), None, "vCPU {vcpu} stands still at {before}");
            progress(vm, vcpu) != before
        });
    }
}

fn expect_still(vm: &Vm, cpus: u64) {
    let all = || (0..cpus).map(|vcpu| progress(vm, vcpu)).collect::<Vec<_>>();
    let before = all();
    thread::sleep(Duration::from_millis(20));
    assert_eq!(all(), before, "it is paused");
}

#[test]
fn a_paused_vm_is_forked_and_stays_paused() {
    let Some((_turn, context)) = turn() else { return };
    let parent = counting(&context, 2);
    expect_running(&parent, 2);
    parent.pause().unwrap();
    parent.pause().unwrap();
    let (image, _) = parent.fork().unwrap();
    assert!(parent.is_paused());
    expect_still(&parent, 2);
    let child = Vm::from_image(&context, "child", &image, ChildOptions::default()).unwrap();
    assert!(!child.is_paused(), "the pause was the parent's");
    expect_running(&child, 2);
    let held = Vm::from_image(&context, "held", &image, PAUSED).unwrap();
    expect_still(&held, 2);
    assert_eq!(progress(&held, 0), progress(&parent, 0), "not one instruction past the fork");
    let (again, _) = held.fork().unwrap();
    assert_eq!(again.generation(), 2);
    held.resume().unwrap();
    expect_running(&held, 2);
    parent.resume().unwrap();
    parent.resume().unwrap();
    expect_running(&parent, 2);
}

#[test]
fn a_guard_and_a_pause_are_counted_apart() {
    let Some((_turn, context)) = turn() else { return };
    let vm = counting(&context, 1);
    let guard = vm.pause_guard().unwrap();
    vm.pause().unwrap();
    drop(guard);
    expect_still(&vm, 1);
    let guard = vm.pause_guard().unwrap();
    vm.resume().unwrap();
    expect_still(&vm, 1);
    drop(guard);
    expect_running(&vm, 1);
}

#[test]
fn pauses_resumes_and_forks_race() {
    let Some((_turn, context)) = turn() else { return };
    let vm = counting(&context, 2);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for n in 0..2 {
            let (vm, done) = (&vm, &done);
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    vm.pause().unwrap();
                    if n == 0 {
                        thread::yield_now();
                    }
                    vm.resume().unwrap();
                    // Locks are not fair: without a break no other thread gets a turn.
                    thread::sleep(Duration::from_micros(50));
                }
            });
        }
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..60 {
                    let (image, _) = vm.fork().unwrap();
                    let child = Vm::from_image(&context, "child", &image, PAUSED).unwrap();
                    assert_eq!(child.stopped(), None);
                }
                done.store(true, Ordering::Relaxed);
            });
        }
    });
    vm.resume().unwrap();
    expect_running(&vm, 2);
}

#[test]
fn two_threads_fork_one_vm() {
    let Some((_turn, context)) = turn() else { return };
    let parent = counting(&context, 2);
    let images: Vec<Arc<ForkImage>> = thread::scope(|scope| {
        let forker = || (0..40).map(|_| parent.fork().unwrap().0).collect::<Vec<_>>();
        let threads = [scope.spawn(forker), scope.spawn(forker)];
        threads.into_iter().flat_map(|t| t.join().unwrap()).collect()
    });
    expect_running(&parent, 2);
    parent.pause().unwrap();
    for image in images.iter().step_by(9) {
        let child = Vm::from_image(&context, "child", image, ChildOptions::default()).unwrap();
        expect_running(&child, 2);
    }
}

#[test]
fn a_stopped_vm_refuses_by_name() {
    let Some((_turn, context)) = turn() else { return };
    let vm = counting(&context, 2);
    let (image, _) = vm.fork().unwrap();
    vm.stop();
    vm.stop();
    assert_eq!(ended(&vm), StopReason::Requested);
    assert!(matches!(vm.fork(), Err(VmError::Stopped(StopReason::Requested))));
    assert!(matches!(vm.pause(), Err(VmError::Stopped(StopReason::Requested))));
    assert!(!vm.is_paused());
    assert!(matches!(vm.resume(), Err(VmError::Stopped(StopReason::Requested))));
    assert!(vm.pause_guard().is_err());
    expect_running(&Vm::from_image(&context, "child", &image, ChildOptions::default()).unwrap(), 2);
}

#[test]
fn a_vm_is_stopped_while_it_is_forked() {
    let Some((_turn, context)) = turn() else { return };
    let parent = counting(&context, 2);
    let (image, _) = parent.fork().unwrap();
    parent.pause().unwrap();
    for n in 0..60u64 {
        let vm = Vm::from_image(&context, "child", &image, ChildOptions::default()).unwrap();
        thread::scope(|scope| {
            let forker = scope.spawn(|| {
                loop {
                    match vm.fork() {
                        Ok((image, _)) => drop(image),
                        Err(error) => return error,
                    }
                }
            });
            thread::sleep(Duration::from_micros(n * 67));
            vm.stop();
            let error = forker.join().unwrap();
            assert!(matches!(error, VmError::Stopped(StopReason::Requested)), "{error:?}");
        });
        assert_eq!(ended(&vm), StopReason::Requested);
    }
}

#[test]
fn a_vm_is_dropped_while_another_thread_forks_it() {
    let Some((_turn, context)) = turn() else { return };
    let parent = counting(&context, 2);
    let (image, _) = parent.fork().unwrap();
    parent.pause().unwrap();
    for n in 0..20u64 {
        let vm = Arc::new(Vm::from_image(&context, "child", &image, ChildOptions::default()).unwrap());
        let weak = Arc::downgrade(&vm);
        let forker = thread::spawn(move || {
            let mut images = Vec::new();
            while let Some(vm) = weak.upgrade() {
                images.push(vm.fork().unwrap().0);
            }
            images
        });
        thread::sleep(Duration::from_micros(n * 150));
        drop(vm);
        if let Some(last) = forker.join().unwrap().last() {
            let child = Vm::from_image(&context, "orphan", last, ChildOptions::default()).unwrap();
            expect_running(&child, 2);
        }
    }
}

/// Stopped before the vCPUs have all taken the order to start: those that have wait for the others.
#[test]
fn a_child_is_dropped_at_once() {
    let Some((_turn, context)) = turn() else { return };
    let parent = Guest::boot(&context, MIB, 4);
    let (image, _) = parent.fork();
    for n in 0..200 {
        let child = Vm::from_image(&context, "child", &image, ChildOptions::default()).unwrap();
        if n % 2 == 0 {
            child.stop();
            assert_eq!(ended(&child), StopReason::Requested);
        }
    }
}

// --- the guest's own faults ---

#[test]
fn a_faulting_guest_is_told_and_can_still_be_forked() {
    let Some((_turn, context)) = turn() else { return };
    let guest = Guest::boot(&context, MIB, 1);
    guest.vm().resume().unwrap();
    // Beyond RAM: the guest's page tables do not reach there.
    let error = BareVcpu::new(guest.vm(), 0).run(Command::Touch { start: 1 << 40, pages: 1, value: 1 }).unwrap_err();
    assert!(error.to_string().contains("vector 14") && error.to_string().contains("0x10000000000"), "{error}");
    assert_eq!(guest.vm().stopped(), None, "the VM is there for whoever looks into it");
    guest.vm().pause().unwrap();
    drop(guest.fork_child());
}

#[test]
fn a_warm_shell_is_used_up_and_a_child_announces_itself() {
    let Some((_turn, context)) = turn() else { return };
    let parent = Guest::boot(&context, MIB, 1);
    context.prefill(parent.vm().config(), 3).unwrap();
    assert_eq!(context.prepared_count(parent.vm().config()), 3);
    let (image, _) = parent.fork();
    let tell = |ram: &GuestRam| {
        BareMailbox::new(ram, 0).order(Command::Announce).unwrap();
    };
    let options = ChildOptions { paused: false, erase: &[], before_start: Some(&tell) };
    let child = Vm::from_image(&context, "child", &image, options).unwrap();
    BareVcpu::new(&child, 0).await_event(Event::Announce).unwrap();
    assert_eq!(context.prepared_count(parent.vm().config()), 2);
    context.drain();
    assert_eq!(context.prepared_count(parent.vm().config()), 0);
}

#[test]
fn a_guest_that_does_not_fit_leaves_nothing_behind() {
    let Some((_turn, context)) = alone() else { return };
    let config = Arc::new(VmConfig::bare(4 << 20, 1).unwrap());
    // The process keeps a thread and a descriptor of its first VM.
    drop(Guest::boot(&context, MIB, 1));
    let before = Holdings::count(context.store());
    let kernel = BootImage::Bytes(BARE_ELF.into());
    let initrd = Some(BootImage::Bytes(vec![1; 8 << 20].into()));
    let source = BootSource { kernel, initrd, cmdline: String::new() };
    let error = Vm::boot(&context, "guest", &config, &source).unwrap_err();
    assert!(error.to_string().contains("8388608 bytes does not fit"), "{error}");
    before.expect_same(context.store(), "a guest that was refused");
}
