//! Chains in indirect tables: executed like others, repeated like others, and refused if they break
//! the rules.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clade_devices::virtio::{QueueError, QueueState, Virtqueue, regs};
use clade_host_io::Gate;
use clade_memory::{GuestRam, RamLayout, Store};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{
    File, INDIRECT, INDIRECT_DESC, Machine, NEEDS_RESET, NEXT, OK, RAM, RINGS, SIZE, SOON, WRITE, descriptor, ram,
    wait_in_flight,
};
use crate::hostile::{FREE, expect_refusal};

const IN: u32 = 0;
const OUT: u32 = 1;
/// Address of the tables.
const TABLES: u64 = 0x70_0000;

/// Executes the request that is described at `n`.
fn finish(machine: &mut Machine, n: u16) -> (u8, u32) {
    machine.offer(n * 3);
    machine.kick();
    let (id, written) = machine.next_used(SOON).expect("it is given back");
    assert_eq!(id, u32::from(n) * 3);
    (machine.status_of(n), written)
}

/// One request, in a table of its own.
fn one(machine: &mut Machine, kind: u32, sector: u64, len: u32) -> (u8, u32) {
    machine.request(0, kind, sector, len);
    machine.fold(0, 0, TABLES);
    finish(machine, 0)
}

#[test]
fn requests_in_tables_are_done_and_answered() {
    let file = File::new(1 << 20);
    let mut machine = Machine::started(&file.config());
    // All descriptors in the table, or all after the header, or the status alone; also in unaligned
    // tables.
    for direct in 0..3 {
        for at in [TABLES, TABLES + 1, TABLES + 0xffe, RAM - 48] {
            let sector = 7 + 8 * u64::from(direct) + at % 7;
            machine.request(0, IN, sector, 1536);
            machine.fold(0, direct, at);
            assert_eq!(finish(&mut machine, 0), (0, 1537), "{direct} direct, table at {at:#x}");
            let read = machine.bytes(machine.data(0), 1536);
            assert!((0..3).all(|s| read[s * 512..][..512] == [sector as u8 + s as u8; 512]), "{direct}, {at:#x}");
        }
    }
    machine.put(machine.data(0), &[0x5a; 1024]);
    assert_eq!(one(&mut machine, OUT, 8, 1024), (0, 1));
    let disk = std::fs::read(&file.path).unwrap();
    assert!(disk[8 * 512..10 * 512] == [0x5a; 1024] && disk[7 * 512] == 7 && disk[10 * 512] == 10);
    assert_eq!(one(&mut machine, IN, 2048, 512), (1, 1), "beyond the disk");
    assert_eq!(machine.read(regs::STATUS), OK);
    assert_eq!(machine.ram.stats().unwrap().pinned, 0);
}

