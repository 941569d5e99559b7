//! DMA by the kernel into guest frames: io_uring with a registered buffer. The frames are looked up once, at registration; what is mapped
//! at the address later is of no interest to it. That is what makes it a device.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use clade_memory::DmaPin;
use io_uring::{IoUring, opcode, types};

/// A device that holds a pin and does DMA through it.
pub(crate) struct Device {
    ring: IoUring,
    disk: File,
    // Dropped last: the ring lets go of the frames first.
    pin: DmaPin,
}

impl Device {
    /// Registers the pinned pages with the kernel.
    pub(crate) fn attach(pin: DmaPin) -> Self {
        let ring = IoUring::new(1).expect("io_uring");
        let buffer = libc::iovec { iov_base: pin.host_address().cast(), iov_len: pin.len() };
        // SAFETY: the pages are pinned until after the ring is gone (field order).
        unsafe { ring.submitter().register_buffers(&[buffer]) }.expect("register the pinned pages");
        // SAFETY: the name is a valid C string.
        let fd = unsafe { libc::memfd_create(c"disk".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0);
        // SAFETY: fd was just made and belongs to nobody else.
        let disk = unsafe { File::from_raw_fd(fd) };
        disk.set_len(pin.len() as u64).expect("size the disk");
        Self { ring, disk, pin }
    }

    #[allow(dead_code, reason = "not every test looks at it")]
    pub(crate) fn pin(&self) -> &DmaPin {
        &self.pin
    }

    fn transfer(&mut self, entry: &io_uring::squeue::Entry) {
        // SAFETY: the entry names only the registered buffer and `disk`, both of which live until the completion below.
        unsafe { self.ring.submission().push(entry) }.expect("an empty queue");
        self.ring.submit_and_wait(1).expect("submit");
        let done = self.ring.completion().next().expect("a completion");
        assert_eq!(done.result(), self.pin.len() as i32, "a whole transfer");
    }

    /// The device writes `byte` over all of its pages.
    pub(crate) fn write(&mut self, byte: u8) {
        self.disk.write_all_at(&vec![byte; self.pin.len()], 0).expect("fill the disk");
        let fd = types::Fd(self.disk.as_raw_fd());
        let read = opcode::ReadFixed::new(fd, self.pin.host_address(), self.pin.len() as u32, 0).build();
        self.transfer(&read);
    }

    /// What the device reads from its pages.
    pub(crate) fn read(&mut self) -> Vec<u8> {
        let fd = types::Fd(self.disk.as_raw_fd());
        let write = opcode::WriteFixed::new(fd, self.pin.host_address(), self.pin.len() as u32, 0).build();
        self.transfer(&write);
        let mut got = vec![0; self.pin.len()];
        self.disk.read_exact_at(&mut got, 0).expect("read the disk");
        got
    }
}
