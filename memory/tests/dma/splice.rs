//! A reader that holds frames by reference, read-only, as `vmsplice` does and as a device's short
//! read may.

#![allow(dead_code, reason = "not every test needs all of it")]

use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;

use clade_memory::DmaPin;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};

/// Guest pages in a pipe: frames, not bytes.
#[derive(Debug)]
pub(crate) struct Splice {
    out: File,
    bytes: usize,
}

impl Splice {
    /// Takes references to the frames that are behind `pin` now.
    pub(crate) fn of(pin: &DmaPin) -> Self {
        let (out, into) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        fcntl_setpipe_size(&into, pin.len()).unwrap();
        let mut done = 0;
        while done < pin.len() {
            let start = pin.host_address().wrapping_add(done);
            let rest = libc::iovec { iov_base: start.cast(), iov_len: pin.len() - done };
            // SAFETY: the pinned range is mapped; the kernel takes references to its pages, which
            // nothing in Rust refers to.
            let took = unsafe { libc::vmsplice(into.as_raw_fd(), &raw const rest, 1, 0) };
            assert!(took > 0, "vmsplice: {}", std::io::Error::last_os_error());
            done += took as usize;
        }
        Self { out: out.into(), bytes: pin.len() }
    }

    /// The current bytes of those frames.
    pub(crate) fn read(mut self) -> Vec<u8> {
        let mut got = vec![0; self.bytes];
        self.out.read_exact(&mut got).unwrap();
        got
    }
}

/// The first word of a page's bytes.
pub(crate) fn page_of(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[..8]);
    u64::from_le_bytes(word)
}
