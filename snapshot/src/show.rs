//! Showing: what a snapshot says of itself.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::aside::{STATE, WARM, layer_name};
use crate::chain::{MAX_STATE, read_chain, read_manifest};
use crate::dir::Dir;
use crate::error::Error;
use crate::files::Files;
use crate::format::{Compression, LayerEntry, Manifest, Sections, SnapshotId, Version};

/// Memory, or a disk, as this snapshot has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LayerSummary {
    /// `memory`, or the disk's name.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// Pages that are here.
    pub data_pages: u64,
    /// Pages that are zeros.
    pub zero_pages: u64,
    /// How they are stored.
    pub compression: Compression,
    /// Bytes on the disk.
    pub disk_bytes: u64,
}

/// A snapshot of the chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Link {
    /// Which.
    pub id: SnapshotId,
    /// Where.
    pub path: PathBuf,
}

/// What [`show`] returns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Which snapshot it is.
    pub id: SnapshotId,
    /// Of its format.
    pub version: Version,
    /// Seconds since 1970.
    pub created: u64,
    /// Architecture.
    pub machine: String,
    /// Whether it needs no other.
    pub full: bool,
    /// What it depends on, nearest first.
    pub parents: Vec<Link>,
    /// What is wrong with them, if anything is.
    pub broken: Option<String>,
    /// Guest address and pages of each range of memory.
    pub memory: Vec<(u64, u64)>,
    /// Memory, then disks.
    pub layers: Vec<LayerSummary>,
    /// Names and lengths; none when the state file cannot be read.
    pub sections: Vec<(String, u64)>,
    /// Whether it is known what a run from it touches first.
    pub warm: bool,
    /// Entries of a later minor version, which were ignored.
    pub ignored: Vec<String>,
}

/// Describes the snapshot in `dir`. A chain that is broken is said, and does not keep the rest from
/// being shown.
///
/// # Errors
/// When its own manifest cannot be read.
pub fn show(dir: &Path) -> Result<Summary, Error> {
    let files = Files::default();
    let own = files.dir(dir)?;
    let manifest = read_manifest(&files, &own)?;
    let (parents, broken) = match read_chain(&files, dir) {
        Ok(members) => {
            let link =
                |member: &crate::chain::Member| Link { id: member.manifest.id, path: member.dir.path().to_owned() };
            (members[1..].iter().map(link).collect(), None)
        }
        Err(error) => (Vec::new(), Some(in_full(&error))),
    };
    let state = files
        .read_in(&own, STATE, manifest.state.bytes.min(MAX_STATE))
        .ok()
        .and_then(|bytes| Sections::decode(&bytes).ok());
    let sections =
        state.map(|sections| sections.iter().map(|(name, bytes)| (name.to_owned(), bytes.len() as u64)).collect());
    Ok(Summary {
        id: manifest.id,
        version: manifest.version,
        created: manifest.created,
        machine: manifest.machine.clone(),
        full: manifest.parent.is_none(),
        parents,
        broken,
        memory: manifest.memory.regions.iter().map(|region| (region.guest_address, region.pages)).collect(),
        layers: layers(&files, &own, &manifest),
        sections: sections.unwrap_or_default(),
        warm: files.open_in(&own, WARM).is_ok(),
        ignored: manifest.unknown.into_keys().collect(),
    })
}

fn layers(files: &Files, dir: &Dir, manifest: &Manifest) -> Vec<LayerSummary> {
    let summary = |name: &str, disk: Option<usize>, entry: &LayerEntry| {
        let file = files.open_in(dir, &format!("{}.data", layer_name(disk)));
        LayerSummary {
            name: name.to_owned(),
            bytes: entry.bytes,
            data_pages: entry.data_pages,
            zero_pages: entry.zero_pages,
            compression: entry.compression,
            disk_bytes: file.ok().and_then(|file| file.metadata().ok()).map_or(0, |meta| meta.blocks() * 512),
        }
    };
    let disks = manifest.disks.iter().enumerate().map(|(at, disk)| summary(&disk.name, Some(at), &disk.layer));
    std::iter::once(summary("memory", None, &manifest.memory.layer)).chain(disks).collect()
}

/// An error and its causes, in a line.
fn in_full(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
