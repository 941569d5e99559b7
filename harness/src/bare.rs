//! Commands to the bare guest through its mailboxes, and answers through its reports.

use std::sync::Arc;
use std::time::{Duration, Instant};

use clade_guests::BARE_ELF;
use clade_guests::abi::{self, Command, PAGE_SIZE, WORK_BASE, mailbox_gpa};
use clade_memory::GuestRam;
use thiserror::Error;

use crate::machine::{GuestWords, Machine, WordsError};
use clade_vmm::boot::{BootImage, BootSource};
use clade_vmm::vm::{Context, StopReason, Vm, VmConfig, VmError};

/// An error of communication with the bare guest.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BareError {
    /// The VM could not be booted.
    #[error(transparent)]
    Boot(#[from] VmError),
    /// The guest did not answer in time.
    #[error("vCPU {vcpu} of {vm} did not report {wanted} within {seconds} s{}", stopped.as_ref().map(|s| format!(" ({s})")).unwrap_or_default())]
    Silent {
        /// The VM's name.
        vm: String,
        /// The vCPU's index.
        vcpu: u64,
        /// The expected report.
        wanted: &'static str,
        /// The timeout in seconds.
        seconds: u64,
        /// The reason why the VM stopped, if it did.
        stopped: Option<StopReason>,
    },
    /// The guest took an exception.
    #[error("vCPU {vcpu} of {vm} faulted: vector {vector}, error {code:#x}, at {rip:#x}, address {address:#x}")]
    Fault {
        /// The VM's name.
        vm: String,
        /// The vCPU's index.
        vcpu: u64,
        /// The exception's vector.
        vector: u64,
        /// Its error code.
        code: u64,
        /// The address of the instruction.
        rip: u64,
        /// CR2: the address of a page fault.
        address: u64,
    },
    /// The mailbox is not in guest memory.
    #[error("the mailbox of vCPU {vcpu} cannot be reached")]
    Mailbox {
        /// The vCPU's index.
        vcpu: u64,
        /// The error of the access.
        #[source]
        source: WordsError,
    },
}

// Both are written at once.
const _: () = assert!(abi::offset::ARGS == abi::offset::COMMAND + 8);
const _: () = assert!(abi::offset::COMMAND == abi::offset::CMD_SEQ + 8);

/// Time limit of the guest's answer: a starved vCPU may be late by far.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(300);

/// The mailbox of one vCPU, in a guest's memory.
#[derive(Debug)]
pub struct BareMailbox<'a, M: ?Sized = GuestRam> {
    ram: &'a M,
    vcpu: u64,
}

impl<M: ?Sized> Clone for BareMailbox<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M: ?Sized> Copy for BareMailbox<'_, M> {}

impl<'a, M: GuestWords + ?Sized> BareMailbox<'a, M> {
    /// Returns the mailbox of `vcpu` in `ram`.
    #[must_use]
    pub fn new(ram: &'a M, vcpu: u64) -> Self {
        Self { ram, vcpu }
    }

    fn get(self, offset: u64) -> Result<u64, BareError> {
        let word = self.ram.load(mailbox_gpa(self.vcpu) + offset);
        word.map_err(|source| BareError::Mailbox { vcpu: self.vcpu, source })
    }

    /// Writes words that the vCPU may wait for.
    fn put_and_ring(self, offset: u64, words: &[u64]) -> Result<(), BareError> {
        let stored = self.ram.store_and_ring(mailbox_gpa(self.vcpu) + offset, words, self.vcpu);
        stored.map_err(|source| BareError::Mailbox { vcpu: self.vcpu, source })
    }

    fn put(self, offset: u64, words: &[u64]) -> Result<(), BareError> {
        let stored = self.ram.store(mailbox_gpa(self.vcpu) + offset, words);
        stored.map_err(|source| BareError::Mailbox { vcpu: self.vcpu, source })
    }

    /// Gives the vCPU a command, in place of the one it executes. Returns the command's number.
    ///
    /// # Errors
    /// When its mailbox cannot be reached.
    pub fn order(self, command: Command) -> Result<u64, BareError> {
        let (code, args) = command.encode();
        let mut words = [code; 9];
        words[1..].copy_from_slice(&args);
        // First; the number is read after it: a read before it would be one more page fault.
        self.put(abi::offset::COMMAND, &words)?;
        let seq = self.get(abi::offset::CMD_SEQ)? + 1;
        // Last: the guest takes the command when it sees the number.
        self.put_and_ring(abi::offset::CMD_SEQ, &[seq])?;
        Ok(seq)
    }

