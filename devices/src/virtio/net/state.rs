//! The saved state of a network device.

use serde::{Deserialize, Serialize};

use super::egress::Egress;

/// The saved state of a network device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// Pairs of queues that the driver uses.
    pub pairs: u16,
    /// Whether the host lets packets pass. A state without it is of a device that was open.
    #[serde(default)]
    pub link: Link,
    /// Where the guest may send. A state without it is of a device without rules.
    #[serde(default)]
    pub egress: Egress,
}

/// Whether the host lets packets pass between a guest and its interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Link {
    /// They pass.
    #[default]
    Open,
    /// None passes, in either direction: the host drops and counts them. The guest sees its link
    /// down.
    Closed,
}
