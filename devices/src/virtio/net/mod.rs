//! The network device: packets between the guest and a TAP interface, without a copy in this
//! process.
//!
//! A packet is received into the driver's posted buffers, and sent from the driver's buffers, by
//! one system call on pinned pages. Only the kernel copies. Checksums and segmentation are left to
//! the interface, as far as they were negotiated.
//!
//! Instead of an interface there may be a program that takes packets over a socket
//! ([`clade_io::PacketStream`]). Each is copied once more, and the guest computes its checksums.
//!
//! At a fork nothing is in flight. A packet that was sent was sent by the parent, and receive
//! buffers stay posted in both VMs. A child has an interface and an address of its own. Its link
//! goes down and comes up again, and its driver is asked to announce the guest, so that the guest
//! renews its network configuration. (A guest that copied the address when it booted goes on using
//! that one until it is changed inside the guest.)
//!
//! A device may be [closed](Link): its link is down, and the host drops what comes from either side.
//! That is the host's, not the guest's: a driver that sends all the same, or resets the device, sends
//! nothing. It is inherited by forks and snapshots. A reset in place leaves it as it is.
//!
//! [Egress rules](Egress) say where a guest may send. They are the host's in the same way. With rules
//! each packet that the guest sends is copied, judged, and sent from the copy.

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
