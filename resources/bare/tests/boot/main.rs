//! The bare guest on a real KVM, against the host's model of its commands.
//!
//! Without a usable /dev/kvm every test prints `skipped: REASON`, unless the environment's
//! CLADE_REQUIRE names `kvm`.

mod vm;

use clade_guests::abi::{
    Command, Event, MAGIC, PAGE_SIZE, Report, State, Status, WORK_BASE, mailbox_gpa, model, offset, write_op,
};
use clade_test_support::{Patience, wait_until};
use std::time::{Duration, Instant};
use vm::{Entry, Irqchip, Layout, Vm};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const SMALL: Layout = Layout { memory: 64 * MIB, vcpus: 1, irqchip: Irqchip::Split, entry: Entry::Pvh };

/// Boots, or returns from the test.
macro_rules! boot {
    ($layout:expr) => {
        match Vm::boot($layout) {
            Ok(vm) => vm,
            Err(reason) => return clade_test_support::skip("kvm", &reason.to_string()),
        }
    };
}

#[test]
fn every_vcpu_reports_ready() {
    for (irqchip, vcpus) in [(Irqchip::Split, 1), (Irqchip::Split, 2), (Irqchip::Full, 2), (Irqchip::Split, 4)] {
        let start = Instant::now();
        let vm = boot!(Layout { vcpus, irqchip, ..SMALL });
        let (all, run) = (start.elapsed(), vm.boot_time);
        println!(
            "{vcpus} vCPUs, {irqchip:?}: {all:?} from KVM_CREATE_VM to the last READY, {run:?} of it from KVM_RUN"
        );
        for vcpu in 0..vcpus {
            assert_eq!(vm.mailbox(vcpu, offset::MAGIC), MAGIC);
            assert_eq!(vm.state(vcpu), State::Idle);
            assert_eq!(vm.status(vcpu), Status::None);
        }
    }
}

#[test]
fn boots_by_the_64_bit_linux_entry() {
    let vm = boot!(Layout { entry: Entry::Linux, vcpus: 2, ..SMALL });
    for vcpu in 0..2 {
        assert_eq!(vm.run(vcpu, Command::Fill { start: WORK_BASE, pages: 1, seed: 1 }), Event::Done);
    }
}

#[test]
fn boots_without_an_irqchip() {
    let vm = boot!(Layout { irqchip: Irqchip::None, ..SMALL });
    assert_eq!(vm.run(0, Command::Idle), Event::Done);
}

#[test]
fn fill_is_what_the_model_says_and_verify_finds_one_wrong_word() {
    let vm = boot!(SMALL);
    let (start, pages, seed) = (WORK_BASE, 1000, 42);
    let mut expected = vec![0; 1000 * 512];
    model::fill(&mut expected, start, seed);

    assert_eq!(vm.run(0, Command::Fill { start, pages, seed }), Event::Done);
    assert!(vm.words(start, pages) == expected);
    assert_eq!(vm.run(0, Command::Verify { start, pages, seed }), Event::Done);
    assert_eq!(vm.result(0)[0], 0);

    let wrong = start + 777 * PAGE_SIZE + 8;
    let right = vm.load(wrong);
    vm.store(wrong, 1);
    assert_eq!(vm.run(0, Command::Verify { start, pages, seed }), Event::Mismatch);
    assert_eq!(vm.status(0), Status::Mismatch);
    assert_eq!(vm.result(0), [1, wrong, 1, right]);
    assert_eq!(vm.mailbox(0, offset::PROGRESS), pages);
}

#[test]
fn writes_are_what_the_model_says() {
    let vm = boot!(SMALL);
    for (window, pages) in [(0, 1000), (10, 1000), (2000, 1000), (1, 3)] {
        let (start, seed, n) = (WORK_BASE, 7 + window, 30_000);
        let mut expected = vec![0; pages as usize * 512];
        model::fill(&mut expected, start, seed);
        model::apply_writes(&mut expected, seed, window, 0..2 * n);

        assert_eq!(vm.run(0, Command::Fill { start, pages, seed }), Event::Done);
        for first in [0, n] {
            assert_eq!(vm.run(0, Command::Write { start, pages, window, seed, count: n, first }), Event::Done);
            assert_eq!(vm.result(0)[0], first + n);
        }
        assert!(vm.words(start, pages) == expected, "window {window} of {pages} pages");
    }
}

