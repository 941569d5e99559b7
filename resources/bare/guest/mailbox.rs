//! This vCPU's mailbox: every access is one volatile load or store, which x86 keeps in program
//! order.

use crate::abi::{self, Command, Event, MAGIC, REPORT_PORT, Report, State, Status};
use core::arch::asm;

/// A vCPU's own mailbox.
pub struct Mailbox {
    at: *mut abi::Mailbox,
}

macro_rules! load {
    ($self:ident . $field:ident) => {
        // SAFETY: the page is mapped for as long as the guest lives, and its words may change at
        // any time.
        unsafe { (&raw const (*$self.at).$field).read_volatile() }
    };
}

macro_rules! store {
    ($self:ident . $field:ident = $value:expr) => {{
        let value = $value;
        // SAFETY: as for loads; only this vCPU writes the fields that are stored to here.
        unsafe { (&raw mut (*$self.at).$field).write_volatile(value) }
    }};
}

impl Mailbox {
    pub fn of(index: u64) -> Self {
        Self { at: abi::mailbox_gpa(index) as *mut abi::Mailbox }
    }

    /// Returns the vCPU's index, from the address, which a loop has in a register.
    #[inline(always)]
    fn index(&self) -> u8 {
        ((self.at as u64 - abi::MAILBOX_BASE) / abi::MAILBOX_STRIDE) as u8
    }

    /// Sets all fields that the guest owns. The host's stay: a command may be there before the
    /// guest boots.
    pub fn start(&self) {
        store!(self.state = State::Booting as u64);
        store!(self.ack_seq = 0);
        store!(self.done_seq = 0);
        store!(self.status = Status::None as u64);
        store!(self.progress = 0);
        store!(self.result = [0; 4]);
        store!(self.magic = MAGIC);
    }

    /// Returns the number of a command that was not taken yet.
    #[inline(always)]
    pub fn pending(&self) -> Option<u64> {
        let seq = load!(self.cmd_seq);
        (seq != load!(self.ack_seq)).then_some(seq)
    }

    /// Returns the command: once per command, since the host may change it as soon as it is taken.
    pub fn command(&self) -> Option<Command> {
        Command::decode(load!(self.command), load!(self.args))
    }

    /// Returns whether the command is [`Command::AnnounceAndHalt`].
    #[inline(always)]
    pub fn is_announce_and_halt(&self) -> bool {
        const CODE: u64 = Command::AnnounceAndHalt.encode().0;
        load!(self.command) == CODE
    }

    pub fn take(&self, seq: u64) {
        store!(self.state = State::Running as u64);
        store!(self.ack_seq = seq);
    }

    /// Writes to the page of this vCPU's ring 0 stack, as a wait for the doorbell does. Whether the
    /// vCPU has waited since a command then makes no difference to the pages that it has written.
    pub fn touch_ring0_stack(&self, seq: u64) {
        // Between the task state segment and the stack.
        const UNUSED: u64 = 1024;
        let area = abi::PER_VCPU_BASE + u64::from(self.index()) * abi::PER_VCPU_SIZE;
        // SAFETY: the page is this vCPU's, and nothing else is at this offset.
        unsafe { ((area + UNUSED) as *mut u64).write_volatile(seq) };
    }

    pub fn set_state(&self, state: State) {
        store!(self.state = state as u64);
    }

    #[inline(always)]
    pub fn set_progress(&self, progress: u64) {
        store!(self.progress = progress);
    }

    pub fn progress(&self) -> u64 {
        load!(self.progress)
    }

    pub fn end(&self, seq: u64, state: State) {
        store!(self.done_seq = seq);
        self.set_state(state);
    }

    /// Ends a command that has a status, and reports it. An interrupted one is not reported: the
    /// host knows.
    pub fn finish(&self, seq: u64, status: Status, result: [u64; 4]) {
        store!(self.status = status as u64);
        store!(self.result = result);
        self.end(seq, State::Done);
        match status {
            Status::Interrupted => {}
            Status::Mismatch => self.report(Event::Mismatch),
            _ => self.report(Event::Done),
        }
    }

    pub fn report(&self, event: Event) {
        self.report_as(event, load!(self.ack_seq));
    }

    #[inline(always)]
    pub fn report_as(&self, event: Event, seq: u64) {
        let report = Report { event, vcpu: self.index(), seq: seq as u16 };
        // SAFETY: the port only reports. The asm is not `nomem`: earlier stores stay before it.
        unsafe {
            asm!("out dx, eax", in("dx") REPORT_PORT, in("eax") report.encode(), options(nostack, preserves_flags))
        };
    }
}