#[test]
fn tables_are_as_the_driver_likes_them_within_the_rules() {
    let file = File::new(1 << 20);
    let mut machine = Machine::started(&file.config());
    let header = machine.data(0) - 0x1000;
    machine.request(0, IN, 3, 512);
    // The write flag of a table's descriptor is ignored.
    machine.fold(0, 0, TABLES);
    machine.describe(0, TABLES, 48, INDIRECT | WRITE, 0);
    assert_eq!(finish(&mut machine, 0), (0, 513));
    assert_eq!(machine.bytes(machine.data(0), 512), [3; 512]);
    // Out of order, with unused descriptors in between.
    machine.request(0, IN, 4, 512);
    let nonsense = (u64::MAX, 0, INDIRECT | NEXT, 0xffff);
    let [data, status] = [(machine.data(0), 512, WRITE | NEXT, 1), (header + 16, 1, WRITE, 0)];
    machine.table(TABLES, &[(header, 16, NEXT, 4), status, nonsense, nonsense, data]);
    machine.describe(0, TABLES, 80, INDIRECT, 0);
    assert_eq!(finish(&mut machine, 0), (0, 513));
    assert_eq!(machine.bytes(machine.data(0), 512), [4; 512]);
    // As many buffers as the queue has descriptors; a few of them direct, or none.
    for direct in [0, 1, 5] {
        machine.request(0, IN, 16, 512);
        let all: Vec<_> = (0..SIZE)
            .map(|n| match n {
                0 => (header, 16, NEXT),
                n if n == SIZE - 1 => (header + 16, 1, WRITE),
                n => (FREE + u64::from(n) * 4096, 512, WRITE | NEXT),
            })
            .collect();
        for (n, &(at, len, flags)) in (0u16..).zip(&all[..direct]) {
            machine.describe(n, at, len, flags, n + 1);
        }
        let table: Vec<_> = (1..).zip(&all[direct..]).map(|(next, &(at, len, flags))| (at, len, flags, next)).collect();
        machine.table(TABLES, &table);
        machine.describe(direct as u16, TABLES, table.len() as u32 * 16, INDIRECT, 0);
        let bytes = u32::from(SIZE - 2) * 512;
        assert_eq!(finish(&mut machine, 0), (0, bytes + 1), "{direct} direct");
        for n in 1..SIZE - 1 {
            assert_eq!(machine.bytes(FREE + u64::from(n) * 4096, 512), [15 + n as u8; 512]);
        }
        // One more is too many, although the table alone is short enough.
        if direct > 0 {
            let mut table: Vec<_> =
                table.into_iter().map(|(at, len, flags, next)| (at, len, flags, next + 1)).collect();
            table.insert(0, (FREE, 512, WRITE | NEXT, 1));
            machine.request(0, IN, 16, 512);
            (0..direct as u16).for_each(|n| machine.describe(n, header, 16, NEXT, n + 1));
            machine.table(TABLES, &table);
            machine.describe(direct as u16, TABLES, table.len() as u32 * 16, INDIRECT, 0);
            machine.offer(0);
            expect_refusal(&mut machine, "a table that is short enough behind too many direct buffers");
        }
    }
}

/// A machine with 8 requests in tables in flight: reads to even pages, writes of the byte `0xc0 +
/// n` from odd ones.
fn with_eight_in_flight(file: &File) -> (Machine, Gate) {
    let mut machine = Machine::started(&file.config());
    let gate = file.gate();
    for n in 0..8 {
        machine.put(machine.data(n), &[if n % 2 == 1 { 0xc0 + n as u8 } else { 0 }; 4096]);
        machine.request(n, u32::from(n % 2), u64::from(n) * 8, 4096);
        let head = machine.fold(n, n % 3, TABLES + u64::from(n) * 48);
        machine.offer(head);
    }
    machine.kick();
    wait_in_flight(&machine, 8);
    (machine, gate)
}

/// Checks that the writes of the 8 are on the disk. Reads through a table, which needs the feature.
fn expect_written(machine: &mut Machine) {
    for n in [1, 3, 5, 7u8] {
        assert_eq!(one(machine, IN, u64::from(n) * 8, 4096), (0, 4097));
        assert!(machine.bytes(machine.data(0), 4096) == [0xc0 + n; 4096], "{n}");
    }
}

#[test]
fn a_child_walks_the_tables_of_what_is_in_flight_in_its_own_memory() {
    let file = File::new(1 << 20);
    let (mut parent, gate) = with_eight_in_flight(&file);
    let image = parent.fork();
    assert_eq!(image.in_flight(), 8);
    gate.open();
    parent.expect_eight();
    // The parent's later use of its tables and buffers does not affect the child.
    parent.put(TABLES, &[0xff; 4096]);
    (0..8).for_each(|n| parent.put(parent.data(n), &[0xff; 4096]));
    let mut child = image.child();
    child.device.resume();
    child.expect_eight();
    for machine in [&mut parent, &mut child] {
        expect_written(machine);
    }
}