#[test]
fn an_interrupted_writer_says_exactly_how_far_it_came() {
    let vm = boot!(SMALL);
    let (start, pages, window, seed) = (WORK_BASE, 5000, 0, 9);
    let write = Command::Write { start, pages, window, seed, count: 0, first: 0 };
    let mut expected = vec![0; pages as usize * 512];

    vm.give(0, write);
    // Otherwise there is no command to interrupt.
    wait_until("the vCPU writes", || vm.mailbox(0, offset::PROGRESS) > 0);
    let before = (Instant::now(), vm.mailbox(0, offset::PROGRESS));
    std::thread::sleep(Duration::from_millis(300));
    let after = (Instant::now(), vm.mailbox(0, offset::PROGRESS));
    assert_eq!(vm.run(0, Command::Idle), Event::Done);

    assert_eq!(vm.status(0), Status::Interrupted);
    let done = vm.mailbox(0, offset::PROGRESS);
    assert_eq!(vm.result(0)[0], done);
    model::apply_writes(&mut expected, seed, window, 0..done);
    assert!(vm.words(start, pages) == expected);
    let rate = (after.1 - before.1) as f64 / (after.0 - before.0).as_secs_f64();
    println!("WRITE: {:.1} M operations a second over {} MiB", rate / 1e6, pages * PAGE_SIZE / MIB);
}

#[test]
fn progress_never_runs_ahead_of_the_data() {
    let vm = boot!(SMALL);
    let (start, pages, window, seed) = (WORK_BASE, 4, 0, 11);
    vm.give(0, Command::Write { start, pages, window, seed, count: 0, first: 0 });
    wait_until("the vCPU writes", || vm.mailbox(0, offset::PROGRESS) > 0);
    for _ in 0..1000 {
        let done = vm.mailbox(0, offset::PROGRESS);
        for i in done.saturating_sub(50)..done {
            let op = write_op(seed, i, pages, window);
            let found = vm.load(start + op.page * PAGE_SIZE + op.slot * 8);
            assert!(model::op_of(seed, found) >= i, "operation {i} is not in memory, but progress is {done}");
        }
    }
}

#[test]
fn counting_goes_round_robin_until_interrupted() {
    let vm = boot!(SMALL);
    for (pages, stride) in [(100, 0), (3, 7)] {
        let start = WORK_BASE + stride * MIB;
        let seq = vm.give(0, Command::Count { start, pages, stride });
        // Otherwise there is no command to interrupt. The progress may be that of the command before.
        vm.wait_for(0, offset::ACK_SEQ, seq);
        wait_until("the vCPU counts on", || vm.mailbox(0, offset::PROGRESS) > 2 * pages);
        assert_eq!(vm.run(0, Command::Idle), Event::Done);
        let mut expected = vec![0; pages as usize * 512];
        model::apply_counts(&mut expected, stride, vm.mailbox(0, offset::PROGRESS));
        assert!(vm.words(start, pages) == expected, "stride {stride}");
    }
}

#[test]
fn touch_and_read_see_the_same_words() {
    let vm = boot!(SMALL);
    let (start, pages, value, seed) = (WORK_BASE, 8000, 0x55, 3);
    let mut expected = vec![0; pages as usize * 512];

    for name in ["first", "second"] {
        assert_eq!(vm.run(0, Command::Touch { start, pages, value }), Event::Done);
        let [touched, cycles, ..] = vm.result(0);
        assert_eq!(touched, pages);
        println!("TOUCH: {} cycles a page the {name} time", cycles / pages);
    }
    model::touch(&mut expected, start, value);
    assert!(vm.words(start, pages) == expected);

    assert_eq!(vm.run(0, Command::Fill { start, pages, seed }), Event::Done);
    model::fill(&mut expected, start, seed);
    for words in [0, 1, 5, 512, 1000] {
        assert_eq!(vm.run(0, Command::Read { start, pages, passes: 3, words }), Event::Done);
        let [sum, cycles, ..] = vm.result(0);
        assert_eq!(sum, model::read_sum(&expected, words).wrapping_mul(3), "{words} words a page");
        assert_eq!(vm.mailbox(0, offset::PROGRESS), 3 * pages);
        println!("READ: {} cycles a page of {words} words", cycles / pages / 3);
    }
}

