//! What is saved of a balloon.

use serde::{Deserialize, Serialize};

/// A balloon's state. A child's balloon is as full as its parent's was: the pages are discarded in both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// Pages the guest is asked to give up.
    pub target: u32,
    /// Pages it says it has given up.
    pub actual: u32,
    /// The chain in which it will tell of its memory, popped and not given back.
    pub stats_chain: Option<u16>,
}
