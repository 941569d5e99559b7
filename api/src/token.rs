//! The token that clients over TCP show, and the hosts that they may name.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use axum::extract::Request;
use axum::http::header::HOST;
use axum::http::uri::Authority;
use subtle::ConstantTimeEq;
use thiserror::Error;

use crate::random::random_hex;

/// Bytes of randomness in a token that is made here.
const RANDOM_BYTES: usize = 32;
/// The shortest token that is taken. A shorter one can be guessed.
const MIN_LENGTH: usize = 16;
/// The longest token that is taken.
const MAX_LENGTH: usize = 256;

/// Reason why a token's file is refused.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TokenError {
    /// The file cannot be read or made.
    #[error("the token's file {} cannot be used", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Its error.
        #[source]
        source: io::Error,
    },
    /// Others may read or write it.
    #[error("the token's file {} is open to others (mode {mode:04o}); chmod it to 0600", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The file is another user's.
    #[error("the token's file {} belongs to user {owner}", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Its owner's uid.
        owner: u32,
    },
    /// The file has no token.
    #[error("{} has no token: one line of {MIN_LENGTH} to {MAX_LENGTH} letters, digits and signs", path.display())]
    Form {
        /// The file.
        path: PathBuf,
    },
}

/// The secret that a client shows. Its debug form hides it.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

impl Token {
    /// Reads a token from a file that is this user's alone.
    ///
    /// # Errors
    /// When the file is missing, or others have access to it.
    pub fn read(path: &Path) -> Result<Self, TokenError> {
        let failed = |source| TokenError::File { path: path.to_owned(), source };
        // The open does not block on a pipe.
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
        let found = file.metadata().map_err(failed)?;
        let (mode, owner) = (found.mode() & 0o7777, found.uid());
        if mode & 0o077 != 0 {
            return Err(TokenError::Open { path: path.to_owned(), mode });
        }
        if owner != rustix::process::geteuid().as_raw() && owner != 0 {
            return Err(TokenError::Foreign { path: path.to_owned(), owner });
        }
        let mut text = String::new();
        // One byte more than is accepted, and a new line.
        file.take(MAX_LENGTH as u64 + 2).read_to_string(&mut text).map_err(failed)?;
        let token = text.trim_end();
        let is_fine = token.bytes().all(|byte| byte.is_ascii_graphic());
        if !is_fine || !(MIN_LENGTH..=MAX_LENGTH).contains(&token.len()) {
            return Err(TokenError::Form { path: path.to_owned() });
        }
        Ok(Self(token.to_owned()))
    }

    /// Reads a token, or makes the file with a random one if there is no file.
    ///
    /// # Errors
    /// As [`Self::read`], and when the file cannot be made.
    pub fn read_or_create(path: &Path) -> Result<Self, TokenError> {
        let failed = |source| TokenError::File { path: path.to_owned(), source };
        match File::options().write(true).create_new(true).mode(0o600).open(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Self::read(path),
            Err(error) => Err(failed(error)),
            Ok(mut file) => {
                let token = Self(random_hex::<RANDOM_BYTES>().map_err(failed)?);
                writeln!(file, "{}", token.0).and_then(|()| file.sync_all()).map_err(|error| {
                    // Half a token is invalid.
                    let _ = std::fs::remove_file(path);
                    failed(error)
                })?;
                Ok(token)
            }
        }
    }

    /// Makes a token for a test.
    #[cfg(test)]
    pub(super) fn of_test(text: &str) -> Self {
        Self(text.to_owned())
    }

    /// Returns the value of the header that shows it.
    pub(super) fn header(&self) -> String {
        format!("Bearer {}", self.0)
    }

    /// Returns whether `given` has a token's length. Any other text is not a guess.
    pub(super) fn may_be(given: &[u8]) -> bool {
        (MIN_LENGTH..=MAX_LENGTH).contains(&given.len())
    }

    /// Returns whether `given` is the token.
    pub(super) fn is(&self, given: &[u8]) -> bool {
        self.0.as_bytes().ct_eq(given).into()
    }
}

/// Returns whether a Host header names this host by an address or `localhost`. Other names are
/// refused, even if they resolve to this host: a page from elsewhere could use them.
fn is_local_name(authority: &Authority) -> bool {
    let host = authority.host();
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    host.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok()
}

/// Returns whether a request is for this host: by its Host header, and by its URI if that has one.
pub fn is_for_this_host(request: &Request) -> bool {
    let host = request.headers().get(HOST).and_then(|host| Authority::try_from(host.as_bytes()).ok());
    request.uri().authority().is_none_or(is_local_name) && host.is_some_and(|host| is_local_name(&host))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_token_is_made_once_and_for_its_user_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        assert!(matches!(Token::read(&path), Err(TokenError::File { .. })));
        let token = Token::read_or_create(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(Token::read_or_create(&path).unwrap(), token);
        assert!(token.is(token.0.as_bytes()) && token.0.len() == 2 * RANDOM_BYTES);
        for wrong in ["", "x", &token.0[1..], &format!("{}0", token.0), &"0".repeat(64)] {
            assert!(!token.is(wrong.as_bytes()), "{wrong}");
        }
        assert_eq!(format!("{token:?}"), "Token");
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(Token::read(&path), Err(TokenError::Open { mode: 0o640, .. })));
    }

    #[test]
    fn a_file_without_a_token_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        for text in ["", "\n", "short", "two words that are long", &"x".repeat(MAX_LENGTH + 1), "füllwörter-sind-lang"]
        {
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
            assert!(matches!(Token::read_or_create(&path), Err(TokenError::Form { .. })), "{text}");
        }
        fs::write(&path, "x".repeat(MAX_LENGTH) + "\n").unwrap();
        assert!(Token::read(&path).is_ok());
    }

    #[test]
    fn only_addresses_and_localhost_are_hosts() {
        let is_local = |host: &str| Authority::try_from(host).is_ok_and(|host| is_local_name(&host));
        for host in ["localhost", "LOCALHOST:80", "127.0.0.1", "127.0.0.1:8080", "[::1]", "[::1]:80", "10.0.0.1"] {
            assert!(is_local(host), "{host}");
        }
        for host in ["example.com", "localhost.example.com", "127.0.0.1.example.com:80", "", "a b", "clade"] {
            assert!(!is_local(host), "{host}");
        }
    }
}
