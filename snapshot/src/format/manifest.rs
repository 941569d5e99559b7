//! The manifest: what a snapshot is made of, as JSON that ends with its own checksum.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use clade_memory::{PAGE_SIZE, PageRange, RamLayout};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vm_memory::GuestAddress;

use super::state::MAX_NAME;
use super::{Compression, Damage, SnapshotId, VERSION, checksum};

/// What the manifest says it is.
const FORMAT: &str = "clade-snapshot";
/// How it ends: the checksum stands before these.
const TAIL: &str = "\"\n}\n";
const KEY: &str = ",\n  \"checksum\": \"";
/// Most disks of a VM.
const MAX_DISKS: usize = 256;

/// A format's version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Another one is refused.
    pub major: u16,
    /// A later one has additions that can be ignored.
    pub minor: u16,
}

impl Version {
    pub(crate) fn bits(self) -> u32 {
        u32::from(self.major) << 16 | u32::from(self.minor)
    }

    pub(crate) fn from_bits(bits: u32) -> Self {
        Self { major: (bits >> 16) as u16, minor: bits as u16 }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// Which snapshot this one's missing pages are in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parent {
    /// Its identity.
    pub id: SnapshotId,
    /// Where it is: absolute, or relative to this snapshot's directory.
    pub path: String,
}

/// A layer's files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerEntry {
    /// How its chunks are stored.
    pub compression: Compression,
    /// Length of the space.
    pub bytes: u64,
    /// Pages in it.
    pub data_pages: u64,
    /// Pages it says are zeros.
    pub zero_pages: u64,
    /// Length of the data file.
    pub data_bytes: u64,
    /// Length of the index.
    pub index_bytes: u64,
    /// The checksum that the index ends with.
    #[serde(with = "hex")]
    pub index_checksum: u64,
}

/// What children of the VM do not inherit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NoForkKind {
    /// No memory.
    Absent,
    /// Zeros.
    Zeroed,
    /// Copies of the page that stands at its beginning.
    Fresh,
}

/// A range that children of the VM do not inherit, in pages of its region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NoForkEntry {
    /// First page.
    pub start: u64,
    /// Pages.
    pub pages: u64,
    /// What they find.
    pub kind: NoForkKind,
}

impl NoForkEntry {
    pub(crate) fn range(&self) -> PageRange {
        PageRange::with_len(self.start, self.pages)
    }
}

/// A range of guest-physical memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Where it starts.
    pub guest_address: u64,
    /// Its length.
    pub pages: u64,
    /// What is not inherited.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub no_fork: Vec<NoForkEntry>,
}

/// Memory: its regions one after another are one space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryEntry {
    /// Ascending.
    pub regions: Vec<Region>,
    /// Where its pages are.
    pub layer: LayerEntry,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskEntry {
    /// As the caller calls it.
    pub name: String,
    /// Where its pages are.
    pub layer: LayerEntry,
}

/// The state file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateEntry {
    /// Its length.
    pub bytes: u64,
    /// The checksum it ends with.
    #[serde(with = "hex")]
    pub checksum: u64,
}

/// See the module's documentation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// `clade-snapshot`.
    pub format: String,
    /// Of the format.
    pub version: Version,
    /// Which snapshot it is.
    pub id: SnapshotId,
    /// Seconds since 1970 when it was made.
    pub created: u64,
    /// Architecture of the machine.
    pub machine: String,
    /// What has the rest, unless all is here.
    pub parent: Option<Parent>,
    /// Guest memory.
    pub memory: MemoryEntry,
    /// Disks, in the VM's order.
    pub disks: Vec<DiskEntry>,
    /// Everything else.
    pub state: StateEntry,
    /// What a later minor version has added, which is ignored.
    #[serde(flatten)]
    pub unknown: BTreeMap<String, Value>,
}

#[derive(Deserialize)]
struct Head {
    format: String,
    version: Version,
}

impl Manifest {
    /// Of a snapshot made here and now.
    pub(crate) fn new(
        id: SnapshotId,
        parent: Option<Parent>,
        memory: MemoryEntry,
        disks: Vec<DiskEntry>,
        state: StateEntry,
    ) -> Self {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self {
            format: FORMAT.to_owned(),
            version: VERSION,
            id,
            created: since.map_or(0, |since| since.as_secs()),
            machine: std::env::consts::ARCH.to_owned(),
            parent,
            memory,
            disks,
            state,
            unknown: BTreeMap::new(),
        }
    }

