//! The block device: a [`Disk`](clade_block::Disk) behind virtio.
//!
//! | topic | file |
//! |---|---|
//! | features, configuration space, activation, reset | `device.rs` |
//! | the driver's requests | `request.rs` |
//! | executing requests, and repeating them after a fork | `service.rs` |
//! | giving them and their memory to the disk | `issue.rs` |
//! | saved state | `state.rs` |

mod device;
mod issue;
mod request;
mod service;
mod state;
#[cfg(test)]
mod tests;

pub use device::{Block, BlockOptions, DiskNotTaken, MAX_QUEUES};
pub use state::{BlockState, InFlight};

/// Maximum number of data buffers in a request. With header and status, a chain takes half of a
/// queue.
const SEG_MAX: u32 = 126;