#[test]
fn two_vcpus_share_a_counter() {
    let vm = boot!(Layout { vcpus: 2, ..SMALL });
    let (address, count) = (WORK_BASE + 8, 1_000_000);
    let numbers = [0, 1].map(|vcpu| vm.give(vcpu, Command::SharedCount { address, count }));
    let mut reports = [vm.report(), vm.report()];
    reports.sort_by_key(|report| report.vcpu);
    let expected = [0, 1].map(|vcpu| Report { event: Event::Done, vcpu, seq: numbers[usize::from(vcpu)] as u16 });
    assert_eq!(reports, expected);
    assert_eq!(vm.load(address), 2 * count);
}

#[test]
fn announce_interrupts_and_leaves_no_other_trace() {
    let vm = boot!(SMALL);
    vm.give(0, Command::Spin);
    // The vCPU must spin first, however long a busy host delays that: otherwise there is no command
    // to interrupt.
    wait_until("the vCPU spins", || vm.mailbox(0, offset::PROGRESS) > 0);
    let start = Instant::now();
    let seq = vm.give(0, Command::Announce);
    assert_eq!(vm.report(), Report { event: Event::Announce, vcpu: 0, seq: seq as u16 });
    println!("ANNOUNCE: {:?} to a running vCPU and back", start.elapsed());
    vm.wait_for(0, offset::DONE_SEQ, seq);
    assert_eq!(vm.status(0), Status::Interrupted);
    assert_eq!(vm.result(0)[0], vm.mailbox(0, offset::PROGRESS));
    assert!(vm.mailbox(0, offset::PROGRESS) > 0);
}

#[test]
fn a_vcpu_announces_itself_and_halts() {
    let vm = boot!(SMALL);
    let spins = vm.give(0, Command::Spin);
    vm.wait_for(0, offset::ACK_SEQ, spins);
    let seq = vm.give(0, Command::AnnounceAndHalt);
    assert_eq!(vm.report(), Report { event: Event::Announce, vcpu: 0, seq: seq as u16 });
    // This command interrupts it like any other, and later ones are not noticed.
    vm.give(0, Command::Idle);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(vm.load(mailbox_gpa(0) + offset::ACK_SEQ), spins);
}

#[test]
fn impossible_commands_are_rejected() {
    let vm = boot!(SMALL);
    for command in [
        Command::Write { start: WORK_BASE, pages: 0, window: 0, seed: 0, count: 0, first: 0 },
        Command::SharedCount { address: WORK_BASE + 1, count: 1 },
    ] {
        assert_eq!(vm.run(0, command), Event::Done);
        assert_eq!(vm.status(0), Status::Rejected);
    }
    assert_eq!(vm.run(0, Command::Fill { start: WORK_BASE, pages: 1, seed: 0 }), Event::Done);
    assert_eq!(vm.status(0), Status::Complete);
}

#[test]
fn memory_above_4_gib_is_mapped() {
    let vm = boot!(Layout { memory: 5 * GIB, vcpus: 2, ..SMALL });
    let pages = 600;
    for (vcpu, start) in [3 * GIB - pages * PAGE_SIZE, 4 * GIB, 6 * GIB - pages * PAGE_SIZE].into_iter().enumerate() {
        let vcpu = vcpu as u64 % 2;
        let mut expected = vec![0; pages as usize * 512];
        model::fill(&mut expected, start, start);
        assert_eq!(vm.run(vcpu, Command::Fill { start, pages, seed: start }), Event::Done);
        assert!(vm.words(start, pages) == expected, "at {start:#x}");
        assert_eq!(vm.run(1 - vcpu, Command::Verify { start, pages, seed: start }), Event::Done);
    }
}