#[test]
fn a_machine_that_is_put_back_does_what_was_in_flight_in_tables_again() {
    let file = File::new(1 << 20);
    let (mut machine, gate) = with_eight_in_flight(&file);
    let image = machine.fork();
    gate.open();
    machine.expect_eight();
    // Even if its driver has declined tables since.
    for declined in [0, INDIRECT_DESC] {
        machine.put(TABLES, &[0xff; 4096]);
        machine.declined = declined;
        machine.start();
        image.rewind(&mut machine);
        machine.device.resume();
        machine.expect_eight();
        expect_written(&mut machine);
    }
}

#[test]
fn a_driver_that_did_not_choose_tables_has_none_and_nor_have_its_children() {
    let file = File::new(1 << 20);
    let mut machine = Machine::started(&file.config());
    assert_eq!(machine.negotiate() & INDIRECT_DESC, INDIRECT_DESC, "it is offered");
    machine.declined = INDIRECT_DESC;
    machine.start();
    assert_eq!(machine.one(IN, 5, 512), (0, 513));
    let mut child = machine.fork().child();
    child.device.resume();
    for machine in [&mut machine, &mut child] {
        machine.request(0, IN, 0, 512);
        let head = machine.fold(0, 0, TABLES);
        machine.offer(head);
        expect_refusal(machine, "an indirect table, which was not negotiated");
    }
    child.declined = 0;
    child.start();
    assert_eq!(one(&mut child, IN, 5, 512), (0, 513), "until it is reset and chooses them");
}

/// A valid request, whose table is then `broken`.
fn broken(machine: &mut Machine, broken: impl FnOnce(&Machine)) {
    machine.request(0, IN, 0, 512);
    machine.fold(0, 0, TABLES);
    broken(machine);
    machine.offer(0);
}

/// A valid request, whose one descriptor then refers to another buffer.
fn refers(machine: &mut Machine, address: u64, len: u32, flags: u16) {
    broken(machine, |m| m.describe(0, address, len, flags, 1));
}

#[test]
fn tables_that_break_the_rules_need_a_reset() {
    let data = (FREE, 512, WRITE | NEXT, 2);
    let put = |m: &Machine, entry: u16, (at, len, flags, next): (u64, u32, u16, u16)| {
        m.table(TABLES + u64::from(entry) * 16, &[(at, len, flags, next)]);
    };
    type With = Box<dyn Fn(&mut Machine)>;
    let refer = |address, len, flags| -> With { Box::new(move |m| refers(m, address, len, flags)) };
    let entry = move |index, with| -> With { Box::new(move |m| broken(m, |m| put(m, index, with))) };
    let cases: Vec<(&str, With)> = vec![
        ("a table in a table, which would do as a buffer", entry(1, (FREE, 512, INDIRECT | WRITE | NEXT, 2))),
        ("a table that refers to itself", entry(0, (TABLES, 48, INDIRECT, 0))),
        ("a chain that goes on behind its table", refer(TABLES, 48, INDIRECT | NEXT)),
        ("a table of no bytes", refer(TABLES, 0, INDIRECT)),
        ("a table of half a descriptor", refer(TABLES, 8, INDIRECT)),
        ("a table of three descriptors and a byte", refer(TABLES, 49, INDIRECT)),
        ("a table of nearly 4 GiB", refer(TABLES, !15, INDIRECT)),
        ("a table larger than RAM", refer(0, RAM as u32 + 16, INDIRECT)),
        ("a table of more descriptors than the queue has", refer(TABLES, (u32::from(SIZE) + 1) * 16, INDIRECT)),
        ("a table beyond RAM", refer(RAM, 48, INDIRECT)),
        ("a table across the end of RAM", refer(RAM - 32, 48, INDIRECT)),
        ("a table across the end of RAM in the middle of a descriptor", refer(RAM - 40, 48, INDIRECT)),
        ("a table whose end overflows", refer(u64::MAX - 15, 48, INDIRECT)),
        ("a table one byte off, so that it is other descriptors", refer(TABLES + 1, 48, INDIRECT)),
        ("a descriptor of a table that is its own next", entry(1, (FREE, 512, WRITE | NEXT, 1))),
        ("a loop of a table's descriptors", entry(2, (FREE, 1, WRITE | NEXT, 1))),
        ("a next that is not in the table", entry(1, (FREE, 512, WRITE | NEXT, 3))),
        ("a next far out of the table", entry(1, (FREE, 512, WRITE | NEXT, 0xffff))),
        ("a table that its last descriptor does not end", entry(2, (FREE, 1, WRITE | NEXT, 3))),
        ("a buffer of no bytes in a table", entry(1, (FREE, 0, WRITE | NEXT, 2))),
        ("a buffer beyond RAM in a table", entry(1, (RAM, 512, WRITE | NEXT, 2))),
        ("a buffer across the end of RAM in a table", entry(1, (RAM - 256, 512, WRITE | NEXT, 2))),
        ("a buffer whose end overflows in a table", entry(1, (u64::MAX - 100, 512, WRITE | NEXT, 2))),
        ("a buffer to read behind one to write in a table", entry(2, (FREE, 16, 0, 0))),
        (
            "a buffer to read in a table behind a direct one to write",
            Box::new(|m| {
                m.request(0, IN, 0, 512);
                m.fold(0, 2, TABLES);
                m.table(TABLES, &[(FREE, 1, 0, 0)]);
                m.offer(0);
            }),
        ),
        ("a table without a header", entry(0, data)),
        ("a table of zeros", refer(TABLES + 0x1000, 48, INDIRECT)),
    ];
    let file = File::new(1 << 20);
    let mut machine = Machine::started(&file.config());
    for (what, break_it) in &cases {
        break_it(&mut machine);
        expect_refusal(&mut machine, what);
        assert_eq!(one(&mut machine, IN, 6, 512), (0, 513), "{what}: tables work after it");
    }
}

