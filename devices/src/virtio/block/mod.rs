//! The block device: a [`Disk`](crate::disk::Disk) behind virtio.
//!
//! | to learn about | read |
//! |---|---|
//! | features, configuration space, its life | `device.rs` |
//! | what a driver asks | `request.rs` |
//! | doing it, and doing it again after a fork | `service.rs` |
//! | giving it to the disk, in pieces | `issue.rs`, `transfer.rs` |
//! | what is saved | `state.rs` |

mod device;
mod issue;
mod request;
mod service;
mod state;
#[cfg(test)]
mod tests;
mod transfer;

pub use device::{Block, BlockOptions, MAX_QUEUES};
pub use state::{BlockState, InFlight};

/// Most buffers of data in a request. With header and status, a chain takes half of a queue.
const SEG_MAX: u32 = 126;
