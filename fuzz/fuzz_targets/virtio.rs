//! Any driver: registers in any order, rings and descriptors of any content, notifications, forks.
//! A device returns its descriptors or asks to be reset, touches no byte outside its memory (there
//! is none to touch), and neither panics nor hangs; a saved state can be restored.
#![no_main]

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use clade_block::{Disk, DiskConfig};
use clade_devices::virtio::balloon::{Balloon, BalloonState};
use clade_devices::virtio::block::{Block, BlockOptions};
use clade_devices::virtio::console::ConsoleDevice;
use clade_devices::virtio::limiter::Limits;
use clade_devices::virtio::rng::Rng;
use clade_devices::virtio::sync_device::SyncDevice;
use clade_devices::virtio::vsock::{Vsock, VsockOptions, VsockSocket};
use clade_devices::virtio::{Backend, DeviceState, EventFds, TransportState, VirtioDevice, VirtioMmio, regs};
use clade_devices::{Console, MmioDevice};
use clade_memory::{GuestRam, Quiesced, RamImage, RamLayout, Store};
use libfuzzer_sys::{arbitrary, fuzz_target};
use vm_memory::{Bytes, GuestAddress};

const RAM: u64 = 2 << 20;
/// Rings and buffers are most often here, so that they meet.
const WINDOW: u64 = 0x8000;
const REGISTERS: [u64; 16] = [
    regs::DEVICE_FEATURES_SEL,
    regs::DRIVER_FEATURES,
    regs::DRIVER_FEATURES_SEL,
    regs::QUEUE_SEL,
    regs::QUEUE_NUM,
    regs::QUEUE_READY,
    regs::QUEUE_NOTIFY,
    regs::INTERRUPT_ACK,
    regs::STATUS,
    regs::QUEUE_DESC_LOW,
    regs::QUEUE_DESC_HIGH,
    regs::QUEUE_DRIVER_LOW,
    regs::QUEUE_DRIVER_HIGH,
    regs::QUEUE_DEVICE_LOW,
    regs::QUEUE_DEVICE_HIGH,
    regs::CONFIG,
];

#[derive(arbitrary::Arbitrary, Debug)]
enum Step {
    Write(u8, u32),
    Read(u16, u8),
    /// Brings the device to life in the usual way, with so many queues, and with indirect tables or
    /// without.
    SetUp(u8),
    /// Puts a descriptor somewhere: queue, index, address, length, flags, next.
    Descriptor(u8, u8, u32, u32, u16, u8),
    /// Makes a descriptor head available.
    Offer(u8, u16),
    /// Puts an indirect table behind a queue's rings and a descriptor that refers to it: queue,
    /// index, offset, length, flags, and each descriptor's address, length, flags and next.
    Table(u8, u8, u8, u32, u16, Vec<(u32, u32, u16, u8)>),
    /// Any bytes anywhere near the rings.
    Poke(u16, Vec<u8>),
    Notify(u8),
    Settle,
    Fork,
}

struct World {
    store: Store,
    image: RamImage,
    dir: tempfile::TempDir,
}

fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| {
        let store = Store::open_small().expect("a store");
        let ram = GuestRam::reserve(&RamLayout::new(RAM).expect("a layout"), &store).expect("memory");
        ram.populate().expect("memory");
        let (image, _) = ram.freeze(&Quiesced::by(&clade_memory::NoWriters)).expect("an image");
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("disk"), vec![1; 1 << 20]).expect("a disk");
        World { store, image, dir }
    })
}

/// Makes one device of each kind, or one from a saved state.
fn device(kind: u8, name: &str, saved: Option<(&TransportState, &Backend)>) -> Box<dyn VirtioDevice> {
    let world = world();
    match kind % 5 {
        0 => Box::new(SyncDevice::new(Rng::new(&Limits::default()))),
        1 => {
            let state = match saved.map(|(state, _)| &state.device) {
                Some(DeviceState::Balloon(state)) => *state,
                _ => BalloonState::default(),
            };
            Box::new(SyncDevice::new(Balloon::new(&state).expect("a balloon")))
        }
        2 => Box::new(SyncDevice::new(ConsoleDevice::new(Console::default()).expect("a console"))),
        3 => {
            let options = VsockOptions { cid: 3, socket: world.dir.path().join(name) };
            Box::new(SyncDevice::new(
                Vsock::new(VsockSocket::bind(&options).expect("a socket"), saved.is_some()).expect("a device"),
            ))
        }
        _ => match saved {
            Some((TransportState { device: DeviceState::Block(state), .. }, Backend::Disk(image))) => {
                let disk = image.open().expect("a clone of the disk");
                Box::new(Block::restore(state, disk, &BlockOptions::default()))
            }
            _ => {
                let disk = Disk::open(&DiskConfig::new(&world.dir.path().join("disk"))).expect("the disk");
                Box::new(Block::new(disk, &BlockOptions::default()))
            }
        },
    }
}

struct Vm {
    ram: GuestRam,
    device: VirtioMmio,
    offered: [u16; 8],
}

impl Vm {
    fn new(kind: u8, image: &RamImage, saved: Option<(&TransportState, &Backend)>, name: &str) -> Self {
        let ram = GuestRam::reserve(image.layout(), &world().store).expect("memory");
        ram.adopt(image).expect("memory");
        let device = device(kind, name, saved);
        let event_fds = EventFds::new(device.queue_sizes().len()).expect("eventfds");
        let device = match saved {
            None => VirtioMmio::new(device, &ram, event_fds, false),
            Some((state, _)) => {
                // Rings that were moved out of memory since they were set up are refused, like any
                // others.
                let restored = VirtioMmio::restore(device, &ram, event_fds, state).expect("its own state");
                restored.resume();
                restored
            }
        };
        Self { ram, device, offered: [0; 8] }
    }

