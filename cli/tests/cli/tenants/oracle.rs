//! The texts of a tenant that no answer to another may have.

use std::collections::{BTreeSet, HashSet};
use std::sync::{PoisonError, RwLock};

use super::spelling::decoded;

/// Hexadecimal digits of the name of a sandbox, a fork or a snapshot's checkpoint. Tokens and keys
/// have more of them.
pub(super) const STEM: usize = 18;

/// The texts of one tenant: each long row of hexadecimal digits by all of its parts, and markers.
#[derive(Debug)]
pub(super) struct Secrets {
    markers: Vec<String>,
    stems: RwLock<HashSet<[u8; STEM]>>,
}

/// Calls `show` with each part of `text`, of [`STEM`] characters, that has hexadecimal digits alone.
fn parts(text: &[u8], mut show: impl FnMut([u8; STEM])) {
    for row in text.split(|byte| !byte.is_ascii_hexdigit()).filter(|row| row.len() >= STEM) {
        for part in row.windows(STEM) {
            show(std::array::from_fn(|at| part[at].to_ascii_lowercase()));
        }
    }
}

fn has(text: &[u8], marker: &str) -> bool {
    text.windows(marker.len()).any(|part| part.eq_ignore_ascii_case(marker.as_bytes()))
}

impl Secrets {
    pub(super) fn new(markers: &[&str]) -> Self {
        Self { markers: markers.iter().map(|&marker| marker.to_owned()).collect(), stems: RwLock::default() }
    }

    /// Adds a name, a token or a key: its rows of digits.
    pub(super) fn add(&self, text: &str) {
        let mut stems = self.stems.write().unwrap_or_else(PoisonError::into_inner);
        parts(text.as_bytes(), |part| {
            stems.insert(part);
        });
    }

    fn found(&self, text: &[u8]) -> BTreeSet<String> {
        let stems = self.stems.read().unwrap_or_else(PoisonError::into_inner);
        let mut found = BTreeSet::new();
        parts(text, |part| {
            if stems.contains(&part) {
                found.insert(String::from_utf8_lossy(&part).into_owned());
            }
        });
        found.extend(self.markers.iter().filter(|marker| has(text, marker)).cloned());
        found
    }

    /// Returns the texts in an answer that its own request does not have, also not as an escape.
    pub(super) fn leaked(&self, request: &[u8], answer: &[u8]) -> BTreeSet<String> {
        let mut leaked = self.found(answer);
        if !leaked.is_empty() {
            let (once, twice) = (decoded(request), decoded(&decoded(request)));
            for text in [request, &once, &twice] {
                let echoed = self.found(text);
                leaked.retain(|text| !echoed.contains(text));
            }
        }
        leaked
    }
}

#[test]
fn a_leak_is_found_in_any_spelling_unless_the_request_has_it() {
    let secrets = Secrets::new(&["beta-secret"]);
    let token = "0123456789abcdef".repeat(4);
    secrets.add("i0123456789abcdef01x2");
    secrets.add(&token);
    let leaks = |request: &str, answer: &str| !secrets.leaked(request.as_bytes(), answer.as_bytes()).is_empty();
    assert!(leaks("", "no sandbox \"i0123456789ABCDEF01\""));
    assert!(leaks("", &token[30..60]));
    assert!(leaks("", "a Beta-Secret of another"));
    assert!(!leaks("", "i1123456789abcdef01 0123456789abcdef"));
    assert!(!leaks("GET /sandboxes/i0123456789abcdef01", "no sandbox \"i0123456789abcdef01\""));
    assert!(!leaks("GET /sandboxes/i%2530123456789abcdef1", "no sandbox \"i0123456789abcdef1\""));
    assert!(!leaks("GET /?beta%2dsecret", "beta-secret"));
    assert!(leaks("GET /sandboxes/i0123456789abcdef01", "i0123456789abcdef01 beta-secret"));
}
