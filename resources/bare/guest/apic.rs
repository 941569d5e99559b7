//! The local APIC: starting other vCPUs, and waking them by interrupts.

use crate::{
    abi::{self, MAGIC},
    commands::{Outcome, load, poll, store},
    mailbox::Mailbox,
};
use core::{arch::asm, hint, ops::ControlFlow, ptr};

const BASE: u64 = 0xfee0_0000;
/// Where the end of an interrupt is told.
pub const EOI: u64 = BASE + 0xb0;
const SPURIOUS: u64 = BASE + 0xf0;
const ICR_LOW: u64 = BASE + 0x300;
const ICR_HIGH: u64 = BASE + 0x310;

const SOFTWARE_ENABLED: u32 = 1 << 8;
const ASSERT: u32 = 1 << 14;
const ALL_BUT_SELF: u32 = 0b11 << 18;
const INIT: u32 = 0b101 << 8;
const STARTUP: u32 = 0b110 << 8 | (AP_START >> 12) as u32;
/// The vector whose handler boot.S has: the first behind the exceptions'.
const WAKE: u32 = 32;

/// Where the other vCPUs start in real mode: a page below 1 MiB, whose number is the start-up IPI's vector.
const AP_START: u64 = 0x8000;

unsafe extern "C" {
    static ap_start: u8;
    static ap_start_end: u8;

    /// Has ring 0 let interrupts in and halt until one has come.
    fn wait_for_interrupt();
}

fn write(register: u64, value: u32) {
    // SAFETY: the local APIC is mapped one to one, and the callers name registers of it.
    unsafe { (register as *mut u32).write_volatile(value) }
}

fn send(peer: u64, ipi: u32) {
    write(ICR_HIGH, (peer as u32) << 24);
    write(ICR_LOW, ASSERT | ipi);
}

/// Starts all other vCPUs, by INIT and two start-up IPIs. Those that are not there do not mind.
///
/// KVM keeps both pending until the vCPU runs, so there is nothing to wait for in between.
pub fn start_others() {
    // SAFETY: the page at AP_START is this program's, and the code between the symbols runs at any address.
    unsafe {
        let code = &raw const ap_start;
        let length = (&raw const ap_start_end).offset_from_unsigned(code);
        ptr::copy_nonoverlapping(code, AP_START as *mut u8, length);
        // The processor that fetches this is another one: it must be in memory before the IPIs are sent.
        asm!("mfence", options(nostack, preserves_flags));
    }
    for ipi in [INIT, STARTUP, STARTUP] {
        write(ICR_LOW, ALL_BUT_SELF | ASSERT | ipi);
    }
}

/// See [`abi::Command::Relay`].
pub fn relay(mailbox: &Mailbox, peer: u64, first: bool) -> Outcome {
    write(SPURIOUS, SOFTWARE_ENABLED | 0xff);
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
