//! VMs that are suspended in the middle of I/O, and their children.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::Path;
use std::time::Duration;

use clade_guests::abi::disk::What;
use clade_memory::{Backing, SuspendFile};
use clade_test_support::wait_until;
use clade_tests::{DiskFile, DiskGuest, Turn, until_in_flight};

const DISK_BYTES: u64 = 4 << 20;
const SECTORS: u64 = DISK_BYTES / 512;
/// Long enough for a suspension to find requests in flight whenever it comes.
const LATE: Duration = Duration::from_millis(20);

#[test]
fn requests_in_flight_are_done_once_by_a_vm_that_was_suspended_and_by_its_child() {
    until_in_flight(|| {
        let Some(turn) = Turn::take() else { return };
        let context = turn.context(Backing::Huge);
        let file = DiskFile::new(DISK_BYTES, 1);
        let mut spec = file.spec();
        spec.disk.latency = Some(LATE);
        let parent = DiskGuest::boot(&context, spec, 1);
        let run = DiskGuest::whole(What::Write, SECTORS, 2);
        let seq = parent.begin(run);
        let mut child = None;
        for round in 1..6 {
            parent.await_progress(run.count * round / 8);
            // Between two batches no requests are in flight: then the VM is suspended once more.
            let mut is_first = true;
            wait_until("a suspension that gives requests up", || {
                let file = SuspendFile::create(Path::new("/dev/shm")).unwrap();
                let report = parent.vm().suspend(file).unwrap();
                assert!(report.memory.written > 0 || !is_first, "round {round}: {report:?}");
                assert_eq!(parent.vm().memory_stats().unwrap().private_kib, 0, "round {round}");
                if round == 3 {
                    // The requests given up for the suspension are in the image.
                    let (image, report) = parent.vm().fork().unwrap();
                    if report.in_flight == 0 {
                        parent.expect_running();
                    }
                    child = (report.in_flight > 0).then(|| DiskGuest::paused_child(&context, &image, "child"));
                }
                parent.vm().wake().unwrap();
                is_first = false;
                round != 3 || child.is_some()
            });
        }
        assert_eq!(parent.finish(seq), (run.count, 0, 0), "each done once, none wrong");
        parent.expect(DiskGuest::whole(What::Verify, SECTORS, 2), "what it wrote around its suspensions");
        let child = child.unwrap();
        child.vm().resume().unwrap();
        assert_eq!(child.finish(seq), (run.count, 0, 0), "the child does them again");
        child.expect(DiskGuest::whole(What::Verify, SECTORS, 2), "what was written around the fork");
        drop(parent);
        child.expect(DiskGuest::whole(What::Write, 800, 3), "it goes on without its parent");
    });
}
