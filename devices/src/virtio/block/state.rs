//! The saved state of a block device.

use serde::{Deserialize, Serialize};

/// A chain that was popped and not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InFlight {
    /// The queue's number.
    pub queue: u16,
    /// The chain's head.
    pub head: u16,
}

/// The state of a block device besides its disk and its queues.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Chains in flight, in the order of their pops. A device that continues from the state does
    /// them first.
    pub in_flight: Vec<InFlight>,
}
