//! A driver in plain memory: sets a device up through its registers and uses its queues as a guest
//! would.

#![allow(dead_code, reason = "not every test uses all of it")]

use std::time::Duration;

use clade_devices::MmioDevice;
use clade_devices::virtio::{Backend, EventFds, TransportState, VirtioDevice, VirtioMmio, regs};
use clade_memory::{FreezeMode, GuestRam, Quiesced, RamImage, RamLayout, Store};
use clade_test_support::{Patience, Watchdog};
use vm_memory::{Bytes, GuestAddress};

/// Descriptors of each queue.
pub(crate) const SIZE: u16 = 16;
const RINGS: u64 = 0x1_0000;
const PER_QUEUE: u64 = 0x4000;
/// Timeout for a halt and for pins, longer than a test runs.
const TIMEOUT: Duration = Duration::from_secs(600);
const WRITE: u16 = 2;
const NEXT: u16 = 1;
const INDIRECT: u16 = 4;
/// Start of a queue's indirect tables, one per descriptor.
const TABLES: u64 = 0x3000;
const PER_TABLE: u64 = 0x100;

/// One queue, as the driver sees it.
#[derive(Clone, Copy, Debug)]
struct Ring {
    base: u64,
    available: u16,
    seen: u16,
    next: u16,
}

/// A buffer: address, length, and whether the device writes it.
pub(crate) type Buffer = (u64, u32, bool);

pub(crate) struct Driver {
    pub(crate) ram: GuestRam,
    pub(crate) device: VirtioMmio,
    event_fds: EventFds,
    rings: Vec<Ring>,
    /// Ends a test whose host would wait for bytes for ever.
    _watchdog: Watchdog,
}

fn watchdog() -> Watchdog {
    Watchdog::new(TIMEOUT, || "a device is driven".to_owned())
}

pub(crate) fn store() -> Store {
    Store::open().unwrap()
}

pub(crate) fn ram(store: &Store) -> GuestRam {
    let ram = GuestRam::reserve(&RamLayout::new(32 << 20).unwrap(), store).unwrap();
    ram.populate().unwrap();
    ram
}

/// Address, length, flags and next.
fn describe(ram: &GuestRam, at: u64, (address, len, flags, next): (u64, u32, u16, u16)) {
    let memory = ram.memory();
    memory.write_obj(address, GuestAddress(at)).unwrap();
    memory.write_obj(len, GuestAddress(at + 8)).unwrap();
    memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
    memory.write_obj(next, GuestAddress(at + 14)).unwrap();
}

impl Driver {
    /// Sets `device` up, with every feature it offers.
    pub(crate) fn take(device: Box<dyn VirtioDevice>, ram: &GuestRam) -> Self {
        let queues = device.queue_sizes().len();
        let event_fds = EventFds::new(queues).unwrap();
        let device = VirtioMmio::new(device, ram, event_fds.clone(), false);
        let ring = |index: u64| Ring { base: RINGS + index * PER_QUEUE, available: 0, seen: 0, next: 0 };
        let rings = (0..queues as u64).map(ring).collect();
        let mut driver = Self { ram: ram.clone(), device, event_fds, rings, _watchdog: watchdog() };
        driver.set_up();
        driver
    }

    /// Begins anew, with the device reset and empty rings.
    pub(crate) fn set_up(&mut self) {
        self.put(regs::STATUS, 0);
        for ring in &mut self.rings {
            *ring = Ring { available: 0, seen: 0, next: 0, ..*ring };
            let clear = vec![0u8; PER_QUEUE as usize];
            self.ram.memory().write_slice(&clear, GuestAddress(ring.base)).unwrap();
        }
        self.put(regs::STATUS, 1);
        self.put(regs::STATUS, 3);
        for half in [0, 1] {
            self.put(regs::DEVICE_FEATURES_SEL, half);
            let mut offered = self.get(regs::DEVICE_FEATURES);
            if half == 0 {
                // Without event indices: this driver polls the rings.
                offered &= !(1 << 29);
            }
            self.put(regs::DRIVER_FEATURES_SEL, half);
            self.put(regs::DRIVER_FEATURES, offered);
        }
        self.put(regs::STATUS, 11);
        for (index, ring) in (0..).zip(&self.rings) {
            self.put(regs::QUEUE_SEL, index);
            self.put(regs::QUEUE_NUM, u32::from(SIZE));
            self.put(regs::QUEUE_DESC_LOW, ring.base as u32);
            self.put(regs::QUEUE_DRIVER_LOW, ring.base as u32 + 0x1000);
            self.put(regs::QUEUE_DEVICE_LOW, ring.base as u32 + 0x2000);
            self.put(regs::QUEUE_READY, 1);
        }
        self.put(regs::STATUS, 15);
        assert_eq!(self.get(regs::STATUS), 15);
    }

