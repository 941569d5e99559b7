//! Driving the bare guest: shared by tests, the demo, benchmarks and the stress test.

#![deny(missing_docs)]

mod bare;
mod machine;
mod sample;
mod slice;

pub use bare::{BareError, BareMailbox, BareVcpu, FILL_SEED, MOST_FILLED, boot_bare, fill};
pub use machine::{GuestWords, Machine, WordsError, bytes_of};
pub use sample::{Sample, Spread};
pub use slice::{Slice, stop_writing};

// Both ends of the bare guest's report port and doorbell.
const _: () = assert!(clade_guests::abi::REPORT_PORT == clade_devices::REPORT_PORT);
const _: () = assert!(clade_guests::abi::DOORBELL == clade_devices::DOORBELL);
