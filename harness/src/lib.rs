//! Driving the bare guest: what tests, the demo, benchmarks and the stress test share.

#![deny(missing_docs)]

mod bare;
mod machine;
mod require;
mod slice;

pub use bare::{BareError, BareMailbox, BareVcpu, boot_bare};
pub use machine::{GuestWords, Machine, WordsError};
pub use require::{host, required, skip};
pub use slice::{Slice, stop_writing};

// Both ends of the bare guest's report port.
const _: () = assert!(clade_guests::abi::REPORT_PORT == clade_devices::REPORT_PORT);
