//! Helpers for the tests of all crates: patience, cached guests, certificates, numbers of the host that one test may
//! use at a time, and tiers that must not be skipped. It depends on no other crate, so every crate can use it.

#![deny(missing_docs)]

mod cache;
mod certificate;
mod patience;
mod patient;
mod program;
mod random;
mod require;
mod tier;
mod unique;

pub use cache::CacheKey;
pub use certificate::certificate;
pub use patience::{
    Patience, Watchdog, host_factor, lowest, receive, report_bare_boot, wait_eq, wait_for, wait_for_within, wait_until,
    wait_until_within,
};
pub use patient::PatientStream;
pub use program::write_program;
pub use random::Random;
pub use require::{python_with_e2b, required, skip, skipped};
pub use tier::stride;
pub use unique::{Cid, Claim, Port, Subnet, TapName};
