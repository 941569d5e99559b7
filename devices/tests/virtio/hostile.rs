//! Drivers that break the rules: the device needs a reset, and works again after one.

use std::time::Duration;

use clade_devices::virtio::regs;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{File, Machine, NEEDS_RESET, NEXT, OK, RAM, RINGS, SIZE, SOON, WRITE, wait_in_flight};

/// A buffer in RAM that nothing else uses.
pub(crate) const FREE: u64 = 0x80_0000;

pub(crate) fn expect_refusal(machine: &mut Machine, what: &str) {
    machine.kick();
    println!("{what}");
    machine.wait_for_status(NEEDS_RESET);
    machine.wait_for_interrupt(what);
    assert_eq!(machine.next_used(Duration::from_millis(20)), None, "{what}: nothing is given back");
    assert_eq!(machine.ram.stats().unwrap().pinned, 0, "{what}: no page stays pinned");
    machine.start();
    assert_eq!(machine.read(regs::STATUS), OK, "{what}: it can be reset");
    assert_eq!(machine.one(0, 5, 512), (0, 513), "{what}: and works");
}

pub(crate) type Break = fn(&mut Machine);

#[test]
fn chains_that_break_the_rules_need_a_reset() {
    let cases: &[(&str, Break)] = &[
        ("a head that is not there", |m| m.offer(SIZE)),
        ("a next that is not there", |m| {
            m.describe(0, FREE, 16, NEXT, SIZE);
            m.offer(0);
        }),
        ("a descriptor that is its own next", |m| {
            m.describe(0, FREE, 16, NEXT, 0);
            m.offer(0);
        }),
        ("a loop of all descriptors", |m| {
            for n in 0..SIZE {
                m.describe(n, FREE, 16, NEXT, (n + 1) % SIZE);
            }
            m.offer(0);
        }),
        ("a buffer of no bytes", |m| {
            m.request(0, 0, 0, 512);
            m.describe(1, FREE, 0, NEXT | WRITE, 2);
            m.offer(0);
        }),
        ("a buffer beyond RAM", |m| {
            m.request(0, 0, 0, 512);
            m.describe(1, RAM, 512, NEXT | WRITE, 2);
            m.offer(0);
        }),
        ("a buffer across the end of RAM", |m| {
            m.request(0, 0, 0, 512);
            m.describe(1, RAM - 256, 512, NEXT | WRITE, 2);
            m.offer(0);
        }),
        ("a buffer whose end overflows", |m| {
            m.request(0, 0, 0, 512);
            m.describe(1, u64::MAX - 100, 512, NEXT | WRITE, 2);
            m.offer(0);
        }),
        ("a buffer of nearly 4 GiB", |m| {
            m.request(0, 0, 0, 512);
            m.describe(1, FREE, u32::MAX, NEXT | WRITE, 2);
            m.offer(0);
        }),
        ("a buffer to read behind one to write", |m| {
            m.request(0, 0, 0, 512);
            m.describe(2, FREE, 16, 0, 0);
            m.describe(1, FREE, 512, NEXT | WRITE, 2);
            m.offer(0);
        }),
        ("a header that is too short", |m| {
            m.describe(0, FREE, 15, NEXT, 1);
            m.describe(1, FREE, 1, WRITE, 0);
            m.offer(0);
        }),
        ("no room for the status", |m| {
            m.describe(0, FREE, 16, 0, 0);
            m.offer(0);
        }),
        ("an available index far ahead", |m| {
            m.ram.memory().write_obj(0x8000u16, GuestAddress(RINGS + 0x4002)).unwrap();
        }),
    ];
    let file = File::new(1 << 20);
    let mut machine = Machine::started(&file.config());
    for (what, break_it) in cases {
        break_it(&mut machine);
        expect_refusal(&mut machine, what);
    }
}

#[test]
fn more_in_flight_than_descriptors_needs_a_reset() {
    let file = File::new(1 << 20);
    let mut machine = Machine::started(&file.config());
    let gate = file.gate();
    let head = machine.request(0, 0, 0, 512);
    // The same chain repeatedly: each is in flight when the next is popped.
    for round in 0..3 {
        for _ in 0..SIZE / 2 {
            machine.offer(head);
        }
        machine.kick();
        // Read before more are offered: an index that is too far ahead is refused as such.
        if round < 2 {
            wait_in_flight(&machine, usize::from(SIZE / 2 * (round + 1)));
        }
    }
    machine.wait_for_status(NEEDS_RESET);
    gate.open();
    machine.start();
    assert_eq!(machine.one(0, 5, 512), (0, 513));
}

