//! The state file: named sections of bytes that are the caller's own business.
//!
//! ```text
//! "CLADESTA"  u32 version  u32 sections
//! sections × { u32 bytes of the name, u32 0, u64 bytes, u64 checksum of name and bytes, name, bytes }
//! u64 checksum of all that
//! ```

use std::collections::HashSet;

use super::{Damage, VERSION, seal, unseal};

const MAGIC: &[u8; 8] = b"CLADESTA";
/// Longest name of a section, and of a disk.
pub(crate) const MAX_NAME: usize = 255;

/// What was given to be saved, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sections(Vec<(String, Vec<u8>)>);

/// The sections as a file.
#[must_use]
pub fn encode_sections(sections: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&VERSION.bits().to_le_bytes());
    out.extend_from_slice(&(sections.len() as u32).to_le_bytes());
    for (name, bytes) in sections {
        out.extend_from_slice(&(name.len() as u64).to_le_bytes());
        out.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
        out.extend_from_slice(&sum_of(name.as_bytes(), bytes).to_le_bytes());
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(bytes);
    }
    seal(out)
}

fn sum_of(name: &[u8], bytes: &[u8]) -> u64 {
    use std::hash::Hasher;
    let mut hasher = twox_hash::XxHash3_64::new();
    hasher.write(name);
    hasher.write(bytes);
    hasher.finish()
}

impl Sections {
    /// From a file's bytes.
    ///
    /// # Errors
    /// When they are not such a file.
    pub fn decode(bytes: &[u8]) -> Result<Self, Damage> {
        // The whole file's checksum is looked at last: a section's own tells which it is.
        let whole = match unseal(bytes, MAGIC, "state") {
            Err(Damage::Checksum { wanted, found, .. }) => Err((wanted, found)),
            other => Ok(other?),
        };
        let (mut reader, sums) = match whole {
            Ok(reader) => (reader, None),
            Err(sums) => (super::Reader(&bytes[12..bytes.len().max(20) - 8]), Some(sums)),
        };
        let sections = Self::read(&mut reader);
        match (sections, sums) {
            // A section that is damaged is named; if the rest is, the file is.
            (Err(damage @ Damage::Checksum { .. }), _) | (Err(damage), None) => Err(damage),
            (_, Some((wanted, found))) => Err(Damage::Checksum { what: "the state file".to_owned(), wanted, found }),
            (Ok(sections), None) => Ok(sections),
        }
    }

    fn read(reader: &mut super::Reader<'_>) -> Result<Self, Damage> {
        let count = reader.u32()?;
        let mut sections = Vec::new();
        let mut names = HashSet::new();
        for at in 0..count {
            let (name, len, wanted) = (reader.u64()?, reader.u64()?, reader.u64()?);
            if name > MAX_NAME as u64 {
                return Err(Damage::value("the length of a section's name", &name));
            }
            let (name, body) = (reader.bytes(name)?, reader.bytes(len)?);
            let found = sum_of(name, body);
            let text = String::from_utf8_lossy(name).into_owned();
            if wanted != found {
                return Err(Damage::Checksum { what: format!("section {at}, {text:?},"), wanted, found });
            }
            if text.as_bytes() != name || !names.insert(text.clone()) {
                return Err(Damage::value("the name of a section", &format!("{text:?}")));
            }
            sections.push((text, body.to_vec()));
        }
        reader.end()?;
        Ok(Self(sections))
    }

    /// The section of that name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.0.iter().find(|(given, _)| given == name).map(|(_, bytes)| bytes.as_slice())
    }

    /// Each name and what is there, in the order in which they were given.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.0.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_come_back_by_name_and_a_damaged_one_is_named() {
        let file = encode_sections(&[("config", b"abc"), ("vcpus", b""), ("devices", &[7; 300])]);
        let sections = Sections::decode(&file).unwrap();
        assert_eq!(sections.get("config"), Some(&b"abc"[..]));
        assert_eq!(sections.get("vcpus"), Some(&b""[..]));
        assert_eq!((sections.get("devices").map(<[u8]>::len), sections.get("vm")), (Some(300), None));
        let mut damaged = file.clone();
        let at = damaged.len() - 20;
        damaged[at] ^= 1;
        let refused = Sections::decode(&damaged).unwrap_err();
        assert!(matches!(&refused, Damage::Checksum { what, .. } if what.contains("devices")), "{refused:?}");
        let twice = encode_sections(&[("a", b""), ("a", b"")]);
        assert_eq!(Sections::decode(&twice), Err(Damage::value("the name of a section", &"\"a\"")));
    }
}
