//! A driver as in a guest: uses the device only through registers and guest memory.

use std::path::PathBuf;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use clade_block::{Disk, DiskConfig, DiskImage};
use clade_devices::MmioDevice;
use clade_devices::virtio::block::{Block, BlockOptions};
use clade_devices::virtio::{Backend, DeviceState, EventFds, TransportState, VirtioMmio, regs};
use clade_host_io::Gate;
use clade_memory::{GuestRam, Quiesced, RamLayout, Store};
use clade_test_support::{Patience, wait_until};
use vm_memory::{Bytes, GuestAddress};

pub(crate) const RAM: u64 = 16 << 20;
/// Start of the rings: 64 KiB per queue.
pub(crate) const RINGS: u64 = 0x10_0000;
pub(crate) const DATA: u64 = 0x40_0000;
pub(crate) const SIZE: u16 = 64;
pub(crate) const OK: u32 = 15;
pub(crate) const NEEDS_RESET: u32 = 0x40;

/// Limit after which a wait counts as endless.
pub(crate) const SOON: Duration = Duration::from_secs(120);

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// The feature bit of indirect tables.
pub(crate) const INDIRECT_DESC: u64 = 1 << 28;

/// A descriptor's bytes.
pub(crate) fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

/// A device, its memory, and the driver's state.
pub(crate) struct Machine {
    pub(crate) ram: GuestRam,
    pub(crate) device: VirtioMmio,
    event_fds: EventFds,
    options: BlockOptions,
    /// Features that the driver declines.
    pub(crate) declined: u64,
    available: Vec<u16>,
    used: Vec<u16>,
}

/// A disk in a directory.
pub(crate) struct File {
    dir: tempfile::TempDir,
    pub(crate) path: PathBuf,
}

impl File {
    /// Holds later requests to this disk and its overlays until the gate is opened.
    pub(crate) fn gate(&self) -> Gate {
        Gate::close(self.dir.path()).unwrap()
    }

    /// `bytes` bytes: each sector is filled with its number.
    pub(crate) fn new(bytes: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let all: Vec<u8> = (0..bytes).map(|at| (at / 512) as u8).collect();
        std::fs::write(&path, all).unwrap();
        Self { dir, path }
    }

    pub(crate) fn config(&self) -> DiskConfig {
        DiskConfig::new(&self.path)
    }
}

pub(crate) fn ram() -> GuestRam {
    GuestRam::reserve(&RamLayout::new(RAM).unwrap(), &Store::open_small().unwrap()).unwrap()
}

impl Machine {
    pub(crate) fn new(config: &DiskConfig, options: BlockOptions) -> Self {
        let ram = ram();
        ram.populate().unwrap();
        let queues = usize::from(options.queues);
        let event_fds = EventFds::new(queues).unwrap();
        let block = Block::new(Disk::open(config).unwrap(), &options);
        let device = VirtioMmio::new(Box::new(block), &ram, event_fds.clone(), false);
        Self { ram, device, event_fds, options, declined: 0, available: vec![0; queues], used: vec![0; queues] }
    }

    /// A machine with the driver ready.
    pub(crate) fn started(config: &DiskConfig) -> Self {
        let mut machine = Self::new(config, BlockOptions::default());
        machine.start();
        machine
    }

