//! TAP interfaces: packets between the host's network and memory that an operation owns.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use thiserror::Error;

use crate::buffer::Fragment;

/// Most bytes in the name of an interface.
const MAX_NAME: usize = libc::IFNAMSIZ - 1;
/// Bytes of the header before each packet: `struct virtio_net_hdr_v1`.
pub const VNET_HEADER: usize = 12;
/// Most pieces of memory that the kernel takes at once (UIO_MAXIOV).
const MAX_PIECES: usize = 1024;

/// Why there is no TAP interface.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TapError {
    /// The name is not valid.
    #[error("invalid interface name \"{name}\": 1 to {MAX_NAME} characters, no slash, space or colon")]
    Name {
        /// The name.
        name: String,
    },
    /// A system call has failed.
    #[error("TAP interface {name}: {what}")]
    Refused {
        /// The interface's name.
        name: String,
        /// The operation that has failed.
        what: &'static str,
        /// Why it has failed.
        #[source]
        source: io::Error,
    },
}

/// Packets that a receiver accepts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// Packets without a computed checksum.
    pub checksum: bool,
    /// TCP segments over IPv4 that are larger than the wire's.
    pub tso4: bool,
    /// TCP segments over IPv6 that are larger than the wire's.
    pub tso6: bool,
}

/// Whether a descriptor has something to be read, without waiting.
pub(crate) fn is_readable(fd: impl AsFd) -> bool {
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0) && fds[0].revents().contains(PollFlags::IN)
}

/// `struct ifreq`, with the fields that TAP uses.
#[repr(C)]
struct IfRequest {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    rest: [u8; 22],
}

impl IfRequest {
    fn new(name: &str, flags: libc::c_int) -> Self {
        let mut request = Self { name: [0; libc::IFNAMSIZ], flags: flags as libc::c_short, rest: [0; 22] };
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        request
    }
}

/// An interface, with one descriptor for each pair of queues. It goes with this value, unless it
/// was made persistent.
#[derive(Debug)]
pub struct Tap {
    name: String,
    queues: Vec<File>,
    /// Of each pair, whether the kernel gives it packets.
    attached: Vec<bool>,
}

impl Tap {
    /// Opens the interface `name`, or makes it. `%d` in the name becomes a free number.
    ///
    /// # Errors
    /// When the name is not valid, CAP_NET_ADMIN is missing, or the interface is in use or has
    /// another number of queues.
    pub fn open(name: &str, queues: usize) -> Result<Self, TapError> {
        let bad = |c: char| c.is_whitespace() || c.is_control() || c == '/' || c == ':';
        if name.is_empty() || name.len() > MAX_NAME || name.contains(bad) || !name.is_ascii() {
            return Err(TapError::Name { name: name.to_owned() });
        }
        let mut tap = Self { name: name.to_owned(), queues: Vec::new(), attached: vec![true; queues] };
        let several = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
        for _ in 0..queues {
            let refused = |what| {
                let name = tap.name.clone();
                move |source| TapError::Refused { name, what, source }
            };
            let options = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun");
            let file = options.map_err(refused("/dev/net/tun cannot be opened"))?;
            let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several;
            let mut request = IfRequest::new(&tap.name, flags);
            // SAFETY: TUNSETIFF takes a `struct ifreq`.
            unsafe { ioctl(&file, libc::TUNSETIFF, &mut request) }.map_err(refused("it cannot be attached to"))?;
            let mut size = VNET_HEADER as libc::c_int;
            // SAFETY: TUNSETVNETHDRSZ takes an `int`.
            unsafe { ioctl(&file, libc::TUNSETVNETHDRSZ, &mut size) }
                .map_err(refused("no packet headers of virtio's"))?;
            let len = request.name.iter().position(|byte| *byte == 0).unwrap_or(MAX_NAME);
            tap.name = String::from_utf8_lossy(&request.name[..len]).into_owned();
            tap.queues.push(file);
        }
        Ok(tap)
    }

    /// The interface as its name and the descriptors of its queues, for another process.
    #[must_use]
    pub fn into_queues(self) -> (String, Vec<OwnedFd>) {
        (self.name, self.queues.into_iter().map(OwnedFd::from).collect())
    }

    /// An interface that another process has opened ([`Tap::into_queues`]).
    #[must_use]
    pub fn of_queues(name: String, queues: Vec<OwnedFd>) -> Self {
        let attached = vec![true; queues.len()];
        Self { name, queues: queues.into_iter().map(File::from).collect(), attached }
    }

    /// The interface's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The number of pairs of queues.
    #[must_use]
    pub fn queues(&self) -> usize {
        self.queues.len()
    }

    /// The descriptor of a pair of queues, readable when a packet is available.
    #[must_use]
    pub fn descriptor(&self, queue: usize) -> Option<RawFd> {
        self.queues.get(queue).map(AsRawFd::as_raw_fd)
    }

    /// Whether a pair of queues has a packet. False if the kernel cannot be asked.
    #[must_use]
    pub fn has_packet(&self, queue: usize) -> bool {
        self.queues.get(queue).is_some_and(is_readable)
    }

