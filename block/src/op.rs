//! Requests to a disk, and their results.

use clade_host_io::Fragment;

use super::DiskError;

/// A request to a disk. Offsets and lengths are in bytes, and multiples of a sector.
#[derive(Debug)]
pub enum DiskOp {
    /// Reads into the buffers, from `offset` on.
    Read {
        /// First byte on the disk.
        offset: u64,
        /// The memory to fill.
        buffers: Vec<Fragment>,
    },
    /// Writes the buffers, from `offset` on.
    Write {
        /// First byte on the disk.
        offset: u64,
        /// The memory to write.
        buffers: Vec<Fragment>,
    },
    /// Makes the range read as zeros.
    Zero {
        /// First byte on the disk.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// Whether the file system may free the range.
        unmap: bool,
    },
    /// A hint that the guest no longer needs the range. Parts of clusters may stay.
    Discard {
        /// First byte on the disk.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Makes all finished writes durable: in the image, or in the journal beside it once the disk
    /// was forked. For a child, or for a disk made of a snapshot's files, a flush does nothing: its
    /// writes do not outlive the process.
    Flush,
}

/// The end of a request.
#[derive(Debug)]
pub struct DiskDone {
    /// The token it was submitted with.
    pub token: u64,
    /// Its result.
    pub result: Result<(), DiskError>,
}

/// Failures of a disk on the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskHealth {
    /// Requests that failed because a file system had no room, the image's or the overlays'.
    pub no_room: u64,
    /// The system has failed to make a write durable. All later flushes fail.
    pub lost: bool,
}
