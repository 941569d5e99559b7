//! Suspended VMs: they are paused, own no pages, and continue as if they had never been suspended.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use clade_memory::{Access, PageRange, PinLifetime, RamError, Store, SuspendFile};
use vm_memory::{Bytes, GuestAddress};

use crate::kvm::testutil::host;
use crate::vm::tests::storm::{Pair, boot, goes_on};
use crate::vm::{ChildOptions, Context, ForkImage, Vm, VmError};

const PAIRS: [Pair; 1] = [Pair::Relay];
/// Pages that the guest does not use.
const FREE: u64 = 1500;

fn context() -> Option<Context> {
    Some(Context::new(Arc::new(host()?), Store::open_small().unwrap()).unwrap())
}

fn file() -> SuspendFile {
    SuspendFile::create(Path::new("/dev/shm")).unwrap()
}

fn put(vm: &Vm, page: u64, word: u64) {
    vm.ram().memory().write_obj(word, GuestAddress(page * 4096)).unwrap();
}

fn word(vm: &Vm, page: u64) -> u64 {
    vm.ram().memory().read_obj(GuestAddress(page * 4096)).unwrap()
}

fn private_kib(vm: &Vm) -> u64 {
    vm.memory_stats().unwrap().private_kib
}

#[test]
fn a_suspended_vm_owns_nothing_and_goes_on_when_it_is_woken() {
    let Some(context) = context() else { return };
    let vm = boot(&context, &PAIRS);
    (FREE..FREE + 100).for_each(|page| put(&vm, page, page));
    for round in 0..4 {
        goes_on(&vm, &PAIRS).unwrap();
        let report = vm.suspend(file()).unwrap();
        assert!(vm.is_suspended() && !vm.is_paused());
        assert!(report.memory.written > 0 && report.memory.kept == 0, "round {round}: {report:?}");
        assert_eq!(private_kib(&vm), 0, "round {round}");
        // The VM is paused: no page becomes its own again.
        thread::sleep(Duration::from_millis(20));
        assert_eq!(private_kib(&vm), 0, "round {round}");
        let again = vm.suspend(file()).unwrap();
        assert!(again.was_suspended && !report.was_suspended, "once is enough");
        let mut woken = vm.woken().unwrap();
        let waits = thread::spawn(move || woken.read(&mut [0]).unwrap());
        let woke = vm.wake().unwrap();
        assert!(woke.was_suspended && !vm.is_suspended());
        assert_eq!(woke.working_set > 0, round > 0, "what it touched is known from the second time on");
        assert_eq!(waits.join().unwrap(), 0);
        assert!(!vm.wake().unwrap().was_suspended);
        assert_eq!(vm.woken().unwrap().read(&mut [0]).unwrap(), 0, "it is awake");
    }
    goes_on(&vm, &PAIRS).unwrap();
    (FREE..FREE + 100).for_each(|page| assert_eq!(word(&vm, page), page));
}

#[test]
fn what_its_owner_has_paused_stays_paused_and_resuming_wakes_it() {
    let Some(context) = context() else { return };
    let vm = boot(&context, &PAIRS);
    vm.pause().unwrap();
    vm.suspend(file()).unwrap();
    vm.wake().unwrap();
    assert!(vm.is_paused() && !vm.is_suspended());
    vm.suspend(file()).unwrap();
    vm.resume().unwrap();
    assert!(!vm.is_paused() && !vm.is_suspended());
    goes_on(&vm, &PAIRS).unwrap();
    // Paused while it is suspended: both have to be undone.
    vm.suspend(file()).unwrap();
    vm.pause().unwrap();
    vm.wake().unwrap();
    assert!(vm.is_paused());
    vm.resume().unwrap();
    goes_on(&vm, &PAIRS).unwrap();
}

