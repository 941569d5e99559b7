//! The socket device: streams between the guest and Unix sockets of the host.
//!
//! * The host connects to the device's socket and writes `CONNECT <port>\n`; when the guest accepts, it reads `OK <its port>\n`, and then the
//!   stream.
//! * The guest connects to the host (CID 2) at a port; the device connects to its socket's path with `_<port>` behind it, where the host listens.
//!
//! At a fork the parent's connections go on. A child has none of them: its device is told apart by its own CID and socket, and tells the driver
//! that the transport was reset, at which a guest closes every connection it thinks it has.
//!
//! A stream's bytes are bounded on both sides: the guest is told how much may be on its way ([`packet::Header::buffer`]), and a connection is read from
//! only as far as the guest has room. A connection that cannot go on is reset; it never stops the others.

mod connection;
mod device;
mod guest;
mod host;
mod packet;
mod state;

pub use device::{Vsock, VsockError, VsockOptions, VsockStats};
pub use state::VsockState;

/// The host's address.
pub const HOST_CID: u64 = 2;
/// The lowest address a guest can have.
pub const FIRST_GUEST_CID: u64 = 3;
