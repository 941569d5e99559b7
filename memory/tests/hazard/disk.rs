//! The disk: a patterned file read past the page cache into guest pages, by io_uring, into
//! addresses (looked up at each request) and into registered buffers (looked up once, and held by a
//! long pin over many requests).

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::ops::{Range, RangeInclusive};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use clade_memory::{Access, DmaPin, GuestRam, PAGE_SIZE, PageRange, PinLifetime};
use io_uring::{IoUring, opcode, types};
use vm_memory::{Bytes, GuestAddress, VolatileSlice};

/// Buffers, half of them for each way of addressing.
pub(crate) const SLOTS: usize = 16;
const SLOT_PAGES: u64 = 2;
/// Distance between two buffers in pages.
const STRIDE: u64 = 97;
/// Guest bytes at either end of a buffer's pages.
const MARGIN: u64 = 512;
const LEN: u64 = SLOT_PAGES * PAGE_SIZE - 2 * MARGIN;
/// Number of patterns in the file. An old one is reused only after as many requests, of which one
/// is in flight at a time.
const PATTERNS: u64 = 64;
/// Number of requests through one registration.
const HOLD: u64 = 16;

/// Pages around a buffer.
fn pages(slot: usize) -> PageRange {
    PageRange::with_len(7 + slot as u64 * STRIDE, SLOT_PAGES)
}

/// The buffer itself, in guest addresses.
pub(crate) fn buffer(slot: usize) -> Range<u64> {
    let start = pages(slot).start() * PAGE_SIZE + MARGIN;
    start..start + LEN
}

/// Word `at` of the data of request `n`; 0 stands for no request yet.
fn word(n: u64, at: u64) -> u64 {
    if n == 0 { 0 } else { (n % PATTERNS + 1) << 32 | at }
}

/// Number of bytes in a buffer that come from none of these requests.
pub(crate) fn wrong_bytes(ram: &GuestRam, slot: usize, requests: RangeInclusive<u64>) -> u64 {
    let mut got = vec![0u8; LEN as usize];
    ram.memory().read_slice(&mut got, GuestAddress(buffer(slot).start)).unwrap();
    let one = |(at, got): (u64, &[u8])| requests.clone().any(|n| word(n, at).to_ne_bytes() == got);
    (0..).zip(got.chunks_exact(8)).filter(|word| !one(*word)).count() as u64 * 8
}

/// How requests address memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    Plain,
    Registered,
}

pub(crate) struct Disk {
    path: PathBuf,
    file: File,
    /// Requests issued into each buffer, and requests completed.
    counts: [(AtomicU64, AtomicU64); SLOTS],
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Disk {
    /// A file on the disk that the build directory is on, opened for reads past the page cache.
    pub(crate) fn new() -> io::Result<Self> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let name = format!("hazard-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let mut content = Vec::new();
        for n in 1..=PATTERNS {
            // The last pattern, which is 0 modulo PATTERNS, is the first in the file.
            let n = n - 1 + PATTERNS;
            (0..LEN / 8).for_each(|at| content.extend(word(n, at).to_ne_bytes()));
        }
        let mut file = File::create(&path)?;
        file.write_all(&content)?;
        file.sync_all()?;
        let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path)?;
        let disk = Self { path, file, counts: Default::default() };
        disk.probe()?;
        Ok(disk)
    }

