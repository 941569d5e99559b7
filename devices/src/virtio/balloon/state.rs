//! The saved state of a balloon.

use serde::{Deserialize, Serialize};

/// The saved state of a balloon. A child's balloon is as full as its parent's was: the pages are
/// discarded in both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// Pages that the guest should give up.
    pub target: u32,
    /// Pages that the guest has given up, as reported by the guest.
    pub actual: u32,
    /// The chain with the guest's statistics, popped and not used.
    pub stats_chain: Option<u16>,
}
