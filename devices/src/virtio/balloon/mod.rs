//! The memory balloon: pages that the guest gives back, on request (inflation) or by itself (free
//! page reporting), and its memory statistics.
//!
//! A page given back is discarded ([`clade_memory::GuestRegion::discard`]): it becomes a page of
//! zeros without memory. A page that a device has pinned stays (I7). The balloon's target is a
//! request, not a limit. With deflate-on-OOM the guest takes pages back when it needs them, and
//! finds zeros.

mod device;
mod state;

pub use device::{Balloon, BalloonStat, BalloonStats};
pub use state::BalloonState;
