//! A polling virtio-blk driver, in ring 3. Its state is in its area, so that another vCPU, or the
//! same after a fork, can go on.

use crate::{
    abi::{
        PAGE_SIZE, Status, VIRTIO_BASE,
        disk::{AVAILABLE, DESCRIPTORS, DiskRun, HEADER_STRIDE, HEADERS, STATE, USED, VIOLATION, What, state, word_at},
    },
    commands::{Outcome, cycles, load, poll, store},
    mailbox::Mailbox,
};
use core::{
    hint,
    sync::atomic::{Ordering, fence},
};

// Registers, by the specification.
const MAGIC_VALUE: u64 = 0x000;
const VERSION: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SEL: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SEL: u64 = 0x024;
const QUEUE_SEL: u64 = 0x030;
const QUEUE_NUM: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
const QUEUE_NOTIFY: u64 = 0x050;
const STATUS: u64 = 0x070;
const QUEUE_DESC: u64 = 0x080;
const QUEUE_DRIVER: u64 = 0x090;
const QUEUE_DEVICE: u64 = 0x0a0;
const CONFIG: u64 = 0x100;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const BLOCK: u32 = 2;
const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;
const OFFERED_BY_US: u64 = EVENT_IDX | VERSION_1 | 1 << 5 | 1 << 9 | 1 << 13 | 1 << 14;

const NEXT: u64 = 1;
const WRITE: u64 = 2;
/// Offset of the status, behind the header.
const STATUS_AT: u64 = 16;
/// In a status byte: the device has not written it.
const UNTOUCHED: u8 = 0xee;

/// A device's registers.
#[derive(Clone, Copy)]
struct Registers(u64);

impl Registers {
    fn read(self, offset: u64) -> u32 {
        // SAFETY: the page tables map the registers; absent ones read as ones.
        unsafe { ((self.0 + offset) as *const u32).read_volatile() }
    }

    fn write(self, offset: u64, value: u32) {
        // SAFETY: as for `read`; the device does not touch anything but the queue it is given.
        unsafe { ((self.0 + offset) as *mut u32).write_volatile(value) }
    }

    fn write_pair(self, offset: u64, value: u64) {
        self.write(offset, value as u32);
        self.write(offset + 4, (value >> 32) as u32);
    }
}

fn load16(at: u64) -> u16 {
    // SAFETY: as for `load`.
    unsafe { (at as *const u16).read_volatile() }
}

fn store16(at: u64, value: u16) {
    // SAFETY: as for `store`.
    unsafe { (at as *mut u16).write_volatile(value) }
}

fn load8(at: u64) -> u8 {
    // SAFETY: as for `load`.
    unsafe { (at as *const u8).read_volatile() }
}

fn store8(at: u64, value: u8) {
    // SAFETY: as for `store`.
    unsafe { (at as *mut u8).write_volatile(value) }
}

/// The words at the beginning of an area.
#[derive(Clone, Copy)]
struct Area(u64);

impl Area {
    fn get(self, word: u64) -> u64 {
        load(self.0 + STATE + word * 8)
    }

    fn set(self, word: u64, value: u64) {
        store(self.0 + STATE + word * 8, value);
    }

    fn registers(self) -> Option<Registers> {
        let at = self.get(state::REGISTERS);
        (at != 0).then_some(Registers(at))
    }
}

fn failed(result: [u64; 4]) -> Outcome {
    Outcome { status: Status::Rejected, result }
}

pub fn open(slot: u64, area: u64, size: u64) -> Outcome {
    let device = Registers(VIRTIO_BASE + slot * PAGE_SIZE);
    if device.read(MAGIC_VALUE) != MAGIC || device.read(VERSION) != 2 || device.read(DEVICE_ID) != BLOCK {
        return failed([0; 4]);
    }
    let area = Area(area);
    for word in (area.0..area.0 + HEADERS + 2 * PAGE_SIZE).step_by(8) {
        store(word, 0);
    }
    device.write(STATUS, 0);
    let mut status = 0;
    for step in [1, 2] {
        status |= step;
        device.write(STATUS, status);
    }
    let mut features = 0;
    for half in [0, 1] {
        device.write(DEVICE_FEATURES_SEL, half);
        features |= u64::from(device.read(DEVICE_FEATURES)) << (32 * half);
    }
    features &= OFFERED_BY_US;
    for half in [0, 1] {
        device.write(DRIVER_FEATURES_SEL, half);
        device.write(DRIVER_FEATURES, (features >> (32 * half)) as u32);
    }
    status |= 8;
    device.write(STATUS, status);
    device.write(QUEUE_SEL, 0);
    device.write(QUEUE_NUM, size as u32);
    device.write_pair(QUEUE_DESC, area.0 + DESCRIPTORS);
    device.write_pair(QUEUE_DRIVER, area.0 + AVAILABLE);
    device.write_pair(QUEUE_DEVICE, area.0 + USED);
    device.write(QUEUE_READY, 1);
    device.write(STATUS, status | 4);
    area.set(state::SIZE, size);
    area.set(state::FEATURES, features);
    area.set(state::REGISTERS, device.0);
    let sectors = u64::from(device.read(CONFIG)) | u64::from(device.read(CONFIG + 4)) << 32;
    Outcome { status: Status::Complete, result: [sectors, features, u64::from(device.read(STATUS)), 0] }
}