    fn put(&self, register: u64, value: u32) {
        self.device.write(register, &value.to_le_bytes());
    }

    fn poke(&self, at: u64, bytes: &[u8]) {
        let _ = self.ram.memory().write_slice(bytes, GuestAddress(at));
    }

    fn descriptor(&self, at: u64, (address, len, flags, next): (u64, u32, u16, u16)) {
        self.poke(at, &address.to_le_bytes());
        self.poke(at + 8, &len.to_le_bytes());
        self.poke(at + 12, &flags.to_le_bytes());
        self.poke(at + 14, &next.to_le_bytes());
    }

    /// Writes a descriptor of a buffer that is usually in RAM and short.
    fn buffer(&self, at: u64, (address, len, flags, next): (u32, u32, u16, u8)) {
        let address = if address % 4 == 0 { u64::from(address) << 8 } else { u64::from(address) % WINDOW };
        let len = if len % 4 == 0 { len } else { len % 0x600 };
        self.descriptor(at, (address, len, flags, u16::from(next % 18)));
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Write(register, value) => self.put(REGISTERS[usize::from(register) % REGISTERS.len()], value),
            Step::Read(offset, len) => self.device.read(u64::from(offset), &mut vec![0; usize::from(len % 9)]),
            Step::SetUp(queues) => {
                [0, 1, 3].iter().for_each(|status| self.put(regs::STATUS, *status));
                // VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1.
                for (half, chosen) in [(0, u32::from(queues < 0xc0) << 28), (1, 1)] {
                    self.put(regs::DRIVER_FEATURES_SEL, half);
                    self.put(regs::DRIVER_FEATURES, chosen);
                }
                self.put(regs::STATUS, 11);
                for queue in 0..u32::from(queues % 8) {
                    let base = 0x1000 * queue;
                    self.put(regs::QUEUE_SEL, queue);
                    self.put(regs::QUEUE_NUM, 16);
                    self.put(regs::QUEUE_DESC_LOW, base);
                    self.put(regs::QUEUE_DRIVER_LOW, base + 0x400);
                    self.put(regs::QUEUE_DEVICE_LOW, base + 0x800);
                    self.put(regs::QUEUE_READY, 1);
                }
                self.put(regs::STATUS, 15);
                self.offered = [0; 8];
            }
            Step::Descriptor(queue, index, address, len, flags, next) => {
                let at = 0x1000 * u64::from(queue % 8) + 16 * u64::from(index % 17);
                self.buffer(at, (address, len, flags % 8, next));
            }
            Step::Table(queue, index, offset, len, flags, entries) => {
                let queue = 0x1000 * u64::from(queue % 8);
                let table = queue + 0xc00 + u64::from(offset % 32);
                // Usually its right length, and sometimes longer than a queue of 16 allows.
                let len = if len % 4 == 0 { len } else { 16 * (entries.len() as u32 % 18) };
                for ((address, len, flags, next), n) in entries.into_iter().zip(0u64..18) {
                    // A table in a table is rare, or it would hide all other cases.
                    let flags = if flags % 32 == 0 { 4 } else { flags % 4 };
                    self.buffer(table + 16 * n, (address, len, flags, next));
                }
                let flags = 4 | if flags % 8 == 1 { 1 } else { flags & 2 };
                self.descriptor(queue + 16 * u64::from(index % 16), (table, len, flags, 0));
            }
            Step::Offer(queue, head) => {
                let queue = usize::from(queue % 8);
                let base = 0x1000 * queue as u64 + 0x400;
                let at = self.offered[queue];
                self.poke(base + 4 + 2 * u64::from(at % 16), &(head % 18).to_le_bytes());
                self.offered[queue] = at.wrapping_add(1);
                self.poke(base + 2, &self.offered[queue].to_le_bytes());
                self.put(regs::QUEUE_NOTIFY, queue as u32);
            }
            Step::Poke(at, bytes) => self.poke(u64::from(at), &bytes),
            Step::Notify(queue) => self.put(regs::QUEUE_NOTIFY, u32::from(queue)),
            // The device has had its turn once its worker stands still.
            Step::Settle => {
                self.device.quiesce();
                self.device.resume();
            }
            Step::Fork => {}
        }
    }
}

fuzz_target!(|input: (u8, Vec<Step>)| {
    let (kind, steps) = input;
    let begun = Instant::now();
    let mut vm = Vm::new(kind, &world().image, None, "parent");
    for step in steps.into_iter().take(200) {
        if !matches!(step, Step::Fork) {
            vm.step(step);
            continue;
        }
        vm.device.quiesce();
        let (image, _) = vm.ram.freeze(&Quiesced::by(&clade_memory::NoWriters)).expect("an image");
        let (state, backend) = vm.device.save().expect("a state");
        let again: TransportState =
            serde_json::from_slice(&serde_json::to_vec(&state).expect("written")).expect("read");
        assert_eq!(again, state);
        vm.device.resume();
        drop(Vm::new(kind, &image, Some((&state, &backend)), "child"));
    }
    vm.put(regs::STATUS, 0);
    drop(vm);
    assert!(begun.elapsed() < Duration::from_secs(20), "it took {:?}", begun.elapsed());
});
