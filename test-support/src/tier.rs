//! How much of a systematic test the ordinary suite carries out.

use std::env;

/// Which part of the enumerated cases is carried out: every n-th; 1 for all of them.
const STRIDE_ENV: &str = "CLADE_TEST_STRIDE";
/// Without it.
const DEFAULT_STRIDE: usize = 3;

/// Tests that enumerate cases, such as the failure of each system call in turn, carry out every n-th
/// case. The long tier sets `CLADE_TEST_STRIDE=1` and carries out all of them.
///
/// # Panics
/// When the environment has something else than a number above 0.
#[must_use]
pub fn stride() -> usize {
    let Ok(text) = env::var(STRIDE_ENV) else { return DEFAULT_STRIDE };
    let stride = text.parse().ok().filter(|stride| *stride > 0);
    stride.unwrap_or_else(|| panic!("{STRIDE_ENV} is {text:?}, not a number above 0"))
}
