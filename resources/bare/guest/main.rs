//! The bare guest: a ring 3 program with just enough ring 0 below it. `../src/abi.rs` describes it.

#![no_std]
#![no_main]

#[path = "../src/abi.rs"]
#[allow(dead_code)]
mod abi;
mod apic;
mod commands;
mod disk;
mod mailbox;
mod memory_map;
mod runtime;

use abi::{Command, Event, State, Status};
use commands::Outcome;
use core::{
    arch::global_asm,
    hint,
};
use mailbox::Mailbox;

global_asm!(
    include_str!("boot.S"),
    IMAGE_BASE = const abi::IMAGE_BASE,
    MAX_VCPUS = const abi::MAX_VCPUS,
    PER_VCPU = const abi::PER_VCPU_BASE,
    PER_VCPU_SIZE = const abi::PER_VCPU_SIZE,
    PER_VCPU_SHIFT = const abi::PER_VCPU_SIZE.trailing_zeros(),
    PML4 = const abi::PAGE_TABLES,
    MAILBOX = const abi::MAILBOX_BASE,
    ACK_SEQ = const abi::offset::ACK_SEQ,
    STATE = const abi::offset::STATE,
    FAULT_VECTOR = const abi::offset::FAULT_VECTOR,
    FAULT_ERROR = const abi::offset::FAULT_ERROR,
    FAULT_RIP = const abi::offset::FAULT_RIP,
    FAULT_CR2 = const abi::offset::FAULT_CR2,
    FAULT_RSP = const abi::offset::FAULT_RSP,
    FAULTED = const State::Faulted as u64,
    EVENT_FAULT = const Event::Fault as u8,
    REPORT_PORT = const abi::REPORT_PORT,
    APIC_EOI = const apic::EOI,
    WAKE = const apic::WAKE,
    DOORBELL = const abi::DOORBELL,
    options(att_syntax)
);

// boot.S shifts by 12 to find a mailbox, and shifts the index to find a per-vCPU area.
const _: () = assert!(abi::MAILBOX_STRIDE == 1 << 12 && abi::PER_VCPU_SIZE.is_power_of_two());

unsafe extern "C" {
    /// Has ring 0 switch to the page tables at [`abi::PAGE_TABLES`].
    fn load_page_tables();
    /// Has ring 0 halt this vCPU for good.
    fn park() -> !;
}

/// Entry from boot.S in ring 3, on every vCPU. `boot` is the vCPU's boot protocol, and decides the
/// type behind `info`.
#[unsafe(no_mangle)]
extern "C" fn ring3(index: u64, info: *const u8, boot: u32) -> ! {
    let mailbox = Mailbox::of(index);
    mailbox.start();
    if boot != 0 {
        // SAFETY: boot.S passes the loader's values, and only the first vCPU comes this way, before
        // it starts others.
        unsafe {
            memory_map::build_page_tables(boot, info);
            load_page_tables();
        }
        apic::start_others();
    }
    serve(mailbox)
}

fn serve(mailbox: Mailbox) -> ! {
    // Before the first read of the mailbox: that read finds the command of a ring that the APIC
    // drops.
    let has_doorbell = apic::enable();
    mailbox.set_state(State::Idle);
    mailbox.report(Event::Ready);
    let mut announced = 0;
    loop {
        let Some(seq) = mailbox.pending() else {
            if has_doorbell {
                apic::doze();
            } else {
                hint::spin_loop();
            }
            continue;
        };
        let command = mailbox.command();
        if announced != seq {
            announce(&mailbox, command, seq);
        }
        mailbox.take(seq);
        mailbox.touch_ring0_stack(seq);
        match command {
            Some(Command::Announce) => mailbox.end(seq, State::Done),
            Some(Command::Idle) => {
                mailbox.end(seq, State::Done);
                mailbox.report(Event::Done);
            }
            Some(Command::Halt) => {
                mailbox.end(seq, State::Halted);
                mailbox.report(Event::Done);
                // SAFETY: it stops this vCPU, and nothing waits for it.
                unsafe { park() }
            }
            Some(command) => {
                mailbox.set_progress(0);
                let Outcome { status, result } = commands::run(&mailbox, command);
                // Announced before this command's end is stored, because the stores may take the
                // host long.
                if let Some(next) = mailbox.pending()
                    && announce(&mailbox, mailbox.command(), next)
                {
                    announced = next;
                }
                mailbox.finish(seq, status, result);
            }
            None => mailbox.finish(seq, Status::Rejected, [0; 4]),
        }
    }
}

/// Reports for `command` if it asks for that, and halts if it asks for that: then the next command,
/// which may be there as soon as the host has the report, is not read. Returns whether there was a
/// report.
fn announce(mailbox: &Mailbox, command: Option<Command>, seq: u64) -> bool {
    match command {
        Some(Command::Announce) => mailbox.report_as(Event::Announce, seq),
        Some(Command::AnnounceAndHalt) => {
            mailbox.report_as(Event::Announce, seq);
            // SAFETY: it stops this vCPU, and nothing waits for it.
            unsafe { park() }
        }
        _ => return false,
    }
    true
}