    /// Sets which packets the receiver accepts.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn set_offload(&self, offload: Offload) -> io::Result<()> {
        let bit = |has: bool, bit: libc::c_uint| if has { bit } else { 0 };
        let bits = bit(offload.checksum, libc::TUN_F_CSUM)
            | bit(offload.checksum && offload.tso4, libc::TUN_F_TSO4)
            | bit(offload.checksum && offload.tso6, libc::TUN_F_TSO6);
        for file in &self.queues {
            // SAFETY: this ioctl takes its flags by value and touches no memory.
            if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(bits)) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }

    /// Makes the kernel give packets to the first `count` pairs of queues only.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn use_queues(&mut self, count: usize) -> io::Result<()> {
        if self.queues.len() < 2 {
            return Ok(());
        }
        for (index, (file, attached)) in self.queues.iter().zip(&mut self.attached).enumerate() {
            let wanted = index < count;
            if *attached != wanted {
                let flags = if wanted { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
                // SAFETY: TUNSETQUEUE takes a `struct ifreq`.
                unsafe { ioctl(file, libc::TUNSETQUEUE, &mut IfRequest::new("", flags)) }?;
                *attached = wanted;
            }
        }
        Ok(())
    }

    /// Reads a packet and its header into `buffers`, which are parts of pins for writing. Excess
    /// bytes are cut off. `None` when no packet is available.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn receive(&self, queue: usize, buffers: &[Fragment]) -> io::Result<Option<usize>> {
        self.transfer(queue, buffers, |fd, pieces, count| {
            // SAFETY: every piece is within a fragment, which the caller keeps and which is guest
            // memory pinned for writing, or a buffer; the kernel alone writes there.
            unsafe { libc::readv(fd, pieces, count) }
        })
    }

    /// Reads a packet and drops it. False when there is no packet.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn discard(&self, queue: usize) -> io::Result<bool> {
        let mut file = self.queues.get(queue).ok_or(io::ErrorKind::InvalidInput)?;
        // Excess bytes are cut off, and dropped with the rest.
        let mut head = [0; VNET_HEADER + 64];
        loop {
            match file.read(&mut head) {
                Ok(_) => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
    }

    /// Sends the packet in `buffers`, which begins with its header. None when the interface takes
    /// no packet now.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn send(&self, queue: usize, buffers: &[Fragment]) -> io::Result<Option<usize>> {
        self.transfer(queue, buffers, |fd, pieces, count| {
            // SAFETY: every piece is within a fragment, which the caller keeps; the kernel only
            // reads there.
            unsafe { libc::writev(fd, pieces, count) }
        })
    }

    fn transfer(
        &self,
        queue: usize,
        buffers: &[Fragment],
        call: impl Fn(RawFd, *const libc::iovec, libc::c_int) -> isize,
    ) -> io::Result<Option<usize>> {
        let file = self.queues.get(queue).ok_or(io::ErrorKind::InvalidInput)?;
        if buffers.len() > MAX_PIECES {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let piece = |part: &Fragment| libc::iovec { iov_base: part.address().cast(), iov_len: part.len() };
        let pieces: Vec<libc::iovec> = buffers.iter().map(piece).collect();
        loop {
            let moved = call(file.as_raw_fd(), pieces.as_ptr(), pieces.len() as libc::c_int);
            if let Ok(moved) = usize::try_from(moved) {
                return Ok(Some(moved));
            }
            match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                error => return Err(error),
            }
        }
    }
}

/// # Safety
/// The ioctl `request` reads and writes a `T`, and no memory beyond it.
unsafe fn ioctl<T>(file: &File, request: libc::Ioctl, arg: &mut T) -> io::Result<()> {
    // SAFETY: `arg` is of the type that the request needs (the caller's), and outlives the call.
    if unsafe { libc::ioctl(file.as_raw_fd(), request, std::ptr::from_mut(arg)) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_names_are_refused_by_name() {
        for name in ["", "a/b", "with space", "a:b", "sixteen-characters", "ünicode"] {
            let Err(TapError::Name { name: told }) = Tap::open(name, 1) else { panic!("{name} was taken") };
            assert_eq!(told, name);
        }
    }

    #[test]
    fn queues_come_and_go() {
        let mut tap = match Tap::open("cladeq%d", 4) {
            Ok(tap) => tap,
            Err(error) => {
                clade_test_support::skip("tap", &error.to_string());
                return;
            }
        };
        assert!(tap.name().starts_with("cladeq") && tap.queues() == 4);
        for count in [1, 4, 2] {
            tap.use_queues(count).unwrap();
        }
        tap.set_offload(Offload { checksum: true, tso4: true, tso6: true }).unwrap();
        let buffer = std::sync::Arc::new(crate::AlignedBuf::new(2048));
        let whole = Fragment::owned(&buffer, 0, 2048).unwrap();
        assert!(tap.receive(0, &[whole]).is_ok_and(|got| got.is_none()), "it is down: there is no packet");
    }
}
