//! DMA by the kernel into guest frames: io_uring with registered buffers. The frames are looked up
//! once, at registration, and later mappings at the address have no effect on them. This makes it a
//! device.
//!
//! A thread's devices share one ring with a table of buffers: a ring costs more than all operations
//! of a device.

#![allow(dead_code, reason = "not every test needs all of it")]

pub(crate) mod splice;

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::rc::Rc;

use clade_memory::{DmaPin, PinLifetime};
use io_uring::{IoUring, opcode, types};

/// Maximum number of concurrent devices of one thread.
const DEVICES: u32 = 1024;

/// State shared by a thread's devices.
struct Bus {
    ring: RefCell<IoUring>,
    free: RefCell<Vec<u32>>,
    disk: File,
}

thread_local! {
    static BUS: Rc<Bus> = Rc::new(Bus::new());
}

impl Bus {
    fn new() -> Self {
        let ring = IoUring::new(1).expect("io_uring");
        ring.submitter().register_buffers_sparse(DEVICES).expect("a table of buffers");
        // SAFETY: the name is a valid C string.
        let fd = unsafe { libc::memfd_create(c"disk".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0);
        // SAFETY: fd was just made and has no other owner.
        let disk = unsafe { File::from_raw_fd(fd) };
        Self { ring: RefCell::new(ring), free: RefCell::new((0..DEVICES).rev().collect()), disk }
    }

    fn set(&self, slot: u32, buffer: libc::iovec) {
        // SAFETY: the buffer is empty, or consists of pages that are pinned until after the slot
        // has been emptied (`Device::drop`).
        let updated = unsafe { self.ring.borrow().submitter().register_buffers_update(slot, &[buffer], None) };
        updated.expect("register the pinned pages");
    }

    fn transfer(&self, entry: &io_uring::squeue::Entry, bytes: usize) {
        let mut ring = self.ring.borrow_mut();
        // SAFETY: the entry names only a registered buffer and `disk`, both of which live until the
        // completion below.
        unsafe { ring.submission().push(entry) }.expect("an empty queue");
        ring.submit_and_wait(1).expect("submit");
        let done = ring.completion().next().expect("a completion");
        assert_eq!(done.result(), bytes as i32, "a whole transfer");
    }
}

/// A device that holds a pin and does DMA through it.
pub(crate) struct Device {
    bus: Rc<Bus>,
    slot: u32,
    // Dropped last: the kernel releases the frames first.
    pin: DmaPin,
}

impl Device {
    /// Registers the pinned pages with the kernel.
    pub(crate) fn attach(pin: DmaPin) -> Self {
        let bus = BUS.with(Rc::clone);
        let slot = bus.free.borrow_mut().pop().expect("fewer devices at a time");
        bus.set(slot, libc::iovec { iov_base: pin.host_address().cast(), iov_len: pin.len() });
        Self { bus, slot, pin }
    }

    pub(crate) fn pin(&self) -> &DmaPin {
        &self.pin
    }

    /// The device writes `bytes` from offset `at` of its pages on.
    pub(crate) fn put(&mut self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.pin.len());
        self.bus.disk.write_all_at(bytes, 0).expect("fill the disk");
        let fd = types::Fd(self.bus.disk.as_raw_fd());
        let to = self.pin.host_address().wrapping_add(at);
        let read = opcode::ReadFixed::new(fd, to, bytes.len() as u32, self.slot as u16).build();
        self.bus.transfer(&read, bytes.len());
        if self.pin.lifetime() == PinLifetime::Transient {
            self.mark_written();
        }
    }

    /// Marks the pages as written, like a direct read, which this device represents: io_uring does
    /// not mark registered buffers, and the memory manager does not mark the pages of a short pin.
    fn mark_written(&self) {
        // SAFETY: populating does not change contents. Pages that are no longer mapped are refused.
        let marked =
            unsafe { libc::madvise(self.pin.host_address().cast(), self.pin.len(), libc::MADV_POPULATE_WRITE) };
        if marked != 0 {
            println!("a short pin's pages are not marked: {}", std::io::Error::last_os_error());
        }
    }

    /// Reads from offset `at` of the device's pages on.
    pub(crate) fn get(&mut self, at: usize, bytes: usize) -> Vec<u8> {
        assert!(at + bytes <= self.pin.len());
        let fd = types::Fd(self.bus.disk.as_raw_fd());
        let from = self.pin.host_address().wrapping_add(at);
        let write = opcode::WriteFixed::new(fd, from, bytes as u32, self.slot as u16).build();
        self.bus.transfer(&write, bytes);
        let mut got = vec![0; bytes];
        self.bus.disk.read_exact_at(&mut got, 0).expect("read the disk");
        got
    }

    /// The device writes `byte` over all of its pages.
    pub(crate) fn write(&mut self, byte: u8) {
        self.put(0, &vec![byte; self.pin.len()]);
    }

    /// Reads all of the device's pages.
    pub(crate) fn read(&mut self) -> Vec<u8> {
        self.get(0, self.pin.len())
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.bus.set(self.slot, libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 });
        self.bus.free.borrow_mut().push(self.slot);
    }
}
