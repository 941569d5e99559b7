//! The tokens of sandboxes.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use clade_api::{hex, random};
use hmac::{Hmac, Mac};
use sha2::Sha256;

/// Bytes of the key that tokens are made with.
const KEY_BYTES: usize = 32;

/// Derives tokens from sandboxes' names, so that no token has to be stored.
#[derive(Clone)]
pub(crate) struct TokenKey([u8; KEY_BYTES]);

impl std::fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TokenKey")
    }
}

impl TokenKey {
    /// Reads the key, or makes one if there is no file.
    ///
    /// # Errors
    /// When the file cannot be read or made, or has no key.
    pub(crate) fn read_or_create(path: &Path) -> io::Result<Self> {
        match File::options().write(true).create_new(true).mode(0o600).open(path) {
            Ok(mut file) => {
                let key = random()?;
                file.write_all(&key).and_then(|()| file.sync_all()).inspect_err(|_| {
                    // Half a key is invalid.
                    let _ = std::fs::remove_file(path);
                })?;
                Ok(Self(key))
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let mut key = [0; KEY_BYTES];
                File::open(path)?.read_exact(&mut key)?;
                Ok(Self(key))
            }
            Err(error) => Err(error),
        }
    }

    /// Returns the token of a sandbox's agent. It reveals nothing of another's.
    pub(crate) fn token(&self, sandbox: &str) -> String {
        self.of(b"envd access ", sandbox)
    }

    /// Returns the token of a sandbox's other ports.
    pub(crate) fn traffic_token(&self, sandbox: &str) -> String {
        self.of(b"traffic access ", sandbox)
    }

    fn of(&self, purpose: &[u8], sandbox: &str) -> String {
        // HMAC takes a key of any length.
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&self.0) else { return String::new() };
        mac.update(purpose);
        mac.update(sandbox.as_bytes());
        hex(&mac.finalize().into_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_its_sandboxs_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let key = TokenKey::read_or_create(&path).unwrap();
        assert_eq!(key.token("a").len(), 64);
        assert_ne!(key.token("a"), key.token("b"));
        assert_ne!(key.traffic_token("a"), key.token("a"));
        assert_ne!(key.traffic_token("a"), key.traffic_token("b"));
        assert_eq!(TokenKey::read_or_create(&path).unwrap().token("a"), key.token("a"));
        std::fs::remove_file(&path).unwrap();
        assert_ne!(TokenKey::read_or_create(&path).unwrap().token("a"), key.token("a"));
        std::fs::write(&path, "short").unwrap();
        assert_eq!(TokenKey::read_or_create(&path).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(format!("{key:?}"), "TokenKey");
    }
}
