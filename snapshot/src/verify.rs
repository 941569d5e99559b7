//! Verification: every byte of a snapshot and of those it depends on.

use std::path::Path;

use clade_memory::{PAGE_SHIFT, PAGE_SIZE, PageRange};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use serde::Serialize;

use crate::chain::{ChainSpace, Snapshot, read_working_set};
use crate::error::Error;
use crate::files::FileOps;
use crate::format::{CHUNK_PAGES, Damage};
use crate::layer::LayerFile;
use crate::parents::ParentDirs;

/// Data that was read and found intact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verified {
    /// Snapshots in the chain.
    pub snapshots: u64,
    /// Chunks of data in all of them.
    pub chunks: u64,
    /// Bytes of the stored chunks.
    pub bytes: u64,
}

/// Compares all data of the snapshot in `dir`, and of those it depends on, with checksums. Its
/// parents must be in `parents`.
///
/// # Errors
/// The first damage that is found.
pub fn verify(dir: &Path, parents: &ParentDirs) -> Result<Verified, Error> {
    verify_with(&FileOps::default(), dir, parents)
}

pub(crate) fn verify_with(files: &FileOps, dir: &Path, parents: &ParentDirs) -> Result<Verified, Error> {
    let snapshot = Snapshot::with(files, dir, parents)?;
    for member in &snapshot.0.members {
        read_working_set(files, member)?;
    }
    let mut verified = Verified { snapshots: snapshot.depth() as u64, ..Verified::default() };
    for space in std::iter::once(&snapshot.0.memory).chain(&snapshot.0.disks) {
        verify_space(files, space, &mut verified)?;
    }
    Ok(verified)
}

fn verify_space(files: &FileOps, space: &ChainSpace, verified: &mut Verified) -> Result<(), Error> {
    for layer in &space.layers {
        let mut buffer = Vec::new();
        for chunk in &layer.index.chunks {
            buffer = layer.read_chunk(files, chunk, buffer)?;
            verified.chunks += 1;
            verified.bytes += u64::from(chunk.stored);
        }
        if !layer.index.packed {
            holes_are_zeros(files, layer)?;
        }
    }
    Ok(())
}

/// Checks that the holes of a mapped file read as zeros, because mappings span them.
fn holes_are_zeros(files: &FileOps, layer: &LayerFile) -> Result<(), Error> {
    let sought = |errno: Errno| Error::file("searched for holes", &layer.path, errno.into());
    let mut bytes = vec![0; (CHUNK_PAGES << PAGE_SHIFT) as usize];
    let mut at = 0;
    while at < layer.index.data_bytes {
        let data = match seek(&layer.file, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(sought(errno)),
        };
        let hole = seek(&layer.file, SeekFrom::Hole(data)).map_err(sought)?.max(data + 1);
        let there = PageRange::new(data >> PAGE_SHIFT, hole.min(layer.index.data_bytes).div_ceil(PAGE_SIZE));
        let mut done = there.start();
        let written: Vec<PageRange> = layer.index.data_within(there).collect();
        for range in written.into_iter().chain([PageRange::new(there.end(), there.end())]) {
            while done < range.start() {
                let part = PageRange::new(done, range.start().min(done + CHUNK_PAGES));
                let bytes = &mut bytes[..part.bytes()];
                files.read_exact_at(&layer.file, &layer.path, bytes, part.offset())?;
                if let Some(stray) = bytes.iter().position(|byte| *byte != 0) {
                    let page = part.start() + (stray as u64 >> PAGE_SHIFT);
                    return Err(Error::damaged(&layer.path, Damage::Stray { page }));
                }
                done = part.end();
            }
            done = range.end().max(done);
        }
        at = hole;
    }
    Ok(())
}
