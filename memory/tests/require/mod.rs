//! What a host may lack: said aloud, and a failure where it is required.

/// Tiers that must not be skipped, comma-separated: `uffd`, `direct` (reads that bypass the page
/// cache).
const REQUIRE_ENV: &str = "CLADE_REQUIRE";

/// Says what is skipped and why; fails where the tier is required.
pub(crate) fn skip(tier: &str, what: &str, reason: &str) {
    let required = std::env::var(REQUIRE_ENV).is_ok_and(|tiers| tiers.split(',').any(|t| t.trim() == tier));
    assert!(!required, "{tier} is required: {what}: {reason}");
    println!("skipped: {what}: {reason}");
}