    /// As a file.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        // A value of plain structs and string keys is always JSON.
        let text = serde_json::to_string_pretty(self).unwrap_or_default();
        Self::sealed(&text)
    }

    /// JSON text of an object with its checksum as its last entry.
    #[must_use]
    pub fn sealed(object: &str) -> Vec<u8> {
        let open = object.trim_end().strip_suffix('}').unwrap_or_default().trim_end();
        let mut text = format!("{open}{KEY}");
        let sum = checksum(text.as_bytes());
        text.push_str(&format!("{sum:016x}{TAIL}"));
        text.into_bytes()
    }

    /// From a file's bytes.
    ///
    /// # Errors
    /// When they are not a manifest, or one of a later major version.
    pub fn decode(bytes: &[u8]) -> Result<Self, Damage> {
        let text = std::str::from_utf8(bytes).map_err(|error| Damage::Json(error.to_string()))?;
        let head: Head = serde_json::from_str(text).map_err(|error| Damage::Json(error.to_string()))?;
        if head.format != FORMAT {
            return Err(Damage::value("the format", &format!("{:?}", head.format)));
        }
        // Before the checksum: a later version may have another.
        if head.version.major != VERSION.major {
            return Err(Damage::Version { found: head.version, ours: VERSION });
        }
        let no_sum = || Damage::Json("it does not end with its checksum".to_owned());
        let rest = text.strip_suffix(TAIL).ok_or_else(no_sum)?;
        let (body, sum) = rest.split_at_checked(rest.len().saturating_sub(16)).ok_or_else(no_sum)?;
        if !body.ends_with(KEY) {
            return Err(no_sum());
        }
        let found = checksum(body.as_bytes());
        // As text: there is one way to write it.
        if sum != format!("{found:016x}") {
            let wanted = u64::from_str_radix(sum, 16).unwrap_or_default();
            return Err(Damage::Checksum { what: "the manifest".to_owned(), wanted, found });
        }
        let mut manifest: Self = serde_json::from_str(text).map_err(|error| Damage::Json(error.to_string()))?;
        manifest.unknown.remove("checksum");
        manifest.check()?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), Damage> {
        let layout = self.layout()?;
        if self.memory.layer.bytes != layout.bytes() {
            let (wanted, found) = (layout.bytes(), self.memory.layer.bytes);
            return Err(Damage::Length { what: "memory".to_owned(), wanted, found });
        }
        for region in &self.memory.regions {
            let mut free = 0;
            for entry in &region.no_fork {
                let end = entry.start.checked_add(entry.pages).filter(|end| *end <= region.pages);
                let Some(end) = end.filter(|_| entry.pages > 0 && entry.start >= free) else {
                    return Err(Damage::value("a range that is not inherited", &format!("{entry:?}")));
                };
                free = end;
            }
        }
        if self.disks.len() > MAX_DISKS {
            return Err(Damage::value("the number of disks", &self.disks.len()));
        }
        let mut names = HashSet::new();
        for disk in &self.disks {
            if !valid_name(&disk.name) || !names.insert(&disk.name) {
                return Err(Damage::value("the name of a disk", &format!("{:?}", disk.name)));
            }
            if disk.layer.bytes > u64::MAX - PAGE_SIZE {
                return Err(Damage::value("the length of a disk", &disk.layer.bytes));
            }
        }
        if self.parent.as_ref().is_some_and(|parent| parent.path.is_empty() || parent.path.contains('\0')) {
            return Err(Damage::value("the parent's path", &"empty"));
        }
        Ok(())
    }

    /// The shape of the guest's memory.
    ///
    /// # Errors
    /// When it cannot be.
    pub fn layout(&self) -> Result<RamLayout, Damage> {
        let ranges: Vec<_> =
            self.memory.regions.iter().map(|region| (GuestAddress(region.guest_address), region.pages)).collect();
        RamLayout::of_ranges(&ranges).map_err(|error| Damage::value("the layout of memory", &error))
    }
}

/// Whether a section or a disk may be called that.
pub(crate) fn valid_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= MAX_NAME
}

/// Checksums as text: not every reader of JSON has 64-bit numbers.
mod hex {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    // The signature that serde calls.
    #[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
    pub(super) fn serialize<S: Serializer>(sum: &u64, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{sum:016x}"))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
        let text = String::deserialize(from)?;
        u64::from_str_radix(&text, 16).map_err(|_| D::Error::custom(format!("the checksum {text:?} is not a number")))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn manifest() -> Manifest {
        let layer = LayerEntry {
            compression: Compression::None,
            bytes: 1 << 20,
            data_pages: 1,
            zero_pages: 255,
            data_bytes: 1 << 20,
            index_bytes: 99,
            index_checksum: 0xfedc_ba98_7654_3210,
        };
        let region = Region { guest_address: 0, pages: 256, no_fork: Vec::new() };
        let memory = MemoryEntry { regions: vec![region], layer };
        let parent = Some(Parent { id: SnapshotId::new(9), path: "../base".to_owned() });
        Manifest::new(SnapshotId::new(7), parent, memory, Vec::new(), StateEntry { bytes: 24, checksum: 5 })
    }

    #[test]
    fn it_comes_back_as_it_was_and_is_json() {
        let manifest = manifest();
        let bytes = manifest.encode();
        assert_eq!(Manifest::decode(&bytes), Ok(manifest));
        let json: Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(json["parent"]["path"], "../base");
    }

    #[test]
    fn a_later_minor_version_is_read_and_a_later_major_one_is_not() {
        let mut later = manifest();
        later.version.minor = 7;
        later.unknown.insert("colour".to_owned(), Value::from("blue"));
        assert_eq!(Manifest::decode(&later.encode()), Ok(later.clone()));
        later.version = Version { major: 3, minor: 1 };
        let refused = Manifest::decode(&later.encode()).unwrap_err();
        assert_eq!(refused.to_string(), "it has format version 3.1, and this program reads 1.0");
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let wrong = |change: &dyn Fn(&mut Manifest)| {
            let mut manifest = manifest();
            change(&mut manifest);
            let refused = Manifest::decode(&manifest.encode());
            assert!(matches!(refused, Err(Damage::Value { .. } | Damage::Length { .. })), "{refused:?}");
        };
        wrong(&|m| m.format = "other".to_owned());
        wrong(&|m| m.memory.regions[0].pages = 255);
        wrong(&|m| m.memory.regions[0].guest_address = 5);
        wrong(&|m| m.memory.regions.clear());
        wrong(&|m| m.memory.regions[0].no_fork = vec![NoForkEntry { start: 250, pages: 7, kind: NoForkKind::Absent }]);
        wrong(&|m| m.parent = Some(Parent { id: m.id, path: String::new() }));
        let disk = |name: &str| DiskEntry { name: name.to_owned(), layer: manifest().memory.layer };
        wrong(&|m| m.disks = vec![disk("a"), disk("a")]);
        wrong(&|m| m.disks = vec![disk("")]);
    }
}
