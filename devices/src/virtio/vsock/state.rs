//! What is saved of a socket device.

use serde::{Deserialize, Serialize};

/// A socket device's state: its address. Connections are not saved; whoever goes on from this tells the guest that they are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The guest's address.
    pub cid: u64,
}
