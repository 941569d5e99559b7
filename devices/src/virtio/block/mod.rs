//! The block device: a [`Disk`](crate::disk::Disk) behind virtio.
//!
//! | to learn about | read |
//! |---|---|
//! | features, configuration space, its life | `device.rs` |
//! | what a driver asks | `request.rs` |
//! | doing it, and doing it again after a fork | `service.rs` |
//! | what is saved | `state.rs` |

mod device;
mod request;
mod service;
mod state;

pub use device::{Block, BlockOptions, MOST_QUEUES, QUEUE_SIZE};
pub use state::{BlockState, InFlight};