    /// Gives the vCPU of a VM that does not run `command`, in place of the one it executes. `command` uses no
    /// arguments: the first keeps the completed operations of the replaced one, for [`Self::kept_progress`].
    ///
    /// # Errors
    /// When its mailbox cannot be reached.
    pub fn order_keeping_progress(self, command: Command) -> Result<(), BareError> {
        let (code, [_, args @ ..]) = command.encode();
        let mut words = [code; 10];
        words[0] = self.get(abi::offset::CMD_SEQ)? + 1;
        words[2] = self.get(abi::offset::PROGRESS)?;
        words[3..].copy_from_slice(&args);
        self.put_and_ring(abi::offset::CMD_SEQ, &words)
    }

    /// Returns the number of a command given by [`Self::order_keeping_progress`], and the completed operations of
    /// the command that it has replaced.
    ///
    /// # Errors
    /// When its mailbox cannot be reached.
    pub fn kept_progress(self) -> Result<(u64, u64), BareError> {
        Ok((self.get(abi::offset::CMD_SEQ)?, self.get(abi::offset::ARGS)?))
    }

    /// Returns whether the vCPU runs the bare guest, and so has a mailbox.
    ///
    /// # Errors
    /// When its mailbox cannot be reached.
    pub fn exists(self) -> Result<bool, BareError> {
        Ok(self.get(abi::offset::MAGIC)? == abi::MAGIC)
    }

    /// Returns the operations that the running command has completed.
    ///
    /// # Errors
    /// When its mailbox cannot be reached.
    pub fn progress(self) -> Result<u64, BareError> {
        self.get(abi::offset::PROGRESS)
    }

    /// Returns the number of the last completed command.
    ///
    /// # Errors
    /// When its mailbox cannot be reached.
    pub fn ended(self) -> Result<u64, BareError> {
        self.get(abi::offset::DONE_SEQ)
    }

    /// Returns the number of the last command that the vCPU has taken.
    ///
    /// # Errors
    /// When its mailbox cannot be reached.
    pub fn taken(self) -> Result<u64, BareError> {
        self.get(abi::offset::ACK_SEQ)
    }

    /// Returns whether the vCPU is in its command loop.
    ///
    /// # Errors
    /// When its mailbox cannot be reached.
    pub fn is_ready(self) -> Result<bool, BareError> {
        let booted = self.get(abi::offset::MAGIC)? == abi::MAGIC;
        Ok(booted && self.get(abi::offset::STATE)? != abi::State::Booting as u64)
    }

    /// Returns the results of the last command.
    ///
    /// # Errors
    /// When its mailbox cannot be reached.
    pub fn results(self) -> Result<[u64; 4], BareError> {
        let at = |n: u64| self.get(abi::offset::RESULT + 8 * n);
        Ok([at(0)?, at(1)?, at(2)?, at(3)?])
    }
}

/// Boots a bare guest, and waits until all its vCPUs take commands.
///
/// # Errors
/// When the VM cannot be made, or a vCPU does not become ready.
pub fn boot_bare(context: &Context, name: &str, config: &Arc<VmConfig>) -> Result<Vm, BareError> {
    let source = BootSource::new(BootImage::Bytes(BARE_ELF.into()));
    let vm = Vm::boot(context, name, config, &source)?;
    (0..u64::from(config.cpus())).try_for_each(|vcpu| BareVcpu::new(&vm, vcpu).await_ready())?;
    Ok(vm)
}

/// One vCPU of a running bare guest.
#[derive(Debug)]
pub struct BareVcpu<'a, V: ?Sized = Vm> {
    vm: &'a V,
    mailbox: BareMailbox<'a, V>,
}

impl<V: ?Sized> Clone for BareVcpu<'_, V> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<V: ?Sized> Copy for BareVcpu<'_, V> {}

impl<'a, V: Machine + ?Sized> BareVcpu<'a, V> {
    /// Returns vCPU `vcpu` of `vm`.
    #[must_use]
    pub fn new(vm: &'a V, vcpu: u64) -> Self {
        Self { vm, mailbox: BareMailbox::new(vm, vcpu) }
    }

