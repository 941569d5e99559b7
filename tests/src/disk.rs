//! Bare guests with a disk, and the disk's file.

use std::cell::Cell;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clade_block::DiskConfig;
use clade_devices::virtio::block::BlockOptions;
use clade_guests::abi::disk::{DiskRun, Order, What, pattern};
use clade_guests::abi::{Command, PAGE_SIZE, WORK_BASE};
use clade_harness::{BareMailbox, BareVcpu};
use clade_test_support::{wait_for, wait_until};
use clade_vmm::vm::{ChildOptions, Context, DiskSpec, ForkImage, Vm, VmConfig};

use crate::Guest;

/// Most runs of a test until a fork has found requests in flight.
const MAX_TRIES: u32 = 20;
/// Address of the driver's area.
const AREA: u64 = WORK_BASE;
/// Address of the data.
const BUFFER: u64 = WORK_BASE + 16 * PAGE_SIZE;

/// A directory with a disk's file in it.
#[derive(Debug)]
pub struct DiskFile {
    dir: tempfile::TempDir,
    path: PathBuf,
}

impl DiskFile {
    /// Makes a disk of `bytes` bytes that holds the words of `seed`.
    ///
    /// # Panics
    /// When it cannot be written.
    #[must_use]
    pub fn new(bytes: u64, seed: u64) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("disk.img");
        fs::write(&path, words(seed, 0, bytes)).expect("a disk");
        Self { dir, path }
    }

    /// Returns the file's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns a path in the same directory.
    #[must_use]
    pub fn beside(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Returns the disk's configuration for a VM.
    #[must_use]
    pub fn spec(&self) -> DiskSpec {
        DiskSpec { disk: DiskConfig::new(&self.path), device: BlockOptions::default() }
    }

    /// Returns its bytes.
    ///
    /// # Panics
    /// When it cannot be read.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        fs::read(&self.path).expect("the disk")
    }
}

/// Returns the words of `seed` at `bytes` bytes from byte `offset` of a disk.
#[must_use]
pub fn words(seed: u64, offset: u64, bytes: u64) -> Vec<u8> {
    let mut all = vec![0; bytes as usize];
    pattern(&mut all, seed, offset / 512);
    all
}

/// A bare guest with a disk, paused except while it works.
#[derive(Debug)]
pub struct DiskGuest {
    /// The guest.
    pub guest: Guest,
}

impl DiskGuest {
    /// Address of the driver's area.
    pub const AREA: u64 = AREA;

    /// Boots a guest whose driver has opened the disk, and whose memory outside the driver's was
    /// written by the guest.
    ///
    /// # Panics
    /// When it does not boot, or the driver does not find the disk.
    #[must_use]
    pub fn boot(context: &Context, disk: DiskSpec, cpus: u64) -> Self {
        let mut config = VmConfig::bare(48 << 20, cpus).expect("a configuration");
        let size = fs::metadata(&disk.disk.path).expect("the disk").len();
        config.disks = vec![disk];
        let this = Self { guest: Guest::boot_as(context, config) };
        let [sectors, features, status, _] = this.open();
        assert_eq!(sectors, size / 512);
        assert_eq!((features >> 32 & 1, status), (1, 15), "VERSION_1, and ready");
        this
    }

    /// Has the driver open the disk.
    pub fn open(&self) -> [u64; 4] {
        self.guest.run(Command::DiskOpen { slot: 0, area: AREA, size: 256 })
    }

    /// Returns a run over the disk's first `sectors` sectors, sequential and once, in blocks of 8
    /// sectors, 32 at a time.
    #[must_use]
    pub fn whole(what: What, sectors: u64, seed: u64) -> DiskRun {
        let (order, block) = (Order::Sequential, 8.min(sectors));
        DiskRun {
            area: AREA,
            buffer: BUFFER,
            stride: 0,
            what,
            order,
            depth: 32,
            sector: 0,
            sectors,
            block,
            count: sectors / block,
            seed,
        }
    }

    /// Carries out a run, and returns operations, errors and wrong words.
    pub fn run(&self, run: DiskRun) -> (u64, u64, u64) {
        let [done, errors, wrong, _] = self.guest.run(Command::DiskRun(run));
        (done, errors, wrong)
    }

    /// Carries out a run, and expects every operation to succeed and every word to be right.
    ///
    /// # Panics
    /// When one fails, or is wrong.
    pub fn expect(&self, run: DiskRun, what: &str) {
        assert_eq!(self.run(run), (run.count, 0, 0), "{what}: operations, errors, wrong words of {run:?}");
    }

