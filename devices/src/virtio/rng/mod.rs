//! The entropy device: random bytes of the host's kernel, into the driver's buffers.
//!
//! A child has its parent's buffers posted and fills them with bytes of its own: nothing random is ever copied from one VM to another by this
//! device. (What the guest had already drawn is the guest's; see the identity of clones.)

mod device;
mod state;

pub use device::Rng;
pub use state::RngState;