pub fn reset(area: u64) -> Outcome {
    let area = Area(area);
    let Some(device) = area.registers() else { return failed([0; 4]) };
    area.set(state::REGISTERS, 0);
    device.write(STATUS, 0);
    let mut status = device.read(STATUS);
    let mut tries = 0;
    while status != 0 && tries < 1000 {
        status = device.read(STATUS);
        tries += 1;
    }
    Outcome { status: Status::Complete, result: [u64::from(status), 0, 0, 0] }
}

pub fn run(mailbox: &Mailbox, run: DiskRun) -> Outcome {
    let area = Area(run.area);
    let Some(device) = area.registers() else { return failed([0; 4]) };
    let depth = run.depth.min(area.get(state::SIZE) / 3).max(1);
    let mut driver = Driver { area, device, run, errors: 0, wrong: 0 };
    let begin = cycles();
    let (mut next, mut done, mut flying, mut interrupted) = (0, 0, 0, false);
    let total = if run.count == 0 { u64::MAX } else { run.count };
    loop {
        let before = driver.area.get(state::AVAILABLE);
        for slot in 0..depth {
            if next == total || interrupted {
                break;
            }
            if driver.is_free(slot) {
                driver.start(slot, next);
                (next, flying) = (next + 1, flying + 1);
            }
        }
        driver.publish(before);
        driver.touch(depth);
        let finished = driver.finish();
        (done, flying) = (done + finished, flying - finished.min(flying));
        mailbox.set_progress(done);
        interrupted |= poll(mailbox).is_break();
        if (done == total || interrupted) && flying == 0 {
            break;
        }
        // Another vCPU has reset the device: no completion comes any more.
        if driver.area.registers().is_none() {
            interrupted = true;
            break;
        }
        if finished == 0 {
            hint::spin_loop();
        }
    }
    let result = [done, driver.errors, driver.wrong, cycles() - begin];
    let status = match (interrupted, driver.wrong) {
        (true, _) => Status::Interrupted,
        (false, 0) => Status::Complete,
        (false, _) => Status::Mismatch,
    };
    Outcome { status, result }
}

struct Driver {
    area: Area,
    device: Registers,
    run: DiskRun,
    errors: u64,
    wrong: u64,
}

impl Driver {
    fn is_free(&self, slot: u64) -> bool {
        self.area.get(state::FLIGHT + slot) == 0
    }

    fn header(&self, slot: u64) -> u64 {
        self.area.0 + HEADERS + slot * HEADER_STRIDE
    }

    fn buffer(&self, slot: u64) -> u64 {
        self.run.memory_of(slot)
    }

    /// Increments the word behind the next slot; the total count after it.
    fn touch(&self, depth: u64) {
        let count = self.area.get(state::TOUCHED);
        if let Some(at) = self.run.neighbour_of(count % depth) {
            store(at, load(at).wrapping_add(1));
            self.area.set(state::TOUCHED, count + 1);
        }
    }

    fn describe(&self, descriptor: u64, address: u64, len: u64, flags: u64) {
        let at = self.area.0 + DESCRIPTORS + descriptor * 16;
        store(at, address);
        store(at + 8, len | flags << 32 | (descriptor + 1) << 48);
    }

