//! Skips tests that a host cannot run, with a message, unless their tier is required.

use clade_vmm::kvm::Host;

/// Tiers that must not be skipped, comma-separated: `kvm`, `uffd`, `linux`, `direct`, `tap`.
const REQUIRE_ENV: &str = "CLADE_REQUIRE";

/// Prints why a test is skipped.
///
/// # Panics
/// When the tier it belongs to is required.
pub fn skip(tier: &str, reason: &str) {
    assert!(!required(tier), "{tier} is required: {reason}");
    println!("skipped: {reason}");
}

/// Whether a test of `tier` must not be skipped.
#[must_use]
pub fn required(tier: &str) -> bool {
    std::env::var(REQUIRE_ENV).is_ok_and(|tiers| tiers.split(',').any(|t| t.trim() == tier))
}

/// The host, or `None` after printing why the test is skipped.
///
/// # Panics
/// When KVM is required and missing.
#[must_use]
pub fn host() -> Option<Host> {
    Host::open().map_err(|error| skip("kvm", &clade_vmm::error_chain(&error))).ok()
}
