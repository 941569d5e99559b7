//! The saved state of a network device.

use serde::{Deserialize, Serialize};

/// The saved state of a network device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// Pairs of queues that the driver uses.
    pub pairs: u16,
}