#[test]
fn a_suspended_vm_is_forked_and_reset_and_stays_suspended() {
    let Some(context) = context() else { return };
    let grandparent = boot(&context, &PAIRS);
    let start = |image: &Arc<ForkImage>| Vm::from_image(&context, "child", image, ChildOptions::default()).unwrap();
    let (image, _) = grandparent.fork().unwrap();
    let vm = start(&image);
    drop(image);
    goes_on(&vm, &PAIRS).unwrap();
    put(&vm, FREE, 7);
    vm.suspend(file()).unwrap();
    let (image, _) = vm.fork().unwrap();
    let child = start(&image);
    drop(image);
    goes_on(&child, &PAIRS).unwrap();
    assert!(vm.is_suspended());
    assert_eq!(private_kib(&vm), 0, "a fork needs nothing of it");
    assert_eq!((word(&child, FREE), word(&vm, FREE)), (7, 7));
    put(&child, FREE, 8);
    // Both are suspended, and woken.
    child.suspend(file()).unwrap();
    vm.wake().unwrap();
    goes_on(&vm, &PAIRS).unwrap();
    child.wake().unwrap();
    goes_on(&child, &PAIRS).unwrap();
    assert_eq!((word(&child, FREE), word(&vm, FREE), word(&grandparent, FREE)), (8, 7, 0));
    // Back to its fork, and still suspended.
    vm.suspend(file()).unwrap();
    vm.reset_to_origin().unwrap();
    assert!(vm.is_suspended());
    vm.wake().unwrap();
    goes_on(&vm, &PAIRS).unwrap();
    assert_eq!(word(&vm, FREE), 0);
    goes_on(&grandparent, &PAIRS).unwrap();
}

#[test]
fn i13_a_suspension_that_is_refused_leaves_the_vm_running() {
    let Some(context) = context() else { return };
    let vm = boot(&context, &PAIRS);
    let region = &vm.ram().regions()[0];
    let pin = region.pin(PageRange::with_len(FREE, 2), Access::Write, PinLifetime::LongTerm).unwrap();
    let refused = vm.suspend(file());
    assert!(matches!(refused, Err(VmError::Ram(RamError::Pinned { pages: 2, .. }))), "{refused:?}");
    assert!(!vm.is_suspended());
    goes_on(&vm, &PAIRS).unwrap();
    drop(pin);
    vm.suspend(file()).unwrap();
    vm.stop();
    assert!(matches!(vm.wake(), Err(VmError::Stopped(_))));
    assert!(matches!(vm.suspend(file()), Err(VmError::Stopped(_))));
    clade_test_support::wait_for("the end of its threads", || vm.wait(Duration::ZERO));
    let woken = vm.woken().unwrap();
    drop(vm);
    let mut woken = woken;
    assert_eq!(woken.read(&mut [0]).unwrap(), 0, "it has gone");
    context.store().sweep();
    // Sweeps of other tests hold all views of the process for a moment.
    clade_test_support::wait_eq("what is left of its file", &0, || context.store().live_layers());
}

/// A caller that needs the guest while the file is being written finds it awake afterwards.
#[test]
fn a_wake_in_the_middle_of_a_suspension_is_not_lost() {
    let Some(context) = context() else { return };
    let vm = boot(&context, &PAIRS);
    let need = |name: &str| match name {
        "wake" => vm.wake().map(drop).unwrap(),
        "resume" => vm.resume().unwrap(),
        _ => vm.ring_doorbell(0).unwrap(),
    };
    for name in ["wake", "resume", "doorbell"] {
        let mut round = 0;
        clade_test_support::wait_until("a request in the middle of a suspension", || {
            round += 1;
            // More pages to write, so that writing takes time.
            (FREE..FREE + 500).for_each(|page| put(&vm, page, round));
            let was_in_the_middle = thread::scope(|scope| {
                let suspends = scope.spawn(|| vm.suspend(file()).unwrap());
                while vm.is_awake() && !suspends.is_finished() {
                    std::hint::spin_loop();
                }
                let is_in_the_middle = !vm.is_suspended() && !suspends.is_finished();
                need(name);
                assert!(!suspends.join().unwrap().was_suspended);
                is_in_the_middle
            });
            assert!(!vm.is_suspended() && vm.is_awake(), "{name}, round {round}: it sleeps for good");
            goes_on(&vm, &PAIRS).unwrap();
            was_in_the_middle
        });
    }
    (FREE..FREE + 500).for_each(|page| assert!(word(&vm, page) > 0));
}
