//! The state file: named sections of bytes, whose contents belong to the caller.
//!
//! ```text
//! "CLADESTA"  u32 version  u32 sections
//! sections × { u32 bytes of the name, u32 0, u64 bytes, u64 checksum of name and bytes,
//!              name, bytes }
//! u64 checksum of all that
//! ```

use std::collections::HashSet;

use super::{Damage, VERSION, with_checksum, without_checksum};

const MAGIC: &[u8; 8] = b"CLADESTA";
/// Most bytes in the name of a section, or of a disk.
pub(crate) const MAX_NAME: usize = 255;

/// Sections by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sections(Vec<(String, Vec<u8>)>);

/// Encodes sections as a state file.
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
    with_checksum(out)
}

fn sum_of(name: &[u8], bytes: &[u8]) -> u64 {
    use std::hash::Hasher;
    let mut hasher = twox_hash::XxHash3_64::new();
    hasher.write(name);
    hasher.write(bytes);
    hasher.finish()
}

impl Sections {
    /// Decodes a state file.
    ///
    /// # Errors
    /// When the bytes are not a state file.
    pub fn decode(bytes: &[u8]) -> Result<Self, Damage> {
        // The checksum of the file is compared last: a section's own checksum names the section.
        let whole = match without_checksum(bytes, MAGIC, "state") {
            Err(Damage::Checksum { wanted, found, .. }) => Err((wanted, found)),
            other => Ok(other?),
        };
        let (mut reader, sums) = match whole {
            Ok(reader) => (reader, None),
            Err(sums) => (super::Reader(&bytes[12..bytes.len().max(20) - 8]), Some(sums)),
        };
        let sections = Self::read(&mut reader);
        match (sections, sums) {
            // A damaged section is named; other damage is the file's.
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

    /// The section `name`.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.0.iter().find(|(given, _)| given == name).map(|(_, bytes)| bytes.as_slice())
    }

    /// The sections, in the order in which they were given.
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
