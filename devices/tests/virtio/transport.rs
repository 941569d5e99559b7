//! The status state machine, and which registers may be written in each state.

use clade_devices::MmioDevice;
use clade_devices::virtio::block::BlockOptions;
use clade_devices::virtio::regs;

use crate::driver::{File, Machine, NEEDS_RESET, OK, RINGS, SIZE};

fn fresh() -> (File, Machine) {
    let file = File::new(1 << 20);
    let machine = Machine::new(&file.config(), BlockOptions::default());
    (file, machine)
}

#[test]
fn it_says_what_it_is() {
    let (_file, machine) = fresh();
    assert_eq!(machine.read(regs::MAGIC_VALUE), u32::from_le_bytes(*b"virt"));
    assert_eq!((machine.read(regs::VERSION), machine.read(regs::DEVICE_ID)), (2, 2));
    assert_eq!((machine.read(regs::QUEUE_NUM_MAX), machine.read(regs::SHM_LEN_LOW)), (256, u32::MAX));
    assert_eq!(machine.read(regs::CONFIG), (1 << 20) / 512);
    // Accesses of any width, beyond the end too.
    let mut bytes = [0xaa; 8];
    machine.device.read(regs::CONFIG + 20, &mut bytes[..1]);
    machine.device.read(regs::CONFIG + 0xef8, &mut bytes[1..]);
    assert_eq!(bytes, [0, 0, 0, 0, 0, 0, 0, 0]);
    machine.write(regs::QUEUE_SEL, 7);
    assert_eq!(machine.read(regs::QUEUE_NUM_MAX), 0, "no such queue");
    // Registers are 32 bits wide.
    let mut byte = [0xaa];
    machine.device.read(regs::VERSION, &mut byte);
    assert_eq!(byte, [0]);
}

#[test]
fn statuses_follow_each_other_one_by_one() {
    let (_file, machine) = fresh();
    for skipped in [2, 4, 8, 3, 15, 16] {
        machine.write(regs::STATUS, skipped);
        assert_eq!(machine.read(regs::STATUS), 0, "{skipped:#x} does not come first");
    }
    machine.write(regs::STATUS, 1);
    machine.write(regs::STATUS, 11);
    assert_eq!(machine.read(regs::STATUS), 1, "two steps at once");
    machine.write(regs::STATUS, 3);
    machine.write(regs::STATUS, 2);
    assert_eq!(machine.read(regs::STATUS), 3, "a bit is not taken back");
    machine.write(regs::STATUS, 11);
    assert_eq!(machine.read(regs::STATUS), 3, "without VERSION_1 there is no FEATURES_OK");
    machine.write(regs::DRIVER_FEATURES_SEL, 1);
    machine.write(regs::DRIVER_FEATURES, 3);
    machine.write(regs::STATUS, 11);
    assert_eq!(machine.read(regs::STATUS), 3, "nor with what was not offered");
    machine.write(regs::DRIVER_FEATURES, 1);
    machine.write(regs::STATUS, 11);
    assert_eq!(machine.read(regs::STATUS), 11);
    machine.write(regs::STATUS, 128 | 11);
    assert_eq!(machine.read(regs::STATUS), 128 | 11, "a driver may give up at any time");
    machine.write(regs::STATUS, 0);
    assert_eq!(machine.read(regs::STATUS), 0);
}

#[test]
fn an_active_queue_cannot_be_changed() {
    let file = File::new(1 << 20);
    let mut machine = Machine::started(&file.config());
    assert_eq!(machine.read(regs::STATUS), OK);
    machine.write(regs::QUEUE_SEL, 0);
    for (register, value) in [
        (regs::QUEUE_READY, 0),
        (regs::QUEUE_NUM, 2),
        (regs::QUEUE_DESC_LOW, 0xdead_0000),
        (regs::QUEUE_DRIVER_LOW, 0xdead_0000),
        (regs::QUEUE_DEVICE_HIGH, 0xffff_ffff),
        (regs::DRIVER_FEATURES, 0),
        (regs::STATUS, 11),
    ] {
        machine.write(register, value);
    }
    assert_eq!((machine.read(regs::QUEUE_READY), machine.read(regs::STATUS)), (1, OK));
    assert_eq!(machine.one(0, 3, 512), (0, 513), "it works on as if nothing had been written");
    let image = machine.fork();
    let mut child = image.child();
    child.device.resume();
    assert_eq!(child.one(0, 4, 512), (0, 513), "and nothing of it is in what is saved");
    assert_eq!(child.bytes(child.data(0), 512), [4; 512]);
}

#[test]
fn queues_that_cannot_be_need_a_reset() {
    let broken: [(&str, u64, u32); 5] = [
        ("descriptors beyond RAM", regs::QUEUE_DESC_HIGH, 1),
        ("an available ring beyond RAM", regs::QUEUE_DRIVER_LOW, 0x0fff_fffe),
        ("a used ring where addresses end", regs::QUEUE_DEVICE_HIGH, u32::MAX),
        ("descriptors at an odd place", regs::QUEUE_DESC_LOW, RINGS as u32 + 1),
        ("a used ring at an odd place", regs::QUEUE_DEVICE_LOW, RINGS as u32 + 0x8002),
    ];
    for (what, register, value) in broken {
        let (_file, machine) = fresh();
        machine.negotiate();
        machine.set_up_queue(0);
        machine.write(regs::QUEUE_READY, 0);
        machine.write(register, value);
        machine.write(regs::QUEUE_READY, 1);
        machine.write(regs::STATUS, OK);
        machine.wait_for_status(NEEDS_RESET);
        machine.wait_for_interrupt(what);
        assert_eq!(machine.read(regs::INTERRUPT_STATUS) & 2, 2, "{what}");
        machine.write(regs::STATUS, 0);
        assert_eq!((machine.read(regs::STATUS), machine.read(regs::INTERRUPT_STATUS)), (0, 0), "{what}");
    }
    let (_file, machine) = fresh();
    machine.negotiate();
    machine.write(regs::STATUS, OK);
    machine.wait_for_status(NEEDS_RESET);
}

#[test]
fn sizes_that_cannot_be_are_not_taken() {
    let (_file, mut machine) = fresh();
    machine.negotiate();
    machine.set_up_queue(0);
    machine.write(regs::QUEUE_READY, 0);
    for size in [0, 3, 65, 512, 0x1_0000, u32::MAX] {
        machine.write(regs::QUEUE_NUM, size);
    }
    machine.write(regs::QUEUE_READY, 1);
    machine.write(regs::STATUS, OK);
    assert_eq!(machine.read(regs::STATUS), OK);
    for n in 0..2 * u64::from(SIZE) {
        assert_eq!(machine.one(0, n, 512), (0, 513), "the ring still has {SIZE} entries");
    }
}

#[test]
fn interrupts_are_raised_and_acknowledged() {
    let file = File::new(1 << 20);
    let mut machine = Machine::started(&file.config());
    assert!(!machine.interrupted());
    assert_eq!(machine.one(0, 0, 512), (0, 513));
    clade_test_support::wait_until("an interrupt", || {
        machine.read(regs::INTERRUPT_STATUS) == 1 && machine.interrupted()
    });
    machine.write(regs::INTERRUPT_ACK, 2);
    assert_eq!(machine.read(regs::INTERRUPT_STATUS), 1, "the other one");
    machine.write(regs::INTERRUPT_ACK, 1);
    assert_eq!(machine.read(regs::INTERRUPT_STATUS), 0);
}