    /// Returns its mailbox.
    #[must_use]
    pub fn mailbox(&self) -> BareMailbox<'a, V> {
        self.mailbox
    }

    /// Gives the vCPU a command and waits until it has ended. Returns its results.
    ///
    /// # Errors
    /// When the guest faults or does not answer.
    pub fn run(&self, command: Command) -> Result<[u64; 4], BareError> {
        let seq = self.mailbox.order(command)?;
        self.await_done(seq)?;
        self.mailbox.results()
    }

    /// Waits until the command with number `seq` has ended.
    ///
    /// # Errors
    /// When the guest faults or does not answer.
    pub fn await_done(&self, seq: u64) -> Result<(), BareError> {
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        while self.mailbox.get(abi::offset::DONE_SEQ)? < seq {
            self.check_fault()?;
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.vm.stopped().is_some() {
                return Err(self.silent("the end of its command"));
            }
            // The mailbox decides.
            self.vm.await_report(left.min(Duration::from_micros(500)));
        }
        Ok(())
    }

    /// Waits for the vCPU to enter its command loop.
    ///
    /// # Errors
    /// When the guest faults or does not enter it.
    pub fn await_ready(&self) -> Result<(), BareError> {
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        loop {
            if self.mailbox.is_ready()? {
                return self.check_fault();
            }
            if Instant::now() > deadline || self.vm.stopped().is_some() {
                return Err(self.silent("that it is ready"));
            }
            self.vm.await_report(Duration::from_millis(1));
        }
    }

    fn silent(&self, wanted: &'static str) -> BareError {
        let (vm, stopped) = (self.vm.name(), self.vm.stopped());
        BareError::Silent { vm, vcpu: self.mailbox.vcpu, wanted, seconds: ANSWER_TIMEOUT.as_secs(), stopped }
    }

    fn check_fault(&self) -> Result<(), BareError> {
        if self.mailbox.get(abi::offset::STATE)? != abi::State::Faulted as u64 {
            return Ok(());
        }
        Err(BareError::Fault {
            vm: self.vm.name(),
            vcpu: self.mailbox.vcpu,
            vector: self.mailbox.get(abi::offset::FAULT_VECTOR)?,
            code: self.mailbox.get(abi::offset::FAULT_ERROR)?,
            rip: self.mailbox.get(abi::offset::FAULT_RIP)?,
            address: self.mailbox.get(abi::offset::FAULT_CR2)?,
        })
    }
}

impl BareVcpu<'_> {
    /// Waits for a report of `event` from this vCPU. Returns the time of its arrival.
    ///
    /// # Errors
    /// When the guest faults or does not report it.
    pub fn await_event(&self, event: abi::Event) -> Result<Instant, BareError> {
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.vm.reports().next(left.min(Duration::from_millis(100))) {
                Some(report) => {
                    let told = abi::Report::decode(report.word);
                    if told.is_some_and(|told| told.event == event && u64::from(told.vcpu) == self.mailbox.vcpu) {
                        return Ok(report.at);
                    }
                }
                None if left.is_zero() || self.vm.stopped().is_some() => return Err(self.silent("an event")),
                None => {}
            }
            self.check_fault()?;
        }
    }
}

/// Larger guests are sparse: a copy of all their written pages, which is a baseline, must fit on
/// the host beside them.
pub const MOST_FILLED: u64 = 4 << 30;

/// The seed of the words of [`fill`].
pub const FILL_SEED: u64 = 1;

/// Has the guest fill all its RAM above its own image, as far as [`MOST_FILLED`].
///
/// # Errors
/// As [`BareVcpu::run`].
pub fn fill(vm: &Vm, config: &VmConfig) -> Result<(), BareError> {
    let vcpu = BareVcpu::new(vm, 0);
    let mut left = MOST_FILLED / PAGE_SIZE;
    for (base, pages) in config.layout().ranges() {
        let start = base.0.max(WORK_BASE);
        let pages = (pages - (start - base.0) / PAGE_SIZE).min(left);
        left -= pages;
        if pages > 0 {
            vcpu.run(Command::Fill { start, pages, seed: FILL_SEED })?;
        }
    }
    Ok(())
}