#[test]
fn a_table_that_is_changed_while_its_request_is_in_flight_changes_nothing() {
    let file = File::new(1 << 20);
    let (mut machine, gate) = with_eight_in_flight(&file);
    machine.put(FREE, &[0xa5; 8192]);
    for n in 0..8 {
        let at = TABLES + n * 48;
        machine.table(at, &[(FREE, 4096, WRITE, 0), (u64::MAX, 0, INDIRECT, 9), (FREE + 4096, 4096, WRITE | NEXT, 0)]);
        (0..3).for_each(|index| machine.describe(n as u16 * 3 + index, FREE, 4096, WRITE, 0));
    }
    gate.open();
    machine.expect_eight();
    assert!(machine.bytes(FREE, 8192) == [0xa5; 8192], "what it refers to now was never asked for");
    expect_written(&mut machine);
}

#[test]
fn a_table_that_is_changed_while_it_is_read_is_read_once() {
    let file = File::new(1 << 20);
    let mut machine = Machine::started(&file.config());
    let over = Arc::new(AtomicBool::new(false));
    let (memory, stop) = (machine.ram.clone(), Arc::clone(&over));
    // Alternates the address of the data: one in RAM, and one outside.
    let flip = std::thread::spawn(move || {
        while !stop.load(Ordering::Relaxed) {
            for address in [FREE, RAM + 4096] {
                memory.memory().store(address, GuestAddress(TABLES + 16), Ordering::Relaxed).unwrap();
            }
        }
    });
    let (mut done, mut refused) = (0, 0);
    for round in 0..300u64 {
        machine.request(0, IN, round, 512);
        let head = machine.fold(0, 0, TABLES);
        machine.put(FREE, &[0xa5; 512]);
        machine.put(machine.data(0), &[0xa5; 512]);
        machine.offer(head);
        machine.kick();
        let used = loop {
            if let Some(used) = machine.next_used(Duration::from_micros(500)) {
                break Some(used);
            }
            if machine.read(regs::STATUS) & NEEDS_RESET != 0 {
                break None;
            }
        };
        if used.is_some() {
            // The checked address is the one that was used.
            assert_eq!((used, machine.status_of(0)), (Some((0, 513)), 0), "round {round}");
            let written = [FREE, machine.data(0)].map(|at| machine.bytes(at, 512) == [round as u8; 512]);
            assert!(written[0] != written[1] || round as u8 == 0xa5, "round {round}: {written:?}");
            done += 1;
        } else {
            refused += 1;
            machine.start();
        }
    }
    over.store(true, Ordering::Relaxed);
    flip.join().unwrap();
    println!("{done} done, {refused} refused");
    assert_eq!(one(&mut machine, IN, 6, 512), (0, 513));
    assert_eq!(machine.ram.stats().unwrap().pinned, 0);
}

