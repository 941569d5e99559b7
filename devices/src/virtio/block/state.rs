//! A saved block device.

use serde::{Deserialize, Serialize};

/// A chain that was popped and not given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InFlight {
    /// Its queue.
    pub queue: u16,
    /// Its head.
    pub head: u16,
}

/// What a block device is besides its disk and its queues.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Chains in flight, in the order they were popped. Whoever continues the device does them first, again.
    pub in_flight: Vec<InFlight>,
}