    pub(crate) fn get(&self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.device.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    pub(crate) fn put(&self, offset: u64, word: u32) {
        self.device.write(offset, &word.to_le_bytes());
    }

    pub(crate) fn config(&self, offset: u64, data: &mut [u8]) {
        self.device.read(regs::CONFIG + offset, data);
    }

    /// Whether the device has given up.
    pub(crate) fn needs_reset(&self) -> bool {
        self.get(regs::STATUS) & 0x40 != 0
    }

    /// The first descriptor of the next chain.
    pub(crate) fn next(&self, queue: usize) -> u16 {
        self.rings[queue].next
    }

    /// Makes a chain available, and notifies the device. Descriptors are in the ring, in a table,
    /// or in both, by turns.
    pub(crate) fn post(&mut self, queue: usize, buffers: &[Buffer]) -> u16 {
        let memory = self.ram.memory();
        let ring = &mut self.rings[queue];
        let head = ring.next;
        let direct = match ring.available % 3 {
            0 => buffers.len(),
            1 => 0,
            _ => buffers.len() / 2,
        };
        let in_ring = |n: usize| ring.base + u64::from((head + n as u16) % SIZE) * 16;
        let table = ring.base + TABLES + u64::from(head) * PER_TABLE;
        for (n, &(address, len, write)) in buffers.iter().enumerate() {
            let flags = if write { WRITE } else { 0 } | if n + 1 == buffers.len() { 0 } else { NEXT };
            let (at, next) = if n < direct {
                (in_ring(n), (head + n as u16 + 1) % SIZE)
            } else {
                (table + (n - direct) as u64 * 16, (n - direct) as u16 + 1)
            };
            describe(&self.ram, at, (address, len, flags, next));
        }
        let in_table = buffers.len() - direct;
        if in_table > 0 {
            describe(&self.ram, in_ring(direct), (table, in_table as u32 * 16, INDIRECT, 0));
        }
        ring.next = (head + direct as u16 + u16::from(in_table > 0)) % SIZE;
        let slot = ring.base + 0x1004 + u64::from(ring.available % SIZE) * 2;
        memory.write_obj(head, GuestAddress(slot)).unwrap();
        ring.available = ring.available.wrapping_add(1);
        memory.store(ring.available, GuestAddress(ring.base + 0x1002), std::sync::atomic::Ordering::SeqCst).unwrap();
        self.event_fds.notify[queue].write(1).unwrap();
        head
    }

    /// The next chain in the used ring, if there is one: its head and the bytes written.
    pub(crate) fn used(&mut self, queue: usize) -> Option<(u32, u32)> {
        let ring = &mut self.rings[queue];
        let memory = self.ram.memory();
        let index: u16 = memory.load(GuestAddress(ring.base + 0x2002), std::sync::atomic::Ordering::SeqCst).unwrap();
        if index == ring.seen {
            return None;
        }
        let at = ring.base + 0x2004 + u64::from(ring.seen % SIZE) * 8;
        ring.seen = ring.seen.wrapping_add(1);
        Some((memory.read_obj(GuestAddress(at)).unwrap(), memory.read_obj(GuestAddress(at + 4)).unwrap()))
    }

    /// Waits for the next chain in the used ring.
    pub(crate) fn wait(&mut self, queue: usize) -> (u32, u32) {
        let mut patience = Patience::default();
        loop {
            if let Some(used) = self.used(queue) {
                return used;
            }
            assert!(!self.needs_reset(), "the device has given up");
            assert!(patience.tick(), "nothing comes back from queue {queue}");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    pub(crate) fn wait_until(&self, what: &str, mut so: impl FnMut(&Self) -> bool) {
        let mut patience = Patience::default();
        while !so(self) {
            assert!(patience.tick(), "never {what}");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    pub(crate) fn fill(&self, at: u64, bytes: &[u8]) {
        self.ram.memory().write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub(crate) fn look(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.memory().read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// Forks memory and device: `make` gets the saved state and makes the child's device.
    pub(crate) fn fork(
        &self,
        store: &Store,
        make: impl FnOnce(&TransportState, &Backend) -> Box<dyn VirtioDevice>,
    ) -> Self {
        self.device.quiesce();
        let (image, _) = self.ram.freeze_in(FreezeMode::Eager, &Quiesced::by(&clade_memory::NoWriters)).unwrap();
        let (state, backend) = self.device.save().unwrap();
        self.device.resume();
        let ram = GuestRam::reserve(image.layout(), store).unwrap();
        ram.adopt(&image).unwrap();
        let event_fds = EventFds::new(self.rings.len()).unwrap();
        let device = VirtioMmio::restore(make(&state, &backend), &ram, event_fds.clone(), &state).unwrap();
        device.resume();
        Self { ram, device, event_fds, rings: self.rings.clone(), _watchdog: watchdog() }
    }
}

/// A device, its memory and the driver's state, at one instant.
pub(crate) struct Moment {
    state: TransportState,
    backend: Backend,
    ram: RamImage,
    rings: Vec<Ring>,
}

impl Driver {
    pub(crate) fn moment(&self) -> Moment {
        self.device.quiesce();
        let (state, backend) = self.device.save().unwrap();
        let (ram, _) = self.ram.freeze(&Quiesced::by(&clade_memory::NoWriters)).unwrap();
        self.device.resume();
        Moment { state, backend, ram, rings: self.rings.clone() }
    }

    /// Goes back to `moment`, in place.
    pub(crate) fn rewind(&mut self, moment: &Moment) {
        self.device.quiesce();
        assert!(self.device.halt(TIMEOUT));
        self.device.check(&moment.state).unwrap();
        self.ram.reset(&moment.ram, &Quiesced::by(&clade_memory::NoWriters), TIMEOUT).unwrap();
        self.device.rewind(&moment.state, &moment.backend).unwrap();
        self.rings.clone_from(&moment.rings);
        self.device.reraise();
        self.device.resume();
    }
}