#[test]
fn an_access_outside_ram_is_a_reported_fault() {
    for (address, what) in [(3 * GIB, "the PCI gap"), (64 * MIB, "past the end"), (1 << 45, "far outside")] {
        let vm = boot!(Layout { vcpus: 2, ..SMALL });
        assert_eq!(
            vm.run(1, Command::Touch { start: address - 8 * PAGE_SIZE.min(address), pages: 9, value: 0 }),
            Event::Fault
        );
        assert_eq!(vm.state(1), State::Faulted, "{what}");
        assert_eq!(vm.mailbox(1, offset::FAULT_VECTOR), 14);
        let cr2 = vm.mailbox(1, offset::FAULT_CR2);
        assert!(cr2 <= address && cr2.is_multiple_of(PAGE_SIZE), "{what}: {cr2:#x}");
        assert_eq!(vm.mailbox(1, offset::FAULT_ERROR), 0b110, "a write from ring 3 to a page that is not present");
        // The other vCPU lives on.
        assert_eq!(vm.run(0, Command::Idle), Event::Done);
    }
}

#[test]
fn a_halted_vcpu_takes_no_more_commands() {
    let vm = boot!(Layout { vcpus: 2, ..SMALL });
    let seq = vm.mailbox(0, offset::CMD_SEQ) + 1;
    assert_eq!(vm.run(0, Command::Halt), Event::Done);
    vm.give(0, Command::Idle);
    assert_eq!(vm.run(1, Command::Idle), Event::Done);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(vm.state(0), State::Halted);
    assert_eq!(vm.load(mailbox_gpa(0) + offset::ACK_SEQ), seq);
}

#[test]
fn an_idle_vcpu_uses_no_processor() {
    for irqchip in [Irqchip::Split, Irqchip::Full] {
        let vm = boot!(Layout { vcpus: 2, irqchip, ..SMALL });
        // Also after a command.
        assert_eq!(vm.run(1, Command::Idle), Event::Done);
        let before = vm.processor_time();
        std::thread::sleep(Duration::from_millis(400));
        let used = vm.processor_time() - before;
        assert!(used < Duration::from_millis(100), "{irqchip:?}: two idle vCPUs used {used:?} of 400 ms");
    }
}

#[test]
fn each_command_wakes_its_vcpu() {
    let vm = boot!(Layout { vcpus: 2, ..SMALL });
    for n in 0..4_000 {
        assert_eq!(vm.run(n % 2, Command::Idle), Event::Done);
    }
}

#[test]
fn the_doorbell_ends_no_relay() {
    let vm = boot!(Layout { vcpus: 2, ..SMALL });
    vm.give(0, Command::Relay { peer: 1, first: false });
    vm.wait_for(0, offset::PROGRESS, 1);
    for _ in 0..100 {
        vm.ring(0);
        std::thread::sleep(Duration::from_micros(200));
    }
    assert_eq!(vm.mailbox(0, offset::PROGRESS), 1, "no interrupt was relayed");
}

#[test]
fn a_doorbell_behind_a_relayed_interrupt_halts_no_vcpu() {
    let vm = boot!(Layout { vcpus: 2, ..SMALL });
    vm.give(1, Command::Relay { peer: 0, first: false });
    vm.wait_for(1, offset::PROGRESS, 1);
    vm.give(0, Command::Relay { peer: 1, first: true });
    // At each step of the relay at some time: right behind the relayed interrupt as well.
    let (mut patience, mut before) = (Patience::default(), 0);
    while before < 30_000 {
        (0..2).for_each(|vcpu| vm.ring(vcpu));
        let now = vm.mailbox(0, offset::PROGRESS);
        if now > before {
            (patience, before) = (Patience::default(), now);
        }
        assert!(patience.tick(), "the relay stands still at {now}");
    }
}

#[test]
fn an_idle_vcpu_keeps_a_relayed_interrupt_for_its_relay() {
    let vm = boot!(Layout { vcpus: 2, ..SMALL });
    // The interrupt is pending at vCPU 1 while that one is idle, and other commands come first.
    vm.give(0, Command::Relay { peer: 1, first: true });
    vm.wait_for(0, offset::PROGRESS, 1);
    for _ in 0..10 {
        assert_eq!(vm.run(1, Command::Idle), Event::Done);
    }
    vm.give(1, Command::Relay { peer: 0, first: false });
    wait_until("the interrupt is relayed on", || vm.mailbox(0, offset::PROGRESS) >= 100);
}
