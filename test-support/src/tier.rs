//! The share of a systematic test that the ordinary suite runs.

use std::env;

/// The stride over the enumerated cases: every n-th is run; 1 for all of them.
const STRIDE_ENV: &str = "CLADE_TEST_STRIDE";
/// The default.
const DEFAULT_STRIDE: usize = 3;

/// Tests that enumerate cases, such as the failure of each system call in turn, run every n-th
/// case. The long tier sets `CLADE_TEST_STRIDE=1` and runs all of them.
///
/// # Panics
/// When the environment has something else than a number above 0.
#[must_use]
pub fn stride() -> usize {
    let Ok(text) = env::var(STRIDE_ENV) else { return DEFAULT_STRIDE };
    let stride = text.parse().ok().filter(|stride| *stride > 0);
    stride.unwrap_or_else(|| panic!("{STRIDE_ENV} is {text:?}, not a number above 0"))
}
