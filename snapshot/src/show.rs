//! Inspection of a snapshot.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::chain::{MAX_STATE, read_chain, read_manifest};
use crate::dir::Dir;
use crate::error::Error;
use crate::files::FileOps;
use crate::format::{Compression, FormatVersion, LayerEntry, Manifest, Sections, SnapshotId};
use crate::parents::ParentDirs;
use crate::staging::{STATE, WORKING_SET, layer_name};

/// A layer of this snapshot: of memory, or of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LayerSummary {
    /// `memory`, or the disk's name.
    pub name: String,
    /// Length of the space in bytes.
    pub bytes: u64,
    /// Pages stored as data in this layer.
    pub data_pages: u64,
    /// Pages known to be zeros.
    pub zero_pages: u64,
    /// How the pages are stored.
    pub compression: Compression,
    /// Bytes allocated on the file system.
    pub disk_bytes: u64,
}

/// A parent in a chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ChainLink {
    /// The parent's identity.
    pub id: SnapshotId,
    /// The parent's directory.
    pub path: PathBuf,
}

/// The description of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// The snapshot's identity.
    pub id: SnapshotId,
    /// The version of its format.
    pub version: FormatVersion,
    /// Creation time, in seconds since 1970.
    pub created: u64,
    /// The architecture of its host.
    pub machine: String,
    /// Whether it depends on no other snapshot.
    pub full: bool,
    /// The snapshots it depends on, nearest first.
    pub parents: Vec<ChainLink>,
    /// Why the chain cannot be opened, if it cannot.
    pub broken: Option<String>,
    /// Guest-physical address and number of pages of each memory region.
    pub memory: Vec<(u64, u64)>,
    /// The layers: memory, then disks.
    pub layers: Vec<LayerSummary>,
    /// Names and lengths of sections. None when the state file cannot be read.
    pub sections: Vec<(String, u64)>,
    /// Whether a working set was recorded.
    pub working_set: bool,
    /// Entries of a later minor version, which were ignored.
    pub ignored: Vec<String>,
}

/// Describes the snapshot in `dir`, whose parents must be in `parents`. A broken chain is reported in the result.
///
/// # Errors
/// When the snapshot's own manifest cannot be read.
pub fn show(dir: &Path, parents: &ParentDirs) -> Result<Summary, Error> {
    let files = FileOps::default();
    let own = files.dir(dir)?;
    let manifest = read_manifest(&files, &own)?;
    let (parents, broken) = match read_chain(&files, dir, parents) {
        Ok(members) => {
            let link = |member: &crate::chain::Member| ChainLink {
                id: member.manifest.id,
                path: member.dir.path().to_owned(),
            };
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
        working_set: files.open_in(&own, WORKING_SET).is_ok(),
        ignored: manifest.unknown.into_keys().collect(),
    })
}

fn layers(files: &FileOps, dir: &Dir, manifest: &Manifest) -> Vec<LayerSummary> {
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

/// An error and its causes, in one line.
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
