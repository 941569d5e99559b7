//! The socket device: streams between the guest and Unix sockets of the host.
//!
//! - The host connects to the device's socket and writes `CONNECT <port>\n`; when the guest
//!   accepts, the host reads `OK <its port>\n`, and then the stream.
//! - The guest connects to the host (CID 2) at a port; the device connects to its socket's path
//!   with `_<port>` appended, where the host listens. One port is the device's own
//!   ([`NOTICE_PORT`]).
//!
//! At a fork only the parent keeps its connections. The child has a CID and a socket of its own,
//! and its device sends the driver a transport reset, at which the guest closes every connection it
//! knows.
//!
//! A stream's bytes are bounded on both sides. The guest gets credit (`buf_alloc` in a packet), and
//! a connection is read only as far as the guest has credit. A connection that cannot continue is
//! reset, and never stops the others.

mod connection;
mod device;
mod guest;
mod host;
mod notices;
mod packet;
mod socket;
mod state;

pub use device::{Vsock, VsockError, VsockOptions, VsockStats};
pub use notices::{GuestExit, GuestNotice, NOTICE_PORT, Notices};
pub use socket::{BrokerSlot, VsockSocket, answer_broker};
pub use state::VsockState;

/// The host's CID.
pub const HOST_CID: u64 = 2;
/// The lowest CID of a guest.
pub const FIRST_GUEST_CID: u64 = 3;
