//! The settings of `/init`.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// The default user, until `/init` sets another.
const DEFAULT_USER: &str = "root";

/// A token, hidden in logs.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Token(String);

impl Token {
    /// `None` for an empty text.
    pub(crate) fn of(text: Option<String>) -> Option<Self> {
        text.filter(|text| !text.is_empty()).map(Self)
    }

    /// Compares in constant time for texts of equal length.
    pub(crate) fn is(&self, other: &[u8]) -> bool {
        let own = self.0.as_bytes();
        own.len() == other.len() && own.iter().zip(other).fold(0, |odd, (one, other)| odd | (one ^ other)) == 0
    }

    pub(crate) fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

/// The settings of `/init`.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) token: Option<Token>,
    /// Whether only the host has access until it sets a token, because the last token was for
    /// another VM.
    pub(crate) is_locked: bool,
    pub(crate) envs: Arc<BTreeMap<String, String>>,
    pub(crate) user: String,
    pub(crate) workdir: Option<String>,
    /// The newest time of any `/init`.
    pub(crate) newest_ns: i128,
}

impl Default for Settings {
    fn default() -> Self {
        let user = DEFAULT_USER.to_owned();
        Self { token: None, is_locked: false, envs: Arc::default(), user, workdir: None, newest_ns: i128::MIN }
    }
}
