//! The console device: `hvc0` in a Linux guest. The guest's output goes to a [`crate::Console`].
//! Input waits until the driver has posted a buffer for it.

mod device;
mod state;

pub use device::{ConsoleDevice, Typist};
pub use state::ConsoleState;
