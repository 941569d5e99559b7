//! The network device: packets between the guest and a TAP interface, without a copy in this
//! process.
//!
//! A packet is received into the driver's posted buffers, and sent from the driver's buffers, by
//! one system call on pinned pages. Only the kernel copies. Checksums and segmentation are left to
//! the interface, as far as they were negotiated.
//!
//! The backend may be a program that takes packets over a socket instead
//! ([`clade_host_io::PacketStream`]). Packets are then copied once more, and the guest computes their
//! checksums.
//!
//! At a fork no packet is in flight. A packet that was sent was sent by the parent, and receive
//! buffers stay posted in both VMs. A child has an interface and an address of its own. Its link
//! goes down and comes up again, and its driver is asked to announce the guest, so that the guest
//! renews its network configuration. (A guest that copied the address when it booted goes on using
//! that one until it is changed inside the guest.)
//!
//! A device may be [closed](Link): its link is down, and the host drops packets from either side.
//! The guest cannot override that: if its driver still sends packets, or resets the device, they
//! are dropped too. Forks and snapshots inherit the closed state. A reset in place leaves it
//! unchanged.
//!
//! [Egress rules](Egress) limit the addresses that a guest may send to. The guest cannot override
//! them either. With rules, each packet from the guest is copied, judged, and sent from the copy.

mod control;
mod device;
mod egress;
mod mac;
mod posted;
mod state;

pub use device::{MAX_PAIRS, Net, NetOptions, NetStats};
pub use egress::{Egress, EgressError, EgressRule, MAX_RULES};
pub use mac::{Mac, MacError};
pub use state::{Link, NetState};
