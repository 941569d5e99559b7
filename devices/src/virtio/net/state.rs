//! What is saved of a network device.

use serde::{Deserialize, Serialize};

/// A network device's state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// Pairs of queues that the driver uses.
    pub pairs: u16,
}
