//! The console device: `hvc0` in a Linux guest. What the guest writes goes to a [`crate::Console`], what is typed waits until the driver has posted a
//! buffer for it.

mod device;
mod state;

pub use device::{ConsoleDevice, Typist};
pub use state::ConsoleState;
