//! Backends of network devices.

use std::io;
use std::os::fd::{OwnedFd, RawFd};

use crate::buffer::Fragment;
use crate::packet_stream::PacketStream;
use crate::tap::{Offload, Tap};

/// The host's end of a network device: a TAP interface, or a program that takes its packets over a
/// socket.
#[derive(Debug)]
pub enum NetBackend {
    /// An interface of the host's.
    Tap(Tap),
    /// A program.
    Stream(PacketStream),
}

impl From<Tap> for NetBackend {
    fn from(tap: Tap) -> Self {
        Self::Tap(tap)
    }
}

impl From<PacketStream> for NetBackend {
    fn from(stream: PacketStream) -> Self {
        Self::Stream(stream)
    }
}

impl NetBackend {
    /// The interface's name. Empty for a program.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Tap(tap) => tap.name(),
            Self::Stream(_) => "",
        }
    }

    /// Its name and its descriptors, for another process.
    #[must_use]
    pub fn into_queues(self) -> (String, Vec<OwnedFd>) {
        match self {
            Self::Tap(tap) => tap.into_queues(),
            Self::Stream(stream) => (String::new(), vec![stream.into_socket()]),
        }
    }

    /// Wraps queues that another process has opened ([`NetBackend::into_queues`]). `None` without a
    /// descriptor.
    #[must_use]
    pub fn of_queues(name: String, queues: Vec<OwnedFd>) -> Option<Self> {
        if !name.is_empty() {
            return (!queues.is_empty()).then(|| Tap::of_queues(name, queues).into());
        }
        queues.into_iter().next().map(|socket| PacketStream::new(socket).into())
    }

    /// The number of pairs of queues.
    #[must_use]
    pub fn queues(&self) -> usize {
        match self {
            Self::Tap(tap) => tap.queues(),
            Self::Stream(_) => 1,
        }
    }

    /// Whether it takes packets without checksums, and segments larger than the wire's.
    #[must_use]
    pub fn has_offloads(&self) -> bool {
        matches!(self, Self::Tap(_))
    }

    /// Whether no more packets can come.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        match self {
            Self::Tap(_) => false,
            Self::Stream(stream) => stream.has_ended(),
        }
    }

    /// The descriptor of a pair of queues, readable when a packet is available.
    #[must_use]
    pub fn descriptor(&self, queue: usize) -> Option<RawFd> {
        match self {
            Self::Tap(tap) => tap.descriptor(queue),
            Self::Stream(stream) => (queue == 0).then(|| stream.descriptor()),
        }
    }

    /// Whether a pair of queues has a packet. False if the host cannot be asked.
    #[must_use]
    pub fn has_packet(&self, queue: usize) -> bool {
        match self {
            Self::Tap(tap) => tap.has_packet(queue),
            Self::Stream(stream) => queue == 0 && stream.has_packet(),
        }
    }

    /// Sets which packets the receiver accepts.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn set_offload(&self, offload: Offload) -> io::Result<()> {
        match self {
            Self::Tap(tap) => tap.set_offload(offload),
            Self::Stream(_) => Ok(()),
        }
    }

    /// Makes the kernel give packets to the first `count` pairs of queues only.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn use_queues(&mut self, count: usize) -> io::Result<()> {
        match self {
            Self::Tap(tap) => tap.use_queues(count),
            Self::Stream(_) => Ok(()),
        }
    }

    /// Reads a packet and its header into `buffers`: see [`Tap::receive`] and
    /// [`PacketStream::receive`].
    ///
    /// # Errors
    /// When there can be none.
    pub fn receive(&mut self, queue: usize, buffers: &[Fragment]) -> io::Result<Option<usize>> {
        match self {
            Self::Tap(tap) => tap.receive(queue, buffers),
            Self::Stream(stream) => stream.receive(buffers),
        }
    }

    /// Reads a packet and drops it. Returns false when no packet is available.
    ///
    /// # Errors
    /// As for [`NetBackend::receive`].
    pub fn discard(&mut self, queue: usize) -> io::Result<bool> {
        match self {
            Self::Tap(tap) => tap.discard(queue),
            Self::Stream(stream) => stream.discard(),
        }
    }

    /// Sends the packet in `buffers`, which begins with its header. `None` when it is not taken
    /// now.
    ///
    /// # Errors
    /// When it is not taken at all.
    pub fn send(&mut self, queue: usize, buffers: &[Fragment]) -> io::Result<Option<usize>> {
        match self {
            Self::Tap(tap) => tap.send(queue, buffers),
            Self::Stream(stream) => stream.send(buffers),
        }
    }

    /// Sends the rest of a packet that was taken in part. Returns false when some of it is still
    /// left.
    ///
    /// # Errors
    /// As for [`NetBackend::send`].
    pub fn flush(&mut self) -> io::Result<bool> {
        match self {
            Self::Tap(_) => Ok(true),
            Self::Stream(stream) => stream.flush(),
        }
    }
}
