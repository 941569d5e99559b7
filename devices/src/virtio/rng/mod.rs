//! The entropy device: random bytes of the host's kernel for the driver's buffers.
//!
//! A child inherits its parent's posted buffers, and fills them with bytes of its own. This device
//! never copies random bytes from one VM to another. (Bytes already read by the guest are copied
//! with its memory; see the identity of clones.)

mod device;
mod state;

pub use device::Rng;
pub use state::RngState;
