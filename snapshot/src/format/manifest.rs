//! The manifest: the parts of a snapshot, as JSON that ends with its own checksum.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use clade_memory::{PAGE_SIZE, PageRange, RamLayout};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vm_memory::GuestAddress;

use super::state::MAX_NAME;
use super::{Compression, Damage, SnapshotId, VERSION, checksum};

/// The value of `format` in a manifest.
const FORMAT: &str = "clade-snapshot";
/// The end of a manifest, behind the checksum.
const TAIL: &str = "\"\n}\n";
const KEY: &str = ",\n  \"checksum\": \"";
/// Most disks of a VM.
const MAX_DISKS: usize = 256;

/// A format's version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FormatVersion {
    /// A reader refuses another major version.
    pub major: u16,
    /// A later minor version has additions that a reader may ignore.
    pub minor: u16,
}

impl FormatVersion {
    pub(crate) fn bits(self) -> u32 {
        u32::from(self.major) << 16 | u32::from(self.minor)
    }

    pub(crate) fn from_bits(bits: u32) -> Self {
        Self { major: (bits >> 16) as u16, minor: bits as u16 }
    }
}

impl fmt::Display for FormatVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The parent of an incremental snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parent {
    /// The parent's identity.
    pub id: SnapshotId,
    /// The parent's directory: absolute, or relative to this snapshot's directory.
    pub path: String,
}

/// The files of a layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerEntry {
    /// How its chunks are stored.
    pub compression: Compression,
    /// Length of the space in bytes.
    pub bytes: u64,
    /// Pages stored as data.
    pub data_pages: u64,
    /// Pages known to be zeros.
    pub zero_pages: u64,
    /// Length of the data file in bytes.
    pub data_bytes: u64,
    /// Length of the index in bytes.
    pub index_bytes: u64,
    /// The checksum at the end of the index.
    #[serde(with = "hex")]
    pub index_checksum: u64,
}

/// Contents of a no-fork range in a child VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NoForkKind {
    /// No memory.
    Absent,
    /// Zeros.
    Zeroed,
    /// Copies of the range's first page.
    Fresh,
}

/// A range that child VMs do not inherit, in pages of its region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NoForkEntry {
    /// First page.
    pub start: u64,
    /// Number of pages.
    pub pages: u64,
    /// Contents of the range in a child.
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
    /// Guest-physical address of its first byte.
    pub guest_address: u64,
    /// Number of pages.
    pub pages: u64,
    /// Ranges that child VMs do not inherit.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub no_fork: Vec<NoForkEntry>,
}

/// Guest memory: its regions, one behind the other, are one space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryEntry {
    /// The regions, ascending.
    pub regions: Vec<Region>,
    /// The layer with its pages.
    pub layer: LayerEntry,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskEntry {
    /// The disk's name.
    pub name: String,
    /// The layer with its pages.
    pub layer: LayerEntry,
}

/// The state file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateEntry {
    /// Length in bytes.
    pub bytes: u64,
    /// The checksum at its end.
    #[serde(with = "hex")]
    pub checksum: u64,
}

/// The manifest of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// `clade-snapshot`.
    pub format: String,
    /// The version of the format.
    pub version: FormatVersion,
    /// The snapshot's identity.
    pub id: SnapshotId,
    /// Creation time, in seconds since 1970.
    pub created: u64,
    /// The host's architecture.
    pub machine: String,
    /// The snapshot with the missing pages. None for a full snapshot.
    pub parent: Option<Parent>,
    /// Guest memory.
    pub memory: MemoryEntry,
    /// Disks, in the VM's order.
    pub disks: Vec<DiskEntry>,
    /// The state file.
    pub state: StateEntry,
    /// Entries of a later minor version, which are ignored.
    #[serde(flatten)]
    pub unknown: BTreeMap<String, Value>,
}

#[derive(Deserialize)]
struct Head {
    format: String,
    version: FormatVersion,
}

impl Manifest {
    /// The manifest of a new snapshot.
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

    /// Returns whether `text` is a manifest, of any version.
    pub(crate) fn is_one(text: &[u8]) -> bool {
        #[derive(Deserialize)]
        struct Any {
            format: String,
        }
        serde_json::from_slice(text).is_ok_and(|any: Any| any.format == FORMAT)
    }

    /// Encodes the manifest.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        // A value of plain structs and string keys is always JSON.
        let text = serde_json::to_string_pretty(self).unwrap_or_default();
        Self::sealed(&text)
    }

    /// JSON text of an object, with its checksum as its last entry.
    #[must_use]
    pub fn sealed(object: &str) -> Vec<u8> {
        let open = object.trim_end().strip_suffix('}').unwrap_or_default().trim_end();
        let mut text = format!("{open}{KEY}");
        let sum = checksum(text.as_bytes());
        text.push_str(&format!("{sum:016x}{TAIL}"));
        text.into_bytes()
    }

    /// Decodes a manifest.
    ///
    /// # Errors
    /// When the bytes are not a manifest, or one of a later major version.
    pub fn decode(bytes: &[u8]) -> Result<Self, Damage> {
        let text = std::str::from_utf8(bytes).map_err(|error| Damage::Json(error.to_string()))?;
        let head: Head = serde_json::from_str(text).map_err(|error| Damage::Json(error.to_string()))?;
        if head.format != FORMAT {
            return Err(Damage::value("the format", &format!("{:?}", head.format)));
        }
        // Before the checksum, which may be another in a later version.
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
        // Compared as text: a checksum has one way to be written.
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

    /// The layout of guest memory.
    ///
    /// # Errors
    /// When the regions are not valid.
    pub fn layout(&self) -> Result<RamLayout, Damage> {
        let ranges: Vec<_> =
            self.memory.regions.iter().map(|region| (GuestAddress(region.guest_address), region.pages)).collect();
        RamLayout::of_ranges(&ranges).map_err(|error| Damage::value("the layout of memory", &error))
    }
}

/// Whether a section or a disk may have this name.
pub(crate) fn valid_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= MAX_NAME
}

/// Checksums as text: not every reader of JSON has 64-bit numbers.
mod hex {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    // serde sets this signature.
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
        later.version = FormatVersion { major: 3, minor: 1 };
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
