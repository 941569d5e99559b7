//! The saved state of a socket device.

use serde::{Deserialize, Serialize};

/// The saved state of a socket device. Connections are not saved: a device that continues from here
/// sends its guest a transport reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The guest's CID.
    pub cid: u64,
}