/// A queue of `size` at [`RINGS`].
fn queue(ram: &GuestRam, size: u16) -> Virtqueue {
    let state = QueueState {
        ready: true,
        descriptors: RINGS,
        available: RINGS + 0x4000,
        used: RINGS + 0x8000,
        ..QueueState::new(size)
    };
    let event = Arc::new(clade_host_io::eventfd().unwrap());
    Virtqueue::new(0, &state, INDIRECT_DESC, ram, &event).unwrap()
}

fn put(ram: &GuestRam, at: u64, descriptors: &[[u8; 16]]) {
    ram.memory().write_slice(&descriptors.concat(), GuestAddress(at)).unwrap();
}

#[test]
fn a_table_has_at_most_4_gib_and_stays_in_one_piece_of_ram() {
    const PART: u32 = 128 << 20;
    // RAM has a hole below 4 GiB.
    let hole = 3 << 30;
    let ram = GuestRam::reserve(&RamLayout::new(hole + (1 << 30)).unwrap(), &Store::open_small().unwrap()).unwrap();
    ram.populate().unwrap();
    let queue = queue(&ram, SIZE);
    let buffers = |last: u32| {
        let mut all = vec![descriptor(0, PART, NEXT, 0); 32];
        (1u16..).zip(&mut all).for_each(|(next, entry)| entry[14..].copy_from_slice(&next.to_le_bytes()));
        all.push(descriptor(FREE, last, 0, 0));
        all
    };
    put(&ram, RINGS, &[descriptor(TABLES, 33 * 16, INDIRECT, 0)]);
    put(&ram, TABLES, &buffers(1));
    assert_eq!(queue.chain(0), Err(QueueError::TooLong { head: 0 }));
    let mut exactly = buffers(1)[..32].to_vec();
    exactly[31] = descriptor(0, PART, 0, 0);
    put(&ram, TABLES, &exactly);
    put(&ram, RINGS, &[descriptor(TABLES, 32 * 16, INDIRECT, 0)]);
    assert_eq!(queue.chain(0).unwrap().readable.len(), 32);
    // Direct descriptors count too.
    put(&ram, RINGS, &[descriptor(FREE, 1, NEXT, 1), descriptor(TABLES, 32 * 16, INDIRECT, 0)]);
    assert_eq!(queue.chain(0), Err(QueueError::TooLong { head: 0 }));
    // A table that ends at the hole, and tables across its beginning and its end.
    for (at, good) in [(hole - 32, true), (hole - 16, false), (hole, false), ((4 << 30) - 16, false), (4 << 30, true)] {
        if good {
            put(&ram, at, &[descriptor(FREE, 1, NEXT, 1), descriptor(FREE, 1, 0, 0)]);
        }
        put(&ram, RINGS, &[descriptor(at, 32, INDIRECT, 0)]);
        let outside = QueueError::Outside { head: 0, address: at, len: 32 };
        assert_eq!(
            queue.chain(0).map(|chain| chain.readable.len()),
            if good { Ok(2) } else { Err(outside) },
            "{at:#x}"
        );
    }
}

/// A queue so small that chains exceed it.
const SMALL: u16 = 8;

