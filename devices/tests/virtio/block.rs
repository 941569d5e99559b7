//! The block device: requests, limits, resets, and forks with requests in flight.

use std::time::{Duration, Instant};

use clade_devices::virtio::block::BlockOptions;
use clade_devices::virtio::limiter::{Limits, Rate};
use clade_devices::virtio::regs;
use clade_host_io::Gate;
use clade_test_support::{wait_until, wait_until_within};

use crate::driver::{File, Machine, NEEDS_RESET, OK, SOON, wait_in_flight};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

#[test]
fn requests_are_done_and_answered() {
    let file = File::new(1 << 20);
    let mut config = file.config();
    config.id = Some("the-disk".to_owned());
    let mut machine = Machine::started(&config);
    assert_eq!(machine.one(IN, 7, 1536), (0, 1537));
    let read = machine.bytes(machine.data(0), 1536);
    assert!(read[..512] == [7; 512] && read[1024..] == [9; 512]);
    machine.put(machine.data(0), &[0x5a; 1024]);
    assert_eq!(machine.one(OUT, 8, 1024), (0, 1));
    assert_eq!(machine.one(FLUSH, 0, 0), (0, 1));
    assert_eq!(std::fs::read(&file.path).unwrap()[8 * 512..10 * 512], [0x5a; 1024]);
    assert_eq!(machine.one(GET_ID, 0, 20), (0, 21));
    assert_eq!(machine.bytes(machine.data(0), 20), *b"the-disk\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(machine.one(77, 0, 512), (2, 1), "unknown: unsupported");
    for (sector, len) in [(2047, 1024), (2048, 512), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 100), (0, 0)] {
        assert_eq!(machine.one(IN, sector, len), (1, 1), "{len} bytes at sector {sector}");
    }
    assert_eq!(machine.read(regs::STATUS), OK, "none of it is a reason to give up");
}

#[test]
fn a_fork_hands_over_what_is_in_flight_and_nothing_else() {
    let file = File::new(1 << 20);
    let mut parent = Machine::started(&file.config());
    assert_eq!(parent.one(IN, 1, 512), (0, 513), "one is done before");
    let gate = file.gate();
    for n in 0..8 {
        if n % 2 == 1 {
            parent.put(parent.data(n), &[0xc0 + n as u8; 4096]);
        }
        let head = parent.request(n, u32::from(n % 2), u64::from(n) * 8, 4096);
        parent.offer(head);
    }
    parent.kick();
    wait_in_flight(&parent, 8);
    let image = parent.fork();
    assert_eq!(image.in_flight(), 8);
    let json = serde_json::to_string(&image.state).unwrap();
    assert_eq!(serde_json::from_str::<clade_devices::virtio::TransportState>(&json).unwrap(), image.state);

    gate.open();
    parent.expect_eight();
    // The parent's later use of its buffers does not affect the child.
    for n in 0..8 {
        parent.put(parent.data(n), &[0xff; 4096]);
    }
    let mut child = image.child();
    assert_eq!(child.next_used(Duration::from_millis(150)), None, "it stands still until it is let go");
    child.device.resume();
    child.expect_eight();
    for n in [1, 3, 5, 7u8] {
        for machine in [&mut parent, &mut child] {
            assert_eq!(machine.one(IN, u64::from(n) * 8, 4096), (0, 4097));
            assert!(machine.bytes(machine.data(0), 4096) == [0xc0 + n; 4096], "{n}");
        }
    }
}

/// A machine with 8 requests in flight: reads to even pages, writes of the byte `0xc0 + n` from odd
/// ones. They proceed when the gate is opened.
fn with_eight_in_flight(file: &File) -> (Machine, Gate) {
    let mut machine = Machine::started(&file.config());
    let gate = file.gate();
    for n in 0..8 {
        if n % 2 == 1 {
            machine.put(machine.data(n), &[0xc0 + n as u8; 4096]);
        }
        let head = machine.request(n, u32::from(n % 2), u64::from(n) * 8, 4096);
        machine.offer(head);
    }
    machine.kick();
    wait_in_flight(&machine, 8);
    (machine, gate)
}

#[test]
fn a_machine_that_is_put_back_does_what_was_in_flight_then_and_forgets_the_rest() {
    let file = File::new(1 << 20);
    let (mut machine, gate) = with_eight_in_flight(&file);
    let image = machine.fork();
    gate.open();
    machine.expect_eight();
    for sector in [800, 8] {
        machine.put(machine.data(0), &[0x66; 4096]);
        assert_eq!(machine.one(OUT, sector, 4096), (0, 1), "one is written");
    }
    let gate = file.gate();
    machine.put(machine.data(9), &[0x77; 4096]);
    let head = machine.request(9, OUT, 900, 4096);
    machine.offer(head);
    machine.kick();
    for _ in 0..2 {
        // In the middle of that request, and then in the middle of the eight.
        image.rewind(&mut machine);
        assert_eq!(machine.ram.stats().unwrap().pinned, 0);
        assert_eq!(machine.next_used(Duration::from_millis(100)), None, "it stands still until it is let go");
        machine.device.resume();
        wait_in_flight(&machine, 8);
    }
    gate.open();
    machine.expect_eight();
    for sector in [800, 900] {
        assert_eq!(machine.one(IN, sector, 4096), (0, 4097));
        assert!(machine.bytes(machine.data(0), 512) == [sector as u8; 512], "what it wrote since is gone");
    }
    assert_eq!(machine.one(IN, 8, 4096), (0, 4097));
    assert!(machine.bytes(machine.data(0), 4096) == [0xc1; 4096], "what was being written then is there");
}

