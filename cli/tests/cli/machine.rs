//! The bare guest of a VM in a process of its own, driven through that process's socket.

use std::time::Duration;

use bytes::Bytes;
use clade_api::Client;
use clade_guests::abi::disk::{DiskRun, Order, What};
use clade_guests::abi::{Command, PAGE_SIZE, WORK_BASE};
use clade_harness::{BareVcpu, GuestWords, Machine, WordsError, bytes_of};
use clade_vmm::vm::StopReason;
use tokio::runtime::Runtime as Executor;

use crate::tool::Runtime;

/// Addresses of the disk driver's area, and of its data.
const AREA: u64 = WORK_BASE;
const BUFFER: u64 = WORK_BASE + 16 * PAGE_SIZE;

/// A VM with the bare guest.
pub(crate) struct BareVm<'a> {
    runtime: &'a Runtime,
    name: String,
    client: Client,
    executor: Executor,
}

impl<'a> BareVm<'a> {
    pub(crate) fn of(runtime: &'a Runtime, name: &str) -> Self {
        let executor = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Self { runtime, name: name.to_owned(), client: Client::new(runtime.dir()), executor }
    }

    fn command(&self, command: &str) {
        self.runtime.clade(&[command, &self.name, "--json"]).json();
    }

    /// Has the guest of a paused VM carry out a command. The VM is paused afterwards.
    pub(crate) fn run(&self, command: Command) -> [u64; 4] {
        self.command("resume");
        let done = BareVcpu::new(self, 0).await_ready().and_then(|()| BareVcpu::new(self, 0).run(command));
        self.command("pause");
        done.unwrap()
    }

    /// Has the guest of a paused VM begin a command. The VM runs on.
    pub(crate) fn begin(&self, command: Command) {
        BareVcpu::new(self, 0).mailbox().order(command).unwrap();
        self.command("resume");
    }

    /// Has the guest of a paused VM begin to read into memory that it does not have.
    pub(crate) fn misuse_disk(&self) {
        let (what, order) = (What::Read, Order::Sequential);
        let (area, buffer) = (AREA, 1 << 40);
        let run = DiskRun {
            area,
            buffer,
            stride: 0,
            what,
            order,
            depth: 1,
            sector: 0,
            sectors: 8,
            block: 8,
            count: 1,
            seed: 0,
        };
        self.begin(Command::DiskRun(run));
    }

    /// Has the guest of a paused VM open its disk.
    pub(crate) fn open_disk(&self) {
        let [sectors, ..] = self.run(Command::DiskOpen { slot: 0, area: AREA, size: 256 });
        assert!(sectors > 0, "the guest has no disk");
    }

    /// Has the guest of a paused VM write or verify sectors, in blocks of 8.
    pub(crate) fn disk(&self, what: What, sector: u64, sectors: u64, seed: u64) {
        let (order, depth, block) = (Order::Sequential, 8, 8);
        let count = sectors / block;
        let run =
            DiskRun { area: AREA, buffer: BUFFER, stride: 0, what, order, depth, sector, sectors, block, count, seed };
        let [done, errors, wrong, _] = self.run(Command::DiskRun(run));
        assert_eq!((done, errors, wrong), (count, 0, 0), "{}: {run:?}", self.name);
    }
}

impl GuestWords for BareVm<'_> {
    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), WordsError> {
        Ok(self.executor.block_on(self.client.read_memory(&self.name, address, bytes))?)
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), WordsError> {
        let bytes = Bytes::copy_from_slice(bytes);
        Ok(self.executor.block_on(self.client.write_memory(&self.name, address, bytes)).map(drop)?)
    }

    fn store_and_ring(&self, address: u64, words: &[u64], vcpu: u64) -> Result<(), WordsError> {
        let written = self.client.write_memory_and_ring(&self.name, address, bytes_of(words).into(), vcpu);
        Ok(self.executor.block_on(written).map(drop)?)
    }
}

impl Machine for BareVm<'_> {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn stopped(&self) -> Option<StopReason> {
        None
    }

    fn await_report(&self, limit: Duration) {
        std::thread::sleep(limit);
    }
}