fn any_descriptor() -> impl Strategy<Value = [u8; 16]> {
    let tables = prop_oneof![8 => (0..12u64).prop_map(|at| TABLES + at * 16), 1 => TABLES..TABLES + 192];
    let address = prop_oneof![6 => Just(FREE), 6 => tables, 1 => RAM - 64..RAM + 64, 1 => any::<u64>()];
    let len = prop_oneof![8 => (1..10u32).prop_map(|n| n * 16), 1 => 0..200u32, 1 => any::<u32>()];
    let flags = prop_oneof![4 => Just(NEXT), 2 => Just(WRITE | NEXT), 2 => Just(WRITE), 1 => Just(0), 3 => Just(INDIRECT), 1 => 0..8u16];
    let next = prop_oneof![16 => 0..SMALL, 2 => 0..20u16, 1 => any::<u16>()];
    (address, len, flags, next).prop_map(|(address, len, flags, next)| descriptor(address, len, flags, next))
}

/// The simplest model of a chain: collect all buffers first, and check them afterwards.
fn naive(ram: &GuestRam, head: u16) -> Option<[Vec<(u64, u32)>; 2]> {
    let in_ram = |at: u64, len: u32| u128::from(at) + u128::from(len) <= u128::from(RAM);
    let (mut table, mut entries, mut nested) = (RINGS, u32::from(SMALL), false);
    let (mut index, mut buffers) = (u32::from(head), Vec::new());
    loop {
        if index >= entries || buffers.len() > usize::from(SMALL) {
            return None;
        }
        let mut bytes = [0; 16];
        ram.memory().read_slice(&mut bytes, GuestAddress(table + u64::from(index) * 16)).unwrap();
        let at = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        let len = u32::from_le_bytes(bytes[8..12].try_into().unwrap());
        let [flags, next] = [12, 14].map(|at| u16::from_le_bytes([bytes[at], bytes[at + 1]]));
        if flags & INDIRECT == 0 {
            buffers.push((at, len, flags & WRITE != 0));
            if flags & NEXT == 0 {
                break;
            }
            index = u32::from(next);
            continue;
        }
        if nested || flags & NEXT != 0 || len % 16 != 0 || len > u32::from(SMALL) * 16 || !in_ram(at, len) {
            return None;
        }
        (table, entries, nested, index) = (at, len / 16, true, 0);
    }
    let right = buffers.len() <= usize::from(SMALL)
        && buffers.iter().all(|&(at, len, _)| len > 0 && in_ram(at, len))
        && buffers.is_sorted_by_key(|buffer| buffer.2);
    let of = |write| buffers.iter().filter(|buffer| buffer.2 == write).map(|buffer| (buffer.0, buffer.1)).collect();
    right.then(|| [of(false), of(true)])
}

#[test]
fn any_table_is_what_the_naive_reading_says() {
    let ram = ram();
    ram.populate().unwrap();
    let queue = queue(&ram, SMALL);
    let (good, in_tables) = (Cell::new(0), Cell::new(0));
    let ring = prop::collection::vec(any_descriptor(), usize::from(SMALL));
    let table = prop::collection::vec(any_descriptor(), 12);
    let config = ProptestConfig { cases: 20_000, failure_persistence: None, ..ProptestConfig::default() };
    let agree = |(ring, table): (Vec<[u8; 16]>, Vec<[u8; 16]>)| {
        put(&ram, RINGS, &ring);
        put(&ram, TABLES, &table);
        for (head, first) in (0..).zip(&ring) {
            let found = queue.chain(head).ok().map(|chain| {
                [chain.readable, chain.writable].map(|all| all.iter().map(|s| (s.address.0, s.len)).collect())
            });
            let wanted = naive(&ram, head);
            prop_assert_eq!(&found, &wanted, "head {}", head);
            if wanted.is_some() {
                let counted = if u16::from(first[12]) & INDIRECT == 0 { &good } else { &in_tables };
                counted.set(counted.get() + 1);
            }
        }
        Ok(())
    };
    TestRunner::new(config).run(&(ring, table), agree).unwrap();
    let counted = (good.get(), in_tables.get());
    assert!(counted.0 > 1000 && counted.1 > 1000, "too few chains are right to say anything: {counted:?}");
}
