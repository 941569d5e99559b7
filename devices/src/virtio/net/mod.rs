//! The network device: packets between the guest and a TAP interface, read and written where they are.
//!
//! A packet is received into buffers the driver has posted and sent from where the driver has it, by one system call on pinned pages: nothing is
//! copied but by the kernel. Checksums and segmentation are left to whoever can do them (what was negotiated is told to the interface).
//!
//! At a fork nothing is in flight: a packet that was sent has been sent (by the parent), and receive buffers stay posted in both. A child has an
//! interface and an address of its own; its link goes down and comes up again, and it is asked to announce itself, so that a guest renews
//! what it had from the network. (A guest that copied the address when it booted goes on using that until it is told otherwise.)

mod control;
mod device;
mod mac;
mod posted;
mod state;

pub use device::{MAX_PAIRS, Net, NetOptions, NetStats};
pub use mac::{Mac, MacError};
pub use state::NetState;
