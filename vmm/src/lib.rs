//! Clade as a library: virtual machines under KVM that are forked, snapshotted, restored and reset
//! while they run.
//!
//! | topic | module |
//! |---|---|
//! | running, forking, pausing a VM | [`vm`] |
//! | loading a guest | [`boot`] |
//! | addresses, ports and interrupts of the guest | [`platform`] |
//! | KVM: host checks, CPUID, saved state, quirks | [`kvm`] |
//!
//! Guest memory itself, and everything about sharing it, is in `clade-memory`.

#![deny(missing_docs)]

pub mod boot;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
pub mod kvm;
pub mod platform;
pub mod vm;

/// The target of trace events for a VM's flight record, independent of the log level.
pub const FLIGHT: &str = "clade_flight";

/// An error and its causes in one line.
#[must_use]
pub fn error_chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        // The text of a transparent error is already that of its cause.
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

/// The example of the crate's README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct Readme;
