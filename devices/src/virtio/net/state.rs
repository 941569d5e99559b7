//! The saved state of a network device.

use serde::{Deserialize, Serialize};

use super::egress::Egress;

/// The saved state of a network device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// Number of queue pairs in use by the driver.
    pub pairs: u16,
    /// Whether the host lets packets pass. Absent in the state of an open device.
    #[serde(default)]
    pub link: Link,
    /// The addresses that the guest may send to. Absent in the state of a device without rules.
    #[serde(default)]
    pub egress: Egress,
}

/// Whether the host lets packets pass between a guest and its interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Link {
    /// Packets pass.
    #[default]
    Open,
    /// No packet passes, in either direction: the host drops and counts them. The guest sees its
    /// link down.
    Closed,
}
