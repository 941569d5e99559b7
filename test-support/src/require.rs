//! Tiers of tests that a host may lack.

use std::env;

/// Tiers that must not be skipped, comma-separated: `kvm`, `uffd`, `linux`, `direct`, `tap`, …
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
    env::var(REQUIRE_ENV).is_ok_and(|tiers| tiers.split(',').any(|named| named.trim() == tier))
}
