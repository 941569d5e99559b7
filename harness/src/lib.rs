//! Driving the bare guest: what tests, the demo, benchmarks and the stress test share.

mod bare;
mod require;

pub use bare::{BareError, BareMailbox, BareVcpu};
pub use require::{host, required, skip};

// Both ends of the bare guest's report port.
const _: () = assert!(clade_guests::abi::REPORT_PORT == clade_devices::REPORT_PORT);