    /// Reads once, because opening may succeed where reading does not.
    fn probe(&self) -> io::Result<()> {
        let mut room = vec![0u8; LEN as usize + 4096];
        let aligned = room.as_mut_ptr().wrapping_add(4096 - room.as_ptr() as usize % 4096);
        // SAFETY: LEN bytes from `aligned` on lie within `room`.
        let got = unsafe { libc::pread(self.file.as_raw_fd(), aligned.cast(), LEN as usize, 0) };
        if got == LEN as isize { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// The last request completed into each buffer. Acquire: its bytes are there.
    pub(crate) fn completed(&self) -> Vec<u64> {
        self.counts.iter().map(|(_, completed)| completed.load(Ordering::Acquire)).collect()
    }

    /// The last request issued into each buffer.
    pub(crate) fn issued(&self) -> Vec<u64> {
        self.counts.iter().map(|(issued, _)| issued.load(Ordering::Acquire)).collect()
    }

    /// Reads into half of the buffers concurrently until `stop` is set. Counts the bytes that the
    /// parent then lacks.
    pub(crate) fn serve(&self, how: How, ram: &GuestRam, stop: &AtomicBool, done: &AtomicU64, wrong: &AtomicU64) {
        let half = SLOTS / 2;
        let slots = if how == How::Plain { 0..half } else { half..SLOTS };
        let mut ring = IoUring::new(half as u32).expect("io_uring");
        if how == How::Registered {
            ring.submitter().register_buffers_sparse(half as u32).expect("a table of buffers");
        }
        let mut pins: Vec<Option<DmaPin>> = (0..half).map(|_| None).collect();
        for round in 0u64.. {
            if stop.load(Ordering::Acquire) {
                break;
            }
            for (at, slot) in slots.clone().enumerate() {
                // A short pin for one request, or a long one for several; staggered, so that some
                // are always held.
                if how == How::Plain || (round + slot as u64).is_multiple_of(HOLD) || pins[at].is_none() {
                    release(how, &ring, at, &mut pins[at]);
                    pins[at] = Some(self.pin(how, ram, slot, &ring, at));
                }
                self.submit(how, &mut ring, slot, at, pins[at].as_ref().unwrap());
            }
            ring.submit_and_wait(half).expect("submit");
            for entry in ring.completion() {
                let slot = entry.user_data() as usize;
                assert_eq!(entry.result(), LEN as i32, "a whole transfer");
                let (issued, completed) = &self.counts[slot];
                let n = issued.load(Ordering::Relaxed);
                completed.store(n, Ordering::Release);
                wrong.fetch_add(wrong_bytes(ram, slot, n..=n), Ordering::Relaxed);
                done.fetch_add(1, Ordering::Relaxed);
            }
        }
        pins.iter_mut().enumerate().for_each(|(at, pin)| release(how, &ring, at, pin));
    }

    fn pin(&self, how: How, ram: &GuestRam, slot: usize, ring: &IoUring, at: usize) -> DmaPin {
        let term = if how == How::Plain { PinLifetime::Transient } else { PinLifetime::LongTerm };
        let pin = ram.regions()[0].pin_as("disk", pages(slot), Access::Write, term).expect("a pin");
        if how == How::Registered {
            register(ring, at, libc::iovec { iov_base: pin.host_address().cast(), iov_len: pin.len() });
        }
        pin
    }

    fn submit(&self, how: How, ring: &mut IoUring, slot: usize, at: usize, pin: &DmaPin) {
        // Release: publishes the pin with the count.
        let n = self.counts[slot].0.fetch_add(1, Ordering::Release) + 1;
        let fd = types::Fd(self.file.as_raw_fd());
        let slice: VolatileSlice<'_> = pin.slice();
        let to = slice.ptr_guard_mut().as_ptr().wrapping_add(MARGIN as usize);
        let offset = n % PATTERNS * LEN;
        let entry = match how {
            How::Plain => opcode::Read::new(fd, to, LEN as u32).offset(offset).build(),
            How::Registered => opcode::ReadFixed::new(fd, to, LEN as u32, at as u16).offset(offset).build(),
        };
        // SAFETY: the pages are pinned until the completion has been reaped, and the file lives as
        // long as `self`.
        unsafe { ring.submission().push(&entry.user_data(slot as u64)) }.expect("room in the queue");
    }
}

fn register(ring: &IoUring, at: usize, buffer: libc::iovec) {
    // SAFETY: the buffer is empty, or consists of pages that stay pinned until it is deregistered.
    let updated = unsafe { ring.submitter().register_buffers_update(at as u32, &[buffer], None) };
    updated.expect("register the pinned pages");
}

/// Drops a pin, after the kernel has released the frames.
fn release(how: How, ring: &IoUring, at: usize, pin: &mut Option<DmaPin>) {
    if pin.is_some() && how == How::Registered {
        register(ring, at, libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 });
    }
    drop(pin.take());
}
