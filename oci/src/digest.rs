//! Digests of content, and readers that check them.

use std::fmt;
use std::io::{self, Read};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256, Sha512};
use thiserror::Error;

/// An invalid digest, or content that does not match its digest.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum DigestError {
    /// The text is not a digest of a known algorithm.
    #[error("invalid digest {0:?}: sha256: or sha512:, and as many hexadecimal digits in lower case")]
    Text(String),
    /// The content has another digest.
    #[error("content of {wanted} has the digest {found}")]
    Content {
        /// The expected digest.
        wanted: Digest,
        /// The digest of the content.
        found: Digest,
    },
    /// The content has another size.
    #[error("content of {digest} has {found} bytes instead of the {wanted} of its descriptor")]
    Size {
        /// The expected digest.
        digest: Digest,
        /// The size in its descriptor.
        wanted: u64,
        /// The size of the content; one more than expected if it is larger.
        found: u64,
    },
}

/// The algorithm of a digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Algorithm {
    Sha256,
    Sha512,
}

impl Algorithm {
    fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }
    fn digits(self) -> usize {
        match self {
            Self::Sha256 => 64,
            Self::Sha512 => 128,
        }
    }
}

/// The digest of content, such as `sha256:` and 64 digits. Safe as a path component.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest {
    algorithm: Algorithm,
    hex: String,
}

impl Digest {
    /// The SHA-256 of bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        let mut hasher = Hasher::new(Algorithm::Sha256);
        hasher.update(bytes);
        hasher.finish()
    }

    /// The digest of bytes, by the algorithm of another one.
    pub(crate) fn of_kind(other: &Self, bytes: &[u8]) -> Self {
        let mut hasher = Hasher::new(other.algorithm);
        hasher.update(bytes);
        hasher.finish()
    }

    /// `sha256` or `sha512`.
    #[must_use]
    pub fn algorithm(&self) -> &'static str {
        self.algorithm.name()
    }

    /// Its digits.
    #[must_use]
    pub fn hex(&self) -> &str {
        &self.hex
    }

    /// Its first 32 bytes.
    pub(crate) fn seed(&self) -> [u8; 32] {
        let mut seed = [0; 32];
        for (byte, pair) in seed.iter_mut().zip(self.hex.as_bytes().chunks(2)) {
            let digit = |digit: u8| (char::from(digit).to_digit(16).unwrap_or_default()) as u8;
            *byte = digit(pair[0]) << 4 | digit(pair[1]);
        }
        seed
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm.name(), self.hex)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = DigestError;
    fn from_str(text: &str) -> Result<Self, DigestError> {
        let bad = || DigestError::Text(text.chars().take(200).collect());
        let (name, hex) = text.split_once(':').ok_or_else(bad)?;
        let known = [Algorithm::Sha256, Algorithm::Sha512];
        let algorithm = known.into_iter().find(|one| one.name() == name).ok_or_else(bad)?;
        let is_hex = hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if hex.len() != algorithm.digits() || !is_hex {
            return Err(bad());
        }
        Ok(Self { algorithm, hex: hex.to_owned() })
    }
}

impl TryFrom<String> for Digest {
    type Error = DigestError;
    fn try_from(text: String) -> Result<Self, DigestError> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

#[derive(Debug)]
enum State {
    Sha256(Sha256),
    Sha512(Sha512),
}

/// A digest being computed.
#[derive(Debug)]
struct Hasher {
    algorithm: Algorithm,
    state: State,
}

impl Hasher {
    fn new(algorithm: Algorithm) -> Self {
        let state = match algorithm {
            Algorithm::Sha256 => State::Sha256(Sha256::new()),
            Algorithm::Sha512 => State::Sha512(Sha512::new()),
        };
        Self { algorithm, state }
    }

    fn update(&mut self, bytes: &[u8]) {
        match &mut self.state {
            State::Sha256(state) => state.update(bytes),
            State::Sha512(state) => state.update(bytes),
        }
    }

    fn finish(self) -> Digest {
        use std::fmt::Write;
        let bytes = match self.state {
            State::Sha256(state) => state.finalize().to_vec(),
            State::Sha512(state) => state.finalize().to_vec(),
        };
        let mut hex = String::with_capacity(bytes.len() * 2);
        for byte in bytes {
            // Writing to a String does not fail.
            let _ = write!(hex, "{byte:02x}");
        }
        Digest { algorithm: self.algorithm, hex }
    }
}

/// A reader that computes the digest of the bytes read.
#[derive(Debug)]
pub(crate) struct DigestReader<R> {
    inner: R,
    hasher: Hasher,
    wanted: Digest,
    passed: u64,
}

impl<R: Read> DigestReader<R> {
    pub(crate) fn new(inner: R, wanted: &Digest) -> Self {
        Self { inner, hasher: Hasher::new(wanted.algorithm), wanted: wanted.clone(), passed: 0 }
    }

    /// The digest of the bytes read, whatever was expected.
    pub(crate) fn digest(self) -> Digest {
        self.hasher.finish()
    }

    /// Checks the bytes read against the expected digest.
    pub(crate) fn finish(self, size: Option<u64>) -> Result<(), DigestError> {
        if let Some(wanted) = size.filter(|size| *size != self.passed) {
            return Err(DigestError::Size { digest: self.wanted, wanted, found: self.passed });
        }
        let found = self.hasher.finish();
        if found != self.wanted {
            return Err(DigestError::Content { wanted: self.wanted, found });
        }
        Ok(())
    }
}

impl<R: Read> Read for DigestReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        self.passed += read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_a_digest_or_refused() {
        let hex = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Digest::of(b"").to_string(), format!("sha256:{hex}"));
        assert_eq!(format!("sha256:{hex}").parse::<Digest>().unwrap().seed()[..2], [0xe3, 0xb0]);
        let wrong = ["", "sha256", "sha256:", "sha256:../../x", "md5:0", &hex.to_uppercase(), "sha512:00"];
        for text in wrong.iter().copied().chain([format!("sha256:{}", hex.to_uppercase()).as_str()]) {
            assert_eq!(text.parse::<Digest>(), Err(DigestError::Text(text.to_owned())));
        }
    }

    #[test]
    fn other_content_is_refused() {
        let wanted = Digest::of(b"abc");
        let check = |bytes: &[u8], size| {
            let mut reader = DigestReader::new(bytes, &wanted);
            io::copy(&mut reader, &mut io::sink()).unwrap();
            reader.finish(size)
        };
        check(b"abc", Some(3)).unwrap();
        let other = DigestError::Content { wanted: wanted.clone(), found: Digest::of(b"abd") };
        assert_eq!(check(b"abd", Some(3)), Err(other));
        assert_eq!(check(b"abc", Some(4)), Err(DigestError::Size { digest: wanted.clone(), wanted: 4, found: 3 }));
    }
}
