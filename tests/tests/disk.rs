//! Disks on real KVM: a bare guest's driver, the block device, and forks with requests in flight.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::time::{Duration, Instant};

use clade::vm::Context;
use clade_guests::abi::Command;
use clade_guests::abi::disk::{DiskRun, Order, What};
use clade_memory::Backing;
use clade_tests::{DiskFile, DiskGuest, Turn};

const PATIENCE: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;
const SECTORS: u64 = 4 * MIB / 512;

fn turn() -> Option<(Turn, Context)> {
    let turn = Turn::take(PATIENCE)?;
    let context = turn.context(Backing::Huge);
    Some((turn, context))
}

fn whole(what: What, seed: u64) -> DiskRun {
    DiskGuest::whole(what, SECTORS, seed)
}

#[test]
fn a_guest_reads_and_writes_its_disk() {
    let Some((_turn, context)) = turn() else { return };
    let file = DiskFile::new(4 * MIB, 1);
    let guest = DiskGuest::boot(&context, file.spec(), 1);
    guest.expect(whole(What::Verify, 1), "what the host wrote");
    guest.expect(DiskRun { order: Order::Random, count: 2000, ..whole(What::Verify, 1) }, "in any order");
    guest.expect(whole(What::Write, 2), "a write");
    guest.expect(DiskRun { count: 1, ..whole(What::Flush, 0) }, "a flush");
    guest.expect(whole(What::Verify, 2), "what it wrote itself");
    assert!(file.bytes() == clade_tests::words(2, 0, 4 * MIB), "the file has it");
}