    pub(crate) fn read(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.device.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub(crate) fn write(&self, offset: u64, value: u32) {
        self.device.write(offset, &value.to_le_bytes());
    }

    /// Negotiates up to FEATURES_OK, with all offered features except the declined ones.
    pub(crate) fn negotiate(&self) -> u64 {
        self.write(regs::STATUS, 0);
        self.write(regs::STATUS, 1);
        self.write(regs::STATUS, 3);
        let mut features = 0;
        for half in [0, 1] {
            self.write(regs::DEVICE_FEATURES_SEL, half);
            let offered = self.read(regs::DEVICE_FEATURES) & !((self.declined >> (32 * half)) as u32);
            self.write(regs::DRIVER_FEATURES_SEL, half);
            self.write(regs::DRIVER_FEATURES, offered);
            features |= u64::from(offered) << (32 * half);
        }
        self.write(regs::STATUS, 11);
        features
    }

    pub(crate) fn set_up_queue(&self, queue: u16) {
        let rings = RINGS + u64::from(queue) * 0x1_0000;
        self.write(regs::QUEUE_SEL, u32::from(queue));
        self.write(regs::QUEUE_NUM, u32::from(SIZE));
        for (low, at) in [
            (regs::QUEUE_DESC_LOW, rings),
            (regs::QUEUE_DRIVER_LOW, rings + 0x4000),
            (regs::QUEUE_DEVICE_LOW, rings + 0x8000),
        ] {
            self.write(low, at as u32);
            self.write(low + 4, (at >> 32) as u32);
        }
        self.write(regs::QUEUE_READY, 1);
    }

    pub(crate) fn start(&mut self) {
        self.negotiate();
        for queue in 0..self.options.queues {
            let rings = RINGS + u64::from(queue) * 0x1_0000;
            self.ram.memory().write_slice(&[0; 0xc000], GuestAddress(rings)).unwrap();
            self.set_up_queue(queue);
            (self.available[usize::from(queue)], self.used[usize::from(queue)]) = (0, 0);
        }
        self.write(regs::STATUS, 15);
    }

    pub(crate) fn describe(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        self.put(RINGS + u64::from(index) * 16, &descriptor(address, len, flags, next));
    }

    /// Writes a table: address, length, flags and next of each descriptor.
    pub(crate) fn table(&self, at: u64, entries: &[(u64, u32, u16, u16)]) {
        let bytes: Vec<u8> =
            entries.iter().flat_map(|&(at, len, flags, next)| descriptor(at, len, flags, next)).collect();
        self.put(at, &bytes);
    }

    /// Makes the chain at `head` of the first queue available, without a notification.
    pub(crate) fn offer(&mut self, head: u16) {
        let at = RINGS + 0x4000 + 4 + u64::from(self.available[0] % SIZE) * 2;
        self.ram.memory().write_obj(head, GuestAddress(at)).unwrap();
        self.available[0] = self.available[0].wrapping_add(1);
        fence(Ordering::SeqCst);
        self.ram.memory().write_obj(self.available[0], GuestAddress(RINGS + 0x4002)).unwrap();
    }

    pub(crate) fn kick(&self) {
        self.write(regs::QUEUE_NOTIFY, 0);
    }

    /// Writes request `n` (of 20) into descriptors 3n.., with its data at page n. Returns its head.
    pub(crate) fn request(&self, n: u16, kind: u32, sector: u64, len: u32) -> u16 {
        let header = DATA - 0x1000 + u64::from(n) * 32;
        self.ram.memory().write_obj(kind, GuestAddress(header)).unwrap();
        self.ram.memory().write_obj(sector, GuestAddress(header + 8)).unwrap();
        self.ram.memory().write_obj(0xeeu8, GuestAddress(header + 16)).unwrap();
        let head = n * 3;
        self.describe(head, header, 16, NEXT, if len == 0 { head + 2 } else { head + 1 });
        let flags = if matches!(kind, 0 | 8) { WRITE } else { 0 };
        self.describe(head + 1, self.data(n), len, flags | NEXT, head + 2);
        self.describe(head + 2, header + 16, 1, WRITE, 0);
        head
    }

    /// Moves all of request `n` except its first `direct` descriptors into a table at `at`. Their
    /// descriptors in the ring become invalid.
    pub(crate) fn fold(&self, n: u16, direct: u16, at: u64) -> u16 {
        let head = n * 3;
        let mut table = self.bytes(RINGS + u64::from(head + direct) * 16, usize::from(3 - direct) * 16);
        for (next, entry) in (1u16..).zip(table.chunks_mut(16)) {
            entry[14..].copy_from_slice(&next.to_le_bytes());
        }
        self.put(at, &table);
        (head + direct..head + 3).for_each(|index| self.describe(index, u64::MAX, 0, u16::MAX, u16::MAX));
        self.describe(head + direct, at, table.len() as u32, INDIRECT, 0xffff);
        head
    }

    /// Checks that requests 0 to 7, reads into the even pages and writes from the odd ones, each of
    /// 8 sectors, are in the used ring exactly once and correct.
    pub(crate) fn expect_eight(&mut self) {
        let mut heads: Vec<u32> = (0..8).map(|_| self.next_used(SOON).expect("each is given back").0).collect();
        heads.sort_unstable();
        assert_eq!(heads, (0..8).map(|n| n * 3).collect::<Vec<_>>(), "each once");
        assert_eq!(self.next_used(Duration::from_millis(100)), None, "and none twice");
        for n in 0..8 {
            assert_eq!(self.status_of(n), 0);
            let read = self.bytes(self.data(n), 4096);
            assert!(n % 2 == 1 || (0..8).all(|s| read[s * 512] == (usize::from(n) * 8 + s) as u8), "{n}");
        }
    }

    pub(crate) fn data(&self, n: u16) -> u64 {
        DATA + u64::from(n) * 0x1_0000
    }

    pub(crate) fn status_of(&self, n: u16) -> u8 {
        self.ram.memory().read_obj(GuestAddress(DATA - 0x1000 + u64::from(n) * 32 + 16)).unwrap()
    }

    /// Waits for the next entry of the used ring: head and length.
    pub(crate) fn next_used(&mut self, patience: Duration) -> Option<(u32, u32)> {
        let mut patience = Patience::new(patience);
        loop {
            let index: u16 = self.ram.memory().load(GuestAddress(RINGS + 0x8002), Ordering::Acquire).unwrap();
            if index != self.used[0] {
                let at = RINGS + 0x8004 + u64::from(self.used[0] % SIZE) * 8;
                self.used[0] = self.used[0].wrapping_add(1);
                let entry: u64 = self.ram.memory().read_obj(GuestAddress(at)).unwrap();
                return Some((entry as u32, (entry >> 32) as u32));
            }
            if !patience.tick() {
                return None;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// Executes one request. Returns its status and the length reported by the device.
    pub(crate) fn one(&mut self, kind: u32, sector: u64, len: u32) -> (u8, u32) {
        let head = self.request(0, kind, sector, len);
        self.offer(head);
        self.kick();
        let (id, written) = self.next_used(SOON).expect("it is given back");
        assert_eq!(id, u32::from(head));
        (self.status_of(0), written)
    }

    pub(crate) fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.memory().read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    pub(crate) fn put(&self, at: u64, bytes: &[u8]) {
        self.ram.memory().write_slice(bytes, GuestAddress(at)).unwrap();
    }

    /// Whether the interrupt was raised since the last call.
    pub(crate) fn interrupted(&self) -> bool {
        self.event_fds.irq.eventfd().read().is_ok()
    }

    /// The device sets its status before it interrupts: a driver that has read one waits for the other.
    pub(crate) fn wait_for_interrupt(&self, after: &str) {
        wait_until(&format!("an interrupt after {after}"), || self.interrupted());
    }

    pub(crate) fn wait_for_status(&self, bits: u32) {
        wait_until(&format!("the status has {bits:#x}"), || self.read(regs::STATUS) & bits == bits);
    }

    /// A fork: memory and device at one instant.
    pub(crate) fn fork(&self) -> Image {
        self.device.quiesce();
        let (state, Backend::Disk(disk)) = self.device.save().unwrap() else { panic!("a disk without a disk") };
        let (ram, _) = self.ram.freeze(&Quiesced::by(&clade_memory::NoWriters)).unwrap();
        self.device.resume();
        let (options, declined) = (self.options, self.declined);
        Image { state, disk, ram, options, declined, available: self.available.clone(), used: self.used.clone() }
    }
}

/// Waits until `count` requests of `machine` are in flight together.
pub(crate) fn wait_in_flight(machine: &Machine, count: usize) {
    wait_until(&format!("{count} requests are in flight together"), || machine.fork().in_flight() >= count);
}

pub(crate) struct Image {
    pub(crate) state: TransportState,
    pub(crate) disk: DiskImage,
    ram: clade_memory::RamImage,
    options: BlockOptions,
    declined: u64,
    available: Vec<u16>,
    used: Vec<u16>,
}

impl Image {
    pub(crate) fn in_flight(&self) -> usize {
        self.state.device.in_flight()
    }

    /// Takes the same machine back to this instant, paused.
    pub(crate) fn rewind(&self, machine: &mut Machine) {
        machine.device.quiesce();
        assert!(machine.device.halt(SOON));
        machine.ram.reset(&self.ram, &Quiesced::by(&clade_memory::NoWriters), Duration::ZERO).unwrap();
        machine.device.rewind(&self.state, &Backend::Disk(self.disk.clone())).unwrap();
        machine.available.clone_from(&self.available);
        machine.used.clone_from(&self.used);
    }

    /// A child, paused.
    pub(crate) fn child(&self) -> Machine {
        let ram = ram();
        ram.adopt(&self.ram).unwrap();
        let event_fds = EventFds::new(usize::from(self.options.queues)).unwrap();
        let DeviceState::Block(block) = &self.state.device else { panic!("{:?}", self.state) };
        let device = Box::new(Block::restore(block, self.disk.open().unwrap(), &self.options));
        let device = VirtioMmio::restore(device, &ram, event_fds.clone(), &self.state).unwrap();
        let (available, used) = (self.available.clone(), self.used.clone());
        Machine { ram, device, event_fds, options: self.options, declined: self.declined, available, used }
    }
}
