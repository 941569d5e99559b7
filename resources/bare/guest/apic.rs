//! The local APIC: starting other vCPUs, and waking them by interrupts.

use crate::{
    abi::{self, MAGIC},
    commands::{Outcome, load, poll, store},
    mailbox::Mailbox,
};
use core::{arch::asm, hint, ops::ControlFlow, ptr};

const BASE: u64 = 0xfee0_0000;
/// The register for the end of an interrupt.
pub const EOI: u64 = BASE + 0xb0;
const TASK_PRIORITY: u64 = BASE + 0x80;
const SPURIOUS: u64 = BASE + 0xf0;
const LOCAL_INTERRUPT_0: u64 = BASE + 0x350;
const ICR_LOW: u64 = BASE + 0x300;
const ICR_HIGH: u64 = BASE + 0x310;

const SOFTWARE_ENABLED: u32 = 1 << 8;
const MASKED: u32 = 1 << 16;
const ASSERT: u32 = 1 << 14;
const ALL_BUT_SELF: u32 = 0b11 << 18;
const INIT: u32 = 0b101 << 8;
const STARTUP: u32 = 0b110 << 8 | (AP_START >> 12) as u32;
/// The vector of relayed interrupts: the first behind the exceptions'.
pub const WAKE: u32 = 32;
/// The task priority that holds back [`WAKE`] and lets [`abi::DOORBELL`] in: a priority class has
/// 16 vectors.
const DOORBELL_ONLY: u32 = WAKE;
const ALL: u32 = 0;
const _: () = assert!(abi::DOORBELL as u32 / 16 > WAKE / 16);

/// Address at which the other vCPUs start in real mode: a page below 1 MiB, whose number is the
/// start-up IPI's vector.
const AP_START: u64 = 0x8000;

unsafe extern "C" {
    static ap_start: u8;
    static ap_start_end: u8;

    /// Has ring 0 let interrupts in and halt until a relayed one has come.
    fn wait_for_interrupt();
    /// Has ring 0 let interrupts in and halt until the doorbell has rung. A ring before the call
    /// ends it at once.
    fn wait_for_doorbell();
}

fn write(register: u64, value: u32) {
    // SAFETY: the local APIC is mapped one to one, and the callers name registers of it.
    unsafe { (register as *mut u32).write_volatile(value) }
}

/// Lets the doorbell interrupt this vCPU. Returns whether the VMM has a local APIC.
pub fn enable() -> bool {
    const VALUE: u32 = SOFTWARE_ENABLED | 0xff;
    write(TASK_PRIORITY, DOORBELL_ONLY);
    write(SPURIOUS, VALUE);
    // Without this the PIC, which this guest does not set up, interrupts with the vectors of
    // exceptions.
    write(LOCAL_INTERRUPT_0, MASKED);
    // SAFETY: as for writes.
    unsafe { (SPURIOUS as *const u32).read_volatile() == VALUE }
}

/// Halts this vCPU until the host has rung the doorbell.
pub fn doze() {
    // SAFETY: ring 0 comes back here, with interrupts off again, after the handler has run.
    unsafe { wait_for_doorbell() }
}

fn send(peer: u64, ipi: u32) {
    write(ICR_HIGH, (peer as u32) << 24);
    write(ICR_LOW, ASSERT | ipi);
}

/// Starts all other vCPUs, by INIT and two start-up IPIs. Absent vCPUs ignore them.
///
/// KVM keeps both pending until the vCPU runs, so no wait is needed in between.
pub fn start_others() {
    // SAFETY: the page at AP_START is this program's, and the code between the symbols runs at any
    // address.
    unsafe {
        let code = &raw const ap_start;
        let length = (&raw const ap_start_end).offset_from_unsigned(code);
        ptr::copy_nonoverlapping(code, AP_START as *mut u8, length);
        // Another processor fetches this code: it must be in memory before the IPIs are sent.
        asm!("mfence", options(nostack, preserves_flags));
    }
    for ipi in [INIT, STARTUP, STARTUP] {
        write(ICR_LOW, ALL_BUT_SELF | ASSERT | ipi);
    }
}

/// See [`abi::Command::Relay`].
pub fn relay(mailbox: &Mailbox, peer: u64, first: bool) -> Outcome {
    write(TASK_PRIORITY, ALL);
    if first {
        send(peer, WAKE);
    }
    let flow = (1..).try_for_each(|n| {
        mailbox.set_progress(n);
        // SAFETY: ring 0 comes back here, with interrupts off again, after the handler has run.
        unsafe { wait_for_interrupt() };
        send(peer, WAKE);
        poll(mailbox)
    });
    // An interrupt that is still to come stays pending for the next relay.
    write(TASK_PRIORITY, DOORBELL_ONLY);
    Outcome::progress(mailbox, flow)
}

/// See [`abi::Command::Restart`].
pub fn restart(mailbox: &Mailbox, peer: u64) -> Outcome {
    let magic = abi::mailbox_gpa(peer) + abi::offset::MAGIC;
    let flow = (1..).try_for_each(|n| {
        store(magic, 0);
        [INIT, STARTUP, STARTUP].into_iter().for_each(|ipi| send(peer, ipi));
        while load(magic) != MAGIC {
            poll(mailbox)?;
            hint::spin_loop();
        }
        mailbox.set_progress(n);
        ControlFlow::Continue(())
    });
    Outcome::progress(mailbox, flow)
}