#[test]
fn buffers_over_the_rings_and_over_each_other_are_the_drivers_own_affair() {
    let file = File::new(1 << 20);
    let mut machine = Machine::started(&file.config());
    for (what, at, len) in [
        ("the descriptors", RINGS, 4096),
        ("the available ring", RINGS + 0x4000, 512),
        ("the used ring", RINGS + 0x8000, 4096),
    ] {
        machine.request(0, 0, 9, 512);
        machine.describe(1, at, len, NEXT | WRITE, 2);
        machine.offer(0);
        machine.kick();
        // For any content there, the device finishes and can be reset.
        let _ = machine.next_used(Duration::from_millis(50));
        machine.start();
        assert_eq!(machine.one(0, 5, 512), (0, 513), "{what}");
    }
    // One buffer three times in a chain: the last part may win or not, but all bytes come from this
    // disk.
    machine.request(0, 0, 8, 512);
    machine.describe(1, FREE, 512, NEXT | WRITE, 10);
    machine.describe(10, FREE, 512, NEXT | WRITE, 11);
    machine.describe(11, FREE, 512, NEXT | WRITE, 2);
    machine.offer(0);
    machine.kick();
    assert_eq!(machine.next_used(SOON), Some((0, 1537)));
    let byte = machine.bytes(FREE, 1)[0];
    assert!((8..=10).contains(&byte) && machine.bytes(FREE, 512) == [byte; 512]);
    assert_eq!(machine.ram.stats().unwrap().pinned, 0);
}

#[derive(Clone, Debug)]
struct Wild {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

fn wild() -> impl Strategy<Value = Wild> {
    let address = prop_oneof![
        8 => FREE..FREE + 0x10_0000,
        1 => RAM - 5000..RAM + 5000,
        1 => any::<u64>(),
        // The ring's own descriptors, used as a table.
        2 => (0..u64::from(SIZE)).prop_map(|index| RINGS + index * 16),
    ];
    let len =
        prop_oneof![8 => 1..3000u32, 2 => Just(16), 2 => Just(48), 2 => Just(512), 1 => any::<u32>(), 1 => Just(0)];
    let flags = prop_oneof![4 => Just(0u16), 8 => Just(1), 4 => Just(2), 8 => Just(3), 1 => Just(4), 1 => any::<u16>()];
    (address, len, flags, prop_oneof![16 => 0..SIZE, 1 => any::<u16>()]).prop_map(|(address, len, flags, next)| Wild {
        address,
        len,
        flags,
        next,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    /// For any content of the rings, the device finishes, may need a reset, can be reset, and
    /// works; no page stays pinned, and RAM outside the descriptors' buffers is unchanged.
    #[test]
    fn whatever_is_in_the_rings(
        descriptors in prop::collection::vec(wild(), SIZE as usize),
        heads in prop::collection::vec(prop_oneof![16 => 0..SIZE, 1 => any::<u16>()], 1..20),
        header in any::<[u8; 4]>(),
    ) {
        let file = File::new(1 << 20);
        let mut machine = Machine::started(&file.config());
        const QUIET: u64 = 0xc0_0000;
        machine.put(QUIET, &[0xa5; 0x1_0000]);
        // Some valid headers, so that requests get further.
        for page in 0..256u64 {
            machine.put(FREE + page * 4096, &[header[0] & 1, 0, 0, 0, 0, 0, 0, 0, page as u8]);
        }
        for (index, wild) in (0..).zip(&descriptors) {
            machine.describe(index, wild.address, wild.len, wild.flags, wild.next);
        }
        let touches_quiet = descriptors.iter().any(|d| {
            d.address < QUIET + 0x1_0000 && d.address.saturating_add(u64::from(d.len)) > QUIET
        });
        for head in heads {
            machine.offer(head);
        }
        machine.kick();
        std::thread::sleep(Duration::from_millis(3));
        machine.start();
        prop_assert_eq!(machine.read(regs::STATUS), OK);
        prop_assert_eq!(machine.one(8, 0, 20), (0, 21), "it works after a reset");
        prop_assert_eq!(machine.ram.stats().unwrap().pinned, 0);
        if !touches_quiet {
            prop_assert!(machine.bytes(QUIET, 0x1_0000) == [0xa5; 0x1_0000]);
        }
    }
}