#[test]
fn what_was_given_up_for_nothing_is_done_again() {
    let file = File::new(1 << 20);
    let (mut machine, gate) = with_eight_in_flight(&file);
    machine.device.quiesce();
    assert!(machine.device.halt(SOON));
    assert_eq!(machine.ram.stats().unwrap().pinned, 0, "the kernel is busy with nothing");
    assert_eq!(machine.fork().in_flight(), 8, "and all of it is still in flight");
    assert_eq!(machine.next_used(Duration::from_millis(50)), None);
    machine.device.resume();
    gate.open();
    machine.expect_eight();
}

#[test]
fn what_the_disk_writes_to_is_pinned_and_its_own_also_where_it_was_shared() {
    let file = File::new(1 << 20);
    let parent = Machine::started(&file.config());
    parent.put(parent.data(0), &[0x11; 8192]);
    let mut child = parent.fork().child();
    child.device.resume();
    assert_eq!(child.ram.stats().unwrap().pinned, 0);
    // Two pages, both still shared with the parent.
    let gate = file.gate();
    let head = child.request(0, IN, 8, 8192);
    child.offer(head);
    child.kick();
    wait_in_flight(&child, 1);
    // The fork that has seen the request in flight has halted it, and the device's thread submits it again.
    wait_until("I3: both pages are pinned while the kernel has their address", || {
        child.ram.stats().unwrap().pinned == 2
    });
    gate.open();
    assert_eq!(child.next_used(SOON), Some((0, 8193)));
    assert_eq!(child.bytes(child.data(0), 512), [8; 512]);
    assert_eq!(child.ram.stats().unwrap().pinned, 0);
    assert!(parent.bytes(parent.data(0), 8192) == [0x11; 8192], "the parent's pages are the parent's");
}

#[test]
fn a_reset_ends_what_is_in_flight_and_does_not_wait_for_it() {
    let file = File::new(1 << 20);
    let mut machine = Machine::started(&file.config());
    // The gate stays closed: only a cancellation ends the request.
    let _gate = file.gate();
    machine.put(machine.data(0), &[0x77; 4096]);
    let head = machine.request(0, IN, 8, 4096);
    machine.offer(head);
    machine.kick();
    wait_in_flight(&machine, 1);
    machine.write(regs::STATUS, 0);
    // A device that has not cancelled the request within its patience goes on at the driver's next look.
    // Each look lasts for that patience, two seconds, and counts as 200 ms.
    wait_until_within(Duration::from_secs(12), "the status is 0", || machine.read(regs::STATUS) == 0);
    assert_eq!((machine.bytes(machine.data(0), 4096), machine.status_of(0)), (vec![0x77; 4096], 0xee));
    assert_eq!(machine.ram.stats().unwrap().pinned, 0, "no page stays pinned");
}

#[test]
fn limits_hold_across_requests() {
    let file = File::new(1 << 20);
    let rate = Rate { per_second: 50, burst: Some(5), once: 0 };
    let limits = Limits { operations: Some(rate), bytes: None };
    let mut machine = Machine::new(&file.config(), BlockOptions { queues: 1, limits });
    machine.start();
    let begun = Instant::now();
    for n in 0..15 {
        assert_eq!(machine.one(IN, n, 512), (0, 513));
    }
    // Ten beyond the burst, at 50 a second.
    assert!(begun.elapsed() >= Duration::from_millis(180), "{:?}", begun.elapsed());
    // A request that waits for the limiter is in flight like any other.
    let head = machine.request(0, IN, 5, 512);
    machine.offer(head);
    machine.kick();
    let image = (0..50).map(|_| machine.fork()).find(|image| image.in_flight() == 1);
    if let Some(image) = image {
        let mut child = image.child();
        child.device.resume();
        assert_eq!(child.next_used(SOON), Some((0, 513)));
    }
    assert_eq!(machine.next_used(SOON), Some((0, 513)));
}

#[test]
fn a_reset_fills_no_bucket() {
    let file = File::new(1 << 20);
    let rate = Rate { per_second: 1, burst: Some(1), once: 8 };
    let limits = Limits { operations: Some(rate), bytes: None };
    let begun = Instant::now();
    let mut machine = Machine::new(&file.config(), BlockOptions { queues: 1, limits });
    for _ in 0..5 {
        machine.start();
        for n in 0..2 {
            assert_eq!(machine.one(IN, n, 512), (0, 513));
        }
    }
    // Nine requests take all that there is: the tenth waits until a second has passed.
    assert!(begun.elapsed() >= Duration::from_millis(990), "{:?}", begun.elapsed());
}

#[test]
fn queues_work_side_by_side() {
    let file = File::new(1 << 20);
    let mut machine = Machine::new(&file.config(), BlockOptions { queues: 4, limits: Limits::default() });
    machine.start();
    let mut queues = [0; 2];
    clade_devices::MmioDevice::read(&machine.device, regs::CONFIG + 34, &mut queues);
    assert_eq!(u16::from_le_bytes(queues), 4);
    assert_eq!(machine.one(IN, 3, 512), (0, 513));
    machine.write(regs::QUEUE_NOTIFY, 3);
    machine.write(regs::QUEUE_NOTIFY, 4);
    assert_eq!(machine.one(IN, 4, 512), (0, 513));
    assert_eq!(machine.read(regs::STATUS) & NEEDS_RESET, 0, "a queue that has nothing, and one that is not there");
}