    fn start(&mut self, slot: u64, i: u64) {
        let run = &self.run;
        let (header, buffer, bytes, sector) = (self.header(slot), self.buffer(slot), run.block_bytes(), run.sector_of(i));
        let kind = match run.what {
            What::Read | What::Verify | What::VerifyZero => 0,
            What::Write | What::WriteRaw => 1,
            What::Flush => 4,
            What::Discard => 11,
            What::Zero => 13,
        };
        let in_header = if matches!(run.what, What::Zero | What::Discard | What::Flush) { 0 } else { sector };
        store(header, kind);
        store(header + 8, in_header);
        store8(header + STATUS_AT, UNTOUCHED);
        let (len, flags) = match run.what {
            What::Read | What::Verify | What::VerifyZero => (bytes, WRITE),
            What::Write | What::WriteRaw => (bytes, 0),
            What::Flush => (0, 0),
            What::Zero | What::Discard => (16, 0),
        };
        match run.what {
            What::Write => {
                for word in (0..bytes).step_by(8) {
                    store(buffer + word, word_at(run.seed, sector * 512 + word));
                }
            }
            What::Zero | What::Discard => {
                store(buffer, sector);
                store(buffer + 8, run.block);
            }
            // Bytes that the device does not write must not look right.
            What::Verify | What::VerifyZero => {
                for word in (0..bytes).step_by(8) {
                    store(buffer + word, !word_at(run.seed, sector * 512 + word));
                }
            }
            _ => {}
        }
        let first = slot * 3;
        self.describe(first, header, 16, NEXT);
        if len == 0 {
            // Straight to the status.
            store(self.area.0 + DESCRIPTORS + first * 16 + 8, 16 | NEXT << 32 | (first + 2) << 48);
        } else {
            self.describe(first + 1, buffer, len, flags | NEXT);
        }
        self.describe(first + 2, header + STATUS_AT, 1, WRITE);
        self.area.set(state::FLIGHT + slot, i + 1);
        let (filled, size) = (self.area.get(state::AVAILABLE), self.area.get(state::SIZE));
        store16(self.area.0 + AVAILABLE + 4 + filled % size * 2, first as u16);
        self.area.set(state::AVAILABLE, filled + 1);
    }

    /// Makes the operations started since `before` available, and notifies the device if it asks
    /// for that.
    fn publish(&mut self, before: u64) {
        let filled = self.area.get(state::AVAILABLE);
        if filled == before {
            return;
        }
        // Release: x86 keeps stores in order, so that the index is seen after the entries.
        store16(self.area.0 + AVAILABLE + 2, filled as u16);
        // The index before the device's flag: the device stores the flag, then reads the index.
        fence(Ordering::SeqCst);
        let size = self.area.get(state::SIZE);
        let wanted = if self.area.get(state::FEATURES) & EVENT_IDX != 0 {
            let event = load16(self.area.0 + USED + 4 + size * 8);
            (filled as u16).wrapping_sub(event).wrapping_sub(1) < (filled as u16).wrapping_sub(before as u16)
        } else {
            load16(self.area.0 + USED) & 1 == 0
        };
        if wanted {
            self.area.set(state::KICKS, self.area.get(state::KICKS) + 1);
            self.device.write(QUEUE_NOTIFY, 0);
        }
    }

    /// Handles completions of the device. Returns the number of operations.
    fn finish(&mut self) -> u64 {
        let size = self.area.get(state::SIZE);
        let used = load16(self.area.0 + USED + 2);
        let mut seen = self.area.get(state::USED);
        let mut finished = 0;
        while seen as u16 != used {
            // Acquire: x86 keeps loads in order.
            let entry = load(self.area.0 + USED + 4 + seen % size * 8 - 4) >> 32;
            let head = entry & 0xffff_ffff;
            seen += 1;
            self.area.set(state::USED, seen);
            let slot = head / 3;
            if !head.is_multiple_of(3) || slot >= size / 3 || self.is_free(slot) {
                self.wrong |= VIOLATION;
                continue;
            }
            let i = self.area.get(state::FLIGHT + slot) - 1;
            self.check(slot, i);
            self.area.set(state::FLIGHT + slot, 0);
            finished += 1;
        }
        finished
    }

    fn check(&mut self, slot: u64, i: u64) {
        match load8(self.header(slot) + STATUS_AT) {
            0 => {}
            UNTOUCHED => self.wrong |= VIOLATION,
            _ => {
                self.errors += 1;
                return;
            }
        }
        let zero = self.run.what == What::VerifyZero;
        if zero || self.run.what == What::Verify {
            let (buffer, start) = (self.buffer(slot), self.run.sector_of(i) * 512);
            for word in (0..self.run.block_bytes()).step_by(8) {
                let want = if zero { 0 } else { word_at(self.run.seed, start + word) };
                self.wrong += u64::from(load(buffer + word) != want);
            }
        }
    }
}
