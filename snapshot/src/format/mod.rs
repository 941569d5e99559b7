//! The files of a snapshot as bytes. Each decoder accepts any bytes, and returns a value or
//! [`Damage`]. Decoders never panic, and never allocate more than a small multiple of their input.

mod index;
mod manifest;
mod state;
mod working_set;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub(crate) use index::push_run;
pub(crate) use index::{CHUNK_BYTES, CHUNK_PAGES};
pub use index::{Chunk, Index, Run};
pub(crate) use manifest::valid_name;
pub use manifest::{
    DiskEntry, FormatVersion, LayerEntry, Manifest, MemoryEntry, NoForkEntry, NoForkKind, Parent, Region, StateEntry,
};
pub use state::{Sections, encode_sections};
pub use working_set::WorkingSet;

/// The version of the format that is written.
pub const VERSION: FormatVersion = FormatVersion { major: 1, minor: 0 };

/// Why a file's content is not valid.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Damage {
    /// The file does not begin with its magic number.
    #[error("it is not a {0} file")]
    Magic(&'static str),
    /// The file is of a later format.
    #[error("it has format version {found}, and this program reads {ours}")]
    Version {
        /// The file's version.
        found: FormatVersion,
        /// The newest version that can be read.
        ours: FormatVersion,
    },
    /// A checksum in the file does not match.
    #[error("{what} has checksum {found:016x}, not {wanted:016x}")]
    Checksum {
        /// The part with the checksum.
        what: String,
        /// The checksum in the file.
        wanted: u64,
        /// The checksum of the content.
        found: u64,
    },
    /// A part is longer or shorter than it should be.
    #[error("{what} has {found} bytes, not {wanted}")]
    Length {
        /// The part.
        what: String,
        /// The expected length.
        wanted: u64,
        /// The length found.
        found: u64,
    },
    /// A value is not valid.
    #[error("{what} cannot be {value}")]
    Value {
        /// The value's name.
        what: &'static str,
        /// The value.
        value: String,
    },
    /// The text is not the JSON of a manifest.
    #[error("it cannot be read: {0}")]
    Json(String),
    /// A full layer has pages that are neither data nor zeros.
    #[error("page {page:#x} is missing, though there is no parent to have it")]
    Hole {
        /// The first such page.
        page: u64,
    },
    /// A hole of a data file has bytes other than zeros.
    #[error("page {page:#x} holds something, though nothing was written there")]
    Stray {
        /// The page.
        page: u64,
    },
    /// A compressed chunk cannot be decompressed.
    #[error("chunk {chunk} cannot be decompressed: {why}")]
    Compressed {
        /// The chunk's number.
        chunk: u64,
        /// The decoder's error.
        why: String,
    },
}

impl Damage {
    pub(crate) fn value(what: &'static str, value: &impl ToString) -> Self {
        Self::Value { what, value: value.to_string() }
    }
}

/// The identity of a snapshot: a random number for its contents. A merged snapshot in other files
/// keeps it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotId(u128);

impl SnapshotId {
    /// An identity with this number.
    #[must_use]
    pub const fn new(id: u128) -> Self {
        Self(id)
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u128 {
        self.0
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for SnapshotId {
    type Err = Damage;
    fn from_str(text: &str) -> Result<Self, Damage> {
        let wrong = || Damage::value("a snapshot's identity", &format!("{text:?}"));
        // Each identity has one way to be written.
        let plain = text.len() == 32 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if !plain {
            return Err(wrong());
        }
        u128::from_str_radix(text, 16).map(Self).map_err(|_| wrong())
    }
}

impl TryFrom<String> for SnapshotId {
    type Error = Damage;
    fn try_from(text: String) -> Result<Self, Damage> {
        text.parse()
    }
}

impl From<SnapshotId> for String {
    fn from(id: SnapshotId) -> Self {
        id.to_string()
    }
}

/// How a layer's chunks are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Uncompressed, each page at its offset in the space: the file can be mapped.
    #[default]
    None,
    /// Compressed by zstd, one behind the other: smaller, and decompressed at a restore.
    Zstd,
}

/// The checksum of all files: XXH3, 64 bits.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u64 {
    twox_hash::XxHash3_64::oneshot(bytes)
}

/// Bytes followed by their checksum, as the binary files end.
#[must_use]
pub fn with_checksum(mut body: Vec<u8>) -> Vec<u8> {
    let sum = checksum(&body);
    body.extend_from_slice(&sum.to_le_bytes());
    body
}

/// Checks a file that begins with `magic` and ends with its checksum. Returns its body.
pub(crate) fn without_checksum<'a>(bytes: &'a [u8], magic: &[u8; 8], name: &'static str) -> Result<Reader<'a>, Damage> {
    if bytes.get(..8) != Some(magic) {
        return Err(Damage::Magic(name));
    }
    let mut head = Reader(&bytes[8..]);
    // Before the checksum, which may be another in a later version.
    let version = FormatVersion::from_bits(head.u32()?);
    if version.major != VERSION.major {
        return Err(Damage::Version { found: version, ours: VERSION });
    }
    let Some((body, sum)) = bytes.split_last_chunk::<8>() else {
        return Err(Damage::Magic(name));
    };
    let (wanted, found) = (u64::from_le_bytes(*sum), checksum(body));
    if wanted != found {
        return Err(Damage::Checksum { what: format!("the {name} file"), wanted, found });
    }
    body.get(12..).map(Reader).ok_or(Damage::Magic(name))
}

/// Little-endian numbers, one after another.
#[derive(Debug)]
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn bytes(&mut self, len: u64) -> Result<&'a [u8], Damage> {
        let have = self.0.len() as u64;
        let short = || Damage::Length { what: "the rest of it".to_owned(), wanted: len, found: have };
        let len = usize::try_from(len).map_err(|_| short())?;
        let (taken, rest) = self.0.split_at_checked(len).ok_or_else(short)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Damage> {
        let mut out = [0; N];
        out.copy_from_slice(self.bytes(N as u64)?);
        Ok(out)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Damage> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Damage> {
        self.array().map(u64::from_le_bytes)
    }

    pub(crate) fn u128(&mut self) -> Result<u128, Damage> {
        self.array().map(u128::from_le_bytes)
    }

    /// Checks that nothing is left.
    pub(crate) fn end(&self) -> Result<(), Damage> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(Damage::value("what is left at the end", &format!("{} bytes", self.0.len())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_are_written_in_one_way() {
        let id: SnapshotId = "00000000000000000000000000c1ade0".parse().unwrap();
        assert_eq!((id, id.to_string()), (SnapshotId::new(0xc1_ade0), "00000000000000000000000000c1ade0".to_owned()));
        for wrong in ["", "c1ade0", "00000000000000000000000000C1ADE0", "+0000000000000000000000000c1ade0"] {
            assert!(matches!(wrong.parse::<SnapshotId>(), Err(Damage::Value { .. })), "{wrong:?}");
        }
    }

    #[test]
    fn the_checksum_is_the_published_one() {
        // XXH3_64bits of nothing, from its specification.
        assert_eq!(checksum(b""), 0x2d06_8005_38d3_94c2);
    }
}