    /// Makes a paused child of `image`.
    #[must_use]
    pub fn child(context: &Context, image: &Arc<ForkImage>) -> Self {
        Self { guest: Guest::child(context, image) }
    }

    /// Returns the VM.
    #[must_use]
    pub fn vm(&self) -> &Vm {
        self.guest.vm()
    }

    /// Begins a run and leaves the guest running. Returns the command's number.
    ///
    /// # Panics
    /// When the command cannot be given.
    #[must_use]
    pub fn begin(&self, run: DiskRun) -> u64 {
        let seq = BareMailbox::new(self.vm(), 0).order(Command::DiskRun(run)).expect("an order");
        self.vm().resume().expect("a paused VM runs on");
        seq
    }

    /// Waits for the end of a run that began here or in the parent, and pauses.
    ///
    /// # Panics
    /// When it does not end.
    pub fn finish(&self, seq: u64) -> (u64, u64, u64) {
        // A child is paused; a parent may run.
        let _ = self.vm().resume();
        let vcpu = BareVcpu::new(self.vm(), 0);
        vcpu.await_done(seq).expect("the run ends");
        let [done, errors, wrong, _] = vcpu.mailbox().results().expect("results");
        self.vm().pause().expect("a running VM pauses");
        (done, errors, wrong)
    }

    /// Waits until `done` operations of a running guest's run are done.
    ///
    /// # Panics
    /// When the run makes no progress.
    pub fn await_progress(&self, done: u64) {
        let vcpu = BareVcpu::new(self.vm(), 0);
        let progress = || vcpu.mailbox().progress().expect("the guest's progress");
        wait_until("the run gets on", || progress() >= done);
    }

    /// Forks a running guest once `done` operations of its run are done and others are in flight.
    /// Between two batches no requests are in flight. For a test run by [`until_in_flight`].
    ///
    /// # Panics
    /// When the run ends before.
    #[must_use]
    pub fn fork_in_flight(&self, done: u64) -> Arc<ForkImage> {
        self.await_progress(done);
        wait_for("a fork with requests in flight", || {
            let (image, report) = self.vm().fork().expect("a running VM is forked");
            if report.in_flight == 0 {
                self.expect_running();
            }
            (report.in_flight > 0).then_some(image)
        })
    }

    /// Checks that the current run has not ended.
    ///
    /// # Panics
    /// When it has. [`until_in_flight`] runs the test again.
    pub fn expect_running(&self) {
        let vcpu = BareVcpu::new(self.vm(), 0);
        let [ended, taken] = [vcpu.mailbox().ended(), vcpu.mailbox().taken()].map(|seq| seq.expect("the mailbox"));
        if ended >= taken {
            RUN_IS_OVER.set(true);
            panic!("the run is over before it was forked with requests in flight");
        }
    }

    /// Interrupts a run of a running guest, waits until its operations have ended, and pauses.
    /// Returns its results.
    ///
    /// # Panics
    /// When it does not end.
    pub fn stop_run(&self) -> [u64; 4] {
        let vcpu = BareVcpu::new(self.vm(), 0);
        vcpu.run(Command::Idle).expect("the guest answers");
        let results = vcpu.mailbox().results().expect("results");
        self.vm().pause().expect("a running VM pauses");
        results
    }

    /// Makes a paused child that continues its parent's command.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn paused_child(context: &Context, image: &Arc<ForkImage>, name: &str) -> Self {
        let options = ChildOptions { paused: true, erase: &[], before_start: None };
        Self { guest: Vm::from_image(context, name, image, options).expect("a child").into() }
    }
}

thread_local! {
    /// Whether a run ended before this thread forked it.
    static RUN_IS_OVER: Cell<bool> = const { Cell::new(false) };
}

/// Runs a test that forks a disk's run in the middle. On a machine where this thread stands still
/// while the guest's goes on, the run may end first: then the test is run again, at most
/// `MAX_TRIES` times in all.
pub fn until_in_flight(test: impl Fn()) {
    for tried in 1.. {
        RUN_IS_OVER.set(false);
        let Err(panic) = catch_unwind(AssertUnwindSafe(&test)) else { return };
        if !RUN_IS_OVER.get() || tried == MAX_TRIES {
            resume_unwind(panic);
        }
    }
}
