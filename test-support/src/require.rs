//! Tiers of tests that a host may lack, and a record of the tests that were skipped.

use std::env;
use std::fs::File;
use std::io::{self, Write};
use std::process::Command;
use std::thread;

/// Tiers that must not be skipped, comma-separated: `kvm`, `uffd`, `linux`, `direct`, `tap`, …
const REQUIRE_ENV: &str = "CLADE_REQUIRE";

/// The file that lists skipped tests. `.ci/run` runs these again once everything they need is built.
const SKIPPED_ENV: &str = "CLADE_SKIPPED_TESTS";

/// Prints why a test is skipped.
///
/// # Panics
/// When the tier it belongs to is required.
pub fn skip(tier: &str, reason: &str) {
    assert!(!required(tier), "{tier} is required: {reason}");
    skipped(reason);
}

/// Prints why a test, or a part of it, is skipped on this host, and records it.
///
/// # Panics
/// When the record cannot be written.
pub fn skipped(reason: &str) {
    let name = thread::current().name().unwrap_or_default().to_owned();
    // Not by a macro: the test runner shows those of failed tests alone.
    let _ = writeln!(io::stderr(), "{name}: skipped: {reason}");
    if let Some(path) = env::var_os(SKIPPED_ENV) {
        let program = env::current_exe().expect("this program");
        // A thread of a test's own has another name, or none: all tests of the program are run again.
        let line = format!("{}\t{name}\t{}\n", program.display(), reason.replace(['\n', '\t'], " "));
        let mut file = File::options().append(true).create(true).open(path).expect("the record of skipped tests");
        // One write: test programs append to the file at the same time.
        file.write_all(line.as_bytes()).expect("the record of skipped tests");
    }
}

/// Whether a test of `tier` must not be skipped.
#[must_use]
pub fn required(tier: &str) -> bool {
    env::var(REQUIRE_ENV).is_ok_and(|tiers| tiers.split(',').any(|named| named.trim() == tier))
}

/// Returns a Python that has the SDK of E2B: `CLADE_E2B_PYTHON`, otherwise `python3`. Skips the test without one.
#[must_use]
pub fn python_with_e2b() -> Option<String> {
    let python = env::var("CLADE_E2B_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let has_sdk = Command::new(&python).args(["-c", "import e2b"]).output().is_ok_and(|found| found.status.success());
    if !has_sdk {
        skip("e2b", &format!("{python} has no e2b"));
    }
    has_sdk.then_some(python)
}
