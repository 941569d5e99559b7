//! The balloon: memory that the guest gives back, asked for (inflation) or of its own accord (free page reporting), and what it says of its
//! memory.
//!
//! A page given back is discarded ([`clade_memory::GuestRegion::discard`]): it becomes a page of zeros that costs nothing, unless a device has it
//! pinned, in which case it stays (I7). A balloon is a wish, not a limit: with deflate-on-OOM the guest takes pages back when it needs them, and
//! finds zeros.

mod device;
mod state;

pub use device::{Balloon, BalloonStat, BalloonStats};
pub use state::BalloonState;
